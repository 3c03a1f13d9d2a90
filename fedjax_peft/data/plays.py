"""Plays: speeches and who speaks them, from the text of a printed play.

The texts set a speaker's name, the marker, on a line of its own above the
speech. Four styles occur, and one parser reads them all:

  full names in capitals          "FIRST WITCH."      most plays
  abbreviations in capitals       "FAL."              Henry IV, part 1
  lower case, also abbreviated    "Ham.", "P. Queen." Hamlet, Lear, Romeo
  capitals without a full stop    "THESEUS"           Midsummer Night's Dream

A line is a marker by its place (the first of a paragraph) and by its look. An
exclamation may have both ("Farewell.", "O HORROR, HORROR."), so unless it is
one word in capitals with a full stop, a marker must also come twice, or be
named in the list of persons or in a stage direction.
"""

import collections
import re
from typing import Literal, NamedTuple


class Speech(NamedTuple):
  """What one role says in one go."""

  role: str  # in capitals, without the last full stop
  text: str  # lines separated by newlines, without stage directions


_START = re.compile(
  r"^(?:the )?(?:act (?:[ivx]+|\d|first)|prologue|induction)\b",
  re.IGNORECASE | re.MULTILINE,
)
_HEADING = re.compile(
  r"(?:act|scene)(?:[ .:]+(?:[ivx]+|\d|first|second|third|fourth|fifth)\b|[.:])"
  r"|induction\b",
  re.IGNORECASE,
)
_PARAGRAPH = re.compile(r"\n(?:[ \t]*\n)+")
_CAPITALS = re.compile(r"(?:\d )?[A-Z][A-Z'&-]*(?:[.,]? [A-Z][A-Z'&-]*)*[.:-]*")
_LOWER = re.compile(
  r"(?:\d )?[A-Z][a-z'-]*(?:\.? (?:[A-Z][a-z'-]*|and|of|the))*\."
)
_LONGEST = 40
_NO_ROLE = re.compile(r"[IVX]+|SONG|DUMB SHOW|(?:THE )?END")
_JOINT = re.compile(r",| AND |\. ")
_GROUP = re.compile(
  r"(?:ALL|BOTH|SOME|OMNES)\b.*|(?:.* )?(?:AEDILES|BANDITTI|CHILDREN|CITIZENS"
  r"|COMMONS|CONSPIRATORS|DANES|GENTLEMEN|GHOSTS|GOTHS|KNIGHTS|LADIES|LORDS"
  r"|MARINERS|PLAYERS|PLEBEIANS|PRINCES|ROMANS|SENATORS|SERVANTS"
  r"|SERVING-?MEN|SOLDIERS|TRIBUNES)"
)
_GENERIC = re.compile(
  r"(?:\d|I|FIRST|SECOND|THIRD|FOURTH|FIFTH|SIXTH|AN?|ANOTHER) .*"
  r"|(?:.* )?(?:ATTENDANT|CAPT(?:AIN)?|CITIZEN|GENT(?:LEMAN)?|GUARD|HERALD"
  r"|KEEPER|KNIGHT|LADY|LORD|MESS(?:ENGER)?|MURDERER|OFF(?:ICER)?|OUTLAW"
  r"|SAILOR|SENATOR|SERV(?:ANT)?|SOLDIER|WATCH|WATCHMAN)"
)


def speeches(play: str) -> list[Speech]:
  r"""The speeches of a play in order.

  Front matter, headings and stage directions in brackets are left out, and so
  is what several say together ("ALL.", "ROS. AND GUILD.").

  Args:
    play: its text; blank lines separate paragraphs.

  Raises:
    ValueError: if there is no line such as "ACT I." to begin at.

  Example:
    >>> speeches("KENT\n\nACT I.\n\nKENT.\nWho's there?\n\nALL.\nGrace.")
    [Speech(role='KENT', text="Who's there?")]
  """
  start = _START.search(play)
  if start is None:
    raise ValueError(
      f'a play must have a line such as "ACT I.": {play[:40]!r} has none'
    )
  front, body = play[: start.start()], play[start.start() :]
  paragraphs = [_spoken(x) for x in _PARAGRAPH.split(body)]
  known = _roles(paragraphs, _named(front, body))
  found: list[tuple[str, list[str]]] = []
  for lines in paragraphs:
    if lines and _HEADING.match(lines[0]):
      found.append(("", []))
      continue
    for place, line in enumerate(lines):
      role = _role(line)
      # A marker inside a paragraph has lost its blank line; only capitals are
      # sure enough, for a verse may be "Romeo."
      if role in known and (place == 0 or _CAPITALS.fullmatch(line)):
        found.append((role, []))
      elif found and not _NO_ROLE.fullmatch(line.strip(" .")):
        found[-1][1].append(line)
  return [
    Speech(role, "\n".join(lines))
    for role, lines in found
    if lines and role and kind(role, known) != "group"
  ]


def kind(
  role: str, known: frozenset[str] = frozenset()
) -> Literal["person", "generic", "group"]:
  """What a role is: a person, a nameless one, or several at once.

  Args:
    role: as in `Speech`.
    known: the roles of the play: "VARRO. CLAUDIUS" is two if both are in it.

  Example:
    >>> [kind(role) for role in ("HAM", "1 CLOWN", "ROS. AND GUILD", "ALL")]
    ['person', 'generic', 'group', 'group']
  """
  parts = _JOINT.split(role)
  if len(parts) > 1 and (". " not in role or " AND " in role):
    return "group"
  if len(parts) > 1 and all(part in known for part in parts):
    return "group"
  if _GROUP.fullmatch(role):
    return "group"
  return "generic" if _GENERIC.fullmatch(role) else "person"


def _spoken(paragraph: str) -> list[str]:
  """The lines of a paragraph without stage directions.

  Directions nest, and one that is never closed ends with the paragraph. One
  right behind a marker leaves the marker on a line of its own.
  """
  before, bracket, _ = paragraph.partition("[")
  if bracket and _role(before):
    paragraph = f"{before}\n{paragraph[len(before) :]}"
  depth, kept = 0, []
  for character in paragraph:
    depth += character == "["
    if depth == 0:
      kept.append(character)
    depth = max(depth - (character in "]}"), 0)
  lines = (line.rstrip() for line in "".join(kept).split("\n"))
  return [line for line in lines if line.strip()]


def _role(line: str) -> str:
  """The role that a line would be the marker of, or an empty string."""
  line = line.strip()
  looks = _CAPITALS.fullmatch(line) or _LOWER.fullmatch(line)
  if not looks or len(line) > _LONGEST or _HEADING.match(line):
    return ""
  role = " ".join(line.upper().strip(" .:-").split()).removeprefix("THE ")
  return "" if _NO_ROLE.fullmatch(role) else role


def _named(front: str, body: str) -> set[str]:
  """All words of the list of persons and of the stage directions."""
  directions = " ".join(re.findall(r"\[[^\[\]]*", body))
  return set(re.findall(r"[A-Z0-9']+", f"{front} {directions}".upper()))


def _roles(paragraphs: list[list[str]], named: set[str]) -> frozenset[str]:
  """The roles of a play, from the first lines of its paragraphs."""
  firsts = [lines[0].strip() for lines in paragraphs if lines]
  capitals = sum(bool(_CAPITALS.fullmatch(line)) for line in firsts)
  lower = sum(bool(_LOWER.fullmatch(line)) for line in firsts)
  style = _CAPITALS if capitals >= lower else _LOWER
  markers = [x for x in firsts if style.fullmatch(x) and _role(x)]
  counts = collections.Counter(_role(line) for line in markers)
  return frozenset(
    _role(line)
    for line in markers
    if counts[_role(line)] > 1
    or re.fullmatch(r"[A-Z]+\.|ALL|(THE )?(PROLOGUE|EPILOGUE)\.?", line)
    or _is_named(_role(line), named)
  )


def _is_named(role: str, named: set[str]) -> bool:
  """Whether a word of a role, or a longer form of it, is among the names."""
  words = [word for word in re.split(r"[^A-Z0-9']+", role) if len(word) > 2]
  return any(name.startswith(word) for word in words for name in named)
