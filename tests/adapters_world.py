"""A server and clients with low-rank adapters, without any training.

Clients hold factors that were drawn at random; what the server makes of them
is compared with what it should be, worked out in float64.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_peft import reduce, work
from fedjax_peft.links import Counted
from fedjax_peft.rules import heard, rule

LAYER = "block/query"
PAIR = heard.Pair(LAYER, 2.0)
K, F, R = 12, 7, 3
WEIGHTS = (5, 1, 8, 2, 4)


class World(NamedTuple):
  """What the server sent, what clients hold, and how much they count."""

  params: dict[str, np.ndarray]
  clients: dict[str, np.ndarray]
  weights: np.ndarray


def world(seed=0, weights=WEIGHTS, shape=(K, F, R), start=True, square=False):
  """Clients that have moved from what they were sent.

  Args:
    seed: of all draws.
    weights: of the clients.
    shape: (K, F, R).
    start: whether B was zero when it was sent.
    square: K = F.
  """
  rng = np.random.default_rng(seed)
  k, f, r = shape
  f = k if square else f
  params = {
    PAIR.a: rng.normal(size=(k, r)),
    PAIR.b: np.zeros((r, f)) if start else rng.normal(size=(r, f)),
    PAIR.residual: np.zeros((k, f)),
    "head/bias": rng.normal(size=(4,)),
  }
  C = len(weights)
  clients = {
    name: params[name] + 0.3 * rng.normal(size=(C, *params[name].shape))
    for name in (PAIR.a, PAIR.b, "head/bias")
  }
  return World(
    {n: x.astype(np.float32) for n, x in params.items()},
    {n: x.astype(np.float32) for n, x in clients.items()},
    np.array(weights, np.int32),
  )


_COMPILED: dict[tuple, tuple] = {}


def _server(one: rule.Rule, places: int, pieces: int):
  """What a rule does with the reports of `places` clients, compiled once."""
  key = (id(one), places, pieces)
  if key not in _COMPILED:  # the rule is kept, so that its id stays its own
    _COMPILED[key] = (one, _compile(one, places, pieces))
  return _COMPILED[key][1]


def _compile(one, places, pieces):
  """Compiles it."""
  pairs = (PAIR,)
  server = optax.sgd(1.0)
  if one.server is not None:
    server = optax.chain(one.server(pairs), server)
  collect = (
    reduce.sum() if one.linear else heard.hear(pairs, one_by_one=one.one_by_one)
  )

  @jax.jit
  def run(params, clients, weights, number):
    delta = {k: params[k][None] - x for k, x in clients.items()}
    present = weights > 0
    if one.linear:
      share = weights / jnp.maximum(weights.sum(), 1)
      share = share.astype(jnp.float32)
      message = {k: jnp.tensordot(share, x, 1) for k, x in delta.items()}
      message = {k: jnp.zeros_like(v) for k, v in params.items()} | message
    else:
      spec = Counted(
        {
          k: jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
          for k, x in delta.items()
        },
        jax.ShapeDtypeStruct((), jnp.int32),
      )
      acc = collect.init(spec, places)
      for part in np.array_split(np.arange(places), pieces):
        rows = jax.tree.map(lambda x, p=part: x[p], Counted(delta, weights))
        acc = collect.update(acc, rows, present[part])
      message = collect.finalize(acc)
    state = server.init(params)
    state = jax.tree.map(lambda x: x + number.astype(x.dtype), state)
    updates, _ = server.update(message, state, params)
    return optax.apply_updates(params, updates), message

  return run


def aggregate(one: rule.Rule, here: World, *, number=0, pieces=2):
  """(params after the round, what was heard)."""
  run = _server(one, len(here.weights), pieces)
  new, message = run(here.params, here.clients, here.weights, jnp.int32(number))
  return jax.device_get(new), jax.device_get(message)


def model(params) -> np.ndarray:
  """What is added to the layer's kernel, float64 [K, F]."""
  a, b = (params[n].astype(np.float64) for n in (PAIR.a, PAIR.b))
  return PAIR.scale * a @ b + params[PAIR.residual].astype(np.float64)


def mean_model(here: World) -> np.ndarray:
  """The mean of what clients add to the kernel, float64."""
  share = here.weights / here.weights.sum()
  a, b = (here.clients[n].astype(np.float64) for n in (PAIR.a, PAIR.b))
  total = np.einsum("c,ckr,crf->kf", share, a, b)
  return PAIR.scale * total + here.params[PAIR.residual]


def regauged(here: World, seed=1, rotations=False) -> World:
  """The same clients, with factors (A G, G^-1 B)."""
  rng = np.random.default_rng(seed)
  a, b = here.clients[PAIR.a].copy(), here.clients[PAIR.b].copy()
  for i in range(len(a)):
    # Well conditioned, so that nothing is lost to rounding.
    g, _ = np.linalg.qr(rng.normal(size=(a.shape[-1],) * 2))
    if not rotations:
      g = g @ np.diag(rng.uniform(0.5, 2, a.shape[-1]))
    a[i], b[i] = a[i] @ g, np.linalg.inv(g) @ b[i]
  return here._replace(clients=here.clients | {PAIR.a: a, PAIR.b: b})


def only(here: World, one: rule.Rule, number=0) -> World:
  """Clients that have trained only what the rule lets them."""
  clients = dict(here.clients)
  still = set()
  if one.active is not None:
    now = work.Moment(np.int32(number), np.int32(0), {})
    still |= {n for n in clients if not one.active(n, now)}
  for regex, label in one.placement.items():
    if label in ("frozen", "served"):
      still |= {n for n in clients if n.endswith(regex.removeprefix(".*"))}
  for name in still:
    clients[name] = np.broadcast_to(
      here.params[name], clients[name].shape
    ).copy()
  return here._replace(clients=clients)


def error(found, wanted) -> float:
  """Relative Frobenius distance."""
  return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
