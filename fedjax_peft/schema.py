"""The schema of a run: frozen dataclasses that explain themselves.

Files, overrides, `--help` and error messages all read the fields below, so a
key has one type, one default and one explanation.
"""

import dataclasses
import json
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import msgspec

Table = dict[str, Any]
Count = Annotated[int, msgspec.Meta(ge=1)]
Natural = Annotated[int, msgspec.Meta(ge=0)]
Positive = Annotated[float, msgspec.Meta(gt=0)]
NonNegative = Annotated[float, msgspec.Meta(ge=0)]
Fraction = Annotated[float, msgspec.Meta(ge=0, lt=1)]


def _doc(text: str, default: Any = dataclasses.MISSING) -> Any:
  """A field that explains itself."""
  if isinstance(default, dict):
    return dataclasses.field(default_factory=dict, metadata={"doc": text})
  return dataclasses.field(default=default, metadata={"doc": text})


def _section(section: type) -> Any:
  """A field that is a table with defaults for everything."""
  return dataclasses.field(default_factory=section)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
  """What is fine-tuned."""

  name: str = _doc("a name from `fedjax-peft models list`, or a directory")
  peft: tuple[Table, ...] = _doc(
    'adapters, applied in order, {method="lora", rank=8}; none trains all: '
    "bitfit(where), bottleneck(size, where, parallel, width, activation, "
    "scale, seed), core(rank, where, update, scale), deep_prompt(length, "
    "where, deviation, seed), dora(rank, where, alpha, scaling, detached, "
    "seed), head(where), ia3(where, side), last(layers, where), lora(rank, "
    "where, alpha, scaling, init, residual, seed), norms(where), "
    "prefix(length, where, deviation, seed), prompt(length, where, "
    "deviation, seed), ravan(rank, where, heads, seed), sparse(density, "
    "where, choose, fisher, seed), stack(ranks, where, alpha, seed), "
    "tune(where), vera(rank, where, first, seed)",
    (),
  )
  quantize: Literal["no", "int8", "nf4", "int4"] = _doc(
    "how the layers' frozen weights are kept", "no"
  )
  loss: Literal["auto", "classification", "next_token"] = _doc(
    "what clients minimize; auto: classification if the data have labels",
    "auto",
  )
  options: Table = _doc("fields of the architecture, {width=64}", {})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
  """A model whose parts compute in different places."""

  ends: Table = _doc(
    'the last stage of each part, {device = "layers/1"}, by name or number; '
    "what is left is the part `server`. Parts called device... or home... "
    "compute at the client; see `fedjax-peft stages`",
    {},
  )
  cuts: Table = _doc(
    "share of the clients whose device computes so many stages, {2 = 0.5, "
    "whole = 0.5}, in place of ends; drawn with the seed",
    {},
  )
  scheme: Literal[
    "splitfed",
    "shared_server",
    "sequential",
    "lockstep",
    "one_gradient",
    "local_loss",
  ] = _doc(
    "splitfed: each client has a copy of the server's parts; shared_server: "
    "clients work one after another on the same; sequential: on the whole "
    "model; lockstep: the server's parts take one step for all; one_gradient: "
    "and so do the devices'; local_loss: the device has a head of its own",
    "splitfed",
  )
  up: tuple[Table, ...] = _doc(
    'links that activations cross, {link="affine", bits=8}; see uplink', ()
  )
  down: tuple[Table, ...] = _doc("links that their gradients cross", ())
  bits: bool = _doc(
    "bits of a value are each client's own, as network.allocate says, in place "
    "of up and down (32 where it says nothing)",
    False,
  )
  gradient: bool = _doc(
    "a gradient comes back over the first cut; without (or with a cache) the "
    "device's part must be frozen",
    True,
  )
  feedback: bool = _doc(
    "say in the next step what up and down could not say of a batch; helps "
    "gradients of the same examples in every step (client.shuffle=false)",
    False,
  )
  cache: Literal["no", "float32", "bfloat16"] = _doc(
    "compute a frozen first part once for each example, and keep it so", "no"
  )
  server: Literal["parallel", "shared"] = _doc(
    "each client at work has a server of its own, or they divide one",
    "parallel",
  )
  server_flops: Positive = _doc("of that server, a second", 1e13)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Client:
  """What one client does in one round."""

  optimizer: Literal["sgd", "momentum", "adam", "adamw"] = _doc(
    "optimizer of the local steps", "sgd"
  )
  learning_rate: Positive = _doc("size of a local step", 0.1)
  momentum: Fraction = _doc("of optimizer momentum", 0.9)
  batch: Count = _doc("examples in a local step", 8)
  epochs: Count | None = _doc("passes over the client's examples (1)", None)
  steps: Count | None = _doc("local steps, in place of epochs", None)
  shuffle: bool = _doc("draw a new order in every pass", True)
  drop_remainder: bool = _doc("leave out a last batch that is not full", False)
  proximal: NonNegative = _doc("FedProx: weight of the pull to the start", 0.0)
  schedule: Literal["constant", "linear", "cosine"] = _doc(
    "how the learning rate moves over the rounds", "constant"
  )
  warmup: Natural = _doc("rounds over which the learning rate rises", 0)

  def __post_init__(self):
    """Refuses two answers to one question."""
    if self.epochs is not None and self.steps is not None:
      raise ValueError(
        f"expected epochs or steps, got both (epochs={self.epochs}, "
        f"steps={self.steps}); remove one of them"
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Server:
  """What the server does with the sum of what clients report."""

  optimizer: Literal["sgd", "momentum", "adam", "yogi", "adagrad"] = _doc(
    "the optax optimizer of that name, on the mean report; sgd is FedAvg", "sgd"
  )
  learning_rate: Positive = _doc("size of a server step", 1.0)
  momentum: Fraction = _doc("of optimizer momentum", 0.9)
  b1: Fraction = _doc("decay of the first moment (adam, yogi)", 0.9)
  b2: Fraction = _doc("decay of the second moment (adam, yogi)", 0.99)
  eps: Positive = _doc("added to the root of the second moment", 1e-3)
  schedule: Literal["constant", "linear", "cosine"] = _doc(
    "how the learning rate moves over the rounds", "constant"
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Aggregate:
  """How low-rank adapters of many clients become one."""

  rule: Table = _doc(
    'a rule of `fedjax-peft methods`, {method="fedex", rank=4} (mean)', {}
  )
  ranks: Table = _doc(
    "share of the clients that have a rank, {4 = 0.5, 8 = 0.5}; drawn with the "
    "seed (all have the adapters' rank)",
    {},
  )
  watch: bool = _doc(
    "record the error of averaging factors, ranks and angles", False
  )
  reduce: Table = _doc(
    'a robust reduction in place of the sum, {method="krum", byzantine=2}: '
    "median(), trimmed_mean(trim), geometric_median(steps, eps), "
    "centered_clip(radius, steps), krum(byzantine), multi_krum(byzantine, "
    "keep), bulyan(byzantine), norm_filter(factor)",
    {},
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cohort:
  """Who takes part in a round."""

  sampler: Literal["uniform", "poisson", "cyclic"] = _doc(
    "uniform: exactly `size` clients; poisson: `size` on average; cyclic: the "
    "same, each client at most once in `period` rounds",
    "uniform",
  )
  period: Count = _doc("of the cyclic sampler", 8)
  size: Count = _doc("clients a round", 64)
  group: Table = _doc(
    'which cluster, or edge, a client belongs to, {by="update", at=[5]}: '
    "loss() of the clusters' models, update(at, clusters) by the directions of "
    "reports, adapters(compare) by what clients make of the first model, "
    "device() by speed and distance, planted() as data.groups says",
    {},
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network:
  """A simulated network: time, energy, money; off if nothing is said."""

  clock: Table = _doc(
    'when a round ends, {kind="deadline", seconds=60}: synchronous(timeout), '
    "in_turn(), deadline(seconds, over), "
    "buffered(concurrency, buffer, together), "
    "asynchronous(concurrency, together), periodic(concurrency, seconds)",
    {},
  )
  fleet: Table = _doc(
    "share of the clients that have a machine, {phone = 0.7, gateway = 0.3}: "
    "phone, phone_low, gateway, old_pc, industrial_pc, edge_server, cloud "
    "(phone)",
    {},
  )
  fleet_file: str = _doc("a CSV with a row for each client, in its place", "")
  spread: NonNegative = _doc("deviation of the log of speed in a kind", 0.0)
  radio: Table = _doc(
    'links of the clients, {kind="wifi"}: cell, wifi, wired, satellite, '
    "trace(path, period) or radio, with any option of "
    "fedjax_peft.network.radio.radio (cell)",
    {},
  )
  also: tuple[Table, ...] = _doc("more radios of each client, like `radio`", ())
  access: Table = _doc(
    'how several radios are used, {use="split"}: split (parts that arrive '
    "together) or switch; margin",
    {},
  )
  stations: Table = _doc(
    "where edges are and clients go: spacing, speed, pause, hysteresis, "
    "capacity, outages={edge=[from_round, to_round]}",
    {},
  )
  backhaul: Table = _doc("the wires between tiers: rate, latency, loss", {})
  available: Table = _doc(
    'who can be reached, {kind="diurnal"}: always(), diurnal(low, high, peak, '
    "hours, zones, hold), markov(on, off, step), trace(path, period)",
    {},
  )
  select: Table = _doc(
    'whom the server asks, {method="resource"}: uniform(), poisson(rate), '
    "by_loss(power), power_of_choice(d), resource(deadline, alpha, explore, "
    "decay, floor, pool, clip), deadline_aware(deadline, serial), fair(alpha), "
    "charged(fraction, then)",
    {},
  )
  scenario: Table = _doc(
    'faults that come together, {name="storm"}: clean(), flaky(rate), '
    "offline(rate, mean_rounds), stragglers(fraction, factor), noisy(rate, "
    "sigma), drift(rounds, fraction), crash(at, every, restart), storm()",
    {},
  )
  faults: tuple[Table, ...] = _doc(
    'what goes wrong, {fault="dropout", rate=0.1}: dropout(rate, phase), '
    "disconnect(rate, mean_rounds), stragglers(fraction, factor, always), "
    "duplicates(rate), late(rate, seconds), corrupt(rate, kind, sigma, flips), "
    "mislabel(rate), crash(at, every, restart), drift_labels(rounds, "
    "fraction), drift_features(rounds, shift, feature, fraction), outage(rate) "
    "of links in the midst of a cut model's steps",
    (),
  )
  steps: Table = _doc(
    'local steps of each client, {method="adaptive", first=8}: adaptive(first) '
    "by the loss, within(deadline, most, least) by its speed",
    {},
  )
  allocate: Table = _doc(
    'what the server decides in every round, {by="joint", weight=0.5}: '
    "equal(), bandwidth() so that all finish together, cut(weight, bits, cuts, "
    "least_cut, error_weight), joint(weight, bits, cuts, least_cut, deadline, "
    "error_weight) with powers and shares; cuts move with split.cuts, bits "
    "with split.bits",
    {},
  )
  prices: Table = _doc(
    "dollars: gigabyte (of a client's traffic), backhaul (a gigabyte between "
    "tiers), request (for each client asked)",
    {},
  )
  recharge: NonNegative = _doc("watts that flow into a battery", 0.0)
  unfit: Literal["exclude", "rank"] = _doc(
    "what becomes of clients whose memory is too small: exclude, or the "
    "largest of aggregate.ranks that fits",
    "exclude",
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Privacy:
  """What a client's part of the sum may tell; off if nothing is said."""

  mechanism: Literal[
    "none",
    "gaussian",
    "banded",
    "discrete_gaussian",
    "skellam",
    "local",
    "example",
  ] = _doc(
    "gaussian: noise on the sum of clipped messages; banded: the same, later "
    "rounds take a part of it back (cohort.sampler=cyclic); discrete_gaussian, "
    "skellam: whole numbers by every client, in a secure sum; local: on every "
    "message; example: on the gradients of every local step; none: messages "
    "are bounded, nothing more",
    "none",
  )
  clip_norm: Positive | None = _doc(
    "L2 bound of a client's message (of the gradient of an example)", None
  )
  bands: Count | None = _doc(
    "rounds that banded noise is correlated over (cohort.period)", None
  )
  metric: Literal["factors", "product"] = _doc(
    "what is bounded: the numbers that are sent, or what they change in the "
    "adapters' layers, which is the same however factors are scaled "
    "(aggregate.rule ffa)",
    "factors",
  )
  adaptive: Table = _doc(
    "the bound follows a quantile of what clients send, from clip_norm on, "
    "{quantile=0.5}: (quantile, rate, weight)",
    {},
  )
  multiplier: Positive | None = _doc(
    "standard deviation of the noise / L2 bound of one client", None
  )
  epsilon: Positive | None = _doc(
    "of the whole run, in place of multiplier: the least noise for it",
    None,
  )
  delta: Positive = _doc(
    "at which epsilon is told; well below 1 / clients", 1e-6
  )
  accountant: Literal["rdp", "pld"] = _doc(
    "rdp: Renyi, quick; pld: privacy loss distributions, tighter", "rdp"
  )
  max_weight: Count = _doc(
    "examples that a client counts for at most; 1: all clients alike", 1
  )
  secure: Table = _doc(
    "the server sees the sum alone, {dropout=0.05}: (dropout, corrupt, "
    "security, correctness, lying) of clients and of what may go wrong, "
    "retries with other clients, (bits, rotation, failure) of the grid, "
    "mode=protocol has every message said, with real keys (simulated)",
    {},
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
  """What the run may spend; it ends with the round that exceeds one."""

  bytes: Positive | None = _doc("over all links, up and down", None)
  joules: Positive | None = _doc("of all clients' machines", None)
  dollars: Positive | None = _doc("of all that is paid for", None)
  seconds: Positive | None = _doc("of simulated time", None)
  epsilon: Positive | None = _doc("of differential privacy", None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate:
  """How accuracy is measured, client by client."""

  every: Count = _doc(
    "rounds between two evaluations; the last is always one", 10
  )
  batch: Count = _doc("examples evaluated at a time on a device", 16)
  clients: Count | None = _doc(
    "test so many clients only, spread evenly (all)", None
  )
  first: bool = _doc("also measure before the first round", False)
  personalize: Natural = _doc(
    "also test each client after so many local steps of its own", 0
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Governance:
  """Which rounds become the model, and who can tell; off if nothing is said."""

  sign: bool = _doc(
    "sign every version of the model and every line of the audit log (Ed25519)",
    False,
  )
  key: str = _doc(
    "file of the signing key, made if there is none (governance.key in the run "
    "directory)",
    "",
  )
  gate: Table = _doc(
    "rounds after which the model is worse, on examples that the server has, "
    'are taken back, {metric="accuracy", tolerance=0.05}: (metric, tolerance, '
    "window)",
    {},
  )
  holdout: Fraction = _doc(
    "share of the test examples that the server has for the gate, > 0", 0.2
  )
  limit: Count = _doc("rounds in a row that are taken back, then it ends", 3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trust:
  """What may cross a boundary; a run that lets more cross stops."""

  up: Table = _doc(
    'what clients may report, {leaves=["head/.*"], most_bytes=10000}: (leaves '
    "of the message by regexes, dtypes on the wire, shapes by leaf, most_bytes "
    "of a message)",
    {},
  )
  down: Table = _doc("what they may be sent, like `up`", {})
  notes: Table = _doc("what they may tell beside their report, like `up`", {})
  cut: Table = _doc("what an example may send over a cut, like `up`", {})
  canaries: Natural = _doc(
    "clients with an example that nobody else has, which every report is "
    "searched for",
    0,
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Execution:
  """How the round is computed; recorded with a run and used on resume."""

  executor: Literal["shard_map", "stream", "pmap", "debug"] | None = _doc(
    "stream: examples stay on the host; debug: one client after another "
    "(chosen)",
    None,
  )
  precision: Literal["bf16", "float32"] = _doc(
    "inputs of the frozen matrix products", "bf16"
  )
  width: Count | None = _doc("lanes of a block, vmapped (chosen)", None)
  blocks: Count = _doc("blocks of lanes on a device", 1)
  segment: Count | None = _doc(
    "clients that finish before they are reduced (chosen)", None
  )
  streams: Count | None = _doc("devices made of a CPU (one for a core)", None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
  """When the run is saved."""

  every: Count = _doc("rounds between two checkpoints", 10)
  keep: Count = _doc("checkpoints that are kept", 2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """One run."""

  name: str = _doc("names the run (the config file's name)", "")
  out: str = _doc("run directory (runs/NAME)", "")
  seed: Natural = _doc("all randomness of a run follows from it", 0)
  rounds: Count = _doc("server updates", 100)
  model: Model
  data: Table = _doc(
    "name from `fedjax-peft data list`, and that data set's options"
  )
  placement: Table = _doc(
    'where leaves live, {"head/.*" = "device"}: cloud, device or frozen', {}
  )
  algorithm: Table = _doc(
    'what clients and server do, {name="scaffold"} (fedavg): '
    "flasc(down, up), scaffold(), fednova(momentum), feddyn(alpha), "
    "mime_lite(momentum), moon(mu, temperature), qffl(q, rate), afl(rate), "
    "ditto(strength), apfl(alpha, adaptive), "
    "pfedme(strength, inner_rate, steps, beta), "
    "per_fedavg(rate, first_order), reptile(rate), fedper(head), "
    "fedrep(head_steps, head), feddpa(weight, after), hilora(edges, stages), "
    "fedbuff(kind, power, start), "
    "fedasync(rate, kind, power, start, proximal), "
    "hierarchical(edges, period, proximal), gossip(graph), "
    "clustered(clusters, shared), "
    "ifca(clusters, spread, seed), "
    "local_only(), centralized()",
    {},
  )
  aggregate: Aggregate = _section(Aggregate)
  attack: Table = _doc(
    'what some clients do wrong, {method="sign_flip", fraction=0.2}: '
    "label_flip(), sign_flip(factor), scale(factor), gaussian(sigma)",
    {},
  )
  split: Split = _section(Split)
  client: Client = _section(Client)
  server: Server = _section(Server)
  cohort: Cohort = _section(Cohort)
  uplink: tuple[Table, ...] = _doc(
    'links a report crosses, in order, {link="clip", clip_norm=1.0}: '
    "clip(clip_norm), weigh(by, max_weight), count(max_weight) for rules that "
    "weigh by themselves, fixed_point(bits), "
    "mask(neighbours), int8(block, stochastic), int4(block, stochastic), "
    "quantize(bits, block, stochastic), affine(bits, per, stochastic), sign(), "
    "rotate(block), "
    "discount(kind, power, start) by staleness, "
    "air(snr_db, fading, threshold) adds all up in the channel, "
    "top_k(fraction), rand_k(fraction), lowrank(rank); "
    "error_feedback=true sends the next time what a link lost",
    ({"link": "weigh"},),
  )
  downlink: tuple[Table, ...] = _doc("links the model crosses", ())
  network: Network = _section(Network)
  privacy: Privacy = _section(Privacy)
  budget: Limits = _section(Limits)
  evaluate: Evaluate = _section(Evaluate)
  governance: Governance = _section(Governance)
  trust: Trust = _section(Trust)
  execution: Execution = _section(Execution)
  checkpoint: Checkpoint = _section(Checkpoint)

  def to_dict(self) -> Table:
    """Returns what JSON can hold."""
    return json.loads(json.dumps(dataclasses.asdict(self)))


class Key(typing.NamedTuple):
  """One dotted key of the schema: its name, type, default and explanation."""

  name: str
  type: Any
  default: Any
  doc: str

  def expected(self) -> str:
    """Returns the type in words."""
    return words(self.type)

  def usage(self) -> str:
    """Returns type and default, 'int >= 1 = 8'."""
    if self.default in (dataclasses.MISSING, None, "", ()):
      return self.expected()
    value = self.default
    if isinstance(value, tuple):
      value = json.dumps(value)
    return f"{self.expected()} = {value}"


def fields(section: type = Config, prefix: str = "") -> Iterator[Key]:
  """Yields every key of the schema, in order."""
  hints = typing.get_type_hints(section, include_extras=True)
  for field in dataclasses.fields(section):
    name, kind = prefix + field.name, hints[field.name]
    if dataclasses.is_dataclass(kind):
      yield from fields(typing.cast(type, kind), f"{name}.")
    else:
      yield Key(name, kind, field.default, field.metadata["doc"])


def words(kind: Any) -> str:
  """'an int of at least 1' for Annotated[int, Meta(ge=1)], and so on."""
  origin, arguments = typing.get_origin(kind), typing.get_args(kind)
  if origin is Annotated:
    meta = arguments[1]
    limits = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    bounds = [
      f"{sign} {getattr(meta, name):g}"
      for name, sign in limits.items()
      if getattr(meta, name) is not None
    ]
    return f"{words(arguments[0])} {' and '.join(bounds)}"
  if origin is Literal:
    return " | ".join(arguments)
  if origin in (typing.Union, types.UnionType):
    return " or ".join(words(a) for a in arguments if a is not type(None))
  if origin is tuple:
    return f"list of {words(arguments[0])}s"
  if origin is dict:
    return "table"
  return "string" if kind is str else getattr(kind, "__name__", str(kind))
