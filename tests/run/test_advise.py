"""The commands that advise, and what their advice is worth as a config."""

import csv
import json

import jax
import pyarrow.parquet
import pytest

from fedjax_peft import __main__, advice, advice_command, build, config
from fedjax_peft.split import advising

pytestmark = pytest.mark.usefixtures("standard_promotion")

# No fading and no packet is lost, so that a round is what was said.
CALM = (
  "model.options={vocab=40, width=8, ffn=8, heads=2, depth=1, keep='all'}",
  "client.steps=2",
  "cohort.size=12",
  "data.unseen=0.0",
  'uplink=[{link="weigh"}]',
  'network.radio={kind="radio", bandwidth=1e5, fading="none"}',
  "network.fleet={phone=0.5, gateway=0.5}",
  "split.server_flops=1e9",
)


def command(capsys, *arguments):
  code = __main__.main([str(x) for x in arguments])
  out = capsys.readouterr()
  return code, out.out, out.err


def settings(*overrides):
  return [part for x in (*CALM, *overrides) for part in ("--set", x)]


@pytest.fixture(scope="module")
def path(tmp_path_factory, tiny_text):
  found = tmp_path_factory.mktemp("advise") / "tiny.toml"
  found.write_text(tiny_text)
  return found


@pytest.fixture(scope="module")
def advised(path):
  """Advice for the tiny config; do not change it."""
  whole = advice.whole(config.load(path, CALM))
  with jax.numpy_dtype_promotion("standard"):
    return advice.asked(whole, advising.target(bits=(4, 8)))


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["splitfed", "frozen", "sequential"])
def test_advice_as_a_config_is_a_round_that_takes_what_was_said(
  path, advised, scheme
):
  some = [x for x in advised.trials if x[1].candidate.offer.scheme == scheme]
  best = min(some, key=lambda x: x[0])[1]
  found = advised._replace(scheme=scheme, trial=best)
  before = config.load(path, CALM)
  keys = advice.pasted(found, before)
  lines = [f"{k}={advice_command.toml(v)}" for k, v in keys.items()]
  parts = build.build(config.load(path, [*CALM, *lines]))
  turn, _ = parts.cohort.turn(parts.cohort.init(), 0, {})
  assert len(turn.clients) == 12
  assert turn.record["round/seconds"] == pytest.approx(best.seconds, rel=0.01)
  assert turn.record["round/joules"] == pytest.approx(best.joules, rel=0.01)
  assert turn.record["device/down_bytes"] + turn.record[
    "device/up_bytes"
  ] == pytest.approx(best.columns["bytes"].sum(), rel=0.01)


def test_stages_are_listed_with_what_leaves_them(tiny, capsys):
  code, out, err = command(capsys, "stages", tiny, *settings())
  assert (code, err) == (0, "")
  for name in ("embeddings", "layers/0", "head", "parameters", "FLOPs"):
    assert name in out
  # Of 8 tokens of width 8, floats or bytes, and the length beside them.
  (line,) = [x for x in out.splitlines() if x.startswith("layers/0 ")][-1:]
  assert line.split()[1:] == [str(8 * 8 * 4 + 4), str(8 * 8 + 4)]


def test_advice_is_printed_as_a_table_or_json_and_written(
  tiny, capsys, tmp_path
):
  table, rows = tmp_path / "clients.csv", tmp_path / "clients.parquet"
  only = ("--schemes", "federated")
  arguments = ("advise", tiny, *only, "--out", table, *settings())
  code, out, err = command(capsys, *arguments)
  assert (code, err) == (0, "")
  assert "federated" in out.splitlines()[1]
  assert "--set 'split.cuts={whole = 1.0}'" in out
  with open(table) as file:
    lines = list(csv.DictReader(file))
  assert [int(line["client"]) for line in lines] == [*range(12)]
  assert {line["cut"] for line in lines} == {"3"}
  arguments = ("advise", tiny, *only, "--ranks", 1, "--json", "--out", rows)
  code, out, _ = command(capsys, *arguments, *settings())
  found = json.loads(out)
  assert code == 0
  assert found["scheme"] == "federated"
  assert found["config"]["model.peft"][0]["rank"] == 1
  assert found["clients"]["rank"] == [1] * 12
  assert pyarrow.parquet.read_table(rows).num_rows == 12


@pytest.mark.parametrize(
  ("arguments", "sentence"),
  [
    (("--set", 'split.ends={device="head"}'), "leave split.ends out"),
    (("--weight", "2"), "weight must be in [0, 1]"),
    (("--set", 'network.radio={kind="wired"}'), "chosen in one cell"),
  ],
)
def test_what_cannot_be_advised_is_refused_in_one_sentence(
  tiny, capsys, arguments, sentence
):
  code, _, err = command(capsys, "advise", tiny, *settings(), *arguments)
  assert code == 2
  assert sentence in err
  assert err.count("\n") == 1


def test_adapters_are_named_after_the_part_that_they_are_in():
  tables = ({"method": "lora", "rank": 2}, {"method": "tune", "where": "head"})
  assert advice.in_part(tables, 4, "server/") == [
    {"method": "lora", "rank": 4, "where": "server/(.*/(query|value))"},
    {"method": "tune", "where": "server/(head)"},
  ]
  assert advice.in_part(tables, 0, "") == list(tables)
  assert advice.in_part((), 0, "server/") == [
    {"method": "tune", "where": "server/.*"}
  ]
