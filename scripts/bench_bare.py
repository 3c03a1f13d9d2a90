"""Bare loops: the fastest rounds we know how to write by hand, as a yardstick.

No sampling, no schedule, no links, no records: clients in chunks of a few
lanes, one stream a core, and the running sum of what they changed. What a
library loses to these is the price of its generality.

python scripts/bench_bare.py w2 --precision bf16   # from bench_engine.py, which
                                                   # sets the environment
"""

import argparse
import functools

import bench_models as models
import bench_workload as workload
import jax
import jax.numpy as jnp


def main() -> None:
  """Measures one bare loop and prints it as one line."""
  parser = argparse.ArgumentParser()
  parser.add_argument("loop", choices=("w1_general", "w1_lowrank", "w2"))
  parser.add_argument("--precision", default="bf16")
  parser.add_argument("--lanes", type=int)
  parser.add_argument("--seconds", type=float, default=0.0)
  parser.add_argument("--quick", action="store_true")
  options = parser.parse_args()
  if options.loop == "w2":
    shape, lanes = workload.w2(options.quick), options.lanes or 4
    base = w2_base(models.w2_base(shape), options.precision)
    params, inputs = models.w2_params(shape), shape.inputs()
    chunk = functools.partial(w2_chunk, shape=shape)
  else:
    shape = workload.w1(options.quick)
    general = options.loop == "w1_general"
    lanes = options.lanes or (4 if general else 10)
    base, params, inputs = (), models.w1_params(shape), shape.inputs()
    chunk = functools.partial(
      w1_chunk if general else w1_lowrank_chunk, shape=shape
    )
  lanes = min(lanes, max(shape.clients // len(jax.devices()), 1))
  result = loop(
    chunk, params, base, inputs, shape.batch, lanes, options.seconds
  )
  workload.report({**result, "lanes": lanes, "streams": len(jax.devices())})


def loop(chunk, params, base, inputs, batch, lanes, seconds) -> dict:
  """Measures rounds of `chunk` over all clients.

  Args:
    chunk: (params, base, x [K, S, B, ...], y [K, S, B]) -> sum over the K
      clients of new - params.
    params: what is trained.
    base: what is frozen; an argument, as in any program that may change it.
    inputs: [C, N, ...] each.
    batch: B.
    lanes: K, clients at once on a stream.
    seconds: see `workload.measure`.
  """
  clients = inputs[0].shape[0]
  devices = jax.devices()[:clients]
  here = clients - clients % (len(devices) * lanes)
  mesh = jax.make_mesh(
    (len(devices),), ("d",), axis_types=(jax.sharding.AxisType.Auto,)
  )
  spec = jax.sharding.PartitionSpec
  whole, split = spec(), spec("d")

  def stream(params, base, *inputs):
    chunks = [t.reshape(-1, lanes, *t.shape[1:]) for t in inputs]

    def step(total, part):
      return jax.tree.map(jnp.add, total, chunk(params, base, *part)), None

    zeros = jax.tree.map(jnp.zeros_like, params)
    total = jax.lax.psum(jax.lax.scan(step, zeros, chunks)[0], "d")
    return jax.tree.map(lambda p, t: p + t / here, params, total)

  one_round = jax.jit(
    jax.shard_map(
      stream,
      mesh=mesh,
      in_specs=(whole, whole, split, split),
      out_specs=whole,
      check_vma=False,
    )
  )

  def put(value, where):
    return jax.device_put(value, jax.sharding.NamedSharding(mesh, where))

  params, base = put((params, base), whole)
  inputs = [
    put(t[:here].reshape(here, -1, batch, *t.shape[2:]), split) for t in inputs
  ]

  def run():
    nonlocal params
    params = jax.block_until_ready(one_round(params, base, *inputs))

  return workload.measure(run, here, seconds=seconds)


def changed(params, local) -> dict:
  """Sum over the lanes of what the clients changed."""

  def total(new, old):  # lane by lane: sum(0) is forty times slower on a CPU
    return functools.reduce(jnp.add, [lane - old for lane in new])

  return jax.tree.map(total, local, params)


def w1_chunk(params, base, x, y, shape) -> dict:
  """W1 as it stands: every lane owns a copy of the weights."""
  del base

  def local(x, y):
    own = params
    for step in range(x.shape[0]):
      gradients = jax.grad(models.w1_loss)(own, x[step], y[step])
      own = models.descend(own, gradients, shape.rate)
    return own

  return changed(params, jax.vmap(local)(x, y))


def w1_lowrank_chunk(params, base, x, y, shape) -> dict:
  """W1 without copies: after t steps of SGD a weight is w - rate * sum a^T g.

  With a the inputs and g the output gradients of the steps so far, x @ w_t is
  x @ w - rate * (x @ a^T) @ g: one product with the weights that all share,
  and small ones with what the client has seen. Exact but for rounding.
  """
  del base
  hidden, output = params["hidden"], params["output"]
  rate, steps = shape.rate, x.shape[1]
  seen = {"x": [], "dz": [], "h": [], "dy": []}  # of the steps so far

  def past(name):
    return jnp.concatenate(seen[name], 1)

  def moved(new, old, gradient, bias):  # what the steps changed in a product
    gram = jnp.einsum("kid,kjd->kij", new, old)
    # A bias is the weight of a feature that is always 1.
    return -rate * jnp.einsum("kij,kjf->kif", gram + bias, gradient)

  def shared(t, kernel):  # one product for all clients
    return (t.reshape(-1, t.shape[-1]) @ kernel).reshape(*t.shape[:-1], -1)

  at_start = shared(x, hidden["kernel"]) + hidden["bias"]  # [K, S, B, hidden]
  for step in range(steps):
    z = at_start[:, step]
    if step:
      z += moved(x[:, step], past("x"), past("dz"), 1)
    h = jax.nn.relu(z)
    logits = shared(h, output["kernel"]) + output["bias"]
    if step:
      logits += moved(h, past("h"), past("dy"), 1)
    labels = jax.nn.one_hot(y[:, step], shape.classes)
    dy = (jax.nn.softmax(logits) - labels) / shape.batch
    dh = shared(dy, output["kernel"].T)
    if step:
      dh += moved(dy, past("dy"), past("h"), 0)
    new = {"x": x[:, step], "dz": jnp.where(z > 0, dh, 0), "h": h, "dy": dy}
    for name, value in new.items():
      seen[name].append(value)

  def total(inputs, gradients):
    inputs, gradients = past(inputs), past(gradients)
    rows = inputs.reshape(-1, inputs.shape[-1])
    columns = gradients.reshape(-1, gradients.shape[-1])
    kernel = -rate * (columns.T @ rows).T
    return {"kernel": kernel, "bias": -rate * columns.sum(0)}

  return {"hidden": total("x", "dz"), "output": total("h", "dy")}


def w2_base(base: dict, precision: str) -> dict:
  """Frozen weights as the products want them.

  "bf16" stores kernels and their transposes in bfloat16, since on CPUs
  x @ kernel.T with a transposition inside is several times slower.
  """
  if precision == "float32":
    return base

  def low(layer):
    if "kernel" not in layer:
      return layer
    kernel = layer["kernel"].astype(jnp.bfloat16)
    return {**layer, "kernel": kernel, "kernel_t": jnp.array(kernel.T)}

  blocks = [
    {name: low(layer) for name, layer in block.items()}
    for block in base["blocks"]
  ]
  return {**base, "blocks": blocks}


def w2_chunk(params, base, tokens, label, shape) -> dict:
  """W2: lanes share the frozen weights, each has its adapters and head."""

  def local(tokens, label):
    own = params
    for step in range(tokens.shape[0]):
      gradients = jax.grad(models.w2_loss)(
        own,
        base,
        tokens[step],
        label[step],
        shape,
        dense=frozen_dense,
        side=adapters,
        barrier=barrier,
      )
      own = models.descend(own, gradients, shape.rate)
    return own

  return changed(params, jax.vmap(local)(tokens, label))


@jax.custom_vjp
def product(x: jax.Array, w: jax.Array, w_t: jax.Array | None) -> jax.Array:
  """Is x @ w in the precision of w, summed in float32; w has no gradient."""
  return jnp.dot(x.astype(w.dtype), w, preferred_element_type=jnp.float32)


def _product_backward(kernels, g):
  """The gradient of x alone."""
  w, w_t = kernels
  return product(g, w.T if w_t is None else w_t, None), None, None


product.defvjp(
  lambda x, w, w_t: (product(x, w, w_t), (w, w_t)), _product_backward
)


def frozen_dense(x: jax.Array, layer: dict) -> jax.Array:
  """A frozen layer."""
  return product(x, layer["kernel"], layer.get("kernel_t")) + layer["bias"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def adapters(x: jax.Array, params: dict, scale: float) -> tuple:
  """Both adapters of a block, with one narrow product for the two."""
  return _adapters_forward(x, params, scale)[0]


def _adapters_forward(x, params, scale):
  """Forward rule: keeps x and the narrow product."""
  query, value = params["query"], params["value"]
  narrow = x @ jnp.concatenate([query["a"], value["a"]], 1) * scale
  rank = query["a"].shape[1]
  out = narrow[..., :rank] @ query["b"], narrow[..., rank:] @ value["b"]
  return out, (x, params, narrow)


def _adapters_backward(scale, kept, g):
  """Backward rule: the gradient of A is computed as [R, D], the fast form."""
  x, params, narrow = kept
  query, value = params["query"], params["value"]
  rank = query["a"].shape[1]
  d = [g[0] @ query["b"].T, g[1] @ value["b"].T]
  d = jnp.concatenate(d, -1) * scale  # [B, T, 2 R]
  dx = d @ jnp.concatenate([query["a"], value["a"]], 1).T

  def rows(t):
    return t.reshape(-1, t.shape[-1])

  da = (rows(d).T @ rows(x)).T
  low = rows(narrow)
  return dx, {
    "query": {"a": da[:, :rank], "b": low[:, :rank].T @ rows(g[0])},
    "value": {"a": da[:, rank:], "b": low[:, rank:].T @ rows(g[1])},
  }


adapters.defvjp(_adapters_forward, _adapters_backward)


@jax.custom_vjp
def barrier(x: jax.Array) -> jax.Array:
  """Keeps XLA from computing the residual stream again in every fusion.

  On CPUs it holds only with --xla_disable_hlo_passes=cse_barrier_expander.
  """
  return jax.lax.optimization_barrier(x)


barrier.defvjp(
  lambda x: (jax.lax.optimization_barrier(x), None),
  lambda _, g: (jax.lax.optimization_barrier(g),),
)


if __name__ == "__main__":
  main()
