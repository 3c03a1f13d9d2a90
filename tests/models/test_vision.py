"""The vision transformer: patches, pools, sharing of the base, a federation."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import fedjax_peft as fp
import toy
from fedjax_peft import models, peft
from fedjax_peft.models import vision

TINY = {"width": 24, "depth": 2, "heads": 4, "ffn": 56, "image_size": 12}
TINY |= {"patch": 4}


def images(*shape, key=0):
  return jax.random.randint(jax.random.key(key), shape, 0, 256).astype(
    jnp.uint8
  )


@functools.cache
def vit(**options):
  return models.load("vit", **(TINY | options))


@nnx.jit
def run(model, x):
  return model(x)


@nnx.jit
def hidden(model, x):
  return model.hidden(x)


def lines(depth):
  """Lines of the gradient's program as traced."""
  graph, state = nnx.split(vit(depth=depth))

  def total(state, x):
    return nnx.merge(graph, state)(x).sum()

  traced = jax.jit(jax.grad(total)).lower(state, images(2, 12, 12, 3))
  return len(traced.as_text().splitlines())


def test_the_patch_product_is_a_convolution(tol):
  model = vit()
  x = vision.standardize(images(2, 12, 12, 3), model.config)
  layer = model.embeddings.patch
  kernel = layer.kernel[...].reshape(4, 4, 3, 24)
  wanted = jax.lax.conv_general_dilated(
    x, kernel, (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
  )
  came = model.embeddings(x)[:, 1:] - model.embeddings.position[...][None, 1:]
  np.testing.assert_allclose(
    came, wanted.reshape(2, 9, 24), rtol=0, atol=8 * tol(jnp.float32, 48)
  )


def test_patches_may_be_permuted_with_their_positions(tol):
  """Attention knows order by positions only."""
  model = vit()
  x = images(2, 12, 12, 3)
  order = np.array([4, 2, 0, 8, 1, 3, 5, 7, 6])
  cut = x.reshape(2, 3, 4, 3, 4, 3).swapaxes(2, 3).reshape(2, 9, 4, 4, 3)
  mixed = cut[:, order].reshape(2, 3, 3, 4, 4, 3).swapaxes(2, 3)
  mixed = mixed.reshape(2, 12, 12, 3)
  moved = nnx.clone(model)
  table = model.embeddings.position[...]
  rows = jnp.concatenate([table[:1], table[1:][order]])
  moved.embeddings.position[...] = rows
  limit = tol(jnp.float32, 2 * 56)
  np.testing.assert_allclose(run(moved, mixed), run(model, x), atol=limit)
  assert jnp.abs(run(model, mixed) - run(model, x)).max() > 100 * limit


def test_a_grey_image_is_one_with_three_equal_channels(tol):
  model, x = vit(), images(2, 12, 12)
  colour = jnp.broadcast_to(x[..., None], (2, 12, 12, 3))
  wanted = run(model, colour)
  limit = tol(jnp.float32, 2 * 56)
  for grey in (x, x[..., None], x.astype(jnp.float32) / 255):
    np.testing.assert_allclose(run(model, grey), wanted, rtol=0, atol=limit)


def test_images_of_any_size_are_stretched(tol):
  model, x = vit(), images(2, 28, 20, 1)
  ready = jax.image.resize(x.astype(jnp.float32) / 255, (2, 12, 12, 1), "cubic")
  limit = tol(jnp.float32, 2 * 56)
  np.testing.assert_allclose(run(model, x), run(model, ready), atol=limit)


def test_pools_are_of_the_class_token_and_of_the_patches(tol):
  options = {"registers": 2, "layer_scale": 0.5}
  x, model = images(2, 12, 12, 3), vit(**options)
  stream = hidden(model, x)
  assert stream.shape == (2, 1 + 2 + 9, 24)
  np.testing.assert_allclose(run(model, x), stream[:, 0], rtol=1e-6)
  both = run(vit(pool="both", **options), x)
  mean = run(vit(pool="mean", **options), x)
  wanted, limit = jnp.hstack([stream[:, 0], mean]), tol(jnp.float32, 9)
  np.testing.assert_allclose(both, wanted, rtol=limit, atol=limit)
  np.testing.assert_allclose(mean, stream[:, 3:].mean(1), rtol=1e-5, atol=1e-6)
  head = vit(pool="both", classes=7, **options).head
  assert head.kernel[...].shape == (48, 7)


def test_layer_scale_zero_at_the_start_leaves_the_embeddings():
  model = vit(layer_scale=1e-30)
  x = images(2, 12, 12, 3)
  stream = model.embeddings(vision.standardize(x, model.config))
  np.testing.assert_allclose(
    hidden(model, x), model.norm(stream), rtol=1e-5, atol=1e-5
  )


def test_the_program_does_not_grow_with_depth():
  assert lines(12) <= 1.02 * lines(2)


def test_clients_share_one_matrix_product_with_the_base():
  clients, batch = 3, 2
  model = vit(classes=3)
  graph, head, base = nnx.split(model, nnx.filterlib.PathContains("head"), ...)

  def loss(head, base, x):
    return nnx.merge(graph, head, base)(x).sum()

  many = jax.tree.map(lambda leaf: jnp.stack([leaf] * clients), head)
  x = images(clients, batch, 12, 12)
  step = jax.jit(jax.vmap(jax.grad(loss), (0, None, 0)))
  text = step.lower(many, base, x).as_text()
  for shape in ("24x56", "48x24"):  # a block's kernel, and that of the patches
    products = [
      line
      for line in text.splitlines()
      if "dot_general" in line and f"tensor<{shape}xf32>" in line
    ]
    assert products
    assert not any("batching_dims" in line for line in products)


@functools.cache
def federation():
  """(base before, base after, records, states) of LoRA on random images."""
  where = ".*/(query|value)"
  adapted = peft.lora(vit(classes=3), rank=2, where=where)
  adapted = peft.tune(adapted, where="head/.*")
  model = fp.model(adapted, fp.losses.classification)
  before = jax.tree.map(np.array, model.base)
  rng = np.random.default_rng(0)
  label = rng.integers(0, 3, 24).astype(np.int32)
  image = (
    rng.integers(0, 160, (24, 28, 28, 1)) + 40 * label[:, None, None, None]
  )
  data = fp.data.population(
    {"image": image.astype(np.uint8), "label": label}, np.arange(24) % 4
  )
  algorithm = fp.fedavg(model, fp.local(optax.sgd(0.1), batch=4))
  made = fp.run(
    algorithm,
    model,
    data,
    cohort=fp.sample.uniform(4),
    rounds=6,
    settings=toy.lanes(segment=4),
  )
  states, records = zip(
    *((jax.device_get(state.params), record) for state, record in made)
  )
  return model, before, states, records


def test_lora_on_a_vision_transformer_learns_in_rounds():
  model, before, states, records = federation()
  names = {name.rpartition("/")[2] for name in model.params}
  assert names == {"lora_a", "lora_b", "kernel", "bias"}
  for name, value in before.items():
    np.testing.assert_array_equal(model.base[name], value)
  for name, start in model.params.items():
    assert np.abs(states[-1][name] - start).max() > 0, name
  losses = [record["train/loss"] for record in records]
  assert losses[-1] < 0.8 * losses[0]


def test_adapters_start_as_nothing_and_freezing_rounds_to_bfloat16(tol):
  plain, x = vit(classes=3), images(2, 28, 28, 1)
  adapted = peft.lora(plain, rank=2, where=".*/(query|value)")
  np.testing.assert_array_equal(run(adapted, x), run(plain, x))
  exact = peft.freeze(adapted, precision="float32")
  limit = tol(jnp.float32, 2 * 56)
  np.testing.assert_allclose(run(exact, x), run(plain, x), atol=limit)
  coarse = run(peft.freeze(adapted, precision="bf16"), x)
  limit = tol(jnp.bfloat16, 2 * 56)
  np.testing.assert_allclose(coarse, run(plain, x), atol=limit)
  assert (coarse != run(plain, x)).any()


def test_adapters_are_found_by_the_names_of_the_layers():
  names = peft.split(peft.lora(vit(), rank=2)).params
  assert {re.sub(r"/lora_[ab]$", "", name) for name in names} == {
    "layers/attention/query",
    "layers/attention/value",
  }


def test_a_prompt_is_a_set_that_every_patch_sees(tol):
  """It has no positions, and its places are left out."""
  plain, x = vit(), images(2, 12, 12, 3)
  prompted = peft.prompt(plain, 3, deviation=1.0)
  came = hidden(prompted, x)
  assert came.shape == (2, 10, 24)
  assert (jnp.abs(came - hidden(plain, x)).max(-1) > 1e-3).all()
  turned = nnx.clone(prompted)
  turned.prompt[...] = turned.prompt[...][::-1]
  limit = 4 * tol(jnp.float32, 2 * 56)  # normalized: values up to 4
  np.testing.assert_allclose(hidden(turned, x), came, rtol=0, atol=limit)


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("image_size", 100, "use image_size=98"),
    ("heads", 5, "heads must divide width"),
    ("depth", 0, "depth must be at least 1"),
    ("registers", -1, "must not be negative"),
    ("mean", (0.5,), "one entry for each of 3 channels"),
    ("pool", "last", "pool must be one of"),
    ("activation", "swish", "activation must be one of"),
    ("keep", "some", "keep must be one of"),
  ],
)
def test_a_config_that_cannot_work_is_refused(field, value, message):
  with pytest.raises(ValueError, match=message):
    models.ViTConfig(**{field: value})
