"""A dry run: what a config stands for, in numbers, before anything is run.

Shapes are traced, nothing is compiled.
"""

from fedjax_peft import build, console, link, schema, tree


def show(run: schema.Config) -> None:
  """Prints data, parameters, bytes of every link, and memory."""
  parts = build.build(run)
  most = parts.cohort.most
  rows = console.facts
  console.say("data", parts.data.card(), "")
  console.say("model", rows(_model(run, parts)), "")
  console.say("a client's round", rows(_client(run, parts, most)), "")
  console.say("bytes of one client's report", rows(_links(parts, most)), "")
  console.say("memory, at least", rows(_memory(parts)))


def _model(run: schema.Config, parts: build.Parts) -> dict[str, str]:
  """Parameters, trained and frozen, and the inputs."""
  params, base = parts.model.params, parts.model.base
  counts = {"trained": params, "frozen": base}
  found = {"name": run.model.name}
  for name, leaves in counts.items():
    size = (
      f"{tree.size(leaves):,} values, {console.decimal(tree.nbytes(leaves))}"
    )
    found[name] = f"{size}, {len(leaves)} arrays"
  for name, leaf in list(params.items())[:8]:
    found[f"  {name}"] = f"{leaf.dtype}{list(leaf.shape)}"
  if len(params) > 8:
    found[f"  and {len(params) - 8} more"] = ""
  for name, spec in parts.data.spec.items():
    found[f"input {name}"] = f"{spec.dtype}{list(spec.shape)} an example"
  return found


def _client(run, parts, most) -> dict[str, str]:
  """Steps and cohort."""
  how = parts.algorithm.work.local
  sizes = parts.data.train.sizes[parts.data.seen]
  return {
    "cohort": f"{parts.cohort.name}, at most {most} of {sizes.size} clients",
    "steps": f"{how.steps}" if how.steps else f"{how.epochs} epoch(s)",
    "batch": f"{how.batch} examples",
    "rounds": f"{run.rounds}",
  }


def _links(parts, most) -> dict[str, str]:
  """What crosses, after every link of the lowest boundary."""
  sizes = parts.algorithm.bytes(most)
  tier = parts.algorithm.tiers[0]
  spec = link.Spec(tree.spec(parts.model.params), senders=most)
  found = {"message": console.decimal(tree.nbytes(spec.message))}
  for part in link.parts_of(tier.link):
    part.init(spec)  # refuses what cannot cross
    spec = part.after(spec)
    size = console.decimal(tree.nbytes(spec.message))
    found[f"after {part.name}"] = size
  found["sent up"] = console.decimal(sizes[f"{tier.name}/up_bytes"])
  found["sent down"] = console.decimal(sizes[f"{tier.name}/down_bytes"])
  return found


def _memory(parts) -> dict[str, str]:
  """What has to lie somewhere, lanes not counted."""
  world, clients = parts.state._replace(clients=()), parts.state.clients
  return {
    name: console.decimal(tree.nbytes(leaves))
    for name, leaves in {
      "frozen weights": parts.model.base,
      "global state": world,
      "what lives on all clients": clients,
      "examples": parts.data.examples,
    }.items()
  }
