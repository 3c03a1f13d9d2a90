"""Existing parameters that train as they are."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fedjax_peft import peft


def model():
  rngs = nnx.Rngs(0)
  return nnx.Dict(
    body=nnx.List([nnx.Linear(4, 4, rngs=rngs), nnx.LayerNorm(4, rngs=rngs)]),
    head=nnx.Linear(4, 2, rngs=rngs),
    statistics=nnx.BatchNorm(4, rngs=rngs),
  )


def test_what_a_regex_names_trains_and_keeps_its_value():
  tuned = peft.tune(model(), where=".*/bias")
  parts = peft.split(tuned)
  assert sorted(parts.params) == [
    "body/0/bias",
    "body/1/bias",
    "head/bias",
    "statistics/bias",
  ]
  assert sorted(parts.base) == [
    "body/0/kernel",
    "body/1/scale",
    "head/kernel",
    "statistics/scale",
  ]
  before = peft.split(model())
  for name, value in (parts.params | parts.base).items():
    np.testing.assert_array_equal(value, before.params[name])


def test_metadata_of_a_parameter_is_kept():
  module = nnx.Dict(head=nnx.Linear(4, 2, rngs=nnx.Rngs(0)))
  module.head.kernel.set_metadata(origin="checkpoint")
  assert peft.tune(module).head.kernel.origin == "checkpoint"


def test_tied_parameters_train_as_one_under_any_of_their_names():
  module = model()
  module.twin = nnx.Linear(4, 2, rngs=nnx.Rngs(1))
  module.twin.kernel = module.head.kernel
  for where in ("head/kernel", "twin/kernel"):
    tuned = peft.tune(module, where=where)
    assert tuned.twin.kernel is tuned.head.kernel
    assert list(peft.split(tuned).params) == ["head/kernel"]


def test_methods_compose_in_any_order_under_the_same_names():
  module = model()
  one = peft.tune(
    peft.lora(module, where="body/0"), where="body/0/bias|head/.*"
  )
  two = peft.lora(
    peft.tune(module, where="body/0/bias|head/.*"), where="body/0"
  )
  one, two = peft.split(one), peft.split(two)
  assert one.graph == two.graph
  assert list(one.params) == list(two.params)
  assert "body/0/bias" in one.params
  assert "body/0/kernel" in one.base
  for name in one.params:
    np.testing.assert_array_equal(one.params[name], two.params[name])


def test_a_regex_that_matches_nothing_lists_near_names():
  with pytest.raises(ValueError, match="did you mean 'head/kernel'"):
    peft.tune(model(), where="head/kernal")
  with pytest.raises(ValueError, match="matches no parameter"):
    peft.tune(model(), where="statistics/mean")
  with pytest.raises(ValueError, match="must be a regular expression"):
    peft.tune(model(), where="(")


def test_whole_numbers_and_frozen_modules_do_not_train():
  module = nnx.Dict(head=nnx.Linear(4, 2, rngs=nnx.Rngs(0)))
  whole = nnx.Dict(head=nnx.Param(jnp.zeros(3, jnp.int8)))
  with pytest.raises(ValueError, match="'head' of dtype int8"):
    peft.tune(whole, where="head")
  with pytest.raises(ValueError, match="call tune first"):
    peft.tune(peft.freeze(peft.lora(module, where=".*")))


def test_a_merged_module_has_no_trainable_marks():
  plain = peft.merged(peft.tune(model()))
  assert peft.split(plain).graph == peft.split(model()).graph
