"""Rounded activations have a floor: it falls with the square of a code's step.

A linear device layer that stays as it is, a linear server, a label that the
server could say exactly: SGD of a constant rate would reach zero loss. Rounding
is noise in every gradient, whose variance is that of a code, Delta^2 with
Delta ~ 1 / (2^b - 1), and SGD stays at a loss in proportion.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from fedjax_peft import link, links

BITS = (2, 3, 4, 5, 6)
WIDTH, CHAINS, WARM, STEPS, RATE = 8, 64, 100, 300, 0.25
RNG = np.random.default_rng(0)
DEVICE = np.linalg.qr(RNG.normal(size=(WIDTH, WIDTH)))[0]  # keeps lengths
BEST = RNG.normal(size=WIDTH)


@functools.cache
def floors():
  return np.asarray(_floors(), np.float64)


@jax.jit
def _floors():
  """Excess loss of each chain, the mean of its late steps: [bits, chains]."""
  device, best = (jnp.asarray(x, jnp.float32) for x in (DEVICE, BEST))

  def run(cross, key):
    def step(w, number):
      own = jax.random.fold_in(key, number)
      x = jax.random.uniform(own, (1, WIDTH), minval=-1, maxval=1)
      message = x @ device

      def loss(w):
        return 0.5 * jnp.mean((cross(message, own) @ w - message @ best) ** 2)

      w = w - RATE * jax.grad(loss)(w)
      # E (message (w - best))^2 / 2: each of its values has variance 1 / 3.
      return w, jnp.sum((w - best) ** 2) / 6

    _, kept = jax.lax.scan(step, best, jnp.arange(WARM + STEPS))
    return kept[WARM:].mean()

  chains = jax.random.split(jax.random.key(0), CHAINS)
  found = []
  for bits in BITS:
    wire = links.affine(bits, per="token", stochastic=True)
    cross = link.cut(wire, link.chain())
    found.append(jax.lax.map(functools.partial(run, cross), chains))
  return jnp.stack(found)


PIECES, P = 8, 0.01


def power(values):
  """(power of Delta in the values, half of its interval at p = 1 %)."""
  x = np.log(1 / (2.0 ** np.array(BITS) - 1))
  pieces = np.split(values, PIECES, axis=1)
  each = [
    scipy.stats.linregress(x, np.log(piece.mean(1))).slope for piece in pieces
  ]
  error = np.std(each, ddof=1) / np.sqrt(PIECES)
  return np.mean(each), scipy.stats.t.ppf(1 - P / 2, PIECES - 1) * error


def test_the_floor_is_in_proportion_to_the_square_of_a_step():
  """A power of 1.9 or of 2.15 would be refused, at p = 1 %.

  Rounding also pulls weights to zero, as a ridge of Delta^2 / 6 does: that is
  of fourth order, at two bits less than a fifth of the floor, and so adds less
  than log(1.2) / log(63 / 3) = 0.06 to the power.
  """
  values = floors()
  assert np.all(np.diff(values.mean(1)) < 0)
  found, half = power(values)
  ridge = np.log(1.2) / np.log(63 / 3)

  def is_likely(wanted):
    return wanted - half < found < wanted + ridge + half

  assert is_likely(2.0)
  assert half < 0.05
  for wrong in (1.0, 1.9, 2.15, 4.0):
    assert not is_likely(wrong)


def test_the_floor_is_that_of_the_variance_of_a_code():
  """At six bits, against a recursion for E |w - best|^2 at p = 1 %.

  S <- S (1 - 2 RATE / 3 + RATE^2 E |x|^2 x_i^2) + RATE^2 E |x|^2 (e best)^2,
  e the error of rounding, of variance Delta^2 p (1 - p) a value. Of a variance
  of Delta^2 / 4 or / 12, as many use, the same is refused.
  """
  bits = BITS[-1]
  x = np.random.default_rng(1).uniform(-1, 1, (100_000, WIDTH))
  message = x @ DEVICE
  low, high = message.min(1, keepdims=True), message.max(1, keepdims=True)
  step = (high - low) / (2**bits - 1)
  above = (message - low) / step % 1
  fourth = 1 / 5 + (WIDTH - 1) / 9  # E |x|^2 x_i^2 of uniform values
  late = floors()[-1]
  half = scipy.stats.norm.ppf(1 - P / 2) * late.std(ddof=1) / CHAINS**0.5

  def predicted(variance):
    noise = np.mean((x**2).sum(1) * ((step**2 * variance) @ BEST**2))
    return RATE**2 * noise / (2 * RATE / 3 - RATE**2 * fourth) / 6

  assert half < 0.1 * late.mean()
  assert abs(predicted(above * (1 - above)) - late.mean()) < half
  for wrong in (1 / 4, 1 / 12):
    other = predicted(np.full_like(above, wrong))
    assert abs(other - late.mean()) > 2 * half
