"""SLoRA: adapters begin as the best ones for a sparse update."""

import functools

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import fedjax_peft as fp
import toy
from fedjax_peft import algorithms, peft
from tolerance import tol

DATA = toy.people((8, 9, 10, 11))
HOW = fp.local(optax.sgd(0.2), batch=4)
COHORT = fp.sample.uniform(3)
NEAR = 8 * tol(jnp.float32, 35)  # an SVD, and two products


def warm(rank=2, density=0.5, rounds=6):
  """The first stage, of a net whose head trains as well."""
  return algorithms.slora(
    peft.tune(toy.Net(nnx.Rngs(0)), "head/.*"),
    fp.losses.classification,
    HOW,
    DATA,
    warm_rounds=rounds,
    cohort=COHORT,
    where="up",
    rank=rank,
    density=density,
    precision="float32",
    settings=toy.lanes(),
  )


@functools.cache
def stages():
  """(first stage, its sparse model's last params and its model)."""
  sparse = peft.sparse(
    peft.tune(toy.Net(nnx.Rngs(0)), "head/.*"), 0.5, "up", seed=0
  )
  model = fp.model(sparse, fp.losses.classification, precision="float32")
  *_, (state, record) = fp.run(
    fp.fedavg(model, HOW),
    model,
    DATA,
    cohort=COHORT,
    rounds=6,
    settings=toy.lanes(),
  )
  return warm(), state.params, model, record


def kernels(module):
  """What a module with adapters multiplies by."""
  plain = peft.merged(module)
  return {k: np.asarray(getattr(plain, k).kernel[...]) for k in ("up", "head")}


def test_the_first_stage_is_federated_averaging_of_sparse_updates():
  first, _, model, record = stages()
  assert len(first.records) == 6
  assert first.records[-1]["train/loss"] == record["train/loss"]
  assert first.records[-1]["train/loss"] < first.records[0]["train/loss"]
  size = sum(x.nbytes for x in model.params.values())
  assert first.records[0]["up_bytes_client"] == size + 4


def test_the_second_stage_starts_at_the_best_adapter():
  first, params, model, _ = stages()
  index = np.asarray(model.base["up/sparse_index"])
  update = np.zeros(35)
  update[index] = np.asarray(params["up/sparse_values"], np.float64)
  u, s, v = np.linalg.svd(update.reshape(5, 7), full_matrices=False)
  assert s[2] > 1e-3  # something is cut off
  layer = first.module.up
  found = layer.scale * layer.lora_a[...] @ layer.lora_b[...]
  wanted = (u[:, :2] * s[:2]) @ v[:2]
  np.testing.assert_allclose(found, wanted, atol=NEAR)
  start = toy.Net(nnx.Rngs(0))
  assert toy.same_bits(
    np.asarray(layer.lora_base.kernel[...]), np.asarray(start.up.kernel[...])
  )


def test_what_else_trains_is_kept_and_goes_on_training():
  first, params, _, _ = stages()
  model = fp.model(first.module, fp.losses.classification, precision="float32")
  assert set(model.params) == {"up/lora_a", "up/lora_b", "head/kernel"}
  head = np.asarray(model.params["head/kernel"])
  assert toy.same_bits(head, np.asarray(params["head/kernel"]))
  start = np.asarray(toy.Net(nnx.Rngs(0)).head.kernel[...])
  assert np.abs(head - start).max() > 1e-3


def test_nothing_is_lost_where_the_rank_is_full():
  full = warm(rank=5, density=1.0, rounds=2)
  sparse = peft.sparse(
    peft.tune(toy.Net(nnx.Rngs(0)), "head/.*"), 1.0, "up", seed=0
  )
  model = fp.model(sparse, fp.losses.classification, precision="float32")
  *_, (state, _) = fp.run(
    fp.fedavg(model, HOW),
    model,
    DATA,
    cohort=COHORT,
    rounds=2,
    settings=toy.lanes(),
  )
  parts = peft.split(sparse)
  values = {k: jnp.asarray(state.params[k]) for k in parts.params}
  trained = kernels(peft.merge(*parts._replace(params=values)))
  for layer, kernel in kernels(full.module).items():
    np.testing.assert_allclose(kernel, trained[layer], atol=NEAR)


def test_the_two_stages_run_one_after_the_other():
  first, _, _, _ = stages()
  model = fp.model(first.module, fp.losses.classification, precision="float32")
  *_, (_, record) = fp.run(
    fp.fedavg(model, HOW, rule=fp.rules.fedit()),
    model,
    DATA,
    cohort=COHORT,
    rounds=4,
    settings=toy.lanes(),
  )
  assert record["train/loss"] < first.records[0]["train/loss"]


def test_a_layer_that_is_not_there_is_refused():
  with pytest.raises(ValueError, match="where matches no layer"):
    algorithms.slora(
      toy.Net(nnx.Rngs(0)),
      fp.losses.classification,
      HOW,
      DATA,
      warm_rounds=1,
      cohort=COHORT,
      where="upp",
    )
