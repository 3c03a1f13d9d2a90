"""Configs: a TOML file and dotted overrides become a checked `schema.Config`.

Every error names the key, what it means, what came and what to write. This
module does not import jax, so that the command line can read a config before
it decides how many devices there shall be.
"""

import dataclasses
import inspect
import math
import pathlib
import re
import tomllib
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from fedjax_peft import schema, validate


def load(
  path: str | pathlib.Path, overrides: Sequence[str] = ()
) -> schema.Config:
  """Reads a TOML file and applies `key=value` overrides.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if it is not TOML, or a key or value is not in the schema.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    others = [str(p) for p in path.parent.glob("*.toml")]
    raise FileNotFoundError(
      f"config file expected, got {str(path)!r}, which is not a file"
      f"{validate.near(str(path), others)}"
    )
  try:
    tree = tomllib.loads(path.read_text())
  except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
    raise ValueError(f"{path} is not valid TOML: {error}") from None
  for assignment in overrides:
    override(tree, assignment)
  tree.setdefault("name", path.stem)
  return parse(tree)


def parse(tree: Mapping[str, Any]) -> schema.Config:
  """Checks nested tables against the schema.

  Example:
    >>> config = parse({"model": {"name": "tiny"}, "data": {"name": "sotu"}})
    >>> config.cohort.size
    64
  """
  _refuse_unknown(tree, schema.Config, "")
  _refuse_infinite(tree, "")
  try:
    config = msgspec.convert(tree, schema.Config)
  except msgspec.ValidationError as error:
    raise ValueError(_explain(error, tree)) from None
  for name, kind in [
    ("data", "name"),
    ("uplink", "link"),
    ("downlink", "link"),
  ]:
    _require(kind, getattr(config, name), name)
  _require("method", config.model.peft, "model.peft")
  name = config.name or "run"
  return dataclasses.replace(
    config, name=name, out=config.out or str(pathlib.Path("runs") / name)
  )


def _require(
  kind: str, tables: schema.Table | Sequence[schema.Table], where: str
) -> None:
  """Checks that free tables say what they are."""
  for table in [tables] if isinstance(tables, dict) else tables:
    if not isinstance(table.get(kind), str):
      raise ValueError(
        f"{where} expected a table with the key {kind!r}, got {table}; "
        f'write {{{kind} = "...", ...}}'
      )


def override(tree: schema.Table, assignment: str) -> None:
  """Sets one dotted key in place; the value is TOML, or else a plain string.

  Example:
    >>> tree = {"uplink": [{"link": "clip", "clip_norm": 1.0}]}
    >>> override(tree, "uplink.0.clip_norm=2")
    >>> override(tree, "model.name=minilm")
    >>> tree
    {'uplink': [{'link': 'clip', 'clip_norm': 2}], 'model': {'name': 'minilm'}}
  """
  name, equals, text = assignment.partition("=")
  *parents, last = name.strip().split(".")
  if not equals or not all([*parents, last]):
    raise ValueError(
      f"--set expects key=value, got {assignment!r}; "
      "write for example --set server.learning_rate=0.003"
    )
  try:
    value = tomllib.loads(f"value = {text}")["value"]
  except tomllib.TOMLDecodeError:
    value = text
  node: Any = tree
  for part in parents:
    node = (
      node.setdefault(part, {})
      if isinstance(node, dict)
      else _at(node, part, name)
    )
  if isinstance(node, dict):
    node[last] = value
  else:
    _at(node, last, name)
    node[int(last)] = value


def _at(node: Any, part: str, name: str) -> Any:
  """An entry of a list, which a dotted key names by its number."""
  if isinstance(node, list) and part.isdecimal() and int(part) < len(node):
    return node[int(part)]
  size = f"a list of {len(node)}" if isinstance(node, list) else repr(node)
  raise ValueError(f"--set {name}: {part!r} names nothing in {size}")


def _refuse_unknown(tree: Mapping[str, Any], section: type, at: str) -> None:
  """Raises for the first key that the schema does not have."""
  hints = typing.get_type_hints(section)
  for name, value in tree.items():
    if name not in hints:
      same = [k.name for k in schema.fields() if k.name.endswith(f".{name}")]
      near = _or(same) or validate.near(name, hints)
      raise ValueError(
        f"unknown key {at + name!r}{near}; the keys "
        f"{f'of [{at[:-1]}]' if at else 'of a config'} are {', '.join(hints)}"
      )
    if dataclasses.is_dataclass(hints[name]) and isinstance(value, dict):
      _refuse_unknown(value, hints[name], f"{at}{name}.")


def _or(names: Sequence[str]) -> str:
  """'; did you mean ...?' for names that are equal but for their section."""
  return f"; did you mean {' or '.join(map(repr, names))}?" if names else ""


def _refuse_infinite(value: Any, at: str) -> None:
  """Raises for nan and inf, which TOML can say but no setting can mean."""
  if isinstance(value, float) and not math.isfinite(value):
    raise ValueError(f"{at} must be a finite number, got {value}")
  items: Any = value.items() if isinstance(value, dict) else ()
  items = enumerate(value) if isinstance(value, list) else items
  for name, child in items:
    _refuse_infinite(child, f"{at}.{name}" if at else str(name))


def _explain(error: msgspec.ValidationError, tree: Mapping[str, Any]) -> str:
  """Our sentence for a library's: the key, what it means, what came."""
  text, _, where = str(error).partition(" - at `$")
  path = re.findall(r"[^.\[\]`]+", where)
  missing = re.search(r"missing required field `(\w+)`", text)
  known = {key.name: key for key in schema.fields()}
  if missing:
    name = ".".join([*path, missing[1]])
    key = known.get(name)
    what = f": {key.expected()}, {key.doc}" if key else " (a table)"
    return f"{name} is missing{what}; add it, or use --set {name}=..."
  value: Any = tree
  for part in path:
    if isinstance(value, dict | list) and part != "...":
      value = value[int(part) if isinstance(value, list) else part]
  name = ".".join(path)
  key = next(
    (known[n] for n in (name, ".".join(path[:-1])) if n in known), None
  )
  if key is None:
    section = f"[{name}]: " if name else ""
    text = text.replace("Expected `object`", "expected a table")
    return f"{section}{text.replace('`', '')}"
  options = typing.get_args(key.type) if " | " in key.expected() else ()
  near = validate.near(value, options) if isinstance(value, str) else ""
  return (
    f"{name} must be {key.expected()}, got {value!r}{near}; it is: {key.doc}"
  )


def call(factory: Callable, options: Mapping[str, Any], where: str, **given):
  """Calls `factory` with the options of a free table, checked one by one.

  Args:
    factory: a public function with type hints.
    options: {parameter: value} as written in a config.
    where: dotted key of the table, for messages.
    **given: arguments that the caller supplies and no config may set.

  Raises:
    ValueError: if an option does not exist, has another type or is missing.
  """
  signature = inspect.signature(factory)
  hints = typing.get_type_hints(factory, include_extras=True)
  known = [name for name in signature.parameters if name not in given]
  what = f"{factory.__name__}({', '.join(known)})"
  ready = {}
  for name, value in options.items():
    if name not in known:
      raise ValueError(
        f"{where}: unknown option {name!r} of {what}"
        f"{validate.near(name, known)}"
      )
    try:
      ready[name] = msgspec.convert(value, hints.get(name, Any))
    except (msgspec.ValidationError, TypeError):
      raise ValueError(
        f"{where}.{name} must be {schema.words(hints[name])}, got {value!r}; "
        f"it is an option of {what}"
      ) from None
  for name, parameter in signature.parameters.items():
    required = parameter.default is parameter.empty
    variadic = parameter.kind in (
      parameter.VAR_POSITIONAL,
      parameter.VAR_KEYWORD,
    )
    if required and not variadic and name not in ready and name not in given:
      raise ValueError(f"{where}: option {name!r} of {what} is missing")
  try:
    return factory(**given, **ready)
  except ValueError as error:
    raise ValueError(f"{where}: {error}") from error


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
  """Returns 'key is A in the run and B now' for every key that differs."""
  found = []
  for name in [*old, *(n for n in new if n not in old)]:
    a, b = old.get(name), new.get(name)
    if isinstance(a, dict) and isinstance(b, dict):
      found += [f"{name}.{text}" for text in differences(a, b)]
    elif a != b:
      found.append(f"{name} is {a!r} in the run and {b!r} now")
  return found
