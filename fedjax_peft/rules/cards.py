"""Explaining: what a rule does, sends and guarantees, in words."""

from collections.abc import Callable

from fedjax_peft import validate
from fedjax_peft.rules import methods
from fedjax_peft.rules import rule as rule_lib

# Every rule, as it is by default.
RULES: dict[str, Callable[[], rule_lib.Rule]] = {
  "fedit": methods.fedit,
  "ffa": methods.ffa,
  "fedsa": methods.fedsa,
  "rolora": methods.rolora,
  "flora": methods.flora,
  "flexlora": methods.flexlora,
  "hetlora": methods.hetlora,
  "fedex": methods.fedex,
  "fair": methods.fair,
  "fedsvd": methods.fedsvd,
  "fedrot": methods.fedrot,
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
    validate.one_of(list(RULES), method=method)
    method = RULES[method]()
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
  ]
  return "\n".join(lines)


def table() -> str:
  """All rules, one line each."""
  head = ["method", *(f.replace("_", " ") for f in _FLAGS), "up", "down"]
  rows = [head]
  for name, make in RULES.items():
    rule = make()
    flags = [_word(getattr(rule, f)) for f in _FLAGS]
    rows.append([name, *flags, rule.up, rule.down])
  widths = [max(len(r[i]) for r in rows) for i in range(len(head))]
  return "\n".join(
    "  ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)).rstrip()
    for row in rows
  )


def _word(flag) -> str:
  """'yes', 'no', or what the flag says."""
  return {True: "yes", False: "no"}.get(flag, flag)
