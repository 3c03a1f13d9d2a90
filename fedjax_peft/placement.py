"""Placement: where a leaf lives, as a label.

FedAvg labels nothing: every leaf travels to the top. A leaf labelled with the
name of a lower tier stops there, "device" never leaves its client, "frozen"
never changes, "served" goes down only: the receiver alone changes it. So
personalization is leaves that do not travel.
"""

from collections.abc import Mapping, Set
from typing import NamedTuple

from fedjax_peft import validate

DEVICE, FROZEN, SERVED = "device", "frozen", "served"


def resolve(
  names: list[str],
  rules: Mapping[str, str] | None,
  tiers: list[str],
  mutable: Set[str] = frozenset(),
  served: Set[str] = frozenset(),
) -> dict[str, str]:
  """Labels every leaf.

  Args:
    names: paths of the leaves.
    rules: {regex: label}, the first that matches the whole path wins.
    tiers: names of the tiers, lowest first; the last is the default label.
    mutable: leaves that the forward pass changes; each needs a rule.
    served: leaves that the receiver alone changes; no rule changes that.

  Returns:
    {path: label}, label in `tiers`, "device", "frozen" or "served".

  Raises:
    ValueError: unknown label, a regex without a match, a mutable leaf without
      a rule, or nothing left to train.
  """
  found = validate.labels(names, rules or {}, [*tiers, DEVICE, FROZEN, SERVED])
  for name in sorted(mutable):
    if name not in found:
      raise ValueError(
        f"'{name}' changes in the forward pass and must be placed: got no rule "
        f"for it; write placement={{{name!r}: '{tiers[-1]}'}} (averaged), "
        "'device' (each client its own) or 'frozen'"
      )
  placed = {name: found.get(name, tiers[-1]) for name in names}
  placed |= dict.fromkeys(served, SERVED)
  if all(label in (FROZEN, SERVED) for label in placed.values()):
    raise ValueError(
      "placement froze every parameter, so nothing is left to train; freeze "
      "fewer"
    )
  return placed


class Groups(NamedTuple):
  """Names of leaves by where they live, each sorted.

  Sorted, since the order in which a program is traced must not depend on how
  a process happens to hash strings.
  """

  still: tuple[str, ...]
  owned: tuple[str, ...]
  moving: tuple[str, ...]


def split(labels: Mapping[str, str]) -> Groups:
  """Groups labelled leaves: a client changes none, keeps, or reports them."""
  names = sorted(labels)
  return Groups(
    tuple(k for k in names if labels[k] in (FROZEN, SERVED)),
    tuple(k for k in names if labels[k] == DEVICE),
    tuple(k for k in names if labels[k] not in (FROZEN, DEVICE, SERVED)),
  )
