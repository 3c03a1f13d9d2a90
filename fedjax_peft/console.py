"""The console: what a run shows while it goes on, and when it is done.

On a terminal one line is kept up to date; elsewhere every round is a line.
"""

import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import rich.console
import rich.live
import rich.progress
import rich.table

Record = Mapping[str, Any]

_SUMMARY = {
  "train/loss": "training loss",
  "eval/loss": "held-out loss",
  "eval/accuracy": "held-out accuracy",
  "eval/accuracy_mean": "mean over clients",
  "eval/accuracy_worst10": "worst tenth of clients",
  "unseen/accuracy": "clients never trained on",
  "test/accuracy": "central test set",
}


# What a simulated network has cost so far.
_SPENT = {
  "spent/seconds": ("{} s simulated", "simulated seconds"),
  "spent/joules": ("{} J", "joules of all clients"),
  "spent/dollars": ("${}", "dollars"),
}


class Progress:
  """Shows the rounds of a run; use it in a `with` statement."""

  def __init__(self, rounds: int, done: int = 0):
    """Begins at round `done` of `rounds`."""
    self._bar = rich.progress.Progress(
      rich.progress.MofNCompleteColumn(),
      rich.progress.BarColumn(bar_width=None),
      rich.progress.TimeElapsedColumn(),
      rich.progress.TimeRemainingColumn(),
    )
    self._task = self._bar.add_task("", total=rounds, completed=done)
    self._shown: dict[str, Any] = {}
    self._live = rich.live.Live(
      get_renderable=self._render, refresh_per_second=2
    )

  def __enter__(self) -> "Progress":
    """Starts the display."""
    if self._live.console.is_terminal:
      self._live.start()
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: types.TracebackType | None,
  ) -> None:
    """Leaves the last state of the display where it is."""
    self._live.stop()

  def show(self, record: Record) -> None:
    """Shows one more round; accuracy stays until it is measured again."""
    self._shown |= record
    self._bar.update(self._task, completed=record["round"])
    if not self._live.console.is_terminal:
      say(f"{record['round']}/{record['rounds']}  {line(record)}")

  def _render(self) -> rich.console.Group:
    """The bar, and below it the numbers."""
    text = line(self._shown) if self._shown else "compiling the first round"
    return rich.console.Group(self._bar, text)


def say(*things: Any) -> None:
  """Prints tables and sentences."""
  console = rich.console.Console(highlight=False, emoji=False)
  for thing in things:
    console.print(thing, soft_wrap=isinstance(thing, str), markup=False)


def line(record: Record) -> str:
  """One line for one round.

  Example:
    >>> line({"train/loss": 1.834, "up_bytes_client": 41200, "wall/seconds": 3})
    'loss 1.834  client up 41.2 kB  3.0 s'
    >>> line({"spent/seconds": 12.34, "spent/joules": 5678, "wall/seconds": 1})
    '12.3 s simulated, 5,678 J  1.0 s'
  """
  texts = {
    "train/loss": "loss {:.3f}",
    "eval/loss": "held-out {:.3f}",
    "eval/accuracy": "acc {:.3f}",
    "eval/accuracy_worst10": "(worst 10% {:.3f})",
  }
  if record.get("train/clients") == 0:  # nobody has a loss
    del texts["train/loss"]
  parts = [text.format(record[k]) for k, text in texts.items() if k in record]
  keys = {way: f"{way}_bytes_client" for way in ("up", "down")}
  sizes = [f"{w} {decimal(record[k])}" for w, k in keys.items() if k in record]
  if sizes:
    parts.append(f"client {', '.join(sizes)}")
  spent = [t.format(short(record[k])) for k, (t, _) in _of(record).items()]
  if spent:
    parts.append(", ".join(spent))
  parts += _private(record)
  if "wall/seconds" in record:
    parts.append(f"{record['wall/seconds']:.1f} s")
  return "  ".join(parts)


def _private(record: Record) -> list[str]:
  """What a private round has told, and whose report its sum holds."""
  parts = []
  if "privacy/epsilon" in record:
    parts.append(f"eps {record['privacy/epsilon']:.3f}")
  if "secure/asked" in record:
    asked, here = record["secure/asked"], record["secure/survived"]
    parts.append(f"sum of {here:.0f} of {asked:.0f}")
  if "secure/why" in record:
    parts.append(f"FAILED, nothing is released: {record['secure/why']}")
  return parts


def _of(record: Record) -> dict[str, tuple[str, str]]:
  """The costs of a simulated network that a record has."""
  return {k: text for k, text in _SPENT.items() if record.get(k)}


def short(amount: float) -> str:
  """Three digits, or all before the point.

  Example:
    >>> short(0.012345), short(12.345), short(123456.7)
    ('0.0123', '12.3', '123,457')
  """
  return f"{amount:,.0f}" if amount >= 999.5 else f"{amount:.3g}"


def decimal(count: float) -> str:
  """A number of bytes, short.

  Example:
    >>> decimal(41200), decimal(12)
    ('41.2 kB', '12 B')
  """
  for unit in ("B", "kB", "MB", "GB"):
    if count < 1000 or unit == "GB":
      break
    count /= 1000
  return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"


def summary(records: Sequence[Record]) -> rich.table.Table:
  """The table at the end of a run: each measure first and last."""
  table = rich.table.Table(box=None, pad_edge=False)
  for name, justify in (("", "left"), ("first", "right"), ("last", "right")):
    table.add_column(name, justify=justify)  # type: ignore[arg-type]
  for key, text in _SUMMARY.items():
    values = [record[key] for record in records if key in record]
    if values:
      table.add_row(text, f"{values[0]:.3f}", f"{values[-1]:.3f}")
  for way in ("up", "down"):
    total = sum(
      value
      for record in records
      for key, value in record.items()
      # What crosses a device's link is counted at the tier that it is for.
      if key.endswith(f"/{way}_bytes") and not key.startswith("device/")
    )
    if total:
      table.add_row(f"bytes {way}, all clients and rounds", "", decimal(total))
  last = records[-1]
  if last.get("spent/bytes"):
    crossed = decimal(last["spent/bytes"])
    table.add_row("bytes that crossed, lost ones too", "", crossed)
  for key, (_, text) in _of(last).items():
    table.add_row(text, "", short(last[key]))
  for row in _protected(records):
    table.add_row(*row)
  seconds = sum(
    value
    for record in records
    for key, value in record.items()
    if key.startswith("wall/") and key.endswith("seconds")
  )
  table.add_row("seconds", "", f"{seconds:.1f}")
  return table


def spent(record: Record) -> str:
  """What a private run has told until a round, as a sentence; '' of others.

  Example:
    >>> spent({"round": 3, "privacy/epsilon": 1.25, "privacy/delta": 1e-5})
    'epsilon 1.2500 at delta 1e-05 is spent after round 3'
  """
  if "privacy/epsilon" not in record:
    return ""
  return (
    f"epsilon {record['privacy/epsilon']:.4f} at delta "
    f"{record['privacy/delta']:g} is spent after round {record['round']}"
  )


def _protected(records: Sequence[Record]) -> Iterator[tuple[str, str, str]]:
  """Rows on what a private run has told, and what its secure sums took."""
  first, last = records[0], records[-1]
  if "privacy/epsilon" in last:
    name = f"epsilon at delta {last['privacy/delta']:g}"
    told = [f"{x['privacy/epsilon']:.3f}" for x in (first, last)]
    yield name, told[0], told[1]
  if "secure/asked" not in last:
    return

  def total(key):
    return sum(record[key] for record in records)

  lost = total("secure/asked") - total("secure/survived")
  yield "clients lost in secure sums", "", f"{lost:.0f}"
  yield "secure sums that failed", "", f"{total('secure/failed'):.0f}"
  for key in last:
    if key.startswith("secure/") and key.endswith("_bytes"):
      step, way, _ = key.removeprefix("secure/").split("_")
      yield f"bytes {way}, secure sums: {step}", "", decimal(total(key))


def facts(rows: Mapping[str, Any]) -> rich.table.Table:
  """Two columns: what, and how much."""
  table = rich.table.Table(box=None, pad_edge=False, show_header=False)
  table.add_column()
  table.add_column(overflow="fold")
  for name, value in rows.items():
    table.add_row(name, str(value))
  return table
