"""Diagnostics: what aggregating adapters does to them, every round.

What averaging factors leaves out is their covariance, known exactly from the
reports (see `heard`). Everything here is made of Gram matrices and small
decompositions, so that it can be left on.
"""

import jax
import jax.numpy as jnp

from fedjax_peft import linalg
from fedjax_peft.rules import heard as heard_lib
from fedjax_peft.rules import product
from fedjax_peft.rules import rule as rule_lib

_CLIENTS = 16  # of whom angles are taken


def watch(pairs: rule_lib.Pairs):
  """Makes a `Tier.watch` for adapters of which both factors travel.

  Args:
    pairs: the adapters.

  Returns:
    (message, params) -> {name: scalar}, of the weighted means over clients:
    `lora/effective_rank` of mean A mean B (mean over layers); and where the
    reports were heard one by one or as products
    `lora/covariance_error`, |sum p A_i B_i - mean A mean B| over the norm of
    sum p A_i B_i; `lora/residual_rank`, numerical rank of that covariance;
    and where factors were kept one by one, among the first 16 clients,
    `lora/angle`, largest principal angle between the ranges of two clients' A,
    in degrees; `lora/gauge_drift`, how far a client's factors are turned
    against what it was sent, |Q - I| / (2 sqrt(R)) of the Procrustes rotation.
  """

  def one(message, params):
    mean = rule_lib.means(message)
    found: dict[str, list] = {}

    def say(name, value):
      found.setdefault(f"lora/{name}", []).append(jnp.mean(value))

    errors, totals = [], []
    for pair in pairs:
      if pair.a not in params or pair.b not in params:
        continue  # a factor that never changes, or that clients keep
      a = params[pair.a] - mean.get(pair.a, 0)
      b = params[pair.b] - mean.get(pair.b, 0)
      both = product.stack(a, b)
      say("effective_rank", product.effective_rank(product.values(both)))
      if not isinstance(message, heard_lib.Heard):
        continue
      left_out = heard_lib.covariance(message, pair)
      whole = heard_lib.mean_product(message, pair, params)
      errors.append(jnp.sum(jnp.square(product.norm(left_out))))
      totals.append(jnp.sum(jnp.square(product.norm(whole))))
      say("residual_rank", product.rank_of(product.values(left_out), 1e-3))
      if pair.a in message.rows:
        angle, drift = _between(pair, params, message)
        say("angle", angle)
        say("gauge_drift", drift)
    if errors:
      error, total = sum(errors), sum(totals)
      ratio = jnp.sqrt(error / jnp.where(total > 0, total, 1))
      say("covariance_error", jnp.where(total > 0, ratio, 0))
    return {k: jnp.mean(jnp.stack(v)) for k, v in found.items()}

  return one


def _between(pair, params, heard):
  """(mean largest angle between two clients [deg], mean drift of a client)."""
  a, b = (x[:_CLIENTS] for x in heard_lib.factors(heard, pair, params))
  here = heard.weights[:_CLIENTS] > 0
  q, _ = linalg.basis(a)
  across = jnp.einsum("c...kr,d...ks->cd...rs", q, q, precision="highest")
  cosine = linalg.singular_values(across)[..., -1]
  angle = jnp.degrees(jnp.arccos(jnp.clip(cosine, 0, 1)))
  angle = angle.reshape(*angle.shape[:2], -1).mean(-1)
  others = here[:, None] & here[None] & ~jnp.eye(here.size, dtype=bool)
  turned = jax.vmap(product.turn, (0, 0, None, None))(
    a, b, params[pair.a], params[pair.b]
  )
  R = turned.shape[-1]
  off = jnp.sum(jnp.square(turned - product.eye_like(turned)), (-2, -1))
  drift = jnp.sqrt(off) / (2 * R**0.5)
  drift = drift.reshape(here.size, -1).mean(-1)
  return _mean(angle, others), _mean(drift, here)


def _mean(values, where):
  """Mean over the entries that count; zero if there are none."""
  total = jnp.sum(jnp.where(where, values, 0))
  count = jnp.sum(where).astype(jnp.float32)
  return total / jnp.maximum(count, 1)
