"""Two stages: low-rank adapters that begin where a sparse update ended.

With data that differ between clients a low-rank adapter from random factors
falls behind full fine-tuning. SLoRA first trains a few entries of the kernels,
and gives the adapters the best factors for what came out.

Babakniya et al., SLoRA, 2023, https://arxiv.org/abs/2308.06522
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax.numpy as jnp
import optax
from flax import nnx

from fedjax_peft import (
  alias,
  link,
  objective,
  peft,
  rules,
  runner,
  sampling,
  work,
)
from fedjax_peft import data as data_lib
from fedjax_peft import settings as settings_lib
from fedjax_peft.peft import adapter, sparsity


class Warm(NamedTuple):
  """What the first stage leaves.

  Attributes:
    module: the user's, with low-rank adapters for the second stage.
    records: one for each round of the first stage.
  """

  module: nnx.Module
  records: list[runner.Record]


def slora(
  module: nnx.Module,
  loss: Callable,
  local: work.Local,
  data: data_lib.Population,
  *,
  warm_rounds: int,
  cohort: sampling.Sampler,
  where: str = r".*/(query|value)",
  rank: int = 8,
  alpha: float | None = None,
  density: float = 0.01,
  server: optax.GradientTransformation | None = None,
  uplink: link.Link | None = None,
  precision: Literal["bf16", "float32"] = "bf16",
  settings: settings_lib.Settings | None = None,
  seed: int = 0,
) -> Warm:
  """SLoRA: runs the sparse stage, and returns where the low-rank one starts.

    warm = fp.algorithms.slora(module, loss, local, data, warm_rounds=5, ...)
    model = fp.model(warm.module, loss)
    algorithm = fp.fedavg(model, local, rule=fp.rules.fedit())

  Args:
    module: any NNX module; untouched. What else it trains, such as a head
      marked by `peft.tune`, trains in this stage too and is kept.
    loss: see `fp.model`.
    local: how clients train.
    data: the population.
    warm_rounds: rounds of the sparse stage.
    cohort: who takes part in them.
    where: the layers, as in `peft.lora`.
    rank: of the adapters.
    alpha: as in `peft.lora`.
    density: share of the entries that train, as in `peft.sparse`; random ones.
    server: see `fedavg`.
    uplink: see `fedavg`.
    precision: see `fp.model`.
    settings: see `fp.run`.
    seed: of the entries, of the rounds and of the adapters.

  Returns:
    The module, whose adapters are U_R and S_R V_R^T / scale of the sparse
    update U S V^T beside the kernels as they were, and the rounds' records.

  Raises:
    ValueError: as `peft.sparse`, `peft.lora` and `fp.run` do.
  """
  sparse = peft.sparse(module, density, where, seed=seed)
  model = objective.model(sparse, loss, precision=precision)
  algorithm = alias.fedavg(model, local, server=server, uplink=uplink)
  params, records = dict(model.params), []
  for state, record in runner.run(
    algorithm,
    model,
    data,
    cohort=cohort,
    rounds=warm_rounds,
    seed=seed,
    settings=settings,
  ):
    params = state.params
    records.append(record)
  trained = _with(sparse, params)
  found = adapter.find(trained, sparsity.Sparse)
  updates = {adapter.join(p): node.delta() for p, (node, _) in found.items()}
  plain = adapter.replace(
    trained, lambda path, node: node.lora_base if path in found else node
  )
  lora = peft.lora(plain, rank, where, alpha=alpha, seed=seed)
  return Warm(rules.start(lora, updates), records)


def _with(module: nnx.Module, params: dict) -> nnx.Module:
  """A clone whose trained and moving variables have these values."""
  parts = peft.split(module)
  mine, moved = (
    {k: jnp.asarray(params[k]) for k in names}
    for names in (parts.params, parts.mutable)
  )
  return peft.merge(*parts._replace(params=mine, mutable=moved))
