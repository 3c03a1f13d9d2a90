"""Low-rank local SGD: many clients, no client with weights of its own.

A plain SGD step on a Linear layer moves its kernel by -rate x^T g. So after
some steps from the shared kernel W a client computes

  x W' = x W - rate (x X^T) G,

X and G being the inputs and output gradients of its past steps: the large
product is with the SHARED kernel, for all clients at once, and what is the
client's own are small Gram matrices. Its delta is rate X^T G, sent as factors;
the weighted sum over clients is one matrix product. This is exact in real
arithmetic, and no client ever holds a kernel.

It needs plain SGD, layers that see one row an example, and links that leave
factors alone; `why_not` says what is missing.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from fedjax_peft import hierarchy, link, objective, peft, placement, tree, work
from fedjax_peft.peft import adapter

# A call takes all steps of a client at once if so much of it is work.
_FULL = 0.8


class _Tape(nnx.Variable):
  """What a shared layer reads of the past and leaves for its gradient."""


class SharedLinear(nnx.Module):
  """A Linear layer on shared weights and a client's past steps.

  Attributes:
    kernel: [K, F], shared; never differentiated.
    bias: [F] or None, likewise.
    past_x: [P, K] inputs of past steps, zeros where there was none; the
      number of steps P may change from call to call.
    past_g: [P, F] rate times the gradients of its outputs.
    probe: [B, F] zeros, whose gradient is that of the output.
    seen: [B, K] the input of this step.
  """

  def __init__(self, layer: nnx.Linear, batch: int, bias_moves: bool):
    self.kernel = layer.kernel
    self.bias = nnx.data(layer.bias)
    self.bias_moves = bias_moves
    K, F = layer.in_features, layer.out_features
    self.past_x = _Tape(jnp.zeros((0, K)))
    self.past_g = _Tape(jnp.zeros((0, F)))
    self.probe = _Tape(jnp.zeros((batch, F)))
    self.seen = _Tape(jnp.zeros((batch, K)))

  def __call__(self, x, out_sharding=None):
    """X [B, K] through the layer as it is after the past steps."""
    self.seen[...] = jax.lax.stop_gradient(x)
    kernel = jax.lax.stop_gradient(self.kernel[...])
    past_x, past_g = self.past_x[...], self.past_g[...]
    y = x @ kernel + self.probe[...]
    if past_x.shape[0]:
      # A bias is a feature that is always one.
      gram = x @ past_x.T + (1.0 if self.bias_moves else 0.0)
      y = y - gram @ past_g
    return y if self.bias is None else y + self.bias[...][None]


def plain_rate(optimizer: optax.GradientTransformation) -> jax.Array | None:
  """Learning rate of an optimizer that is plain SGD, else None.

  Judged by its behaviour: no state, and updates that are one and the same
  multiple of the gradient whatever its size, sign, leaf and parameter.
  """
  rng = np.random.default_rng(0)
  shapes = {"a": (3, 2), "b": (5,)}
  params = {k: jnp.asarray(rng.normal(size=s)) for k, s in shapes.items()}
  if jax.tree.leaves(optimizer.init(params)):
    return None
  ratios = []
  for size in (1e-6, 1.0, 1e6):
    grads = {
      k: jnp.asarray(size * rng.normal(size=s)) for k, s in shapes.items()
    }
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    ratios += [np.ravel(-updates[k] / grads[k]) for k in shapes]
  ratio = np.concatenate(ratios)
  if not np.allclose(ratio, ratio[0], rtol=1e-4):
    return None
  return ratio[0]


def why_not(
  job: work.Work,
  model: objective.Model,
  tiers: tuple[hierarchy.Tier, ...],
  examples: dict,
  steps: int,
) -> str:
  """Why low-rank local SGD does not apply, in one sentence; '' if it does.

  Args:
    job: general work of `work.train`.
    model: what it trains.
    tiers: the receivers.
    examples: {feature: [M, ...]}.
    steps: most batches of a client in a round.
  """
  low = tiers[0]
  blocking = [p.name for p in link.parts_of(low.link) if not p.factored]
  labels = set(job.placement.values()) - {placement.FROZEN}
  if blocking:
    return f"link '{blocking[0]}' needs whole matrices"
  if not low.reduce.linear or low.reduce.name != "sum":
    return f"reduction '{low.reduce.name}' needs whole matrices"
  if placement.DEVICE in labels or model.mutable:
    return "some leaves live on the device or change in the forward pass"
  try:
    rate = plain_rate(job.local.optimizer(jnp.int32(0)))
  except Exception as error:  # an optimizer that insists on its own params
    return f"the optimizer could not be probed ({error})"
  if rate is None:
    return "the local optimizer is not plain SGD"
  layers = _layers(model.origin, job.placement)
  inside = {f"{name}/{leaf}" for name in layers for leaf in ("kernel", "bias")}
  trained = {k for k, v in job.placement.items() if v != placement.FROZEN}
  outside = sorted(trained - inside)
  if outside:
    return f"'{outside[0]}' is trained and is not part of a Linear layer"
  rows = steps * job.local.batch
  for name, layer in layers.items():
    K, F = layer.in_features, layer.out_features
    if rows * (K + F) > K * F:
      return (
        f"{rows} rows a client make factors larger than kernel '{name}' "
        f"[{K}, {F}]"
      )
  return _calls(model, layers, examples, job.local.batch)


def train(
  model: objective.Model,
  how: work.Local,
  general: work.Work,
  steps: np.ndarray,
) -> work.Work:
  """The same work as `work.train`, on shared weights.

  Args:
    model: what is trained.
    how: plain SGD, and the batches.
    general: the work it stands for.
    steps: int [N], batches of each client in a round.

  Returns:
    A Work whose message holds `tree.Factored` kernels. A call of its step
    takes a whole client where that wastes little, else one batch.
  """
  layers = _layers(model.origin, general.placement)
  batch, most = how.batch, int(steps.max())
  # An empty batch has no gradient, so it changes nothing under plain SGD.
  stride = most if np.mean(steps[steps > 0]) >= _FULL * most else 1
  ticks, rows = most // stride, stride * batch
  moving = {k for k, v in general.placement.items() if v != placement.FROZEN}
  shared = _share(model.origin, set(layers), moving, batch)
  split = peft.split(shared)

  def init(sent, base, local, client):
    history = {
      name: (
        jnp.zeros((ticks, rows, layer.in_features)),
        jnp.zeros((ticks, rows, layer.out_features)),
      )
      for name, layer in layers.items()
    }
    return history, jnp.int32(0)

  def step(carry, sent, base, batch_):
    history, number = carry
    rate = plain_rate_at(how, sent.extras["round"])
    params = {k: sent.params[k] for k in split.params}
    # What this client did in earlier ticks; then, step by step, in this one.
    past = {
      name: tuple([t[:-1].reshape(-1, t.shape[-1])] for t in both)
      for name, both in history.items()
    }

    def one(mask, examples, key):
      tape = {}
      for name, (x, g) in past.items():
        tape[f"{name}/past_x"] = jnp.concatenate(x)
        tape[f"{name}/past_g"] = jnp.concatenate(g)
        tape[f"{name}/probe"] = jnp.zeros((batch, g[0].shape[-1]))
        tape[f"{name}/seen"] = jnp.zeros((batch, x[0].shape[-1]))

      def mean_loss(probes):
        rng = objective.reseed(split.rng, key)
        module = peft.merge(split.graph, params, rng, tape | probes, split.base)
        each, metrics = model.loss_fn(module, examples, key)
        total, count = work.masked_sum(mask, each), mask.sum()
        left = peft.split(module).mutable
        seen = {name: left[f"{name}/seen"] for name in layers}
        return total / jnp.maximum(count, 1), (total, count, metrics, seen)

      probes = {k: v for k, v in tape.items() if k.endswith("/probe")}
      grads, (total, count, metrics, seen) = jax.grad(mean_loss, has_aux=True)(
        probes
      )
      for name, (x, g) in past.items():
        x.append(seen[name])
        g.append(rate * grads[f"{name}/probe"])
      return {"loss": (total, count), **work.masked_metrics(mask, metrics)}

    keys = batch_.key if stride > 1 else batch_.key[None]
    stats = []
    for i in range(stride):
      here = slice(i * batch, (i + 1) * batch)
      examples = {k: v[here] for k, v in batch_.examples.items()}
      stats.append(one(batch_.mask[here], examples, keys[i]))
    # A select, since under vmap each lane is at a tick of its own, and a
    # scatter would be slower than one pass over the history.
    now = (jnp.arange(ticks) == number)[:, None, None]
    history = {
      name: tuple(
        jnp.where(now, jnp.concatenate(new[1:])[None], old)
        for new, old in zip(past[name], both, strict=True)
      )
      for name, both in history.items()
    }
    return (history, number + 1), jax.tree.map(lambda *x: sum(x), *stats)

  def finish(carry, sent):
    message = {}
    for name, (x, g) in carry[0].items():
      left, right = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
      message[f"{name}/kernel"] = tree.Factored(left, right)
      if f"{name}/bias" in moving:
        message[f"{name}/bias"] = right.sum(0)
    return message, {}

  return general._replace(init=init, step=step, finish=finish, stride=stride)


def plain_rate_at(how: work.Local, round_: jax.Array) -> jax.Array:
  """The learning rate of plain SGD in a round, traced."""
  one = {"a": jnp.ones(())}
  optimizer = how.optimizer(round_)
  return -optimizer.update(one, optimizer.init(one), one)[0]["a"]


def steps_of(how: work.Local, sizes: np.ndarray) -> np.ndarray:
  """Int [N], batches that clients of these sizes make in a round."""
  if how.steps is not None:
    return np.where(sizes > 0, how.steps, 0)
  return how.epochs * -(-sizes // how.batch)


def _layers(module: nnx.Module, labels: dict) -> dict[str, nnx.Linear]:
  """The Linear layers that are trained, by name."""
  return {
    names[0]: node
    for node, names in adapter.find(module, nnx.Linear).values()
    if labels.get(f"{names[0]}/kernel", placement.FROZEN) != placement.FROZEN
    and type(node) is nnx.Linear
    and node.kernel.ndim == 2
  }


def _share(module, names, moving, batch):
  """A clone whose named layers are `SharedLinear`s."""

  def one(path, node):
    name = adapter.join(path)
    if type(node) is nnx.Linear and name in names:
      return SharedLinear(node, batch, f"{name}/bias" in moving)
    return node

  return adapter.replace(module, one)


def _calls(model, layers, examples, batch) -> str:
  """Looks at one abstract forward pass: every layer once, on [B, K]."""
  seen: dict[str, list] = {}

  class Watch(nnx.Module):
    """Notes the shapes its layer is called with."""

    def __init__(self, name, layer):
      self.name, self.layer = name, layer

    def __call__(self, x, *rest):
      seen.setdefault(self.name, []).append(jnp.shape(x))
      return self.layer(x, *rest)

  def one(path, node):
    name = adapter.join(path)
    return Watch(name, node) if name in layers else node

  watched = adapter.replace(model.origin, one)
  rows = {
    k: jax.ShapeDtypeStruct((batch, *v.shape[1:]), v.dtype)
    for k, v in examples.items()
  }
  graph, state = nnx.split(watched)
  key = jax.eval_shape(lambda: jax.random.key(0))
  jax.eval_shape(
    lambda state, rows, key: model.loss_fn(nnx.merge(graph, state), rows, key)[
      0
    ],
    state,
    rows,
    key,
  )
  for name in layers:
    shapes = seen.get(name, [])
    if len(shapes) != 1:
      return f"layer '{name}' is called {len(shapes)} times in a forward pass"
    if len(shapes[0]) != 2:
      return f"layer '{name}' sees more than one row an example"
  return ""
