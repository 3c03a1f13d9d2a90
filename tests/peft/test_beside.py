"""Adapters beside a layer against their equations, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import peft_worlds as worlds
from fedjax_peft import peft

K, F, B = 9, 7, 5


def rngs():
  return nnx.Rngs(0)


def layer():
  module = nnx.Linear(K, F, rngs=rngs())
  module.bias[...] = jax.random.normal(jax.random.key(5), (F,))
  return module


def x64(*arrays):
  return [np.asarray(a, np.float64) for a in arrays]


def check(module, delta, tol):
  """The module's output is that of kernel + delta, and so is `merged`."""
  x = jax.random.normal(jax.random.key(9), (B, K))
  plain = layer()
  kernel, bias, inputs = x64(plain.kernel[...], plain.bias[...], x)
  want = inputs @ (kernel + delta) + bias
  atol = 4 * tol(jnp.float32, K) * np.abs(want).max()
  np.testing.assert_allclose(module(x), want, rtol=0, atol=atol)
  np.testing.assert_allclose(peft.merged(module)(x), want, rtol=0, atol=atol)
  assert np.abs(inputs @ delta).max() > 0.05


@pytest.mark.parametrize("detached", [True, False])
def test_dora_scales_the_columns_of_what_it_adds_to(detached, tol):
  module = peft.dora(layer(), 3, ".*", alpha=6, detached=detached)
  np.testing.assert_allclose(
    module.dora_magnitude[...], np.linalg.norm(layer().kernel[...], axis=0)
  )
  module = worlds.noisy(module, size=1.0)
  a, b, m, v = x64(
    module.lora_a[...],
    module.lora_b[...],
    module.dora_magnitude[...],
    layer().kernel[...],
  )
  total = v + 2 * a @ b
  check(module, m * total / np.linalg.norm(total, axis=0) - v, tol)


def test_the_full_gradient_of_dora_is_that_of_its_equation(tol):
  module = worlds.noisy(peft.dora(layer(), 3, ".*", detached=False), size=1.0)
  parts = peft.split(module)
  x = jax.random.normal(jax.random.key(9), (B, K))
  v, bias = layer().kernel[...], layer().bias[...]

  def equation(p):
    total = v + 2.0 * p["lora_a"] @ p["lora_b"]
    size = p["dora_magnitude"] / jnp.sqrt((total**2).sum(0))
    return ((x @ (size[None] * total) + bias[None]) ** 2).sum()

  def ours(p):
    return (peft.merge(*parts._replace(params=p))(x) ** 2).sum()

  got, want = jax.grad(ours)(parts.params), jax.grad(equation)(parts.params)
  for name in want:
    # a product, its norm, a quotient and the loss, each of up to 9 terms
    atol = 16 * tol(jnp.float32, K) * np.abs(want[name]).max()
    np.testing.assert_allclose(got[name], want[name], rtol=0, atol=atol)
  parts = peft.split(peft.dora(layer(), 3, ".*"))
  params = peft.split(module).params
  constant = jax.grad(ours)(params)["lora_b"]
  assert np.abs(constant - want["lora_b"]).max() > 0.01


def test_vera_shares_its_factors_and_slices_them(tol):
  model = nnx.Dict(a=layer(), b=nnx.Linear(4, 11, rngs=rngs()))
  tuned = peft.vera(model, 6, ".*")
  assert tuned.a.vera_a is tuned.b.vera_a
  assert tuned.a.vera_a.shape == (K, 6)
  assert tuned.a.vera_b.shape == (6, 11)
  frozen = [n for n in peft.split(tuned).base if "vera" in n]
  assert len(frozen) == 2  # one pair, there once
  module = worlds.noisy(tuned, size=1.0).a
  a, b, d, scale = x64(
    module.vera_a[...],
    module.vera_b[...],
    module.vera_d[...],
    module.vera_scale[...],
  )
  check(module, (a * d / 3) @ (b[:, :F] / np.sqrt(6)) * scale, tol)


def test_layers_of_a_stack_hold_one_and_the_same_factor():
  parts = peft.split(worlds.tuned("vera", "mlp"))
  (a,) = [x for n, x in parts.base.items() if n.endswith("vera_a")]
  assert a.shape == (worlds.DEPTH, worlds.FFN, 7)
  np.testing.assert_array_equal(a[0], a[1])


def test_a_core_acts_between_the_singular_vectors_of_its_kernel(tol):
  module = peft.core(layer(), 3, ".*", scale=2.0)
  u, s, vt = np.linalg.svd(np.asarray(layer().kernel[...], np.float64))
  best = (u[:, :3] * s[:3]) @ vt[:3]
  a, b = x64(module.core_a[...], module.core_b[...])
  np.testing.assert_allclose(a @ b, best, atol=8 * tol(jnp.float32, K))
  np.testing.assert_allclose(b @ b.T, np.eye(3), atol=8 * tol(jnp.float32, K))
  module = worlds.noisy(module, size=1.0)
  check(module, 2 * a @ np.asarray(module.core_m[...], np.float64) @ b, tol)


def test_a_core_from_an_update_starts_at_its_best_approximation(tol):
  update = np.asarray(jax.random.normal(jax.random.key(4), (K, F)))
  module = peft.core(layer(), 3, ".*", update={"": update}, scale=0.5)
  u, s, vt = np.linalg.svd(update.astype(np.float64))
  check(module, (u[:, :3] * s[:3]) @ vt[:3], tol)


def test_the_first_update_is_minus_the_gradient_of_each_kernel(tol):
  w = worlds.world("mlp")
  loss = lambda module, x: (module(x) ** 2).mean()  # noqa: E731
  found = peft.first_update(w.module, loss, w.inputs[0], w.where)
  assert {n: x.shape for n, x in found.items()} == {
    "layers/up": (2, 12, 20),
    "layers/down": (2, 20, 12),
  }
  small = 1e-3
  module = peft.core(
    w.module, 12, w.where, update={n: small * x for n, x in found.items()}
  )
  before, after = loss(w.module, *w.inputs), loss(module, *w.inputs)
  slope = sum((np.asarray(x, np.float64) ** 2).sum() for x in found.values())
  # first order: the rest is smaller than the change by the size of the step
  assert abs((before - after) / (small * slope) - 1) < 0.05


def test_means_of_cores_are_cores_of_means(tol):
  modules = [worlds.noisy(peft.core(layer(), 3, ".*"), s) for s in range(3)]
  parts = [peft.split(m) for m in modules]
  mean = jax.tree.map(lambda *x: sum(x) / 3, *(p.params for p in parts))
  got = peft.merge(*parts[0]._replace(params=mean)).delta()
  want = sum(m.delta() for m in modules) / 3
  np.testing.assert_allclose(got, want, atol=4 * tol(jnp.float32, K))


def test_the_heads_of_ravan_are_orthogonal(tol):
  module = peft.ravan(layer(), 2, ".*", heads=3)
  a, b = x64(module.ravan_a[...], module.ravan_b[...])
  np.testing.assert_allclose(a.T @ a, np.eye(6), atol=8 * tol(jnp.float32, K))
  np.testing.assert_allclose(b @ b.T, np.eye(6), atol=8 * tol(jnp.float32, K))
  module = worlds.noisy(module, size=1.0)
  m, s = x64(module.ravan_m[...], module.ravan_s[...])
  delta = sum(
    s[h] * a[:, 2 * h : 2 * h + 2] @ m[h] @ b[2 * h : 2 * h + 2]
    for h in range(3)
  )
  check(module, delta, tol)


@pytest.mark.parametrize("choose", ["random", "magnitude", "fisher"])
def test_sparse_changes_the_entries_that_were_chosen(choose, tol):
  fisher = jax.random.uniform(jax.random.key(8), (K, F))
  options = {"fisher": {"": fisher}} if choose == "fisher" else {}
  module = peft.sparse(layer(), 0.3, ".*", choose=choose, **options)
  module = worlds.noisy(module, size=3.0)
  kept = round(0.3 * K * F)
  delta = np.asarray(module.delta(), np.float64)
  assert np.count_nonzero(delta) == kept == module.sparse_values.size
  np.testing.assert_array_equal(delta[delta != 0], module.sparse_values[...])
  check(module, delta, tol)
  score = {
    "magnitude": np.abs(layer().kernel[...]),
    "fisher": np.asarray(fisher),
  }.get(choose)
  if score is not None:
    assert score[delta != 0].min() > score[delta == 0].max()


def test_random_entries_depend_on_seed_and_layer():
  index = lambda m: np.asarray(m.sparse_index[...])  # noqa: E731
  pair = nnx.Dict(a=layer(), b=layer())
  one, two = (peft.sparse(pair, 0.2, ".*", seed=s) for s in (0, 1))
  again = peft.sparse(pair, 0.2, "a")
  np.testing.assert_array_equal(index(one.a), index(again.a))
  assert (index(one.a) != index(two.a)).any()
  assert (index(one.a) != index(one.b)).any()


@pytest.mark.parametrize(
  ("make", "shape"),
  [
    (lambda: nnx.LinearGeneral((2, 3), (4, 5), axis=(1, 2), rngs=rngs()), 2),
    (
      lambda: nnx.Einsum("btd,dhk->bhtk", (6, 2, 5), (2, 1, 5), rngs=rngs()),
      1,
    ),
  ],
)
def test_gains_fit_layers_of_several_axes(make, shape, tol):
  module = make()
  x = jax.random.normal(
    jax.random.key(1), (3, 2, 3) if shape == 2 else (3, 4, 6)
  )
  for side in ("output", "input"):
    tuned = worlds.noisy(peft.ia3(module, ".*", side=side), size=1.0)
    gain = np.asarray(tuned.ia3_gain[...], np.float64)
    if side == "input":
      inputs = x * gain.reshape((1, 2, 3) if shape == 2 else (1, 1, 6))
      want = np.asarray(module(jnp.asarray(inputs, jnp.float32)))
    elif shape == 2:
      want = np.asarray(module(x)) * gain.reshape(1, 4, 5)
    else:
      want = np.asarray(module(x)) * gain.reshape(1, 2, 1, 5)
    atol = 2 * tol(jnp.float32, 6) * np.abs(want).max()
    np.testing.assert_allclose(tuned(x), want, rtol=0, atol=atol)
    np.testing.assert_allclose(peft.merged(tuned)(x), want, rtol=0, atol=atol)


def test_a_bottleneck_reads_the_output_or_the_input(tol):
  x = jax.random.normal(jax.random.key(9), (B, K))
  for parallel in (False, True):
    module = peft.bottleneck(
      layer(), 3, ".*", parallel=parallel, activation="relu", scale=2.0
    )
    module = worlds.noisy(module, size=1.0)
    h = np.asarray(layer()(x), np.float64)
    down, c, up, d = x64(
      *(module.bottleneck_down[...], module.bottleneck_down_bias[...]),
      *(module.bottleneck_up[...], module.bottleneck_up_bias[...]),
    )
    source = np.asarray(x, np.float64) if parallel else h
    want = h + 2 * (np.maximum(source @ down + c, 0) @ up + d)
    atol = 8 * tol(jnp.float32, K) * np.abs(want).max()
    np.testing.assert_allclose(module(x), want, rtol=0, atol=atol)


def test_a_bottleneck_stands_after_whole_modules_too():
  w = worlds.world("encoder")
  module = peft.bottleneck(
    w.module, 4, "layers/(ffn|attention)", width=worlds.WIDTH
  )
  params = peft.split(module).params
  assert params["layers/ffn/bottleneck_up"].shape == (2, 4, worlds.WIDTH)
  np.testing.assert_array_equal(
    worlds.call(module, w.inputs), worlds.plain("encoder")
  )
  with pytest.raises(ValueError, match="cannot be called|can be called"):
    peft.bottleneck(nnx.Dict(a=layer()), 4, "", width=4)


def test_the_two_scalings_differ_by_the_root_of_the_rank():
  for rank in (4, 16):
    one = peft.lora(layer(), rank, ".*", alpha=8)
    two = peft.lora(layer(), rank, ".*", alpha=8, scaling="sqrt")
    assert one.scale * rank == two.scale * np.sqrt(rank) == 8


def test_factors_say_the_same_at_a_larger_rank(tol):
  """C10: padding and scale cancel, with other params passed on."""
  for options, old, new in [
    ({}, {}, {}),
    ({"alpha": 16}, {"alpha": 16}, {"new_alpha": 16}),
    ({"alpha": 8, "scaling": "sqrt"}, {"alpha": 8}, {"new_alpha": 32}),
  ]:
    small = worlds.noisy(peft.lora(layer(), 2, ".*", **options))
    small = peft.tune(small, "bias|lora_.")
    scaling = options.get("scaling", "rank")
    alpha = new.get("new_alpha")
    large = peft.lora(layer(), 8, ".*", alpha=alpha, scaling=scaling)
    params = peft.rerank(
      peft.split(small).params, 8, scaling=scaling, **old, **new
    )
    parts = peft.split(peft.tune(large, "bias|lora_."))
    assert params.keys() == parts.params.keys()
    large = peft.merge(*parts._replace(params=params))
    x = jax.random.normal(jax.random.key(9), (B, K))
    want = small(x)
    atol = 2 * tol(jnp.float32, K) * np.abs(want).max()
    np.testing.assert_allclose(large(x), want, rtol=0, atol=atol)
    assert np.abs(want - layer()(x)).max() > 0.1
  with pytest.raises(ValueError, match="cannot drop directions"):
    peft.rerank(params, 4)
  with pytest.raises(ValueError, match="needs params with lora_a"):
    peft.rerank({"bias": x}, 4)
