"""Dispatch: which implementation of a kernel runs, and why.

With `implementation=None` the platform that is compiled for decides, which
need not be the process's own: a program may be compiled for a TPU that is not
there. A named implementation is used or refused, never replaced.
"""

import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.interpreters import batching, mlir

from fedjax_peft.kernels import native

Implementation = Literal[
  "reference",
  "native",
  "pallas_tpu",
  "pallas_gpu",
  "interpret_tpu",
  "interpret_gpu",
]
IMPLEMENTATIONS: tuple[str, ...] = Implementation.__args__  # type: ignore[attr-defined]


class Kernel(NamedTuple):
  """A kernel and its implementations, all with one signature.

  Attributes:
    name: as in `fedjax_peft.kernels`.
    reference: plain jnp; the specification, and what runs where nothing else
      does.
    native: C++ for CPUs, or None; its file in `native/` has the name
      `library`.
    pallas_tpu: Pallas for TPUs, or None; takes `interpret` as a keyword.
    pallas_gpu: Pallas for GPUs, or None; likewise.
    in_place: whether the result looks like the first argument, and takes its
      place where that is donated.
    why: {"cpu", "tpu" or "gpu": why XLA is left in charge there}.
  """

  name: str
  reference: Callable
  native: Callable | None = None
  pallas_tpu: Callable | None = None
  pallas_gpu: Callable | None = None
  why: Mapping[str, str] = {}
  library: str = ""
  in_place: bool = False


KERNELS: dict[str, Kernel] = {}


def register(kernel: Kernel) -> Kernel:
  """Adds a kernel to what `explain` explains."""
  KERNELS[kernel.name] = kernel
  return kernel


def lazily(module: str, name: str) -> Callable:
  """A function of a module that is imported when it is first called."""

  def call(*arrays: Any, **static: Any) -> Any:
    return getattr(importlib.import_module(module), name)(*arrays, **static)

  return call


def call(
  kernel: Kernel,
  *arrays: Any,
  implementation: Implementation | None = None,
  **static: Any,
) -> Any:
  """Runs a kernel.

  Args:
    kernel: which.
    *arrays: its traced arguments.
    implementation: None chooses by the platform that is compiled for.
    **static: its other arguments.

  Raises:
    ValueError: if no such implementation exists.
    RuntimeError: if it exists and cannot run here.
  """
  if implementation is not None:
    return _named(kernel, implementation)(*arrays, **static)
  if all(_chosen(kernel, p) == kernel.reference for p in PLATFORMS):
    return kernel.reference(*arrays, **static)
  _called[kernel.name] = kernel
  options = tuple(sorted(static.items()))
  spec = [(jnp.shape(x), jnp.result_type(x)) for x in arrays]
  out = _result(kernel.name, options, *spec)
  leaves = _kernel_p.bind(*arrays, name=kernel.name, options=options, axes=())
  return jax.tree.unflatten(jax.tree.structure(out), leaves)


PLATFORMS = ("cpu", "tpu", "cuda")


def _chosen(kernel: Kernel, platform: str) -> Callable:
  """What `None` means on a platform."""
  fun = {
    "cpu": None if native.missing(kernel.library) else kernel.native,
    "tpu": kernel.pallas_tpu,
    "cuda": kernel.pallas_gpu,
  }.get(platform)
  left_to_xla = {"cuda": "gpu"}.get(platform, platform) in kernel.why
  return kernel.reference if fun is None or left_to_xla else fun


# One primitive for all kernels. `lax.platform_dependent` would do the same,
# but traces the programs of every platform at every call.
_kernel_p = core.Primitive("fedjax_peft_kernel")
_called: dict[str, Kernel] = {}  # by name, which is what a program can hold
_kernel_p.multiple_results = True


def _function(
  name: str, options: tuple, axes: tuple, platform: str
) -> Callable:
  """A kernel on a platform, under the `vmap`s that it has met."""
  fun = functools.partial(_chosen(_called[name], platform), **dict(options))
  for dims in axes:
    fun = jax.vmap(fun, in_axes=dims)
  return fun


@functools.lru_cache(maxsize=1024)
def _result(name: str, options: tuple, *spec: tuple) -> Any:
  """Shapes of a kernel's result, without any `vmap`."""
  kernel = _called[name]
  like = [jax.ShapeDtypeStruct(*x) for x in spec]
  if kernel.in_place:
    return like[0]
  return jax.eval_shape(
    functools.partial(kernel.reference, **dict(options)), *like
  )


@_kernel_p.def_abstract_eval
def _abstract(*arrays, name, options, axes):
  spec, batch = [(x.shape, x.dtype) for x in arrays], []
  for dims in reversed(axes):  # the last `vmap` is the outermost
    here = list(zip(spec, dims, strict=True))
    batch.append(next(x[0][d] for x, d in here if d is not None))
    spec = [
      x if d is None else ((*x[0][:d], *x[0][d + 1 :]), x[1]) for x, d in here
    ]
  leaves = jax.tree.leaves(_result(name, options, *spec))
  return [jax.core.ShapedArray((*batch, *x.shape), x.dtype) for x in leaves]


@functools.lru_cache(maxsize=1024)
def _compiled(name, options, axes):
  """For calls outside of any `jit`."""
  bind = functools.partial(
    _kernel_p.bind, name=name, options=options, axes=axes
  )
  return jax.jit(bind)


@_kernel_p.def_impl
def _eager(*arrays, name, options, axes):
  return _compiled(name, options, axes)(*arrays)


def _batch(arrays, dims, *, name, options, axes):
  """Notes the `vmap`; the implementation that is chosen later meets it."""
  out = _kernel_p.bind(
    *arrays, name=name, options=options, axes=(*axes, tuple(dims))
  )
  return out, [0] * len(out)


batching.primitive_batchers[_kernel_p] = _batch


def _lowering(platform: str) -> Callable:
  """Traces the implementation of one platform."""

  def rule(ctx, *arrays, name, options, axes):
    def fun(*arrays):
      return jax.tree.leaves(_function(name, options, axes, platform)(*arrays))

    return mlir.lower_fun(fun, multiple_results=True)(ctx, *arrays)

  return rule


mlir.register_lowering(_kernel_p, _lowering("other"))
for _platform in PLATFORMS:
  mlir.register_lowering(_kernel_p, _lowering(_platform), platform=_platform)


def _named(kernel: Kernel, implementation: str) -> Callable:
  """One implementation, or why there is none."""
  here = {
    "reference": kernel.reference,
    "native": kernel.native,
    "pallas_tpu": kernel.pallas_tpu,
    "pallas_gpu": kernel.pallas_gpu,
    "interpret_tpu": kernel.pallas_tpu,
    "interpret_gpu": kernel.pallas_gpu,
  }
  if here.get(implementation) is None:
    known = [name for name, fun in here.items() if fun is not None]
    raise ValueError(
      f"implementation of {kernel.name} must be one of {known} or None: got "
      f"{implementation=}"
    )
  missing = native.missing(kernel.library)
  if implementation == "native" and missing:
    raise RuntimeError(
      f"the native {kernel.name} cannot run: {missing}; use "
      "implementation=None or 'reference'"
    )
  fun = here[implementation]
  assert fun is not None
  if implementation.startswith("interpret"):
    return lambda *arrays, **static: fun(*arrays, interpret=True, **static)
  return fun


def explain() -> str:
  """Says which implementation of each kernel runs on which platform, and why.

  Example:
    >>> print(explain())  # doctest: +ELLIPSIS
    native kernels: ...
  """
  missing = native.missing()
  state = f"not here ({missing})" if missing else f"built, using {native.isa()}"
  lines = [
    f"native kernels: {state}",
    "implementation=None takes, by the platform that is compiled for:",
    "",
    f"{'kernel':16}{'cpu':12}{'tpu':14}{'gpu':14}",
  ]
  notes = []
  for name, kernel in sorted(KERNELS.items()):
    words = ("native", "pallas_tpu", "pallas_gpu")
    cells = [
      "reference" if _chosen(kernel, platform) == kernel.reference else word
      for platform, word in zip(PLATFORMS, words, strict=True)
    ]
    lines.append(f"{name:16}{cells[0]:12}{cells[1]:14}{cells[2]:14}".rstrip())
    notes += [
      f"{name} on {platform}: XLA is left in charge, since {why}"
      for platform, why in kernel.why.items()
    ]
  return "\n".join([*lines, *([""] if notes else []), *notes])
