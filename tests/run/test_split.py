"""Split training as configs say it: every scheme, from a table to a round."""

import functools
import math
import re

import jax
import numpy as np
import pyarrow.parquet
import pytest

import split_worlds as worlds
import toy
from fedjax_peft import (
  __main__,
  build,
  config,
  data,
  losses,
  peft,
  record,
  split,
  splitting,
  tree,
)

pytestmark = pytest.mark.usefixtures("standard_promotion")

SHAPE = 'model.options={vocab=40, width=8, ffn=8, heads=2, depth=1, keep="all"}'
ENDS = 'split.ends={device="layers/0"}'
QUERY = '{method="lora", rank=1, where=".*/query"}'
BOTH = f'model.peft=[{QUERY}, {{method="tune", where="server/head/bias"}}]'
AT_SERVER = 'model.peft=[{method="tune", where="server/head/.*"}]'
SGD = ("server.optimizer=sgd", "server.learning_rate=1.0")
ALONE = ('uplink=[{link="count"}]', "execution.width=1", *SGD)
STEPS = ("client.steps=2", "execution.width=5", 'uplink=[{link="weigh"}]')
EIGHT = '[{link="affine", bits=8, per="token"}]'
CUTS = 'split.cuts={1=0.5, "layers/0"=0.25, whole=0.25}'

SCHEMES = {
  "splitfed": (ENDS, BOTH, f"split.up={EIGHT}", f"split.down={EIGHT}"),
  "shared_server": (ENDS, BOTH, *ALONE),
  "sequential": (ENDS, BOTH, *ALONE),
  "lockstep": (ENDS, BOTH, *STEPS),
  "one_gradient": (ENDS, BOTH, *STEPS),
  "local_loss": (
    ENDS,
    f'model.peft=[{QUERY}, {{method="tune", where="device_head/bias"}}]',
  ),
}
OTHERS = {
  "cuts": (CUTS, f'model.peft=[{QUERY}, {{method="tune", where="head/bias"}}]'),
  "cache": (ENDS, AT_SERVER, "split.cache=float32"),
}
COHORT = (0, 3, 5, 6, 10)


def load(tiny, *overrides):
  return config.load(tiny, [SHAPE, *overrides])


def overrides_of(name):
  if name in OTHERS:
    return OTHERS[name]
  return (f"split.scheme={name}", *SCHEMES[name])


def test_every_scheme_of_a_config_is_played_here():
  known = splitting.IN_TURN.keys() | {*splitting.LOCKSTEP}
  assert known | {"splitfed", "local_loss"} == SCHEMES.keys()


@pytest.mark.parametrize("name", [*SCHEMES, *OTHERS])
def test_a_scheme_is_built_and_plays_a_round(tiny, name):
  run = load(tiny, *overrides_of(name))
  parts = build.build(run)
  settings = build.settings(run, parts)
  job = parts.algorithm.work
  player = toy.Player(
    parts.algorithm, parts.data, parts.model.base, settings, 5
  )
  state, outcome = player.play(COHORT)
  assert math.isfinite(outcome.record["train/loss"])
  assert outcome.record["train/clients"] == 5
  assert outcome.record["train/nonfinite"] == 0
  for path, leaf in state.params.items():
    still = job.placement[path] == "frozen"
    same = np.array_equal(leaf, parts.model.params[path])
    # With B = 0 no gradient reaches A in a step.
    assert same == still or path.endswith("lora_a"), path
  CHECKS[name](parts, settings)


STREAM = 8 * 8  # values of an example's message, T D
ROWS = 4


def check_splitfed(parts, settings):
  """Codes and two floats a token go up and back; lengths and labels go up."""
  one = ROWS * (STREAM + 8 * 8)
  assert parts.algorithm.work.split.bytes(ROWS, {}) == (one + ROWS * 8, one)
  device = [k for k in parts.model.params if k.startswith("device/")]
  assert 0 < len(device) < len(parts.model.params)
  leaves = tree.nbytes({k: parts.model.params[k] for k in device})
  assert parts.algorithm.bytes(5)["cloud/down_bytes"] == leaves
  assert len(jax.devices()) == settings.devices


def check_one_lane(parts, settings):
  assert parts.algorithm.work.lanes == "one"
  assert (settings.devices, settings.width) == (1, 1)


def check_all_lanes(parts, settings):
  assert parts.algorithm.work.lanes == "all"
  assert (settings.devices, settings.width) == (1, 5)


def check_local_loss(parts, settings):
  assert not parts.algorithm.work.split.waits
  assert parts.algorithm.work.split.bytes(ROWS, {})[1] == 0
  assert "device_head/bias" in parts.model.params


def check_cuts(parts, settings):
  cuts = parts.data.traits["cut"]
  places, counts = np.unique(cuts, return_counts=True)
  assert dict(zip(places, counts)) == {1: 6, 2: 3, 3: 3}
  measured = parts.algorithm.work.split
  stream = ROWS * STREAM * 4
  assert measured.bytes(ROWS, {"cut": 2}) == (stream + ROWS * 8, stream)
  assert measured.bytes(ROWS, {"cut": 3}) == (0, 0)


def check_cache(parts, settings):
  examples = parts.data.examples
  assert examples["cut/x"].shape == (len(examples["label"]), 8, 8)
  measured = parts.algorithm.work.split
  assert measured.flops(ROWS, {})[0] == 0
  assert measured.bytes(ROWS, {}) == (0, 0)  # all has crossed before
  assert measured.before({}) == STREAM * 4 + 8  # with length and label


@pytest.mark.parametrize("clock", [None, "synchronous"])
def test_what_is_remembered_crosses_in_a_clients_first_round_only(tiny, clock):
  """Whether a network is simulated or not."""
  there = [f'network.clock={{kind="{clock}"}}'] if clock else []
  parts = build.build(load(tiny, *OTHERS["cache"], *there))
  memory, seen = parts.cohort.init(), set()
  assert not memory["sent"].any()
  for number in range(4):
    turn, memory = parts.cohort.turn(memory, number, {})
    fresh = sorted(set(turn.clients.tolist()) - seen)
    crossed = (STREAM * 4 + 8) * int(parts.data.train.sizes[fresh].sum())
    assert turn.record["cut/first_up_bytes"] == crossed
    if clock:
      assert turn.record["device/stream_up_bytes"] == crossed
    seen |= set(fresh)
  assert sorted(seen) == np.flatnonzero(memory["sent"]).tolist()
  assert len(seen) < 20  # some came again


CHECKS = {
  "splitfed": check_splitfed,
  "shared_server": check_one_lane,
  "sequential": check_one_lane,
  "lockstep": check_all_lanes,
  "one_gradient": check_all_lanes,
  "local_loss": check_local_loss,
  "cuts": check_cuts,
  "cache": check_cache,
}


def pipe_of(tiny, *overrides):
  """What a config makes of a tiny encoder."""
  run = config.load(tiny, list(overrides))
  splitting.is_split(run)
  return splitting.module_of(run, worlds.zoo("encoder"), people())


def people(labels=True):
  examples = worlds.examples("encoder", 4)
  label = examples if labels else {k: examples[k] for k in ("tokens", "length")}
  classes = ("a", "b", "c") if labels else ()
  return data.population(label, [0, 0, 1, 1], classes=classes)


def test_what_is_left_of_a_model_is_the_servers(tiny):
  assert pipe_of(tiny, ENDS).names == ("device", "server")
  for end in ('"head"', "4"):
    ends = f'split.ends={{device=1, server="layers/1", home={end}}}'
    pipe = pipe_of(tiny, ends)
    assert pipe.names == ("device", "server", "home")
  assert pipe_of(tiny, "split.ends={device=1, edge=2}").names[-1] == "server"
  assert not splitting.is_split(config.load(tiny, []))


def test_links_and_ways_back_are_those_of_the_table(tiny):
  down = 'split.down=[{link="top_k", fraction=0.1}, {link="int8"}]'
  ends = 'split.ends={device=1, server=2, home="head"}'
  first, second = pipe_of(tiny, ends, f"split.up={EIGHT}", down).wires
  assert first == second
  assert first.up.parts[0].name == "affine(8)"
  assert [part.name for part in first.down.parts] == ["top_k", "int8"]
  # Without a way back to the device, those behind it still hear theirs.
  for silent in ("split.gradient=false", "split.cache=bfloat16"):
    first, second = pipe_of(tiny, ends, silent, down).wires
    assert first.down is None
    assert [part.name for part in second.down.parts] == ["top_k", "int8"]
  one = pipe_of(tiny, ENDS, "split.scheme=one_gradient").wires
  assert [wire.common for wire in one] == [True]
  moving = pipe_of(tiny, CUTS, f"split.up={EIGHT}")
  assert moving.crossing.wire.up.parts[0].name == "affine(8)"


def test_the_head_of_a_device_fits_what_its_part_hands_on(tiny):
  local = "split.scheme=local_loss"
  assert pipe_of(tiny, ENDS, local).device_head.kernel.shape == (8, 3)
  run = config.load(tiny, ["split.ends={device=1}", local])
  given = worlds.examples("cnn", 3)
  population = data.population(given, [0, 1, 1], classes=("a", "b", "c"))
  pipe = splitting.module_of(run, worlds.zoo("cnn"), population)
  assert pipe.device_head.kernel.shape == (4, 3)  # channels, not a width


def test_a_remembered_part_is_left_out_of_what_is_trained(tiny):
  run = config.load(tiny, [ENDS, "split.cache=bfloat16"])
  pipe = split.pipeline(worlds.zoo("encoder"), {"device": 2, "server": None})
  pipe = peft.tune(pipe, "server/.*")
  module, population = splitting.remembered(run, pipe, people())
  assert population.examples["cut/x"].dtype == "bfloat16"
  assert module.names == pipe.names
  run = config.load(tiny, [ENDS])
  assert splitting.remembered(run, pipe, population) == (pipe, population)
  assert splitting.loss_of(run, losses.classification) is losses.classification


@pytest.mark.parametrize(
  ("overrides", "sentence"),
  [
    ((ENDS, CUTS), "got both; remove one of them"),
    (("split.scheme=lockstep",), "got neither ends nor cuts"),
    (("split.cache=float32",), "must say where the model is cut"),
    ((CUTS, "split.scheme=lockstep"), "split.cuts with scheme='lockstep'"),
    ((ENDS, "split.bits=true"), "write split.cuts, and leave up and down out"),
    ((CUTS, "split.bits=true", f"split.up={EIGHT}"), "leave up and down out"),
    ((CUTS, "split.bits=true"), "leaves the bits of a value to network.alloc"),
    ((CUTS, "split.cache=float32"), "cache='float32'; use split.ends"),
    (
      ("split.ends={server=1}",),
      "taken: got {'server': 1}; write home = 'head",
    ),
    (
      (ENDS, "split.gradient=false", f"split.down={EIGHT}"),
      "none come back: leave split.down out",
    ),
    (
      (ENDS, "split.scheme=local_loss", "model.loss=next_token"),
      "got model.loss='next_token' and data of 3 classes; use another",
    ),
    ((CUTS, "split.gradient=false"), "use a pipeline for the others"),
    (('split.ends={device="layer/0"}',), "did you mean 'layers/0'"),
    (("split.ends={device=9}",), "after 1 to 4 stages, got 9"),
    ((ENDS, 'split.up=[{link="weigh"}]'), "only on the sum"),
    ((ENDS, 'split.up=[{link="afine"}]'), "split.up.0.*did you mean 'affine'"),
    ((ENDS, 'split.down=[{link="affine"}]'), "split.down.0: option 'bits'"),
  ],
)
def test_a_table_that_does_not_cut_is_refused(tiny, overrides, sentence):
  with pytest.raises(ValueError, match=sentence):
    pipe_of(tiny, *overrides)


def test_a_device_without_classes_has_no_loss_of_its_own(tiny):
  run = config.load(tiny, [ENDS, "split.scheme=local_loss"])
  with pytest.raises(ValueError, match="data of 0 classes"):
    splitting.module_of(run, worlds.zoo("encoder"), people(labels=False))


@pytest.mark.parametrize(
  ("table", "sentence"),
  [
    (
      "{layers=1.0}",
      "must name stages \\(embeddings, layers/0, layers/1, head",
    ),
    ("{0=1.0}", "or 'whole': got '0'"),
    ("{5=1.0}", "or 'whole': got '5'"),
    ("{1=0.5, 2=0.4}", "split.cuts must be shares of the clients that sum to"),
    ("{1=-0.5, 2=1.5}", "split.cuts must be shares"),
  ],
)
def test_cuts_that_are_no_shares_of_stages_are_refused(tiny, table, sentence):
  run = config.load(tiny, [f"split.cuts={table}"])
  with pytest.raises(ValueError, match=sentence):
    splitting.population_of(run, worlds.zoo("encoder"), people())


@pytest.mark.parametrize(
  ("overrides", "sentence"),
  [
    (('algorithm={name="scaffold"}',), "leave 'algorithm' out, or use scheme"),
    (('aggregate.reduce={method="median"}',), "leave 'aggregate' out"),
    (('attack={kind="sign_flip"}',), "leave 'attack' out"),
    (("client.proximal=0.1",), "has no proximal term: got client.proximal=0.1"),
  ],
)
@pytest.mark.parametrize("scheme", ["sequential", "one_gradient"])
def test_what_a_scheme_says_itself_is_not_dropped_in_silence(
  tiny, scheme, overrides, sentence
):
  run = config.load(tiny, [ENDS, f"split.scheme={scheme}", *overrides])
  with pytest.raises(ValueError, match=sentence):
    splitting.algorithm_of(run, people(), worlds.plain(), worlds.LOCAL, None)


# Memories: links that are gone, and links that say later what they lost.

OUTAGE = 'network.faults=[{fault="outage", rate=0.3}]'
NETWORK = (
  "rounds=2",
  *overrides_of("splitfed"),
  "client.steps=5",
  'network.radio={kind="wired", up=1e6}',
  'uplink=[{link="weigh"}]',
  "evaluate.every=2",
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_text):
  """Runs a config once; what it writes: records, its ledger round by round."""

  @functools.cache
  def run(*overrides):
    root = tmp_path_factory.mktemp("split")
    path, out = root / "tiny.toml", root / "run"
    path.write_text(tiny_text)
    command = ["train", str(path), "--out", str(out), "--traceback"]
    for one in (*NETWORK, *overrides):
      command += ["--set", one]
    assert __main__.main(command) == 0
    tables = [
      pyarrow.parquet.read_table(path).to_pydict()
      for path in sorted((out / "ledger").iterdir())
    ]
    return record.read(out / "records.jsonl"), tables

  return run


def planned(parts, rounds):
  memory, found = parts.cohort.init(), []
  for number in range(rounds):
    turn, memory = parts.cohort.turn(memory, number, {})
    found.append(turn)
  return found


def test_links_that_go_cost_what_crossed_before(tiny):
  parts = build.build(load(tiny, *NETWORK, OUTAGE))
  whole = build.build(load(tiny, *NETWORK))
  sizes, both = parts.data.train.sizes, []
  measured = whole.algorithm.work.split
  for turn, before in zip(planned(parts, 2), planned(whole, 2), strict=True):
    online = turn.traits["online"]
    assert online.dtype == np.int32
    assert turn.clients.tolist() == before.clients.tolist()
    gone = np.minimum(online, 5)
    both += gone.tolist()
    place = {c: k for k, c in enumerate(turn.table["client"])}
    for c, steps in zip(turn.clients, gone, strict=True):
      rows = batches_of(sizes[c])[:steps]
      up, down = np.sum(
        [(0, 0), *(measured.bytes(n, {}) for n in rows)], axis=0
      )
      row = place[c]
      mine = {k: v[row] for k, v in turn.table.items()}
      full = {k: v[row] for k, v in before.table.items()}
      assert mine["stream_up_bytes"] == up
      assert mine["stream_down_bytes"] == down
      assert mine["up_bytes"] - up == full["up_bytes"] - full["stream_up_bytes"]
      assert mine["stream_up_seconds"] == pytest.approx(8 * up / 1e6)
      same = ("flops", "compute_seconds", "compute_joules", "down_seconds")
      for name in same:  # the device goes on, and the model crosses
        assert mine[name] == pytest.approx(full[name]), name
      less = ("send_joules", "receive_joules", "wait_seconds", "server_flops")
      for name in less:
        assert (mine[name] < full[name]) == (steps < 5), name
  assert 0 < min(both) + 1 < 6
  assert len(set(both)) > 2


def batches_of(size, batch=4, steps=5):
  """Examples in each batch of a client, pass after pass."""
  rest = [size % batch] if size % batch else []
  one = [batch] * (size // batch) + rest
  return (one * steps)[:steps]


@pytest.mark.slow
def test_a_run_whose_links_go_counts_them_and_goes_on(trained):
  lines, tables = trained(OUTAGE)
  for line, table in zip(lines, tables, strict=True):
    for way in ("up", "down"):
      crossed = sum(table[f"stream_{way}_bytes"])
      assert line[f"cut/{way}_bytes"] == crossed
      assert line[f"device/stream_{way}_bytes"] == crossed
    assert math.isfinite(line["train/loss"])
  whole, _ = trained()
  assert lines[0]["cut/up_bytes"] < whole[0]["cut/up_bytes"]
  assert lines[1]["train/loss"] != whole[1]["train/loss"]


@pytest.mark.slow
def test_an_outage_that_never_comes_changes_nothing(trained):
  never, tables = trained(OUTAGE.replace("0.3", "0.0"))
  whole, others = trained()
  assert tables == others
  for line, other in zip(never, whole, strict=True):
    assert line.keys() == other.keys()
    # What is remembered is a part of the state.
    odd = {k for k in line if line[k] != other[k] and "wall/" not in k}
    assert odd == {"state/digest"}


def test_feedback_of_a_config_is_that_of_its_wires(tiny):
  run = load(tiny, *overrides_of("splitfed"), "split.feedback=true")
  parts = build.build(run)
  held = [k for k in parts.model.params if k.startswith("memory/")]
  assert len(held) == 2
  assert {parts.algorithm.work.placement[k] for k in held} == {"device"}
  player = toy.Player(
    parts.algorithm,
    parts.data,
    parts.model.base,
    build.settings(run, parts),
    5,
  )
  state, outcome = player.play(COHORT)
  assert outcome.record["train/nonfinite"] == 0
  rows = state.clients.local[held[0]]
  assert rows.shape == (len(parts.data), ROWS, 8, 8)
  touched = np.abs(rows).max(axis=(1, 2, 3)) > 0
  assert np.flatnonzero(touched).tolist() == list(COHORT)


@pytest.mark.parametrize(
  ("overrides", "sentence"),
  [
    ((OUTAGE,), "got split.ends={} cuts={} scheme='splitfed'"),
    ((OUTAGE, CUTS), "split.ends with scheme='splitfed', or use the fault"),
    ((OUTAGE, ENDS, "split.scheme=sequential"), "scheme='sequential'"),
    ((OUTAGE, ENDS, "split.scheme=lockstep"), "scheme='lockstep'"),
    ((OUTAGE, ENDS, "split.scheme=local_loss"), "scheme='local_loss'"),
    ((OUTAGE, ENDS, "split.gradient=false"), "gradient=False"),
    ((OUTAGE, ENDS, "split.cache=float32"), "cache='float32'"),
    (("split.feedback=true", CUTS), "moving cuts, a cache or one common gra"),
    (
      ("split.feedback=true", ENDS, "split.cache=float32"),
      "got split.cache='fl",
    ),
    (("split.feedback=true", ENDS, "split.scheme=one_gradient"), "got split.s"),
    (
      ("split.feedback=true", ENDS, BOTH),
      "no link loses anything on its way up or",
    ),
    (
      (
        "split.feedback=true",
        ENDS,
        BOTH,
        f"split.up={EIGHT}",
        'algorithm={name="scaffold"}',
      ),
      "no algorithm but fedavg leaves alone: got algorithm={'name': 'scaff",
    ),
    (("split.feedback=true",), "must say where the model is cut"),
  ],
)
def test_memories_that_nobody_could_use_are_refused(tiny, overrides, sentence):
  with pytest.raises(ValueError, match=re.escape(sentence)) as refused:
    build.build(load(tiny, *overrides))
  assert "\n" not in str(refused.value)
