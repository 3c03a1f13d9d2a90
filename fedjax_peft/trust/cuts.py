"""Cuts: whether a device hands on its examples, or something made of them.

A value that crosses a cut and depends on one value of the example alone gives
that value away: pixels as they are, scaled, or in another order; the row of a
table for each token. So a device's part is asked about pairs of examples that
agree in one value and in no other. What it hands on must not agree anywhere,
but for what is the same for all examples. The first value is not asked about:
where later tokens read earlier ones it has no company in any layer.

Entries of a part that mixes values agree to 1e-5 of their range by chance in
one pair of some 1e5, and in all three in one of 1e15.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fedjax_peft import link
from fedjax_peft.split import cutting
from fedjax_peft.trust import boundary, canary
from fedjax_peft.trust.violation import Violation

PAIRS = 3
_SAME, _OTHER = 1e-5, 1e-3  # of the largest value


class Pairs(NamedTuple):
  """Examples that agree in one value of one feature.

  Attributes:
    feature: which.
    examples: {feature: [2 PAIRS, ...]}; 2 i and 2 i + 1 are a pair.
  """

  feature: str
  examples: Mapping[str, np.ndarray]


def pairs(examples: Mapping[str, np.ndarray], *, seed: int = 0) -> list[Pairs]:
  """Pairs of each feature that holds enough bits to be drawn, at some values.

  Args:
    examples: {feature: [M, ...]}, of which ranges, and what is not drawn, are
      taken.
    seed: of the draws.

  Raises:
    ValueError: if no feature does.
  """
  spans, found = canary.spans_of(examples), []
  like = np.zeros(2 * PAIRS, np.int64)
  for number, name in enumerate(sorted(spans)):
    rng = np.random.default_rng([seed, number])
    low, high, whole = spans[name]
    # The values that pairs agree in, all different.
    chosen = np.linspace(low, high, PAIRS)
    chosen = np.repeat(np.rint(chosen) if whole else chosen, 2)
    size = examples[name][0].size
    for place in sorted({size // 4, size // 2, 3 * size // 4, size - 1} - {0}):
      rows = canary.drawn(examples, spans, like, rng)
      rows[name].reshape(2 * PAIRS, -1)[:, place] = chosen
      found.append(Pairs(name, rows))
  return found


def crossing(module: Any) -> Callable[[Mapping], dict[str, dict]]:
  """What a pipeline's devices hand to servers.

  Args:
    module: a `split.Pipeline`.

  Returns:
    (features {name: [B, ...]}) -> {name of the cut: message}.
  """
  names, parts = module.names, module.parts()
  home = [cutting.is_at_home(name) for name in names]

  def run(features):
    found, message = {}, parts[0](**features)
    for i in range(len(parts) - 1):
      if home[i] and not home[i + 1]:
        found[f"cut between '{names[i]}' and '{names[i + 1]}'"] = message
      if i + 2 < len(parts):
        message = parts[i + 1](message)
    return found

  return run


def boundaries(module: Any, spec: Mapping[str, Any]) -> list[boundary.Boundary]:
  """What one example's message is at every cut of a pipeline.

  Args:
    module: a `split.Pipeline`.
    spec: {feature: spec of one example}.
  """
  features = {
    k: jax.ShapeDtypeStruct((1, *v.shape), v.dtype)
    for k, v in spec.items()
    if k != "label"
  }
  graph, state = nnx.split(module)
  said = jax.eval_shape(
    lambda state, features: crossing(nnx.merge(graph, state))(features),
    state,
    features,
  )
  found = []
  for wire, (name, message) in zip(_outward(module), said.items(), strict=True):
    floats, rest = cutting.divide(message)
    sent = wire.up.after(link.Spec(floats)).message
    wired = boundary.named({**dict(boundary.named(sent)), **rest})
    found.append(boundary.Boundary(name, "cut", boundary.named(message), wired))
  return found


def _outward(module) -> list[cutting.Wire]:
  """The wires from a device to a server."""
  home = [cutting.is_at_home(name) for name in module.names]
  return [
    wire for i, wire in enumerate(module.wires) if home[i] and not home[i + 1]
  ]


def refuse_plain(module: Any, asked: Sequence[Pairs]) -> None:
  """Refuses a cut that hands on an example's values one by one.

  Args:
    module: a `split.Pipeline` whose first part computes on examples.
    asked: what `pairs` returns.

  Raises:
    Violation: naming the cut, the leaf, and the feature that is in it.
  """
  graph, state = nnx.split(module)

  @jax.jit
  def ask(state, features):
    said = crossing(nnx.merge(graph, state))(features)
    return {k: jax.tree.map(gives_away, v) for k, v in said.items()}

  for each in asked:
    refuse_given(functools.partial(ask, state), each)


def refuse_given(ask: Callable[[dict], dict[str, dict]], each: Pairs) -> None:
  """Raises a Violation if something is given away.

  Args:
    ask: (features) -> {name of the cut: {leaf: what `gives_away` says}}.
    each: the features.
  """
  features = {k: v for k, v in each.examples.items() if k != "label"}
  for name, leaves in ask(features).items():
    for leaf, given in boundary.named(leaves).items():
      if bool(given):
        raise Violation(
          f"{name} must carry what a part makes of examples, not examples: got "
          f"leaf '{leaf}', some of whose entries depend on one value of "
          f"'{each.feature}' each; cut after a later stage"
        )


def gives_away(value: jax.Array) -> jax.Array:
  """Whether some entry depends on what pairs agree in, and on nothing else.

  Args:
    value: [2 PAIRS, ...], of `Pairs.examples`.
  """
  rows = value.astype(jnp.float32).reshape(PAIRS, 2, -1)
  top = jnp.max(jnp.abs(rows), initial=0.0)
  same = jnp.abs(rows[:, 0] - rows[:, 1]) <= _SAME * top
  # Of what saturates there are two values at most, so three pairs are asked.
  first = rows[:, 0]
  apart = [
    jnp.abs(first[i] - first[j]) > _OTHER * top
    for i in range(PAIRS)
    for j in range(i)
  ]
  return jnp.any(jnp.all(same, axis=0) & jnp.all(jnp.stack(apart), axis=0))
