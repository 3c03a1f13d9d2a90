"""The command line: train, stages, advise, privacy, export, data, ...

Anything a user can get wrong ends in one sentence on stderr and exit code 2.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import logging
import os
import pathlib
import sys
from collections.abc import Sequence

from fedjax_peft import config, schema, validate

_LAUNCHED = "FEDJAX_PEFT_LAUNCHED"
_STREAMS = "FEDJAX_PEFT_STREAMS"
_DEVICES = "--xla_force_host_platform_device_count"


def main(argv: Sequence[str] | None = None) -> int:
  """Runs a command.

  Args:
    argv: arguments; None takes those of the process, which is then replaced
      by one with the environment that a stream per core needs.

  Returns:
    The exit code: 0 done, 2 refused, 130 interrupted, 141 nobody reads on.
  """
  parser = _parser()
  options = parser.parse_args(argv)
  if not hasattr(options, "run"):
    parser.print_help()
    return 2
  try:
    code = options.run(options, alone=argv is None)
    sys.stdout.flush()
    return code
  except BrokenPipeError:  # who reads has seen enough, as `| head` does
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 141  # 128 + SIGPIPE, as shells say it
  except KeyboardInterrupt:
    print("interrupted; what was saved is kept", file=sys.stderr)
    return 130
  except (ValueError, OSError) as error:
    if options.traceback:
      raise
    text = " ".join(str(error).split())
    print(f"fedjax-peft: error: {text}", file=sys.stderr)
    return 2


def _train(options: argparse.Namespace, alone: bool) -> int:
  """fedjax-peft train."""
  overrides = list(options.set)
  if options.out is not None:
    overrides.append(f"out={json.dumps(options.out)}")
  run = config.load(options.config, overrides)
  if alone:
    streams = _streams(run, options.resume and not options.allow_drift)
    _replace_process(streams)
    sys.unraisablehook = _quiet
  # The storage library logs whole stack traces of what we say in a sentence.
  logging.getLogger("absl").setLevel(logging.CRITICAL)
  if options.dry_run:
    from fedjax_peft import dryrun

    dryrun.show(run)
    return 0
  from fedjax_peft import experiment

  return experiment.train(
    run, resume=options.resume, allow_drift=options.allow_drift
  )


def _quiet(report) -> None:
  """Says nothing of what a failed save leaves behind in other threads.

  Its remaining writes report to an event loop that is gone; that the save has
  failed is raised where it was waited for.
  """
  if str(report.exc_value) != "Event loop is closed":
    sys.__unraisablehook__(report)


def _data(options: argparse.Namespace, alone: bool) -> int:
  """fedjax-peft data."""
  from fedjax_peft import console, data

  if options.action == "list":
    for entry in data.entries():
      state = "prepared" if entry.is_prepared else "not prepared"
      rows = {"source": entry.source, "licence": entry.licence}
      console.say(f"{entry.name}  ({state})", console.facts(rows))
    return 0
  return _prepare(options.names, data.names(), data.prepare, "data set")


def _models(options: argparse.Namespace, alone: bool) -> int:
  """fedjax-peft models."""
  from fedjax_peft import console, models

  if options.action == "list":
    console.say(*models.names())
    return 0
  return _prepare(options.names, models.names(), models.prepare, "model")


def _methods(options: argparse.Namespace, alone: bool) -> int:
  """fedjax-peft methods."""
  from fedjax_peft import rules

  if options.name:
    print(rules.explain(options.name))
  else:
    print(rules.table())
  return 0


def _stages(options: argparse.Namespace, alone: bool) -> int:
  """fedjax-peft stages."""
  from fedjax_peft import advice_command

  return advice_command.stages(options, alone)


def _advise(options: argparse.Namespace, alone: bool) -> int:
  """fedjax-peft advise."""
  from fedjax_peft import advice_command

  return advice_command.advise(options, alone)


def _privacy(options: argparse.Namespace, alone: bool) -> int:
  """fedjax-peft privacy."""
  from fedjax_peft import privacy_command

  return privacy_command.show(options, alone)


def _export(options: argparse.Namespace, alone: bool) -> int:
  """fedjax-peft export."""
  logging.getLogger("absl").setLevel(logging.CRITICAL)
  from fedjax_peft import console, export

  path, found = export.export(
    options.directory,
    client=options.client,
    merged=options.merged,
    out=options.out,
  )
  rows = {"round": str(found.round), "of": found.name, "base": found.base}
  what = "merged model" if options.merged else "adapter"
  console.say(f"{what}: {path}", console.facts(rows))
  return 0


def _verify(options: argparse.Namespace, alone: bool) -> int:
  """fedjax-peft verify."""
  logging.getLogger("absl").setLevel(logging.CRITICAL)
  from fedjax_peft import console
  from fedjax_peft.governance import inspection

  found = inspection.verify(options.directory, options.identity)
  console.say(console.facts(found))
  return 0


def _prepare(names, known, prepare, what) -> int:
  """Gets what is named, after all names were checked."""
  for name in names:
    if name not in known:
      raise ValueError(
        f"a {what} must be one of {', '.join(known)}, got {name!r}"
        f"{validate.near(name, known)}"
      )
  for name in names:
    prepare(name)
    print(f"{name} is prepared")
  return 0


def _streams(run: schema.Config, resume: bool) -> int:
  """How many devices a CPU shall be: as told, as recorded, or one a core."""
  told = os.environ.get(_STREAMS)
  if told is not None:
    if not told.isdecimal() or int(told) < 1:
      raise ValueError(f"{_STREAMS} must be a number >= 1, got {told!r}")
    return int(told)
  about = pathlib.Path(run.out) / "config.json"
  if resume and about.exists():
    try:
      return int(json.loads(about.read_text())["settings"]["devices"])
    except (ValueError, KeyError, TypeError):
      pass  # what is wrong with the file is said where it is read
  if hasattr(os, "sched_getaffinity"):
    cores = len(os.sched_getaffinity(0))
  else:
    cores = os.cpu_count() or 1
  return run.execution.streams or cores


def _replace_process(streams: int) -> None:
  """Starts anew with one stream a core; XLA reads this when it is loaded.

  Each stream is a device with one thread. Nothing is done where the
  environment says so already, where one stream is all, or where JAX was
  installed for an accelerator. A fixed hash seed keeps the order of sets of
  names, and with it the compiled programs, the same in every process.
  """
  flags = os.environ.get("XLA_FLAGS", "")
  platforms = os.environ.get("JAX_PLATFORMS", "")
  accelerated = platforms != "cpu" if platforms else _accelerated()
  told = _LAUNCHED in os.environ or _DEVICES in flags
  if told or accelerated or streams == 1:
    return
  environment = os.environ | {
    _LAUNCHED: "1",
    "NPROC": "1",
    "PYTHONHASHSEED": "0",
    "XLA_FLAGS": f"{flags} {_DEVICES}={streams}".strip(),
  }
  sys.stdout.flush()
  command = [sys.executable, *sys.orig_argv[1:]]
  os.execve(sys.executable, command, environment)


def _accelerated() -> bool:
  """Whether a plugin for an accelerator is installed beside JAX."""
  plugins = importlib.metadata.entry_points(group="jax_plugins")
  return bool(plugins) or importlib.util.find_spec("libtpu") is not None


def _parser() -> argparse.ArgumentParser:
  """The arguments of all commands."""
  parser = argparse.ArgumentParser(
    prog="fedjax-peft",
    description="Federated fine-tuning of foundation models, simulated.",
    epilog="""examples:
  fedjax-peft data prepare sotu
  fedjax-peft models prepare minilm
  fedjax-peft train configs/quickstart.toml --set rounds=20
  fedjax-peft train configs/quickstart.toml --resume
  fedjax-peft export runs/quickstart --client 7""",
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  commands = parser.add_subparsers(title="commands", metavar="COMMAND")
  _train_parser(commands)
  _stages_parser(commands)
  _advise_parser(commands)
  _privacy_parser(commands)
  _export_parser(commands)
  _verify_parser(commands)
  for name, run, thing in [
    ("data", _data, "data sets"),
    ("models", _models, "models"),
  ]:
    one = commands.add_parser(name, help=f"{thing}: list them, prepare them")
    actions = one.add_subparsers(
      title="actions", metavar="ACTION", dest="action", required=True
    )
    actions.add_parser("list", help=f"show the {thing}")
    prepare = actions.add_parser("prepare", help="get them, once")
    prepare.add_argument("names", nargs="+", metavar="NAME")
    one.set_defaults(run=run)
    _traceback(one)
  methods = commands.add_parser(
    "methods", help="how adapters are aggregated: what each rule does and sends"
  )
  methods.add_argument(
    "name", nargs="?", metavar="NAME", help="explain one rule"
  )
  methods.set_defaults(run=_methods)
  _traceback(methods)
  return parser


def _train_parser(commands) -> None:
  """The arguments of train; its help is the schema of configs."""
  train = commands.add_parser(
    "train",
    help="run an experiment",
    description="Runs the experiment of a TOML file; writes a run directory.",
    epilog=_schema_text(),
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  _config(train)
  train.add_argument("--out", metavar="DIR", help="the run directory")
  train.add_argument(
    "--resume", action="store_true", help="go on where the run stopped"
  )
  train.add_argument(
    "--allow-drift",
    action="store_true",
    help="resume with other execution settings, versions or rounds",
  )
  train.add_argument(
    "--dry-run",
    action="store_true",
    help="show shapes, parameters, bytes and memory; run nothing",
  )
  train.set_defaults(run=_train)
  _traceback(train)


def _config(parser: argparse.ArgumentParser) -> None:
  """The config of a command, and what takes the place of its keys."""
  parser.add_argument("config", metavar="CONFIG", help="a TOML file")
  parser.add_argument(
    "--set",
    action="append",
    default=[],
    metavar="KEY=VALUE",
    help="override a key, for example server.learning_rate=0.003",
  )


def _stages_parser(commands) -> None:
  """The arguments of stages."""
  stages = commands.add_parser(
    "stages",
    help="where a config's model can be cut, and what each stage costs",
    description="Shows parameters, FLOPs, and values that leave each stage.",
  )
  _config(stages)
  stages.set_defaults(run=_stages)
  _traceback(stages)


# Options of advise: name, type, default, what it stands for, help.
_WANTED = (
  ("weight", float, 0.5, "W", "of seconds against joules, 0 to 1"),
  ("deadline", float, None, "S", "seconds in which a round must be done"),
  ("memory", float, None, "BYTES", "that training may take on any device"),
  ("least-cut", int, 1, "N", "stages that every device keeps, for privacy"),
  ("error", float, None, "E", "squared error of a value, in squared ranges"),
  ("coverage", float, 1.0, "SHARE", "of the devices that must have the memory"),
  ("values-weight", float, 0.1, "W", "worth of twice as many trained values"),
)


def _advise_parser(commands) -> None:
  """The arguments of advise."""
  advise = commands.add_parser(
    "advise",
    help="which scheme, cuts, bits and rank suit a config's devices and links",
    description="Tries ways to train a config's model on its devices: all of "
    "it, each device its own part, behind a frozen part, or in turn. Prints "
    "what their rounds come to, the best first, and keys to train so.",
  )
  _config(advise)
  for name, kind, default, stands, text in _WANTED:
    advise.add_argument(
      f"--{name}", type=kind, default=default, metavar=stands, help=text
    )
  advise.add_argument(
    "--ranks", nargs="+", type=int, default=(), help="of adapters to try"
  )
  schemes = ("federated", "splitfed", "frozen", "sequential")
  advise.add_argument(
    "--schemes", nargs="+", choices=schemes, default=schemes, help="to try"
  )
  advise.add_argument("--out", metavar="FILE", help="clients, .csv or .parquet")
  advise.add_argument("--json", action="store_true", help="print JSON")
  advise.set_defaults(run=_advise)
  _traceback(advise)


def _privacy_parser(commands) -> None:
  """The arguments of privacy."""
  privacy = commands.add_parser(
    "privacy",
    help="what a config's run will tell about one client, and why",
    description="Shows mechanism, noise, epsilon by each accountant, and the "
    "proof that the secure sum cannot wrap. Nothing is trained.",
  )
  _config(privacy)
  privacy.set_defaults(run=_privacy)
  _traceback(privacy)


def _export_parser(commands) -> None:
  """The arguments of export."""
  export = commands.add_parser(
    "export",
    help="write what a run has learned as a Hugging Face directory",
    description="Writes the adapter of a run in the Hugging Face PEFT layout.",
  )
  export.add_argument("directory", metavar="RUN", help="a run directory")
  export.add_argument(
    "--client", metavar="ID", help="the model of this client, name or number"
  )
  export.add_argument(
    "--merged",
    action="store_true",
    help="write the whole model, with the adapter folded in",
  )
  export.add_argument(
    "--out", metavar="DIR", help="where to; in the run directory by default"
  )
  export.set_defaults(run=_export)
  _traceback(export)


def _verify_parser(commands) -> None:
  """The arguments of verify."""
  verify = commands.add_parser(
    "verify",
    help="check the audit log of a run, its signatures and its checkpoint",
    description="Checks that no line of a run's audit log was changed, removed "
    "or moved, that all is signed, that versions follow each other, and that "
    "the newest checkpoint is the version that the log says.",
  )
  verify.add_argument("directory", metavar="RUN", help="a run directory")
  verify.add_argument(
    "--identity", metavar="HEX", help="the public key that must have signed"
  )
  verify.set_defaults(run=_verify)
  _traceback(verify)


def _traceback(parser: argparse.ArgumentParser) -> None:
  """The flag for whoever looks for the place of an error."""
  parser.add_argument(
    "--traceback", action="store_true", help="show where an error comes from"
  )


def _schema_text() -> str:
  """Every key of a config, from the schema."""
  lines = ["keys of a config, as KEY  TYPE = DEFAULT, then what it is:"]
  for key in schema.fields():
    lines += ["", f"  {key.name}  {key.usage()}", f"      {key.doc}"]
  return "\n".join(lines)


if __name__ == "__main__":
  sys.exit(main())
