"""Boundaries of sums: a cohort's messages, of which the server sees the sum.

All are on the full gradient, so that what the table shows is what the
mechanism does, not what training less does.
"""

import functools

import jax

from fedjax_peft import link, links, tree, validate
from fedjax_peft.audit import boundaries, crossing, voice
from fedjax_peft.links import averaging, gridding
from fedjax_peft.privacy import events, mechanism

Boundary = boundaries.Boundary
Subject = boundaries.Subject


@boundaries.boundary("client_dp")
def client_dp(subject: Subject) -> Boundary:
  """Messages clipped, and noise on their sum; neighbours lack one client."""
  event = functools.partial(events.poisson, rate=1.0)
  made = _private(subject, kind="gaussian", event=event)
  found = _sum("client_dp", subject, made.link)
  return found._replace(multiplier=made.std / made.sensitivity)


@boundaries.boundary("distributed_dp")
def distributed_dp(subject: Subject) -> Boundary:
  """Whole numbers added by every client of a secure sum.

  Neighbours differ in one client, which says nothing in one of them, but adds
  its noise as all do.
  """
  secure = mechanism.Secure(mask=links.mask(2), fewest=subject.cohort)
  made = _private(subject, kind="discrete_gaussian", secure=secure)
  found = _sum("distributed_dp", subject, made.link)

  def cross(message, around):
    said = tree.where(around.here, message, tree.zeros_like(message))
    return found.cross(said, around._replace(here=around.here | True))

  return found._replace(
    cross=cross,
    multiplier=made.std / made.sensitivity,
    event=made.event,
  )


@boundaries.boundary("secure_sum")
def secure_sum(subject: Subject) -> Boundary:
  """Masked integers, of which the server can read the sum and no more."""
  return _sum("secure_sum", subject, _masked(subject))


@boundaries.boundary("secure_wire")
def secure_wire(subject: Subject) -> Boundary:
  """One masked wire, as it would be read without the masks."""
  masked = _masked(subject)

  def cross(message, around):
    messages, here = crossing.joined(message, around.others, around.here)
    wires, shared, _ = crossing.wires(masked, messages, here, around.key)
    # [clip, average, fixed_point, mask]: the grid is no secret.
    mine = jax.tree.map(lambda x: x[0], wires)
    return gridding.off(mine, shared[2]["scale"])

  wire = _sum("secure_wire", subject, masked)
  return wire._replace(cross=cross, absence=False)


def _private(subject: Subject, **options) -> mechanism.Mechanism:
  """What a run that asks for such a sum uses."""
  spec = crossing.spec_of(_crowd(subject))
  return mechanism.mechanism(
    spec._replace(senders=subject.cohort),
    clip=links.clip(subject.clip_norm),
    total=float(subject.cohort),
    multiplier=subject.multiplier,
    **options,
  )


def _mean(subject: Subject) -> tuple[link.Link, link.Link]:
  """Clipped messages, divided by how many there are."""
  size = float(subject.cohort)
  return links.clip(subject.clip_norm), averaging.average(size)


def _masked(subject: Subject) -> link.Link:
  """The chain of a secure sum."""
  return link.chain(*_mean(subject), links.fixed_point(32), links.mask(2))


def _crowd(subject: Subject):
  """Messages of the others, enough of them for a cohort."""
  validate.at_least(2, cohort=subject.cohort)
  count = jax.tree.leaves(subject.crowd)[0].shape[0]
  if count < subject.cohort - 1:
    raise ValueError(
      f"a cohort of {subject.cohort} needs {subject.cohort - 1} other clients: "
      f"the crowd has {count}; use cohort={count + 1} or a larger crowd"
    )
  return voice.of_many(subject.full, subject.crowd)


def _sum(name: str, subject: Subject, chain: link.Link) -> Boundary:
  """A boundary at which the mean of a cohort is seen."""

  def cross(message, around):
    messages, here = crossing.joined(message, around.others, around.here)
    return crossing.added(chain, messages, here, around.key)

  return Boundary(
    name,
    subject.full,
    cross,
    crowd=_crowd(subject),
    cohort=subject.cohort,
    absence=True,
  )
