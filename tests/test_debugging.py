"""The debug mode: one client after another, until one fails."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_peft as fp
import toy
from fedjax_peft import debugging

DATA = toy.people()
DEBUG = toy.lanes("debug")


def test_debugging_computes_what_a_round_computes(tol):
  how = fp.local(optax.sgd(0.1), batch=4)
  algorithm = fp.fedavg(
    toy.net(), how, placement={"head/.*": "device"}, lowrank=False
  )
  player = toy.Player(algorithm, DATA, toy.net().base, DEBUG)
  state, outcome = player.play((0, 4, 2))
  params = {k: np.asarray(v) for k, v in toy.net().params.items()}
  eps = tol(jnp.float32, 7 * 4)
  new = {c: toy.train(params, DATA, c, how, 0.1) for c in (0, 4, 2)}
  for client, own in new.items():
    np.testing.assert_allclose(
      state.clients.local["head/kernel"][client],
      own["head/kernel"],
      atol=eps,
    )
  wanted = toy.mean(new, DATA)["up/kernel"]
  np.testing.assert_allclose(state.params["up/kernel"], wanted, atol=eps)
  assert outcome.record["train/examples"] == 9


def test_debugging_sums_integers_to_the_bits_of_a_compiled_round():
  link = fp.chain(fp.clip(1.0), fp.weigh(max_weight=8), fp.fixed_point())
  job = toy.voices()._replace(placement={"noise": "cloud", "sum": "edge"})
  tiers = [fp.tier("edge", 2, link=link), fp.tier("cloud")]
  algorithm = fp.federated(job, tiers)
  slow, _ = toy.Player(algorithm, DATA, settings=DEBUG).play((0, 5, 3, 2))
  fast, _ = toy.Player(algorithm, DATA).play((0, 5, 3, 2))
  # Sums of features are exact; drawing noise is not the same bits eagerly.
  eps = 1e-6
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=eps),
    slow.nodes[0].params,
    fast.nodes[0].params,
  )


def failing(stage):
  """A job that breaks eagerly, in one stage, on large features."""

  def broken(value):
    traced = isinstance(value, jax.core.Tracer)
    if not traced and float(jnp.max(value)) > 1e6:
      raise FloatingPointError("a feature is out of range")

  job = toy.voices()

  def step(carry, sent, base, batch):
    if stage == "step 1":
      broken(batch.examples["x"])
    return job.step(carry, sent, base, batch)

  def finish(carry, sent):
    if stage == "finish":
      broken(carry["sum"])
    return job.finish(carry, sent)

  return fp.federated(
    job._replace(step=step, finish=finish), [fp.tier("cloud")]
  )


@pytest.mark.parametrize(
  ("stage", "shapes"),
  [("step 1", r"float32\[4, 5\]"), ("finish", r"float32\[5\]|Sent")],
)
def test_an_error_names_client_round_stage_and_shapes(stage, shapes):
  features = np.array(DATA.examples["x"])
  # Client 6 has 7 examples and two batches; only its second has this row.
  order = fp.data.Ragged.of([DATA.train[6]])
  del order
  last = second_batch(6)[0]
  features[last] = 1e7
  player = toy.Player(failing(stage), DATA, settings=DEBUG).over(x=features)
  with pytest.raises(debugging.ClientError, match=shapes) as error:
    player.play((3, 6))
  for word in ("client 6", "round 0", f"stage {stage}", "out of range"):
    assert word in str(error.value)
  assert isinstance(error.value.__cause__, FloatingPointError)


def second_batch(client):
  """Rows of a client's second batch in round 0 of seed 0."""
  from fedjax_peft.data import schedule

  plan = schedule.batches(DATA.train, np.array([client]), batch=4)
  return plan.rows[1][plan.rows[1] >= 0]


def test_a_message_that_is_not_finite_is_an_error_here():
  features = np.array(DATA.examples["x"])
  features[DATA.train[6][0]] = np.inf
  algorithm = fp.federated(toy.voices(), [fp.tier("cloud")])
  player = toy.Player(algorithm, DATA, settings=DEBUG).over(x=features)
  with pytest.raises(debugging.ClientError, match="client 6 .* not finite"):
    player.play((3, 6))
