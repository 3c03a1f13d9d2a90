"""Protecting: from the `privacy` table of a config to what clients send.

An algorithm gets the links of a private sum in place of its weighted mean, and
its plan counts what that tells. What cannot be accounted is refused.
"""

import functools
import typing
from collections.abc import Callable
from typing import Any

from fedjax_peft import (
  algorithm,
  compose,
  config,
  data,
  drawing,
  ingredients,
  link,
  links,
  objective,
  plan,
  rules,
  schema,
  summing,
  work,
)
from fedjax_peft.links import intrinsic
from fedjax_peft.privacy import (
  banded,
  calibration,
  charging,
  cyclic,
  events,
  examples,
  mechanism,
  securing,
)

EXAMPLE = "example"  # noise in every local step

_OTHERS = 0x9E3779B9  # between the seeds of cohorts that are asked in turn
_WEIGHS = ("weigh", link.COUNT)
# Nobody adds anything up, or nothing is sent.
_NO_SUM = ("centralized", "local_only", "gossip")


def is_private(run: schema.Config) -> bool:
  """Whether a config bounds what a client tells.

  Raises:
    ValueError: if it says how, but not that.
  """
  table = run.privacy
  if table == schema.Privacy():
    return False
  if table.mechanism == "none" and not table.secure:
    raise ValueError(
      "the privacy table must say what protects clients: got neither a "
      "mechanism nor a secure sum; write --set privacy.mechanism=gaussian, or "
      "--set 'privacy.secure={dropout=0.05}'"
    )
  if table.clip_norm is None:
    raise ValueError(
      "privacy.clip_norm is missing: without a bound on what one client says "
      "neither noise nor the grid of a secure sum have a size; write --set "
      "privacy.clip_norm=0.5"
    )
  return True


def protected(
  run: schema.Config,
  population: data.Population,
  model: objective.Model,
  made: algorithm.Algorithm,
  most: int,
) -> tuple[algorithm.Algorithm, mechanism.Mechanism]:
  """The algorithm with a private sum, and what that is.

  Args:
    run: the config.
    population: who there is.
    model: what is trained.
    made: the algorithm without it (but see `by_example`).
    most: clients of a round, at most.

  Raises:
    ValueError: if parts do not fit, or what is released cannot be accounted.
  """
  is_private(run)
  if run.privacy.mechanism == EXAMPLE:
    return made, _of_examples(run, population, made)
  _refuse(run, made)
  before = link.chain(*_before(run), *_framed(run, model))
  spec = link.Spec(ingredients.message(made.work), senders=most)
  found = _mechanism(run, population, before.after(spec))
  low, *rest = made.tiers
  uplink = link.chain(before, found.link)
  how = summing.reduce_of(run, low.reduce)
  link.exchange(uplink, how)  # refuses what is not linear
  tiers = [low._replace(link=uplink, reduce=how), *rest]
  return algorithm.extended(made, tiers=tiers), found


def by_example(
  run: schema.Config,
  model: objective.Model,
  how: work.Local,
  made: algorithm.Algorithm,
  population: data.Population,
) -> algorithm.Algorithm:
  """The algorithm whose local steps hide any one example, if a config says so.

  Args:
    run: the config.
    model: what is trained.
    how: how clients train.
    made: the algorithm of the config.
    population: who there is.

  Raises:
    ValueError: if the algorithm has steps of another kind.
  """
  if run.privacy.mechanism != EXAMPLE:
    return made
  is_private(run)
  plain = run.algorithm.get("name", "fedavg") == "fedavg"
  odd = [
    name
    for name, value in (
      ("algorithm", not plain),
      ("aggregate", run.aggregate != schema.Aggregate()),
      ("attack", bool(run.attack)),
      ("split", run.split != schema.Split()),
      ("privacy.secure", bool(run.privacy.secure)),
    )
    if value
  ]
  if odd:
    raise ValueError(
      "steps that hide any one example are those of plain fedavg: got "
      f"privacy.mechanism='{EXAMPLE}' beside '{odd[0]}'; leave one of them out"
    )
  job = examples.train(
    model,
    how,
    clip_norm=typing.cast(float, run.privacy.clip_norm),
    multiplier=_multiplier(
      run, lambda z: _of_examples(run, population, made, z)
    ),
    rules=compose.placement_of(run),
    proximal=run.client.proximal,
  )
  return algorithm.extended(made, job=job)


def _of_examples(run, population, made, multiplier=None):
  """What local steps tell of one example."""
  if multiplier is None:
    multiplier = _multiplier(
      run, lambda z: _of_examples(run, population, made, z)
    )
  norm = run.privacy.clip_norm
  sizes = population.train.sizes
  smallest = int(sizes[sizes > 0].min(initial=1))
  each = examples.participations(made.work.local, 1, smallest=smallest)
  about = (
    f"The gradient of one example is clipped to {norm:g}; noise of std "
    f"{multiplier * norm:.6g} is added to the sum of each batch, which is "
    "divided by the batch size that was planned.",
    f"An example is visited {each} times a round at most; no shuffling is "
    "taken for sampling.",
  )
  return mechanism.Mechanism(
    made.tiers[0].link,
    examples.event(multiplier),
    norm,
    multiplier * norm,
    None,
    about,
    each=each,
  )


def _mechanism(
  run: schema.Config, population: data.Population, spec: link.Spec
) -> mechanism.Mechanism:
  """The private sum of messages."""
  table = run.privacy
  norm: Any = table.clip_norm
  clip = links.clip(norm)
  if table.adaptive:
    where = "privacy.adaptive"
    clip = config.call(links.adaptive_clip, table.adaptive, where, start=norm)
  drawn = drawing.drawn(run, population)
  kind: Any = table.mechanism
  noise = links.noise
  if kind == "banded":
    bands = table.bands or run.cohort.period
    cyclic.check(drawing.cycle_of(run, population), bands)
    if table.secure:
      raise ValueError(
        "a round that fails would break the noise of the rounds after it: got "
        "privacy.mechanism='banded' with a secure sum; use gaussian"
      )
    how = banded.strategy(run.rounds, min(bands, run.rounds))
    kind, noise = "gaussian", functools.partial(banded.noise, how)
  if kind in ("discrete_gaussian", "skellam") and drawn.varies:
    raise ValueError(
      "noise by every client is enough for a cohort of known size: got "
      f"cohort.sampler={run.cohort.sampler!r}; write --set "
      "cohort.sampler=uniform"
    )

  def made(multiplier):
    found = mechanism.mechanism(
      spec,
      clip=clip,
      total=float(drawn.expected * table.max_weight),
      kind=kind,
      multiplier=multiplier,
      event=drawn.event,
      max_weight=table.max_weight,
      secure=summing.secure_of(run, spec.senders) if table.secure else None,
      noise=noise,
    )
    period = drawn.period if kind == "gaussian" else 1
    return found._replace(period=period)

  if kind == "none":
    return made(0.0)
  if drawn.event is None and kind == "gaussian":
    raise ValueError(drawn.why)
  return made(_multiplier(run, made))


def counted(
  run: schema.Config,
  made: algorithm.Algorithm,
  cohort: plan.Plan,
  found: mechanism.Mechanism,
  again: Callable[[int], plan.Plan] | None = None,
) -> plan.Plan:
  """The plan, whose records say who was lost and what is spent.

  Args:
    run: the config.
    made: the algorithm with its private sum.
    cohort: who takes part.
    found: the private sum.
    again: seed -> another plan, which a round whose secure sum failed asks;
      None where nobody else can be asked.
  """
  if run.privacy.secure:
    how = summing.sum_of(run)
    if how.retries and again is None:
      raise ValueError(
        "a round of a simulated network that fails is over: got "
        f"privacy.secure.retries={how.retries}; leave it out"
      )
    others = [
      again(run.seed + _OTHERS * (i + 1)) for i in range(how.retries) if again
    ]
    traits = dict.fromkeys(made.work.traits, 0.0)
    size = made.bytes(cohort.most, traits=traits, round=0)
    low = made.tiers[0].name
    cohort = securing.secured(
      cohort,
      how.wanted,
      seed=run.seed,
      again=others,
      wires=(size[f"{low}/up_bytes"], size[f"{low}/down_bytes"]),
      fewest=found.fewest,
    )
  if found.event is None:
    return cohort
  return charging.charged(
    cohort,
    found.event,
    run.privacy.delta,
    accountant=run.privacy.accountant,
    count=found.count,
    # Of a secure sum that failed nothing is known.
    releases=lambda turn: bool(turn.clients.size or not run.privacy.secure),
  )


def _before(run: schema.Config) -> list[link.Link]:
  """Links of the config at the left of the private sum."""
  if run.uplink == compose.PLAIN.uplink:
    return []
  chain = compose.chain_of(run.uplink, "uplink")
  for part in link.parts_of(chain):
    if part.name in _WEIGHS:
      raise ValueError(
        f"'{part.name}' divides by the weight of those who came, so that one "
        "client moves what all others said: leave it out of uplink, the "
        "private sum weighs itself (privacy.max_weight)"
      )
  return [chain]


def _framed(run: schema.Config, model: objective.Model) -> list[link.Link]:
  """What measures an adapter by what it changes in its layer, if asked for."""
  if run.privacy.metric == "factors":
    return []
  rule = compose.rule_of(run)
  if rule is None or rule.name != "ffa":
    raise ValueError(
      "a message tells what it changes in a product only where the other "
      "factor stays as it is: got privacy.metric='product' with aggregate.rule="
      f"{run.aggregate.rule}; write --set 'aggregate.rule={{method=\"ffa\"}}'"
    )
  pairs = rules.bind(rule, model).pairs
  frames = {pair.b: pair.scale * model.params[pair.a] for pair in pairs}
  return [intrinsic.frame(frames)]


def _refuse(run: schema.Config, made: algorithm.Algorithm) -> None:
  """Raises ValueError for what has no private sum."""
  name = run.algorithm.get("name", "fedavg")
  if name in _NO_SUM:
    raise ValueError(
      f"algorithm '{name}' adds nothing up at a server that could be private; "
      "leave the privacy table out"
    )
  if len(made.tiers) > 1 or made.tiers[0].size > 1:
    raise ValueError(
      "a private sum has one receiver: got the tiers "
      f"{[(t.name, t.size) for t in made.tiers]}; use an algorithm with a "
      "cloud only"
    )
  if made.tiers[0].mix is not None or run.split.ends or run.split.cuts:
    what = "late reports" if made.tiers[0].mix is not None else "activations"
    raise ValueError(
      f"{what} tell the server more than the private sum does, and are not "
      "accounted; leave the privacy table out"
    )


def _multiplier(
  run: schema.Config, made: Callable[[float], mechanism.Mechanism]
) -> float:
  """The noise that the config says, or the least that keeps to its epsilon."""
  table = run.privacy
  if (table.multiplier is None) == (table.epsilon is None):
    raise ValueError(
      "noise is said by its multiplier, or by the epsilon of the whole run: "
      f"got privacy.multiplier={table.multiplier} and "
      f"privacy.epsilon={table.epsilon}; write one of the two"
    )
  if table.epsilon is None:
    return typing.cast(float, table.multiplier)

  def event(multiplier):
    return typing.cast(events.Event, made(multiplier).event)

  times = made(1.0).count(run.rounds)
  return calibration.least(
    event, table.epsilon, table.delta, times, table.accountant
  )
