"""Boundaries: what may not cross is named before anything is compiled."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fedjax_peft as fp
import split_worlds
import toy
from fedjax_peft import models, notes, placement, split, trust
from fedjax_peft.trust import boundary, cuts

LINK = fp.chain(fp.clip(1.0), fp.weigh(max_weight=8), fp.int8())


def made_of(job=None, link=None, **options):
  tiers = [fp.tier("edge", 2, link=link), fp.tier("cloud", **options)]
  return fp.federated(job or toy.voices(), tiers)


def boundaries(job=None, **options):
  told = list(notes.NOTES.values())[:1]
  return boundary.boundaries(made_of(job, **options), cohort=5, notes=told)


def test_every_boundary_is_listed_with_what_crosses_it():
  found = boundaries(link=LINK)
  assert [(at.name, at.way) for at in found] == [
    ("uplink to 'edge'", "up"),
    ("downlink from 'edge'", "down"),
    ("uplink to 'cloud'", "up"),
    ("downlink from 'cloud'", "down"),
    ("notes", "notes"),
  ]
  for at in found[:-1]:
    assert {k: v.shape for k, v in at.message.items()} == {
      "noise": (2, 3),
      "sum": (5,),
    }
  assert {str(x.dtype) for x in found[0].wire.values()} >= {"int8", "int32"}


def test_bytes_are_those_that_the_algorithm_counts():
  made = made_of(link=LINK)
  counted = made.bytes(5, traits={}, round=0)
  for at in boundary.boundaries(made, cohort=5):
    tier = at.name.split("'")[1]
    assert at.nbytes == counted[f"{tier}/{at.way}_bytes"]


EXACT = trust.Expectation(
  leaves=["noise", "s.m"],
  dtypes=["int8", "float32", "int32"],
  shapes={"sum": [5]},
)


def test_what_may_cross_does():
  found = boundaries(link=LINK)
  most = max(at.nbytes for at in found if at.way == "up")
  trust.check(found, {})
  trust.check(found, {"up": EXACT._replace(most_bytes=most)})


@pytest.mark.parametrize(
  ("may", "words"),
  [
    ({"leaves": ["noise"]}, r"may carry leaves \['noise'\]: got 'sum', "),
    ({"leaves": ["nois", ".*um"]}, "'nois' matches no leaf; .*'noise'"),
    ({"dtypes": ["int8", "float32"]}, r"\(?on the wire: got '.*', int32\[\]"),
    ({"dtypes": ["int9"]}, "must be dtypes such as 'float32', got 'int9'"),
    ({"shapes": {"sum": [4]}}, r"'sum' with shape \[4\]: got float32\[5\]"),
    ({"shapes": {"sums": [5]}}, "trust.up.shapes must be one of"),
    ({"most_bytes": 20}, "may carry 20 bytes a message: got"),
  ],
)
def test_what_may_not_cross_is_named(may, words):
  found = boundaries(link=LINK)
  with pytest.raises(ValueError, match=words):
    trust.check(found, {"up": EXACT._replace(**may)})


def test_one_byte_less_is_too_little():
  found = boundaries(link=LINK)
  most = max(at.nbytes for at in found if at.way == "up")
  with pytest.raises(trust.Violation, match=f"{most - 1} bytes .*got {most}"):
    trust.check(found, {"up": trust.Expectation(most_bytes=most - 1)})


def test_a_private_leaf_must_not_be_reported_whatever_is_expected():
  honest = toy.voices()
  placed = honest.placement | {"sum": placement.DEVICE}

  def finish(carry, sent):
    return {"noise": carry["noise"]}, {"sum": carry["sum"]}

  kept = honest._replace(placement=placed, finish=finish)
  trust.check(boundaries(kept), {})
  told = kept._replace(
    finish=lambda carry, sent: (carry, {"sum": carry["sum"]})
  )
  with pytest.raises(
    trust.Violation,
    match="uplink to 'edge' must not carry leaves that are placed on the "
    "device: got 'sum', float32",
  ):
    trust.check(boundaries(told), {"up": trust.Expectation(leaves=[".*"])})


def test_what_no_run_has_is_refused():
  found = boundaries()
  with pytest.raises(ValueError, match="did you mean 'up'"):
    trust.check(found, {"upp": EXACT})
  with pytest.raises(ValueError, match="but nothing does: this run has"):
    trust.check(found, {"cut": EXACT})


# Cuts.


def wide(kind):
  """Enough examples of a kind for a canary to be told from others."""
  rng = np.random.default_rng(2)
  label = {"label": np.arange(40, dtype=np.int32) % 3}
  if kind in ("vit", "cnn"):
    image = rng.uniform(size=(40, 6, 6)).astype(np.float32)
    return {"image": image} | label
  if kind == "net":
    return dict(toy.people().examples)
  tokens = rng.integers(0, 64, (40, 32), dtype=np.int32)
  return {"tokens": tokens, "length": np.full(40, 32, np.int32)} | label


def pipe(kind, end):
  if kind == "net":
    whole = split_worlds.net()
  else:
    options = split_worlds.ZOO[kind]
    if "vocab" in options:
      options = options | {"vocab": 64}
    made = nnx.eval_shape(lambda: models.load(kind, **options))
    whole = split_worlds.noisy(made)
  return split.pipeline(whole, {"device": end, "server": None})


@pytest.mark.parametrize(
  ("kind", "end", "plain"),
  [
    ("encoder", "embeddings", True),
    ("encoder", "layers/0", False),
    ("decoder", 1, True),
    ("decoder", 2, False),
    ("vit", 1, False),
    ("vit", "layers/0", False),
    ("cnn", 1, False),
    ("net", "a", False),
  ],
)
def test_a_cut_passes_what_a_part_makes_of_examples_and_nothing_else(
  kind, end, plain
):
  made, examples = pipe(kind, end), wide(kind)
  asked = cuts.pairs(examples)
  if not plain:
    trust.refuse_plain(made, asked)
    return
  with pytest.raises(
    trust.Violation, match="cut between 'device' and 'server' must carry .*'x'"
  ):
    trust.refuse_plain(made, asked)


class First(nnx.Module):
  """A stage without weights."""

  def __init__(self, fun):
    self.fun = fun

  def __call__(self, x):
    return self.fun(x)


def along(x):
  return jnp.cumsum(x, axis=1)[:, 1:]


GIVEN = {
  "as it is": lambda x: x,
  "scaled": lambda x: (x - 0.3) / 0.7,
  "in another order": lambda x: x[:, ::-1] * 2,
  "squashed": jnp.tanh,
  "some of it": lambda x: jnp.concatenate([x[:, :2], along(x)], axis=1),
  "rounded": lambda x: jnp.round(x * 50),
}
MADE = {
  "sums": along,
  "signs of sums": lambda x: jnp.sign(along(x)),
  "nothing": jnp.zeros_like,
  "constants": jnp.ones_like,
  "their largest": lambda x: jnp.max(x, axis=1, keepdims=True),
}


@pytest.mark.parametrize("what", [*GIVEN, *MADE])
def test_a_stage_gives_examples_away_if_an_entry_is_of_one_value(what):
  first = First((GIVEN | MADE)[what])
  last = nnx.Linear(5, 3, rngs=nnx.Rngs(0))
  made = split.pipeline(
    split.Modules([("given", first), ("head", last)]),
    {"device": "given", "server": None},
  )
  asked = cuts.pairs(wide("net"))
  if what in MADE:
    trust.refuse_plain(made, asked)
  else:
    with pytest.raises(trust.Violation, match="depend on one value of 'x'"):
      trust.refuse_plain(made, asked)


def test_what_an_example_sends_over_a_cut_is_listed():
  made = pipe("vit", "layers/0")
  spec = {"image": jnp.zeros((6, 6)), "label": jnp.int32(0)}
  (at,) = cuts.boundaries(made, spec)
  assert at.way == "cut"
  assert at.message["x"].shape == (1, 5, 8)
  assert at.nbytes == 5 * 8 * 4
  trust.check([at], {"cut": trust.Expectation(leaves=["x"], most_bytes=160)})
  with pytest.raises(
    trust.Violation, match="cut between 'device' and 'server'"
  ):
    trust.check([at], {"cut": trust.Expectation(most_bytes=159)})
