"""Inversion: the examples again, from what was said about them.

An attacker that knows the model searches for inputs that would have made a
client say what was seen: nearest by the cosine, and smooth as images are.
Where a layer adds a bias its input need not be searched for at all.

Geiping et al., Inverting Gradients, 2020, https://arxiv.org/abs/2003.14053;
Zhu et al., Deep Leakage from Gradients, 2019, https://arxiv.org/abs/1906.08935
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_peft import validate
from fedjax_peft.audit import voice as voice_lib

PyTree = Any


class Search(NamedTuple):
  """How hard an attacker tries.

  Attributes:
    steps: of the optimizer.
    restarts: from random images; the best by what was seen counts, since the
      attacker does not know the truth.
    rate: largest change of a pixel in a step; it falls to zero by a cosine.
    smooth: weight of the total variation.
  """

  steps: int = 400
  restarts: int = 2
  rate: float = 0.05
  smooth: float = 1e-3


WELL = Search()


def invert(
  voice: voice_lib.Voice,
  seen: PyTree,
  labels: np.ndarray,
  shape: tuple[int, ...],
  key: jax.Array,
  search: Search = WELL,
) -> np.ndarray:
  """Searches for the images behind many messages.

  Args:
    voice: what a client would say of images and labels.
    seen: [M, ...], of the structure of its message.
    labels: int32 [M, n], which the attacker knows.
    shape: of one image, (H, W, channels), pixels in [0, 1].
    key: of the starts.
    search: how hard.

  Returns:
    float32 [M, n, H, W, channels] in [0, 1].

  Raises:
    ValueError: if `steps` or `restarts` is below 1.
  """
  validate.at_least(1, steps=search.steps, restarts=search.restarts)
  starts = jax.random.uniform(
    key, (search.restarts, *np.shape(labels), *shape), jnp.float32
  )
  run = _searcher(voice.say, search)
  found, misses = run(voice.weights, starts, seen, labels)
  best = np.argmin(np.asarray(misses), axis=0)  # [M]
  return np.asarray(found)[best, np.arange(len(best))]


@functools.lru_cache(maxsize=16)
def _searcher(say: Callable, search: Search) -> Callable:
  """The search, compiled once for all boundaries at which a voice is heard."""

  def miss(image, weights, seen, label):
    said = say(weights, {voice_lib.IMAGE: image, voice_lib.LABEL: label})
    return 1 - cosine(said, seen) + search.smooth * variation(image)

  def one(weights, image, seen, label):
    def step(carry, rate):
      image, speed = carry
      slope = jax.grad(miss)(image, weights, seen, label)
      speed = 0.9 * speed + slope
      # By its sign, since cosines are flat far away from what is sought.
      image = jnp.clip(image - rate * jnp.sign(speed), 0, 1)
      return (image, speed), None

    rates = optax.cosine_decay_schedule(search.rate, search.steps)
    rates = rates(jnp.arange(search.steps, dtype=jnp.float32))
    start = (image, jnp.zeros_like(image))
    (image, _), _ = jax.lax.scan(step, start, rates)
    return image, miss(image, weights, seen, label)

  over_targets = jax.vmap(one, (None, 0, 0, 0))
  return jax.jit(jax.vmap(over_targets, (None, 0, None, None)))


def cosine(left: PyTree, right: PyTree) -> jax.Array:
  """Cosine of the angle between two messages; 0 where one is zero."""
  pairs = list(zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True))
  inner = sum(jnp.sum(a * b) for a, b in pairs)
  norms = [
    sum(jnp.sum(jnp.square(leaf)) for leaf in side) for side in zip(*pairs)
  ]
  # The root of zero has no slope.
  return inner * jax.lax.rsqrt(jnp.maximum(norms[0] * norms[1], 1e-30))


def variation(image: jax.Array) -> jax.Array:
  """Mean absolute difference of neighbouring pixels of [n, H, W, C]."""
  down = jnp.mean(jnp.abs(image[:, 1:] - image[:, :-1]))
  return down + jnp.mean(jnp.abs(image[:, :, 1:] - image[:, :, :-1]))


def linear_input(kernel: np.ndarray, bias: np.ndarray) -> np.ndarray:
  """The one input of a dense layer, from the gradient of its weights.

  The gradient of the kernel is x g^T and that of the bias is g: least squares
  over all outputs give x, exactly.

  Args:
    kernel: gradient [K, F].
    bias: gradient [F].

  Returns:
    float64 [K].

  Raises:
    ValueError: if the bias has no gradient, so that nothing was said.
  """
  kernel, bias = np.asarray(kernel, np.float64), np.asarray(bias, np.float64)
  power = bias @ bias
  if not power:
    raise ValueError(
      "an input shows where a bias has a gradient: got one that is zero "
      "everywhere; attack a layer that learned from this example"
    )
  return kernel @ bias / power
