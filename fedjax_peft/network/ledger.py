"""The ledger: what a round costs its clients, in every currency at once.

Bytes are those of the arrays that cross (`traffic`), FLOPs those of the
products in a client's steps (`flops`). Seconds, joules, dollars and grams of
CO2 follow from them, the machines and the links. Totals are sums over the
rows, never computed beside them.

Where a server computes a part of each step, what crosses in the midst of steps
is charged like all that crosses, and is told apart in columns of its own.
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
    flops: float64 [C], operations of all local steps on the device.
    up: int64 [C], bytes of the message.
    down: int64 [C], bytes of the model.
    stream_up: float64 [C], bytes that cross in the midst of all local steps;
      0, as those below, where the device computes everything.
    stream_down: float64 [C], likewise.
    server: float64 [C], operations of all local steps elsewhere.
  """

  flops: np.ndarray
  up: np.ndarray
  down: np.ndarray
  stream_up: np.ndarray | float = 0.0
  stream_down: np.ndarray | float = 0.0
  server: np.ndarray | float = 0.0


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


class Streamed(NamedTuple):
  """What the part of a server in clients' steps took; axis C.

  Attributes:
    stream_up_bytes: int64 [C], of `Costs.up_bytes`, activations and labels.
    stream_down_bytes: int64 [C], of `Costs.down_bytes`, gradients.
    stream_up_seconds: float64 [C], sending them.
    stream_down_seconds: float64 [C], receiving them.
    wait_seconds: float64 [C], idling while the server computes.
    server_flops: float64 [C], computed for the client.
  """

  stream_up_bytes: np.ndarray
  stream_down_bytes: np.ndarray
  stream_up_seconds: np.ndarray
  stream_down_seconds: np.ndarray
  wait_seconds: np.ndarray
  server_flops: np.ndarray

  @property
  def seconds(self) -> np.ndarray:
    """float64 [C], of all parts."""
    return self.stream_up_seconds + self.stream_down_seconds + self.wait_seconds


class Costs(NamedTuple):
  """What clients spent in a round; axis C.

  Attributes:
    client: int64 [C] ids.
    used: bool [C], whether the server used the report.
    lost: int8 [C], the phase in which it was lost (see `phases`), 0 = none.
    began_seconds: float64 [C], simulated time at which it began.
    down_seconds: float64 [C], until it had the model.
    compute_seconds: float64 [C], computing on the device.
    up_seconds: float64 [C], sending its message.
    delay_seconds: float64 [C], between its upload and the server's receipt.
    down_bytes: int64 [C], over its link.
    up_bytes: int64 [C], over its link; copies count.
    flops: float64 [C], computed on the device.
    receive_joules: float64 [C].
    compute_joules: float64 [C].
    send_joules: float64 [C].
    compute_dollars: float64 [C].
    traffic_dollars: float64 [C].
    request_dollars: float64 [C].
    grams: float64 [C], CO2.
    stream: what a server's part took; None where the device does it all.
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
  stream: Streamed | None = None

  @property
  def seconds(self) -> np.ndarray:
    """float64 [C], busy: download, compute, upload, and all of a stream."""
    own = self.down_seconds + self.compute_seconds + self.up_seconds
    return own if self.stream is None else own + self.stream.seconds

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
    columns = {k: v for k, v in self._asdict().items() if k != "stream"}
    stream = self.stream and Streamed(*(x[index] for x in self.stream))
    return Costs(**{k: v[index] for k, v in columns.items()}, stream=stream)

  def table(self) -> dict[str, np.ndarray]:
    """Columns for a file, one row a client."""
    table = self._asdict()
    stream = table.pop("stream")
    return table if stream is None else table | stream._asdict()


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
  parts: phases_lib.Parts | None = None,
) -> Costs:
  """What clients spend in a round.

  Of a phase in which the message is lost, only the part that passed is paid
  for; of later phases nothing. Time that a client spends waiting for others,
  or for a server in the midst of a step, is idling; energy is that above it.

  Args:
    ids: int [C].
    load: what the round asks of each.
    planned: how long the phases take where nothing is lost.
    happened: how long they took.
    machines: of these clients, in their order.
    prices: of traffic and requests.
    used: whether the server used each report.
    began: simulated time at which each began, in seconds.
    parts: how long the parts of their steps take as planned, where a server
      has one of them.
  """
  down, work, up = _passed(planned, happened)
  down_bytes = np.rint(load.down * down).astype(np.int64)
  up_bytes = np.rint(load.up * up).astype(np.int64)
  up_bytes *= np.where(happened.lost == phases_lib.ARRIVES, happened.copies, 1)
  seconds = phases_lib.Spent(*map(_finite, happened.spent))
  active, stream = seconds, None
  if parts is not None:
    took = parts.within(seconds.compute)
    stream = _streamed(load, work, took)
    down_bytes += stream.stream_down_bytes
    up_bytes += stream.stream_up_bytes
    seconds = seconds._replace(compute=took.device)
    active = phases_lib.Spent(
      seconds.down + took.down, took.device, seconds.up + took.up
    )
  watts = (machines.receive, machines.compute, machines.send)
  # Waiting for the next phase is idling, which a device does anyway.
  joules = [
    np.maximum(w - machines.idle, 0.0) * s
    for w, s in zip(watts, active, strict=True)
  ]
  full = np.ones(len(ids))
  return Costs(
    client=np.asarray(ids, np.int64),
    used=np.broadcast_to(np.asarray(used, bool), full.shape),
    lost=happened.lost,
    began_seconds=full * began,
    down_seconds=seconds.down,
    compute_seconds=seconds.compute,
    up_seconds=seconds.up,
    delay_seconds=_finite(happened.delay),
    down_bytes=down_bytes,
    up_bytes=up_bytes,
    flops=load.flops * work,
    receive_joules=joules[0],
    compute_joules=joules[1],
    send_joules=joules[2],
    compute_dollars=machines.price_hour * seconds.compute / 3600,
    traffic_dollars=prices.gigabyte * (down_bytes + up_bytes) / 1e9,
    request_dollars=full * prices.request,
    grams=machines.carbon * sum(joules) / _JOULES_OF_KWH,
    stream=stream,
  )


def _passed(planned, happened):
  """The fraction of each phase that passed, three float64 [C]."""

  def part(phase, before, after):
    share = happened.reaches(phase).astype(np.float64)
    at = np.flatnonzero(happened.lost == phase)
    before, after = before[at], after[at]
    with np.errstate(invalid="ignore", divide="ignore"):
      passed = np.where(before > 0, after / before, 1.0)
    share[at] = np.where(np.isfinite(passed), np.clip(passed, 0, 1), 0.0)
    return share

  return (
    part(phases_lib.DOWN, planned.down, happened.down),
    part(phases_lib.COMPUTE, planned.compute, happened.compute),
    part(phases_lib.UP, planned.up, happened.up),
  )


def _streamed(load, work, took):
  """What crosses in the midst of steps, of which a fraction [C] was done."""
  return Streamed(
    stream_up_bytes=np.rint(load.stream_up * work).astype(np.int64),
    stream_down_bytes=np.rint(load.stream_down * work).astype(np.int64),
    stream_up_seconds=took.up,
    stream_down_seconds=took.down,
    wait_seconds=took.server,
    server_flops=load.server * work,
  )


def _finite(seconds: np.ndarray) -> np.ndarray:
  """Seconds, those of a link without a rate counted as none."""
  return np.where(np.isfinite(seconds), seconds, 0.0)


def total(costs: Costs, prefix: str = "device") -> dict[str, float]:
  """Sums over clients, for the round's record.

  Args:
    costs: of the round.
    prefix: of the names.

  Returns:
    {name: sum}; where a server has a part in steps also what crossed in their
    midst, and `server/flops`.
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
  if costs.stream is not None:
    for name in ("stream_down_bytes", "stream_up_bytes"):
      found[f"{prefix}/{name}"] = int(getattr(costs.stream, name).sum())
    found[f"{prefix}/wait_seconds"] = costs.stream.wait_seconds.sum()
    found["server/flops"] = costs.stream.server_flops.sum()
  return found


SPENT = ("bytes", "joules", "dollars", "grams", "seconds")


def spend(before: np.ndarray, record: Mapping[str, float]) -> np.ndarray:
  """Running totals after a round.

  Args:
    before: float64 [5], totals of `SPENT`.
    record: of the round: `round/NAME` for each of them.
  """
  return before + np.array([record[f"round/{name}"] for name in SPENT])
