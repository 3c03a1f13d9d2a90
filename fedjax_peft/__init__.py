"""Federated fine-tuning of foundation models, simulated at full speed.

import fedjax_peft as fp

Names are loaded when they are first used: the command line sets the
environment of a CPU's streams before jax is imported.
"""

import importlib

__version__ = "0.1.0"

# Public names by the module that defines them.
_PUBLIC = {
  "algorithm": ("Algorithm", "federated"),
  "alias": (
    "fedadagrad",
    "fedadam",
    "fedavg",
    "fedavgm",
    "fedprox",
    "fedsgd",
    "fedyogi",
    "flasc",
  ),
  "budget": ("Budget",),
  "evaluate": ("evaluation",),
  "executor": ("Cohort",),
  "hierarchy": ("Tier", "tier"),
  "launch": ("seat",),
  "link": (
    "Context",
    "Link",
    "Roster",
    "Spec",
    "broadcast",
    "chain",
    "cut",
    "exchange",
  ),
  "links": (
    "affine",
    "air",
    "clip",
    "count",
    "discount",
    "error_feedback",
    "fixed_point",
    "int4",
    "int8",
    "lowrank",
    "mask",
    "quantize",
    "rand_k",
    "rotate",
    "sign",
    "top_k",
    "weigh",
  ),
  "objective": ("Model", "model"),
  "plan": ("Plan", "Turn"),
  "reduce": ("Reduce",),
  "rules.cards": ("explain",),
  "rounds": ("Outcome", "State"),
  "runner": ("Record", "run"),
  "sampling": ("Sampler",),
  "settings": ("Settings", "choose"),
  "vectorize": ("for_each_client",),
  "work": (
    "Batch",
    "Client",
    "Local",
    "Moment",
    "Sent",
    "Work",
    "Slope",
    "gradient",
    "local",
    "slope",
    "train",
  ),
}
# Public modules, and those that go by another name.
_MODULES = {
  "algorithms": "algorithms",
  "attack": "attack",
  "data": "data",
  "evaluate": "evaluate",
  "flops": "flops",
  "interop": "interop",
  "kernels": "kernels",
  "links": "links",
  "losses": "losses",
  "models": "models",
  "network": "network",
  "notes": "notes",
  "peft": "peft",
  "reduce": "reduce",
  "robust": "robust",
  "rules": "rules",
  "sample": "sampling",
  "split": "split",
  "summary": "summary",
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = [*_HOME, *_MODULES]  # noqa: PLE0604, all are strings


def __getattr__(name: str):
  """Loads a public name when it is first used (PEP 562)."""
  if name in _HOME:
    module = importlib.import_module(f"{__name__}.{_HOME[name]}")
    value = getattr(module, name)
  elif name in _MODULES:
    value = importlib.import_module(f"{__name__}.{_MODULES[name]}")
  else:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  globals()[name] = value
  return value


def __dir__() -> list[str]:
  """The public names, loaded or not."""
  return sorted({*globals(), *__all__})
