"""Clients: a population is arrays of examples and, per client, rows of them.

The examples of all clients lie in one table, so that a batch of any client is
a gather of int32 rows; who owns which rows is two row lists per client (what
it trains on, what it is tested on). Everything is checked once, here.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Mapping

import jax
import numpy as np

from fedjax_peft.data import check, skew
from fedjax_peft.data.ragged import Ragged


@dataclasses.dataclass(frozen=True, eq=False)
class Population:
  """N clients and their examples; read-only, and checked when built.

  Guarantees:
    every leaf has the same leading axis M and a dtype of at most 32 bits;
    float leaves are finite; labels are in range when `classes` is given;
    every seen client has a training row and every unseen one a row at all;
    no training row is a held-out row of anyone, or in the central test set.

  Attributes:
    examples: leaves [M, ...]; every row of every client and of `test`.
    train: what client i trains on. An unseen client's rows are there for
      personalization only.
    heldout: what client i is tested on; may be empty for a client.
    names: [N] client names, all different.
    seen: bool [N]; False = held-out client, never trained on.
    test: int32 [K] rows of the central test set; may be empty.
    classes: names of the labels, or () if there are no classes.
    name: name of the data set.
    traits: {name: [N]}, facts about the clients that their work may read
      (`rank`); integers or floats.

  Raises:
    ValueError: one sentence naming the leaf, client or row that is wrong.
  """

  examples: dict[str, np.ndarray]
  train: Ragged
  heldout: Ragged
  names: tuple[str, ...]
  seen: np.ndarray
  test: np.ndarray
  classes: tuple[str, ...] = ()
  name: str = "user"
  traits: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    examples = {key: check.frozen(leaf) for key, leaf in self.examples.items()}
    rows = check.leaves(examples)
    frozen = {
      "examples": examples,
      "train": check.row_lists("train", self.train, rows),
      "heldout": check.row_lists("heldout", self.heldout, rows),
      "names": tuple(map(str, self.names)),
      "seen": check.frozen(np.asarray(self.seen, bool)),
      "test": check.frozen(check.rows("test", self.test, rows)),
      "classes": tuple(map(str, self.classes)),
      "traits": check.traits(self.traits, len(self.names)),
    }
    for field, value in frozen.items():
      object.__setattr__(self, field, value)
    check.entries(self)
    check.leaks(self)
    check.values(self)

  def __len__(self) -> int:
    return len(self.names)

  @property
  def spec(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of ONE example, by leaf."""
    return {
      key: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
      for key, leaf in self.examples.items()
    }

  @functools.cached_property
  def fingerprint(self) -> str:
    """SHA-256 over all contents but `name`, as 64 hex digits."""
    digest = hashlib.sha256()
    arrays = {f"examples/{key}": x for key, x in sorted(self.examples.items())}
    for side in ("train", "heldout"):
      ragged = getattr(self, side)
      arrays |= {f"{side}/indptr": ragged.indptr, f"{side}/rows": ragged.rows}
    arrays |= {"seen": self.seen, "test": self.test}
    arrays |= {f"traits/{key}": x for key, x in sorted(self.traits.items())}
    digest.update(repr((self.names, self.classes)).encode())
    for key, leaf in arrays.items():
      digest.update(repr((key, leaf.dtype.name, leaf.shape)).encode())
      digest.update(np.ascontiguousarray(leaf).view(np.uint8).data)
    return digest.hexdigest()

  def with_traits(self, **traits: np.ndarray) -> "Population":
    """The same clients, of whom more is known.

    Args:
      **traits: [N] integers or floats each, one entry for every client.

    Example:
      >>> from fedjax_peft import data
      >>> people = data.population({"x": np.eye(4)}, [0, 0, 1, 1])
      >>> people.with_traits(rank=[2, 8]).traits["rank"]
      array([2, 8], dtype=int32)
    """
    more = {k: np.asarray(v) for k, v in traits.items()}
    return dataclasses.replace(self, traits={**self.traits, **more})

  def card(self) -> str:
    """A few lines on sizes, labels and how much the clients differ."""
    return skew.card(self)
