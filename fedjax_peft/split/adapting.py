"""Adapting: who has which cut, bits, power and band, decided round by round.

| policy | decides | so that |
| --- | --- | --- |
| `equal` | nothing | there is something to compare with |
| `bandwidth` | shares of the band | all are done at the same time |
| `cut` | cuts and bits | they are best with equal shares and full power |
| `joint` | these, shares, powers, the server's shares | `allocate` descends |

What is best says `choosing`. Who is alone with a band (in turn, under open
clocks) chooses by itself; there `cut` and `joint` are exact. Packets that will
be lost are not known, and sending them again comes on top.

SFLAM, https://arxiv.org/abs/2504.09114
"""

import math
from collections.abc import Callable

import numpy as np

from fedjax_peft.network import adaptation
from fedjax_peft.network.adaptation import Adaptation, Adapted, Known
from fedjax_peft.split import choosing, cost, finish
from fedjax_peft.split import menu as menu_lib
from fedjax_peft.split.menu import Costs, Menu

BITS = (2, 4, 8, 16, 32)


def equal() -> Adaptation:
  """Nothing is decided: equal shares, full power, cuts as they are."""
  return Adaptation("equal", lambda known: adaptation.UNCHANGED)


def bandwidth() -> Adaptation:
  """Shares of the band with which all clients are done at the same time.

  Any other division lets somebody be done later, so no round takes longer than
  with equal shares. Who has a band of its own keeps it.
  """

  def decide(known):
    if known.radio.sharing == "own":
      return adaptation.UNCHANGED
    costs = menu_lib.ask(known)
    flops = costs.server_flops[:, 0]
    each = choosing.server_of(known, int(np.count_nonzero(flops)))
    shares = finish.band(
      costs.device_seconds[:, 0] + costs.down_seconds[:, 0, 0] + flops / each,
      costs.up_bits[:, 0, 0],
      costs.watts,
      costs.gains,
      known.radio.bandwidth,
      noise=costs.noise,
    )
    return _shared(known, costs, width=shares.share, speed=each)

  return Adaptation("bandwidth", decide)


def cut(
  split: cost.Split,
  stages: int,
  *,
  weight: float = 0.5,
  bits: tuple[int, ...] = BITS,
  cuts: tuple[int, ...] | None = None,
  least_cut: int = 1,
  error_weight: float = 10.0,
) -> Adaptation:
  """Cuts and bits that are best with equal shares and full power.

  All choices are looked at, and the best of all clients together is found:
  of every client its cheapest choice that is not later than the last.

  Args:
    split: of the work.
    stages: of the model.
    weight: of time against energy, in [0, 1].
    bits: of a value, to choose from; none: they do not move.
    cuts: stages on the device, to choose from; None: any.
    least_cut: stages that every device keeps, for privacy.
    error_weight: of the mean squared error of a value that is rounded at
      random, in squares of its token's range: 0.028 with 2 bits, 0.0011 with 4.

  Raises:
    ValueError: if an option is out of range.
  """
  goal = choosing.goal(weight, error_weight)
  menu = menu_lib.menu(split, stages, cuts=cuts, bits=bits, least_cut=least_cut)

  def decide(known):
    costs = menu_lib.ask(known, menu)
    if _is_apart(known, costs):
      found = choosing.alone(known, costs, menu, goal, full=True)
    else:
      found = choosing.evenly(known, costs, menu, goal)
    return Adapted(_told(known, costs, menu, found))

  return Adaptation("cut", decide, menu.traits, float(menu.memory.min()))


def joint(
  split: cost.Split | None = None,
  stages: int = 0,
  *,
  weight: float = 0.5,
  bits: tuple[int, ...] = BITS,
  cuts: tuple[int, ...] | None = None,
  least_cut: int = 1,
  deadline: float | None = None,
  error_weight: float = 10.0,
) -> Adaptation:
  """Cuts, bits, powers, shares of band and server, all together.

  Args:
    split: of a work whose cut moves; None: bandwidth and power alone.
    stages: of the model.
    weight: of time against energy, in [0, 1]; 0 needs a deadline.
    bits: as in `cut`.
    cuts: as in `cut`.
    least_cut: as in `cut`.
    deadline: seconds in which a round is done; one that cannot be is done as
      soon as can be.
    error_weight: as in `cut`.

  Raises:
    ValueError: if an option is out of range.
  """
  goal = choosing.goal(weight, error_weight, deadline)
  menu = menu_lib.menu(
    split,
    stages,
    cuts=cuts,
    bits=() if split is None else bits,
    least_cut=least_cut,
  )

  def decide(known):
    costs = menu_lib.ask(known, menu)
    if _is_apart(known, costs):
      found = choosing.alone(known, costs, menu, goal, full=False)
    else:
      found = choosing.together(known, costs, menu, goal)
    shares = _shared(known, costs, width=found.width, speed=found.speed)
    return shares._replace(
      traits=_told(known, costs, menu, found),
      watts=_placed(found.watts, costs, known.ids.size, costs.watts),
    )

  needs = float(menu.memory.min()) if menu.cuts else None
  return Adaptation("joint", decide, menu.traits, needs)


POLICIES: dict[str, Callable[..., Adaptation]] = {
  "bandwidth": bandwidth,
  "cut": cut,
  "equal": equal,
  "joint": joint,
}


def _is_apart(known: Known, costs: Costs) -> bool:
  """Whether nothing that one client does is felt by another."""
  return known.radio.sharing == "own" or costs.some.size < 2


def _placed(values, costs, clients: int, empty: float = 0.0) -> np.ndarray:
  """float64 [C] of what is known of those with a link."""
  found = np.full(clients, empty)
  found[costs.some] = values
  return found


def _shared(known: Known, costs: Costs, *, width, speed) -> Adapted:
  """Shares of what is divided: the band (Hz [c]), the server (FLOP/s)."""
  clients, band, own = known.ids.size, None, None
  if known.radio.sharing == "equal":
    band = _placed(width / known.radio.bandwidth, costs, clients)
  server = known.server
  # A server without an end is not divided, nor one that nobody waits for.
  if server is not None and server.shared and server.waits:
    own = _placed(speed, costs, clients) if server.flops < math.inf else None
  return Adapted(band=band, speed=own)


def _told(known: Known, costs: Costs, menu: Menu, found) -> dict:
  """The traits of a choice of all."""
  return menu.told(known.ids.size, costs.some, found.cut, found.bits)
