"""Boundaries of reports: one client's message, seen by the server alone.

The full gradient is the positive control: an attack that fails on it proves
nothing about the others.
"""

from fedjax_peft import link, links
from fedjax_peft.audit import boundaries, crossing
from fedjax_peft.links import noising

Boundary = boundaries.Boundary
Subject = boundaries.Subject


@boundaries.boundary("full_gradient")
def full_gradient(subject: Subject) -> Boundary:
  """Everything is trained, and sent as it is."""
  return Boundary("full_gradient", subject.full, crossing.through(link.chain()))


@boundaries.boundary("adapters")
def adapters(subject: Subject) -> Boundary:
  """Only adapters are trained."""
  return Boundary("adapters", subject.adapters, crossing.through(link.chain()))


@boundaries.boundary("adapters_int8")
def adapters_int8(subject: Subject) -> Boundary:
  """A byte a value, rounded at random."""
  return Boundary(
    "adapters_int8", subject.adapters, crossing.through(links.int8())
  )


@boundaries.boundary("adapters_sign")
def adapters_sign(subject: Subject) -> Boundary:
  """A bit a value."""
  return Boundary(
    "adapters_sign", subject.adapters, crossing.through(links.sign())
  )


@boundaries.boundary("local_dp")
def local_dp(subject: Subject) -> Boundary:
  """Every message clipped, and noise on it before it is sent.

  That a client takes part is no secret; what one holds is, and any two of its
  messages are at most twice the clip norm apart.
  """
  std = subject.multiplier * subject.clip_norm
  noisy = link.chain(links.clip(subject.clip_norm), noising.local_noise(std))
  return Boundary(
    "local_dp",
    subject.full,
    crossing.through(noisy),
    multiplier=subject.multiplier / 2,
  )
