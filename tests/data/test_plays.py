"""The excerpts are of the plays themselves, shortened."""

import pytest

from fedjax_peft.data import plays

MACBETH = """\
DRAMATIS PERSONAE

DUNCAN, King of Scotland.
ROSS.

ACT I.

SCENE I. An open Place. Thunder and Lightning.

[Enter three Witches.]

FIRST WITCH.
When shall we three meet again?
In thunder, lightning, or in rain?

SECOND WITCH.
When the hurlyburly's done,
When the battle's lost and won.

FIRST WITCH.
Where the place?

ALL.
Paddock calls:--anon:--

[Witches vanish.]

SCENE II. A Camp near Forres.

DUNCAN.
What bloody man is that?

[Alarum within. Enter King Duncan, Malcolm,
with Attendants, meeting a bleeding Soldier.]

He can report.
"""

HAMLET = """\
PERSONS REPRESENTED.

Two Clowns, Grave-diggers.

ACT I.

Scene I. Elsinore. A platform before the Castle.

[Francisco at his post. Enter to him Bernardo.]

Ber.
Who's there?

Fran.
Nay, answer me: stand, and unfold yourself.

Hor. and Mar.
My lord!

Ber.
He.

Scene II. Another room.

[Enter a King and a Queen, players.]

P. Queen.
So many journeys may the sun and moon
Make us again count o'er.

1 Clown.
Is she to be buried in Christian burial?

Ros. and Guild.
We'll wait upon you.

P. Queen.
O, confound the rest!

[Enter Fortinbras.]

Farewell.
Go, bid the soldiers shoot.
"""

HENRY_IV = """\
ACT I.

SCENE II. The same.

FAL.
Now, Hal, what time of day is it, lad?

PRINCE.

[Aside.]

Thou art so fat-witted.

FAL.
Indeed, you come near me now, Hal.

POINTZ. [reads]
Item, A capon.

LADY P.
O, my good lord!

PRINCE. [Aside] I know you all.

[Enter POINTZ and LADY PERCY.]
"""

DREAM = """\
Dramatis Personae

PHILOSTRATE, Master of the Revels.

ACT I.

THESEUS
Now, fair Hippolyta, our nuptial hour
Draws on apace.

HIPPOLYTA
Four days will quickly steep themselves in nights.

THESEUS
                    Go, Philostrate.

[Exit PHILOSTRATE.]

Hippolyta, I woo'd thee with my sword.

PHILOSTRATE
A play there is, my lord.

HIPPOLYTA
I love not to see wretchedness.

     SONG.

        I.
THESEUS
   You spotted snakes.
"""


def spoken(text):
  return [(speech.role, speech.text) for speech in plays.speeches(text)]


def test_full_names_in_capitals_with_a_full_stop():
  assert spoken(MACBETH) == [
    (
      "FIRST WITCH",
      "When shall we three meet again?\nIn thunder, lightning, or in rain?",
    ),
    (
      "SECOND WITCH",
      "When the hurlyburly's done,\nWhen the battle's lost and won.",
    ),
    ("FIRST WITCH", "Where the place?"),
    ("DUNCAN", "What bloody man is that?\nHe can report."),
  ]


def test_hamlets_abbreviations_in_lower_case():
  assert spoken(HAMLET) == [
    ("BER", "Who's there?"),
    ("FRAN", "Nay, answer me: stand, and unfold yourself."),
    ("BER", "He."),
    (
      "P. QUEEN",
      "So many journeys may the sun and moon\nMake us again count o'er.",
    ),
    ("1 CLOWN", "Is she to be buried in Christian burial?"),
    (
      "P. QUEEN",
      "O, confound the rest!\nFarewell.\nGo, bid the soldiers shoot.",
    ),
  ]


def test_abbreviations_in_capitals_and_directions_behind_the_marker():
  assert spoken(HENRY_IV) == [
    ("FAL", "Now, Hal, what time of day is it, lad?"),
    ("PRINCE", "Thou art so fat-witted."),
    ("FAL", "Indeed, you come near me now, Hal."),
    ("POINTZ", "Item, A capon."),
    ("LADY P", "O, my good lord!"),
    ("PRINCE", " I know you all."),
  ]


def test_capitals_without_a_full_stop_songs_and_lost_blank_lines():
  assert spoken(DREAM) == [
    ("THESEUS", "Now, fair Hippolyta, our nuptial hour\nDraws on apace."),
    ("HIPPOLYTA", "Four days will quickly steep themselves in nights."),
    (
      "THESEUS",
      "                    Go, Philostrate.\n"
      "Hippolyta, I woo'd thee with my sword.",
    ),
    ("PHILOSTRATE", "A play there is, my lord."),
    ("HIPPOLYTA", "I love not to see wretchedness."),
    ("THESEUS", "   You spotted snakes."),
  ]


def test_an_exclamation_is_no_marker():
  text = """\
ACT II.

MACDUFF.
What have I seen?

[Enter MACDUFF.]

O HORROR, HORROR.
Tongue nor heart cannot conceive nor name thee!

MACBETH.
What's the matter?

COME HITHER, SIR.
Nearer.
"""
  assert spoken(text) == [
    (
      "MACDUFF",
      "What have I seen?\nO HORROR, HORROR.\n"
      "Tongue nor heart cannot conceive nor name thee!",
    ),
    ("MACBETH", "What's the matter?\nCOME HITHER, SIR.\nNearer."),
  ]


def test_directions_nest_and_one_left_open_ends_with_its_paragraph():
  text = """\
ACT V.

[Enter CYMBELINE, PISANIO, [SOLDIERS, ATTENDANTS] and Roman captives.]

CYMBELINE.
Stand by my side, [To BELARIUS] you whom the gods have made. [Exeunt.}

[Enter PISANIO, whom
nobody sees

PISANIO.
Humbly I thank you.
"""
  assert spoken(text) == [
    ("CYMBELINE", "Stand by my side,  you whom the gods have made."),
    ("PISANIO", "Humbly I thank you."),
  ]


def test_acts_may_be_missing_and_prologue_and_epilogue_speak():
  text = """\
Dramatis Personae

THE PROLOGUE.

I COME no more to make you laugh.

ACT FIRST.

SCENE I.

Westminster Abbey.

KING.
Be it so.

ACT FIFTH. SCENE I. Britain.

The Roman camp.

KING.
Let it be.

EPILOGUE.

'Tis ten to one this play can never please.

THE END
"""
  assert spoken(text) == [
    ("PROLOGUE", "I COME no more to make you laugh."),
    ("KING", "Be it so."),
    ("KING", "Let it be."),
    ("EPILOGUE", "'Tis ten to one this play can never please."),
  ]


@pytest.mark.parametrize(
  ("role", "kind"),
  [
    ("HAM", "person"),
    ("MRS. FORD", "person"),
    ("HYMEN", "person"),
    ("OLD LADY", "generic"),
    ("FIRST SOLDIER", "generic"),
    ("1 CLOWN", "generic"),
    ("LUCIUS' SERVANT", "generic"),
    ("MESS", "generic"),
    ("VOLUMNIA, VIRGILIA", "group"),
    ("PHRYNIA AND TIMANDRA", "group"),
    ("BOTH TRIBUNES", "group"),
    ("SERVING-MEN", "group"),
  ],
)
def test_the_kind_of_a_role(role, kind):
  assert plays.kind(role) == kind


def test_two_names_are_a_group_where_both_are_roles():
  assert plays.kind("VARRO. CLAUDIUS", frozenset({"VARRO"})) == "person"
  known = frozenset({"VARRO", "CLAUDIUS"})
  assert plays.kind("VARRO. CLAUDIUS", known) == "group"


def test_what_is_no_play_is_refused():
  with pytest.raises(ValueError, match=r'a line such as "ACT I."'):
    plays.speeches("From fairest creatures we desire increase")
