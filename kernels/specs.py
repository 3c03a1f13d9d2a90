"""Shapes that a kernel is tested, compiled and measured on."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np


class Spec(NamedTuple):
  """Arguments of a kernel, by name.

  Attributes:
    name: says where the shape comes from, or what is special about it.
    draw: (numpy Generator) -> the kernel's arrays.
    static: its other arguments.
    bench: whether it is worth measuring (the others are for tests).
  """

  name: str
  draw: Callable[[np.random.Generator], tuple]
  static: Mapping[str, Any] = {}
  bench: bool = False
