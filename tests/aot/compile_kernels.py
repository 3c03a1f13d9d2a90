"""Compiles every kernel over its shapes, and says what came of each.

python tests/aot/compile_kernels.py v4,v5e /tmp/dump [names of cases]
"""

import collections
import functools
import json
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax

import deviceless
import kernel_cases

WHOLE = ("v5e", "sm_90")  # compiled for over all shapes


def main(targets: str, dump: str, *names: str) -> None:
  """Prints {target: {case: facts}} as one line of JSON.

  Args:
    targets: of `deviceless`, separated by commas.
    dump: folder where the compiler's files are read and removed. That for
      GPUs is told here to leave them, that for TPUs by the environment.
    *names: of the cases; all if none is named.
  """
  meshes = {
    target: deviceless.mesh(deviceless.devices(target)[:1], "d")
    for target in targets.split(",")
  }
  found: dict = {target: {} for target in meshes}
  for case in kernel_cases.cases():
    if names and case.name not in names:
      continue
    arrays = case.draw()
    for target, mesh in meshes.items():
      if not is_compiled(case, target):
        continue
      try:
        platform = deviceless.platform(target)
        facts = compiled(case, arrays, mesh, platform, pathlib.Path(dump))
      except Exception as error:  # the next case may still compile
        facts = {"error": f"{type(error).__name__}: {error}"[:1500]}
      found[target][case.name] = facts
  print(json.dumps(found))


def is_compiled(case, target: str) -> bool:
  """Whether a case is compiled for a target.

  All shapes of a Pallas kernel are compiled for one TPU and one GPU; for the
  others those that are measured, and every sixth of all.
  """
  if getattr(case.kernel, f"pallas_{deviceless.platform(target)}") is None:
    return False
  return case.spec.bench or target in WHOLE or case.number % 6 == 0


def compiled(case, arrays, mesh, platform: str, dump: pathlib.Path) -> dict:
  """Compiles one case for one device.

  The device chooses the implementation; one that XLA stands in for is named.
  """
  shutil.rmtree(dump)
  dump.mkdir()
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  specs = [
    jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole) for x in arrays
  ]
  named = f"pallas_{platform}" if platform in case.kernel.why else None
  run = functools.partial(case.run, implementation=named)
  in_place = case.kernel.in_place
  out = jax.tree.leaves(jax.eval_shape(case.reference, *specs))
  fun = jax.jit(run, donate_argnums=(0,) if in_place else ())
  lowered = fun.lower(*specs)
  options = {"xla_dump_to": str(dump)} if platform == "gpu" else None
  program = lowered.compile(options)
  memory, text = program.memory_analysis(), program.as_text()
  names = deviceless.pallas(lowered.as_text())
  return {
    "names": names,
    "calls": len(re.findall(r'"(?:tpu_custom_call|__gpu\$.*triton)"', text)),
    "bytes": sum(x.size * x.dtype.itemsize for x in (*specs, *out)),
    "temp": memory.temp_size_in_bytes,
    "moved": moved(text),
    "alias": memory.alias_size_in_bytes,
    "donated": specs[0].size * specs[0].dtype.itemsize if in_place else 0,
    "empty": not all(x.size for x in (*specs, *out)),
    "schedule": {
      name: schedule(file.read_text())
      for name in names
      for file in sorted(dump.glob(f"*-{name}*-*[0-9]-final_bundles.txt"))
    },
    "ptx": {
      name: assembled(file)
      for file in sorted(dump.glob("*.ptx"))
      for name in set(names)
      & set(re.findall(r"\.entry (\w+)", file.read_text()))
    },
  }


def moved(text: str) -> int:
  """Bytes that XLA writes in a program besides the kernels.

  What it fetches in advance, `copy-start`, the kernels need not fetch.
  """
  entry = text[text.index("ENTRY") :]
  free = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element"}
  free |= {"custom-call", "copy-start", "copy-done"}
  total = 0
  for shape, name in re.findall(r"= (.*?) ([a-z][a-z-]*)\(", entry):
    if name not in free:
      for bits, dims in re.findall(r"\b[a-z]+(\d+)\[([\d,]*)\]", shape):
        size = math.prod(int(n) for n in dims.split(",") if n)
        total += size * int(bits) // 8
  return total


def schedule(text: str) -> dict:
  """How a TPU's compiler has put a kernel into VLIW bundles, about one a cycle.

  Returns:
    bundles: [d][i], how many inside of d loops, the i-th stretch of them; a
      new stretch begins where a branch that is not always taken ends.
    operations: {name: how many} on vectors.
    spills: vectors that are put aside.
  """
  bundle = r"^\s*(?:0x[0-9a-f]+|0)\s*([A-Z]{2})?\s*:\s*(>*)\s*\{"
  bundles: list[list[int]] = []
  for mark, loops in re.findall(bundle, text, re.M):
    while len(bundles) <= len(loops):
      bundles.append([0])
    if mark == "PF":
      bundles[len(loops)].append(0)
    bundles[len(loops)][-1] += 1
  return {
    "bundles": bundles,
    "operations": collections.Counter(re.findall(r"= (v\w+)\.[su]32", text)),
    "spills": len(re.findall(r"vst \[vmem:\[#\w+_spill", text)),
  }


def assembled(path: pathlib.Path) -> dict:
  """What is in a GPU's program, and what the assembler says of it."""
  text = path.read_text()
  found = {"shr.s32": len(re.findall(r"\bshr\.s32\b", text))}
  if assembler := deviceless.ptxas():
    architecture = re.search(r"^\.target (\w+)", text, re.M)
    assert architecture
    done = subprocess.run(
      [assembler, "-v", f"-arch={architecture[1]}", path, "-o", os.devnull],
      capture_output=True,
      text=True,
      check=True,
    )
    for name, pattern in (
      ("spills", r"(\d+) bytes spill stores"),
      ("registers", r"Used (\d+) registers"),
    ):
      found[name] = max(map(int, re.findall(pattern, done.stderr)), default=0)
  return found


if __name__ == "__main__":
  main(*sys.argv[1:])
