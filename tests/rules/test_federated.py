"""Rules in whole rounds: small models, real clients, counted bytes."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import fedjax_peft as fp
import toy
from fedjax_peft import peft, tree
from tolerance import tol

R = 2
RULES = {name: make() for name, make in fp.rules.RULES.items()}
NEAR = 50 * tol(jnp.float32, 64)  # several steps of training in between
COHORT = (0, 3, 5, 7, 9)
RANKS = (1, 2, 2, 1, 2, 1, 2, 2, 1, 2)


def some(quick):
  """Every rule; those that are not named are for `make test-slow`."""
  slow = pytest.mark.slow
  return [n if n in quick else pytest.param(n, marks=slow) for n in RULES]


@functools.cache
def model(residual=True) -> fp.Model:
  net = peft.lora(toy.Net(nnx.Rngs(0)), R, "up|head", residual=residual, seed=1)
  return fp.model(net, fp.losses.classification, precision="float32")


@functools.cache
def player(name: str, ranks=False, watch=False, **settings) -> toy.Player:
  algorithm = fp.fedavg(
    model(),
    fp.local(optax.sgd(0.1), batch=4),
    rule=RULES[name],
    ranks=ranks,
    watch=watch,
  )
  data = toy.people().with_traits(rank=RANKS)
  here = toy.lanes(**settings) if settings else None
  return toy.Player(algorithm, data, model().base, here)


def clients_of(name, state, ids, number, ranks=False) -> list[dict]:
  """What each client holds at the end of its round, in a plain loop."""
  job = player(name, ranks).algorithm.work
  sent = fp.Sent(
    {k: jnp.asarray(v) for k, v in state.params.items()},
    {"round": jnp.int32(number)},
  )
  owned = {k for k, v in job.placement.items() if v == "device"}
  found = []
  for i in ids:
    local = {k: jnp.asarray(state.clients.local[k][i]) for k in owned}
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), number), i)
    client = fp.Client(
      key, jnp.int32(i), jnp.int32(toy.SIZES[i]), {"rank": jnp.int32(RANKS[i])}
    )
    params, base = model().fold(sent.params, model().base)
    carry = job.init(sent._replace(params=params), base, local, client)
    plan = toy.schedule.batches(
      toy.people().train, np.array([i]), batch=4, epochs=1, seed=(0, number)
    )
    for n, rows in enumerate(plan.rows):
      rows = np.where(rows < 0, rows[0], rows), rows >= 0
      examples = {k: v[rows[0]] for k, v in toy.people().examples.items()}
      batch = fp.Batch(
        examples, jnp.asarray(rows[1], jnp.float32), jax.random.fold_in(key, n)
      )
      carry, _ = job.step(carry, sent._replace(params=params), base, batch)
    message, _ = job.finish(carry, sent)
    new = {k: sent.params[k] - message[k] for k in message}
    found.append({k: np.asarray(v) for k, v in (sent.params | new).items()})
  return found


def added(params) -> dict:
  """What is added to each kernel, float64."""
  total = {}
  for pair in fp.rules.pairs_of(model().origin):
    a, b, c = (
      np.asarray(params[n], np.float64) for n in (pair.a, pair.b, pair.residual)
    )
    total[pair.layer] = pair.scale * a @ b + c
  return total


@pytest.mark.parametrize("name", [n for n, rule in RULES.items() if rule.exact])
def test_exact_rounds_end_where_the_mean_of_the_clients_models_is(name):
  state = player(name).play(COHORT)[0]  # from where B is no longer zero
  new = player(name).play(COHORT, state=state)[0]
  weights = np.array([toy.SIZES[i] for i in COHORT], np.float64)
  mine = [added(p) for p in clients_of(name, state, COHORT, 1)]
  for layer, found in added(new.params).items():
    wanted = sum(w * m[layer] for w, m in zip(weights, mine, strict=True))
    wanted = wanted / weights.sum()
    np.testing.assert_allclose(found, wanted, atol=NEAR)


@pytest.mark.parametrize("name", RULES)
def test_the_base_stays_as_it_is_and_the_loss_falls(name):
  before = jax.tree.map(np.array, model().base)
  play = player(name)
  state, first = play.play(COHORT)
  for _ in range(4):
    state, last = play.play(COHORT, state=state)
  assert toy.same_bits(before, jax.device_get(model().base))
  assert last.record["train/loss"] < first.record["train/loss"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flora", "fedex", "fedrot"])
@pytest.mark.parametrize("executor", ["debug", "stream"])
def test_every_executor_gives_the_same(name, executor):
  state, _ = player(name).play(COHORT, COHORT)
  other, _ = player(name, executor=executor).play(COHORT, COHORT)
  for a, b in zip(
    jax.tree.leaves(state.params), jax.tree.leaves(other.params), strict=True
  ):
    np.testing.assert_allclose(a, b, atol=NEAR)


@pytest.mark.parametrize("name", ["flora", "fedex", "hetlora"])
def test_two_devices_give_what_one_does(name):
  state, _ = player(name).play(COHORT, COHORT)
  other, _ = player(name, devices=2).play(COHORT, COHORT)
  for a, b in zip(
    jax.tree.leaves(state.params), jax.tree.leaves(other.params), strict=True
  ):
    np.testing.assert_allclose(a, b, atol=NEAR)


@pytest.mark.parametrize(
  "name", [n for n, rule in RULES.items() if rule.heterogeneous_rank]
)
def test_a_client_of_rank_one_trains_one_column_only(name):
  play = player(name, ranks=True)
  state, _ = play.play(COHORT)
  for i, params in zip(
    COHORT, clients_of(name, state, COHORT, 1, ranks=True), strict=True
  ):
    for pair in fp.rules.pairs_of(model().origin):
      assert not params[pair.a][:, RANKS[i] :].any()
      assert not params[pair.b][RANKS[i] :].any()
      assert params[pair.a][:, : RANKS[i]].any()
  new, _ = play.play(COHORT, state=state)
  if RULES[name].exact:
    weights = np.array([toy.SIZES[i] for i in COHORT], np.float64)
    mine = [added(p) for p in clients_of(name, state, COHORT, 1, ranks=True)]
    for layer, found in added(new.params).items():
      wanted = sum(w * m[layer] for w, m in zip(weights, mine, strict=True))
      np.testing.assert_allclose(found, wanted / weights.sum(), atol=NEAR)


def test_ranks_share_one_compiled_program():
  play = player("flexlora", ranks=True)
  state, _ = play.play(COHORT)
  programs = play.step.programs()
  other = copy.copy(play)
  other.data = play.data.with_traits(rank=RANKS[::-1])
  other.play(COHORT, state=state)
  assert play.step.programs() == programs


def floats(spec) -> int:
  return sum(x.size for x in jax.tree.leaves(spec))


K1, F1, K2, F2 = 5, 7, 7, 3  # layers up and head


@pytest.mark.parametrize(
  ("name", "up", "down"),
  [
    ("fedit", R * (K1 + F1 + K2 + F2), R * (K1 + F1 + K2 + F2)),
    ("ffa", R * (F1 + F2), R * (F1 + F2)),
    ("fedsa", R * (K1 + K2), R * (K1 + K2)),
    ("flexlora", R * (K1 + F1 + K2 + F2), R * (K1 + F1 + K2 + F2)),
    # Five clients of rank 2 have more numbers than the matrices.
    ("flora", R * (K1 + F1 + K2 + F2), K1 * F1 + K2 * F2),
    (
      "fedex",
      R * (K1 + F1 + K2 + F2),
      R * (K1 + F1 + K2 + F2) + K1 * F1 + K2 * F2,
    ),
  ],
)
def test_bytes_are_those_of_the_card(name, up, down):
  algorithm = player(name).algorithm
  sizes = algorithm.bytes(5)
  extra = 4 * (K1 * F1 + K2 * F2) * (not RULES[name].residual)
  assert sizes["cloud/up_bytes"] == 4 * up + 4  # and the weight
  # This model has residuals, which a rule that has no use for them resends.
  assert sizes["cloud/down_bytes"] == 4 * down + extra


def test_rolora_sends_one_factor_a_round():
  algorithm = player("rolora").algorithm
  sizes = [
    algorithm.bytes(5, round=number)["cloud/up_bytes"] for number in range(3)
  ]
  assert sizes == [
    4 * R * (F1 + F2) + 4,
    4 * R * (K1 + K2) + 4,
    4 * R * (F1 + F2) + 4,
  ]
  job = algorithm.work
  state, _ = player("rolora").play(COHORT)
  for number, still in ((1, "lora_b"), (2, "lora_a")):
    clients = clients_of("rolora", state, COHORT[:1], number)
    for name, value in clients[0].items():
      if name.endswith(still):
        assert (value == state.params[name]).all()
  # What is counted is what is left when the rest is taken out.
  spec = jax.eval_shape(lambda: dict(job.params))
  assert floats(job.compact(spec, {}, 0)) < floats(spec)


def test_a_low_rank_client_is_charged_for_its_rank():
  algorithm = player("fedit", ranks=True).algorithm
  one = algorithm.bytes(5, traits={"rank": 1})["cloud/up_bytes"]
  two = algorithm.bytes(5, traits={"rank": 2})["cloud/up_bytes"]
  assert two - one == 4 * (K1 + F1 + K2 + F2)
  spec = jax.eval_shape(lambda: dict(algorithm.work.params))
  cut = algorithm.work.compact(spec, {"rank": 1}, 0)
  params = algorithm.work.params
  held = {
    k: v[:, :1] if k.endswith("lora_a") else v[:1]
    for k, v in params.items()
    if "residual" not in k
  }
  kept = {k: v for k, v in cut.items() if "residual" not in k}
  assert tree.nbytes(kept) == tree.nbytes(held)


def test_a_run_records_the_bytes_of_the_clients_that_took_part():
  data = toy.people().with_traits(rank=RANKS)
  algorithm = player("flexlora", ranks=True).algorithm
  records = [
    record
    for _, record in fp.run(
      algorithm,
      model(),
      data,
      cohort=fp.sample.uniform(4),
      rounds=2,
      settings=toy.lanes(),
    )
  ]
  low = algorithm.bytes(4, traits={"rank": 1})["cloud/up_bytes"]
  high = algorithm.bytes(4, traits={"rank": 2})["cloud/up_bytes"]
  for number, record in enumerate(records):
    ids = fp.sample.cohort_of(fp.sample.uniform(4), data, 0, number)
    wanted = sum(low if RANKS[i] == 1 else high for i in ids)
    assert record["cloud/up_bytes"] == wanted


def test_diagnostics_are_those_of_the_clients():
  play = player("fedit", watch=True)
  state, _ = play.play(COHORT)
  new, outcome = play.play(COHORT, state=state)
  mine = clients_of("fedit", state, COHORT, 1)
  weights = np.array([toy.SIZES[i] for i in COHORT], np.float64)
  share = weights / weights.sum()
  whole, left_out = 0.0, 0.0
  for pair in fp.rules.pairs_of(model().origin):
    a = np.stack([m[pair.a] for m in mine]).astype(np.float64)
    b = np.stack([m[pair.b] for m in mine]).astype(np.float64)
    mean = np.einsum("c,ckr,crf->kf", share, a, b)
    product = np.tensordot(share, a, 1) @ np.tensordot(share, b, 1)
    whole += np.sum(mean**2)
    left_out += np.sum((mean - product) ** 2)
  record = outcome.record
  np.testing.assert_allclose(
    record["cloud/lora/covariance_error"],
    np.sqrt(left_out / whole),
    rtol=1e-3,
  )
  assert 1 <= record["cloud/lora/effective_rank"] <= R
  assert record["cloud/lora/residual_rank"] <= 4  # of layers [5, 7], [7, 3]
  plain, _ = player("fedit").play(COHORT, state=state)
  for a, b in zip(
    jax.tree.leaves(new.params), jax.tree.leaves(plain.params), strict=True
  ):
    np.testing.assert_allclose(a, b, atol=NEAR)


@pytest.mark.parametrize("name", some(("fedit", "fedex", "rolora")))
def test_every_rule_can_be_watched_and_is_not_changed_by_it(name):
  new, outcome = player(name, watch=True).play(COHORT, COHORT)
  same, _ = player(name).play(COHORT, COHORT)
  for a, b in zip(
    jax.tree.leaves(new.params), jax.tree.leaves(same.params), strict=True
  ):
    np.testing.assert_allclose(a, b, atol=NEAR)
  said = [k for k in outcome.record if "/lora/" in k]
  assert bool(said) == (name not in ("ffa", "fedsa"))  # one factor alone
  assert all(np.isfinite(outcome.record[k]) for k in said)


def test_a_secure_sum_is_refused_by_a_rule_that_needs_every_product():
  with pytest.raises(ValueError, match="'count'.*linear.*ffa"):
    fp.chain(fp.count(max_weight=8), fp.fixed_point(32), fp.mask())
  uplink = fp.chain(fp.clip(1.0), fp.weigh(max_weight=8), fp.fixed_point(32))
  with pytest.raises(ValueError, match="count"):
    fp.fedavg(
      model(),
      fp.local(optax.sgd(0.1), batch=4),
      rule=fp.rules.flexlora(),
      uplink=uplink,
    )


@pytest.mark.parametrize(
  ("options", "words"),
  [
    ({"rule": fp.rules.ffa(), "ranks": True}, "flexlora"),
    ({"rule": fp.rules.flora(), "server": optax.adam(0.1)}, "memory"),
    ({"rule": fp.rules.rolora(), "server": optax.adam(0.1)}, "memory"),
    (
      {
        "rule": fp.rules.flora(),
        "uplink": fp.chain(fp.count(), fp.error_feedback(fp.top_k(0.1))),
      },
      "error_feedback",
    ),
    ({"rule": fp.rules.flora(), "uplink": fp.weigh()}, "count"),
    ({"rule": fp.rules.fedit(), "uplink": fp.count()}, "weigh"),
  ],
)
def test_what_does_not_fit_is_refused_with_a_way_out(options, words):
  with pytest.raises(ValueError, match=words):
    fp.fedavg(model(), fp.local(optax.sgd(0.1), batch=4), **options)


def test_a_model_without_adapters_or_residuals_is_refused():
  how = fp.local(optax.sgd(0.1), batch=4)
  with pytest.raises(ValueError, match="peft.lora"):
    fp.fedavg(toy.net(), how, rule=fp.rules.fedit())
  with pytest.raises(ValueError, match="residual=True"):
    fp.fedavg(model(residual=False), how, rule=fp.rules.fedex())


def test_a_missing_trait_is_named():
  play = player("fedit", ranks=True)
  with pytest.raises(ValueError, match=r"with_traits\(rank"):
    list(
      fp.run(
        play.algorithm,
        model(),
        toy.people(),
        cohort=fp.sample.uniform(2),
        rounds=1,
      )
    )


@pytest.mark.parametrize("name", RULES)
def test_every_rule_explains_itself(name):
  text = fp.explain(name)
  assert RULES[name].formula in text
  assert RULES[name].source in text
  assert name in fp.rules.table()


def test_an_unknown_method_names_those_there_are():
  with pytest.raises(ValueError, match="flexlora"):
    fp.explain("flexlor")


def test_the_tail_penalty_of_hetlora_shrinks_the_tail():
  def tail(strength):
    algorithm = fp.fedavg(
      model(),
      fp.local(optax.sgd(0.1), batch=4),
      rule=fp.rules.hetlora(strength, keep=0.5),
    )
    play = toy.Player(algorithm, toy.people(), model().base)
    state, _ = play.play(*(COHORT,) * 4)
    return sum(
      np.linalg.norm(state.params[p.a][:, 1:])
      * np.linalg.norm(state.params[p.b][1:])
      for p in fp.rules.pairs_of(model().origin)
    )

  free, mild, strong = tail(0.0), tail(0.1), tail(1.0)
  assert 0 < strong < mild < free


def test_hetlora_refuses_to_keep_more_than_there_is():
  with pytest.raises(ValueError, match="keep"):
    fp.rules.hetlora(0.1, keep=1.0)
