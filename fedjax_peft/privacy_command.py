"""The command `privacy`: what a config's run will tell about one client."""

import argparse

from fedjax_peft import build, config, console, protecting, schema, summing
from fedjax_peft.privacy import accounting, events, mechanism, ranges


def show(options: argparse.Namespace, alone: bool) -> int:
  """fedjax-peft privacy."""
  run = config.load(options.config, options.set)
  if not protecting.is_private(run):
    raise ValueError(
      "this config says nothing of privacy: write --set "
      "privacy.mechanism=gaussian --set privacy.clip_norm=0.5 --set "
      "privacy.epsilon=4"
    )
  parts = build.build(run)
  found: mechanism.Mechanism = parts.private
  rows = {"a message crosses": parts.algorithm.tiers[0].link.name}
  rows |= {"mechanism": run.privacy.mechanism}
  rows |= {"sensitivity": f"{found.sensitivity:.6g} (L2, of the sum)"}
  console.say(console.facts(rows), *found.about)
  if found.event is not None:
    console.say("", console.facts(_spent(run, found.event, found)))
  if run.privacy.secure:
    console.say("", *summing.about(run, parts.cohort.most))
  if found.plan is not None:
    console.say("", console.facts(_range(found.plan)), *found.plan.proof)
  return 0


def _spent(
  run: schema.Config, event: events.Event, found: mechanism.Mechanism
) -> dict[str, str]:
  """Epsilon of the whole run, by each accountant that knows it."""
  delta = run.privacy.delta
  rows = {
    "a round": str(event),
    "neighbours": events.neighbours(event),
    "noise": f"std {found.std:.6g}, {found.std / found.sensitivity:.6g} of the "
    "sensitivity",
  }
  known: list[accounting.Accountant] = ["rdp"]
  if isinstance(event, events.Poisson):
    known.append("pld")
  marks = sorted({1, max(run.rounds // 10, 1), run.rounds})
  for by in known:
    told = []
    for n in marks:
      times = found.count(n)
      epsilon = accounting.epsilon(event, delta, rounds=times, accountant=by)
      told.append(f"{epsilon:.4f} after {n}")
    rows[f"epsilon at {delta:g}, {by}"] = ", ".join(told)
  return rows


def _range(plan: ranges.Plan) -> dict[str, str]:
  """The grid of a secure sum."""
  return {
    "modulus": f"2^{plan.bits}",
    "grid": f"{plan.levels} steps of {plan.step:.6g} to the bound",
    "largest sum": f"{plan.largest} of {plan.capacity}",
    "can wrap": f"with probability {plan.failure:g}, by {plan.bound}",
  }
