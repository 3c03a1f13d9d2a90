"""Stages: every part and every cut of every model, and what a crossing sees."""

import collections
import functools
import itertools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import toy
from fedjax_peft import models, peft

DEPTH = 3
SMALL = {"width": 8, "depth": DEPTH, "heads": 2, "ffn": 12}
TEXT = {"vocab": 11, **SMALL}
VISION = {"image_size": 6, "patch": 3, "channels": 1, "mean": (0.5,)}
VISION |= {"std": (0.25,), **SMALL}
RNG = np.random.default_rng(0)
TOKENS = jnp.array(RNG.integers(0, 11, (3, 5)), jnp.int32)
LENGTH = jnp.array([2, 5, 4], jnp.int32)
IMAGES = jnp.array(RNG.uniform(size=(3, 6, 6)), jnp.float32)
CASES = {
  "encoder": ("encoder", TEXT | {"pooler": True, "classes": 3}, True),
  "headless encoder": ("encoder", TEXT | {"pool": "first"}, False),
  "tied decoder": ("decoder", TEXT | {"groups": 1}, True),
  "untied decoder": (
    "decoder",
    TEXT | {"groups": 2, "tied": False, "head_norm": True, "post_norm": True},
    False,
  ),
  "vit": ("vit", VISION | {"layer_scale": 0.0, "classes": 3}, None),
  "vit with registers": (
    "vit",
    VISION | {"patch": 6, "registers": 2, "distilled": True, "pool": "mean"},
    None,
  ),
  "vit of both": (
    "vit",
    VISION | {"pool": "both", "pooler": True, "classes": 3},
    None,
  ),
  "cnn": (
    "cnn",
    {"image_size": 6, "window": 3, "filters": (4,), "classes": 3}
    | {"hidden": (7, 5)},
    None,
  ),
}
# To be prompted: all streams have five places, and share their operations.
SHORT = {"short vit": ("vit", VISION | {"patch": 6, "distilled": True}, None)}
LINEAR = ".*/(query|value|down)"
TUNED = {
  "lora": lambda m: peft.lora(m, 2, LINEAR),
  "ia3": lambda m: peft.ia3(m, LINEAR),
  "bottleneck": lambda m: peft.bottleneck(m, 2, ".*/output"),
  "bottleneck of blocks": lambda m: peft.bottleneck(m, 2, "layers", width=8),
  "prompt": lambda m: peft.prompt(m, 2, deviation=1.0),
  "deep prompt": lambda m: peft.deep_prompt(m, 2, deviation=1.0),
  "prefix": lambda m: peft.prefix(peft.lora(m, 2), 2, deviation=1.0),
  "frozen": lambda m: peft.freeze(peft.lora(m, 2), precision="bf16"),
  "quantized": lambda m: peft.lora(
    peft.quantize_base(m, "int8", ".*/(query|up)", tile=4), 2
  ),
}
PAIRS = [
  *(("encoder", name) for name in ("ia3", "bottleneck", "prompt", "prefix")),
  *(("encoder", name) for name in ("bottleneck of blocks", "frozen")),
  *(("tied decoder", name) for name in ("lora", "prompt", "quantized")),
  ("vit of both", "lora"),
  *(("short vit", name) for name in ("prompt", "deep prompt")),
]


def filled(make):
  """A module whose structure is that of make(), of values of order one.

  It is made of numpy's numbers: drawing each shape with jax compiles for it.
  """
  graph, state = nnx.split(nnx.eval_shape(make), graph=True)
  rng = np.random.default_rng(0)

  def values(leaf):
    if jnp.issubdtype(leaf.dtype, jnp.floating):
      value = 0.5 * rng.normal(size=leaf.shape)
    else:
      value = rng.integers(-3, 4, leaf.shape)
    return jnp.asarray(value.astype(leaf.dtype))

  return nnx.merge(graph, jax.tree.map(values, state))


@functools.cache
def model(case, unroll=False):
  kind, options, _ = (CASES | SHORT)[case]
  if kind != "cnn":
    options = options | {"unroll": unroll, "keep": "all" if unroll else "dots"}
  return filled(lambda: models.load(kind, **options))


@functools.cache
def tuned(case, method):
  if method == "quantized":
    pytest.importorskip("qwix")
  module = model(case, unroll=True)  # made here: inside it would be traced
  return filled(lambda: TUNED[method](module))


def inputs(case, prompted=False):
  kind, _, has_length = (CASES | SHORT)[case]
  if kind in ("vit", "cnn"):
    return (IMAGES,)
  tokens = TOKENS[:, : 3 if prompted else 5]
  return (tokens, LENGTH) if has_length else (tokens,)


def count(model):
  return len(model.stages())


def leaves(model):
  """{path: array}."""
  state = nnx.to_flat_state(nnx.state(model, graph=True))
  return {"/".join(map(str, p)): v.get_raw_value() for p, v in state}


def singles(model):
  """Each stage as a part."""
  return [model.part(i, i + 1) for i in range(count(model))]


def owners(model, path):
  """The stages that own a variable, or a row of it."""
  stages = model.stages()
  return [
    s for s in stages if any(f"{path}/".startswith(f"{o}/") for o in s.owns)
  ]


def same(came, wanted):
  """Whether two arrays, or messages, have the same bits."""
  assert jax.tree.structure(came) == jax.tree.structure(wanted)
  return all(
    toy.same_bits(np.asarray(a), np.asarray(b))
    for a, b in zip(jax.tree.leaves(came), jax.tree.leaves(wanted))
  )


def check_every_part(module, arguments):
  """Every run of stages maps the message before it to the one after it.

  So whatever the model is cut into computes what it does.
  """
  total, whole = count(module), module(*arguments)
  before = {0: arguments}
  for stop in range(1, total + 1):
    before[stop] = (module.part(0, stop)(*arguments),)
  assert same(before[total][0], whole)
  for start, stop in itertools.combinations(range(1, total + 1), 2):
    came = module.part(start, stop)(*before[start])
    assert same(came, before[stop][0]), (start, stop)
  return before


@pytest.mark.parametrize("case", CASES)
def test_parts_one_after_another_are_the_model_bit_for_bit(case):
  before = check_every_part(model(case, unroll=True), inputs(case))
  for stop in range(1, count(model(case))):
    (message,) = before[stop]
    has_length = case == "encoder"
    assert set(message) == ({"x", "length"} if has_length else {"x"})
    assert {len(leaf) for leaf in message.values()} == {3}


@pytest.mark.parametrize(("case", "method"), PAIRS)
def test_a_model_with_adapters_is_cut_like_any_other(case, method):
  module, x = tuned(case, method), inputs(case, "prompt" in method)
  parts, wanted = singles(module), module(*x)
  for part in parts:
    x = (part(*x),)
  assert same(x[0], wanted)
  names = [name for part in parts for name in leaves(part)]
  assert set(names) == set(leaves(module))


def test_the_names_of_the_stages():
  def names(case):
    return [stage.name for stage in model(case).stages()]

  layers = [f"layers/{i}" for i in range(DEPTH)]
  for case in ("encoder", "tied decoder"):
    assert names(case) == ["embeddings", *layers, "head"]
  assert names("vit") == ["patches", "tokens", *layers, "head"]
  assert names("cnn") == ["convolutions/0", "dense/0", "dense/1", "head"]


@pytest.mark.parametrize("case", CASES)
def test_every_variable_or_row_of_one_is_owned_by_one_stage(case):
  module = model(case)
  if case != "cnn":
    more = lambda m: peft.deep_prompt(peft.prefix(peft.lora(m, 2), 2), 2)  # noqa: E731
    module = filled(lambda plain=module: more(plain))
  for path, leaf in leaves(module).items():
    rows = [stage.row for stage in owners(module, path)]
    assert rows in ([None], list(range(leaf.shape[0]))), path
    assert (len(rows) == DEPTH) == path.startswith("layers/")


@pytest.mark.parametrize("case", CASES)
def test_parts_own_different_variables_that_together_are_the_model(case):
  module = model(case)
  whole = leaves(module)
  for cut in range(1, count(module)):
    first, second = module.part(0, cut), module.part(cut, count(module))
    first, second = leaves(first), leaves(second)
    both = set(first) & set(second)
    tied = {"embeddings/token/embedding"} if case == "tied decoder" else set()
    assert set(first) | set(second) == set(whole)
    assert {path for path in both if not path.startswith("layers/")} == tied
    for path, leaf in whole.items():
      pieces = [part[path] for part in (first, second) if path in part]
      if len(pieces) == 1 or path in tied:
        assert all(piece is leaf for piece in pieces), path  # not a copy
      else:
        assert toy.same_bits(np.concatenate(pieces), np.asarray(leaf)), path


def backward(parts, arguments):
  """(output, gradient of each part's variables, {path: array})."""
  graphs, states = zip(*(nnx.split(part) for part in parts))
  rng = np.random.default_rng(2)

  @functools.partial(jax.grad, has_aux=True)
  def gradient(states, arguments):
    x = arguments
    for graph, state in zip(graphs, states):
      x = (nnx.merge(graph, state)(*x),)
    weight = jnp.array(rng.normal(size=x[0].shape), jnp.float32)
    return (x[0] * weight).sum(), x[0]

  gradients, out = jax.jit(gradient)(states, arguments)
  return out, [leaves(gradient) for gradient in gradients]


def check_gradient(came, wanted, limit):
  """Gradients of parts, put together, are that of the whole."""
  for path, whole in wanted.items():
    pieces = [part[path] for part in came if path in part]
    is_tied = len(pieces) == 2 and not path.startswith("layers/")
    joined = sum(pieces) if is_tied else np.concatenate(pieces)
    # Keys with a bias shift all scores alike: its gradient is rounding.
    scale = 1 if path.endswith("key/bias") else np.abs(whole).max()
    assert scale > 1e-3, path
    np.testing.assert_allclose(
      joined, whole, rtol=0, atol=limit * scale, err_msg=path
    )


def limit_of(tol):
  """A block has 6 or 7 products of at most 12 terms, there and back."""
  return tol(jnp.float32, 2 * DEPTH * 7 * 12)


@pytest.mark.parametrize(
  ("case", "cuts"),
  [
    ("encoder", (2,)),
    ("tied decoder", (1, 2, 3, 4)),
    ("vit", (1, 2)),
    ("cnn", (1, 2, 3)),
  ],
)
def test_the_gradient_through_cuts_is_that_of_the_model(case, cuts, tol):
  """Under scans: blocks between cuts are compiled apart, so bits may differ."""
  module, arguments = model(case), inputs(case)
  ends = itertools.pairwise((0, *cuts, count(module)))
  wanted_out, (wanted,) = backward([module], arguments)
  out, came = backward([module.part(*pair) for pair in ends], arguments)
  limit = limit_of(tol)
  scale = np.abs(wanted_out).max()
  np.testing.assert_allclose(out, wanted_out, rtol=0, atol=limit * scale)
  check_gradient(came, wanted, limit)


@pytest.mark.parametrize(
  ("case", "start"), [("tied decoder", 2), ("vit of both", 3), ("cnn", 1)]
)
def test_a_part_of_a_part_is_a_part(case, start):
  module, stop = model(case), count(model(case))
  came = module.part(start, stop).part(start + 1, stop - 1)
  wanted = module.part(start + 1, stop - 1)
  assert came.span == wanted.span
  assert leaves(wanted)
  assert same(leaves(came), leaves(wanted))
  assert not any(path.startswith("embeddings") for path in leaves(wanted))


@pytest.mark.parametrize("case", ["tied decoder", "untied decoder"])
def test_the_last_part_makes_logits_of_its_stream_piece_by_piece(case):
  """As `losses.next_token` does, of the whole model and of a part."""
  module = model(case, unroll=True)
  device, server = module.part(0, 3), module.part(3, count(module))
  message = device(TOKENS, LENGTH)
  assert set(message) == {"x"}  # no later stage reads the length
  stream = server.hidden(message)
  assert same(stream, module.hidden(TOKENS, LENGTH))
  assert same(server.unembed(stream[:, :2]), server(message)[:, :2])


def test_a_text_without_length_sends_none():
  module = model("encoder", unroll=True)
  message = module.part(0, 2)(TOKENS)
  assert set(message) == {"x"}
  assert same(module.part(2, count(module))(message), module(TOKENS))


def test_rows_that_do_not_train_stay_in_the_part_that_has_them():
  """Of `last` layers, of which a part may have all, some or none."""
  module = peft.last(model("encoder"), 2, "layers/ffn/up/.*")
  whole = peft.split(module)
  for cut in range(1, count(module)):
    both = nnx.Dict(
      device=module.part(0, cut), server=module.part(cut, count(module))
    )
    parts = peft.split(both)
    for name, wanted in whole.params.items():
      pieces = [
        parts.params[f"{part}/{name}"]
        for part in ("device", "server")
        if f"{part}/{name}" in parts.params
      ]
      assert all(len(piece) for piece in pieces)
      assert same(np.concatenate(pieces), np.asarray(wanted)), (cut, name)
    assert len(parts.params) == (4 if cut == 3 else 2)


def test_adapters_may_be_put_in_after_a_cut():
  """Also a prompt, of which only the part that embeds needs to know."""
  for case in ("encoder", "short vit"):
    module, x = model(case, unroll=True), inputs(case, prompted=True)
    first, stop = 3, count(module)
    device, server = module.part(0, first), module.part(first, stop)
    prompt = lambda m: peft.prompt(m, 2, deviation=1.0)  # noqa: E731
    wanted = prompt(module)(*x)
    message = prompt(device)(*x)
    assert same(server(message), wanted)
    plain = sum(leaf.nbytes for leaf in device(*x).values())
    paid = sum(leaf.nbytes for leaf in message.values())
    assert paid - plain == 3 * 2 * 8 * 4  # B P D floats, and nothing else
    assert not same(server(device(*x)), wanted)
    with pytest.raises(ValueError, match="no module takes a prompt"):
      prompt(server)
    adapted = peft.lora(nnx.Dict(device=device, server=server), 2)
    trained = peft.split(adapted).params
    rows = sum(len(v) for k, v in trained.items() if k.endswith("query/lora_a"))
    assert rows == DEPTH


class Watch(nnx.Module):
  """Notes what it sees, and how often it is armed."""

  def __init__(self):
    self.armed = 0

  def arm(self):
    self.armed += 1
    seen = []

    def visit(i, x):
      seen.append((i, x.shape))
      return x

    Watch.seen = seen
    return visit


class Push(nnx.Module):
  """Adds to the stream after one stage; after it no gradient comes back."""

  def __init__(self, at):
    self.at = nnx.Variable(jnp.int32(at))

  def arm(self):
    at = self.at[...]

    def visit(i, x):
      pushed = jax.lax.stop_gradient(x) + jnp.float32(0.25)
      return jnp.where(at == i, pushed, x)

    return visit


def crossed(module, crossing):
  copy = nnx.clone(module)
  copy.crossing = crossing
  return copy


@pytest.mark.parametrize("case", CASES)
def test_a_crossing_sees_the_stream_after_every_stage_but_the_last(case):
  module, x = model(case, unroll=True), inputs(case)
  watched = crossed(module, Watch())
  assert same(watched(*x), module(*x))
  assert watched.crossing.armed == 1
  wanted = []
  for i, part in enumerate(singles(module)[:-1]):
    x = (part(*x),)
    wanted.append((i, x[0]["x"].shape))
  assert Watch.seen == wanted


@pytest.mark.parametrize("case", ["encoder", "vit of both", "cnn"])
def test_what_a_crossing_does_is_done_between_two_parts(case):
  module, x = model(case, unroll=True), inputs(case)
  total = count(module)
  for i in range(total - 1):
    message = module.part(0, i + 1)(*x)
    message |= {"x": message["x"] + 0.25}
    wanted = module.part(i + 1, total)(message)
    assert same(crossed(module, Push(i))(*x), wanted)
    some = crossed(module, Push(i)).part(0, i + 1)(*x)
    assert same(some["x"], message["x"])  # a part keeps the crossing


def test_a_crossing_in_a_scan_takes_the_place_of_a_stage_from_an_array(tol):
  """One program for all places; the gradient stops at the one it is told."""
  module, total = model("encoder"), count(model("encoder"))
  graph, params, state = nnx.split(crossed(module, Push(0)), nnx.Param, ...)

  @jax.jit
  def run(params, at):
    def loss(params):
      other = jax.tree.map(lambda _: at, state)
      out = nnx.merge(graph, params, other)(TOKENS, LENGTH)
      return (out * jnp.arange(9.0).reshape(3, 3)).sum(), out

    return jax.grad(loss, has_aux=True)(params)

  limit = limit_of(tol)
  unrolled = model("encoder", unroll=True)
  for i in range(total - 1):
    gradient, out = run(params, jnp.int32(i))
    wanted = crossed(unrolled, Push(i))(TOKENS, LENGTH)
    scale = np.abs(wanted).max()
    np.testing.assert_allclose(out, wanted, rtol=0, atol=limit * scale)
    flat = leaves(gradient)
    assert not np.any(flat["embeddings/token/embedding"])
    moved = np.abs(flat["layers/ffn/up/kernel"]).max((1, 2)) > 0
    assert list(moved) == [row >= i for row in range(DEPTH)]
    assert np.any(flat["head/kernel"])


def primitives(jaxpr):
  """How often each primitive is in a program, and in those inside it."""
  found = collections.Counter()
  for eqn in jaxpr.eqns:
    inner = list(jax.extend.core.jaxprs_in_params(eqn.params))
    found.update([eqn.primitive.name] if not inner else [])
    for one in inner:
      found += primitives(getattr(one, "jaxpr", one))
  return found


@pytest.mark.parametrize("case", ["encoder", "tied decoder", "vit of both"])
def test_without_a_crossing_a_scan_holds_the_block_and_nothing_else(case):
  module = model(case)
  number = len(jax.tree.leaves(nnx.state(module.layers)))

  def scan(module):
    graph, state = nnx.split(module)
    traced = jax.make_jaxpr(lambda s: nnx.merge(graph, s)(*inputs(case)))(state)
    (one,) = [e for e in traced.eqns if e.primitive.name == "scan"]
    scanned = len(one.invars) - one.params["num_consts"]
    return one.params["num_carry"], scanned - one.params["num_carry"], one

  graph, state = nnx.split(module.layers)
  row = jax.tree.map(lambda leaf: leaf[0], state)
  shared = {"encoder": (TOKENS > 0,), "vit of both": ()}.get(
    case, (jnp.zeros((2, 5, 2)),)
  )
  block = jax.make_jaxpr(lambda s, x: nnx.merge(graph, s)(x, *shared))
  plain = primitives(block(row, jnp.zeros((3, 5, 8))).jaxpr)
  carried, rows, found = scan(module)
  assert (carried, rows) == (1, number)
  assert primitives(found.params["jaxpr"].jaxpr) == plain
  carried, rows, found = scan(crossed(module, Push(0)))
  assert (carried, rows) == (1, number + 1)  # of each row also its number
  assert primitives(found.params["jaxpr"].jaxpr) > plain


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda m: m.part(2, 2), "stages 0 to 5.*start=2 stop=2.*embeddings"),
    (lambda m: m.part(0, 6), "stages 0 to 5"),
    (lambda m: m.part(1, 3).part(0, 2), "stages 1 to 3"),
    (lambda m: m.part(1, 3)(TOKENS), "takes the message of the part before"),
  ],
)
def test_parts_that_cannot_be_are_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call(model("encoder"))


def test_no_cut_goes_through_a_wrapped_module():
  vit = model("vit")
  wrapped = filled(lambda: peft.bottleneck(vit, 2, "embeddings", width=8))
  with pytest.raises(ValueError, match="'embeddings' is a Bottleneck"):
    wrapped.part(0, 1)
  assert wrapped(IMAGES).shape == (3, 3)
