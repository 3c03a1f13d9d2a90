"""W1 and W2 on FedJAX, its `fed_avg` as its examples use it.

The jit backend: one client after another, a compiled step each. FedJAX 0.0.17
calls `jax.tree_map`, which JAX has since removed; a line puts it back.

Ro et al., FedJAX, 2021, https://arxiv.org/abs/2108.02117
"""

import argparse

import jax

jax.tree_map = jax.tree.map  # before fedjax is imported

import bench_models as models  # noqa: E402
import bench_workload as workload  # noqa: E402
import fedjax  # noqa: E402
import fedjax.algorithms.fed_avg as fed_avg  # noqa: E402


def main() -> None:
  """Measures one workload and prints it as one line."""
  parser = argparse.ArgumentParser()
  parser.add_argument("workload", choices=("w1", "w2"))
  parser.add_argument("--seconds", type=float, default=0.0)
  parser.add_argument("--quick", action="store_true")
  options = parser.parse_args()
  if options.workload == "w1":
    shape = workload.w1(options.quick)
    params, loss = models.w1_params(shape), models.w1_loss
  else:
    shape = workload.w2(options.quick)
    params, base = models.w2_params(shape), models.w2_base(shape)

    def loss(params, x, y):
      return models.w2_loss(params, base, x, y, shape)

  @jax.grad
  def gradient(params, batch, key):
    del key
    return loss(params, batch["x"], batch["y"])

  algorithm = fed_avg.federated_averaging(
    gradient,
    fedjax.optimizers.sgd(shape.rate),
    fedjax.optimizers.sgd(1.0),
    fedjax.ShuffleRepeatBatchHParams(batch_size=shape.batch, num_epochs=1),
  )
  clients = [
    (i, fedjax.ClientDataset({"x": x, "y": y}), jax.random.PRNGKey(i))
    for i, (x, y) in enumerate(zip(*shape.inputs(), strict=True))
  ]
  state = algorithm.init(params)

  def one_round():
    nonlocal state
    state, _ = algorithm.apply(state, clients)
    jax.block_until_ready(state.params)

  workload.report(
    workload.measure(one_round, shape.clients, seconds=options.seconds)
  )


if __name__ == "__main__":
  main()
