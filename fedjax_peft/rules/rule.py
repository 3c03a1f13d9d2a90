"""Rules: how what clients make of their adapters becomes one adapter.

A rule says which factors are trained and sent, and what the server makes of
them. It declares what it is, and property tests prove every declaration. All
are written from their formulas in this library's orientation, y = x W + s x A B
with A [K, R] and B [R, F] (the papers' A and B transposed).
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_peft import link, objective, tree, work
from fedjax_peft import reduce as reduce_lib
from fedjax_peft.peft import adapter, lowrank, stacked
from fedjax_peft.rules import heard as heard_lib
from fedjax_peft.rules import product

Pairs = tuple[heard_lib.Pair, ...]


class Rule(NamedTuple):
  """A way to aggregate low-rank adapters; see `fedjax_peft.rules`.

  Attributes:
    name: as in `fp.explain(name)`.
    formula: what the server does, in one line.
    source: paper.
    up: floats that a client sends for an adapter.
    down: floats that it is told.
    exact: the model after a round is the weighted mean of the clients' models
      (of what the rule lets them train).
    gauge_invariant: the model does not change when a client reports
      (A G, G^-1 B) in place of (A, B), for any invertible G, or for rotations
      only; "fixed": only one factor moves, so that there is no such freedom.
    heterogeneous_rank: clients may have a trait `rank`.
    linear: works under a secure sum.
    rebases: factors mean something else after a round, so that nothing that
      remembers them (momentum, error feedback) may be used.
    placement: where leaves live, {regex: label}.
    active: (path, Moment) -> whether a factor is trained in a step; None: yes.
    residual: needs `lora(..., residual=True)`.
    server: (pairs) -> transformation of what was heard into a descent
      direction; None applies the mean.
    one_by_one: needs every client's factors.
    cycle: rounds after which it does the same again.
    told: (pair, {path: spec}, senders, round) -> {path: spec or None}, leaves
      of which less than all (None: nothing) has to be told after a round.
    penalty: (pairs) -> (params, rank) -> scalar added to a client's loss.
    prune: (pairs) -> (before, after, rank) -> the rank that a client keeps,
      from its factors as they were sent and as they are; None: all of it.
    write: what to write for it; empty: `rule=fp.rules.NAME()`.
  """

  name: str
  formula: str
  source: str
  up: str
  down: str
  exact: bool
  gauge_invariant: bool | Literal["rotations", "fixed"]
  heterogeneous_rank: bool
  linear: bool
  rebases: bool = False
  placement: Mapping[str, str] = {}
  active: Callable | None = None
  residual: bool = False
  server: Callable[[Pairs], optax.GradientTransformation] | None = None
  one_by_one: bool = False
  cycle: int = 1
  told: Callable | None = None
  penalty: Callable | None = None
  prune: Callable | None = None
  write: str = ""


def pairs_of(module) -> Pairs:
  """The low-rank adapters of a module, by layer (and name, if stacked)."""
  found = adapter.find(module, (lowrank.LoRA, stacked.Factors))
  return tuple(
    heard_lib.Pair(adapter.join(path), float(node.scale))
    for path, (node, _) in found.items()
  )


class Bound(NamedTuple):
  """A rule and the adapters of a model that it is for.

  Attributes:
    rule: the rule.
    pairs: the adapters.
    reduce: how reports become one.
    server: transformation of what was heard; None applies the mean.
  """

  rule: Rule
  pairs: Pairs
  reduce: reduce_lib.Reduce
  server: optax.GradientTransformation | None


def bind(rule: Rule, model: objective.Model, *, watch: bool = False) -> Bound:
  """Checks that a rule can aggregate a model's adapters.

  Args:
    rule: the rule.
    model: whose adapters it is for.
    watch: whether diagnostics need to know more than the rule does.

  Raises:
    ValueError: if the model has no low-rank adapter, or the rule needs a
      residual that its layers do not have.
  """
  pairs = pairs_of(model.origin)
  if not pairs:
    raise ValueError(
      f"rule '{rule.name}' aggregates low-rank adapters and the model has "
      "none; put them in with peft.lora(module, rank=8, where=...)"
    )
  without = [p.layer for p in pairs if p.residual not in model.params]
  if rule.residual and without:
    raise ValueError(
      f"rule '{rule.name}' moves the layers themselves, but '{without[0]}' has "
      "no residual; build the adapters with peft.lora(..., residual=True), or "
      "for stacked adapters use a rule without one, such as flexlora"
    )
  # Where one factor alone is reported there is nothing more to hear.
  if rule.linear and (not watch or rule.placement):
    server = None if rule.server is None else rule.server(pairs)
    return Bound(rule, pairs, reduce_lib.sum(), server)
  reduce = heard_lib.hear(pairs, one_by_one=rule.one_by_one)
  reduce = reduce._replace(name=rule.name)
  if rule.server is not None:
    return Bound(rule, pairs, reduce, rule.server(pairs))
  return Bound(rule, pairs, reduce, recombine(pairs, lambda *_: {}))


def means(message: Any) -> dict[str, jax.Array]:
  """{path: mean delta} of a `Heard`, or the message itself."""
  return message.mean if isinstance(message, heard_lib.Heard) else message


class Rounds(NamedTuple):
  """State of a rule's server: int32 scalar, rounds applied."""

  applied: jax.Array


def recombine(
  pairs: Pairs, step: Callable[[heard_lib.Pair, dict, Any, jax.Array], dict]
) -> optax.GradientTransformation:
  """A server that makes new factors out of what it heard.

  Args:
    pairs: the adapters; every other leaf, and a factor that travels without
      the other, gets its mean delta.
    step: (pair, params, heard, count) -> {path: new value}.

  Returns:
    A transformation whose updates are params - new, a descent direction.
  """

  def init(params):
    del params
    return Rounds(jnp.zeros((), jnp.int32))

  def update(heard, state, params):
    mean = means(heard)
    down = {k: mean.get(k, jnp.zeros_like(v)) for k, v in params.items()}
    for pair in heard_lib.both_travel(pairs, params):
      new = step(pair, params, heard, state.applied)
      down |= {k: params[k] - v for k, v in new.items()}
    return down, Rounds(state.applied + 1)

  return optax.GradientTransformation(init, update)


def check(
  rule: Rule,
  server: optax.GradientTransformation | None,
  uplink: link.Link | None,
  ranks: bool,
) -> None:
  """Raises ValueError if a rule is put together with what it rules out."""
  if ranks and not rule.heterogeneous_rank:
    raise ValueError(
      f"clients of different ranks cannot be aggregated by '{rule.name}'; use "
      "fedit, hetlora, flexlora, flora, fedex or fair"
    )
  if server is not None and (rule.rebases or rule.active is not None):
    state = server.init({"a": jnp.zeros((1,))})
    if any(tree.is_float(x) for x in jax.tree.leaves(state)):
      raise ValueError(
        f"'{rule.name}' gives the factors another part in each round, which "
        "a server optimizer with memory would mix up; use server=None or "
        "optax.sgd(rate)"
      )
  if not rule.rebases:
    return
  for part in link.parts_of(uplink) if uplink is not None else ():
    if part.name.startswith("error_feedback"):
      raise ValueError(
        f"'{rule.name}' gives the factors a new meaning in each round, so what "
        f"'{part.name}' holds back from one to the next means nothing; leave "
        "error_feedback out"
      )


def descent(bound: Bound, model: objective.Model) -> Callable | None:
  """`work.train`'s descent under a rule that adds to the loss; else None."""
  if bound.rule.penalty is None:
    return None
  cost = bound.rule.penalty(bound.pairs)
  full = {p.a: model.params[p.a].shape[-1] for p in bound.pairs}

  def down(weights, rest, base, batch, now):
    most = jnp.int32(max(full.values()))
    rank = now.traits.get("rank", most)
    each = jnp.ones_like(batch.mask)
    return work.slope(
      model,
      weights,
      rest,
      base,
      batch,
      penalty=lambda params: each * cost(params, rank),
    )

  return down


def news(rule: Rule, pairs: Pairs) -> Callable:
  """What has to be told after a round: `Tier.news` under a rule."""

  def one(specs, senders, round):
    specs = dict(specs)
    for pair in pairs:
      changed = rule.told(pair, specs, senders, round) if rule.told else {}
      for name, spec in changed.items():
        specs[name] = spec
    return {k: v for k, v in specs.items() if v is not None}

  return one


def terms(pair: heard_lib.Pair, specs: dict, columns: int) -> Any:
  """Shapes of a matrix [K, F] of so many terms, in its smaller form."""
  a, b = specs[pair.a], specs[pair.b]
  stack, K, F = a.shape[:-2], a.shape[-2], b.shape[-1]
  shapes = [(K, columns), (columns, F)]
  if not product.pays(columns, K, F):
    shapes = [(K, F)]
  return [jax.ShapeDtypeStruct((*stack, *x), jnp.float32) for x in shapes]
