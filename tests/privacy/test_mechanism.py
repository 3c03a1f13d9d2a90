"""Mechanisms: what one client moves, and how much noise covers it."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import fedjax_peft as fp
from fedjax_peft import link, links
from fedjax_peft.privacy import accounting, distributed, events, mechanism
from tolerance import tol

DIMENSION = 90
SHAPES = {
  "a": jax.ShapeDtypeStruct((7, 10), jnp.float32),
  "b": jax.ShapeDtypeStruct((20,), jnp.float32),
}
WEIGHTS = (1, 2, 3, 30, 7)
SENDERS = len(WEIGHTS)
SAMPLED = functools.partial(events.poisson, rate=0.1)
SECURE = mechanism.Secure(mask=links.mask(2))
CLIPS = {"fixed": links.clip(0.5), "adaptive": links.adaptive_clip(0.5)}


def made(clip="fixed", *, max_weight=3, secure=None, **options):
  options = {"kind": "gaussian", "multiplier": 1.5, "event": SAMPLED, **options}
  return mechanism.mechanism(
    link.Spec(SHAPES, senders=SENDERS),
    clip=CLIPS[clip],
    total=4.0,
    max_weight=max_weight,
    secure=secure,
    **options,
  )


@functools.cache
def crossing(chain):
  """Messages [C, ...] of those who are present, as the receiver hears them."""
  mine, shared = chain.init(link.Spec(SHAPES, senders=SENDERS))
  ids, weights = jnp.arange(SENDERS), jnp.array(WEIGHTS, jnp.int32)

  @jax.jit
  def cross(messages, present, key):
    here = jnp.where(present, weights, 0)
    roster = fp.Roster(ids, here, jax.random.key(5))

    def send(message, i):
      own = jax.random.fold_in(key, i)
      ctx = fp.Context(own, ids[i], here[i], {}, roster)
      return chain.send(message, mine, shared, ctx)[0]

    wires = jax.vmap(send)(messages, ids)
    kept = jax.tree.map(
      lambda x: jnp.where(present.reshape(-1, *(1,) * (x.ndim - 1)), x, 0),
      wires,
    )
    total = jax.tree.map(lambda x: jnp.sum(x, 0, dtype=x.dtype), kept)
    return chain.receive(total, shared, roster, key)

  return cross


def heard(chain, messages, present=(True,) * SENDERS, seed=0):
  """The received sum as one vector, and the receiver's state."""
  told, shared = crossing(chain)(
    messages, np.array(present), jax.random.key(seed)
  )
  flat = [np.ravel(x) for x in jax.tree.leaves(told)]
  return np.concatenate(flat).astype(np.float64), shared


def messages(scale=1.0, seed=0):
  """Random messages; axis C leads."""
  rng = np.random.default_rng(seed)
  return {
    k: (scale * rng.normal(size=(SENDERS, *x.shape))).astype(np.float32)
    for k, x in SHAPES.items()
  }


@pytest.mark.parametrize("secure", [None, SECURE], ids=["open", "secure"])
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize(
  "value", [0.0, 1e-30, 1e30, 3e38, math.nan, math.inf, -math.inf]
)
def test_one_client_moves_the_sum_by_the_sensitivity_at_most(
  value, clip, secure
):
  it = made(clip, secure=secure)
  sent = messages(1e-2)
  sent["a"][3, 0] = value  # the heaviest client
  everyone, _ = heard(it.link, sent)
  without, _ = heard(it.link, sent, np.arange(SENDERS) != 3)
  apart = np.linalg.norm(everyone - without) * 4.0
  unit = 0.5 if clip == "adaptive" else 1.0  # received in the message's unit
  limit = it.sensitivity * unit
  assert np.isfinite(everyone).all()
  assert apart <= limit * (1 + 10 * tol(jnp.float32, DIMENSION))


@pytest.mark.parametrize("secure", [None, SECURE], ids=["open", "secure"])
def test_a_client_at_the_bound_moves_the_sum_by_all_of_it(secure):
  it = made(secure=secure, multiplier=0.0)
  sent = messages(10.0)  # all are clipped
  everyone, _ = heard(it.link, sent)
  without, _ = heard(it.link, sent, np.arange(SENDERS) != 3)
  apart = np.linalg.norm(everyone - without) * 4.0
  assert apart >= 0.999 * it.sensitivity
  assert it.sensitivity == pytest.approx(0.5 * 3, rel=1e-3)


@pytest.mark.parametrize("secure", [None, SECURE], ids=["open", "secure"])
@pytest.mark.parametrize("clip", CLIPS)
def test_noise_on_the_sum_is_multiplier_times_sensitivity(clip, secure):
  it = made(clip, secure=secure)
  silent = messages(0.0)
  many = [heard(it.link, silent, seed=s)[0] for s in range(40)]
  unit = 0.5 if clip == "adaptive" else 1.0
  drawn = np.concatenate(many) * 4.0 / unit
  assert is_std(drawn, 1.5 * it.sensitivity)
  for wrong in (2 / 3, 3 / 2):
    assert not is_std(drawn, wrong * 1.5 * it.sensitivity)


def is_std(drawn, std, p=1e-6):
  """Whether the variance of normal values may be that, two-sided at p."""
  statistic = np.sum(np.square(drawn)) / std**2
  low, high = stats.chi2(drawn.size).interval(1 - p)
  return low <= statistic <= high


def test_noise_does_not_repeat_from_round_to_round_or_leaf_to_leaf():
  it = made()
  a, b = (heard(it.link, messages(0.0), seed=s)[0] for s in (0, 1))
  assert np.unique(np.concatenate([a, b])).size == 2 * DIMENSION


def test_local_noise_is_on_every_message_that_is_sent():
  it = made(kind="local")
  silent = messages(0.0)
  nobody, _ = heard(it.link, silent, (False,) * SENDERS)
  np.testing.assert_array_equal(nobody, np.zeros(DIMENSION))
  alone = [
    heard(it.link, silent, np.arange(SENDERS) == i, seed=s)[0]
    for i in range(SENDERS)
    for s in range(8)
  ]
  drawn = np.concatenate(alone) * 4.0
  assert is_std(drawn, 1.5 * 0.5 * 3)
  assert not is_std(drawn, 1.5 * 0.5 * 3 * 2 / 3)
  assert not is_std(drawn, 1.5 * 0.5 * 3 * 3 / 2)
  assert it.event == events.poisson(1.5, 1.0)


@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.8])
def test_the_adaptive_norm_finds_the_quantile(quantile):
  rng = np.random.default_rng(0)
  norms = np.exp(rng.normal(size=SENDERS * 40)).reshape(40, SENDERS)
  clip = links.adaptive_clip(10.0, quantile=quantile, rate=0.3)
  chain = link.chain(clip, links.average(SENDERS))
  spec = link.Spec({"a": jax.ShapeDtypeStruct((1,), jnp.float32)})
  mine, shared = chain.init(spec)

  @jax.jit
  def step(shared, norms):
    ctx = link.alone()
    wires = jax.vmap(
      lambda x: chain.send({"a": x[None]}, mine, shared, ctx)[0]
    )(norms)
    total = jax.tree.map(lambda x: jnp.sum(x, 0), wires)
    return chain.receive(total, shared, ctx.roster, ctx.key)[1]

  found = []
  for i in range(400):
    shared = step(shared, jnp.asarray(norms[i % 40], jnp.float32))
    found.append(float(shared[0]["clip_norm"]))
  wanted = np.quantile(norms, quantile)
  assert np.mean(np.log(found[-200:])) == pytest.approx(
    np.log(wanted), abs=0.15
  )


def test_everything_the_accountant_hears_is_what_is_added():
  it = made(secure=SECURE, multiplier=2.0)
  assert it.event == events.poisson(2.0, 0.1)
  assert it.std == pytest.approx(2.0 * it.sensitivity)
  # Rounding makes a client's part larger than its clip norm.
  assert it.sensitivity > 0.5 * 3
  assert it.plan.failure == 0


@pytest.mark.parametrize(
  ("options", "said"),
  [
    ({"event": None}, "how its cohort is drawn"),
    ({"kind": "none"}, "without noise there is no multiplier"),
    ({"kind": "local", "secure": SECURE}, "fits no grid"),
    ({"multiplier": -1.0}, "multiplier must be a finite number"),
    ({"kind": "laplace"}, "kind must be one of"),
  ],
)
def test_parts_that_do_not_go_together_are_refused(options, said):
  with pytest.raises(ValueError, match=said):
    made(**options)


def test_a_message_that_nothing_bounds_is_refused():
  with pytest.raises(ValueError, match="start with clip"):
    mechanism.mechanism(
      link.Spec(SHAPES, senders=SENDERS),
      clip=links.rotate(128),
      total=4.0,
      event=SAMPLED,
    )


def test_integers_beside_the_message_are_refused():
  shapes = SHAPES | {"count": jax.ShapeDtypeStruct((), jnp.int32)}
  it = mechanism.mechanism(
    link.Spec(shapes, senders=SENDERS),
    clip=links.clip(0.5),
    total=4.0,
    multiplier=1.0,
    event=SAMPLED,
  )
  with pytest.raises(ValueError, match="told exactly"):
    it.link.init(link.Spec(shapes, senders=SENDERS))


@pytest.mark.parametrize("kind", ["discrete_gaussian", "skellam"])
def test_noise_by_every_client_adds_up_to_the_wanted_noise(kind):
  secure = mechanism.Secure(mask=links.mask(2), fewest=4, failure=1e-6)
  it = made(secure=secure, kind=kind, event=None, multiplier=1.5)
  # Never less than wanted, and hardly more.
  assert 1.5 <= it.std / it.sensitivity <= 1.5 * 1.02
  few = np.arange(SENDERS) != 2
  silent = messages(0.0)
  drawn = [heard(it.link, silent, few, seed=s)[0] for s in range(40)]
  drawn = np.concatenate(drawn) * 4.0
  assert is_std(drawn, it.std)
  assert not is_std(drawn, it.std * 2 / 3)
  assert not is_std(drawn, it.std * 3 / 2)


def test_noise_that_colluders_know_does_not_count():
  options = {"kind": "skellam", "event": None, "multiplier": 1.5}
  secure = mechanism.Secure(mask=links.mask(2), fewest=5, failure=1e-6)
  trusted = made(secure=secure, **options)
  fewer = made(secure=secure._replace(corrupt=3), **options)
  # Two hide as much as five did, so each adds more.
  pairs = ((trusted, 5), (fewer, 2))
  each = [it.std / it.sensitivity / np.sqrt(n) for it, n in pairs]
  assert each[1] / each[0] == pytest.approx(np.sqrt(5 / 2), rel=0.02)
  assert fewer.fewest == 5
  with pytest.raises(ValueError, match="fewest"):
    made(secure=secure._replace(corrupt=5), **options)


@pytest.mark.parametrize("dimension", [10, 1000, 100_000])
@pytest.mark.parametrize("multiplier", [0.3, 1.0, 5.0])
@pytest.mark.parametrize("kind", ["discrete_gaussian", "skellam"])
def test_the_grid_has_room_for_noise_that_is_enough(
  kind, multiplier, dimension
):
  it = distributed.shared(
    kind,
    multiplier,
    fewest=90,
    senders=100,
    bound=0.5,
    dimension=dimension,
  )
  std = it.plan.noise * math.sqrt(90)
  assert multiplier <= std / it.apart.l2 <= multiplier * 1.05
  assert it.plan.largest <= it.plan.capacity
  assert it.apart.l2 <= 1.1001 * it.plan.levels
  alike = accounting.epsilon(events.poisson(multiplier, 1.0), 1e-5)
  told = accounting.epsilon(it.event, 1e-5, accountant="rdp")
  assert 0.95 * alike <= told <= 1.6 * alike
