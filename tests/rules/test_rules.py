"""Every rule's declarations, proved: exactness, gauge, ranks, degeneracies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adapters_world as world
import fedjax_peft as fp
from fedjax_peft.rules import heard, product
from tolerance import tol

A, B, RESIDUAL = world.PAIR.a, world.PAIR.b, world.PAIR.residual
RULES = {name: make() for name, make in fp.rules.RULES.items()}
# Long sums, an SVD or a QR in between: a few dozen roundings of this length.
NEAR = 8 * tol(jnp.float32, world.K * world.F)


def each(*, where=lambda rule: True):
  """Parametrizes a test over the rules that a condition holds for."""
  names = [name for name, rule in RULES.items() if where(rule)]
  return pytest.mark.parametrize("name", names)


SHAPES = {
  "stacked": (40, 33, 2),  # factors side by side are smaller
  "dense": (12, 7, 3),  # the matrix is smaller
  "square": (12, 12, 3),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@each(where=lambda rule: rule.exact)
def test_an_exact_rule_gives_the_mean_of_the_models(name, shape):
  rule = RULES[name]
  for number in (0, 1):  # rules that alternate do so
    here = world.only(world.world(start=False, shape=shape), rule, number)
    new, _ = world.aggregate(rule, here, number=number)
    assert world.error(world.model(new), world.mean_model(here)) < NEAR


@each(where=lambda rule: not rule.exact and not rule.placement)
def test_a_rule_that_is_not_exact_does_not_pass_the_same_test(name):
  here = world.world(start=False)
  new, _ = world.aggregate(RULES[name], here)
  assert world.error(world.model(new), world.mean_model(here)) > 1e-3


def test_a_transposed_residual_would_fail_the_exactness_test():
  here = world.world(start=False, square=True)
  new, _ = world.aggregate(RULES["fedex"], here)
  wrong = dict(new) | {RESIDUAL: new[RESIDUAL].T}
  assert world.error(world.model(new), world.mean_model(here)) < NEAR
  assert world.error(world.model(wrong), world.mean_model(here)) > 1e-2


@each(where=lambda rule: rule.gauge_invariant is True)
def test_gauge_does_not_matter_to_a_rule_that_says_so(name):
  here = world.world(start=False)
  new, _ = world.aggregate(RULES[name], here)
  same, _ = world.aggregate(RULES[name], world.regauged(here))
  assert world.error(world.model(same), world.model(new)) < NEAR


@each(where=lambda rule: rule.gauge_invariant is False)
def test_gauge_matters_to_a_rule_that_says_so(name):
  here = world.world(start=False)
  new, _ = world.aggregate(RULES[name], here)
  other, _ = world.aggregate(RULES[name], world.regauged(here))
  assert world.error(world.model(other), world.model(new)) > 1e-2


@each(where=lambda rule: rule.gauge_invariant == "rotations")
def test_gauge_rotations_do_not_matter_to_a_rule_that_says_so(name):
  here = world.world(start=False)
  new, _ = world.aggregate(RULES[name], here)
  same, _ = world.aggregate(RULES[name], world.regauged(here, rotations=True))
  other, _ = world.aggregate(RULES[name], world.regauged(here))
  assert world.error(world.model(same), world.model(new)) < NEAR
  assert world.error(world.model(other), world.model(new)) > 1e-2


@each()
def test_one_client_alone_is_the_result(name):
  rule = RULES[name]
  here = world.only(world.world(weights=(3,), start=False), rule)
  new, _ = world.aggregate(rule, here, pieces=1)
  expected = world.mean_model(here)
  if rule.name == "fair":  # it has nothing to correct
    np.testing.assert_allclose(new[B], here.clients[B][0], atol=NEAR)
  assert world.error(world.model(new), expected) < NEAR


@each()
def test_weights_of_one_client_only_give_that_client(name):
  rule = RULES[name]
  here = world.only(world.world(start=False, weights=(0, 0, 7, 0)), rule)
  new, _ = world.aggregate(rule, here)
  assert world.error(world.model(new), world.mean_model(here)) < NEAR
  np.testing.assert_allclose(
    new["head/bias"], here.clients["head/bias"][2], atol=tol(jnp.float32, 4)
  )


@each()
def test_clients_that_agree_give_what_fedit_gives(name):
  rule = RULES[name]
  here = world.only(world.world(start=False), rule)
  same = {
    k: np.broadcast_to(x[:1], x.shape).copy() for k, x in here.clients.items()
  }
  here = here._replace(clients=same)
  new, _ = world.aggregate(rule, here)
  plain, _ = world.aggregate(RULES["fedit"], here)
  assert world.error(world.model(new), world.model(plain)) < NEAR


@each()
def test_the_order_of_clients_does_not_matter(name):
  here = world.only(world.world(start=False), RULES[name])
  order = np.array([3, 0, 4, 1, 2])
  turned = here._replace(
    clients={k: x[order] for k, x in here.clients.items()},
    weights=here.weights[order],
  )
  new, _ = world.aggregate(RULES[name], here)
  same, _ = world.aggregate(RULES[name], turned, pieces=3)
  assert world.error(world.model(same), world.model(new)) < NEAR


@each()
def test_a_client_in_two_halves_counts_as_one(name):
  here = world.only(world.world(start=False, weights=(6, 4, 2)), RULES[name])
  halves = here._replace(
    clients={k: x[[0, 0, 1, 2]] for k, x in here.clients.items()},
    weights=np.array([3, 3, 4, 2], np.int32),
  )
  new, _ = world.aggregate(RULES[name], here)
  same, _ = world.aggregate(RULES[name], halves)
  if name == "hetlora":  # it counts clients by their products, not examples
    assert world.error(world.model(same), world.model(new)) > 1e-3
  else:
    assert world.error(world.model(same), world.model(new)) < NEAR


@each(where=lambda rule: rule.heterogeneous_rank and not rule.placement)
def test_clients_of_lower_rank_are_padded_with_zeros(name):
  rule, here = RULES[name], world.world(start=False)
  ranks = np.array([3, 1, 2, 3, 1])
  clients = dict(here.clients)
  for i, r in enumerate(ranks):
    clients[A][i, :, r:], clients[B][i, r:] = 0, 0
  here = here._replace(clients=clients)
  new, _ = world.aggregate(rule, here)
  if rule.exact:
    assert world.error(world.model(new), world.mean_model(here)) < NEAR
  if name in ("fedit", "fair"):
    share = here.weights / here.weights.sum()
    np.testing.assert_allclose(
      new[A], np.tensordot(share, clients[A], 1), atol=NEAR
    )


def test_what_factors_leave_out_is_their_covariance():
  here = world.world(start=False)
  _, message = world.aggregate(RULES["fedex"], here)
  share = (here.weights / here.weights.sum()).astype(np.float64)
  a, b = (here.clients[n].astype(np.float64) for n in (A, B))
  off_a = a - np.tensordot(share, a, 1)
  off_b = b - np.tensordot(share, b, 1)
  wanted = np.einsum("c,ckr,crf->kf", share, off_a, off_b)
  found = product.expand(heard.covariance(message, world.PAIR))
  assert world.error(np.asarray(found), wanted) < NEAR


def test_the_covariance_has_one_clients_rank_less_than_the_stack():
  here = world.world(start=False, shape=(60, 50, 4), weights=(1, 2, 3))
  _, message = world.aggregate(RULES["fedex"], here)
  left_out = product.expand(heard.covariance(message, world.PAIR))
  values = np.linalg.svd(np.asarray(left_out), compute_uv=False)
  assert np.sum(values > 1e-5 * values[0]) == (3 - 1) * 4


def test_the_error_of_fedit_is_below_its_bound():
  here = world.world(start=False)
  new, _ = world.aggregate(RULES["fedit"], here)
  share = here.weights / here.weights.sum()
  a, b = here.clients[A], here.clients[B]
  off_a = a - np.tensordot(share, a, 1)
  off_b = b - np.tensordot(share, b, 1)
  spectral = np.array([np.linalg.norm(x, 2) for x in off_a])
  whole = np.array([np.linalg.norm(x) for x in off_b])
  bound = np.sqrt(share @ spectral**2) * np.sqrt(share @ whole**2)
  error = np.linalg.norm(world.model(new) - world.mean_model(here))
  assert 0 < error <= world.PAIR.scale * bound


def test_two_opposite_clients_cancel_for_fedit_and_for_no_exact_rule():
  here = world.world(weights=(1, 1), start=False)
  for name in (A, B):
    here.clients[name][1] = -here.clients[name][0]
  new, _ = world.aggregate(RULES["fedit"], here)
  size = np.abs(world.mean_model(here)).max()
  assert np.abs(world.model(new)).max() < NEAR * size
  for name in ("fedex", "flora"):
    new, _ = world.aggregate(RULES[name], here)
    assert world.error(world.model(new), world.mean_model(here)) < NEAR


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_flexlora_is_the_best_adapter_of_its_rank(shape):
  here = world.world(start=False, shape=shape)
  new, _ = world.aggregate(RULES["flexlora"], here)
  values = np.linalg.svd(world.mean_model(here), compute_uv=False)
  wanted = np.sqrt(np.sum(values[shape[2] :] ** 2))
  error = np.linalg.norm(world.model(new) - world.mean_model(here))
  np.testing.assert_allclose(error, wanted, rtol=1e-4)
  gram = new[A].T @ new[A]
  np.testing.assert_allclose(gram, np.eye(shape[2]), atol=NEAR)


def test_fedex_of_a_rank_keeps_the_best_of_that_rank():
  here = world.world(start=False)
  fedit, _ = world.aggregate(RULES["fedit"], here)
  left_out = world.mean_model(here) - world.model(fedit)
  values = np.linalg.svd(left_out, compute_uv=False)
  for rank in (1, 2, 4):
    new, _ = world.aggregate(fp.rules.fedex(rank), here)
    error = np.linalg.norm(world.model(new) - world.mean_model(here))
    np.testing.assert_allclose(
      error, np.sqrt(np.sum(values[rank:] ** 2)), rtol=1e-3
    )


def test_flora_starts_anew_from_factors_that_differ_every_round():
  here = world.world(start=False)
  first, _ = world.aggregate(RULES["flora"], here, number=0)
  second, _ = world.aggregate(RULES["flora"], here, number=1)
  assert not first[B].any()
  assert not second[B].any()
  assert not np.allclose(first[A], second[A])
  again, _ = world.aggregate(RULES["flora"], here, number=0)
  assert (again[A] == first[A]).all()


def test_fedsvd_changes_nothing_but_the_factors():
  rule = fp.rules.fedsvd(every=2)
  here = world.only(world.world(start=False), rule)
  kept, _ = world.aggregate(rule, here, number=0)
  assert (kept[A] == here.params[A]).all()
  new, _ = world.aggregate(rule, here, number=1)
  assert world.error(world.model(new), world.model(kept)) < NEAR
  gram = new[A].T @ new[A]
  np.testing.assert_allclose(gram, np.eye(world.R), atol=NEAR)
  assert not np.allclose(new[A], kept[A])


def test_fair_is_never_worse_than_fedit_and_better_with_less_restraint():
  here = world.world(start=False)
  wanted = world.mean_model(here)
  errors = []
  for strength in (0.0, 0.01, 0.1, 1.0, 100.0):
    new, _ = world.aggregate(fp.rules.fair(strength), here)
    errors.append(np.linalg.norm(world.model(new) - wanted))
  plain, _ = world.aggregate(RULES["fedit"], here)
  errors.append(np.linalg.norm(world.model(plain) - wanted))
  assert errors == sorted(errors)
  # No B can be better than least squares.
  a = np.asarray(plain[A], np.float64)
  best = np.linalg.lstsq(a, wanted, rcond=None)[0]
  floor = np.linalg.norm(a @ best - wanted)
  np.testing.assert_allclose(errors[0], floor, rtol=1e-4)


def test_fair_by_descent_comes_closer_in_angle_than_fedit():
  here = world.world(start=False)
  wanted = world.mean_model(here)

  def cosine(params):
    made = world.model(params)
    return (made * wanted).sum() / np.linalg.norm(made) / np.linalg.norm(wanted)

  plain, _ = world.aggregate(RULES["fedit"], here)
  some, _ = world.aggregate(fp.rules.fair(0.0, steps=5), here)
  more, _ = world.aggregate(fp.rules.fair(0.0, steps=100), here)
  assert cosine(plain) < cosine(some) < cosine(more)


def test_hetlora_counts_a_client_as_its_product_is_large():
  here = world.world(start=False)
  new, _ = world.aggregate(RULES["hetlora"], here)
  a, b = here.clients[A], here.clients[B]
  size = np.array([np.linalg.norm(x @ y) for x, y in zip(a, b, strict=True)])
  share = size / size.sum()
  np.testing.assert_allclose(new[A], np.tensordot(share, a, 1), atol=NEAR)
  np.testing.assert_allclose(new[B], np.tensordot(share, b, 1), atol=NEAR)


def test_fedrot_undoes_rotations_of_clients_that_agree():
  here = world.world(start=False)
  same = {k: np.broadcast_to(x[:1], x.shape) for k, x in here.clients.items()}
  here = here._replace(clients=same)
  turned = world.regauged(here, rotations=True)
  new, _ = world.aggregate(RULES["fedrot"], turned)
  assert world.error(world.model(new), world.mean_model(here)) < NEAR
  plain, _ = world.aggregate(RULES["fedit"], turned)
  assert world.error(world.model(plain), world.mean_model(here)) > 0.1


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_what_is_kept_is_the_smaller_of_stack_and_matrix(shape):
  k, f, r = shape
  reduce = heard.hear((world.PAIR,))
  here = world.world(shape=shape)
  spec = fp.links.Counted(
    {
      n: jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
      for n, x in here.clients.items()
    },
    jax.ShapeDtypeStruct((), jnp.int32),
  )
  acc = jax.eval_shape(lambda: reduce.init(spec, 5))
  stack, matrix = 5 * r * (k + f), k * f
  kept = sum(x.size for x in jax.tree.leaves((acc.second, acc.rows)))
  assert kept == min(stack, matrix)


@pytest.mark.parametrize("name", ["fedex", "flexlora", "fedrot", "hetlora"])
def test_devices_merge_what_they_heard(name):
  rule, here = RULES[name], world.world(start=False)
  reduce = heard.hear((world.PAIR,), one_by_one=rule.one_by_one)
  delta = {k: here.params[k][None] - x for k, x in here.clients.items()}
  spec = fp.links.Counted(
    {k: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for k, x in delta.items()},
    jax.ShapeDtypeStruct((), jnp.int32),
  )
  parts = []
  for ids in ([0, 1, 2], [3, 4]):
    rows = fp.links.Counted(
      {k: jnp.asarray(x[ids]) for k, x in delta.items()},
      jnp.asarray(here.weights[ids]),
    )
    acc = reduce.init(spec, 3)
    parts.append(reduce.update(acc, rows, jnp.ones(len(ids), bool)))
  message = reduce.finalize(reduce.merge(*parts))
  params = {k: jnp.asarray(x) for k, x in here.params.items()}
  server = rule.server((world.PAIR,))
  down, _ = server.update(message, server.init(params), params)
  new = {k: np.asarray(params[k] - down[k]) for k in params}
  whole, _ = world.aggregate(rule, here)
  assert world.error(world.model(new), world.model(whole)) < NEAR
