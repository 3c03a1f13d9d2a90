"""Seeing: what a module makes of examples before its head."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from fedjax_peft import objective

Features = Callable[[Any, Mapping[str, Any]], jax.Array]


def features_of(
  model: objective.Model, who: str, instead: str = ""
) -> Features:
  """What the head of a model reads, (module, examples) -> [B, D].

  Args:
    model: whose module has a method `features`, called with all entries of the
      examples but `label`, by name.
    who: the algorithm that needs them, for the error.
    instead: what else could be done, for the error.

  Raises:
    ValueError: if the module has no such method.
  """
  if not callable(getattr(model.origin, "features", None)):
    raise ValueError(
      f"{who} compares features, and a {type(model.origin).__name__} has no "
      "method features(...) -> [B, D], as the encoder, vit and cnn models do; "
      f"give it one{instead}"
    )

  def look(module, examples):
    return module.features(
      **{k: v for k, v in examples.items() if k != "label"}
    )

  return look
