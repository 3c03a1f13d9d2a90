"""Integer noise: added on the grid before a mask, inside compiled rounds.

Of each sender's noise the receiver sees the sum only, so all of them together
make the noise that hides any one. The bits are ChaCha20's: drawing is two
words of keystream and a look into a table for each value.

For simulation: the table is not drawn from in constant time, and the key is
the run's. `grid_noise` is what a client would use.

Kairouz, Liu and Steinke, The Distributed Discrete Gaussian Mechanism, 2021,
https://arxiv.org/abs/2102.06387; Agarwal et al., The Skellam Mechanism, 2021,
https://arxiv.org/abs/2110.04995
"""

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_peft import link
from fedjax_peft.kernels.mask import api as mask_kernel
from fedjax_peft.links import gridding
from fedjax_peft.privacy import noise_table


def integer_noise(kind: str, sigma: float) -> link.Link:
  """Adds whole numbers to every value that is sent, modulo its width.

  Guarantees:
    noise is independent over values, senders, rounds and links, a function of
    the sender's key, and the same on every backend; its law is within
    `noise_table.table(kind, sigma).distance` of the stated one, less than
    1e-15 for any sigma and 1e-17 up to sigma = 10.

  Args:
    kind: "discrete_gaussian" or "skellam".
    sigma: std of one sender's noise in steps of the grid, > 0 and at most
      `grid_noise.LARGEST`.

  Returns:
    A link with `receive_on="any"`; shapes, dtypes and bytes are unchanged.
    Every leaf gets noise, counts too. Its `init` raises ValueError if a leaf
    is not an unsigned integer: use it right of a grid and left of `mask`.

  Raises:
    ValueError: if the kind is unknown or `sigma` out of its range.
  """
  table = noise_table.table(kind, sigma)

  def init(spec):
    gridding.expect(spec.message, "integer_noise")
    return (), ()

  def send(message, mine, shared, ctx):
    words = jax.random.bits(ctx.key, (1, 8), jnp.uint32)
    here = ctx.weight > 0

    def one(i, x):
      noise = draw(table, words, i, x.size).reshape(x.shape)
      noise = jnp.where(here, noise, 0).astype(jnp.uint32)
      return x + noise.astype(x.dtype)

    leaves, treedef = jax.tree.flatten(message)
    leaves = [one(i, x) for i, x in enumerate(leaves)]
    return jax.tree.unflatten(treedef, leaves), mine, {}

  return link.Link(
    name="integer_noise",
    init=init,
    send=send,
    receive=lambda wire, shared, roster, key: (wire, shared),
    after=lambda spec: spec,
  )


def draw(
  table: noise_table.Table, key: jax.Array, number: int, size: int
) -> jax.Array:
  """Numbers from a table.

  Args:
    table: the law.
    key: uint32 [1, 8], of ChaCha20.
    number: of the draw under this key, below 2^32.
    size: how many.

  Returns:
    int32 [size].
  """
  nonce = jnp.array([number, 0, 0], jnp.uint32)
  row, nobody = jnp.zeros(1, jnp.int32), jnp.full(1, -1, jnp.int32)
  zeros = jnp.zeros((1, 2 * size), jnp.uint32)
  stream = mask_kernel.mask_add(zeros, key, row, nobody, nonce)
  return look_up(table, *stream.reshape(2, size))


def look_up(
  table: noise_table.Table, high: jax.Array, low: jax.Array
) -> jax.Array:
  """The number that 64 uniform bits stand for.

  Args:
    table: the law.
    high: uint32 [n], the bits that count most.
    low: uint32 [n].

  Returns:
    int32 [n].
  """
  bits = int(table.value.size).bit_length() - 1
  column = (high >> np.uint32(32 - bits)).astype(jnp.int32)
  rest = high & np.uint32(2 ** (32 - bits) - 1)
  top, bottom = (jnp.asarray(x)[column] for x in (table.high, table.low))
  below = (rest < top) | ((rest == top) & (low < bottom))
  value, other = (jnp.asarray(x)[column] for x in (table.value, table.other))
  return jnp.where(below, value, other)
