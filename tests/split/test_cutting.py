"""Pipelines: cut anywhere they are the model; links say what crosses."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fedjax_peft as fp
import split_worlds as worlds
import toy
from fedjax_peft import link, links, peft, split
from fedjax_peft.split import cutting

ADAPTED = {
  "net": "(a|b)/lin",
  "encoder": ".*/(query|up)",
  "decoder": ".*/(query|up)",
  "vit": ".*/(query|up)",
  "cnn": "(convolutions|dense)/.*",
}


@functools.cache
def tuned(kind):
  """A model with adapters that do something; all under them trains too."""
  module = worlds.net() if kind == "net" else worlds.zoo(kind)
  return peft.tune(worlds.noisy(peft.lora(module, 2, ADAPTED[kind])), ".*")


def cuts(kind):
  """Where it is cut: everywhere at once, and in two, if that is cheap."""
  count = len(tuned(kind).stages())
  names = ["device", *(f"edge{i}" for i in range(2, count)), "server"]
  ends = [dict(zip(names, [*range(1, count), None]))]
  places = range(1, count) if kind in ("net", "cnn") else []
  return ends + [{"device": place, "server": None} for place in places]


@functools.cache
def backward(kind):
  """[(output, loss, gradients)] of the model, and of every cut of it."""
  module, given = tuned(kind), worlds.examples(kind)
  modules = [module, *(split.pipeline(module, ends) for ends in cuts(kind))]
  made = [worlds.model(each, worlds.loss_of(kind)) for each in modules]
  features = {k: v for k, v in given.items() if k != "label"}

  def run(leaves):
    found = []
    for one, (params, base) in zip(made, leaves):

      def loss(params, one=one, base=base):
        each, _, _ = one.loss(params, base, given, jax.random.key(0))
        return each.mean(), one.module(params, base)(**features)

      wanted = jax.value_and_grad(loss, has_aux=True)
      (value, out), gradients = wanted(params)
      found.append((out, value, gradients))
    return found

  found = jax.jit(run)([(one.params, one.base) for one in made])
  return jax.device_get(found)


def joined(gradients, parts, path, shape):
  """The gradient by a leaf of the model, of which parts hold rows or copies."""
  held = [f"{part}/{path}" for part in parts]
  pieces = [gradients[name] for name in held if name in gradients]
  if len(pieces) > 1 and pieces[0].shape == shape:  # a tied table
    return sum(pieces)
  return np.concatenate(pieces)


@pytest.mark.parametrize("kind", ADAPTED)
def test_cut_anywhere_a_model_is_the_same_and_so_is_its_gradient(kind, tol):
  (out, value, wanted), *others = backward(kind)
  # Sums of at most 15 values in at most 40 products of order one, one after
  # another, compiled apart for each cut.
  limit = tol(jnp.float32, 15 * 40)
  still = [k for k, g in wanted.items() if not np.abs(g).max() > 1e-5]
  assert all("key/bias" in path for path in still)  # cancels in all scores
  for ends, (cut_out, cut_value, gradients) in zip(cuts(kind), others):
    np.testing.assert_allclose(cut_out, out, rtol=0, atol=limit)
    np.testing.assert_allclose(cut_value, value, rtol=limit)
    for path, gradient in wanted.items():
      came = joined(gradients, ends, path, gradient.shape)
      scale = max(np.abs(gradient).max(), 1)
      np.testing.assert_allclose(
        came, gradient, rtol=0, atol=limit * scale, err_msg=f"{ends} {path}"
      )
    assert len(gradients) >= len(wanted)


def test_leaves_are_called_by_the_part_that_holds_them():
  pipe = peft.lora(worlds.plain().origin, 2, "server/.*")
  made = worlds.model(pipe)
  assert all(path.startswith("server/") for path in made.params)
  assert "device/a/lin/kernel" in made.base
  tokens = split.pipeline(worlds.zoo("decoder"), {"device": 1, "server": None})
  for name in ("hidden", "unembed"):
    assert hasattr(tokens, name)
    assert not hasattr(pipe, name)


def doubling(factor):
  return link.stateless(
    "times", lambda m, ctx: (jax.tree.map(lambda x: factor * x, m), {})
  )


def test_values_cross_up_and_gradients_down_and_neither_the_other():
  wire = split.Wire(doubling(2.0), doubling(5.0))
  x, g = jnp.arange(6.0).reshape(2, 3), jnp.array([[1.0, -2.0, 0.5]] * 2)

  def cross(x):
    return cutting.cross(wire, {"x": x}, jax.random.key(0))["x"]

  there, back = jax.vjp(cross, x)
  np.testing.assert_array_equal(there, 2 * x)
  np.testing.assert_array_equal(back(g)[0], 5 * g)


def test_only_floats_cross_a_wire_and_integers_pass_as_they_are():
  length, wire = jnp.array([3, 1], jnp.int32), split.Wire(links.affine(1))
  message = {"x": jnp.array([[1.0, 2.0, 5.0]] * 2), "length": length}
  came = jax.jit(lambda m: cutting.cross(wire, m, jax.random.key(0)))(message)
  assert toy.same_bits(came["length"], length)
  assert set(np.unique(came["x"])) == {1.0, 5.0}


class Same(nnx.Module):
  """A stage that changes nothing."""

  def __call__(self, x):
    return x


class Noted(nnx.Module):
  """A part that writes down what it gets."""

  def __init__(self, seen):
    self.note = seen.append

  def __call__(self, message):
    self.note(message["x"])
    return message


def test_every_wire_and_every_pass_has_randomness_of_its_own():
  def add(message, ctx):
    noise = functools.partial(jax.random.uniform, ctx.key)
    return jax.tree.map(lambda x: x + noise(x.shape), message), {}

  names = [(name, Same()) for name in worlds.STAGES]
  ends = {"device": 1, "edge": 2, "server": None}
  x = jnp.zeros((2, 3))

  @jax.jit
  def noises(key):
    """Of both wires, in two passes."""
    seen: list = []
    noisy = split.Wire(link.stateless("noise", add))
    pipe = split.pipeline(split.Modules(names), ends, noisy)
    pipe.edge, pipe.rngs = Noted(seen), nnx.Rngs(cut=key)
    out = [pipe(x), pipe(x)]
    return [seen[0], out[0] - seen[0], seen[1], out[1] - seen[1]]

  found = [noises(jax.random.key(seed)) for seed in (0, 1)]
  for one, other in itertools.combinations([*found[0], *found[1]], 2):
    assert np.abs(one - other).max() > 0.01
  assert toy.same_bits(noises(jax.random.key(0)), found[0])


def tap(seen):
  """A link that writes down what crosses it."""

  def send(message, ctx):
    for leaf in jax.tree.leaves(message):
      jax.debug.callback(lambda x: seen.append(np.asarray(x)), leaf)
    return message, {}

  return link.stateless("tap", send)


CANARY, SECRET = 0.70710677, 777.125  # in an input, and in a label


def crossed(module, ends):
  """All that crosses the wires in a step on inputs and labels with canaries."""
  seen: list = []
  pipe = split.pipeline(module, ends, split.Wire(tap(seen), tap(seen)))
  made = worlds.model(pipe, fp.losses.regression)
  x = np.array(worlds.PEOPLE.examples["x"][:3])
  x[1, 2] = CANARY
  label = np.zeros((3, 3), np.float32)
  label[2, 1] = SECRET
  given = {"x": jnp.asarray(x), "label": jnp.asarray(label)}

  def loss(params):
    return made.loss(params, made.base, given, jax.random.key(0))[0].sum()

  jax.jit(jax.grad(loss))(made.params)
  jax.effects_barrier()
  return seen, given


U_SHAPE = {"device": "a", "server": "b", "home": None}


def test_in_a_u_shape_neither_inputs_nor_labels_leave_the_device():
  seen, given = crossed(worlds.net(), U_SHAPE)
  assert len(seen) == 4  # two wires, both ways
  assert {x.shape for x in seen} == {(3, 7), (3, 6)}
  assert not {x.shape for x in given.values()} & {x.shape for x in seen}
  for x in seen:
    assert not np.isin([CANARY, SECRET], x).any()
  assert all(np.abs(x).max() > 0 for x in seen)


def test_the_tap_would_have_seen_an_input_that_leaves():
  stages = [("a", Same()), ("b", nnx.Linear(5, 3, rngs=nnx.Rngs(0)))]
  seen, _ = crossed(split.Modules(stages), worlds.ENDS)
  assert np.isin(np.float32(CANARY), np.concatenate(seen))


def test_labels_are_counted_where_the_loss_is_at_a_server_and_only_there():
  def up(ends):
    made = worlds.cut(ends=ends)
    job = split.splitfed(
      fp.fedavg(made, worlds.LOCAL), made, worlds.PEOPLE.examples
    ).work
    return job.split.bytes(worlds.BATCH, {})

  a, b, label = 4 * 4 * 7, 4 * 4 * 6, 4 * 4
  assert up(worlds.ENDS) == (a + label, a)
  assert up({"device": "b", "server": None}) == (b + label, b)
  assert up(U_SHAPE) == (a + b, a + b)


def test_without_a_way_back_the_server_learns_as_before_and_the_device_not():
  given = {k: v[:4] for k, v in worlds.PEOPLE.examples.items()}
  found = []
  for wire in (split.Wire(), split.Wire(down=None)):
    made = worlds.cut(wire)

    def loss(params, made=made):
      return made.loss(params, made.base, given, jax.random.key(0))[0].mean()

    found.append(jax.jit(jax.grad(loss))(made.params))
  both, server = found
  for path, gradient in both.items():
    if path.startswith("server/"):
      assert toy.same_bits(server[path], gradient)
    else:
      assert np.abs(gradient).max() > 0
      assert not np.any(server[path])


def test_which_parts_and_leaves_are_the_devices():
  assert all(map(cutting.is_at_home, ("device", "home", "device_head")))
  assert not cutting.is_at_home("server")
  module = split.Modules(
    [(name, nnx.Linear(2, 2, rngs=nnx.Rngs(0))) for name in ("one", "device_2")]
  )
  is_own = cutting.owner_of(split.pipeline(module, {"device": 1, "edge": 2}))
  assert is_own("device/one/kernel")
  assert is_own("scaffold/c/device/one/kernel")
  assert is_own("device_head/kernel")
  assert is_own("told")
  assert not is_own("edge/device_2/kernel")
  assert not is_own("scaffold/c/edge/device_2/kernel")


@pytest.mark.parametrize(
  ("ends", "sentence"),
  [
    (
      {"device": "c", "server": None},
      "end with a stage of the model, a, b, he",
    ),
    ({"device": "haed", "server": None}, "did you mean 'head'"),
    ({"device": 0, "server": None}, "after 1 to 3 stages, got 0"),
    ({"device": 4, "server": None}, "after 1 to 3 stages, got 4"),
    ({"device": "b", "server": "a"}, "each later than the one before"),
    ({"device": "a", "server": "b"}, "the last up to the end"),
    ({"device": 3}, "into two parts or more"),
    ({"device": 3, "server": None}, "each later than the one before"),
  ],
)
def test_ends_that_do_not_cut_are_refused(ends, sentence):
  with pytest.raises(ValueError, match=sentence):
    split.pipeline(worlds.net(), ends)


def test_what_cannot_be_cut_or_cannot_cross_is_refused():
  with pytest.raises(ValueError, match="put its layers into split.Modules"):
    split.pipeline(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), worlds.ENDS)
  with pytest.raises(ValueError, match="between each part and the next, 1"):
    split.pipeline(worlds.net(), worlds.ENDS, [split.Wire()] * 2)
  for wire in (split.Wire(fp.weigh()), split.Wire(down=fp.weigh())):
    with pytest.raises(ValueError, match="only on the sum"):
      split.pipeline(worlds.net(), worlds.ENDS, wire)


def test_any_modules_are_stages_if_their_names_are_free():
  linear = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
  for name in ("names", "last", "crossing", "part", "two words"):
    with pytest.raises(ValueError, match="called like one that is free"):
      split.Modules([(name, linear)])
  for named in ([], [("a", linear), ("a", linear)]):
    with pytest.raises(ValueError, match="must have different names"):
      split.Modules(named)
