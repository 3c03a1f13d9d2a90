"""Algorithms: known ways to federate, each a few leaves and a few lines more.

Every one is a function (model, local, *, ...) -> Algorithm. What it remembers
or sends beside the model is leaves, so it crosses the links and is counted.
"""

from fedjax_peft.algorithms.adapters import feddpa, hilora
from fedjax_peft.algorithms.baseline import centralized, local_only, pooled
from fedjax_peft.algorithms.clusters import clustered, ifca
from fedjax_peft.algorithms.contrast import moon
from fedjax_peft.algorithms.delayed import fedasync, fedbuff
from fedjax_peft.algorithms.drift import feddyn, fednova, mime_lite, scaffold
from fedjax_peft.algorithms.edges import hierarchical
from fedjax_peft.algorithms.fairness import afl, qffl
from fedjax_peft.algorithms.meta import per_fedavg, reptile
from fedjax_peft.algorithms.nearness import by_example
from fedjax_peft.algorithms.partial import fedper, fedrep
from fedjax_peft.algorithms.peers import gossip
from fedjax_peft.algorithms.personal import apfl, ditto, pfedme
from fedjax_peft.algorithms.similarity import find_nodes
from fedjax_peft.algorithms.stacked import mix
from fedjax_peft.algorithms.twostage import slora
from fedjax_peft.peft.stacked import stack

__all__ = [
  "afl",
  "apfl",
  "by_example",
  "centralized",
  "clustered",
  "ditto",
  "fedasync",
  "fedbuff",
  "feddpa",
  "feddyn",
  "fednova",
  "fedper",
  "fedrep",
  "find_nodes",
  "gossip",
  "hierarchical",
  "hilora",
  "ifca",
  "local_only",
  "mime_lite",
  "mix",
  "moon",
  "per_fedavg",
  "pfedme",
  "pooled",
  "qffl",
  "reptile",
  "scaffold",
  "slora",
  "stack",
]
