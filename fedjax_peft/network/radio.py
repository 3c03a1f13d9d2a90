"""Radio: the links of the clients that share a cell in a round.

`radio` says how a cell is built, `signal` says how fast and how sure every
client's link is in a round, as a function of (seed, round, client, distance,
how many share the band) and of nothing else.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from fedjax_peft import validate
from fedjax_peft.network import channel, draw, onoff


class Radio(NamedTuple):
  """A cell and its clients' radios; see `radio` for the units."""

  bandwidth: float
  power: float
  station_power: float
  up: float | None
  down: float | None
  loss_km: float
  loss_decade: float
  shadowing: float
  fading: str
  k_factor: float
  interference: float
  packet_m: float
  loss: float
  retries: int
  radius: float
  sharing: str
  broadcast: bool
  p_gb: float
  p_bg: float


class Signal(NamedTuple):
  """The links of C clients in a round.

  Attributes:
    up: float64 [C], bits per second that get through: what is sent again
      takes its share. 0 where the link is off.
    down: float64 [C], bits per second; 0 where the link is off.
    lost: bool [C], the message is lost on its way up, after all retries.
    on: bool [C], there is a link at all.
  """

  up: np.ndarray
  down: np.ndarray
  lost: np.ndarray
  on: np.ndarray


def radio(
  *,
  bandwidth: float = 10e6,
  power: float = 23.0,
  station_power: float = 43.0,
  up: float | None = None,
  down: float | None = None,
  loss_km: float = 128.1,
  loss_decade: float = 37.6,
  shadowing: float = 8.0,
  fading: Literal["none", "rayleigh", "rician"] = "rayleigh",
  k_factor: float = 3.0,
  interference: float = 0.0,
  packet_m: float = 0.0,
  loss: float = 0.0,
  retries: int = 0,
  radius: float = 500.0,
  sharing: Literal["equal", "own"] = "equal",
  broadcast: bool = True,
  p_gb: float = 0.0,
  p_bg: float = 1.0,
) -> Radio:
  """A cell and its clients' radios.

  Args:
    bandwidth: Hz of the whole band, the same up and down.
    power: dBm that a client sends with.
    station_power: dBm that the base station sends with.
    up: bits per second of a link of constant rate, in place of the channel's;
      of the whole band if it is shared.
    down: likewise; give both or none.
    loss_km: dB of path loss at one kilometre.
    loss_decade: dB more with every factor of ten in distance.
    shadowing: dB, deviation of what surroundings add to a client's loss.
    fading: of a client's gain from round to round, the same up and down.
    k_factor: of Rician fading, linear.
    interference: watts from elsewhere over the whole band.
    packet_m: waterfall threshold of lost packets (0.023 in simulators), 0 =
      the channel loses none.
    loss: probability that a packet is lost whatever the channel.
    retries: how often a lost message is sent again; every time takes time.
    radius: metres of the cell, for placing clients.
    sharing: "equal" splits the band between the clients of a round, "own"
      gives each as much.
    broadcast: the model goes down once to all, as fast as the weakest can
      hear; otherwise to each on its share of the band.
    p_gb: probability that a link that is on turns off in a round.
    p_bg: probability that a link that is off comes back.

  Raises:
    ValueError: if an option is out of range, or only one of `up` and `down`
      is given.
  """
  made = Radio(
    bandwidth=bandwidth,
    power=power,
    station_power=station_power,
    up=up,
    down=down,
    loss_km=loss_km,
    loss_decade=loss_decade,
    shadowing=shadowing,
    fading=fading,
    k_factor=k_factor,
    interference=interference,
    packet_m=packet_m,
    loss=loss,
    retries=retries,
    radius=radius,
    sharing=sharing,
    broadcast=broadcast,
    p_gb=p_gb,
    p_bg=p_bg,
  )
  _check(made)
  return made


def _check(radio: Radio) -> None:
  """Raises ValueError unless every option is in its range."""
  validate.positive(
    bandwidth=radio.bandwidth,
    loss_decade=radio.loss_decade,
    radius=radio.radius,
  )
  validate.one_of(["none", "rayleigh", "rician"], fading=radio.fading)
  validate.one_of(["equal", "own"], sharing=radio.sharing)
  validate.at_least(0, retries=radio.retries)
  up, down = radio.up, radio.down
  if up is not None and down is not None:
    validate.positive(up=up, down=down)
  elif up is not down:
    raise ValueError(
      f"up and down must be given both or not at all, got {up=} {down=}; "
      "write radio(up=1e7, down=1e8)"
    )
  for name in ("power", "station_power", "loss_km"):
    if not math.isfinite(value := getattr(radio, name)):
      raise ValueError(f"{name} must be a finite number, got {name}={value}")
  for name in ("shadowing", "k_factor", "interference", "packet_m"):
    if not 0 <= (value := getattr(radio, name)) < math.inf:
      raise ValueError(f"{name} must be at least 0, got {name}={value}")
  for name in ("loss", "p_gb", "p_bg"):
    if not 0 <= (value := getattr(radio, name)) <= 1:
      raise ValueError(f"{name} must be a probability, got {name}={value}")


def signal(
  radio: Radio,
  distance: npt.ArrayLike,
  ids: npt.ArrayLike,
  number: int,
  seed: int,
  *,
  share: np.ndarray | None = None,
  watts: np.ndarray | None = None,
) -> Signal:
  """The links of the clients that take part in a round.

  Args:
    radio: the cell.
    distance: float64 [C], metres to the base station.
    ids: integers [C].
    number: the round.
    seed: of the run.
    share: float64 [C], of the band on the way up; None is as `sharing` says.
    watts: float64 [C], radiated by each; None is the radio's power.

  Returns:
    A Signal. Clients whose link is off take no part of the band and do not
    slow the broadcast down; who has a share of 0 sends nothing.

  Raises:
    ValueError: if these are no shares of one band, or the rate is constant.
  """
  ids = np.asarray(ids)
  on = ~onoff.is_bad(seed, number, ids, radio.p_gb, radio.p_bg)
  sharers = max(int(on.sum()), 1) if radio.sharing == "equal" else 1
  width, power, sends = _chosen(radio, on, sharers, share, watts)
  mean, faded = gains(radio, distance, ids, number, seed)
  up, down = _rates(radio, faded, on, sharers, width, power)
  tries, lost = _tries(radio, mean, ids, number, seed, width, power)
  return Signal(np.where(sends, up / tries, 0), np.where(on, down, 0), lost, on)


def _chosen(radio: Radio, on: np.ndarray, sharers: int, share, watts):
  """(Hz, watts, whether they send at all) of clients, numbers or [C]."""
  width: Any = radio.bandwidth / sharers
  power: Any = channel.watts(radio.power) if watts is None else watts
  if share is None:
    return width, power, on
  total = float(np.sum(share)) if np.all(share >= 0) else math.nan
  if radio.sharing != "equal" or radio.up is not None or not total < 1 + 1e-9:
    raise ValueError(
      "shares of one band are at least 0 and sum to one, and rates follow from "
      f"them: got a sum of {total:.6g} with sharing={radio.sharing!r} "
      f"up={radio.up}; share=None divides it equally"
    )
  sends = on & (share > 0)
  return np.where(sends, share, 1.0) * radio.bandwidth, power, sends


def gains(
  radio: Radio,
  distance: npt.ArrayLike,
  ids: npt.ArrayLike,
  number: int,
  seed: int,
) -> tuple[np.ndarray, np.ndarray]:
  """(mean gain, gain in this round) of every client, float64 [C], linear."""
  loss = channel.path_loss_db(
    distance, at_km=radio.loss_km, decade=radio.loss_decade
  )
  if radio.shadowing:
    loss = loss + channel.shadowing_db(seed, ids, radio.shadowing)
  mean = channel.gain(loss)
  if radio.fading == "rayleigh":
    return mean, mean * channel.rayleigh(seed, number, ids)
  if radio.fading == "rician":
    return mean, mean * channel.rician(seed, number, ids, radio.k_factor)
  return mean, mean


def noise_of(radio: Radio) -> float:
  """W/Hz, interference included."""
  return channel.NOISE + radio.interference / radio.bandwidth


def _rates(
  radio: Radio, faded: np.ndarray, on: np.ndarray, sharers: int, width, power
) -> tuple[np.ndarray, np.ndarray]:
  """(up, down) in bits per second, before anything is lost."""
  if radio.up is not None and radio.down is not None:
    shared = 1 if radio.broadcast else sharers
    full = np.ones(on.shape)
    return full * (radio.up / sharers), full * (radio.down / shared)
  noise, share = noise_of(radio), radio.bandwidth / sharers
  up = channel.rate(width, power, faded, noise=noise)
  station = channel.watts(radio.station_power)
  if radio.broadcast:
    weakest = np.min(faded, where=on, initial=np.inf)
    weakest = weakest if np.isfinite(weakest) else 0.0
    return up, channel.rate(radio.bandwidth, station, weakest, noise=noise)
  # A station that serves many at once splits its power as it does its band.
  return up, channel.rate(share, station / sharers, faded, noise=noise)


def _tries(
  radio: Radio, mean: np.ndarray, ids: np.ndarray, number, seed, width, power
) -> tuple[np.ndarray, np.ndarray]:
  """(how often a message is sent, whether it is lost even so) [C]."""
  q: float | np.ndarray = radio.loss
  if radio.packet_m:
    error = channel.packet_error(
      width, power, mean, m=radio.packet_m, noise=noise_of(radio)
    )
    q = 1 - (1 - q) * (1 - error)
  elif not q:
    return np.ones(ids.shape), np.zeros(ids.shape, bool)
  # More than k are needed with probability q^k: one draw says how many.
  u = draw.uniform(seed, "packet", number, ids)
  lost = u < q ** (1 + radio.retries)
  tries = np.ones(ids.shape)
  for k in range(1, radio.retries + 1):
    tries += u < q**k
  return tries, lost


def _preset(name: str, doc: str, **defaults) -> Callable[..., Radio]:
  """`radio` with other defaults; it has the same options."""

  @functools.wraps(radio)
  def preset(**options):
    return radio(**{**defaults, **options})

  preset.__name__ = preset.__qualname__ = name
  preset.__doc__ = f"""{doc}

  Options are those of `radio`; what is different: {defaults}.
  """
  return preset


cell = _preset(
  "cell",
  "A cell of mobile telephony: 10 MHz, Rayleigh fading, some lose contact.",
  packet_m=0.023,
  retries=1,
  p_gb=0.02,
  p_bg=0.3,
)
wifi = _preset(
  "wifi",
  "An access point in an office: 20 MHz, in sight of most within 30 m.",
  bandwidth=20e6,
  power=15.0,
  station_power=20.0,
  loss_km=129.6,  # ITU-R P.1238, offices at 2.4 GHz
  loss_decade=30.0,
  shadowing=4.0,
  fading="rician",
  radius=30.0,
  packet_m=0.023,
  retries=3,
  broadcast=False,
  p_gb=0.01,
  p_bg=0.5,
)
wired = _preset(
  "wired",
  "A line to every client: 100 Mb/s both ways, nothing is lost.",
  up=100e6,
  down=100e6,
  shadowing=0.0,
  fading="none",
  sharing="own",
)
satellite = _preset(
  "satellite",
  "Dishes under satellites in low orbit: 15 Mb/s up, 100 down, with gaps.",
  up=15e6,
  down=100e6,
  shadowing=0.0,
  fading="none",
  sharing="own",
  broadcast=False,
  loss=0.01,
  retries=2,
  p_gb=0.05,
  p_bg=0.6,
)

RADIOS: dict[str, Callable[..., Radio]] = {
  "cell": cell,
  "radio": radio,
  "satellite": satellite,
  "wifi": wifi,
  "wired": wired,
}


class Wire(NamedTuple):
  """A wired link between two receivers: the backhaul.

  Attributes:
    rate: bits per second.
    latency: seconds until the first bit is there.
    loss: probability that a packet must be sent again.
  """

  rate: float
  latency: float = 0.0
  loss: float = 0.0

  def seconds(self, bytes: npt.ArrayLike) -> np.ndarray:
    """Mean time until all bytes are there, float64 like `bytes`."""
    bits = 8.0 * np.asarray(bytes)
    return self.latency + bits / (self.rate * (1 - self.loss))


def wire(rate: float, *, latency: float = 0.0, loss: float = 0.0) -> Wire:
  """A wired link, checked.

  Raises:
    ValueError: if the rate is not positive, the latency is negative or the
      loss is not in [0, 1).

  Example:
    >>> float(wire(1e9, latency=0.01).seconds(125_000_000))
    1.01
  """
  validate.positive(rate=rate)
  if not 0 <= latency < math.inf:
    raise ValueError(f"latency must be at least 0 seconds, got {latency=}")
  if not 0 <= loss < 1:
    raise ValueError(f"loss must be a fraction in [0, 1), got {loss=}")
  return Wire(rate, latency, loss)
