"""An experiment: one config, one run directory, stopped and resumed at will.

The order of writing makes a run safe to kill at any moment. A record is on the
disk before the checkpoint of its round is begun; a checkpoint knows how long
the records were; resuming cuts the records back to that length and repeats the
rounds after it, with the execution settings of the first start, bit for bit.
"""

import contextlib
import dataclasses
import fcntl
import functools
import importlib.metadata
import json
import os
import pathlib
import signal
import subprocess
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_peft import (
  budget,
  build,
  checkpoint,
  config,
  console,
  evaluate,
  record,
  runner,
  schema,
)
from fedjax_peft import settings as settings_lib
from fedjax_peft.data import fetch
from fedjax_peft.governance import configured

_PACKAGES = ("fedjax-peft", "jax", "jaxlib", "flax", "optax", "numpy")


class Paths(NamedTuple):
  """Where the parts of a run lie."""

  root: pathlib.Path
  config: pathlib.Path
  records: pathlib.Path
  clients: pathlib.Path
  ledger: pathlib.Path
  checkpoints: pathlib.Path


def paths(root: str | os.PathLike) -> Paths:
  """Returns the paths of a run directory."""
  root = pathlib.Path(root)
  return Paths(
    root,
    root / "config.json",
    root / "records.jsonl",
    root / "clients",
    root / "ledger",
    root / "checkpoints",
  )


def train(
  run: schema.Config, *, resume: bool = False, allow_drift: bool = False
) -> int:
  """Runs an experiment in `run.out`.

  Args:
    run: what to do.
    resume: go on where the directory's run stopped; a directory without a
      checkpoint is started afresh.
    allow_drift: resume although execution settings, versions or the number
      of rounds differ; the bits may then differ too.

  Returns:
    0 when the last round is done, 130 when it was interrupted and saved.

  Raises:
    ValueError, OSError: in one sentence; nothing already written is lost.
  """
  where = paths(run.out)
  count = len(record.read(where.records))
  begun = count or (
    where.checkpoints.is_dir() and any(where.checkpoints.iterdir())
  )
  if begun and not resume:
    raise ValueError(
      f"the run directory must be new, got {str(where.root)!r} with a run of "
      f"{count} records; add --resume to go on with it, or --out for another "
      "directory"
    )
  before = _recorded(where) if begun else None
  if before:
    _refuse_changes(before["config"], run.to_dict(), allow_drift)
  lines = record.read(where.records)
  done = (where.checkpoints / str(run.rounds)).is_dir()
  if not done and not (lines and "stopped" in lines[-1]):
    _cache_programs()
    parts = build.build(run)
    where.root.mkdir(parents=True, exist_ok=True)
    with alone(where.root):
      _train(run, where, parts, before, allow_drift)
  return _conclude(run, where)


def _train(run, where, parts, before, allow_drift) -> None:
  """The rounds that are left, once the directory is ours."""
  facts = _facts(parts)
  if before:
    _refuse_drift(before["facts"], facts, allow_drift)
  if before and not allow_drift:
    settings = settings_lib.Settings(**before["settings"])
  else:
    settings = build.settings(run, parts)
  saves = checkpoint.Checkpoints(where.checkpoints, keep=run.checkpoint.keep)
  with contextlib.closing(saves):
    start = _restore(saves, where, parts) if before else None
    if start is None:
      record.truncate(where.records, 0)
      record.drop_clients(where.clients, after=0)
      record.drop_clients(where.ledger, after=0)
    about = {"config": run.to_dict(), "settings": settings._asdict()}
    record.write_json(where.config, about | {"facts": facts})
    done = 0 if start is None else int(start.round)
    trail = None
    if configured.is_governed(run):
      start = configured.first_of(parts) if start is None else start
      trail = configured.trail_of(run, where.root, start, drift=allow_drift)
    with (
      _told(where),
      _polite() as asked,
      console.Progress(run.rounds, done) as progress,
    ):
      spent = 0.0
      for state, line in _rounds(run, parts, settings, start, where):
        line["wall/write_seconds"] = spent  # of the round before
        begun = time.perf_counter()
        asking = bool(asked)  # read once, since it may be asked at any moment
        last = asking or "stopped" in line
        _write(run, where, saves, trail, state, line, asking)
        spent = time.perf_counter() - begun
        progress.show(line)
        if last:
          break
    saves.wait()


@contextlib.contextmanager
def _told(where: Paths) -> Iterator[None]:
  """Says what a private run has spent if it comes to a bad end."""
  try:
    yield
  except BaseException:
    lines = record.read(where.records)
    if lines and console.spent(lines[-1]):
      console.say(
        f"{console.spent(lines[-1])}; the round under way may have told more"
      )
    raise


def _rounds(run, parts, settings, state, where) -> Iterator[tuple[Any, Any]]:
  """The rounds that are left."""
  how = run.evaluate
  own = parts.algorithm.work.local._replace(steps=how.personalize)
  measure = evaluate.evaluation(
    parts.algorithm,
    parts.model,
    parts.data,
    batch=how.batch,
    clients=how.clients,
    settings=settings,
    personalize=own if how.personalize else None,
  )
  return runner.run(
    parts.algorithm,
    parts.model,
    parts.data,
    cohort=parts.cohort,
    rounds=run.rounds,
    seed=run.seed,
    settings=settings,
    state=state,
    evaluate=measure,
    every=how.every,
    first=how.first,
    tables=lambda number, table: record.write_clients(
      where.clients, number, table
    ),
    costs=lambda number, table: record.write_clients(
      where.ledger, number, table
    ),
    stop=_stop(run),
    group=parts.group,
    gate=configured.gate_of(run, parts, settings),
  )


def _stop(run):
  """Says in which round the run's budget is spent."""
  limits = budget.Budget(**dataclasses.asdict(run.budget))
  if not limits.limits:
    return None
  return functools.partial(budget.exceeded, limits)


def _write(run, where, saves, trail, state, line, asked) -> None:
  """The record of a round, its line in the audit log, then its checkpoint."""
  world, number = state._replace(clients=()), line["round"]
  line["state/digest"] = record.digest(world)
  length = record.append(where.records, line)
  last = asked or "stopped" in line or number == run.rounds
  if trail is not None:
    trail.note(state, line)
    if last:
      trail.stop(line.get("stopped", "interrupted" if asked else "done"))
  saves.check()
  if last or number % run.checkpoint.every == 0:
    meta = {"round": number, "records_bytes": length}
    saves.save(number, world, state.clients, meta)


def _restore(saves, where, parts) -> Any:
  """The state of the newest checkpoint; what came after it is cut off."""
  like = parts.state
  saved = saves.latest(like._replace(clients=()), like.clients)
  if saved is None:
    return None
  record.truncate(where.records, saved.meta["records_bytes"])
  record.drop_clients(where.clients, after=saved.step)
  record.drop_clients(where.ledger, after=saved.step)
  last = record.read(where.records)[-1]
  if last["state/digest"] != record.digest(saved.state):
    raise ValueError(
      f"the checkpoint of round {saved.step} must hold the state that its "
      f"record describes, got another; remove {where.checkpoints}/{saved.step} "
      "to continue from the checkpoint before it"
    )
  # The plan's memory is the host's own, in its own precision.
  state = saved.state._replace(clients=saved.clients, plan={})
  return jax.tree.map(jnp.asarray, state)._replace(plan=saved.state.plan)


def _conclude(run, where) -> int:
  """The end of a run: a table, or how to go on."""
  lines = record.read(where.records)
  if "stopped" in lines[-1]:
    console.say(f"after round {lines[-1]['round']}: {lines[-1]['stopped']}")
  if lines[-1]["round"] >= run.rounds or "stopped" in lines[-1]:
    console.say(console.summary(lines), f"run directory: {where.root}")
    return 0
  if console.spent(lines[-1]):
    console.say(console.spent(lines[-1]))
  console.say(
    f"stopped after round {lines[-1]['round']} of {run.rounds}; "
    f"continue with --resume (run directory: {where.root})"
  )
  return 130


def _recorded(where: Paths) -> dict[str, Any]:
  """The config, settings and facts that a run was started with."""
  try:
    return json.loads(where.config.read_text())
  except (OSError, ValueError) as error:
    raise ValueError(
      f"{where.config} must be the config that the run was started with, got "
      f"{error}; restore the file, or start afresh in another directory"
    ) from None


def _refuse_changes(old: dict, new: dict, allow_drift: bool) -> None:
  """Raises if a run is resumed with another config."""
  free = {"out": None, "checkpoint": None, "name": None}
  if allow_drift:
    free |= {"execution": None, "rounds": None}
  found = config.differences(old | free, new | free)
  if found:
    only = all(f.startswith(("execution.", "rounds ")) for f in found)
    raise ValueError(
      f"a run is resumed with the config it was started with: "
      f"{'; '.join(found[:4])}; "
      + (
        "add --allow-drift if the results may differ in their last bits"
        if only
        else "use that config, or --out for a new run"
      )
    )


def _refuse_drift(old: dict, new: dict, allow_drift: bool) -> None:
  """Raises if data changed, or what computes them without leave."""
  if old["data"] != new["data"]:
    raise ValueError(
      f"a run is resumed on the data it was started with: fingerprint was "
      f"{old['data'][:12]} and is {new['data'][:12]}; restore the data, or "
      "use --out for a new run"
    )
  found = config.differences(old["drift"], new["drift"])
  if found and not allow_drift:
    raise ValueError(
      f"a run is resumed in the environment it was started in: "
      f"{'; '.join(found)}; add --allow-drift if the results may differ in "
      "their last bits"
    )


def _facts(parts: build.Parts) -> dict[str, Any]:
  """What a run depends on besides its config."""
  device = jax.devices()[0]
  versions = {}
  for name in _PACKAGES:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      versions[name] = importlib.metadata.version(name)
  return {
    "data": parts.data.fingerprint,
    "commit": _commit(),
    "drift": {
      "device": device.device_kind,
      "devices": jax.device_count(),
      "versions": versions,
    },
  }


def _commit() -> str:
  """The commit of the source, if it is a checkout."""
  here = pathlib.Path(__file__).parent
  command = ["git", "-C", str(here), "rev-parse", "HEAD"]
  try:
    found = subprocess.run(command, capture_output=True, text=True, check=False)
  except FileNotFoundError:
    return ""
  return found.stdout.strip()


def _cache_programs() -> None:
  """What was compiled once is not compiled again by the next run."""
  if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
    folder = str(fetch.home() / "compiled")
    jax.config.update("jax_compilation_cache_dir", folder)


@contextlib.contextmanager
def alone(root: pathlib.Path) -> Iterator[None]:
  """Holds a run directory against other processes, until this one ends."""
  with open(root / ".lock", "w") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
      raise ValueError(
        f"a run directory belongs to one process, but another one is writing "
        f"to {str(root)!r}; wait for it, or use --out for another directory"
      ) from None
    yield


@contextlib.contextmanager
def _polite() -> Iterator[list[int]]:
  """Collects the first Ctrl-C, so that a round can be finished and saved."""
  asked: list[int] = []

  def ask(number, frame):
    if asked:
      raise KeyboardInterrupt
    asked.append(number)
    # A handler may interrupt anything, so it must not share code with it.
    os.write(2, b"stopping after this round; Ctrl-C again stops now\n")

  before = signal.signal(signal.SIGINT, ask)
  try:
    yield asked
  finally:
    signal.signal(signal.SIGINT, before)
