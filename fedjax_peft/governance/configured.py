"""Configured: what the table `governance` of a config asks for."""

import hashlib
import json
import pathlib
from typing import Any

from fedjax_peft import config, schema
from fedjax_peft import rounds as round_lib
from fedjax_peft import settings as settings_lib
from fedjax_peft.governance import gate, holdout

_FREE = ("out", "checkpoint", "name")  # what a resumed run may say otherwise


def is_governed(run: schema.Config) -> bool:
  """Whether anything is asked for."""
  return run.governance.sign or bool(run.governance.gate)


def governed(run: schema.Config, parts: Any) -> Any:
  """The parts of a run, with the server's examples and the gate's memory.

  Args:
    run: the config.
    parts: a `build.Parts`.

  Raises:
    ValueError: if there are no examples to take, or an option of the gate does
      not exist.
  """
  how = run.governance
  if not is_governed(run):
    return parts
  memory = gate.init()
  if how.gate:
    data, rows = holdout.split(parts.data, how.holdout, seed=run.seed)
    parts = parts._replace(data=data, holdout=rows)
    gate.refuse(parts.cohort, parts.group)
    memory = _gate(run, lambda state: {}).init()
  plan = parts.state.plan | memory
  return parts._replace(state=parts.state._replace(plan=plan))


def gate_of(
  run: schema.Config, parts: Any, settings: settings_lib.Settings
) -> gate.Gate | None:
  """Which rounds become the model; None where nothing is asked for.

  Args:
    run: the config.
    parts: what `governed` returned.
    settings: devices and lanes.
  """
  if not is_governed(run):
    return None
  if not run.governance.gate:
    return gate.keep_all()
  measure = holdout.measure(
    parts.algorithm,
    parts.model,
    parts.data,
    parts.holdout,
    batch=run.evaluate.batch,
    settings=settings,
  )
  return _gate(run, measure)


def _gate(run, measure):
  """The gate of a config, with a measure."""
  return config.call(
    gate.gate,
    run.governance.gate,
    "governance.gate",
    measure=measure,
    limit=run.governance.limit,
  )


def first_of(parts: Any) -> round_lib.State:
  """The state before the first round, as a run makes it."""
  state = parts.algorithm.init(
    clients=len(parts.data), cohort=parts.cohort.most
  )
  return state._replace(plan=parts.state.plan)


def trail_of(
  run: schema.Config,
  root: pathlib.Path,
  state: round_lib.State,
  drift: bool = False,
) -> Any:
  """The `trail.Trail` in a run directory; None where nothing is asked for.

  Args:
    run: the config.
    root: the run directory.
    state: that the run starts from, or goes on from.
    drift: whether rounds that are repeated may come out otherwise.

  Raises:
    ValueError: if the extra `privacy` is not installed, or as `Trail` does.
  """
  if not is_governed(run):
    return None
  try:
    from fedjax_peft.governance import signing, trail
  except ModuleNotFoundError as error:
    raise ValueError(
      f"governance signs with the package {error.name}, which is not "
      "installed; pip install 'fedjax-peft[privacy]'"
    ) from error
  path, signer = root / "governance.jsonl", None
  if run.governance.sign:
    key = run.governance.key or root / "governance.key"
    signer = signing.key_of(key, make=not path.exists())
  return trail.Trail(
    path,
    state,
    config=digest_of(run.to_dict()),
    signer=signer,
    drift=drift,
  )


def digest_of(run: dict[str, Any]) -> str:
  """SHA-256 of a config as JSON holds it, less what may change on resume."""
  told = {k: v for k, v in run.items() if k not in _FREE}
  text = json.dumps(told, sort_keys=True, separators=(",", ":"))
  return hashlib.sha256(text.encode()).hexdigest()
