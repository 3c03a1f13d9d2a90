"""Low-rank local SGD is the same algorithm, and says when it is not."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import fedjax_peft as fp
import toy
from fedjax_peft import factored, tree


class Wide(nnx.Module):
  """Two Linear layers large enough for factors to pay."""

  def __init__(self, rngs, width=32):
    self.up = nnx.Linear(24, width, rngs=rngs)
    self.head = nnx.Linear(width, 20, rngs=rngs)

  def __call__(self, x):
    return self.head(jax.nn.relu(self.up(x)))


class Twice(nnx.Module):
  """A layer that is used two times in a forward pass."""

  def __init__(self, rngs):
    self.layer = nnx.Linear(24, 24, rngs=rngs)

  def __call__(self, x):
    return self.layer(jax.nn.relu(self.layer(x)))


def people(sizes=(4, 3, 2, 4, 1)):
  rng = np.random.default_rng(0)
  owner = np.repeat(np.arange(len(sizes)), sizes)
  x = rng.normal(size=(owner.size, 24)).astype(np.float32)
  y = rng.integers(0, 20, owner.size).astype(np.int32)
  names = [str(i) for i in range(20)]
  return fp.data.population(
    {"x": x, "label": y}, owner, heldout=0.0, classes=names
  )


def algorithm(module=Wide, optimizer=None, **options):
  model = fp.model(
    module(nnx.Rngs(0)), fp.losses.classification, precision="float32"
  )
  optimizer = optax.sgd(0.1) if optimizer is None else optimizer
  how = fp.local(optimizer, batch=2, epochs=options.pop("epochs", 2))
  return model, fp.fedavg(model, how, **options)


ALIKE, MIXED = (4, 3, 2, 4, 1), (4, 1, 2, 1, 1)


@pytest.mark.parametrize(
  ("sizes", "epochs", "clipped", "placed"),
  [
    (ALIKE, 1, False, None),
    (ALIKE, 2, True, {"head/bias": "frozen"}),
    (MIXED, 1, False, {"head/bias": "frozen"}),
    (MIXED, 2, True, None),
  ],
)
def test_it_equals_every_client_training_its_own_weights(
  sizes, epochs, clipped, placed, tol
):
  uplink = fp.chain(fp.clip(0.05), fp.weigh()) if clipped else None
  data = people(sizes)
  states = []
  for lowrank in (False, True):
    model, general = algorithm(
      epochs=epochs, uplink=uplink, placement=placed, lowrank=lowrank
    )
    chosen = general.specialize(data)[0] if lowrank else general
    if lowrank:  # whole clients at once, unless they differ too much
      most = 2 * epochs
      assert chosen.work.stride == (most if sizes == ALIKE else 1)
    player = toy.Player(chosen, data, base=model.base)
    states.append(player.play(range(5), range(5))[0])
  dense, lean = (s.params for s in states)
  for name in dense:
    np.testing.assert_allclose(
      lean[name], dense[name], rtol=0, atol=tol(np.float32, 24 * 32)
    )
  moved = np.abs(dense["up/kernel"] - model.params["up/kernel"]).max()
  assert moved > 100 * tol(np.float32, 24 * 32)


def test_a_schedule_of_the_round_sets_its_rate(tol):
  data, states = people(), []
  for lowrank in (False, True):
    model, general = algorithm(
      optimizer=lambda round: optax.sgd(0.1 / (1 + jnp.float32(round))),
      lowrank=lowrank,
    )
    chosen = general.specialize(data)[0] if lowrank else general
    player = toy.Player(chosen, data, base=model.base)
    states.append(player.play(range(5), range(5))[0].params["up/kernel"])
  np.testing.assert_allclose(
    states[1], states[0], rtol=0, atol=tol(np.float32, 24 * 32)
  )


def test_its_messages_are_factors_and_no_client_holds_a_kernel():
  data = people()
  _, general = algorithm(lowrank=True)
  lean, note = general.specialize(data)
  assert note == "low-rank local SGD"
  work = lean.work
  sent = fp.Sent(work.params, {"round": jnp.int32(0)})
  carry = jax.eval_shape(lambda: work.init(sent, {}, {}, toy.client()))
  kernel = work.params["up/kernel"].shape
  assert all(x.shape != kernel for x in jax.tree.leaves(carry))
  message = jax.eval_shape(
    lambda: work.finish(work.init(sent, {}, {}, toy.client()), sent)[0]
  )
  assert tree.is_factored(message["up/kernel"])


@pytest.mark.parametrize(
  ("change", "reason"),
  [
    ({"optimizer": optax.adam(0.1)}, "not plain SGD"),
    ({"optimizer": optax.sgd(0.1, momentum=0.9)}, "not plain SGD"),
    (
      {"optimizer": optax.chain(optax.clip(1.0), optax.sgd(1.0))},
      "not plain SGD",
    ),
    ({"module": Twice}, "called 2 times"),
    ({"epochs": 9}, "larger than kernel"),
    ({"proximal": 0.1}, "proximal"),
    ({"uplink": fp.chain(fp.weigh(), fp.int8())}, "'int8'"),
    ({"placement": {"head/.*": "device"}}, "live on the device"),
  ],
)
def test_it_says_why_it_does_not_apply(change, reason, standard_promotion):
  data = people()
  _, general = algorithm(**change)
  chosen, note = general.specialize(data)
  assert chosen.work is general.work
  assert reason in note
  _, insisting = algorithm(**change, lowrank=True)
  with pytest.raises(ValueError, match="does not apply"):
    insisting.specialize(data)


def test_plain_sgd_is_recognized_by_its_behaviour(standard_promotion):
  assert factored.plain_rate(optax.sgd(0.25)) == pytest.approx(0.25)
  assert factored.plain_rate(optax.scale(-0.5)) == pytest.approx(0.5)
  assert factored.plain_rate(optax.sign_sgd(0.1)) is None
  assert factored.plain_rate(optax.adamw(0.1)) is None


@pytest.mark.slow
def test_a_round_is_differentiable_in_its_static_form(tol):
  model, data = toy.net(), toy.people((3, 2, 4))
  general = fp.fedavg(model, fp.local(optax.sgd(0.1), batch=2))
  player = toy.Player(general, data, base=model.base)
  cohort = player.seat(range(3)).static()
  start = player.start()
  shape = (player.settings.blocks, player.settings.width)

  def after(params):
    node = start.nodes[0]._replace(
      params={k: v[None] for k, v in params.items()}
    )
    state = start._replace(nodes=(node,))
    new, _ = general.round(
      state, model.base, cohort, jax.random.key(0), shape=shape
    )
    return sum(jnp.sum(jnp.square(v)) for v in new.params.values())

  gradient = jax.grad(after)(model.params)
  along = jax.tree.map(jnp.ones_like, model.params)
  slope = sum(jnp.sum(g) for g in jax.tree.leaves(gradient))
  h = 1e-2

  def shifted(t):
    return after(jax.tree.map(lambda p, a: p + t * a, model.params, along))

  # A central difference errs by h^2 times a third derivative near one.
  numeric = (shifted(h) - shifted(-h)) / (2 * h)
  assert abs(slope - numeric) < 0.01 * abs(numeric)
