"""Mechanisms: links, noise and accountant event of a private sum, as one.

    clip > average > noise [> rotate > grid > mask]            on the sum
    clip > average > rotate > grid > integer noise > mask      by every client
    clip > average > noise                                     on every message

Each client's message is clipped and multiplied by its capped weight; the sum
is divided by a number that was fixed before; noise is in proportion to the L2
bound of what one client adds to the sum as it is received, the grid's rounding
included. What stands at the left of the clip (a sparsifier, say) cannot break
the bound, and what stands at its right must declare what it does to it.

McMahan et al., Learning Differentially Private Recurrent Language Models,
2018, https://arxiv.org/abs/1710.06963
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

from fedjax_peft import link, links, validate
from fedjax_peft.links import gridding
from fedjax_peft.privacy import distributed, events, integer_noise, ranges
from fedjax_peft.privacy import grid as grid_lib

Kind = Literal["none", "gaussian", "local", "discrete_gaussian", "skellam"]


class Secure(NamedTuple):
  """What a secure sum is like; see `mechanism`.

  Attributes:
    bits: of the modulus; None: 32, or as few as noise by every client needs.
    mask: the link that hides every message, `links.mask` or the link of
      `conversing.conversing`.
    rotation: values that are rotated together; None: no rotation.
    failure: probability of a wrap that is accepted, see `ranges.plan`.
    fewest: clients that a sum surely holds, or it fails.
    corrupt: of them, that may tell their noise, which then hides nobody.
  """

  bits: int | None = None
  mask: link.Link = links.mask()
  rotation: int | None = None
  failure: float = 0.0
  fewest: int = 1
  corrupt: int = 0


class Mechanism(NamedTuple):
  """A private sum; made by `mechanism`.

  Attributes:
    link: what a client's message crosses.
    event: what a round releases about one client; None without noise.
    sensitivity: L2 bound of one client's part of the sum as it is received,
      before it is divided.
    std: of the noise on that sum (of one message, if local).
    plan: the grid; None without a secure sum.
    about: sentences.
    each: events of one round.
    period: rounds in which one client takes part once at most.
    fewest: clients whose noise the sum needs; 1 where they add none.
  """

  link: link.Link
  event: events.Event | None
  sensitivity: float
  std: float
  plan: ranges.Plan | None
  about: tuple[str, ...]
  each: int = 1
  period: int = 1
  fewest: int = 1

  def count(self, rounds: int) -> int:
    """How often the event has happened to one client after so many rounds."""
    return math.ceil(rounds / self.period) * self.each


def mechanism(
  spec: link.Spec,
  *,
  clip: link.Link,
  total: float,
  kind: Kind = "gaussian",
  multiplier: float = 0.0,
  event: Callable[[float], events.Event] | None = None,
  max_weight: int = 1,
  secure: Secure | None = None,
  noise: Callable[[float], link.Link] = links.noise,
) -> Mechanism:
  """Puts together what a private sum takes.

  Args:
    spec: of a client's message where it meets the clip, and the most senders.
    clip: `links.clip(norm)` or `links.adaptive_clip(start)`.
    total: what the weights of a round are expected to add up to; the sum is
      divided by it.
    kind: "gaussian": on the sum; "local": on every message;
      "discrete_gaussian", "skellam": whole numbers by every client; "none".
    multiplier: std of the noise / L2 bound of one client.
    event: multiplier -> what a round releases, by how the cohort is drawn,
      such as `functools.partial(events.poisson, rate=0.05)`. For "gaussian"
      only: the others gain nothing by how a cohort is drawn, since who sees
      the messages sees who sent them.
    max_weight: of one client.
    secure: the sum alone is seen; None: every message is.
    noise: std -> link, what "gaussian" noise is added by.

  Raises:
    ValueError: if the links do not bound what one client can say, no grid
      fits, or parts do not go together.
  """
  validate.one_of(get_args(Kind), kind=kind)
  bounded = link.chain(clip, links.average(total, max_weight=max_weight))
  after = bounded.after(spec)
  if not math.isfinite(after.bound):
    raise ValueError(
      "nothing bounds what one client adds to the sum: got the links "
      f"'{bounded.name}'; start with clip(clip_norm)"
    )
  _refuse(kind, multiplier, event, secure)
  if kind in ("discrete_gaussian", "skellam"):
    made = _distributed(bounded, after, kind, multiplier, secure)
  elif kind == "local":
    std = multiplier * after.bound
    made = Mechanism(
      link.chain(bounded, links.local_noise(std)),
      events.poisson(multiplier, 1.0),
      after.bound,
      std,
      None,
      (f"Normal noise of std {std:.6g} is added to every message.",),
    )
  else:
    made = _central(bounded, spec, kind, multiplier, event, secure, noise)
  said = (
    f"One client, of weight {max_weight} at most, moves the sum by "
    f"{made.sensitivity:.6g} in L2 norm at most; the sum is divided by "
    f"{total:g}, whoever came."
  )
  return made._replace(about=(said, *made.about))


def _central(bounded, spec, kind, multiplier, event, secure, noise):
  """Noise on the sum, or none."""
  carried, plan = link.chain(), None
  if secure is not None:
    after = bounded.after(spec)
    turned, dimension = _turned(after, secure)
    plan = ranges.plan(
      senders=spec.senders,
      clip_norm=after.bound,
      dimension=dimension,
      bits=secure.bits or ranges.MOST_BITS,
      rotation=secure.rotation,
      failure=secure.failure,
    )
    carried = link.chain(turned, grid_lib.grid(plan), secure.mask)
  sensitivity = link.chain(bounded, carried).after(spec).bound
  std, about = multiplier * sensitivity, "No noise is added."
  added: list[link.Link] = []
  if kind == "gaussian":
    added.append(noise(std))
    about = (
      f"Noise of std {std:.6g} is added to the sum, by whoever receives it and "
      "is trusted with it."
    )
  return Mechanism(
    link.chain(bounded, *added, carried),
    event(multiplier) if added else None,
    sensitivity,
    std,
    plan,
    (about,),
  )


def _distributed(bounded, after, kind, multiplier, secure):
  """Noise of whole numbers, by every client."""
  turned, dimension = _turned(after, secure)
  hidden = secure.fewest - secure.corrupt
  plan, apart, event = distributed.shared(
    kind,
    multiplier,
    fewest=hidden,
    senders=after.senders,
    bound=after.bound,
    dimension=dimension,
    bits=secure.bits,
    rotation=secure.rotation,
    failure=secure.failure or 1e-9,
  )
  own = integer_noise.integer_noise(kind, plan.noise)
  std = plan.noise * plan.step * math.sqrt(hidden)
  return Mechanism(
    link.chain(bounded, turned, grid_lib.grid(plan), own, secure.mask),
    event,
    apart.l2 * plan.step,
    std,
    plan,
    (
      f"Every client adds noise of std {plan.noise:.6g} steps of the grid; "
      f"that of {hidden} who keep theirs secret is {std:.6g} on the sum. "
      f"A round of fewer than {secure.fewest} reports fails.",
    ),
    fewest=secure.fewest,
  )


def _turned(spec, secure):
  """A rotation, if there is one, and how many values are on the wire then."""
  turned = link.chain(*[links.rotate(r) for r in [secure.rotation] if r])
  return turned, gridding.floats(turned.after(spec).message)


def _refuse(kind, multiplier, event, secure) -> None:
  """Raises ValueError for parts that do not go together."""
  events.poisson(multiplier, 1.0)  # refuses what is no multiplier
  if kind == "none" and multiplier:
    raise ValueError(
      f"without noise there is no multiplier: got {kind=} {multiplier=}; use "
      "kind='gaussian', or multiplier=0"
    )
  if kind == "gaussian" and event is None:
    raise ValueError(
      "what a round releases depends on how its cohort is drawn: got "
      "event=None; use functools.partial(events.poisson, rate=...)"
    )
  if kind == "local" and secure is not None:
    raise ValueError(
      "normal noise on every message fits no grid, and a secure sum hides "
      "every message anyway: got kind='local' with a secure sum; use "
      "kind='gaussian', or leave the secure sum out"
    )
  if kind in ("discrete_gaussian", "skellam") and secure is None:
    raise ValueError(
      "noise by every client hides a sum, not the messages: got "
      f"{kind=} without a secure sum; use secure=Secure(fewest=...), or "
      "kind='gaussian'"
    )
