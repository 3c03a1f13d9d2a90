"""What split training costs: bytes that cross, FLOPs and memory of each side.

Bytes are those of the arrays that cross (`crossing`). FLOPs are counted from
the traced step: the device does what the gradient by its own leaves needs, the
server all the rest.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.interpreters import partial_eval

from fedjax_peft import flops as flops_lib
from fedjax_peft import objective, one_step, tree, work
from fedjax_peft.peft import adapter
from fedjax_peft.split import crossing, cutting, local, prefix

PyTree = Any
Traits = Mapping[str, float]


class Split(NamedTuple):
  """What a step asks of a device whose model is in part elsewhere.

  Attributes:
    bytes: (rows, traits) -> (up, down), bytes between device and server in one
      step on so many examples; traits {name: number} of the client.
    flops: (rows, traits) -> (device, server), of one step.
    memory: (traits) -> bytes that the device's side takes: its leaves, the
      gradients and updates of those that it trains, and what its backward pass
      reads of a batch.
    waits: whether a device waits for a server's answer in every step.
    common: whether that answer is the same for all clients at work, so that
      it can be broadcast.
    before: (traits) -> bytes of an example that cross up once in the whole
      run, before its client's first step; None: none do.
  """

  bytes: Callable[[int, Traits], tuple[int, int]]
  flops: Callable[[int, Traits], tuple[float, float]]
  memory: Callable[[Traits], int]
  waits: bool = True
  common: bool = False
  before: Callable[[Traits], int] | None = None


def measure(
  job: work.Work,
  model: objective.Model,
  examples: Mapping[str, Any],
  cut_of: Callable[[nnx.Module, Traits], cutting.Pipeline | None],
  *,
  wires_of: Callable[[Traits], Sequence[cutting.Wire]] | None = None,
  of_wires: Sequence[str] = (),
) -> Split:
  """Counts what a job's steps cost each side.

  Nothing is traced twice for numbers that it does not depend on.

  Args:
    job: what clients do.
    model: what they train.
    examples: {feature: [M, ...]}, for shapes.
    cut_of: (module, traits) -> the module as the pipeline that such a client
      is part of; None where the client computes everything.
    wires_of: (traits) -> what such a client's messages cross, in place of the
      pipeline's wires.
    of_wires: traits that nothing but `wires_of` reads.
  """
  traced = _Traced(job, model, examples, cut_of)
  batch = job.local.batch
  _, wires, kept = traced.plan({}) or ((), [cutting.PLAIN], None)
  back = [wire for wire in wires if wire.down is not None]

  def once(fun):
    """Remembers results by the traits that say what is computed."""
    kept = functools.cache(lambda key: fun(dict(key)))

    def of(traits):
      here = {k: v for k, v in traits.items() if k not in of_wires}
      return kept(tuple(sorted(here.items())))

    return of

  whole = functools.cache(
    lambda: one_step.flops_of(job, model.base, dict(examples))
  )
  sent = once(traced.sent)
  mine = once(lambda traits: traced.device_flops(traits, whole()))

  def over(traits):
    found = sent(traits)
    if found is None or wires_of is None:
      return found
    return found._replace(wires=wires_of(traits))

  def size(rows, traits):
    found = over(traits)
    return (0, 0) if found is None else crossing.in_step(found, rows)

  def products(rows, traits):
    own = mine(traits)
    return own * rows / batch, (whole() - own) * rows / batch

  return Split(
    size,
    products,
    once(lambda traits: traced.memory(batch, traits)),
    waits=bool(back),
    common=any(wire.common for wire in back),
    before=None if kept is None else lambda x: crossing.before(over(x)),
  )


class _Traced(NamedTuple):
  """A step's two sides as functions to be traced; arguments of `measure`."""

  job: work.Work
  model: objective.Model
  examples: Mapping[str, Any]
  cut_of: Callable

  @property
  def leaves(self) -> tuple[dict, dict, dict]:
    """Specs of the leaves that steps train, of the others, of the base."""
    placed, model = self.job.placement, self.model
    still = {
      k
      for k in model.params
      if k in model.mutable or placed.get(k) in ("frozen", "served")
    }
    specs = tree.spec(model.params)
    return (
      {k: v for k, v in specs.items() if k not in still},
      {k: v for k, v in specs.items() if k in still},
      tree.spec(model.base),
    )

  def rows(self, count: int) -> dict:
    """Specs of so many examples."""
    return {
      k: jax.ShapeDtypeStruct((count, *v.shape[1:]), v.dtype)
      for k, v in self.examples.items()
    }

  def cut(self, traits, weights, still, base) -> Any:
    """The pipeline, or None, of traced leaves."""
    return self.cut_of(self.model.module({**still, **weights}, base), traits)

  def plan(self, traits) -> tuple[tuple, tuple, Any] | None:
    """Names of the parts, wires, and that of messages which crossed before.

    None where nothing is cut.
    """
    found: list = []

    def run(*leaves):
      pipe = self.cut(traits, *leaves)
      found.append(pipe and (pipe.names, pipe.wires, prefix.crossed(pipe)))

    jax.eval_shape(run, *self.leaves)
    return found[0]

  def journey(self, rows, traits) -> list:
    """Specs of the messages before each wire, and behind the last."""

    def run(weights, still, base, examples):
      pipe = self.cut(traits, weights, still, base)
      message, found = pipe.parts()[0](**_features(examples)), []
      for i, wire in enumerate(pipe.wires):
        message = pipe.parts()[i](message) if i else message
        found.append(message)
        message = cutting.cross(wire, message, jax.random.key(0))
      return [*found, message]

    return jax.eval_shape(run, *self.leaves, self.rows(rows))

  def sent(self, traits) -> crossing.Crossing | None:
    """What crosses in a step; None where nothing is cut."""
    plan = self.plan(traits)
    if plan is None:
      return None
    names, wires, before = plan
    messages = self.journey(self.job.local.batch, traits)
    at_home = cutting.is_at_home(names[-1])
    told = [] if at_home else self.told(traits, messages[-1])
    if before is not None:
      wires = (before, *wires[1:])
    return crossing.Crossing(names, wires, messages, told, before is not None)

  def told(self, traits, message) -> list:
    """Specs of the examples that the loss reads where no data are."""
    names = list(self.examples)

    def run(leaves, message, *values):
      seen = cutting.behind(self.cut(traits, *leaves), message)
      batch = dict(zip(names, values, strict=True))
      return self.model.loss_fn(seen, batch, jax.random.key(0))[0]

    rows = self.rows(self.job.local.batch)
    values = [rows[name] for name in names]
    closed = jax.make_jaxpr(run)(self.leaves, message, *values)
    results = [True] * len(closed.jaxpr.outvars)
    _, used = partial_eval.dce_jaxpr(closed.jaxpr, results)
    read = used[len(used) - len(names) :]
    return [v for v, u in zip(values, read, strict=True) if u]

  def device_flops(self, traits, total: int) -> int:
    """FLOPs of the device in a step on a whole batch."""
    plan = self.plan(traits)
    if plan is None:
      return total
    names, wires, _ = plan
    rows = self.rows(self.job.local.batch)
    messages = self.journey(self.job.local.batch, traits)
    learns = wires[0].down is not None or hasattr(
      self.model.origin, cutting.HEAD
    )

    def front(weights, still, base, examples):
      run = functools.partial(self.front, traits, still, base, examples)
      out, back = jax.vjp(run, weights)
      return out, back(jax.tree.map(jnp.ones_like, out)) if learns else ()

    mine = flops_lib.count(front, *self.leaves, rows)
    if not cutting.is_at_home(names[-1]):
      return mine
    floats, rest = cutting.divide(messages[-1])

    def home(weights, still, base, examples, floats, rest):
      def loss(weights, floats):
        pipe = self.cut(traits, weights, still, base)
        seen = cutting.behind(pipe, {**floats, **rest})
        each, _ = self.model.loss_fn(seen, examples, jax.random.key(0))
        return each.sum()

      return jax.grad(loss, (0, 1))(weights, floats)

    return mine + flops_lib.count(home, *self.leaves, rows, floats, rest)

  def front(self, traits, still, base, examples, weights):
    """The floats that the device's side makes of the data."""
    pipe = self.cut(traits, weights, still, base)
    if pipe is None:
      params, key = {**still, **weights}, jax.random.key(0)
      return {"loss": self.model.loss(params, base, examples, key)[0]}
    message = pipe.parts()[0](**_features(examples))
    made, _ = cutting.divide(message)
    if hasattr(pipe, cutting.HEAD):
      made["guess"] = local.guess(pipe, message)
    return made

  def memory(self, rows, traits) -> int:
    """Bytes that the device needs; see `Split`."""
    weights, still, base = self.leaves

    def held(*leaves):
      pipe = self.cut(traits, *leaves)
      if pipe is None:
        whole = self.model.module({**leaves[0], **leaves[1]}, leaves[2])
        return _leaves([("", whole)], weights)
      named = zip(pipe.names, pipe.parts(), strict=True)
      mine = [(f"{k}/", v) for k, v in named if cutting.is_at_home(k)]
      return _leaves(mine, weights)

    trained, frozen = jax.eval_shape(held, weights, still, base)

    def residuals(count):
      def run(weights, still, base, examples):
        front = functools.partial(self.front, traits, still, base, examples)
        return jax.vjp(front, weights)[1]

      kept = jax.eval_shape(run, *self.leaves, self.rows(count))
      return tree.nbytes([x for x in jax.tree.leaves(kept) if not _is_key(x)])

    # What does not grow with the batch are leaves, which are counted above.
    read = residuals(2 * rows) - residuals(rows)
    return tree.nbytes(frozen) + 3 * tree.nbytes(trained) + read


def _leaves(parts, trained):
  """(values that train, others) of parts by the prefix of their names.

  A part of a pipeline is called by its name, one of a model that is cut in
  passing is not.
  """
  found: tuple[list, list] = [], []
  for front, part in parts:
    _, state = nnx.split(part, graph=True)
    for path, leaf in nnx.to_flat_state(state):
      name = adapter.join(path)
      if isinstance(leaf, nnx.RngState):
        continue
      value = leaf.get_raw_value() if isinstance(leaf, nnx.Variable) else leaf
      still = name not in trained and front + name not in trained
      found[still].append(value)
  return found


def _features(examples):
  """All entries but the label."""
  return {k: v for k, v in examples.items() if k != "label"}


def _is_key(x) -> bool:
  """Whether a spec is that of a random key."""
  return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
