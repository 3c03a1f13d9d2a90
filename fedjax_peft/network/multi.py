"""Links of clients: one radio, several at once, or rates that were recorded.

Of several, a message is split such that all parts arrive together, which makes
one link of the sum of the rates; or it takes the link that is usually best,
until that degrades.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from fedjax_peft import validate
from fedjax_peft.data import hashing
from fedjax_peft.network import access, trace
from fedjax_peft.network import radio as radio_lib

USES = ("split", "switch")


class Multi(NamedTuple):
  """Several radios of a client; see `multi`."""

  radios: tuple[radio_lib.Radio, ...]
  use: str
  margin: float


def multi(
  radios: Sequence[radio_lib.Radio],
  *,
  use: Literal["split", "switch"] = "split",
  margin: float = 0.25,
) -> Multi:
  """Several radios of a client.

  Args:
    radios: at least one; each has draws of its own.
    use: "split" sends a part over each, such that all finish at the same time;
      "switch" sends all over one: the usually fastest, unless another is
      better in this round by the margin.
    margin: by how much of its rate the usual link must be beaten.

  Raises:
    ValueError: if there is no radio, or an option is out of range.
  """
  validate.one_of(USES, use=use)
  if not radios:
    raise ValueError("multi-access needs at least one radio: got none")
  if not 0 <= margin < np.inf:
    raise ValueError(f"margin must be at least 0, got {margin=}")
  return Multi(tuple(radios), use, margin)


def signal(
  how: Multi,
  distance: npt.ArrayLike,
  ids: npt.ArrayLike,
  number: int,
  seed: int,
) -> radio_lib.Signal:
  """The links of clients, all radios taken together.

  Args:
    how: radios and their use.
    distance: float64 [C], metres.
    ids: integers [C].
    number: the round.
    seed: of the run.

  Returns:
    A Signal. Of a split message every part must arrive; of links that are off
    nothing is sent.
  """
  found = [
    radio_lib.signal(one, distance, ids, number, _seed(seed, i))
    for i, one in enumerate(how.radios)
  ]
  if len(found) == 1:
    return found[0]
  up, down, lost, on = (np.stack(x, -1) for x in zip(*found, strict=True))
  if how.use == "split":
    # The equal-finish split of D over rates r takes D / sum(r).
    return radio_lib.Signal(
      up.sum(-1),
      down.sum(-1),
      np.any(np.logical_and(lost, on), -1),
      np.any(on, -1),
    )
  usual = np.stack(
    [
      radio_lib.signal(
        one._replace(fading="none", p_gb=0.0), distance, ids, 0, _seed(seed, i)
      ).up
      for i, one in enumerate(how.radios)
    ],
    -1,
  )
  which = access.switch(usual.argmax(-1), up, margin=how.margin)[..., None]

  def taken(x):
    return np.take_along_axis(x, which, -1)[..., 0]

  return radio_lib.Signal(taken(up), taken(down), taken(lost), taken(on))


def _seed(seed: int, radio: int) -> int:
  """The seed itself for the first radio, and others for the others."""
  return seed if not radio else int(hashing.mix(seed, radio) >> np.uint64(33))


Links = radio_lib.Radio | Multi | trace.Trace


def links(
  how: Links,
  distance: npt.ArrayLike,
  ids: npt.ArrayLike,
  number: int,
  seed: int,
  now: float,
  *,
  share: np.ndarray | None = None,
  watts: np.ndarray | None = None,
) -> radio_lib.Signal:
  """The links of clients, of whatever kind they are.

  Args:
    how: a radio, several, or recorded rates, of which a rate of 0 is a link
      that is off.
    distance: float64 [C], metres.
    ids: integers [C].
    number: the round.
    seed: of the run.
    now: simulated seconds.
    share: of the band of one radio; see `radio.signal`.
    watts: with which clients send over one radio.

  Raises:
    ValueError: if a share or a power is given where there is not one radio.
  """
  if isinstance(how, radio_lib.Radio):
    return radio_lib.signal(
      how, distance, ids, number, seed, share=share, watts=watts
    )
  if share is not None or watts is not None:
    raise ValueError(
      "a band is divided and powers are chosen on one radio: got a "
      f"{type(how).__name__}; leave share and watts out"
    )
  if isinstance(how, Multi):
    return signal(how, distance, ids, number, seed)
  up, down = how.rates(ids, now)
  on = np.logical_and(up > 0, down > 0)
  return radio_lib.Signal(up, down, np.zeros(on.shape, bool), on)


def calm(how: Links) -> Links:
  """The same without fading and outages, each client with its own band."""
  if isinstance(how, Multi):
    return how._replace(radios=tuple(map(_calm, how.radios)))
  return how if isinstance(how, trace.Trace) else _calm(how)


def _calm(one: radio_lib.Radio) -> radio_lib.Radio:
  """One radio without fading and outages."""
  return one._replace(fading="none", p_gb=0.0, sharing="own")


def unicast(how: Links) -> Links:
  """The same where what goes down is another thing for each client.

  What a broadcast sends to all at once is the model; gradients are not.
  """
  if isinstance(how, trace.Trace):
    return how
  if isinstance(how, Multi):
    parts = tuple(one._replace(broadcast=False) for one in how.radios)
    return how._replace(radios=parts)
  return how._replace(broadcast=False)


def divided(how: Links, clients: int) -> Links:
  """The same for clients who always share a band with so many.

  Args:
    how: links; recorded rates are what each client has.
    clients: at work at one time.
  """
  if isinstance(how, Multi):
    parts = tuple(_divided(one, clients) for one in how.radios)
    return how._replace(radios=parts)
  return how if isinstance(how, trace.Trace) else _divided(how, clients)


def _divided(one: radio_lib.Radio, clients: int) -> radio_lib.Radio:
  """One radio with a part of its band."""
  share = clients if one.sharing == "equal" else 1
  return one._replace(
    bandwidth=one.bandwidth / share,
    up=None if one.up is None else one.up / share,
    down=None if one.down is None else one.down / share,
    sharing="own",
    broadcast=False,
  )


def radius(how: Links) -> float:
  """Metres of the cell, for placing clients."""
  if isinstance(how, Multi):
    return max(one.radius for one in how.radios)
  return 500.0 if isinstance(how, trace.Trace) else how.radius
