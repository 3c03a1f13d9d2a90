"""What steps cost: bytes of real wires, FLOPs in closed form, memory."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest

import fedjax_peft as fp
import split_worlds as worlds
from fedjax_peft import link, links, one_step, peft, split, tree

LOCAL = fp.local(optax.sgd(0.1), batch=4)
U_SHAPE = {"device": 1, "server": 2, "home": None}
ROWS = (4, 3, 1)  # of a batch, full and not


def costs(module, given, loss=fp.losses.classification, **placement):
  """What the steps of federated averaging with a cut module cost."""
  model = worlds.model(module, loss)
  made = fp.fedavg(model, LOCAL, **placement)
  return split.splitfed(made, model, given).work, model


def net(wires=worlds.PLAIN, ends=None, **placement):
  ends = worlds.ENDS if ends is None else ends
  module = split.pipeline(worlds.net(), ends, wires)
  return costs(module, worlds.PEOPLE.examples, **placement)


@functools.partial(jax.jit, static_argnums=0)
def wires_of(chain, messages):
  """What a link puts on the wire, for each of some messages."""

  def send(x):
    mine, shared = chain.init(link.Spec(tree.spec(x)))
    return chain.send(x, mine, shared, link.alone())[0]

  return [send({"x": x}) for x in messages]


def sent(chain, width):
  """{rows: bytes of the arrays that are sent of a message [rows, width]}."""
  messages = [jnp.ones((rows, width)) for rows in ROWS]
  return dict(zip(ROWS, map(tree.nbytes, wires_of(chain, messages))))


WIRES = {
  "plain": split.Wire(),
  "affine": split.Wire(links.affine(3, per="token"), links.affine(5)),
  "int8": split.Wire(fp.chain(fp.int8(block=128)), fp.int8(block=128)),
  "top_k": split.Wire(fp.top_k(0.25), fp.chain()),
  "silent": split.Wire(links.affine(2), None),
}


@pytest.mark.parametrize("name", WIRES)
def test_bytes_are_those_of_the_wires_of_so_many_examples(name):
  wire = WIRES[name]
  frozen = {"placement": {"device/.*": "frozen"}} if wire.down is None else {}
  job, _ = net(wire, **frozen)
  there = sent(wire.up, 7)
  back = dict.fromkeys(ROWS, 0) if wire.down is None else sent(wire.down, 7)
  for rows in ROWS:
    label = 4 * rows
    assert job.split.bytes(rows, {}) == (there[rows] + label, back[rows])


def test_in_a_u_shape_bytes_cross_both_ways_twice_and_no_label_does():
  wires = [WIRES["affine"], WIRES["int8"]]
  job, _ = net(wires, U_SHAPE)
  to_server, from_server = sent(wires[0].up, 7), sent(wires[0].down, 7)
  to_home, from_home = sent(wires[1].up, 6), sent(wires[1].down, 6)
  for rows in ROWS:
    up = to_server[rows] + from_home[rows]
    down = from_server[rows] + to_home[rows]
    assert job.split.bytes(rows, {}) == (up, down)


def test_between_servers_and_on_the_device_nothing_is_counted():
  one, _ = net(ends={"device": 1, "server": None})
  many, _ = net(ends={"device": 1, "edge": 2, "cloud": None})
  assert one.split.bytes(4, {}) == many.split.bytes(4, {})
  late, _ = net(ends={"device": 2, "server": None})
  many, _ = net(ends={"device": 1, "device_2": 2, "server": None})
  assert late.split.bytes(4, {}) == many.split.bytes(4, {})


def test_of_the_examples_those_features_are_sent_that_the_servers_loss_reads():
  """Labels; for next tokens the tokens and how many there are."""
  ends = {"device": 1, "server": None}
  for kind, read in (("encoder", ["label"]), ("decoder", ["tokens", "length"])):
    given = worlds.examples(kind, 4)
    module = split.pipeline(worlds.zoo(kind), ends)
    job, _ = costs(module, given, worlds.loss_of(kind))
    stream = 4 * 4 * 5 * 8
    length = 4 * 4 * (kind == "encoder")  # a mask of later stages
    told = tree.nbytes({k: given[k] for k in read})
    assert job.split.bytes(4, {}) == (stream + length + told, stream)

  def loss(module, batch, key):
    out = module(tokens=batch["tokens"], length=batch["length"])
    return out.mean(1), {}

  given = worlds.examples("encoder", 4)
  module = split.pipeline(worlds.zoo("encoder"), ends)
  job, _ = costs(module, given, loss)
  assert job.split.bytes(4, {}) == (stream + 4 * 4, stream)


def test_both_sides_flops_are_those_of_the_whole_step():
  for job, model, given in (
    (*net(), worlds.PEOPLE.examples),
    (*net(ends=U_SHAPE), worlds.PEOPLE.examples),
    (*encoder(2), worlds.examples("encoder", 4)),
  ):
    device, server = job.split.flops(4, {})
    assert device > 0
    assert server > 0
    total = one_step.flops_of(job, model.base, dict(given))
    assert device + server == total
    assert job.split.flops(2, {}) == (device / 2, server / 2)


def product(rows, before, after):
  return 2 * rows * before * after


def test_flops_of_the_device_are_those_of_its_products():
  """Forward, and back: by its kernels; by its input where there is one."""
  first, second, last = (product(4, a, b) for a, b in ((5, 7), (7, 6), (6, 3)))
  job, _ = net()
  assert job.split.flops(4, {}) == (2 * first, 3 * second + 3 * last)
  job, _ = net(ends={"device": 2, "server": None})
  assert job.split.flops(4, {}) == (2 * first + 3 * second, 3 * last)
  job, _ = net(ends=U_SHAPE)
  assert job.split.flops(4, {}) == (2 * first + 3 * last, 3 * second)
  frozen = {"device/.*": "frozen"}
  job, _ = net(split.Wire(down=None), placement=frozen)
  assert job.split.flops(4, {}) == (first, 2 * second + 3 * last)
  pipe = split.with_head(worlds.cut(split.Wire(down=None)).origin, 7, 3)
  loss = split.local_loss(fp.losses.classification)
  job, _ = costs(pipe, worlds.PEOPLE.examples, loss)
  own = product(4, 7, 3)
  assert job.split.flops(4, {})[0] == 2 * first + 3 * own


@functools.cache
def encoder(cut):
  """A tiny encoder, adapted, so cut."""
  ends = {"device": cut, "server": None}
  module = peft.lora(split.pipeline(worlds.zoo("encoder"), ends), 2, ".*query")
  return costs(module, worlds.examples("encoder", 4))


def test_the_later_the_cut_the_more_the_device_computes_and_holds():
  """Of an encoder, whose stream is as wide behind one layer as behind two."""
  jobs = [encoder(cut)[0] for cut in (2, 3)]
  device = [job.split.flops(4, {})[0] for job in jobs]
  memory = [job.split.memory({}) for job in jobs]
  assert device[0] < device[1]
  assert memory[0] < memory[1]
  one, two = (job.split.bytes(4, {}) for job in jobs)
  assert one == two


def test_memory_is_leaves_three_times_and_what_the_backward_pass_reads():
  """Of trained leaves there are a gradient and an update too."""
  frozen, _ = net(split.Wire(down=None), placement={"device/.*": "frozen"})
  job, _ = net()
  leaf = 4 * 5 * 7
  inputs, signs = 4 * 4 * 5, 4 * 4 * 7
  assert job.split.memory({}) >= 3 * leaf + inputs
  assert job.split.memory({}) <= 3 * leaf + inputs + 2 * signs
  assert frozen.split.memory({}) < job.split.memory({})
  both, _ = net(ends={"device": 2, "server": None})
  assert both.split.memory({}) > job.split.memory({}) + 3 * 4 * 7 * 6


def test_a_wire_is_measured_at_the_place_where_a_client_is_cut():
  model = worlds.model(split.movable(worlds.net()))
  made = fp.fedavg(model, LOCAL, placement={"crossing/.*": "frozen"})
  job = split.hybrid(made, model, worlds.PEOPLE.examples).work
  for cut in (1, 2):
    fixed, _ = net(ends={"device": cut, "server": None})
    traits = {"cut": cut}
    assert job.split.bytes(3, traits) == fixed.split.bytes(3, {})
    assert job.split.flops(4, traits) == fixed.split.flops(4, {})
    assert job.split.memory(traits) == pytest.approx(
      fixed.split.memory({}),
      abs=4 * 2,  # where it is cut, and how often it was
    )
  total = one_step.flops_of(job, model.base, dict(worlds.PEOPLE.examples))
  assert job.split.bytes(4, {"cut": 3}) == (0, 0)
  assert job.split.flops(4, {"cut": 3}) == (total, 0)
  memory = [job.split.memory({"cut": cut}) for cut in (1, 2, 3)]
  assert memory == sorted(set(memory))


def test_one_gradient_is_one_answer_for_all():
  local = LOCAL._replace(steps=2)
  for common in (True, False):
    wire = split.Wire(common=common)
    module = split.pipeline(worlds.net(), worlds.ENDS, wire)
    model = worlds.model(module)
    made = split.lockstep(model, local, worlds.PEOPLE.examples)
    assert made.work.split.common == common
    assert made.work.split.bytes(4, {}) == net()[0].split.bytes(4, {})


def test_a_device_waits_if_a_gradient_comes_back():
  for wire in WIRES.values():
    frozen = {"placement": {"device/.*": "frozen"}}
    job, _ = net(wire, **frozen)
    assert job.split.waits == (wire.down is not None)
