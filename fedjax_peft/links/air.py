"""Over the air: all senders speak at once, and the channel adds them up.

Every sender transmits its values as analog amplitudes at the same time, so the
receiver hears their sum in the time of one message, and noise once, however
many speak. A sender multiplies by the inverse of its channel so that all
arrive alike; one whose channel is too weak for that stays silent.

Zhu, Wang and Huang, Broadband Analog Aggregation for Low-Latency Federated
Edge Learning, 2020, https://arxiv.org/abs/1812.11494; Amiri and Gündüz,
Machine Learning at the Wireless Edge, 2020, https://arxiv.org/abs/1901.00844
"""

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_peft import link, tree, validate

_NOISE = 0x61697200  # sets the receiver's key apart from those of senders


class Analog(NamedTuple):
  """What one sender puts on the air, or the sum of many.

  Attributes:
    message: pytree; float leaves are analog, integer leaves (weights) cross a
      digital side channel, exactly.
    senders: int32 scalar, how many spoke; digital too.
  """

  message: Any
  senders: Any


def air(
  snr_db: float,
  *,
  fading: Literal["none", "rayleigh"] = "rayleigh",
  threshold: float = 0.1,
) -> link.Link:
  """Sums messages on the air, with truncated channel inversion.

  A sender's gain g = |h|^2 is drawn once a round, of mean 1. Below the
  threshold it stays silent: neither its message nor its weight is heard, so
  with `weigh` at the left the mean is over those who spoke. Otherwise it sends
  a x / h, where `a` is the same for all and so small that the loudest message
  (n values of norm `bound`, over the weakest channel that speaks) has the mean
  power P allowed a value. The receiver divides by `a`.

  Guarantees:
    the value is sum(m) over those who spoke plus noise, which is normal and
    independent in every value, of mean 0 and variance
    bound^2 / (n * snr * threshold); without fading the threshold counts as 1.
    A sender is silent with probability 1 - exp(-threshold). If nobody spoke
    the value is zero.

  Args:
    snr_db: P over the receiver's noise power, in dB, at the mean gain.
    fading: "rayleigh", or "none": everyone is heard alike, nobody is silent.
    threshold: least gain with which a sender speaks, over the mean gain.

  Returns:
    A link with `receive_on="sum"`, for the end of a chain: what is on the air
    is no longer bits. Counted bytes are those of the values as floats. Its
    `init` raises ValueError if no L2 bound is known at its left, since power
    is limited, or if no leaf is a float.

  Raises:
    ValueError: if an option is out of range.

  Example:
    >>> quiet = air(60.0, fading="none")
    >>> _, shared = quiet.init(link.Spec({"a": jnp.zeros(4)}, bound=2.0))
    >>> print(f"{shared['deviation']:.4f}")
    0.0010
  """
  validate.one_of(["none", "rayleigh"], fading=fading)
  validate.positive(threshold=threshold)
  if not math.isfinite(snr_db):
    raise ValueError(f"snr_db must be a finite number of dB, got {snr_db=}")
  least = threshold if fading == "rayleigh" else 1.0

  def init(spec):
    n = _values(spec.message)
    if not n:
      raise ValueError(
        "air sends floats, but no leaf of the message is one; leave out what "
        "stands at its left and makes integers (fixed_point, mask)"
      )
    if not math.isfinite(spec.bound):
      raise ValueError(
        "air needs to know how large a message can be, since power is limited, "
        "but no bound stands at its left; write clip(...) first, and "
        "weigh(max_weight=...) if you weigh"
      )
    variance = spec.bound**2 / (n * 10 ** (snr_db / 10) * least)
    return (), {"deviation": jnp.float32(math.sqrt(variance))}

  def send(message, mine, shared, ctx):
    here = ctx.weight > 0
    strong = jnp.array(True)
    if fading == "rayleigh":
      strong = jax.random.exponential(ctx.key) >= threshold
    speaks = here & strong
    heard = jax.tree.map(
      lambda x: jnp.where(speaks, x, jnp.zeros_like(x)), message
    )
    wire = Analog(heard, speaks.astype(jnp.int32))
    return wire, mine, {"air/silent": (here & ~strong).astype(jnp.float32)}

  def receive(wire, shared, roster, key):
    key = jax.random.fold_in(key, _NOISE)
    if roster.nodes is not None:  # every receiver has a noise of its own
      key = jax.random.fold_in(key, roster.nodes[jnp.argmax(roster.weights)])
    deviation = jnp.where(wire.senders > 0, shared["deviation"], 0)
    leaves, treedef = jax.tree.flatten(wire.message)

    def one(i, x):
      if not tree.is_float(x):
        return x
      noise = jax.random.normal(jax.random.fold_in(key, i), x.shape)
      return (x.astype(jnp.float32) + deviation * noise).astype(x.dtype)

    values = [one(i, x) for i, x in enumerate(leaves)]
    return jax.tree.unflatten(treedef, values), shared

  def after(spec):
    held = any(not tree.is_float(x) for x in jax.tree.leaves(spec.message))
    return spec._replace(
      message=Analog(spec.message, jax.ShapeDtypeStruct((), jnp.int32)),
      integer_bound=max(spec.integer_bound, 1) if held else 1,
    )

  return link.Link(
    name="air",
    init=init,
    send=send,
    receive=receive,
    after=after,
    receive_on="sum",
  )


def _values(message: Any) -> int:
  """Number of float values of a message."""
  return tree.size([x for x in jax.tree.leaves(message) if tree.is_float(x)])
