"""Profiles: what a client's machine can do, and what it draws and costs.

The figures of `PROFILES` are orders of magnitude from public data sheets, good
to about a factor of two; measure your own machines and read them with
`read_fleet` where more is wanted.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv

from fedjax_peft import validate
from fedjax_peft.network import draw, table

_GIB = 2**30


class Profile(NamedTuple):
  """One kind of machine.

  Attributes:
    name: of the kind.
    flops: FLOP/s that it sustains in training, after it got warm.
    memory: bytes that training may take.
    battery: joules of a full battery; inf = plugged in.
    idle: watts while it waits, awake.
    compute: watts of the whole machine while it trains.
    send: watts of the whole machine while it uploads.
    receive: watts of the whole machine while it downloads.
    price_hour: dollars that whoever runs the federation pays for an hour of
      computing.
    carbon: grams of CO2 per kWh of the electricity it is fed with.
  """

  name: str
  flops: float
  memory: int
  battery: float
  idle: float
  compute: float
  send: float
  receive: float
  price_hour: float
  carbon: float


# Carbon is that of an average grid, 450 g/kWh, but for the cloud, which buys
# some of its electricity green.
PROFILES: dict[str, Profile] = {
  # Four big cores, some 100 GFLOP/s at their peak, throttle to a third; 15 Wh;
  # the radio's amplifier draws more than it radiates by a factor of 5 to 10.
  "phone": Profile(
    name="phone",
    flops=3e10,
    memory=2 * _GIB,
    battery=54e3,
    idle=0.4,
    compute=4.0,
    send=2.0,
    receive=1.2,
    price_hour=0.0,
    carbon=450.0,
  ),
  # Small in-order cores of an entry-level phone; 11 Wh, 2 GiB in all.
  "phone_low": Profile(
    name="phone_low",
    flops=6e9,
    memory=_GIB // 2,
    battery=40e3,
    idle=0.3,
    compute=2.5,
    send=1.8,
    receive=1.1,
    price_hour=0.0,
    carbon=450.0,
  ),
  # A single-board computer: about 10 GFLOP/s of Linpack, 2 to 8 W at the
  # plug; 100 dollars over three years.
  "gateway": Profile(
    name="gateway",
    flops=1e10,
    memory=2 * _GIB,
    battery=np.inf,
    idle=2.5,
    compute=7.0,
    send=3.5,
    receive=3.0,
    price_hour=0.004,
    carbon=450.0,
  ),
  # Four cores of ten years ago with 256-bit vectors, half of 8 GiB free.
  "old_pc": Profile(
    name="old_pc",
    flops=5e10,
    memory=4 * _GIB,
    battery=np.inf,
    idle=40.0,
    compute=100.0,
    send=45.0,
    receive=45.0,
    price_hour=0.0,
    carbon=450.0,
  ),
  # A fanless six-core box on a factory floor; 1,500 dollars over five years.
  "industrial_pc": Profile(
    name="industrial_pc",
    flops=1e11,
    memory=8 * _GIB,
    battery=np.inf,
    idle=15.0,
    compute=45.0,
    send=18.0,
    receive=18.0,
    price_hour=0.03,
    carbon=450.0,
  ),
  # One inference card of 70 W, 65 TFLOP/s in half precision on paper, of
  # which a seventh is sustained, in a server of 150 W; rented by the hour.
  "edge_server": Profile(
    name="edge_server",
    flops=1e13,
    memory=14 * _GIB,
    battery=np.inf,
    idle=150.0,
    compute=250.0,
    send=160.0,
    receive=160.0,
    price_hour=0.5,
    carbon=450.0,
  ),
  # One training card of 700 W, some 1 PFLOP/s in bfloat16 on paper, of which
  # a third is sustained, with its share of the host and of the cooling.
  "cloud": Profile(
    name="cloud",
    flops=3e14,
    memory=76 * _GIB,
    battery=np.inf,
    idle=250.0,
    compute=1100.0,
    send=260.0,
    receive=260.0,
    price_hour=3.0,
    carbon=250.0,
  ),
}

_FIGURES = Profile._fields[1:]


@dataclasses.dataclass(frozen=True, eq=False)
class Fleet:
  """The machines of N clients, an array for each figure of `Profile`.

  Attributes:
    kinds: names of the kinds of machines.
    kind: int32 [N], which of them each client has.
    flops: float64 [N], FLOP/s sustained in training.
    memory: int64 [N], bytes.
    battery: float64 [N], joules when full; inf = plugged in.
    idle: float64 [N], watts.
    compute: float64 [N], watts.
    send: float64 [N], watts.
    receive: float64 [N], watts.
    price_hour: float64 [N], dollars.
    carbon: float64 [N], grams of CO2 per kWh.

  Raises:
    ValueError: if a figure is not a number in its range, or lengths differ.
  """

  kinds: tuple[str, ...]
  kind: np.ndarray
  flops: np.ndarray
  memory: np.ndarray
  battery: np.ndarray
  idle: np.ndarray
  compute: np.ndarray
  send: np.ndarray
  receive: np.ndarray
  price_hour: np.ndarray
  carbon: np.ndarray

  def __post_init__(self):
    kind = np.asarray(self.kind, np.int32)
    object.__setattr__(self, "kind", kind)
    for name in _FIGURES:
      given = np.asarray(getattr(self, name), np.float64)
      value = _figure(name, given, kind.size)
      object.__setattr__(self, name, value)

  def __len__(self) -> int:
    return self.kind.size

  @classmethod
  def of(cls, profiles: Sequence[Profile]) -> "Fleet":
    """The fleet in which client i has the machine `profiles[i]`."""
    kinds = tuple(dict.fromkeys(p.name for p in profiles))
    columns = list(zip(*profiles, strict=True)) or [()] * len(Profile._fields)
    kind = np.array([kinds.index(name) for name in columns[0]], np.int32)
    return cls(kinds, kind, *(np.array(x, np.float64) for x in columns[1:]))

  def take(self, ids: npt.ArrayLike) -> "Fleet":
    """The machines of some clients, in the order of their ids [C].

    Raises:
      ValueError: if a client is not there.
    """
    rows = _rows(ids, len(self))
    values = (getattr(self, name)[rows] for name in _FIGURES)
    return Fleet(self.kinds, self.kind[rows], *values)


def fleet(
  mix: Mapping[str, float],
  clients: int,
  seed: int,
  *,
  spread: float = 0.0,
  profiles: Mapping[str, Profile] = PROFILES,
) -> Fleet:
  """Draws a machine for every client.

  A client's machine depends on (seed, client) alone, so a larger fleet begins
  with the smaller one.

  Args:
    mix: share of each kind, by its name in `profiles`; shares sum to one.
    clients: N.
    seed: of the run.
    spread: standard deviation of the logarithm of the speed within a kind,
      whose median is the profile's.
    profiles: the kinds there are.

  Raises:
    ValueError: if a kind is not known, shares are not shares, or N or the
      spread is negative.

  Example:
    >>> some = fleet({"phone": 0.7, "gateway": 0.3}, 1000, seed=0)
    >>> some.kinds, float(some.flops[0])
    (('phone', 'gateway'), 30000000000.0)
  """
  validate.at_least(1, clients=clients)
  kinds, shares = tuple(mix), np.array([*mix.values()], np.float64)
  for kind in kinds:
    validate.one_of(profiles, kind=kind)
  if not np.all(shares >= 0) or abs(shares.sum() - 1) > 1e-6:
    raise ValueError(
      f"mix must be shares of the clients that sum to one: got {dict(mix)}; "
      'write {"phone": 0.7, "gateway": 0.3}'
    )
  if not 0 <= spread < np.inf:
    raise ValueError(
      f"spread must be a number of at least 0, got {spread=}; 0.5 varies the "
      "speed by a factor of 1.6"
    )
  ids = np.arange(clients)
  # Of the shares but the last: what is left over by rounding is the last's.
  edges = np.cumsum(shares)[:-1]
  which = np.searchsorted(edges, draw.uniform(seed, "machine", 0, ids), "right")
  made = Fleet.of([profiles[k] for k in kinds]).take(which)
  faster = np.exp(spread * draw.normal(seed, "speed", 0, ids))
  return dataclasses.replace(
    made, kinds=kinds, kind=which, flops=made.flops * faster
  )


def write_fleet(fleet: Fleet, path: str | os.PathLike) -> None:
  """Writes a CSV that `read_fleet` reads, a row for each client."""
  columns: dict[str, npt.ArrayLike] = {
    "client": np.arange(len(fleet)),
    "kind": [fleet.kinds[k] for k in fleet.kind],
  }
  columns |= {name: getattr(fleet, name) for name in _FIGURES}
  pyarrow.csv.write_csv(pa.table(columns), os.fspath(path))


def read_fleet(
  path: str | os.PathLike, *, profiles: Mapping[str, Profile] = PROFILES
) -> Fleet:
  """Reads the machines of all clients from a CSV.

  Args:
    path: a CSV with the columns `client` (0 .. N-1, in any order), `kind` and
      those of the figures of `Profile` that are known. A figure without a
      column is that of the kind in `profiles`.
    profiles: the kinds whose figures are known.

  Raises:
    ValueError: if a column is missing or not known, a client is missing or
      there twice, or a figure is not a number in its range.
  """
  columns = table.read(
    path,
    {"client": pa.int64(), "kind": pa.string()},
    {name: pa.float64() for name in _FIGURES},
  )
  ids, kind = columns["client"], columns["kind"]
  if not ids.size or not np.array_equal(np.sort(ids), np.arange(ids.size)):
    raise ValueError(
      f"{path}: column 'client' must hold the numbers 0 .. N-1, each once, got "
      f"{ids.size} rows with {sorted(set(ids.tolist()))[:8]}..."
    )
  kinds, index = np.unique(kind, return_inverse=True)
  order = np.argsort(ids)
  figures = []
  for name in _FIGURES:
    if name in columns:
      figures.append(columns[name][order])
      continue
    for k in kinds:
      if k not in profiles:
        raise ValueError(
          f"{path}: column {name!r} is missing, and kind {k!r} is none of "
          f"{', '.join(profiles)}; write the column, or one of these kinds"
          f"{validate.near(str(k), profiles)}"
        )
    known = np.array([getattr(profiles[k], name) for k in kinds], np.float64)
    figures.append(known[index][order])
  return Fleet(tuple(map(str, kinds)), index[order].astype(np.int32), *figures)


def _figure(name: str, value: np.ndarray, clients: int) -> np.ndarray:
  """A figure of all clients, after a check of its range and length."""
  if value.shape != (clients,):
    raise ValueError(
      f"{name} must hold a number for each of the {clients} clients, got the "
      f"shape {list(value.shape)}"
    )
  positive = name in ("flops", "memory", "battery")
  ok = (value > 0 if positive else value >= 0) & (
    (value < np.inf) | (name == "battery")
  )
  if not ok.all():
    bad = int(np.argmin(ok))
    raise ValueError(
      f"{name} must be {'above' if positive else 'at least'} zero and finite, "
      f"got {value[bad]} for client {bad}"
    )
  return value.astype(np.int64) if name == "memory" else value


def _rows(ids: npt.ArrayLike, clients: int) -> np.ndarray:
  """Rows of clients, after a check that they are there."""
  rows = np.asarray(ids, np.int64)
  if rows.size and not (rows.min() >= 0 and rows.max() < clients):
    raise ValueError(
      f"ids must be in [0, {clients}), the clients there are: got "
      f"{rows.min()} to {rows.max()}"
    )
  return rows
