"""Rotation: spreads what one value says over a whole block.

A random rotation makes the values of a block alike in size, so that one scale
fits them all and rounding to few bits loses less. It is H diag(signs), with H
the Hadamard matrix, and undone exactly but for rounding.

Suresh et al., Distributed Mean Estimation with Limited Communication, 2017,
https://arxiv.org/abs/1611.00429

H of p q values is the Kronecker product of H of p and of q: two products with
small matrices, which XLA computes faster than one with a large matrix, or than
butterflies, and which suit matrix units.
"""

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_peft import validate
from fedjax_peft.kernels.quantization import api, reference

_SALT = np.array([0x726F7461, 0x74696F6E], np.uint32)  # "rotation"


def rotate(x: jax.Array, key: jax.Array, *, block: int = 256) -> jax.Array:
  """Rotates each block of a vector at random.

  Guarantees:
    The norm of every block is kept, up to rounding; the rotation depends on
    the key alone. The key may be that of `quantize`: the signs do not depend
    on the bits used there.

  Args:
    x: float32 [D].
    key: uint32 [2].
    block: values rotated together: 128, 256, 512, 1024, 2048 or 4096.

  Returns:
    float32 [ceil(D / block) block]; the last block is padded with zeros
    before it is rotated. Floats may differ between platforms in their last
    digits.

  Raises:
    ValueError: if an argument has another shape, dtype or value.

  Example:
    >>> key = jnp.zeros(2, jnp.uint32)
    >>> y = rotate(jnp.eye(1, 128)[0], key, block=128)
    >>> jnp.unique(jnp.abs(y)).round(4)
    Array([0.0884], dtype=float32)
    >>> unrotate(y, key, size=1, block=128).round(4)
    Array([1.], dtype=float32)
  """
  x, key = jnp.asarray(x), jnp.asarray(key)
  _check(x, key, block)
  blocks = -(-x.size // block)
  x = jnp.pad(x, (0, blocks * block - x.size))
  return _hadamard((x * _signs(key, x.size)).reshape(blocks, block)).reshape(-1)


def unrotate(
  y: jax.Array, key: jax.Array, *, size: int, block: int = 256
) -> jax.Array:
  """Undoes `rotate`.

  Args:
    y: float32 [ceil(size / block) block].
    key: as in `rotate`.
    size: D.
    block: as in `rotate`.

  Returns:
    float32 [D].

  Raises:
    ValueError: if an argument has another shape, dtype or value.
  """
  y, key = jnp.asarray(y), jnp.asarray(key)
  _check(y, key, block)
  blocks = -(-size // block)
  if y.size != blocks * block:
    raise ValueError(
      f"y must hold {blocks * block} values for {size=} {block=}, got "
      f"{y.size}; give the size and block of rotate"
    )
  x = _hadamard(y.reshape(blocks, block)).reshape(-1) * _signs(key, y.size)
  return x[:size]


def _check(x, key, block):
  """Raises ValueError unless the arguments are as documented."""
  validate.one_of(api.BLOCKS, block=block)
  api.expect("x", x, jnp.float32)
  api.expect_key(key)


def _signs(key, size):
  """-1 and 1, float32 [size]."""
  first, second = reference.seeds(key ^ _SALT)
  word = reference.words(jax.lax.iota(jnp.uint32, size), first, second)
  return jnp.where(word >> np.uint32(31), np.float32(-1), np.float32(1))


def _hadamard(x):
  """Rows times the orthogonal Hadamard matrix, [nb, block]."""
  nb, block = x.shape
  q = 1 << (block.bit_length() // 2)
  x = x.reshape(nb, block // q, q)
  exact = jax.lax.Precision.HIGHEST
  x = jnp.einsum("npq,qs->nps", x, _matrix(q), precision=exact)
  x = jnp.einsum("rp,nps->nrs", _matrix(block // q), x, precision=exact)
  return x.reshape(nb, block)


def _matrix(n):
  """Sylvester's Hadamard matrix, made orthogonal; it is its own inverse."""
  i = np.arange(n)
  odd = np.array([[bin(a & b).count("1") % 2 for b in i] for a in i])
  return ((1 - 2 * odd) / np.sqrt(n)).astype(np.float32)
