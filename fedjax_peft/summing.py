"""Summing: the secure sum that a config asks for."""

import math
from typing import Literal, NamedTuple

from fedjax_peft import config, links, reduce, schema, validate
from fedjax_peft.privacy import conversing, degree, dropout, keys, mechanism


class Sum(NamedTuple):
  """The secure sum of a config.

  Attributes:
    wanted: what may happen in a round.
    mode: "protocol" has clients and server say every message.
    retries: how many other cohorts are asked where a sum failed.
    bits: of the modulus.
    rotation: values that are rotated together; None: no rotation.
    failure: probability of a wrap that is accepted.
  """

  wanted: dropout.Risk
  mode: Literal["simulated", "protocol"]
  retries: int
  bits: int | None
  rotation: int | None
  failure: float


def sum_of(run: schema.Config) -> Sum:
  """What the secure sum of a config is like."""

  def secure(
    *,
    dropout: float = 0.05,
    corrupt: float = 0.1,
    security: float = 2**-40,
    correctness: float = 2**-20,
    lying: bool = False,
    mode: Literal["simulated", "protocol"] = "simulated",
    retries: int = 0,
    bits: int | None = None,
    rotation: int | None = None,
    failure: float = 0.0,
  ) -> Sum:
    wanted = risk(
      dropout,
      corrupt=corrupt,
      security=security,
      correctness=correctness,
      lying=lying,
    )
    validate.at_least(0, retries=retries)
    return Sum(wanted, mode, retries, bits, rotation, failure)

  risk = dropout.risk
  return config.call(secure, run.privacy.secure, "privacy.secure")


def secure_of(run: schema.Config, most: int) -> mechanism.Secure:
  """The links of a config's secure sum."""
  how = sum_of(run)
  near, _ = dropout.ring(how.wanted, most)
  mask = links.mask(near + near % 2)  # as many on either side of a client
  if how.mode == "protocol":
    mask = _ends(how).link
  fewest = max(1, most - dropout.most_lost(how.wanted, most))
  corrupt = math.ceil(how.wanted.corrupt * most)
  return mechanism.Secure(
    how.bits, mask, how.rotation, how.failure, fewest, corrupt
  )


def beside(run: schema.Config) -> tuple[int, int]:
  """Bytes of a client, up and down, beside its report and the model."""
  if not run.privacy.secure:
    return 0, 0
  return dropout.beside(sum_of(run).wanted, run.cohort.size)


def reduce_of(run: schema.Config, otherwise: reduce.Reduce) -> reduce.Reduce:
  """The reduction of a config's secure sum; `otherwise` where it needs none."""
  if not run.privacy.secure or sum_of(run).mode != "protocol":
    return otherwise
  if otherwise.name != "sum":
    raise ValueError(
      "a protocol adds up, it does nothing else: got the reduction "
      f"'{otherwise.name}'; write privacy.secure.mode='simulated', or "
      "aggregate by fedavg"
    )
  return _ends(sum_of(run)).reduce


def _ends(how: Sum) -> conversing.Ends:
  """Clients and server that talk, with real keys."""
  return conversing.conversing(how.wanted, keys.real())


def about(run: schema.Config, clients: int) -> tuple[str, ...]:
  """Sentences on what the secure sum of a config withstands.

  Args:
    run: the config.
    clients: of the largest round.
  """
  wanted = sum_of(run).wanted
  near, enough = dropout.ring(wanted, clients)
  gone = dropout.most_lost(wanted, clients)
  said = degree.explain(clients, gone / clients, wanted.corrupt, near, enough)
  return (
    f"{said[0].upper()}{said[1:]}.",
    f"Each is lost with probability {sum(wanted.lost):g}; more than {gone} are "
    f"with probability {wanted.correctness / 2:.2g} at most.",
  )
