"""Every law of laws.py, on every member."""

import pytest

import laws
from fedjax_peft import reduce as reduce_lib

LINKS = laws.members()
REDUCTIONS = {"sum": reduce_lib.sum(), "median": laws.median()}


@pytest.mark.parametrize("law", laws.LINK_LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("name", LINKS)
def test_the_link_keeps_the_law(name, law):
  law(LINKS[name])


@pytest.mark.parametrize("law", laws.REDUCE_LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("name", REDUCTIONS)
def test_the_reduction_keeps_the_law(name, law):
  law(REDUCTIONS[name])
