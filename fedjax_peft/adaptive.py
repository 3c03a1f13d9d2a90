"""Adaptive server optimizers, as their paper writes them.

Unlike the optimizers of the same names for centralised training, they have no
bias correction, and the second moment starts at eps^2.

Reddi et al., Adaptive Federated Optimization, 2021, Algorithm 2,
https://arxiv.org/abs/2003.00295
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

Rate = float | Callable[[jax.Array], jax.Array]


def adam(
  learning_rate: Rate, *, b1: float = 0.9, b2: float = 0.99, eps: float = 1e-3
) -> optax.GradientTransformation:
  """Adam at the server: v <- b2 v + (1 - b2) delta^2.

  Args:
    learning_rate: size of a step, or a schedule of the server's steps.
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the root of the second moment, tau in the paper; how
      adaptive the optimizer is (less for larger values).

  Example:
    >>> server, delta = adam(0.1, b1=0.0), jnp.array([1.0])
    >>> round(float(server.update(delta, server.init(delta))[0][0]), 2)
    -0.99
  """
  return _adaptive(
    learning_rate, b1, eps, lambda v, square: b2 * v + (1 - b2) * square
  )


def yogi(
  learning_rate: Rate, *, b1: float = 0.9, b2: float = 0.99, eps: float = 1e-3
) -> optax.GradientTransformation:
  """Yogi at the server: v <- v - (1 - b2) delta^2 sign(v - delta^2).

  Args:
    learning_rate: see `adam`.
    b1: see `adam`.
    b2: see `adam`.
    eps: see `adam`.
  """
  return _adaptive(
    learning_rate,
    b1,
    eps,
    lambda v, square: v - (1 - b2) * square * jnp.sign(v - square),
  )


def adagrad(
  learning_rate: Rate, *, b1: float = 0.0, eps: float = 1e-3
) -> optax.GradientTransformation:
  """Adagrad at the server: v <- v + delta^2.

  Args:
    learning_rate: see `adam`.
    b1: see `adam`.
    eps: see `adam`.
  """
  return _adaptive(learning_rate, b1, eps, lambda v, square: v + square)


def _adaptive(rate, b1, eps, second):
  """Steps by m / (sqrt(v) + eps)."""

  def init(params):
    zeros = jax.tree.map(jnp.zeros_like, params)
    return zeros, jax.tree.map(lambda x: jnp.full_like(x, eps**2), params)

  def update(delta, state, params=None):
    m = jax.tree.map(lambda m, d: b1 * m + (1 - b1) * d, state[0], delta)
    v = jax.tree.map(lambda v, d: second(v, d * d), state[1], delta)
    steps = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), m, v)
    return steps, (m, v)

  return optax.chain(
    optax.GradientTransformation(init, update),
    optax.scale_by_learning_rate(rate),
  )
