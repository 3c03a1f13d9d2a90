"""Boundaries inside a model: what a device sends over a cut."""

from fedjax_peft import link, links, split
from fedjax_peft.audit import boundaries
from fedjax_peft.split import cutting

Boundary = boundaries.Boundary
Subject = boundaries.Subject


@boundaries.boundary("split")
def split_plain(subject: Subject) -> Boundary:
  """Activations as they are."""
  return _cut("split", subject, link.chain())


@boundaries.boundary("split_4bit")
def split_4bit(subject: Subject) -> Boundary:
  """Activations of four bits a value."""
  return _cut("split_4bit", subject, links.affine(4))


def _cut(name: str, subject: Subject, up: link.Link) -> Boundary:
  """A boundary at which a server sees what a device made of its examples."""
  wire = split.Wire(up)

  def cross(message, around):
    return cutting.cross(wire, message, around.key)

  return Boundary(name, subject.device, cross, rows=True)
