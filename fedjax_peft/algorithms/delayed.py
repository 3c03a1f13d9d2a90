"""Delayed: clients report after the model has moved on.

For rounds on an open clock (`network.clock`): each client starts from the model
of its own moment, and tells how far it went from there.
"""

from collections.abc import Mapping
from typing import Literal

import optax

from fedjax_peft import algorithm, hierarchy, link, links, objective, work


def fedbuff(
  model: objective.Model,
  local: work.Local,
  *,
  kind: Literal["constant", "polynomial", "hinge"] = "polynomial",
  power: float = 0.5,
  start: float = 4.0,
  server: optax.GradientTransformation | None = None,
  uplink: link.Link | None = None,
  downlink: link.Link | None = None,
  placement: Mapping[str, str] | None = None,
) -> algorithm.Algorithm:
  """Buffered asynchronous averaging: the mean of discounted deltas is applied.

  w <- w - server(sum_k n_k s(d_k) delta_k / sum_k n_k), over the reports of a
  buffer. Nguyen et al., 2022, https://arxiv.org/abs/2106.06639, where clients
  weigh the same: `uplink=links.weigh(by="clients")`.

  Args:
    model: what is trained.
    local: how clients train.
    kind: of the discount; see `links.discount`.
    power: of the discount.
    start: of the discount.
    server: see `fedavg`.
    uplink: what a discounted report crosses; None weighs by examples.
    downlink: see `fedavg`.
    placement: see `fedavg`.
  """
  job = work.train(model, local, rules=placement)
  discount = links.discount(kind, power=power, start=start)
  up = link.chain(discount, links.weigh() if uplink is None else uplink)
  cloud = hierarchy.tier("cloud", link=up, server=server, down=downlink)
  return algorithm.federated(job, [cloud])


def fedasync(
  model: objective.Model,
  local: work.Local,
  *,
  rate: float = 0.6,
  kind: Literal["constant", "polynomial", "hinge"] = "polynomial",
  power: float = 0.5,
  start: float = 4.0,
  proximal: float = 0.0,
  uplink: link.Link | None = None,
  downlink: link.Link | None = None,
  placement: Mapping[str, str] | None = None,
) -> algorithm.Algorithm:
  """Asynchronous mixing: w <- (1 - a) w + a w_k, with a = rate s(d_k).

  w_k is the client's model itself, not how far it went: what others did since
  it started is partly taken back. Of several reports at once, the mean of what
  each would do. Xie et al., 2019, https://arxiv.org/abs/1903.03934.

  Args:
    model: what is trained.
    local: how clients train.
    rate: a, in (0, 1].
    kind: of the discount s; see `links.discount`.
    power: of the discount.
    start: of the discount.
    proximal: weight of the clients' pull to where they started.
    uplink: what a discounted delta crosses; None weighs by examples.
    downlink: see `fedavg`.
    placement: see `fedavg`.

  Raises:
    ValueError: if `rate` is not in (0, 1].
  """
  if not 0 < rate <= 1:
    raise ValueError(f"rate must be in (0, 1], got {rate=}")
  job = work.train(model, local, rules=placement, proximal=proximal)
  discount = links.discount(kind, power=power, start=start)
  up = link.chain(discount, links.weigh() if uplink is None else uplink)

  def mix(staleness):
    return links.staleness_weight(staleness, kind, power=power, start=start)

  cloud = hierarchy.tier(
    "cloud", link=up, server=optax.sgd(rate), down=downlink, mix=mix
  )
  return algorithm.federated(job, [cloud])
