"""Federated fine-tuning of foundation models, simulated at full speed.

import fedjax_peft as fp
"""

from fedjax_peft import data, evaluate, losses, models, peft, reduce
from fedjax_peft import sampling as sample
from fedjax_peft.algorithm import Algorithm, federated
from fedjax_peft.alias import (
  fedadagrad,
  fedadam,
  fedavg,
  fedavgm,
  fedprox,
  fedsgd,
  fedyogi,
)
from fedjax_peft.evaluate import evaluation
from fedjax_peft.executor import Cohort
from fedjax_peft.hierarchy import Tier, tier
from fedjax_peft.link import (
  Context,
  Link,
  Roster,
  Spec,
  broadcast,
  chain,
  cut,
  exchange,
)
from fedjax_peft.links import clip, fixed_point, int8, weigh
from fedjax_peft.objective import Model, model
from fedjax_peft.reduce import Reduce
from fedjax_peft.rounds import Outcome, State
from fedjax_peft.runner import Record, run
from fedjax_peft.sampling import Sampler
from fedjax_peft.settings import Settings, choose
from fedjax_peft.vectorize import for_each_client
from fedjax_peft.work import Batch, Local, Sent, Work, gradient, local, train

__version__ = "0.1.0"

__all__ = [
  "Algorithm",
  "Batch",
  "Cohort",
  "Context",
  "Link",
  "Local",
  "Model",
  "Outcome",
  "Record",
  "Reduce",
  "Roster",
  "Sampler",
  "Sent",
  "Settings",
  "Spec",
  "State",
  "Tier",
  "Work",
  "broadcast",
  "chain",
  "choose",
  "clip",
  "cut",
  "data",
  "evaluate",
  "evaluation",
  "exchange",
  "fedadagrad",
  "fedadam",
  "fedavg",
  "fedavgm",
  "federated",
  "fedprox",
  "fedsgd",
  "fedyogi",
  "fixed_point",
  "for_each_client",
  "gradient",
  "int8",
  "local",
  "losses",
  "model",
  "models",
  "peft",
  "reduce",
  "run",
  "sample",
  "tier",
  "train",
  "weigh",
]
