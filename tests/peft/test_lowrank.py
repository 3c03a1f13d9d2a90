"""Low-rank adapters: where they go, what they compute, how they fold back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fedjax_peft import peft
from fedjax_peft.peft import adapter, lowrank


def rngs():
  return nnx.Rngs(0)


def noise(*shape, seed=1, dtype=jnp.float32):
  return jax.random.normal(jax.random.key(seed), shape, dtype)


def noisy(module, seed=2):
  """The module with random trainable parameters, so that B is not zero."""
  parts = peft.split(module)
  key = jax.random.key(seed)
  params = {
    name: jax.random.normal(jax.random.fold_in(key, i), value.shape)
    for i, (name, value) in enumerate(parts.params.items())
  }
  return peft.merge(*parts._replace(params=params))


LAYERS = {
  "linear": (lambda: nnx.Linear(6, 5, rngs=rngs()), (2, 3, 6)),
  "linear without bias": (
    lambda: nnx.Linear(6, 5, use_bias=False, rngs=rngs()),
    (6,),
  ),
  "general to two axes": (
    lambda: nnx.LinearGeneral(6, (5, 2), rngs=rngs()),
    (2, 3, 6),
  ),
  "general from two axes": (
    lambda: nnx.LinearGeneral((3, 6), 5, axis=(-2, -1), rngs=rngs()),
    (2, 3, 6),
  ),
  "general over inner axes": (
    lambda: nnx.LinearGeneral((6, 4), (5, 2), axis=(1, 2), rngs=rngs()),
    (3, 6, 4, 2),
  ),
  "general with axes out of order": (
    lambda: nnx.LinearGeneral((3, 6), 5, axis=(-1, 1), rngs=rngs()),
    (2, 3, 4, 6),
  ),
  "einsum to heads": (
    lambda: nnx.Einsum("btd,dhk->bthk", (6, 2, 3), (2, 3), rngs=rngs()),
    (2, 4, 6),
  ),
  "einsum with kernel letters out of order": (
    lambda: nnx.Einsum("nta,hab->nthb", (8, 2, 4), (8, 4), rngs=rngs()),
    (3, 5, 2),
  ),
  "einsum with an ellipsis and a transposed output": (
    lambda: nnx.Einsum("...td,df->...ft", (6, 5), rngs=rngs()),
    (2, 3, 4, 6),
  ),
  "einsum over two letters": (
    lambda: nnx.Einsum("bhtk,khd->btd", (3, 2, 5), (5,), rngs=rngs()),
    (2, 2, 4, 3),
  ),
}


@pytest.fixture(params=LAYERS)
def layer(request):
  make, shape = LAYERS[request.param]
  return make(), noise(*shape)


def test_a_fresh_adapter_leaves_the_output_as_it_is_bit_for_bit(layer):
  module, x = layer
  tuned = peft.lora(module, rank=2, where=".*")
  assert isinstance(tuned, peft.LoRA)
  for run in (lambda m, x: m(x), nnx.jit(lambda m, x: m(x))):
    np.testing.assert_array_equal(
      run(tuned, x).view(jnp.uint32), run(module, x).view(jnp.uint32)
    )


def test_a_fresh_adapter_keeps_the_sign_of_zero():
  class Negated(nnx.Linear):
    def __call__(self, x):
      return -super().__call__(x)

  module = Negated(3, 4, rngs=rngs())
  tuned = peft.lora(module, rank=1, where=".*")
  for run in (lambda m, x: m(x), nnx.jit(lambda m, x: m(x))):
    assert np.signbit(run(tuned, jnp.zeros((2, 3)))).all()


def test_a_bfloat16_layer_keeps_its_dtype_and_its_bits():
  module = nnx.Linear(6, 5, dtype=jnp.bfloat16, rngs=rngs())
  x = noise(4, 6)
  tuned = peft.lora(module, where=".*")
  assert tuned(x).dtype == jnp.bfloat16
  assert tuned.lora_a.dtype == tuned.lora_b.dtype == jnp.float32
  np.testing.assert_array_equal(
    tuned(x).view(jnp.uint16), module(x).view(jnp.uint16)
  )


def test_folding_adapters_into_kernels_changes_nothing(layer, tol):
  module, x = layer
  tuned = noisy(peft.lora(module, rank=2, where=".*"))
  plain = peft.merged(tuned)
  assert type(plain) is type(module)
  assert plain.kernel.shape == module.kernel.shape
  assert not adapter.find(plain, peft.Adapter)
  want = tuned(x)
  assert np.abs(want - module(x)).max() > 0.1
  np.testing.assert_allclose(
    plain(x), want, rtol=0, atol=tol(jnp.float32, 24) * np.abs(want).max()
  )


def test_an_adapter_adds_its_product_to_the_kernel():
  module = nnx.Linear(6, 5, rngs=rngs())
  tuned = noisy(peft.lora(module, rank=3, where=".*", alpha=12))
  product = tuned.lora_a[...] @ tuned.lora_b[...]
  np.testing.assert_array_equal(
    peft.merged(tuned).kernel[...], module.kernel[...] + 4.0 * product
  )


@pytest.mark.parametrize("batched", [False, True])
def test_the_custom_gradient_equals_autodiff_of_the_expression(batched, tol):
  lead = (3,) if batched else ()
  x, a = noise(*lead, 2, 7, 24), noise(*lead, 24, 4, seed=2)
  b, g = noise(*lead, 4, 40, seed=3), noise(*lead, 2, 7, 40, seed=4)

  def plain(x, a, b):
    return 2.0 * ((x @ a) @ b)

  def ours(x, a, b):
    return lowrank.side_product(2.0, x, a, b)

  def pull(fun, x, a, b, g):
    y, vjp = jax.vjp(fun, x, a, b)
    return (y, *vjp(g))

  for transform in (lambda f: f, jax.checkpoint):
    run = lambda fun: lambda *args: pull(fun, *args)  # noqa: E731
    got, want = run(transform(ours)), run(plain)
    if batched:
      got, want = jax.vmap(got), jax.vmap(want)
    got, want = jax.jit(got), jax.jit(want)
    for p, q in zip(got(x, a, b, g), want(x, a, b, g), strict=True):
      assert p.dtype == q.dtype
      scale = np.abs(q).max()
      np.testing.assert_allclose(
        p, q, rtol=0, atol=tol(jnp.float32, 40) * scale
      )


def test_the_custom_gradient_is_differentiable_again(tol):
  x, a, b = noise(5, 8), noise(8, 2, seed=2), noise(2, 6, seed=3)

  def inner(fun):
    square = lambda a, b: (fun(x, a, b) ** 2).sum()  # noqa: E731
    return lambda a, b: (jax.grad(square, (0, 1))(a, b)[0] ** 2).sum()

  twice = lambda fun: jax.jit(jax.grad(inner(fun)))(a, b)  # noqa: E731
  got = twice(lambda *args: lowrank.side_product(2.0, *args))
  want = twice(lambda x, a, b: 2.0 * ((x @ a) @ b))
  # a product of four reductions: each may err by the tolerance of one
  atol = 4 * tol(jnp.float32, 8) * np.abs(want).max()
  np.testing.assert_allclose(got, want, rtol=0, atol=atol)


def test_adapters_count_rank_times_inputs_plus_outputs(layer):
  module, _ = layer
  tuned = peft.lora(module, rank=3, where=".*")
  shape = tuned.contraction
  assert shape.rows * shape.columns == module.kernel.size
  assert peft.count(peft.split(tuned).params) == 3 * (
    shape.rows + shape.columns
  )


def test_initial_values_depend_on_seed_and_name_only():
  class Model(nnx.Module):
    def __init__(self, names):
      for name in names:
        setattr(self, name, nnx.Linear(40, 5, rngs=rngs()))

  def values(names, seed=0):
    return peft.split(peft.lora(Model(names), where=".", seed=seed)).params

  one, two = values("bc"), values("abcd")
  np.testing.assert_array_equal(one["b/lora_a"], two["b/lora_a"])
  assert (one["b/lora_a"] != one["c/lora_a"]).all()
  assert (one["b/lora_a"] != values("bc", seed=1)["b/lora_a"]).all()
  assert not one["b/lora_b"].any()


def test_initial_values_have_the_variance_of_one_over_fan_in():
  a = peft.lora(nnx.Linear(400, 5, rngs=rngs()), rank=50, where=".*").lora_a
  # 20,000 draws: the mean square is within 5 standard errors (p < 1e-6)
  assert abs(400 * np.square(a[...]).mean() - 1) < 5 * np.sqrt(2 / 20_000)
  assert abs(200 * np.square(a[...]).mean() - 1) > 5 * np.sqrt(2 / 20_000)


def test_a_layer_used_twice_has_one_adapter():
  class Model(nnx.Module):
    def __init__(self):
      self.block = nnx.Dict(query=nnx.Linear(4, 4, rngs=rngs()))
      self.again = self.block
      self.query = self.block.query

    def __call__(self, x):
      return self.query(self.again.query(self.block.query(x)))

  for where in ("query", "again/query", "block/query", "(.*/)?query"):
    tuned = peft.lora(Model(), rank=2, where=where)
    assert tuned.query is tuned.again.query is tuned.block.query
    parts = peft.split(tuned)
    assert sorted(parts.params) == ["again/query/lora_a", "again/query/lora_b"]
    rebuilt = peft.merge(*parts)
    assert rebuilt.query is rebuilt.again.query
    assert isinstance(rebuilt.query, peft.LoRA)


def test_layers_in_lists_and_sequences_and_dicts_are_found():
  model = nnx.Sequential(
    nnx.List([nnx.List([nnx.Linear(4, 4, rngs=rngs()) for _ in range(11)])]),
    nnx.relu,
    nnx.Dict(head=nnx.Linear(4, 2, rngs=rngs())),
  )
  tuned = peft.lora(model, where="layers/0/0/10|.*/head")
  found = adapter.find(tuned, peft.LoRA)
  assert [names for _, names in found.values()] == [
    ["layers/0/0/10"],
    ["layers/2/head"],
  ]


def test_the_projections_of_attention_take_adapters():
  attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs())
  model = nnx.Dict(attention=attention)
  x = noise(3, 5, 8)
  tuned = peft.lora(model, rank=2, where=r".*/(query|value|out)")
  names = {name.rsplit("/", 1)[0] for name in peft.split(tuned).params}
  assert names == {f"attention/{n}" for n in ("query", "value", "out")}
  np.testing.assert_array_equal(tuned.attention(x), attention(x))
  assert np.abs(noisy(tuned).attention(x) - attention(x)).max() > 0.1


class Deep(nnx.Module):
  """A model whose layers are stacked on a leading axis and scanned over."""

  def __init__(self, depth=3):
    make = lambda key: nnx.Dict(  # noqa: E731
      query=nnx.Linear(6, 6, rngs=nnx.Rngs(key)),
      heads=nnx.LinearGeneral(6, (2, 3), rngs=nnx.Rngs(key)),
      join=nnx.Einsum("thk,hkd->td", (2, 3, 6), rngs=nnx.Rngs(key)),
    )
    self.layers = nnx.vmap(make)(jax.random.split(jax.random.key(0), depth))

  def __call__(self, x):
    graph, state = nnx.split(self.layers)

    def step(x, state):
      layer = nnx.merge(graph, state)
      return x + layer.join(layer.heads(jax.nn.relu(layer.query(x)))), None

    return jax.lax.scan(jax.checkpoint(step), x, state)[0]


@pytest.mark.parametrize("name", ["query", "heads", "join"])
def test_stacked_layers_take_stacked_adapters(name, tol):
  model, x = Deep(), noise(5, 6)
  tuned = peft.lora(model, rank=2, where=f"layers/{name}")
  np.testing.assert_array_equal(tuned(x), model(x))
  parts = peft.split(tuned)
  assert parts.params[f"layers/{name}/lora_a"].shape == (3, 6, 2)
  a = parts.params[f"layers/{name}/lora_a"]
  assert (a[0] != a[1]).all()
  tuned = noisy(tuned)
  want = tuned(x)
  assert np.abs(want - model(x)).max() > 0.1
  merged = peft.merged(tuned)
  assert merged.layers[name].kernel.shape == model.layers[name].kernel.shape
  # three layers, each a residual branch of three products of 6 terms
  atol = 9 * tol(jnp.float32, 6) * np.abs(want).max()
  np.testing.assert_allclose(merged(x), want, rtol=0, atol=atol)


def test_the_users_module_is_untouched():
  model = Deep()
  graph, state = nnx.split(model)
  before = jax.tree.map(np.array, nnx.to_pure_dict(state))
  changed = noisy(peft.tune(peft.lora(model, where=".*/query"), ".*/bias"))
  peft.merged(changed)
  peft.freeze(changed)
  graph_after, after = nnx.split(model)
  assert graph_after == graph
  jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(after), before)


def test_folding_one_of_two_layers_that_share_a_kernel_keeps_the_other():
  model = nnx.Dict(a=nnx.Linear(4, 4, rngs=rngs()))
  model.b = nnx.Linear(4, 4, rngs=rngs())
  model.b.kernel = model.a.kernel
  plain = peft.merged(noisy(peft.lora(model, where="a")))
  np.testing.assert_array_equal(plain.b.kernel[...], model.a.kernel[...])
  assert (plain.a.kernel[...] != model.a.kernel[...]).all()


def test_a_regex_that_matches_nothing_lists_near_names():
  model = nnx.Dict(
    attention=nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs()),
    norm=nnx.LayerNorm(8, rngs=rngs()),
  )
  with pytest.raises(ValueError, match=r"did you mean .*'attention/query'"):
    peft.lora(model, where="attn/query")
  with pytest.raises(ValueError, match="matches no layer"):
    peft.lora(model, where="attention")
  with pytest.raises(ValueError, match="must be a regular expression"):
    peft.lora(model, where="*query")
  with pytest.raises(ValueError, match="names are none"):
    peft.lora(nnx.Dict(norm=model.norm), where="norm")


def test_layers_that_take_no_adapter_are_refused_by_name():
  linear = nnx.Linear(4, 4, rngs=rngs())
  for layer, message in [
    (nnx.Embed(4, 4, rngs=rngs()), "'x' of type Embed"),
    (nnx.Conv(4, 4, (3,), rngs=rngs()), "'x' of type Conv"),
    (peft.lora(linear, where=".*"), "a layer takes one adapter: 'x'"),
    (peft.freeze(peft.lora(linear, where=".*")), "call lora first"),
    (
      nnx.LinearGeneral(4, 4, batch_axis={0: 2}, rngs=rngs()),
      r"no batch_axis: 'x' has batch_axis={0: 2}",
    ),
    (nnx.Einsum("ebd,edf->ebf", (2, 4, 3), rngs=rngs()), "one contraction"),
    (nnx.Einsum("btd,df->bf", (4, 3), rngs=rngs()), "one contraction"),
    (nnx.Einsum("bd,dfe->bf", (4, 3, 2), rngs=rngs()), "one contraction"),
    (nnx.Einsum("bdd,df->bf", (4, 3), rngs=rngs()), "one contraction"),
    (nnx.Einsum("b,fg->bfg", (3, 2), rngs=rngs()), "one contraction"),
  ]:
    with pytest.raises(ValueError, match=message):
      peft.lora(nnx.Dict(x=layer, y=linear), where=".*")


def test_ranks_and_scales_that_make_no_sense_are_refused():
  module = nnx.Linear(4, 4, rngs=rngs())
  for rank in (0, 2.0, True):
    with pytest.raises(ValueError, match="rank must be"):
      peft.lora(module, rank=rank, where=".*")
  with pytest.raises(ValueError, match="alpha must be"):
    peft.lora(module, where=".*", alpha=float("nan"))
