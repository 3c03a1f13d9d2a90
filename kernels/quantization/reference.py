"""Quantizing in plain jnp: the specification of the kernel.

What could depend on a machine is decided in integers: one product of float32
puts a value on a grid 2^16 times as fine as the wire's (2^15 for 16 bits), and
the rest is shifts and sums of int32. So every implementation sends the same
bits. The elementwise functions here are also the body of the Pallas kernels.

The random bits are a hash of (key, index of the value), since the state of a
generator could not be shared by threads. It is lowbias32, found by a search
for low bias, with the key added before its first round and before its second:
Wellons, Prospecting for Hash Functions, 2018,
https://nullprogram.com/blog/2018/07/31/
"""

import jax
import jax.numpy as jnp
import numpy as np

# Scales below are taken as zero: far from where float32 loses digits, so that
# nothing depends on whether a machine keeps subnormal numbers.
SMALLEST = np.float32(2.0**-80)


def shift(bits: int) -> int:
  """How many bits finer than the wire the grid of `encode` is."""
  return 15 if bits == 16 else 16


def levels(bits: int) -> int:
  """The largest code; for 1 bit the codes are -1 and 1."""
  return max(2 ** (bits - 1) - 1, 1)


def packing(bits: int) -> int:
  """How many values share an integer of the wire."""
  return max(8 // bits, 1)


def wire_dtype(bits: int) -> np.dtype:
  """Dtype on the wire."""
  return np.dtype({16: np.int16, 8: np.int8}.get(bits, np.uint8))


def mix(x):
  """lowbias32: a bijection of uint32 in which every bit reaches every bit."""
  x ^= x >> np.uint32(16)
  x *= np.uint32(0x7FEB352D)
  x ^= x >> np.uint32(15)
  x *= np.uint32(0x846CA68B)
  return x ^ (x >> np.uint32(16))


def seeds(key):
  """Two words that each depend on all of a key, uint32 [2] -> uint32 [2]."""
  other = key[::-1] + np.array([0x9E3779B9, 0x7F4A7C15], np.uint32)
  return mix(key ^ mix(other))


def words(index, first, second):
  """Random words of indices, uint32; `first, second = seeds(key)`."""
  x = index + first
  x ^= x >> np.uint32(16)
  x *= np.uint32(0x7FEB352D)
  x ^= second  # so that no two keys give shifts of one sequence
  x ^= x >> np.uint32(15)
  x *= np.uint32(0x846CA68B)
  return x ^ (x >> np.uint32(16))


def finite(x):
  """Which values are neither infinite nor nan, from their bits."""
  bits = jax.lax.bitcast_convert_type(x, jnp.int32)
  return (bits & np.int32(0x7FFFFFFF)) < np.int32(0x7F800000)


def magnitude(x):
  """|x|, and 0 where x is not finite."""
  return jnp.where(finite(x), jnp.abs(x), np.float32(0))


def own_scale(absmax, bits):
  """The scale of a block whose largest magnitude is `absmax`."""
  scale = absmax * (np.float32(1) / np.float32(levels(bits)))
  return jnp.where(scale < SMALLEST, np.float32(0), scale)


def inverse(scale, bits):
  """2^shift / scale, rounded as IEEE 754 says; 0 if no grid has that scale.

  Not every machine divides so: the quotient it gives may be two units off.
  With scale = M 2^e, the digits sought are 2^47 / M, rounded. The remainder of
  a guess is small, hence exact in 32 bits, and says how far off the guess is.
  """
  usable = (scale >= SMALLEST) & finite(scale)
  safe = jnp.where(usable, scale, np.float32(1))
  word = jax.lax.bitcast_convert_type(safe, jnp.int32)
  digits = (word & np.int32(0x7FFFFF)) | np.int32(0x800000)
  guess = (np.float32(2.0**47) / digits.astype(jnp.float32)).astype(jnp.int32)
  rest = np.int32(2) * -(guess * digits)  # twice 2^47 - guess * digits
  for odd in (-3, -1, 1, 3):
    guess += (rest > np.int32(odd) * digits).astype(jnp.int32)
  guess -= np.int32(2)
  exponent = np.int32(shift(bits) + 253) - (word >> np.int32(23))
  # A carry out of the digits goes into the exponent, where it belongs.
  word = (exponent << np.int32(23)) + (guess - np.int32(0x800000))
  m = jax.lax.bitcast_convert_type(word, jnp.float32)
  return jnp.where(usable, m, np.float32(0))


def half_even(y):
  """Rounds to integers, halves to the even one."""
  return jax.lax.round(y, jax.lax.RoundingMethod.TO_NEAREST_EVEN)


def encode(x, m, random, bits, rounded=half_even):
  """Codes of values as int32; for 1 bit, the bit.

  Args:
    x: float32.
    m: what `inverse` returns, of a shape that broadcasts.
    random: words, or None to round to the nearest.
    bits: width of a code.
    rounded: float32 -> float32, as `half_even`.
  """
  k, limit = shift(bits), np.float32(levels(bits) << shift(bits))
  y = jnp.where(finite(x), x * m, np.float32(0))
  y = jnp.minimum(jnp.maximum(y, -limit), limit)
  z = rounded(y).astype(jnp.int32)
  if bits == 1 and random is None:
    return (z >= 0).astype(jnp.int32)
  if bits == 1:
    z, k = z + np.int32(1 << 16), 17
  if random is None:
    dither = np.int32(1 << (k - 1))
  else:
    dither = (random >> np.uint32(32 - k)).astype(jnp.int32)
  return (z + dither) >> np.int32(k)


def field(code, j, bits):
  """A code at its place in an integer of the wire; fields are or-ed."""
  if bits >= 8:
    return code
  return (code & np.int32(2**bits - 1)) << np.int32(j * bits)


def value(packed, j, bits):
  """The code in field j of int32 `packed`, as float32."""
  if bits >= 8:
    return packed.astype(jnp.float32)
  if bits == 1:
    code = ((packed >> np.int32(j)) & np.int32(1)) * np.int32(2) - np.int32(1)
  else:
    up = packed << np.int32(32 - bits * (j + 1))
    code = up >> np.int32(32 - bits)  # arithmetic: it brings the sign
  return code.astype(jnp.float32)


def quantize(x, key, scale=None, *, bits, stochastic):
  """Rounds whole blocks.

  Args:
    x: float32 [nb, block], its values numbered row by row.
    key: uint32 [2].
    scale: float32 [nb], or None for the blocks' own.
    bits: 1, 2, 4, 8 or 16.
    stochastic: whether to round at random.

  Returns:
    packed [nb, block / values in an integer], scale float32 [nb].
  """
  nb, block = x.shape
  if scale is None:
    scale = own_scale(jnp.max(magnitude(x), axis=1, initial=0), bits)
  m, row = inverse(scale, bits)[:, None], block // packing(bits)
  index = jax.lax.broadcasted_iota(jnp.uint32, (nb, row), 0)
  index = index * np.uint32(block)
  index += jax.lax.broadcasted_iota(jnp.uint32, (nb, row), 1)
  packed = jnp.zeros((nb, row), jnp.int32)
  for j in range(packing(bits)):  # planes, so that XLA makes one loop of all
    random = None
    if stochastic:
      random = words(index + np.uint32(j * row), *seeds(key))
    part = x[:, j * row : (j + 1) * row]
    packed |= field(encode(part, m, random, bits), j, bits)
  return packed.astype(wire_dtype(bits)), scale


def dequantize(packed, scale, *, bits):
  """Decodes whole blocks, [nb, block / per] -> float32 [nb, block]."""
  word = packed.astype(jnp.int32)
  planes = [value(word, j, bits) for j in range(packing(bits))]
  return jnp.concatenate(planes, axis=1) * scale[:, None]
