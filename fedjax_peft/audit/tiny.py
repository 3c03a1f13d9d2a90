"""A tiny convolutional network to attack, adapted and cut as larger ones are.

As small as this, and before it has learned, a model tells more than it would
later: what cannot be found here was hidden by the boundary.
"""

from typing import Any

import jax
import numpy as np
from flax import nnx

from fedjax_peft import losses, models, objective, peft, split
from fedjax_peft.audit import boundaries, deal, voice

WHERE = r"(convolutions|dense)/.*"


def subject(
  pool: deal.Pool,
  *,
  crowd: int = 64,
  examples: int = 4,
  cohort: int = 16,
  multiplier: float = 4.0,
  seed: int = 0,
) -> boundaries.Subject:
  """A subject whose images are those of the pool.

  Args:
    pool: square images, whose side less 4 is even.
    crowd: P, clients that are not attacked.
    examples: n of each of them.
    cohort: C of sums.
    multiplier: of noise, where there is noise.
    seed: of weights and crowd.
  """
  config = models.CNNConfig(
    image_size=pool.image.shape[2],
    channels=pool.image.shape[3],
    filters=(16,),
    hidden=(32,),
    classes=pool.classes,
  )
  whole = models.CNN(config, nnx.Rngs(seed))

  def made(module):
    loss: Any = losses.classification
    return objective.model(module, loss, precision="float32")

  tuned = peft.tune(peft.lora(whole, rank=4, where=WHERE), where="head/.*")
  cut = split.pipeline(whole, {"device": "convolutions/0", "server": None})
  rng = np.random.default_rng(seed)
  rows = deal.rows(pool, rng.integers(0, pool.classes, crowd), examples, rng)
  return boundaries.Subject(
    full=voice.trained(made(whole)),
    adapters=voice.trained(made(tuned)),
    device=voice.activations(made(cut)),
    crowd=jax.tree.map(np.asarray, deal.examples(pool, rows)),
    cohort=cohort,
    multiplier=multiplier,
  )
