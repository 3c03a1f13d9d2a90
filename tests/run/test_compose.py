"""Composing: every method that a config can name builds and starts."""

import jax
import numpy as np
import optax
import pytest

from fedjax_peft import algorithms, build, compose, config, tree
from fedjax_peft import rules as rules_lib

ALGORITHMS = {
  "afl": "rate=0.1",
  "apfl": "adaptive=true",
  "centralized": "",
  "clustered": "clusters=2",
  "ditto": "strength=0.1",
  "fedasync": "rate=0.5",
  "fedavg": "",
  "fedbuff": 'kind="hinge"',
  "feddpa": "weight=0.5",
  "feddyn": "alpha=0.1",
  "fednova": "momentum=0.0",
  "fedper": 'head="head/.*"',
  "fedrep": 'head_steps=1, head="head/.*"',
  "flasc": "down=0.5, up=0.5",
  "gossip": 'graph="ring"',
  "hierarchical": "edges=2, period=2",
  "hilora": "edges=2",
  "ifca": "clusters=2, spread=0.01",
  "local_only": "",
  "mime_lite": "momentum=0.5",
  "moon": "mu=0.5, temperature=0.5",
  "per_fedavg": "rate=0.1",
  "pfedme": "strength=1.0, inner_rate=0.1",
  "qffl": "q=1.0, rate=0.1",
  "reptile": "rate=0.5",
  "scaffold": "",
}
SGD = ("server.optimizer=sgd", "server.learning_rate=1.0")
ALONE = {
  "clustered": ('cohort.group={by="update"}',),
  "fedasync": SGD,
  "flasc": ('uplink=[{link="weigh"}]',),
  "gossip": ('uplink=[{link="weigh"}]', *SGD),
  "reptile": SGD,
}
LORA = '{method="lora", rank=2}, {method="tune", where="head/.*"}'
PEFT = {
  "feddpa": '{method="stack", ranks={shared=2, personal=2}}',
  "hilora": '{method="stack", ranks={shared=2, cluster=2, personal=2}}',
}


def built(tiny, *overrides) -> build.Parts:
  return build.build(config.load(tiny, list(overrides)))


def test_every_algorithm_of_a_config_is_listed_here():
  assert set(ALGORITHMS) == set(compose.ALGORITHMS)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithm_is_built_by_its_name(tiny, name):
  options = ALGORITHMS[name]
  comma = ", " if options else ""
  parts = built(
    tiny,
    f"model.peft=[{PEFT.get(name, LORA)}]",
    f'algorithm={{name="{name}"{comma}{options}}}',
    *ALONE.get(name, ()),
  )
  assert jax.tree.leaves(parts.state.nodes)
  if name == "centralized":
    assert len(parts.data) == 1


@pytest.mark.parametrize(
  ("name", "taken"),
  [
    ('"flasc"', "uplink"),
    ('"reptile", rate=0.5', "server"),
    ('"local_only"', "placement"),
    ('"centralized"', "placement"),
    ('"fedasync"', "server"),
    ('"gossip"', "uplink"),
  ],
)
def test_what_an_algorithm_says_itself_is_not_dropped_in_silence(
  tiny, name, taken
):
  with pytest.raises(ValueError, match=f"'{taken}'"):
    built(
      tiny,
      f"model.peft=[{LORA}]",
      'placement={"head/.*"="frozen"}',
      f"algorithm={{name={name}}}",
    )


@pytest.mark.parametrize("name", rules_lib.RULES)
def test_a_rule_is_built_by_its_name(tiny, name):
  link = "weigh" if rules_lib.RULES[name]().linear else "count"
  parts = built(
    tiny,
    f"model.peft=[{LORA}]",
    f'aggregate.rule={{method="{name}"}}',
    f'uplink=[{{link="{link}"}}]',
    "server.optimizer=sgd",
  )
  residuals = [k for k in parts.model.params if k.endswith("lora_residual")]
  assert bool(residuals) == rules_lib.RULES[name]().residual


@pytest.mark.parametrize("name", sorted(build.PEFT))
def test_adapters_are_built_by_their_name(tiny, name):
  more = {"stack": ", ranks={one=2, two=1}", "ravan": ", rank=4"}.get(name, "")
  parts = built(tiny, f'model.peft=[{{method="{name}"{more}}}]')
  assert parts.model.params
  everything = built(tiny, "model.peft=[]").model.params
  assert tree.size(parts.model.params) < tree.size(everything)


@pytest.mark.parametrize("qtype", ["int8", "nf4", "int4"])
def test_a_base_is_quantized_under_its_adapters(tiny, qtype):
  parts = built(tiny, f"model.peft=[{LORA}]", f"model.quantize={qtype}")
  plain = built(tiny, f"model.peft=[{LORA}]")
  assert set(parts.model.params) == set(plain.model.params)
  assert tree.nbytes(parts.model.base) < tree.nbytes(plain.model.base)


@pytest.mark.parametrize(
  "table",
  [
    'method="median"',
    'method="trimmed_mean", trim=0.2',
    'method="geometric_median"',
    'method="centered_clip", radius=1.0',
    'method="krum", byzantine=1',
    'method="multi_krum", byzantine=1',
    'method="bulyan", byzantine=0',
    'method="norm_filter"',
  ],
)
def test_a_reduction_is_built_by_its_name(tiny, table):
  parts = built(tiny, f"aggregate.reduce={{{table}}}", "uplink=[]")
  assert not parts.algorithm.tiers[0].reduce.linear


def test_shares_of_ranks_are_given_to_the_clients(tiny):
  overrides = (
    f"model.peft=[{LORA}]",
    'aggregate.rule={method="fedit"}',
    "aggregate.ranks={1=0.5, 2=0.5}",
  )
  ranks = built(tiny, *overrides).data.traits["rank"]
  half = len(ranks) // 2
  assert sorted(ranks) == [1] * half + [2] * (len(ranks) - half)
  assert (built(tiny, *overrides).data.traits["rank"] == ranks).all()


@pytest.mark.parametrize(
  "table",
  [
    '"sign_flip"',
    '"label_flip"',
    '"scale", factor=3.0',
    '"gaussian", sigma=1.0',
  ],
)
def test_an_attack_is_built_by_its_name(tiny, table):
  parts = built(tiny, f"attack={{method={table}, fraction=0.25}}")
  assert parts.data.traits["attacker"].sum() == round(0.25 * len(parts.data))
  assert "attacker" in parts.algorithm.work.traits


@pytest.mark.slow
def test_the_edges_of_hilora_may_be_found_by_adapters(tiny):
  overrides = (
    f"model.peft=[{PEFT['hilora']}]",
    'algorithm={name="hilora", edges=2}',
  )
  parts = built(tiny, *overrides, 'cohort.group={by="adapters"}')
  first = parts.cohort.init()["nodes"]  # nothing is trained to build
  assert not first.any()
  _, nodes = parts.group.before(parts.state, first, 0)
  assert set(nodes.tolist()) == {0, 1}
  how = parts.algorithm.work.local
  found = algorithms.find_nodes(parts.model, how, parts.data, count=2)
  np.testing.assert_array_equal(nodes, found)
  assert parts.group.before(parts.state, nodes, 1)[1] is nodes
  assert built(tiny, *overrides).group is None
  network = 'network.clock={kind="synchronous"}'
  near = built(tiny, *overrides, network)
  assert near.group is None
  assert "nodes" in near.cohort.init()  # the edges that they are near to
  both = built(tiny, *overrides, network, 'cohort.group={by="device"}')
  np.testing.assert_array_equal(both.cohort.init()["nodes"], both.group.first)


def test_feddpa_may_mix_its_adapters_by_example(tiny):
  overrides = [f"model.peft=[{PEFT['feddpa']}]"]
  plain = built(tiny, *overrides, 'algorithm={name="feddpa", weight=0.5}')
  table = 'algorithm={name="feddpa", weight=0.5, by_example=0.25}'
  run = config.load(tiny, [*overrides, table])
  model = compose.model_of(run, plain.model, plain.data.examples)
  how = plain.algorithm.work.local
  made = compose.algorithm_of(run, plain.data, model, how, optax.sgd(1.0))
  whole = build.build(run).model.params
  assert algorithms.nearness.CENTER in whole
  more = made.work.placement.items() - plain.algorithm.work.placement.items()
  assert more == {("feddpa/center", "device")}
  assert compose.model_of(
    config.load(tiny, overrides), plain.model, plain.data.examples
  ) is plain.model  # fmt: skip
  wrong = config.load(tiny, [*overrides, table.replace("0.25", "2.0")])
  with pytest.raises(ValueError, match=r"by_example: most must be in \[0, 1\]"):
    compose.model_of(wrong, plain.model, plain.data.examples)
