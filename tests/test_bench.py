"""The benchmark runs, and says what it promises to say."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent


def bench(script, *arguments):
  """The JSON object on the last line of a benchmark."""
  done = subprocess.run(
    [sys.executable, ROOT / "scripts" / script, "--json", *arguments],
    capture_output=True,
    text=True,
    env=os.environ | {"XLA_FLAGS": ""},
    timeout=900,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-800:]
  return json.loads(done.stdout.splitlines()[-1])


def test_lanes_of_heavy_tailed_cohorts_are_nearly_full():
  packing = bench("bench_engine.py", "--only", "packing")["packing"]
  assert packing["useful_fraction"] >= 0.97
  assert packing["ratio_to_bound"] >= 0.97


@pytest.mark.slow
def test_the_engine_benchmark_measures_all_it_promises():
  found = bench("bench_engine.py", "--quick")
  assert found["failed"] == {}
  assert found["w1"]["clients_per_second"] > 0
  assert found["w1"]["path"] == "low-rank local SGD"
  assert found["w2"]["clients_per_second"] > 0
  assert found["w2"]["fraction_of_gemm_ceiling"] > 0
  assert set(found["memory"]["peak_mib"]) == {"100", "1000", "10000"}
  # A small run: the allocator alone moves it by a tenth; kept messages would
  # halve it.
  assert found["memory"]["flatness"] >= 0.8


@pytest.mark.slow
def test_the_kernels_benchmark_measures_all_it_promises():
  found = bench("bench_kernels.py", "--quick")
  assert found["failed"] == {}
  assert found["mask"]["ratio_to_openssl"] > 0
  for name in ("weighted_sum_int8", "weighted_sum_int4", "uint32_sum"):
    assert found[name]["fraction_of_roofline"] > 0
  assert found["quantize"]["gb_per_second"] > 0
  assert found["pairs"]["round_seconds"] >= 0
  kernels = {name.split(":")[0] for name in found["measurements"]["shapes"]}
  assert kernels >= {"lora_matmul", "mask_add", "top_k", "weighted_sum"}


def test_an_unknown_part_is_refused_with_the_known_ones():
  with pytest.raises(AssertionError, match=r"--only takes w1, .*got 'w3'"):
    bench("bench_engine.py", "--only", "w3")


@pytest.mark.slow
def test_the_network_benchmark_measures_all_it_promises():
  found = bench("bench_network.py", "--quick")
  assert found["timelines"]["timelines"] > 0.8 * 1_000 * 20
  assert found["beside"]["turn_seconds"] > 0
  assert set(found["beside"]["round_seconds"]) == {"plain", "simulated"}


@pytest.mark.slow
def test_the_privacy_benchmark_measures_all_it_promises():
  found = bench("bench_privacy.py", "--quick")
  assert found["failed"] == {}
  assert set(found["targets"]) == {
    "simulated.to_masks",
    "protocol.seconds",
    "noise.to_plain",
  }
  # A sum is masked once, and some of it once more; never less.
  assert found["simulated"]["to_masks"] > 0.5
  assert found["simulated"]["lost"] > 0
  for name in "simulated", "protocol", "noise":
    assert found[name]["seconds"] > 0
    assert found[name]["spread"] >= 0
    assert found[name]["peak_mib"] > 0


@pytest.mark.slow
@pytest.mark.data
def test_methods_are_compared_on_every_axis():
  found = bench(
    *("compare_peft.py", "--quick", "--rounds", "1", "--cohort", "4"),
    *("--test-clients", "4", "--only", "lora", "head", "lora, alone"),
  )["methods"]
  (lora,), (head,), (alone,) = (
    found[k] for k in ("lora", "head", "lora, alone")
  )
  assert lora["trained"] > head["trained"]
  assert lora["up_bytes"] > head["up_bytes"] >= 4 * head["trained"]
  assert lora["step_flops"] > head["step_flops"] > 0
  assert lora["step_bytes"] > head["step_bytes"] > 0
  assert alone["down_bytes"] == 0
  for one in lora, head, alone:
    assert 0 <= one["worst_tenth"] <= one["accuracy"] <= 1
