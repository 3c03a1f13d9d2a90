"""What a part holds while it trains: arrays that are there, closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from fedjax_peft import models, peft, split, tree
from fedjax_peft.split.held import memory

PLAIN = optax.sgd(0.1)
B = 5
SIZES = {
  "cnn": {"filters": (2,), "hidden": (3, 4), "window": 3, "image_size": 6},
  "vit": {"width": 8, "depth": 3, "heads": 2, "ffn": 12, "image_size": 14},
}


def small(kind, change=lambda module: module, **options):
  """A tiny model without weights, changed by a method."""
  options = SIZES[kind] | options
  return nnx.eval_shape(lambda: change(models.load(kind, classes=3, **options)))


def images(kind, batch=B):
  side = SIZES[kind]["image_size"]
  return {"image": jax.ShapeDtypeStruct((batch, side, side), jnp.uint8)}


def numbers(specs, seed):
  """Random arrays, no two of the same content."""
  random = np.random.default_rng(seed)

  def one(x):
    if x.dtype == jnp.uint8:
      return jnp.asarray(random.integers(0, 256, x.shape, np.uint8))
    return jnp.asarray(random.normal(size=x.shape), x.dtype)

  return jax.tree.map(one, specs)


def there(module, inputs, start, stop, trained):
  """Bytes of the arrays that a vjp holds, run operation by operation."""
  graph, state = nnx.split(module)
  whole = nnx.merge(graph, numbers(state, 1))
  given = numbers(inputs, 2)
  if start:
    given = whole.part(0, start)(**given)
  static, train, still = nnx.split(whole.part(start, stop), trained, ...)

  def run(train, floats):
    part = nnx.merge(static, train, still)
    out = part(given | floats) if start else part(**given)
    return out["x"] if isinstance(out, dict) else out

  _, back = jax.vjp(run, train, {"x": given["x"]} if start else {})

  def contents(arrays):
    return {(x.shape, x.tobytes()): x.nbytes for x in map(np.asarray, arrays)}

  weights = contents(jax.tree.leaves((train, still)))
  held = contents(jax.tree.leaves(back))
  return sum(n for content, n in held.items() if content not in weights)


@pytest.mark.parametrize(
  ("kind", "change", "trained", "start", "stop"),
  [
    ("cnn", lambda m: m, nnx.Param, 0, 1),
    ("cnn", lambda m: m, nnx.Param, 1, 4),
    ("vit", lambda m: m, nnx.Param, 0, 3),
    ("vit", peft.lora, peft.Adapter, 3, 6),
  ],
  ids=["first of a cnn", "rest of a cnn", "device", "server with adapters"],
)
def test_activations_are_the_arrays_that_wait(
  kind, change, trained, start, stop
):
  module, given = small(kind, change), images(kind)
  counted = memory(module, given, start, stop, PLAIN).activations
  # What does not grow with the batch is a copy of some variable.
  once, twice = (
    there(module, images(kind, n * B), start, stop, trained) for n in (1, 2)
  )
  assert counted == twice - once > 0


def test_a_linear_layer_keeps_its_input():
  sizes = ((4, 8), (8, 6), (6, 3))

  def build():
    rngs = nnx.Rngs(0)
    layers = [nnx.Linear(*size, rngs=rngs) for size in sizes]
    return split.Modules(list(zip("abc", layers)))

  module = nnx.eval_shape(build)
  given = {"inputs": jax.ShapeDtypeStruct((B, 4), jnp.float32)}
  for start, stop in ((0, 1), (0, 2), (0, 3), (1, 3)):
    kept = sum(width for width, _ in sizes[start:stop])
    found = memory(module, given, start, stop, PLAIN)
    values = sum(a * b + b for a, b in sizes[start:stop])
    assert found == (4 * values, 4 * values, 0, 4 * B * kept)
    assert found.state == 2 * 4 * values


def test_activations_grow_with_the_batch():
  module = small("vit")
  one, two, three = (
    memory(module, images("vit", n * B), 0, 3, PLAIN) for n in (1, 2, 3)
  )
  assert three.activations - two.activations == two.activations - (
    one.activations
  )
  assert two.activations > one.activations
  assert one.state == two.state


def test_what_is_computed_again_is_not_kept():
  kept = [
    memory(small("vit", keep=keep), images("vit"), 0, 6, PLAIN)
    for keep in ("none", "dots", "all")
  ]
  none, dots, everything = (found.activations for found in kept)
  assert none < dots < everything


def test_a_frozen_device_keeps_nothing_and_a_frozen_server_does():
  frozen = small("vit", peft.head)
  device = memory(frozen, images("vit"), 0, 3, PLAIN)
  assert (device.gradients, device.activations) == (0, 0)
  assert (
    device.parameters
    == memory(small("vit"), images("vit"), 0, 3, PLAIN).parameters
  )
  prompted = small("vit", lambda m: peft.prompt(m, 2))
  server = memory(prompted, images("vit"), 2, 6, PLAIN)
  assert server.gradients == 0
  assert server.activations > 0  # the device waits for a gradient


@pytest.mark.parametrize(
  ("optimizer", "slots", "more"),
  [(PLAIN, 0, 0), (optax.sgd(0.1, momentum=0.9), 1, 0), (optax.adam(1), 2, 4)],
)
def test_an_optimizer_holds_its_slots(optimizer, slots, more):
  module = small("vit", peft.lora)
  found = memory(module, images("vit"), 2, 4, optimizer)
  assert found.gradients == 4 * 2 * 2 * 2 * 8 * 8  # rank 8 beside q and v
  assert found.optimizer == slots * found.gradients + more
  assert found.state == sum(found[:3])


def test_parts_hold_the_whole_model_and_both_the_tied_table():
  options = {"width": 8, "depth": 2, "heads": 2, "ffn": 12, "vocab": 11}
  text = {"tokens": jax.ShapeDtypeStruct((B, 7), jnp.int32)}
  for tied in (True, False):
    module = nnx.eval_shape(
      lambda: models.load("decoder", tied=tied, **options)
    )
    every = tree.nbytes(nnx.state(module))
    held = [
      memory(module, text, *span, PLAIN).parameters
      for span in ((0, 2), (2, 4), (0, 4))
    ]
    twice = 4 * 8 * 11 if tied else 0
    assert held[0] + held[1] == every + twice
    assert held[2] == every


@pytest.mark.parametrize("span", [(0, 0), (2, 1), (-1, 2), (0, 5)])
def test_a_part_that_is_not_there_is_refused(span):
  with pytest.raises(ValueError, match="stages 0 to 4"):
    memory(small("cnn"), images("cnn"), *span, PLAIN)
