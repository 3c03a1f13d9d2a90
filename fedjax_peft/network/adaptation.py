"""Adaptation: what a server decides for clients as their round begins.

It knows their machines and their links of this round, not what will be lost,
and says what each does (traits, such as the cut of its model and the bits of a
value), which share of the uplink's band it has, how hard it sends, and what it
has of a shared server. What comes down is divided as always.

A machine's draw while it sends is that of idling, and above it a part that
grows in proportion to the radiated power: `send` of its profile is what it
draws at the radio's own power.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from fedjax_peft.network import channel, ledger, profile, radio, serving


class Known(NamedTuple):
  """What is known of clients of one cell who are to begin; axis C.

  Attributes:
    ids: int [C].
    number: of the round.
    machines: theirs.
    gains: float64 [C], linear, of this round.
    on: bool [C], whether there is a link; without one nothing happens.
    down: float64 [C], bits per second at which the model comes.
    back: float64 [C], bits per second at which answers come in steps.
    radio: the cell.
    server: what computes a part of their steps; of one that is shared what
      these clients have together.
    load: ({trait: [K]}) -> Load of [K, C], what the round asks of them with
      each of K choices of traits; of none, with their own, [1, C].
  """

  ids: np.ndarray
  number: int
  machines: profile.Fleet
  gains: np.ndarray
  on: np.ndarray
  down: np.ndarray
  back: np.ndarray
  radio: radio.Radio
  server: serving.Server | None
  load: Callable[..., ledger.Load]


class Adapted(NamedTuple):
  """What was decided for C clients; None leaves things as they are.

  Attributes:
    traits: {name: int32 [C]}, which hold in this round.
    band: float64 [C], shares of the uplink's band; of all with a link they
      sum to one.
    watts: float64 [C], radiated.
    speed: float64 [C], FLOP/s of a shared server.
  """

  traits: Mapping[str, np.ndarray] = {}
  band: np.ndarray | None = None
  watts: np.ndarray | None = None
  speed: np.ndarray | None = None


UNCHANGED = Adapted()


class Adaptation(NamedTuple):
  """How it is decided.

  Attributes:
    name: for messages.
    decide: (Known) -> Adapted; the same for the same.
    traits: names of those that it sets.
    needs: bytes that a client's machine must have, in place of what its own
      traits take; None leaves that as it is.
  """

  name: str
  decide: Callable[[Known], Adapted]
  traits: tuple[str, ...] = ()
  needs: float | None = None


def cell(links: Any) -> radio.Radio:
  """The one cell whose band and powers can be chosen.

  Raises:
    ValueError: if there are several radios, or rates are given.
  """
  if isinstance(links, radio.Radio) and links.up is None:
    return links
  kind = type(links).__name__.lower()
  if isinstance(links, radio.Radio):
    kind = f"radio of constant rate, up={links.up:g}"
  raise ValueError(
    "bandwidth and power are chosen in one cell, where rates follow from them: "
    f'got a {kind}; use network.radio={{kind="cell"}} alone, or leave '
    "network.allocate out"
  )


def drawing(
  machines: profile.Fleet, links: Any, watts: np.ndarray | None
) -> profile.Fleet:
  """Machines that send with other powers.

  Args:
    machines: of C clients.
    links: the cell, with whose power their `send` holds.
    watts: float64 [C], radiated; None is as usual.
  """
  if watts is None:
    return machines
  usual = channel.watts(cell(links).power)
  above = np.maximum(machines.send - machines.idle, 0.0)
  return dataclasses.replace(
    machines, send=machines.idle + above * (watts / usual)
  )


def record(
  traits: Mapping[str, np.ndarray], band: np.ndarray | None = None
) -> dict[str, float]:
  """The round's part of the record: `allocate/TRAIT` and `allocate/band_max`.

  Args:
    traits: {name: [C]} of clients whose reports are used; means, 0 of nobody.
    band: shares of all who began.
  """
  found = {
    f"allocate/{k}": float(np.mean(v)) if v.size else 0.0
    for k, v in traits.items()
  }
  if band is not None:
    found["allocate/band_max"] = float(band.max(initial=0.0))
  return found
