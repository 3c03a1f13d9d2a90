"""Checks of arguments, made once when something is built.

Every message says what was expected, what came and what to write.
"""

import difflib
import math
import re
from collections.abc import Iterable, Mapping


def positive(**values: float) -> None:
  """Raises ValueError unless every value is finite and above zero."""
  for name, value in values.items():
    if not (isinstance(value, (int, float)) and 0 < value < math.inf):
      raise ValueError(f"{name} must be a positive number, got {name}={value}")


def at_least(minimum: int, **values: int) -> None:
  """Raises ValueError unless every value is an integer >= minimum."""
  for name, value in values.items():
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
      raise ValueError(
        f"{name} must be an integer of at least {minimum}, got {name}={value!r}"
      )


def one_of(options: Iterable, **values) -> None:
  """Raises ValueError unless every value is one of the options."""
  options = list(options)
  for name, value in values.items():
    if value not in options:
      raise ValueError(
        f"{name} must be one of {options}, got {name}={value!r}"
        f"{near(str(value), map(str, options))}"
      )


def near(name: str, options: Iterable[str]) -> str:
  """Returns '; did you mean ...?' with the closest options, or ''."""
  close = difflib.get_close_matches(name, list(options), n=3, cutoff=0.5)
  return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""


def labels(
  names: Iterable[str], rules: Mapping[str, str], allowed: Iterable[str]
) -> dict[str, str]:
  """Labels names by the first regex that matches the whole name.

  Args:
    names: what is labelled, for example paths of parameters.
    rules: {regex: label}, tried in order.
    allowed: labels that exist.

  Returns:
    {name: label} of the names that some rule matches.

  Raises:
    ValueError: if a label does not exist, or a regex matches no name.
  """
  names, allowed = list(names), list(allowed)
  found: dict[str, str] = {}
  for regex, label in rules.items():
    if label not in allowed:
      raise ValueError(
        f"placement of {regex!r} must be one of {allowed}, got {label!r}"
        f"{near(label, allowed)}"
      )
    matched = [n for n in names if re.fullmatch(regex, n)]
    if not matched:
      raise ValueError(
        f"placement {regex!r} matches no parameter; the parameters are "
        f"{names[:8]}{'...' if len(names) > 8 else ''}{near(regex, names)}"
      )
    for name in matched:
      found.setdefault(name, label)
  return found
