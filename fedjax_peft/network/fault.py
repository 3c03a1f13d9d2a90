"""Faults: what goes wrong, to whom, in which round.

A fault changes how long clients take and where their messages end (`phases`),
what they do inside the compiled program (`wrap`), what they have (`data`), or
what the server does (`pause`). What happens to a client depends on (seed,
round, client) alone, so two runs that differ in a policy meet the same faults.

  storm = fault.compose(fault.dropout(0.2), fault.stragglers(0.1, 10.0))
  round = storm.phases(round, ids, number, seed)

A fault that is added to others does not change what they do: each draws by
its kind, and the second of a kind by its place among them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fedjax_peft import tailoring, validate, work
from fedjax_peft.data import hashing
from fedjax_peft.network import corruption, draw, drift, spell
from fedjax_peft.network import phases as phases_lib

Phases = phases_lib.Phases


def _as_it_is(job: work.Work) -> work.Work:
  """What clients do, as they do it."""
  return job


class Fault(NamedTuple):
  """What goes wrong.

  Attributes:
    name: kind and options, for records and messages: `dropout(0.1, any)`.
    phases: (Phases, ids, number, seed) -> Phases of the round `number`.
    wrap: (Work) -> Work, what clients do otherwise inside the program.
    traits: (ids, number, seed) -> {name: int32 [C]}, facts of the round that
      the wrapped work reads.
    data: (population, seed) -> population, before the run.
    pause: (number, seed) -> seconds that the round takes longer for all.
    parts: the faults that it is composed of; set by `compose` only.
  """

  name: str
  phases: Callable[[Phases, np.ndarray, int, int], Phases] = (
    lambda round, ids, number, seed: round
  )
  wrap: Callable[[work.Work], work.Work] = _as_it_is
  traits: Callable[[np.ndarray, int, int], Mapping[str, np.ndarray]] = (
    lambda ids, number, seed: {}
  )
  data: Callable[[Any, int], Any] = lambda population, seed: population
  pause: Callable[[int, int], float] = lambda number, seed: 0.0
  parts: tuple["Fault", ...] = ()


def compose(*faults: Fault) -> Fault:
  """All of them, one after another.

  Associative; `compose()` changes nothing. Two faults of one kind are
  independent. A trait that several give has the bits of all; pauses add.

  Args:
    *faults: the first changes phases first.

  Raises:
    ValueError: for two faults of one kind that change what clients do: they
      would share a trait.
  """
  parts = tuple(p for fault in faults for p in (fault.parts or (fault,)))
  parts = tuple(p for p in parts if p.name != "clean")
  if len(parts) == 1:
    return parts[0]
  kinds = [p.name.split("(")[0] for p in parts]
  wrapping = [k for k, p in zip(kinds, parts) if p.wrap is not _as_it_is]
  twice = sorted(k for k in set(wrapping) if wrapping.count(k) > 1)
  if twice:
    raise ValueError(
      f"faults that change what clients do must be of different kinds, got "
      f"{twice} twice in {[p.name for p in parts]}; write one of a higher rate"
    )
  nth = [kinds[:i].count(kind) for i, kind in enumerate(kinds)]

  def each(seed):
    return zip(parts, (_salted(seed, n) for n in nth))

  def phases(round, ids, number, seed):
    for part, salted in each(seed):
      round = part.phases(round, ids, number, salted)
    return round

  def wrap(job):
    for part in parts:
      job = part.wrap(job)
    return job

  def traits(ids, number, seed):
    found: dict[str, np.ndarray] = {}
    for part, salted in each(seed):
      for name, bits in part.traits(ids, number, salted).items():
        found[name] = found.get(name, np.zeros_like(bits)) | bits
    return found

  def data(population, seed):
    for part, salted in each(seed):
      population = part.data(population, salted)
    return population

  def pause(number, seed):
    return math.fsum(part.pause(number, salted) for part, salted in each(seed))

  name = " + ".join(p.name for p in parts) or "clean"
  return Fault(name, phases, wrap, traits, data, pause, parts)


def dropout(rate: float, phase: str = "any") -> Fault:
  """Clients vanish in the middle of a round, each by itself.

  Args:
    rate: probability per client and round, in [0, 1].
    phase: "download", "compute" or "upload"; "any" draws one of them. The
      moment is uniform within the phase.

  Raises:
    ValueError: if an argument is out of range.
  """
  _probability(rate=rate)
  validate.one_of(["any", *phases_lib.PHASES], phase=phase)

  def phases(round, ids, number, seed):
    gone = draw.uniform(seed, "dropout", number, ids) < rate
    if phase == "any":
      drawn = draw.uniform(seed, "dropout/phase", number, ids)
      place = 1 + (3 * drawn).astype(np.int8)
    else:
      place = np.full(np.shape(ids), phases_lib.PHASES[phase], np.int8)
    moment = draw.uniform(seed, "dropout/moment", number, ids)
    return phases_lib.lose(round, np.where(gone, place, 0), moment)

  return Fault(f"dropout({rate}, {phase})", phases)


def disconnect(rate: float, mean_rounds: float = 5.0) -> Fault:
  """Clients are offline for several rounds in a row (Gilbert-Elliott).

  They are lost before the download begins.

  Args:
    rate: fraction of the rounds that a client is offline, in [0, 1).
    mean_rounds: how long on average, at least 1 / (1 - rate).

  Raises:
    ValueError: if an argument is out of range.
  """
  if not 0 <= rate < 1:
    raise ValueError(f"rate must be in [0, 1), got rate={rate}")
  stay = spell.staying(rate, mean_rounds)

  def phases(round, ids, number, seed):
    away = spell.inside(seed, "disconnect", number, ids, share=rate, stay=stay)
    return phases_lib.lose(round, np.where(away, phases_lib.DOWN, 0), 0.0)

  return Fault(f"disconnect({rate}, {mean_rounds})", phases)


def outage(rate: float) -> Fault:
  """Links are gone in the midst of a round, and back when its steps are done.

  For a model that is cut, whose devices go on with the last gradient that came
  (`split.offline`): of the steps without a link nothing crosses and a server
  computes nothing. The model comes down before and the report goes up after.

  Args:
    rate: probability, in [0, 1], that the link of a client that still has one
      is gone from a step on, so that it has one for k steps or more with
      probability (1 - rate)^k.

  Raises:
    ValueError: if `rate` is out of range; when it is put to work, if clients
      do what no link is needed for.
  """
  _probability(rate=rate)

  def wrap(job):
    if tailoring.ONLINE not in job.traits:
      raise ValueError(
        "an outage cuts links in the midst of steps, and needs clients that go "
        f"on without: got work that reads the traits {list(job.traits)}, but "
        f"not '{tailoring.ONLINE}'; use split.offline.tolerant"
      )
    return job

  def traits(ids, number, seed):
    drawn = draw.uniform(seed, "outage", number, ids)
    with np.errstate(divide="ignore"):
      steps = np.log(drawn) / np.log1p(-rate) if rate else np.inf * drawn
    return {
      tailoring.ONLINE: np.minimum(steps, tailoring.ALWAYS).astype(np.int32)
    }

  return Fault(f"outage({rate})", wrap=wrap, traits=traits)


def stragglers(fraction: float, factor: float, *, always: bool = True) -> Fault:
  """Some clients compute slowly.

  Args:
    fraction: probability that a client is one of them, in [0, 1].
    factor: > 0, by which their computing takes longer.
    always: True, the same clients in all rounds; False, drawn each round.

  Raises:
    ValueError: if an argument is out of range.
  """
  _probability(fraction=fraction)
  validate.positive(factor=factor)

  def phases(round, ids, number, seed):
    drawn = draw.uniform(seed, "stragglers", 0 if always else number, ids)
    slow = np.where(drawn < fraction, factor, 1.0)
    return round._replace(compute=round.compute * slow)

  return Fault(f"stragglers({fraction}, {factor})", phases)


def duplicates(rate: float) -> Fault:
  """Messages arrive twice; the server keeps one, the link carries both.

  Args:
    rate: probability per message, in [0, 1].

  Raises:
    ValueError: if `rate` is out of range.
  """
  _probability(rate=rate)

  def phases(round, ids, number, seed):
    again = draw.uniform(seed, "duplicates", number, ids) < rate
    return round._replace(copies=round.copies + again)

  return Fault(f"duplicates({rate})", phases)


def late(rate: float, seconds: float) -> Fault:
  """Messages are held up on their way to the server.

  Args:
    rate: probability per message, in [0, 1].
    seconds: for how long, > 0.

  Raises:
    ValueError: if an argument is out of range.
  """
  _probability(rate=rate)
  validate.positive(seconds=seconds)

  def phases(round, ids, number, seed):
    held = draw.uniform(seed, "late", number, ids) < rate
    return round._replace(delay=round.delay + np.where(held, seconds, 0.0))

  return Fault(f"late({rate}, {seconds})", phases)


def crash(
  at: int | Sequence[int], every: int | None = None, *, restart: float = 60.0
) -> Fault:
  """The server goes down: the round's reports are lost, and time passes.

  Args:
    at: the round, or rounds, in which it does.
    every: rounds between two crashes from `at` on; None = only then.
    restart: seconds until it is back, >= 0.

  Raises:
    ValueError: if an argument is out of range.
  """
  rounds = [at] if isinstance(at, int) else list(at)
  for round_ in rounds:
    validate.at_least(0, at=round_)
  if every is not None:
    validate.at_least(1, every=every)
  if not 0 <= restart < math.inf:
    raise ValueError(f"restart must be seconds >= 0, got restart={restart}")

  def down(number):
    if every is None:
      return number in rounds
    return any(number >= r and (number - r) % every == 0 for r in rounds)

  def phases(round, ids, number, seed):
    return phases_lib.lose(round, phases_lib.UP if down(number) else 0, 1.0)

  def pause(number, seed):
    return restart if down(number) else 0.0

  return Fault(f"crash({at}, {every})", phases, pause=pause)


def corrupt(
  rate: float,
  kind: str = "nan",
  *,
  sigma: float = 1.0,
  flips: float = 1e-3,
) -> Fault:
  """Messages are wrong when they leave the client.

  Args:
    rate: probability per client and round, in [0, 1].
    kind: "nan", everything is nan (the server drops such a message); "noise",
      see `sigma`; "zero", everything is zero, and counts; "bitflip", see
      `flips`.
    sigma: > 0, noise in units of the root mean square of a leaf.
    flips: fraction of the values, in (0, 1], in which one random bit flips.

  Raises:
    ValueError: if an argument is out of range.
  """
  _probability(rate=rate)
  wrap = corruption.wrapper(kind, sigma=sigma, flips=flips)

  def traits(ids, number, seed):
    hit = draw.uniform(seed, f"corrupt/{kind}", number, ids) < rate
    return {corruption.TRAIT: hit * np.int32(corruption.BITS[kind])}

  return Fault(f"corrupt_{kind}({rate})", wrap=wrap, traits=traits)


def mislabel(rate: float, classes: int) -> Fault:
  """Training labels are wrong from the start; any other one is as likely.

  Args:
    rate: probability per example, in [0, 1].
    classes: >= 2.

  Raises:
    ValueError: if an argument is out of range.
  """
  _probability(rate=rate)
  validate.at_least(2, classes=classes)

  def data(population, seed):
    return corruption.mislabeled(population, rate, classes, seed)

  return Fault(f"mislabel({rate}, {classes})", data=data)


def drift_labels(rounds: int, classes: int, *, fraction: float = 1.0) -> Fault:
  """Labels come to mean something else: label l becomes l + 1.

  Gradual drift (Gama et al., 2014): in round r an example is of the new
  concept with probability min(r / rounds, 1), drawn whenever it is trained on.
  What is evaluated stays as it is.

  Args:
    rounds: >= 1, until all examples are of the new concept.
    classes: >= 2; the last label becomes 0.
    fraction: of the clients to which it happens, in [0, 1].

  Raises:
    ValueError: if an argument is out of range.
  """
  wrap = drift.labels(rounds, classes, trait="drift_labels")
  return _drift("drift_labels", f"{rounds}, {classes}", fraction, wrap)


def drift_features(
  rounds: int,
  shift: float,
  *,
  feature: str | None = None,
  fraction: float = 1.0,
) -> Fault:
  """Features move away: in round r by min(r / rounds, 1) shift.

  What is evaluated stays as it is.

  Args:
    rounds: >= 1, until the whole shift is reached.
    shift: finite, in the unit of the features.
    feature: the leaf; None is all leaves of floats. A leaf of integers, as of
      images, must be named; it is rounded and saturates.
    fraction: of the clients to which it happens, in [0, 1].

  Raises:
    ValueError: if an argument is out of range; when a batch is first seen, if
      it has no such leaf.
  """
  wrap = drift.features(rounds, shift, trait="drift_features", feature=feature)
  return _drift("drift_features", f"{rounds}, {shift}", fraction, wrap)


def _drift(kind, options, fraction, wrap):
  """A fault of the same clients in every round; its trait has its kind."""
  _probability(fraction=fraction)

  def traits(ids, number, seed):
    hit = draw.uniform(seed, kind, 0, ids) < fraction
    return {kind: hit.astype(np.int32)}

  return Fault(f"{kind}({options})", wrap=wrap, traits=traits)


def _salted(seed, nth):
  """The seed itself, or that of a further fault of the same kind."""
  if nth == 0:
    return seed
  return int(hashing.mix(seed, nth) >> np.uint64(33))


def _probability(**values: float) -> None:
  """Raises ValueError unless every value is in [0, 1]."""
  for name, value in values.items():
    if not 0 <= value <= 1:
      raise ValueError(f"{name} must be in [0, 1], got {name}={value}")


FAULTS: dict[str, Callable[..., Fault]] = {
  "corrupt": corrupt,
  "crash": crash,
  "disconnect": disconnect,
  "drift_features": drift_features,
  "drift_labels": drift_labels,
  "dropout": dropout,
  "duplicates": duplicates,
  "late": late,
  "mislabel": mislabel,
  "outage": outage,
  "stragglers": stragglers,
}
