"""Evaluation: how good the model is, for everyone and for the worst off.

Metrics are numerators and denominators per example; they are added up per
client and over all, so a pooled accuracy and the mean over clients both come
from the same numbers.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_peft import algorithm as algorithm_lib
from fedjax_peft import data as data_lib
from fedjax_peft import (
  executor,
  objective,
  placement,
  validate,
  vectorize,
  work,
)
from fedjax_peft import rounds as round_lib
from fedjax_peft import settings as settings_lib
from fedjax_peft.data import schedule

Scores = dict[str, tuple[np.ndarray, np.ndarray]]


class Report(NamedTuple):
  """What an evaluation found.

  Attributes:
    record: {name: number}, for the round's record.
    clients: {column: array [N']}, one entry for every client evaluated.
  """

  record: dict[str, float]
  clients: dict[str, np.ndarray]


def evaluation(
  algorithm: algorithm_lib.Algorithm,
  model: objective.Model,
  data: data_lib.Population,
  *,
  batch: int = 16,
  clients: int | None = None,
  settings: settings_lib.Settings | None = None,
  central: Callable[[dict, dict], Mapping[str, float]] | None = None,
  personalize: work.Local | None = None,
) -> Callable[[round_lib.State], Report]:
  """Evaluates a state on held-out data, client by client.

  Every client is tested on its own held-out examples, with the model that the
  algorithm makes of what it is sent and of what lives on it (`Work.view`);
  clients never trained on, of which nothing but initial values lives anywhere,
  are reported apart (`unseen/...`), and so is the central test set
  (`test/...`) where all use the same model.

  Args:
    algorithm: whose placement says what is personal.
    model: loss and metrics.
    data: the population.
    batch: examples evaluated at once on a device.
    clients: test so many clients, always the same ones, spread evenly over
      the population, and leave the central test set out; None tests all.
    settings: devices and lanes.
    central: more numbers about the model at the top, (params, base) ->
      {name: number}, recorded as `central/name`.
    personalize: also tests every client after it has trained on its own
      examples like this, starting from what it holds; recorded as
      `personal/...` and `personal_unseen/...`.

  Returns:
    (state) -> Report. With `x` the metric: `eval/x` pooled over seen clients,
    `eval/x_mean`, `_median`, `_worst10` (mean of the worst tenth of clients),
    `_std` and `_jain` (Jain's index, in [1/n, 1]) over clients.
  """
  validate.at_least(1, batch=batch)
  here = settings_lib.Settings("shard_map", len(jax.devices()), 1, 1, 16)
  settings = here if settings is None else settings
  tested = np.flatnonzero(data.heldout.sizes > 0)
  if clients is not None and clients < tested.size:
    tested = tested[
      np.linspace(0, tested.size - 1, clients).round().astype(int)
    ]
  heldout = data.heldout if clients is None else _only(data.heldout, tested)
  tiers, view = algorithm.tiers, algorithm.work.view
  # What the top holds for all.
  shared = (tiers[-1].name, placement.FROZEN, placement.SERVED)
  labels = algorithm.work.placement
  owned = [
    k
    for k in _read(view, algorithm.work.params, model.params)
    if labels.get(k, tiers[-1].name) not in shared
  ]
  score = scorer(model, data.examples, settings, batch)
  central_rows = data.test if clients is None else data.test[:0]
  # Clients may share examples with each other and with the central test set.
  unique, place = np.unique(
    np.concatenate([heldout.rows, central_rows]), return_inverse=True
  )
  held = heldout.rows.size
  if personalize is not None:
    tune = _tune(model, personalize, owned, view)
    tuning = vectorize.compiled(tune, settings)

  @functools.cache
  def prepared(personal: bool) -> tuple[work.Work, Callable]:
    """The job and its program: testing, of whole models where personalized."""
    if personal:
      job = _test(model, sorted(model.params.keys() - model.served), batch)
    else:
      job = _test(model, owned, batch, view)
    return job, vectorize.compiled(job, settings)

  def of_clients(state):
    """Rows [N, ...] of the leaves that live on a client or at its edge."""
    local = {k: v for k, v in state.clients.local.items() if k in owned}
    edge = state.plan.get("nodes", np.arange(len(data)) % tiers[0].size)
    for node, tier in zip(state.nodes, tiers[:-1], strict=False):
      at = edge * tier.size // tiers[0].size
      for name in set(node.params) & set(owned) - set(local):
        local[name] = np.asarray(node.params[name])[at]
    return local

  def each(job, step, state, local, rows):
    return vectorize.for_each_client(
      job,
      data,
      tested,
      params=state.params,
      base=model.base,
      local=local,
      rows=rows,
      settings=settings,
      step=step,
    )

  def on_clients(state, local, personal=False) -> Scores:
    return each(*prepared(personal), state, local, heldout)[1]

  def after_training(state) -> Scores:
    tuned, _ = each(tune, tuning, state, of_clients(state), data.train)
    local = {
      k: np.zeros((len(data), *v.shape[1:]), v.dtype) for k, v in tuned.items()
    }
    for name, rows in tuned.items():
      local[name][tested] = rows
    return on_clients(state, local, personal=True)

  def run(state) -> Report:
    record: dict[str, float] = {}
    if owned:
      scores = on_clients(state, of_clients(state))
    else:
      found = score(view(state.params), model.base, unique)
      found = jax.tree.map(lambda x: x[place], found)
      mine = jax.tree.map(lambda x: x[:held], found)
      scores = per_client(mine, heldout, tested)
      record |= {
        f"test/{k}": float(t[held:].sum() / max(b[held:].sum(), 1))
        for k, (t, b) in found.items()
        if central_rows.size
      }
    tables = {"": scores}
    if personalize is not None:
      tables["personal"] = after_training(state)
    seen = data.seen[tested]
    columns = {"client": tested, "seen": seen}
    for name, table in tables.items():
      for prefix, which in (
        (name or "eval", seen),
        (f"{name}_unseen" if name else "unseen", ~seen),
      ):
        part = {k: (t[which], b[which]) for k, (t, b) in table.items()}
        record |= spread(prefix, part)
      columns |= {
        f"{name}{'/' if name else ''}{k}/{end}": x
        for k, pair in table.items()
        for end, x in zip(("numerator", "denominator"), pair, strict=True)
      }
    if central is not None:
      more = central(state.params, model.base)
      record |= {f"central/{k}": float(v) for k, v in more.items()}
    return Report(record, columns)

  return run


def scorer(
  model: objective.Model,
  examples: Mapping[str, Any],
  settings: settings_lib.Settings,
  batch: int,
) -> Callable[[dict, Any, np.ndarray], Scores]:
  """Compiles the metrics of single examples.

  Returns:
    (params, base, rows int [R]) -> {name: (numerator [R], denominator [R])},
    float32 numpy arrays; `loss` is among them.
  """
  over = executor.over(settings_lib.mesh_of(settings))
  devices = settings.devices
  resident = settings_lib.everywhere(dict(examples), settings)

  def one(shared, rows):
    params, base, examples, number = shared
    params, base = model.fold(params, base)

    def scores(rows):
      taken = {k: v[rows] for k, v in examples.items()}
      each, metrics, _ = model.loss(params, base, taken, jax.random.key(0))
      metrics = {"loss": (each, jnp.ones_like(each)), **metrics}
      return jax.tree.map(jnp.float32, metrics)

    like = jax.eval_shape(scores, rows[0])
    out = jax.tree.map(
      lambda x: jnp.zeros((rows.shape[0], *x.shape), x.dtype), like
    )
    return jax.lax.fori_loop(
      0,
      number,
      lambda s, out: jax.tree.map(
        lambda o, x: o.at[s].set(x), out, scores(rows[s])
      ),
      out,
    )

  @jax.jit
  def run(params, base, examples, rows, number):
    return over.split(one)((params, base, examples, number), rows)

  def score(params, base, rows):
    rows = np.asarray(rows, np.int32)
    steps = -(-rows.size // (devices * batch))
    room = schedule.bucket(max(steps, 1))
    seats = np.zeros((devices, room, batch), np.int32)
    flat = np.zeros(devices * steps * batch, np.int32)
    flat[: rows.size] = rows
    seats[:, :steps] = flat.reshape(devices, steps, batch)
    found = run(params, base, resident, seats, np.int32(steps))
    return jax.tree.map(
      lambda x: np.asarray(x)[:, :steps].reshape(-1)[: rows.size], found
    )

  return score


def per_client(
  scores: Scores, rows: data_lib.Ragged, clients: np.ndarray
) -> Scores:
  """Adds the metrics of single examples up per client.

  Args:
    scores: one entry for each of `rows.rows`.
    rows: whose examples they are.
    clients: int [C], the clients wanted.
  """

  def add(x):
    total = np.bincount(rows.owner, weights=x, minlength=len(rows))
    return total[clients].astype(np.float32)

  return jax.tree.map(add, scores)


def spread(prefix: str, scores: Scores) -> dict[str, float]:
  """Summarizes per-client metrics: pooled, mean, median, worst tenth, Jain.

  The worst tenth is the mean over the ceil(n / 10) clients with the lowest
  value (for `loss`, the highest).
  """
  record = {}
  for name, (top, bottom) in scores.items():
    counted = bottom > 0
    if not counted.any():
      continue
    top, bottom = top[counted].astype(np.float64), bottom[counted]
    value = np.sort(top / bottom)
    n = value.size
    tail = value[::-1] if name.endswith("loss") else value
    squares = float(np.sum(value**2))
    record |= {
      f"{prefix}/{name}": float(top.sum() / bottom.sum(dtype=np.float64)),
      f"{prefix}/{name}_mean": float(value.mean()),
      f"{prefix}/{name}_median": float(np.median(value)),
      f"{prefix}/{name}_worst10": float(tail[: -(-n // 10)].mean()),
      f"{prefix}/{name}_std": float(value.std()),
    }
    if not name.endswith("loss"):
      jain = float(value.sum() ** 2 / (n * squares)) if squares else 1.0
      record[f"{prefix}/{name}_jain"] = jain
  return record


def _only(rows: data_lib.Ragged, clients: np.ndarray) -> data_lib.Ragged:
  """The rows of some clients; the others have none."""
  wanted = np.isin(np.arange(len(rows)), clients)
  none = np.zeros(0, np.int32)
  return data_lib.Ragged.of(
    [mine if wanted[i] else none for i, mine in enumerate(rows)]
  )


def _read(view: Callable, params: dict, wanted: Iterable[str]) -> list[str]:
  """Names of the leaves from which a view makes those of the model."""

  def made(params):
    seen = view(params)
    return {k: seen[k] for k in wanted}

  names = sorted(params)  # as jax flattens a dict
  jaxpr = jax.make_jaxpr(made)(dict(params)).jaxpr
  used = {id(x) for x in jaxpr.outvars}
  used |= {id(x) for step in jaxpr.eqns for x in step.invars}
  inputs = zip(names, jaxpr.invars, strict=True)
  return [name for name, x in inputs if id(x) in used]


def _same(params: dict) -> dict:
  """The view of a client whose model is what it holds."""
  return params


def _test(
  model: objective.Model, owned: list, batch: int, view: Callable = _same
) -> work.Work:
  """Testing as a job: the metrics are its stats, and nothing is reported."""

  def init(sent, base, local, client):
    return {k: local[k] for k in owned}

  def step(carry, sent, base, batch):
    params = view(sent.params | carry)
    each, metrics, _ = model.loss(params, base, batch.examples, batch.key)
    metrics = {"loss": (each, jnp.ones_like(each)), **metrics}
    return carry, work.masked_metrics(batch.mask, metrics)

  def finish(carry, sent):
    return {}, {}

  how = work.local(optax.identity(), batch=batch, shuffle=False)
  return work.Work(init, step, finish, model.params, {}, how)


def _tune(
  model: objective.Model, how: work.Local, owned: list, view: Callable
) -> work.Work:
  """Training as a job whose message is the client's own parameters."""
  job = work.train(model, how, rules={".*": placement.DEVICE}, tiers=("cloud",))

  def init(sent, base, local, client):
    seen = view(sent.params | {k: local[k] for k in owned})
    start = {k: v for k, v in seen.items() if k in model.params}
    return job.init(sent, base, start, client)

  def finish(carry, sent):
    return job.finish(carry, sent)[1], {}

  return job._replace(init=init, finish=finish)
