"""Kernels, compiled by the compilers of TPUs and GPUs that are not there."""

import pytest

import deviceless
import kernel_cases
from fedjax_peft.kernels import dispatch

pytestmark = pytest.mark.aot

KIB, MIB = 2**10, 2**20

# What a kernel may need beside its arguments and results, as a multiple of
# their bytes and a constant, and what for. Any other kernel needs nothing.
TEMPORARY = {
  ("mask_add", "tpu"): (
    (0.5, 256 * KIB),
    "a copy of q: the tiles of [C, D] hold 8 rows, which are apart in a block",
  ),
  ("weighted_sum", "tpu"): (
    (2, 256 * KIB),
    "two copies of the wires, in whose tiles clients and blocks change places",
  ),
  ("top_k", "tpu"): ((8, 256 * KIB), "XLA finds the indices of what is kept"),
  ("top_k", "gpu"): ((8, 256 * KIB), "XLA finds the indices of what is kept"),
  ("quantize", "gpu"): ((0, KIB), "the key, and a short block padded"),
  ("lora_matmul", "gpu"): ((0.5, KIB), "the factors, their rank padded to 16"),
  ("dequantize", "gpu"): ((0, KIB), "a short block padded"),
}
# The analysis for a v5p counts what XLA keeps in VMEM, for others it does not.
VMEM = {"v5p": 16 * MIB}
# The assembler puts one word aside where one more program then fits on a core.
SPILLED = {("mask_add", "sm_80"): 4}


@pytest.fixture(params=deviceless.TARGETS)
def target(request):
  return request.param


@pytest.fixture
def platform(target):
  return deviceless.platform(target)


@pytest.fixture(params=kernel_cases.names())
def kernel(request, platform):
  """A kernel that is written for the platform."""
  kernel = dispatch.KERNELS[request.param]
  if getattr(kernel, f"pallas_{platform}") is None:
    pytest.skip(f"XLA is left in charge: {kernel.why[platform]}")
  return kernel


@pytest.fixture
def compiled(kernel, target, facts):
  """{case: facts} of the kernel's shapes."""
  of = {
    name: found
    for name, found in facts[target].items()
    if name.startswith(f"{kernel.name}: ")
  }
  assert of
  return of


def test_every_shape_compiles(compiled):
  errors = {name: found.get("error") for name, found in compiled.items()}
  assert errors == dict.fromkeys(compiled)


def test_the_kernel_is_in_the_program(compiled):
  for name, found in compiled.items():
    assert found["empty"] or found["calls"], name


def test_no_more_memory_is_needed_than_for_what_comes_and_goes(
  compiled, kernel, platform, target
):
  (times, more), _ = TEMPORARY.get((kernel.name, platform), ((0, 0), ""))
  for name, found in compiled.items():
    limit = max(times * found["bytes"] + more, VMEM.get(target, 0))
    assert found["temp"] <= limit, name


def test_a_donated_accumulator_holds_the_result(compiled, platform):
  for name, found in compiled.items():
    assert found["alias"] >= found["donated"], name
    if platform == "gpu":  # a TPU's tiles are padded
      assert found["alias"] == found["donated"], name


@pytest.mark.parametrize("target", deviceless.GPUS, indirect=True)
def test_no_register_is_spilled(compiled, kernel, target):
  if deviceless.ptxas() is None:
    pytest.skip("nvidia-cuda-nvcc is not installed")
  for name, found in compiled.items():
    assert found["empty"] or found["ptx"], name
    for program in found["ptx"].values():
      limit = SPILLED.get((kernel.name, target), 0)
      assert program["spills"] <= limit, name


@pytest.mark.parametrize("target", deviceless.GPUS, indirect=True)
@pytest.mark.parametrize("kernel", ["mask_add"], indirect=True)
def test_masks_shift_no_sign_in_on_a_gpu(compiled):
  for name, found in compiled.items():
    for program in found["ptx"].values():
      assert program["shr.s32"] == 0, name


# Bundles of a kernel's busiest loop on a TPU v5e: {case: (loops around it,
# limit)}, and what it works on. The limits of the weighted sums are what the
# best of several variants needed when they were designed, those of the others
# 5 % more than they need.
BUDGETS = {
  "weighted_sum: 256 clients of 2^20 values, 8 bits": (1, 3107),  # 2 MiB
  "weighted_sum: 256 clients of 2^20 values, 4 bits": (1, 2 * 1799),  # 1 MiB
  "add_rows: 64 clients of 2^20 values, uint32": (1, 588),  # 1 MiB
  "quantize: message of 76,038 values, 8 bits": (1, 147),
  "dequantize: message of 76,038 values, 8 bits": (1, 23),
}
MASK = "mask_add: a large message, one client"
SCHEDULED = (*BUDGETS, MASK)


@pytest.mark.parametrize("case", BUDGETS)
def test_schedules_keep_to_their_budgets(case, schedules):
  loops, limit = BUDGETS[case]
  (found,) = schedules[case].values()
  assert sum(found["bundles"][loops]) <= limit


def test_masks_are_made_once_and_shift_no_sign_in_on_a_tpu(schedules):
  found = schedules[MASK]["mask_add"]
  body, subtract, rest = found["bundles"][2]
  assert body + rest <= 926  # what is not added is subtracted: one of the two
  assert body + subtract + rest <= 970
  rotations = 2 * 320  # 20 rounds of 4 quarter rounds, on two tiles
  operations = found["operations"]
  assert operations["vshll"] <= rotations
  assert operations["vshrl"] <= rotations + 8
  assert operations["vor"] <= rotations
  assert "vshra" not in operations
  assert found["spills"] == 0
