"""Explaining: what a rule does, sends and guarantees, in words."""

from collections.abc import Callable

from fedjax_peft import validate
from fedjax_peft.rules import averaging, recombining
from fedjax_peft.rules import rule as rule_lib

# Every rule, as it is by default.
RULES: dict[str, Callable[[], rule_lib.Rule]] = {
  "fedit": averaging.fedit,
  "ffa": averaging.ffa,
  "fedsa": averaging.fedsa,
  "rolora": averaging.rolora,
  "flora": recombining.flora,
  "flexlora": recombining.flexlora,
  "hetlora": averaging.hetlora,
  "fedex": recombining.fedex,
  "fair": recombining.fair,
  "fedsvd": recombining.fedsvd,
  "fedrot": averaging.fedrot,
}
# Methods that other parts are put together for, with what they then are.
COMPOSED: dict[str, rule_lib.Rule] = {
  card.name: card
  for card in (
    rule_lib.Rule(
      name="fed_sb",
      formula="A, B from the layer's SVD stay, M <- sum p_i M_i in A M B",
      source="Singhal et al., 2025, arXiv 2502.15436",
      up="R R",
      down="R R",
      exact=True,
      gauge_invariant="fixed",
      heterogeneous_rank=False,
      linear=True,
      write="fp.fedavg on a module from fp.peft.core(module, rank, where)",
    ),
    rule_lib.Rule(
      name="ravan",
      formula="M_h <- sum p_i s_h M_h in sum_h s_h A_h M_h B_h; A_h, B_h stay",
      source="Raje et al., 2025, arXiv 2506.05568",
      up="H R R",
      down="H R R",
      exact=True,
      gauge_invariant="fixed",
      heterogeneous_rank=False,
      linear=True,
      write="fp.fedavg on a module from fp.peft.ravan(module, ...)",
    ),
    rule_lib.Rule(
      name="flasc",
      formula="down: the largest of A, B; up: the largest of what has changed",
      source="Kuo et al., 2024, arXiv 2406.05233",
      up="2 d_up R (K + F)",
      down="2 d_down R (K + F)",
      exact=False,
      gauge_invariant=False,
      heterogeneous_rank=False,
      linear=False,
      write="fp.flasc(model, local, down=0.25, up=0.25)",
    ),
    rule_lib.Rule(
      name="slora",
      formula="rounds of a sparse update dW, then U S V^T = svd(dW): A <- U, "
      "B <- S V^T / s, then fedit",
      source="Babakniya et al., 2023, arXiv 2308.06522",
      up="density K F, then R (K + F)",
      down="density K F, then R (K + F)",
      exact=False,
      gauge_invariant=False,
      heterogeneous_rank=False,
      linear=True,
      write="fp.algorithms.slora(module, loss, local, data, ...), then "
      "fp.fedavg with fedit on the module that it returns",
    ),
  )
}
_FLAGS = ("exact", "gauge_invariant", "heterogeneous_rank", "linear", "rebases")


def explain(method: str | rule_lib.Rule) -> str:
  """Says what a rule does: formula, flags, floats sent, source.

  Args:
    method: a name, or a rule.

  Raises:
    ValueError: if there is no rule of that name.

  Example:
    >>> print(explain("ffa").splitlines()[0])
    ffa: A stays as it was drawn, B <- sum p_i B_i
  """
  if isinstance(method, str):
    validate.one_of([*RULES, *COMPOSED], method=method)
    method = COMPOSED.get(method) or RULES[method]()
  write = method.write or f"fp.fedavg(..., rule=fp.rules.{method.name}())"
  words = {
    "exact": "the model after a round is the mean of the clients' models",
    "gauge_invariant": "the model does not change if a client sends "
    "(A G, G^-1 B)",
    "heterogeneous_rank": "clients may have ranks of their own (trait `rank`)",
    "linear": "works under a secure sum (mask)",
    "rebases": "no server momentum, no error feedback",
  }
  lines = [f"{method.name}: {method.formula}"]
  for flag in _FLAGS:
    lines.append(f"  {flag:19}{_word(getattr(method, flag)):10} {words[flag]}")
  lines += [
    f"  up                 {method.up} floats a layer and client",
    f"  down               {method.down}",
    f"  source             {method.source}",
    f"  write              {write}",
  ]
  return "\n".join(lines)


def table() -> str:
  """All rules, one line each."""
  head = [
    "method",
    *(f.replace("_", " ") for f in _FLAGS),
    "up",
    "down",
    "source",
    "tested by",
  ]
  rows = [head]
  for rule in (*(make() for make in RULES.values()), *COMPOSED.values()):
    flags = [_word(getattr(rule, f)) for f in _FLAGS]
    texts = (rule.up, rule.down, rule.source, f"pytest -k {rule.name}")
    rows.append([rule.name, *flags, *texts])
  widths = [max(len(r[i]) for r in rows) for i in range(len(head))]
  return "\n".join(
    "  ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)).rstrip()
    for row in rows
  )


def _word(flag) -> str:
  """'yes', 'no', or what the flag says."""
  return {True: "yes", False: "no"}.get(flag, flag)
