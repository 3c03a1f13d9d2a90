"""Split training as configs say it: every scheme, from a table to a round."""

import math

import jax
import numpy as np
import pytest

import split_worlds as worlds
import toy
from fedjax_peft import (
  build,
  config,
  data,
  losses,
  peft,
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
  assert measured.bytes(ROWS, {})[1] == 0  # nothing at the device learns


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
