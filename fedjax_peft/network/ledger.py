"""The ledger: what a round costs its clients, in every currency at once.

Bytes are those of the arrays that cross (`traffic`), FLOPs those of the
products in a client's steps (`flops`). Seconds, joules, dollars and grams of
CO2 follow from them, the machines and the links. Totals are sums over the
rows, never computed beside them.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from fedjax_peft.network import phases as phases_lib
from fedjax_peft.network import profile

_JOULES_OF_KWH = 3.6e6


class Load(NamedTuple):
  """What a round asks of clients; axis C.

  Attributes:
    flops: float64 [C], operations of all local steps.
    up: int64 [C], bytes of the message.
    down: int64 [C], bytes of the model.
  """

  flops: np.ndarray
  up: np.ndarray
  down: np.ndarray


class Prices(NamedTuple):
  """What is paid beside the machines.

  Attributes:
    gigabyte: dollars for 1e9 bytes over a client's link, either way.
    backhaul: dollars for 1e9 bytes between the tiers.
    request: dollars for each client that is asked, an API call.
  """

  gigabyte: float = 0.0
  backhaul: float = 0.0
  request: float = 0.0


FREE = Prices()


class Costs(NamedTuple):
  """What clients spent in a round; axis C.

  Attributes:
    client: int64 [C] ids.
    used: bool [C], whether the server used the report.
    lost: int8 [C], the phase in which it was lost (see `phases`), 0 = none.
    began_seconds: float64 [C], simulated time at which it began.
    down_seconds: float64 [C], until it had the model.
    compute_seconds: float64 [C].
    up_seconds: float64 [C].
    delay_seconds: float64 [C], between its upload and the server's receipt.
    down_bytes: int64 [C], over its link.
    up_bytes: int64 [C], over its link; copies count.
    flops: float64 [C], computed.
    receive_joules: float64 [C].
    compute_joules: float64 [C].
    send_joules: float64 [C].
    compute_dollars: float64 [C].
    traffic_dollars: float64 [C].
    request_dollars: float64 [C].
    grams: float64 [C], CO2.
  """

  client: np.ndarray
  used: np.ndarray
  lost: np.ndarray
  began_seconds: np.ndarray
  down_seconds: np.ndarray
  compute_seconds: np.ndarray
  up_seconds: np.ndarray
  delay_seconds: np.ndarray
  down_bytes: np.ndarray
  up_bytes: np.ndarray
  flops: np.ndarray
  receive_joules: np.ndarray
  compute_joules: np.ndarray
  send_joules: np.ndarray
  compute_dollars: np.ndarray
  traffic_dollars: np.ndarray
  request_dollars: np.ndarray
  grams: np.ndarray

  @property
  def seconds(self) -> np.ndarray:
    """float64 [C], busy: download, compute and upload."""
    return self.down_seconds + self.compute_seconds + self.up_seconds

  @property
  def joules(self) -> np.ndarray:
    """float64 [C], of all parts."""
    return self.receive_joules + self.compute_joules + self.send_joules

  @property
  def dollars(self) -> np.ndarray:
    """float64 [C], of all parts."""
    return self.compute_dollars + self.traffic_dollars + self.request_dollars

  def rows(self, index) -> "Costs":
    """Some of the clients, by place or mask."""
    return Costs(*(x[index] for x in self))

  def table(self) -> dict[str, np.ndarray]:
    """Columns for a file, one row a client."""
    return self._asdict()


def charge(
  ids: np.ndarray,
  load: Load,
  planned: phases_lib.Phases,
  happened: phases_lib.Phases,
  machines: profile.Fleet,
  prices: Prices = FREE,
  *,
  used: np.ndarray | bool = True,
  began: np.ndarray | float = 0.0,
) -> Costs:
  """What clients spend in a round.

  Of a phase in which the message is lost, only the part that passed is paid
  for; of later phases nothing. Time that a client spends waiting for others
  is its own and costs nothing here; energy is that above idling.

  Args:
    ids: int [C].
    load: what the round asks of each.
    planned: how long the phases take where nothing is lost.
    happened: how long they took.
    machines: of these clients, in their order.
    prices: of traffic and requests.
    used: whether the server used each report.
    began: simulated time at which each began, in seconds.
  """
  spent = happened.spent

  def part(phase, before, after):
    """The fraction of a phase that passed, float64 [C]."""
    share = happened.reaches(phase).astype(np.float64)
    at = np.flatnonzero(happened.lost == phase)
    before, after = before[at], after[at]
    with np.errstate(invalid="ignore", divide="ignore"):
      passed = np.where(before > 0, after / before, 1.0)
    share[at] = np.where(np.isfinite(passed), np.clip(passed, 0, 1), 0.0)
    return share

  down = part(phases_lib.DOWN, planned.down, happened.down)
  work = part(phases_lib.COMPUTE, planned.compute, happened.compute)
  up = part(phases_lib.UP, planned.up, happened.up)
  down_bytes = np.rint(load.down * down).astype(np.int64)
  up_bytes = np.rint(load.up * up).astype(np.int64)
  up_bytes *= np.where(happened.lost == phases_lib.ARRIVES, happened.copies, 1)
  seconds = [_finite(x) for x in spent]
  watts = (machines.receive, machines.compute, machines.send)
  # Waiting for the next phase is idling, which a device does anyway.
  joules = [
    np.maximum(w - machines.idle, 0.0) * s
    for w, s in zip(watts, seconds, strict=True)
  ]
  full = np.ones(len(ids))
  return Costs(
    client=np.asarray(ids, np.int64),
    used=np.broadcast_to(np.asarray(used, bool), full.shape),
    lost=happened.lost,
    began_seconds=full * began,
    down_seconds=seconds[0],
    compute_seconds=seconds[1],
    up_seconds=seconds[2],
    delay_seconds=_finite(happened.delay),
    down_bytes=down_bytes,
    up_bytes=up_bytes,
    flops=load.flops * work,
    receive_joules=joules[0],
    compute_joules=joules[1],
    send_joules=joules[2],
    compute_dollars=machines.price_hour * seconds[1] / 3600,
    traffic_dollars=prices.gigabyte * (down_bytes + up_bytes) / 1e9,
    request_dollars=full * prices.request,
    grams=machines.carbon * sum(joules) / _JOULES_OF_KWH,
  )


def _finite(seconds: np.ndarray) -> np.ndarray:
  """Seconds, those of a link without a rate counted as none."""
  return np.where(np.isfinite(seconds), seconds, 0.0)


def total(costs: Costs, prefix: str = "device") -> dict[str, float]:
  """Sums over clients, for the round's record.

  Args:
    costs: of the round.
    prefix: of the names.
  """
  names = (
    *("down_bytes", "up_bytes", "flops"),
    *("receive_joules", "compute_joules", "send_joules"),
    *("compute_dollars", "traffic_dollars", "request_dollars", "grams"),
  )
  found = {f"{prefix}/{name}": getattr(costs, name).sum() for name in names}
  found |= {
    f"{prefix}/joules": costs.joules.sum(),
    f"{prefix}/dollars": costs.dollars.sum(),
    f"{prefix}/busy_seconds": costs.seconds.sum(),
    f"{prefix}/asked": costs.client.size,
    f"{prefix}/used": int(costs.used.sum()),
    f"{prefix}/lost": int((costs.lost > 0).sum()),
  }
  for name in ("down_bytes", "up_bytes"):
    found[f"{prefix}/{name}"] = int(found[f"{prefix}/{name}"])
  return found


SPENT = ("bytes", "joules", "dollars", "grams", "seconds")


def spend(before: np.ndarray, record: Mapping[str, float]) -> np.ndarray:
  """Running totals after a round.

  Args:
    before: float64 [5], totals of `SPENT`.
    record: of the round: `round/NAME` for each of them.
  """
  return before + np.array([record[f"round/{name}"] for name in SPENT])
