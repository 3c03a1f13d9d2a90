"""Every kernel with every shape of its own: what tests run over."""

import functools
import importlib
import pathlib
from typing import NamedTuple

import numpy as np

from fedjax_peft import kernels
from fedjax_peft.kernels import dispatch, specs


class Case(NamedTuple):
  """A kernel and one of its shapes, the one with this number."""

  kernel: dispatch.Kernel
  spec: specs.Spec
  number: int

  @property
  def name(self):
    return f"{self.kernel.name}: {self.spec.name}"

  def draw(self, seed=0):
    return self.spec.draw(np.random.default_rng(seed))

  def run(self, *arrays, implementation=None):
    return dispatch.call(
      self.kernel, *arrays, implementation=implementation, **self.spec.static
    )

  def reference(self, *arrays):
    return self.run(*arrays, implementation="reference")


@functools.cache
def cases() -> tuple[Case, ...]:
  """Of every folder: KERNEL over SPECS, and any other X over X_SPECS."""
  found = []
  for path in sorted(pathlib.Path(kernels.__path__[0]).glob("*/api.py")):
    folder = f"fedjax_peft.kernels.{path.parent.name}"
    api = importlib.import_module(f"{folder}.api")
    shapes = importlib.import_module(f"{folder}.specs")
    for name, kernel in vars(api).items():
      if isinstance(kernel, dispatch.Kernel):
        own = "SPECS" if name == "KERNEL" else f"{name}_SPECS"
        found += [
          Case(kernel, spec, number)
          for number, spec in enumerate(getattr(shapes, own))
        ]
  assert {c.kernel.name for c in found} == set(dispatch.KERNELS)
  return tuple(found)


def names() -> tuple[str, ...]:
  """Names of the kernels that have shapes."""
  return tuple(dict.fromkeys(case.kernel.name for case in cases()))
