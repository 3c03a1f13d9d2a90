"""Joining: cut anywhere and put together, a model is the model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import split_worlds as worlds
from fedjax_peft import models, peft, split

LINEAR = ".*/(query|value)"
DEEP = {"depth": 3}
PUT = {
  "nothing": lambda m: m,
  "lora": lambda m: peft.lora(m, 2, LINEAR),
  "lora with a residual": lambda m: peft.lora(m, 2, LINEAR, residual=True),
  "dora": lambda m: peft.dora(m, 2, LINEAR),
  "ia3": lambda m: peft.ia3(m, LINEAR),
  "ia3 on lora": lambda m: peft.ia3(peft.lora(m, 2, LINEAR), LINEAR),
  "vera": lambda m: peft.vera(m, 3, LINEAR),
  "last": lambda m: peft.last(m, 2, "layers/.*"),
  "bitfit": peft.bitfit,
  "bottleneck": lambda m: peft.bottleneck(m, 2, ".*/output"),
  "prompt": lambda m: peft.prompt(m, 2),
  "deep prompt": lambda m: peft.deep_prompt(m, 2),
}


@functools.cache
def model(kind, unroll=False):
  if kind == "net":
    return worlds.net()
  options = worlds.ZOO[kind]
  if kind != "cnn":
    options = options | DEEP | {"unroll": unroll}
  return worlds.noisy(nnx.eval_shape(lambda: models.load(kind, **options)))


def everywhere(module):
  """Ends that cut a module at each place, and at all of them at once."""
  count = len(module.stages())
  names = ["device", *(f"edge{i}" for i in range(2, count)), "server"]
  some = [{"device": i, "server": None} for i in range(1, count)]
  return [*some, dict(zip(names, [*range(1, count), None]))]


def same(a, b):
  """Whether two modules are the same: static parts, kinds, names and bits."""
  (graph, state), (other, values) = (nnx.split(x, graph=True) for x in (a, b))
  one, two = nnx.to_flat_state(state), nnx.to_flat_state(values)
  return graph == other and all(
    path == name
    and type(x) is type(y)
    and x.get_metadata() == y.get_metadata()
    and bits(x) == bits(y)
    for (path, x), (name, y) in zip(one, two, strict=True)
  )


def bits(variable):
  value = variable.get_raw_value()
  if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
    value = jax.random.key_data(value)
  return np.asarray(value).tobytes(), value.dtype


@pytest.mark.parametrize(
  ("kind", "unroll"),
  [*((kind, False) for kind in [*worlds.ZOO, "net"]), ("encoder", True)],
)
def test_cut_anywhere_and_put_together_a_model_is_the_model(kind, unroll):
  made = model(kind, unroll)
  for ends in everywhere(made):
    assert same(split.whole(split.pipeline(made, ends)), made), ends
  if kind != "cnn":  # whose stages need not have the same shape
    assert same(split.whole(split.movable(made)), made)
  assert split.whole(made) is made
  other = worlds.noisy(made, seed=7)
  assert not same(split.whole(split.pipeline(other, everywhere(made)[0])), made)


@pytest.mark.parametrize(
  ("kind", "name"),
  [*(("encoder", name) for name in PUT), ("vit", "prompt"), ("vit", "last")],
)
def test_so_it_is_with_adapters_that_were_there_before(kind, name):
  made = worlds.noisy(PUT[name](model(kind)), seed=3)
  for ends in everywhere(made):
    assert same(split.whole(split.pipeline(made, ends)), made), ends


def trained(ends, put, kind="encoder"):
  """A pipeline with adapters that say something."""
  pipe = put(split.pipeline(model(kind, True), ends))
  parts = peft.split(pipe)
  rng = np.random.default_rng(5)
  params = {
    k: x + jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype)
    for k, x in parts.params.items()
  }
  return peft.merge(parts.graph, params, *parts[2:])


def outputs(module, kind="encoder"):
  given = worlds.examples(kind)
  features = {k: v for k, v in given.items() if k != "label"}
  return np.asarray(module(**features))


WHERE = {
  "all parts": ".*/(query|value)",
  "the server": "server/.*/(query|value)",
  "the device": "device/.*/(query|value)",
  "a part between": "edge/.*/(query|value)",
}
THREE = {"device": 2, "edge": 3, "server": None}
METHODS = {
  "lora": lambda m, w: peft.lora(m, 2, w),
  "dora": lambda m, w: peft.dora(m, 2, w),
  "ia3": peft.ia3,
  "ia3 on lora": lambda m, w: peft.ia3(peft.lora(m, 2, w), w),
  "tune": lambda m, w: peft.tune(m, w + "/bias"),
}


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("method", METHODS)
def test_what_parts_have_learned_is_in_its_place(method, where, tol):
  """Of blocks that have no adapter the bits are those of the model."""
  pipe = trained(THREE, lambda m: METHODS[method](m, WHERE[where]))
  whole, before = split.whole(pipe), model("encoder", True)
  assert type(whole) is type(before)
  came = outputs(whole)
  if method == "dora":  # its norm is a sum of squares, in another order
    scale, limit = np.abs(came).max(), tol(jnp.float32, 3 * 40)
    np.testing.assert_allclose(came, outputs(pipe), rtol=0, atol=limit * scale)
  else:
    np.testing.assert_array_equal(came, outputs(pipe))
  assert np.abs(came - outputs(before)).max() > 1e-3
  learned = peft.split(pipe).params
  found = peft.split(whole).params
  assert {k.split("/", 1)[1] for k in learned} == found.keys()
  for name, value in found.items():
    rows = [v for k, v in learned.items() if k.split("/", 1)[1] == name]
    wanted = np.concatenate(rows)
    # Blocks behind those that are adapted train with them, from nothing.
    np.testing.assert_array_equal(value[: len(wanted)], wanted)
    if where in ("all parts", "the server"):
      assert len(value) == len(wanted)


@pytest.mark.parametrize("kind", [*worlds.ZOO])
def test_a_pipeline_that_was_trained_whole_is_one_model(kind):
  ends = everywhere(model(kind, True))[-1]
  pipe = trained(ends, lambda m: peft.tune(m, "(?!.*embeddings/).*"), kind)
  whole = split.whole(pipe)
  np.testing.assert_array_equal(outputs(whole, kind), outputs(pipe, kind))


def test_what_is_of_no_part_is_left_out():
  ends = {"device": 2, "server": None}
  pipe = split.pipeline(model("encoder"), ends, split.Wire(down=None))
  with_head = split.with_head(pipe, 8, 3)
  assert same(split.whole(with_head), model("encoder"))
  given = worlds.examples("encoder")
  plain = split.pipeline(model("encoder"), ends)
  remembering = split.offline.with_memory(plain, 3, given)
  assert remembering.memory is not None
  assert same(split.whole(remembering), model("encoder"))


def adapted(ranks, **more):
  """Adapters of each part's own rank."""
  pipe = split.pipeline(model("encoder"), {"device": 2, "server": None})
  for part, rank in ranks.items():
    pipe = peft.lora(pipe, rank, f"{part}/.*/query", **more.get(part, {}))
  return pipe


def test_blocks_that_are_not_alike_are_no_stack_but_merge_to_one(tol):
  wrong = {
    "'attention/query/lora_a' is \\[8, 1\\], and .* is \\[8, 2\\]": adapted(
      {"device": 1, "server": 2}
    ),
    "got the same arrays, but other constants": adapted(
      {"device": 2, "server": 2}, server={"alpha": 1.0}
    ),
    "'attention/query/lora_a' is .*, and others .* is missing": peft.vera(
      adapted({"device": 2}), 2, "server/.*/query"
    ),
  }
  for sentence, pipe in wrong.items():
    with pytest.raises(ValueError, match=sentence) as refused:
      split.whole(pipe)
    assert "--merged" in str(refused.value)
    assert "\n" not in str(refused.value)
    pipe = worlds.noisy(pipe, seed=2)
    merged = split.whole(peft.merged(pipe))
    limit = tol(jnp.float32, 15 * 40)  # as for a model that is cut
    scale = max(np.abs(outputs(pipe)).max(), 1)
    np.testing.assert_allclose(
      outputs(merged), outputs(pipe), rtol=0, atol=limit * scale
    )


def test_a_table_that_was_trained_apart_is_no_one_table():
  ends = {"device": 1, "server": None}
  put = functools.partial(peft.tune, where=".*/embeddings/.*")
  with pytest.raises(ValueError, match="'embeddings' is read by several parts"):
    split.whole(trained(ends, put, "decoder"))
  once = split.pipeline(model("decoder"), ends)
  assert same(split.whole(once), model("decoder"))


def test_parts_that_do_not_follow_each_other_are_refused():
  made = model("encoder")
  with pytest.raises(ValueError, match=r"got stages \[\(0, 1\), \(2, 5\)\]"):
    models.stage.joined([made.part(0, 1), made.part(2, 5)])
  again = models.stage.joined([made.part(1, 2), made.part(2, 4)])
  assert same(again, made.part(1, 4))


def test_a_part_that_is_only_remembered_is_refused():
  pipe = split.pipeline(model("encoder"), {"device": 1, "server": None})
  first = split.prefix_of(peft.tune(pipe, "server/head/.*"))
  with pytest.raises(
    ValueError, match="got a Recall as 'device'; put the part"
  ):
    split.whole(first.rest)
  first.rest.device = pipe.device
  assert same(split.whole(first.rest).embeddings, model("encoder").embeddings)
