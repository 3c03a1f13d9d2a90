"""HetLoRA's clients give up ranks that shrink, and never get them back."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import fedjax_peft as fp
import toy
from fedjax_peft import peft
from fedjax_peft.rules import ranking

R, D, C, M = 4, 6, 3, 8  # ranks, width, clients, examples of each
COHORT = tuple(range(C))
KEEP = 0.7
A, B = "line/lora_a", "line/lora_b"


class Line(nnx.Module):
  """One linear layer."""

  def __init__(self):
    self.line = nnx.Linear(D, D, use_bias=False, rngs=nnx.Rngs(0))

  def __call__(self, x):
    return self.line(x)


@functools.cache
def model() -> fp.Model:
  module = peft.lora(Line(), R, "line", seed=1)
  return fp.model(module, fp.losses.regression, precision="float32")


@functools.cache
def data(rank):
  """Clients whose layer should move by a matrix of this rank."""
  rng = np.random.default_rng(rank)
  x = rng.normal(size=(C * M, D)).astype(np.float32)
  left, right = rng.normal(size=(D, rank)), rng.normal(size=(rank, D))
  kernel = np.asarray(model().origin.line.lora_base.kernel[...])
  label = x @ (kernel + left @ right / rank).astype(np.float32)
  owner = np.repeat(np.arange(C), M)
  people = fp.data.population({"x": x, "label": label}, owner, heldout=0.0)
  return people.with_traits(rank=(4, 3, 1))


@functools.cache
def player(rank, ranks):
  algorithm = fp.fedavg(
    model(),
    fp.local(optax.sgd(0.05), batch=M, steps=4),
    rule=fp.rules.hetlora(0.3, keep=KEEP, prune=True),
    ranks=ranks,
  )
  return toy.Player(algorithm, data(rank), model().base)


def rounds(play, count):
  """(ranks [count + 1, C], last state, last outcome), round by round."""
  state, outcome = play.start(), None
  seen = [state.clients.local[ranking.RANK]]
  for _ in range(count):
    state, outcome = play.play(COHORT, state=state)
    seen.append(state.clients.local[ranking.RANK])
  return np.stack([np.asarray(x) for x in seen]), state, outcome


@functools.cache
def planted(rank, ranks=False):
  return rounds(player(rank, ranks), 12)


def test_ranks_fall_where_the_task_is_of_low_rank_and_never_grow():
  seen, _, _ = planted(1)
  assert (seen[0] == R).all()
  for before, after in itertools.pairwise(seen):
    assert (after <= before).all()
  assert (seen[-1] < R).all()
  assert (seen[-1] >= 1).all()


def test_ranks_that_the_task_needs_are_kept():
  needed, _, _ = planted(D)
  spare, _, _ = planted(1)
  assert needed[-1].sum() > spare[-1].sum()


def test_every_rank_runs_in_one_program():
  seen, _, _ = planted(1)
  assert len(np.unique(seen)) > 1
  assert player(1, False).step.programs() == 1


def test_a_trait_is_the_most_that_a_client_has():
  seen, _, outcome = planted(1, ranks=True)
  assert (seen[1] <= np.array([4, 3, 1])).all()
  assert (np.diff(seen, axis=0) <= 0).all()
  assert seen[-1, 2] == 1
  np.testing.assert_allclose(outcome.record["train/rank"], seen[-1].mean())


def test_the_record_says_the_mean_of_the_ranks_that_are_left():
  seen, state, outcome = planted(1)
  np.testing.assert_allclose(outcome.record["train/rank"], seen[-1].mean())
  (top, bottom) = outcome.clients["rank"]
  order = state.clients.local[ranking.RANK]
  found = dict(
    zip(
      player(1, False).seat(COHORT).clients.ravel().tolist(),
      (top / np.maximum(bottom, 1)).ravel().tolist(),
      strict=True,
    )
  )
  assert [found[i] for i in COHORT] == order.tolist()


def test_a_rank_costs_its_columns_and_rows():
  sizes = player(1, False).algorithm.bytes
  for r in range(1, R):
    up, more = (
      sizes(C, traits={"rank": n})["cloud/up_bytes"] for n in (r, r + 1)
    )
    assert more - up == 4 * 2 * D


def tail(params, first):
  a, b = (np.asarray(params[n], np.float64) for n in (A, B))
  return np.linalg.norm(a[:, first:]) * np.linalg.norm(b[first:])


@pytest.mark.parametrize("grow", [False, True])
@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_a_client_keeps_what_its_tail_says(rank, grow):
  # A round of one step whose optimizer moves everything by a factor, so that
  # the tail is known to shrink or to grow.
  factor = 1.25 if grow else 0.75
  times = optax.stateless(
    lambda grads, params: jax.tree.map(lambda p: (factor - 1) * p, params)
  )
  job = fp.fedavg(
    model(),
    fp.local(times, batch=M),
    rule=fp.rules.hetlora(keep=KEEP, prune=True),
  ).work
  rng = np.random.default_rng(rank)
  sent = fp.Sent(
    {
      k: jnp.asarray(rng.normal(size=v.shape), jnp.float32)
      for k, v in job.params.items()
      if k != ranking.RANK
    },
    {"round": jnp.int32(0)},
  )
  examples = {k: jnp.asarray(v[:M]) for k, v in data(1).examples.items()}
  batch = fp.Batch(examples, jnp.ones(M), jax.random.key(0))
  own = {ranking.RANK: jnp.int32(rank)}
  carry = job.init(sent, model().base, own, toy.client())
  carry, stats = job.step(carry, sent, model().base, batch)
  message, rows = job.finish(carry, sent)
  new = {k: np.asarray(sent.params[k] - message[k]) for k in message}
  before = {
    A: np.asarray(sent.params[A])[:, :rank],
    B: np.asarray(sent.params[B])[:rank],
  }
  after = {k: factor * v for k, v in before.items()}
  less = max(int(KEEP * rank), 1)
  shrunk = tail(after, less) < tail(before, less)
  assert shrunk == (not grow and rank > 1)
  kept = less if shrunk else rank
  assert int(rows[ranking.RANK]) == kept
  assert float(stats["rank"][0]) == kept
  assert not new[A][:, kept:].any()
  assert not new[B][kept:].any()
  np.testing.assert_allclose(new[A][:, :kept], after[A][:, :kept], rtol=1e-5)
  np.testing.assert_allclose(new[B][:kept], after[B][:kept], rtol=1e-5)


def test_a_client_that_makes_no_step_gives_nothing_up():
  job = player(1, False).algorithm.work
  sent = fp.Sent(
    {k: jnp.asarray(v) for k, v in job.params.items() if k != ranking.RANK},
    {"round": jnp.int32(0)},
  )
  own = {ranking.RANK: jnp.int32(3)}
  carry = job.init(sent, model().base, own, toy.client())
  message, rows = job.finish(carry, sent)
  assert int(rows[ranking.RANK]) == 3
  assert not np.asarray(message[A])[:, :3].any()
