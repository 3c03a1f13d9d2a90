"""W1 and W2 on DrJAX: a round is one program, the clients one vmap.

Rush et al., DrJAX, 2024, https://arxiv.org/abs/2403.07128
"""

import argparse

import bench_models as models
import bench_workload as workload
import drjax
import jax


def main() -> None:
  """Measures one workload and prints it as one line."""
  parser = argparse.ArgumentParser()
  parser.add_argument("workload", choices=("w1", "w2"))
  parser.add_argument("--seconds", type=float, default=0.0)
  parser.add_argument("--quick", action="store_true")
  options = parser.parse_args()
  if options.workload == "w1":
    shape = workload.w1(options.quick)
    params, base = models.w1_params(shape), ()

    def loss(params, base, x, y):
      del base
      return models.w1_loss(params, x, y)

  else:
    shape = workload.w2(options.quick)
    params, base = models.w2_params(shape), models.w2_base(shape)

    def loss(params, base, x, y):
      return models.w2_loss(params, base, x, y, shape)

  def rounds(params, base, *examples):
    def train(start, x, y):
      local = start
      for step in range(x.shape[0]):
        gradients = jax.grad(loss)(local, base, x[step], y[step])
        local = models.descend(local, gradients, shape.rate)
      return jax.tree.map(lambda new, old: new - old, local, start)

    @drjax.program(placements={"clients": shape.clients})
    def mean_delta(params, *examples):
      sent = drjax.broadcast(params)
      return drjax.reduce_mean(drjax.map_fn(train, (sent, *examples)))

    delta = mean_delta(params, *examples)
    return jax.tree.map(lambda p, d: p + d, params, delta)

  one = jax.jit(rounds)
  examples = [
    jax.device_put(t.reshape(shape.clients, -1, shape.batch, *t.shape[2:]))
    for t in shape.inputs()
  ]

  def one_round():
    nonlocal params
    params = jax.block_until_ready(one(params, base, *examples))

  workload.report(
    workload.measure(one_round, shape.clients, seconds=options.seconds)
  )


if __name__ == "__main__":
  main()
