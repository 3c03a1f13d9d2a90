"""Checks of a kernel's arguments, made when it is traced."""

from typing import Any

import jax
import numpy as np


def expect(
  name: str, array: jax.Array, dtypes: Any, shape: tuple, hint: str = ""
) -> None:
  """Raises ValueError unless an array has one of the dtypes and the shape.

  Args:
    name: of the argument.
    array: what came.
    dtypes: a dtype, or a tuple of those that may come.
    shape: its sizes; a letter stands for any.
    hint: what to do instead.

  Example:
    >>> expect("x", np.ones((2, 3)), np.float32, ("D",), "use jax.vmap")
    Traceback (most recent call last):
    ValueError: x must be float32 [D]: got x=float64 [2, 3]; use jax.vmap
  """
  several = dtypes if isinstance(dtypes, tuple) else (dtypes,)
  known = [np.dtype(dtype) for dtype in several]
  fits = len(array.shape) == len(shape) and all(
    isinstance(wanted, str) or wanted == size
    for wanted, size in zip(shape, array.shape)
  )
  if not fits or array.dtype not in known:
    kinds = " or ".join(dtype.name for dtype in known)
    sizes = ", ".join(map(str, shape))
    raise ValueError(
      f"{name} must be {kinds} [{sizes}]: got {name}={array.dtype} "
      f"{list(array.shape)}{'; ' * bool(hint)}{hint}"
    )
