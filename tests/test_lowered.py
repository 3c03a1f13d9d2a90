"""The lowered program of a segment: what is done to the frozen base.

Read from StableHLO, not from results: the base must have no client axis, must
not be a constant of the program, and must get no gradient of its own. Full
fine-tuning, where all of that happens, is the control.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_peft as fp
import toy

# Sizes of which no two agree, so that a shape says whose it is.
WIDTH, FFN, HEADS, T, B, LANES, CLASSES = 26, 38, 2, 7, 5, 3, 4
KERNELS = {(WIDTH, WIDTH), (WIDTH, FFN), (FFN, WIDTH)}

DOT = re.compile(
  r"stablehlo\.dot_general[^\n]*?"
  r"(?:batching_dims = \[(?P<batch>[^]]*)\] x [^\n]*?)?"
  r"contracting_dims[^\n]*: "
  r"\(tensor<(?P<left>[^>]*)>, tensor<(?P<right>[^>]*)>\)"
  r" -> tensor<(?P<out>[^>]*)>"
)


def shape(text):
  """'3x26x38xf32' -> (3, 26, 38)."""
  return tuple(int(n) for n in text.split("x")[:-1])


def population():
  rng = np.random.default_rng(0)
  rows = 6 * B
  return fp.data.population(
    {
      "tokens": rng.integers(0, 50, (rows, T)).astype(np.int32),
      "length": np.full(rows, T, np.int32),
      "label": rng.integers(0, CLASSES, rows).astype(np.int32),
    },
    np.repeat(np.arange(6), B),
    heldout=0.0,
  )


def lowered(adapted=True, precision="bf16", closed=False):
  """StableHLO of one device's segments, the base an argument or closed over."""
  module = fp.models.load(
    "encoder",
    vocab=50,
    width=WIDTH,
    depth=2,
    heads=HEADS,
    ffn=FFN,
    positions=T,
    types=0,
    classes=CLASSES,
  )
  if adapted:
    where = r".*/(query|value|up|down|output)"
    module = fp.peft.lora(module, rank=2, where=where)
  model = fp.model(module, fp.losses.classification, precision=precision)
  how = fp.local(optax.sgd(0.1), batch=B)
  algorithm = fp.fedavg(model, how, lowrank=False)
  data, settings = population(), toy.lanes(width=LANES, segment=4)
  player = toy.Player(algorithm, data, settings=settings)
  seated = jax.tree.map(jnp.asarray, player.seat(range(6)))

  def run(base, seated, key):
    state = algorithm.init(clients=6, cohort=6)
    state, common, flight = algorithm.begin(
      state, base, seated, key, shape=(1, LANES), width=4
    )
    one = jax.tree.map(lambda x: x[0], (flight, seated.schedule))
    return algorithm.segments(
      (common, state.nodes[0].shared, seated.segments), one
    )

  key = jax.random.key(0)
  if closed:
    inside = functools.partial(run, jax.tree.map(jnp.asarray, model.base))
    return jax.jit(inside).lower(seated, key).as_text(), model
  return jax.jit(run).lower(model.base, seated, key).as_text(), model


def dots(text):
  """(batched?, left, right, out) of every product of a program."""
  found = [
    (
      bool(m["batch"]),
      shape(m["left"]),
      shape(m["right"]),
      shape(m["out"]),
    )
    for m in DOT.finditer(text)
  ]
  assert len(found) == text.count("stablehlo.dot_general")
  return found


def faults(text):
  """What is done to kernels that must not be done to a frozen one."""
  batched, gradients = set(), set()
  for is_batched, left, right, out in dots(text):
    for operand in (left, right):
      if operand[-2:] in KERNELS and (is_batched or len(operand) > 2):
        batched.add(operand)
    if out[-2:] in KERNELS or out[-2:][::-1] in KERNELS:
      gradients.add(out)
  return batched, gradients


def with_kernels(text):
  """The kernels that enter a product as they are: two axes, no batch."""
  return {
    operand
    for is_batched, left, right, _ in dots(text)
    for operand in (left, right)
    if operand in KERNELS and not is_batched
  }


@pytest.fixture(scope="module")
def adapted():
  return lowered()


def test_a_frozen_kernel_never_gets_a_client_axis_or_a_gradient(adapted):
  text, model = adapted
  assert all("lora" in name for name in model.params)
  batched, gradients = faults(text)
  assert batched == set()
  assert gradients == set()
  assert with_kernels(text) == KERNELS  # the check sees them all


def test_full_precision_keeps_the_same_promise():
  text, _ = lowered(precision="float32")
  assert faults(text) == (set(), set())
  assert with_kernels(text) == KERNELS


def test_the_same_check_finds_client_axes_and_gradients_where_they_are():
  text, _ = lowered(adapted=False)  # every kernel is trained
  batched, gradients = faults(text)
  assert {x[-2:] for x in batched} >= KERNELS
  assert {x[-2:] for x in gradients} >= KERNELS


def test_the_base_is_an_argument_and_no_constant(adapted):
  text, model = adapted
  assert constants(text) == set()
  inputs = re.search(r"func\.func public @main\((.*?)\) ->", text, re.S)[1]
  arguments = {shape(x) for x in re.findall(r"tensor<([^>]*)>", inputs)}
  assert {x.shape for x in jax.tree.leaves(model.base)} <= arguments
  closed, _ = lowered(closed=True)
  assert {x[-2:] for x in constants(closed)} >= KERNELS


def constants(text):
  """Shapes of large constants; those of one value are not written out."""
  found = re.findall(r'dense<"0x[0-9A-F]*"> : tensor<([^>]*)>', text)
  return {shape(x) for x in found if np.prod(shape(x)) >= WIDTH * WIDTH}
