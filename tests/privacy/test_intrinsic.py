"""Intrinsic clipping: the same in every gauge; a clip on factors is not."""

import functools
import math

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import fedjax_peft as fp
import laws
import tolerance
import toy
from fedjax_peft import algorithm, link, links, rules, tree, work
from fedjax_peft.privacy import intrinsic

K, R, F = 9, 3, 5  # of which no two agree
SCALE, CLIP = 2.0, 0.5


def gauge(seed=0):
  """G of condition 30 or so, and its inverse."""
  rng = np.random.default_rng(seed)
  q, _ = np.linalg.qr(rng.normal(size=(R, R)))
  g = q @ np.diag([0.2, 1.0, 6.0]) @ np.linalg.qr(rng.normal(size=(R, R)))[0]
  return g, np.linalg.inv(g)


def factors(seed=0, size=1.0):
  rng = np.random.default_rng(seed)
  return (
    rng.normal(size=(K, R)) / math.sqrt(K),
    (size * rng.normal(size=(R, F))).astype(np.float32),
  )


def cross(chain, message):
  """(wire, received) of one sender."""
  spec = link.Spec(tree.spec(message))
  (mine, shared), ctx = chain.init(spec), link.alone()
  wire, _, _ = chain.send(message, mine, shared, ctx)
  return wire, chain.receive(wire, shared, ctx.roster, ctx.key)[0]


def product_of(a, b):
  return SCALE * np.asarray(a, np.float64) @ np.asarray(b, np.float64)


# The link, where A is frozen.


@pytest.mark.parametrize("size", [0.01, 1.0, 1e3])
def test_the_clipped_change_is_the_same_in_every_gauge(size):
  a, db = factors(size=size)
  g, inverse = gauge()
  turned, dturned = a @ g, np.float32(inverse @ db)
  got = {}
  for name, one, d in ("plain", a, db), ("turned", turned, dturned):
    chain = links.clip_product({"b": SCALE * one}, CLIP)
    wire, back = cross(chain, {"b": jnp.asarray(d)})
    got[name] = product_of(one, back["b"])
    # What crosses has the norm of what it does to the model, within the bound.
    assert np.linalg.norm(wire["b"]) <= CLIP * (1 + 1e-5)
    assert np.linalg.norm(wire["b"]) == pytest.approx(
      np.linalg.norm(got[name]), rel=1e-5
    )
  whole = product_of(a, db)
  want = whole * min(1, CLIP / np.linalg.norm(whole))
  # Products through two matrices of condition 30 or so.
  limit = 100 * tolerance.tol(jnp.float32, K * R) * np.linalg.norm(want)
  for found in got.values():
    np.testing.assert_allclose(found, want, atol=limit)
  # The control: a clip on the factor depends on the gauge.
  raw = [
    product_of(one, cross(links.clip(CLIP), {"b": jnp.asarray(d)})[1]["b"])
    for one, d in ((a, db), (turned, dturned))
  ]
  if size >= 1:
    assert np.linalg.norm(raw[0] - raw[1]) > 0.1 * np.linalg.norm(raw[0])


def test_noise_on_the_wire_is_isotropic_in_what_the_layer_sees():
  # Each value of the wire moves the product by a direction of its own, all of
  # length one and orthogonal, in any gauge; and they span the same changes.
  a, _ = factors()
  spans = []
  for one in a, a @ gauge()[0]:
    chain = links.clip_product({"b": SCALE * one}, CLIP)
    shared = chain.init(link.Spec({"b": jnp.zeros((R, F))}))[1]
    ctx = link.alone()
    units = np.eye(R * F, dtype=np.float32).reshape(-1, R, F)
    back = [
      chain.receive({"b": jnp.asarray(u)}, shared, ctx.roster, ctx.key)[0]["b"]
      for u in units
    ]
    rows = np.stack([product_of(one, b).ravel() for b in back])
    np.testing.assert_allclose(rows @ rows.T, np.eye(R * F), atol=1e-5)
    spans.append(rows.T @ rows)
  np.testing.assert_allclose(*spans, atol=1e-5)


def test_all_leaves_are_clipped_together_and_stacks_by_layer():
  rng = np.random.default_rng(1)
  a = rng.normal(size=(2, K, R))
  message = {
    "b": jnp.asarray(rng.normal(size=(2, R, F)), jnp.float32),
    "head": jnp.asarray(rng.normal(size=4), jnp.float32),
  }
  _, back = cross(links.clip_product({"b": a}, CLIP), message)

  def norm_of(x):
    made = np.einsum("lkr,lrf->lkf", a, np.float64(x["b"]))
    return math.hypot(np.linalg.norm(made), np.linalg.norm(x["head"]))

  assert norm_of(back) == pytest.approx(CLIP, rel=1e-5)
  ratio = CLIP / norm_of(message)
  np.testing.assert_allclose(back["b"], ratio * message["b"], rtol=1e-3)
  np.testing.assert_allclose(back["head"], ratio * message["head"], rtol=1e-5)


@functools.cache
def member():
  """For `laws`: a frame that shrinks nothing, so that bounds are comparable.

  The bound is that of what crosses; what it decodes to is larger by at most
  1 / the smallest singular value, which is 1 here.
  """
  rng = np.random.default_rng(2)
  basis, _ = np.linalg.qr(rng.normal(size=(10, 6)))
  turned, _ = np.linalg.qr(rng.normal(size=(6, 6)))
  made = basis @ np.diag([1.0, 1.1, 1.3, 1.5, 1.8, 2.0]) @ turned
  chain = links.clip_product({"kernel": made}, 2 * laws.BOUND)
  return laws.Member(chain, None, 1e-5)


@pytest.mark.parametrize(
  "law",
  [x for x in laws.LINK_LAWS if x is not laws.jit_and_vmap_equal_eager],
  ids=lambda law: law.__name__,
)
def test_the_link_keeps_the_laws(law):
  # The law left out has a kernel of another shape, which a frame refuses.
  law(member())


def test_what_no_frame_fits_is_refused():
  a, db = factors()
  for frames, match in [
    ({}, "got none"),
    ({"b": np.concatenate([a, a[:, :1]], 1)}, "independent"),
    ({"b": a.T}, "independent"),
  ]:
    with pytest.raises(ValueError, match=match):
      links.clip_product(frames, CLIP)
  for frames, match in [
    ({"bb": a}, "did you mean 'b'"),
    ({"b": a[:, :2]}, "must fit its factor"),
    ({"b": a[None]}, "must fit its factor"),
  ]:
    with pytest.raises(ValueError, match=match):
      cross(links.clip_product(frames, CLIP), {"b": jnp.asarray(db)})
  with pytest.raises(ValueError, match="clip_norm"):
    links.clip_product({"b": a}, 0.0)


# On the device, where both factors move.


@functools.cache
def adapted():
  module = fp.peft.lora(toy.Net(nnx.Rngs(0)), 2, "up|head", alpha=3.0)
  return fp.model(module, fp.losses.classification, precision="float32")


@functools.cache
def job(clip_norm=None):
  how = fp.local(optax.sgd(0.5), batch=4, epochs=2)
  plain = work.train(adapted(), how)
  if clip_norm is None:
    return plain
  pairs = rules.pairs_of(adapted().origin)
  return intrinsic.clip_change(plain, pairs, clip_norm)


def state(seed, size):
  """Random factors, and random changes of them, {path: float32}."""
  rng = np.random.default_rng(seed)

  def one(size):
    return {
      k: np.float32(size * rng.normal(size=x.shape))
      for k, x in sorted(adapted().params.items())
    }

  return one(1.0), one(size)


def reported(clip_norm, params, delta):
  """What a client sends that has moved its params by a delta."""
  sent = work.Sent({k: jnp.asarray(v) for k, v in params.items()}, {})
  new = {k: sent.params[k] - delta[k] for k in params}
  carry = work.Carry(new, (), jnp.int32(1), {})
  message, _ = job(clip_norm).finish(carry, sent)
  return {k: np.asarray(v) for k, v in message.items()}


def change(params, message):
  """What a message does to all layers, one vector, in float64."""
  out = []
  for pair in rules.pairs_of(adapted().origin):
    a, b = (np.float64(params[k]) for k in (pair.a, pair.b))
    da, db = (np.float64(message[k]) for k in (pair.a, pair.b))
    out.append(pair.scale * (a @ b - (a - da) @ (b - db)))
  return np.concatenate([np.ravel(x) for x in out])


def turned_by(state, seed=3):
  rng, out = np.random.default_rng(seed), dict(state)
  for pair in rules.pairs_of(adapted().origin):
    g = np.diag([0.3, 4.0]) @ np.linalg.qr(rng.normal(size=(2, 2)))[0]
    out[pair.a] = np.float32(state[pair.a] @ g)
    out[pair.b] = np.float32(np.linalg.inv(g) @ state[pair.b])
  return out


@pytest.mark.parametrize("size", [0.01, 0.5, 3.0, 100.0])
def test_what_a_client_does_to_the_model_is_bounded_in_every_gauge(size):
  params, delta = state(0, size)
  plain = reported(None, params, delta)
  got = reported(CLIP, params, delta)
  made = change(params, got)
  assert np.linalg.norm(made) <= CLIP * (1 + 1e-4)
  if np.linalg.norm(change(params, plain)) <= 0.99 * CLIP:
    assert toy.same_bits(got, plain)
  else:  # and it is used, but for what rounding may have taken
    assert np.linalg.norm(made) > 0.98 * CLIP
  # All leaves are scaled alike.
  ratios = np.concatenate([np.ravel(got[k] / plain[k]) for k in got])
  np.testing.assert_allclose(ratios, ratios[0], rtol=1e-5)
  other = reported(CLIP, turned_by(params), turned_by(delta))
  found = change(turned_by(params), other)
  # Deltas are differences of float32 factors of another size in this gauge.
  limit = 2e-3 * np.linalg.norm(made)
  np.testing.assert_allclose(found, made, atol=limit)
  # The control: clipped as factors, the change is another one in this gauge.
  if size >= 0.5:
    raw = [
      change(
        p, cross(links.clip(CLIP), {k: jnp.asarray(v) for k, v in d.items()})[1]
      )
      for p, d in ((params, delta), (turned_by(params), turned_by(delta)))
    ]
    assert np.linalg.norm(raw[0] - raw[1]) > 0.1 * np.linalg.norm(raw[0])


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_what_cannot_be_measured_is_sent_as_zero(value):
  params, delta = state(1, 0.1)
  name = rules.pairs_of(adapted().origin)[0].b
  delta[name] = np.full_like(delta[name], value)
  got = reported(CLIP, params, delta)
  assert all(not np.any(x) for x in got.values())


def test_a_round_of_one_client_moves_the_model_by_the_bound():
  how = fp.fedavg(adapted(), job().local, lowrank=False)
  made = algorithm.extended(how, job=job(0.05))
  playing = toy.Player(made, toy.people(), base=adapted().base, most=1)
  before = {k: v[0] for k, v in playing.start().nodes[0].params.items()}
  after, _ = playing.play([9])
  delta = {k: before[k] - after.nodes[0].params[k][0] for k in before}
  moved = np.linalg.norm(change(before, delta))
  # Reached, since its steps go further, but for what rounding may have taken.
  assert 0.98 * 0.05 <= moved <= 0.05 * (1 + 1e-4)


def test_a_job_without_two_factors_that_are_sent_is_refused():
  pairs = rules.pairs_of(adapted().origin)
  with pytest.raises(ValueError, match="clip_norm"):
    intrinsic.clip_change(job(), pairs, -1.0)
  with pytest.raises(ValueError, match="got 0 adapters"):
    intrinsic.clip_change(job(), (), 1.0)
  own = job()._replace(placement=job().placement | {pairs[0].b: "device"})
  with pytest.raises(ValueError, match="not sent .*lora_b"):
    intrinsic.clip_change(own, pairs, 1.0)
