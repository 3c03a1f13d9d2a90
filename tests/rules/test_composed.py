"""Methods that are put together from other parts, and what they then are."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import fedjax_peft as fp
import toy
from fedjax_peft import peft, tree
from fedjax_peft.peft import adapter
from tolerance import tol

COHORT = (0, 3, 5, 7, 9)
NEAR = 50 * tol(jnp.float32, 64)  # several steps of training in between


def player(module, **options) -> toy.Player:
  model = fp.model(module, fp.losses.classification, precision="float32")
  how = fp.local(optax.sgd(0.1), batch=4)
  algorithm = options.pop("make", fp.fedavg)(model, how, **options)
  play = toy.Player(algorithm, toy.people(), model.base)
  play.model = model
  return play


def added(play, params) -> dict[str, np.ndarray]:
  """What an adapted module adds to each kernel: merged less plain."""
  plain = toy.Net(nnx.Rngs(0))
  merged = peft.merged(_thawed(play, params))
  return {
    "up": np.asarray(merged.up.kernel[...] - plain.up.kernel[...], np.float64),
    "head": np.asarray(
      merged.head.kernel[...] - plain.head.kernel[...], np.float64
    ),
  }


def _thawed(play, params):
  """The user's module, not frozen, with these values of its adapters."""
  parts = peft.split(play.model.origin)
  values = {k: jnp.asarray(params[k]) for k in parts.params}
  return peft.merge(*parts._replace(params=values))


def clients(play, state, number) -> list[dict]:
  """What each client of the cohort holds after a round, one by one."""
  found = []
  for i in COHORT:
    new, _ = play.play((i,), state=state._replace(round=np.int32(number)))
    found.append(new.params)
  return found


@functools.cache
def cores() -> toy.Player:
  return player(peft.core(toy.Net(nnx.Rngs(0)), 2, "up|head"))


@functools.cache
def heads() -> toy.Player:
  return player(peft.ravan(toy.Net(nnx.Rngs(0)), 1, "up|head", heads=3))


@pytest.mark.slow
@pytest.mark.parametrize(
  "make", [pytest.param(cores, id="fed_sb"), pytest.param(heads, id="ravan")]
)
def test_the_mean_of_cores_is_the_mean_of_models(make):
  play = make()
  state, _ = play.play(COHORT)
  new, _ = play.play(COHORT, state=state)
  weights = np.array([toy.SIZES[i] for i in COHORT], np.float64)
  mine = [added(play, p) for p in clients(play, state, 1)]
  for layer, found in added(play, new.params).items():
    wanted = sum(w * m[layer] for w, m in zip(weights, mine, strict=True))
    np.testing.assert_allclose(found, wanted / weights.sum(), atol=NEAR)


def test_fed_sb_sends_the_cores_only():
  sizes = cores().algorithm.bytes(5)
  assert sizes["cloud/up_bytes"] == 4 * (2 * 2 + 2 * 2) + 4
  assert sizes["cloud/down_bytes"] == 4 * (2 * 2 + 2 * 2)


def test_ravan_sends_heads_of_cores():
  up = heads().algorithm.bytes(5)["cloud/up_bytes"]
  cores_alone = 4 * 2 * 3 * 1 * 1
  gains = 4 * 2 * 3  # the scales of the heads
  assert up == cores_alone + gains + 4


def test_flasc_sends_the_largest_entries_both_ways():
  play = player(
    peft.lora(toy.Net(nnx.Rngs(0)), 2, "up|head"),
    make=fp.flasc,
    down=0.5,
    up=0.25,
  )
  size = tree.size(play.model.params)
  sizes = play.algorithm.bytes(5)
  # A float32 and an int32 for every entry; the weight comes up as well.
  assert sizes["cloud/down_bytes"] == 8 * -(-size // 2)
  assert sizes["cloud/up_bytes"] == 8 * -(-size // 4) + 4
  before = play.start()
  state, _ = play.play((3,))
  moved = sum(
    int(np.sum(np.asarray(before.params[k]) != state.params[k]))
    for k in before.params
  )
  assert 0 < moved <= -(-size // 4)
  state, first = play.play(COHORT)
  for _ in range(6):
    state, last = play.play(COHORT, state=state)
  assert last.record["train/loss"] < first.record["train/loss"]


def test_flasc_clients_start_from_what_they_got():
  """The delta is against the sparse model, not against the server's."""
  module = peft.lora(toy.Net(nnx.Rngs(0)), 2, "up|head")
  play = player(module, make=fp.flasc, down=0.1, up=1.0)
  lazy = player(module, downlink=fp.top_k(0.1))
  a, _ = play.play(COHORT, COHORT)
  b, _ = lazy.play(COHORT, COHORT)
  for x, y in zip(
    jax.tree.leaves(a.params), jax.tree.leaves(b.params), strict=True
  ):
    np.testing.assert_allclose(x, y, atol=NEAR)
  dense, _ = player(module).play(COHORT, COHORT)
  assert not np.allclose(dense.params["up/lora_b"], a.params["up/lora_b"])


def test_slora_goes_on_from_the_best_adapter_of_a_sparse_update():
  first = player(
    peft.sparse(toy.Net(nnx.Rngs(0)), density=0.5, where="up|head")
  )
  state, start = first.play(COHORT)
  for _ in range(4):
    state, _ = first.play(COHORT, state=state)
  updates = {
    adapter.join(path): node.delta()
    for path, (node, _) in adapter.find(
      _thawed(first, state.params), peft.Sparse
    ).items()
  }
  module = fp.rules.start(
    peft.lora(toy.Net(nnx.Rngs(0)), 2, "up|head"), updates
  )
  second = player(module, rule=fp.rules.fedit())
  found = added(second, second.model.params)
  for layer, update in updates.items():
    whole = np.asarray(update, np.float64)
    values = np.linalg.svd(whole, compute_uv=False)
    error = np.linalg.norm(found[layer] - whole)
    np.testing.assert_allclose(
      error, np.sqrt(np.sum(values[2:] ** 2)), rtol=1e-3, atol=NEAR
    )
  _, outcome = second.play(COHORT)
  assert outcome.record["train/loss"] < start.record["train/loss"]


def test_slora_refuses_updates_that_fit_no_adapter():
  module = peft.lora(toy.Net(nnx.Rngs(0)), 2, "up|head")
  with pytest.raises(ValueError, match="did you mean 'up'|'up'"):
    fp.rules.start(module, {"uppp": jnp.zeros((5, 7))})
  with pytest.raises(ValueError, match=r"\[5, 7\].*\[7, 5\]"):
    fp.rules.start(module, {"up": jnp.zeros((7, 5))})


@pytest.mark.parametrize("name", fp.rules.COMPOSED)
def test_every_composed_method_explains_itself(name):
  text = fp.explain(name)
  assert fp.rules.COMPOSED[name].write in text
