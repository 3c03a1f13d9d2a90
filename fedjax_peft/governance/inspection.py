"""Inspection: whether a run directory is what its audit log says.

The model and the data are not needed: a checkpoint is a dict of arrays, whose
digest the log has, signed.
"""

import json
import os
import pathlib
from typing import Any

from orbax.checkpoint import v1 as ocp

from fedjax_peft.governance import configured, history, log, version


def verify(
  root: str | os.PathLike, identity: str | None = None
) -> dict[str, str]:
  """Checks chain, signatures, versions and the newest checkpoint of a run.

  Args:
    root: a run directory; nobody may write to it meanwhile.
    identity: the public key that must have signed, 64 hex digits; None
      believes the first line of the log, which proves that all is by one key,
      not whose it is.

  Returns:
    What was found, {what: words}.

  Raises:
    ValueError: with the first line, version or file that is not what it should
      be.
  """
  root = pathlib.Path(root)
  path = root / "governance.jsonl"
  if not path.exists():
    raise ValueError(
      f"a run with governance has an audit log: expected {path}, which does "
      "not exist; give the directory that train wrote"
    )
  found = log.verify(path, identity)
  entries = [] if found else log.read(path)
  past, odd = history.follow(entries)
  if found or odd or past is None:
    line, why = found or odd or (1, "it is missing")
    raise ValueError(f"line {line} of {path} is broken: {why}")
  told = json.loads((root / "config.json").read_text())["config"]
  if configured.digest_of(told) != past.config:
    raise ValueError(
      f"{root / 'config.json'} must be the config of the audit log, "
      f"{past.config[:12]}...: got {configured.digest_of(told)[:12]}..."
    )
  rejected = sorted(past.rejected)
  last = past.at[past.round]
  return {
    "log": f"{len(entries)} lines, whole",
    "signed by": past.identity or "nobody",
    "rounds": str(past.round),
    "rejected": ", ".join(map(str, rejected)) or "none",
    "version": f"{last.number}, {last.state}",
    "checkpoint": _checkpoint(root / "checkpoints", past),
  }


def _checkpoint(folder: pathlib.Path, past: history.History) -> str:
  """The newest checkpoint, whose state must be a version."""
  steps = [int(p.name) for p in folder.glob("*") if p.name.isdecimal()]
  if not steps:
    return "none yet"
  step = max(steps)
  made = past.at.get(step)
  if made is None:
    raise ValueError(
      f"checkpoint {folder / str(step)} must be of a round of the audit log, "
      f"which ends with round {past.round}"
    )
  digest = version.of_arrays(_arrays(folder / str(step)))
  if digest != made.state:
    raise ValueError(
      f"checkpoint {folder / str(step)} must hold version {made.number}, "
      f"{made.state[:12]}...: got {digest[:12]}...; it was changed, do not "
      "use it"
    )
  return f"round {step}, version {made.number}"


def _arrays(path: pathlib.Path) -> dict[str, Any]:
  """{path of a leaf: array} of the state in a checkpoint."""
  try:
    saved = ocp.load_checkpointables(path, {"state": None})["state"]
  except Exception as error:
    text = (str(error).strip().splitlines() or [repr(error)])[0]
    raise ValueError(
      f"checkpoint {path} must be readable, got {text[:200]}"
    ) from error
  return {k.removeprefix("state"): x for k, x in saved.items()}
