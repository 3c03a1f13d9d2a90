"""How what clients make of their adapters becomes one adapter.

  algorithm = fp.fedavg(model, local, rule=fp.rules.flexlora())

Every rule declares what it is (`fp.explain(name)`), and tests prove it.
"""

from fedjax_peft.rules.averaging import (
  fedit,
  fedrot,
  fedsa,
  ffa,
  hetlora,
  rolora,
)
from fedjax_peft.rules.cards import COMPOSED, RULES, explain, table
from fedjax_peft.rules.diagnose import watch
from fedjax_peft.rules.heard import Heard, Pair, covariance, mean_product
from fedjax_peft.rules.ranking import compacted, pruned, ranked
from fedjax_peft.rules.recombining import fair, fedex, fedsvd, flexlora, flora
from fedjax_peft.rules.rule import Rule, bind, check, descent, news, pairs_of
from fedjax_peft.rules.start import start

__all__ = [
  "COMPOSED",
  "RULES",
  "Heard",
  "Pair",
  "Rule",
  "bind",
  "check",
  "compacted",
  "covariance",
  "descent",
  "explain",
  "fair",
  "fedex",
  "fedit",
  "fedrot",
  "fedsa",
  "fedsvd",
  "ffa",
  "flexlora",
  "flora",
  "hetlora",
  "mean_product",
  "news",
  "pairs_of",
  "pruned",
  "ranked",
  "rolora",
  "start",
  "table",
  "watch",
]
