"""Native kernels: C++ for CPUs, called through XLA's foreign functions.

Built when the project is installed and a compiler is there, one library for
each source file. The instruction set is chosen at run time, so that one build
runs on every machine of its kind.
"""

import ctypes
import functools
import importlib.util
import os
import pathlib
from typing import Any

import jax


@functools.cache
def _library(name: str) -> tuple[ctypes.CDLL | None, str]:
  """The library of one source file, or why there is none."""
  if os.environ.get("FEDJAX_PEFT_NO_NATIVE") == "1":
    return None, "FEDJAX_PEFT_NO_NATIVE=1 is set"
  spec = importlib.util.find_spec("fedjax_peft.kernels")
  folders = list(spec.submodule_search_locations or ()) if spec else []
  paths = [pathlib.Path(f) / "native" / f"_{name}.so" for f in folders]
  path = next((p for p in paths if p.exists()), None)
  if path is None:
    return None, (
      "it was not built, for want of a C++ compiler when the project was "
      "installed; install one (g++), and then the project again"
    )
  try:
    return ctypes.CDLL(str(path)), ""
  except OSError as error:
    return None, f"{path.name} could not be loaded ({error})"


@functools.cache
def _register(target: str) -> None:
  """Makes an exported function known to XLA."""
  name, symbol = target.split(".")
  library, missing = _library(name)
  if library is None:
    raise RuntimeError(f"the native {name} cannot run: {missing}")
  capsule = jax.ffi.pycapsule(getattr(library, symbol))
  jax.ffi.register_ffi_target(f"fedjax_peft.{target}", capsule, "cpu")


def missing(name: str = "isa") -> str:
  """Why a source file's library is not there, '' if it is."""
  return _library(name)[1]


def isa() -> str:
  """The instruction set that the kernels use on this machine."""
  library = _library("isa")[0]
  assert library is not None
  library.Isa.restype = ctypes.c_char_p
  return library.Isa().decode()


def call(
  target: str,
  result: Any,
  *arrays: Any,
  aliases: dict[int, int] | None = None,
  **attributes: Any,
) -> Any:
  """Calls a native function.

  Under `vmap` the function is called once: every array gets the same leading
  axes, and so have the results.

  Args:
    target: "file.Symbol" of an exported XLA_FFI handler.
    result: `jax.ShapeDtypeStruct` of the result, or a tuple of them.
    *arrays: arguments.
    aliases: {argument: result} that share their memory.
    **attributes: numpy scalars, the function's static arguments.
  """
  _register(target)
  return jax.ffi.ffi_call(
    f"fedjax_peft.{target}",
    result,
    vmap_method="broadcast_all",
    input_output_aliases=aliases,
  )(*arrays, **attributes)


def in_place(
  target: str, first: jax.Array, *rest: Any, **attributes: Any
) -> jax.Array:
  """Calls a native function whose result takes its first argument's place."""
  result = jax.ShapeDtypeStruct(first.shape, first.dtype)
  return call(target, result, first, *rest, aliases={0: 0}, **attributes)
