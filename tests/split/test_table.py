"""Costs of stages against closed forms, whole models and published figures."""

import functools
import io
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest
import rich.console
from flax import nnx

from fedjax_peft import flops, link, links, models, peft, split, tree
from fedjax_peft.models import cnn, decoder, encoder, vision
from fedjax_peft.split import held, piece
from fedjax_peft.split.table import format, table

T = 16  # tokens of a text


def spec(*shape, dtype=jnp.int32):
  return jax.ShapeDtypeStruct(shape, dtype)


def texts(batch=3):
  return {"tokens": spec(batch, T), "length": spec(batch)}


class Shape(NamedTuple):
  """A vision transformer without LayerScale, its hidden layers 4 D wide.

  The figures are derived from the shapes of the models of SFLAM
  (arXiv 2504.09114), two for a multiplication and an addition: what is in the
  FLOPs is written out in `closed`.
  """

  pixels: int
  patch: int
  width: int
  depth: int
  heads: int
  device: int  # parameters of the product of patches
  device_share: str  # of the parameters
  block: int
  total: int
  gflops: str
  flops_share: str
  values: int  # that leave it for one image
  megabytes: tuple[str, ...]  # of 128 images, at 32, 8, 4 and 2 bits

  def build(self):
    return vision.ViT(
      vision.ViTConfig(
        image_size=self.pixels,
        patch=self.patch,
        width=self.width,
        depth=self.depth,
        heads=self.heads,
        ffn=4 * self.width,
        layer_scale=0.0,
        classes=10,
      ),
      nnx.Rngs(0),
    )

  def images(self, batch=2):
    shape = (batch, self.pixels, self.pixels, 3)
    return {"image": spec(*shape, dtype=jnp.uint8)}

  def closed(self):
    """Forward FLOPs of (patches, tokens, each block, head)."""
    patches, d = (self.pixels // self.patch) ** 2, self.width
    tokens = patches + 1  # the class token
    project = 2 * patches * (self.patch**2 * 3) * d
    dense = 8 * tokens * d**2 + 16 * tokens * d**2  # attention's four; the FFN
    block = dense + 4 * tokens**2 * d
    return (project, 0, *[block] * self.depth, 2 * d * 10)


SHAPES = {
  "B/32 at 224": Shape(
    *(224, 32, 768, 12, 12),
    *(2_360_064, "2.70%", 7_087_872, 87_462_922, "8.82", "2.6%", 37_632),
    ("19.27", "4.82", "2.41", "1.20"),
  ),
  "B/16 at 224": Shape(
    *(224, 16, 768, 12, 12),
    *(590_592, "0.69%", 7_087_872, 85_806_346, "35.1", "0.66%", 150_528),
    ("77.1", "19.3", "9.6", "4.8"),
  ),
  "4x4 at 32": Shape(
    *(32, 4, 192, 6, 3),
    *(9_408, "0.35%", 444_864, 2_693_578, "0.366", "0.32%", 12_288),
    ("6.29", "1.57", "0.79", "0.39"),
  ),
}
B32 = SHAPES["B/32 at 224"]


@functools.cache
def rows(name):
  shape = SHAPES[name]
  return table(nnx.eval_shape(shape.build), shape.images())


def as_printed(value, text):
  """A number with as many decimals as a text has."""
  return f"{value:.{len(text.partition('.')[2])}f}"


def wire_bytes(message, bits):
  """Bytes of the arrays that a link of so many bits puts on the wire."""
  return tree.nbytes(links.affine(bits).after(link.Spec(message)).message)


def device_message(shape, batch):
  """What the product of patches hands on."""
  device = piece.cutter(nnx.eval_shape(shape.build))(0, 1)
  given = (device.train, device.still, shape.images(batch))
  return jax.eval_shape(piece.forward(device), *given)


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_of_vision_transformers_are_the_published_ones(name):
  shape, (patches, _, *blocks, _) = SHAPES[name], rows(name)
  total = sum(row.parameters for row in rows(name))
  assert patches.parameters == shape.device
  assert {row.parameters for row in blocks} == {shape.block}
  assert len(blocks) == shape.depth
  assert total == shape.total
  assert f"{patches.parameters / total:.2%}" == shape.device_share


@pytest.mark.parametrize("name", SHAPES)
def test_flops_of_vision_transformers_are_their_closed_form(name):
  shape, found = SHAPES[name], [row.flops for row in rows(name)]
  assert tuple(found) == shape.closed()
  assert as_printed(sum(found) / 1e9, shape.gflops) == shape.gflops
  digits = len(shape.flops_share.partition(".")[2]) - 1
  assert f"{found[0] / sum(found):.{digits}%}" == shape.flops_share


def test_the_number_of_heads_costs_nothing():
  shape = SHAPES["4x4 at 32"]._replace(heads=12, depth=1)
  found = table(nnx.eval_shape(shape.build), shape.images())
  assert tuple(row.flops for row in found) == shape.closed()


@pytest.mark.parametrize("name", SHAPES)
def test_packed_activations_are_as_large_as_published(name):
  shape, (patches, *later) = SHAPES[name], rows(name)
  assert patches.values == shape.values
  stream = shape.values + shape.width  # and the class token
  assert {row.values for row in later[:-1]} == {stream}
  message = device_message(shape, 128)
  for bits, text in zip((32, 8, 4, 2), shape.megabytes, strict=True):
    crossed = wire_bytes(message, bits)
    scale = 8 if bits < 32 else 0  # of the whole tensor, two float32
    assert crossed == 128 * patches.values * bits // 8 + scale
    assert as_printed(crossed / 1e6, text) == text


def test_a_split_vision_transformer_sends_less_only_if_it_quantizes():
  """450 images, five epochs in batches of 128; every model once."""
  full, last = device_message(B32, 128), device_message(B32, 450 % 128)
  patches, *_ = rows("B/32 at 224")
  weights, whole = 4 * patches.parameters, 4 * B32.total
  smashed = {
    bits: 5 * (3 * wire_bytes(full, bits) + wire_bytes(last, bits))
    for bits in (32, 8, 4, 2)
  }
  assert smashed[32] == 5 * 450 * patches.values * 4
  assert f"{smashed[32] / 1e6:.1f} {weights / 1e6:.1f}" == "338.7 9.4"
  assert f"{whole / 1e6:.1f}" == "349.9"
  sums = {bits: smashed[bits] + weights for bits in (8, 4, 2)}
  assert [f"{n / 1e6:.1f}" for n in sums.values()] == ["94.1", "51.8", "30.6"]
  assert [f"{whole / n:.1f}" for n in sums.values()] == ["3.7", "6.8", "11.4"]
  assert 0.99 < (smashed[32] + weights) / whole < 1  # floats: no saving


def test_adapters_of_rank_eight_send_a_megabyte():
  tuned = nnx.eval_shape(lambda: peft.lora(B32.build(), rank=8))
  values = tree.size(piece.cutter(tuned)(0, B32.depth + 3).train)
  assert values == 12 * 2 * 8 * (768 + 768) == 294_912
  assert f"{4 * values / 1e6:.1f}" == "1.2"


def test_a_device_holds_28_megabytes_in_place_of_a_gigabyte():
  model, momentum = nnx.eval_shape(B32.build), optax.sgd(0.01, momentum=0.9)
  memory = functools.partial(held.memory, model, B32.images())
  device = memory(0, 1, momentum).state
  whole = memory(0, B32.depth + 3, momentum).state
  assert (device, whole) == (12 * B32.device, 12 * B32.total)
  assert f"{device / 1e6:.0f} {whole / 1e9:.2f}" == "28 1.05"


def test_rows_of_minilm_are_their_closed_form():
  config = encoder.EncoderConfig(pooler=True)
  model = nnx.eval_shape(lambda: encoder.Encoder(config, nnx.Rngs(0)))
  first, *blocks, last = table(model, texts())
  d, f = 384, 1536
  assert first.parameters == (30522 + 512 + 2) * d + 2 * d
  assert (first.flops, first.train_flops, first.values) == (0, 0, T * d)
  assert first.side_bytes == 4  # the length
  block = 4 * (d * d + d) + (d * f + f) + (f * d + d) + 2 * 2 * d
  forward = 8 * T * d * d + 4 * T * T * d + 4 * T * d * f
  assert {row[1:] for row in blocks} == {
    (block, forward, T * d, 4, 3 * forward)
  }
  assert last[1:] == (d * d + d, 2 * d * d, d, 0, 3 * 2 * d * d)
  # Of all-MiniLM-L6-v2 as it is published, without 512 stored positions.
  assert sum(row.parameters for row in (first, *blocks, last)) == 22_713_216


def test_rows_of_smollm2_are_their_closed_form():
  config = decoder.DecoderConfig()
  model = nnx.eval_shape(lambda: decoder.Decoder(config, nnx.Rngs(0)))
  first, *blocks, last = table(model, texts())
  d, f, shared, vocab = 576, 1536, 192, 49152
  assert first[1:5] == (vocab * d, 0, T * d, 0)
  matrices = 2 * d * d + 2 * d * shared + 3 * d * f
  forward = 2 * T * matrices + 4 * T * T * d
  norms = 2 * d
  assert {row[1:] for row in blocks} == {
    (matrices + norms, forward, T * d, 0, 3 * forward)
  }
  # The table is the first stage's, the product the last one's.
  unembed = 2 * T * d * vocab
  assert last[1:] == (d, unembed, T * vocab, 0, 3 * unembed)
  # Of SmolLM2-135M as it is published.
  assert sum(row.parameters for row in (first, *blocks, last)) == 134_515_008


def test_rows_of_a_convolutional_network_are_their_closed_form():
  model = nnx.eval_shape(
    lambda: cnn.CNN(cnn.CNNConfig(classes=10), nnx.Rngs(0))
  )
  found = table(model, {"image": spec(4, 28, 28, dtype=jnp.uint8)})
  windows = ((24, 25 * 1, 6), (8, 25 * 6, 16))
  dense = ((256, 120), (120, 84), (84, 10))
  counts = [
    *((k * n + n, 2 * s * s * k * n, (s // 2) ** 2 * n) for s, k, n in windows),
    *((k * n + n, 2 * k * n, n) for k, n in dense),
  ]
  assert [row[1:4] for row in found] == counts
  training = [(3 if i else 2) * row.flops for i, row in enumerate(found)]
  assert [row.train_flops for row in found] == training
  assert sum(row.parameters for row in found) == 44_426  # of NIID-Bench


SMALL = {
  "encoder": {"width": 8, "depth": 2, "heads": 2, "ffn": 12, "vocab": 11},
  "decoder": {"width": 8, "depth": 2, "heads": 2, "ffn": 12, "vocab": 11},
  "vit": {"width": 8, "depth": 2, "heads": 2, "ffn": 12, "image_size": 14},
  "cnn": {},
}


def small(kind, change=lambda module: module, **options):
  """A tiny model without weights, changed by a method."""
  classes = {} if kind == "decoder" else {"classes": 3}
  options = SMALL[kind] | classes | options
  return nnx.eval_shape(lambda: change(models.load(kind, **options)))


def inputs(kind, batch=3):
  if kind in ("encoder", "decoder"):
    return texts(batch)
  side = {"vit": 14, "cnn": 28}[kind]
  return {"image": spec(batch, side, side, dtype=jnp.uint8)}


def whole(module, given):
  """(parameters, forward FLOPs, those with backward) of a batch."""
  graph, state = nnx.split(module)

  def run(state):
    return nnx.merge(graph, state)(**given)

  def step(state):
    out, back = jax.vjp(run, state)
    return back(jnp.ones_like(out))

  given = {k: jnp.ones(v.shape, v.dtype) for k, v in given.items()}
  weights = sum(x.size for x in jax.tree.leaves(nnx.state(module, nnx.Param)))
  return weights, flops.count(run, state), lambda: flops.count(step, state)


@functools.cache
def plain(kind):
  return table(small(kind), inputs(kind))


@pytest.mark.parametrize("kind", SMALL)
def test_rows_add_up_to_the_whole_model(kind):
  module, found = small(kind), plain(kind)
  parameters, forward, training = whole(module, inputs(kind))
  assert sum(row.parameters for row in found) == parameters
  assert 3 * sum(row.flops for row in found) == forward
  assert 3 * sum(row.train_flops for row in found) == training()


# One of each way in which methods keep what trains.
@pytest.mark.parametrize(
  "method",
  ["bottleneck", "deep_prompt", "dora", "ia3", "last", "prefix", "vera"],
)
def test_rows_add_up_under_a_method(method):
  module = small("encoder", peft.METHODS[method])
  found = table(module, inputs("encoder"))
  parameters, forward, _ = whole(module, inputs("encoder"))
  assert sum(row.parameters for row in found) == parameters
  # Products of weights alone are divided by the batch, and rounded up.
  excess = 3 * sum(row.flops for row in found) - forward
  assert 0 <= excess < 3 * len(found)


@pytest.mark.parametrize("kind", ["decoder", "cnn"])
def test_costs_of_an_example_do_not_depend_on_the_batch(kind):
  assert table(small(kind), inputs(kind, 7)) == plain(kind)


def test_a_block_costs_the_same_in_a_scan():
  unrolled = small("vit", unroll=True)
  assert table(unrolled, inputs("vit")) == plain("vit")


def test_weights_are_not_needed():
  options = {"filters": (2,), "hidden": (3,), "window": 3, "image_size": 6}
  image = {"image": spec(2, 6, 6, dtype=jnp.uint8)}
  there = models.load("cnn", classes=3, **options)
  assert table(there, image) == table(small("cnn", **options), image)


def test_adapters_save_the_gradients_of_kernels():
  rank, tokens = 2, (14 // 7) ** 2 + 1
  tuned = table(small("vit", lambda m: peft.lora(m, rank=rank)), inputs("vit"))
  d, ffn = 8, 12
  dense = 8 * tokens * d * d + 4 * tokens * d * ffn
  attention, side = 4 * tokens**2 * d, 2 * 4 * tokens * d * rank
  for before, row in zip(plain("vit")[2:-1], tuned[2:-1], strict=True):
    assert row.parameters == before.parameters + 2 * 2 * d * rank
    assert row.flops == before.flops + side == dense + attention + side
    # Backward, kernels need one product, all else two.
    assert row.train_flops == row.flops + dense + 2 * attention + 2 * side


def test_nothing_goes_back_to_where_nothing_trains():
  found = table(small("encoder", peft.last), texts())
  *still, trained = found[:-1]
  assert all(row.train_flops == row.flops for row in still)
  assert trained.train_flops == plain("encoder")[-2].train_flops
  head = table(small("vit", peft.lora), inputs("vit"))[-1]
  # It is frozen, but a gradient goes through it.
  assert head.train_flops == 2 * head.flops


def test_recomputing_a_block_costs_a_forward_pass():
  redone = table(small("vit", keep="none"), inputs("vit"))
  for before, row in zip(plain("vit")[2:-1], redone[2:-1], strict=True):
    assert row.flops == before.flops
    assert row.train_flops == before.train_flops + row.flops


def test_a_prompt_leaves_every_stage_with_the_stream():
  before = plain("vit")
  prompted = table(small("vit", lambda m: peft.prompt(m, 5)), inputs("vit"))
  for old, new in zip(before[1:-1], prompted[1:-1], strict=True):
    assert new.values == old.values + 5 * 8
  assert prompted[0].values == before[0].values  # it comes after the patches
  assert prompted[-1].values == before[-1].values


def test_any_modules_have_a_table():
  def build():
    rngs = nnx.Rngs(0)
    two = nnx.Linear(8, 2, use_bias=False, rngs=rngs)
    return split.Modules([("one", nnx.Linear(4, 8, rngs=rngs)), ("two", two)])

  given = {"inputs": spec(5, 4, dtype=jnp.float32)}
  assert [tuple(row) for row in table(nnx.eval_shape(build), given)] == [
    ("one", 40, 64, 8, 0, 128),
    ("two", 16, 32, 2, 0, 96),
  ]


def test_the_shown_table_has_every_number_and_their_sums():
  found = plain("encoder")
  console = rich.console.Console(width=100, file=io.StringIO())
  console.print(format(found))
  text = console.file.getvalue().replace(",", "")
  head, *lines, sums = (line.split() for line in text.splitlines())
  assert head[0] == "stage"
  total, done = sum(row.flops for row in found), 0
  for row, line in zip(found, lines, strict=True):
    done += row.flops
    numbers = [row.parameters, row.flops, row.train_flops, *row[3:5]]
    assert line.pop(3) == f"{done / total:.2%}"
    assert line == [row.name, *map(str, numbers)]
  held, training = (
    sum(getattr(row, name) for row in found)
    for name in ("parameters", "train_flops")
  )
  assert sums == [str(held), str(total), str(training)]


def test_a_model_without_stages_is_refused():
  with pytest.raises(ValueError, match=r"stages\(\) and part.*Linear"):
    table(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), {"x": spec(1, 2)})


def test_a_parameter_without_a_stage_is_refused():
  module = small("cnn")
  module.extra = nnx.Param(jnp.ones(3))
  with pytest.raises(ValueError, match="'extra'"):
    table(module, inputs("cnn"))


@pytest.mark.parametrize(
  "given", [{}, {"x": spec()}, {"x": spec(0, 2)}, {"x": spec(2), "y": spec(3)}]
)
def test_inputs_without_one_batch_are_refused(given):
  with pytest.raises(ValueError, match="the same B"):
    table(small("cnn"), given)
