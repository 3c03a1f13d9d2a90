"""Peers: other systems, each in an environment of its own.

They are installed with pip at first use, at the versions named here, outside
the repository: in FEDJAX_PEFT_HOME/peers or ~/.cache/fedjax_peft/peers.
"""

import hashlib
import os
import pathlib
import subprocess
import sys
from typing import NamedTuple

HERE = pathlib.Path(__file__).resolve().parent


class Peer(NamedTuple):
  """A system to compare with.

  Attributes:
    script: what measures it, in scripts/peers.
    packages: what pip installs.
    options: {name of a variant: (workloads, further arguments)}.
  """

  script: str
  packages: tuple[str, ...]
  options: dict[str, tuple[tuple[str, ...], tuple[str, ...]]]


PEERS = {
  "fedjax": Peer(
    "with_fedjax.py",
    ("fedjax==0.0.17", "jax==0.10.2"),
    {"fedjax": (("w1", "w2"), ())},
  ),
  "drjax": Peer(
    "with_drjax.py",
    ("drjax==0.2.1", "jax==0.10.2"),
    {"drjax": (("w1", "w2"), ())},
  ),
  # Of bench_kernels.py.
  "flower": Peer("with_flower.py", ("flwr==1.42.0", "numpy"), {}),
  # The CPU build, where pip has been told of an index that has it; else some
  # gigabytes of libraries for accelerators come along.
  "torch": Peer(
    "with_torch.py",
    ("torch==2.13.0", "transformers==5.23.0", "peft==0.21.0", "numpy"),
    {
      "torch": (("w1", "w2"), ()),
      "torch_bf16": (("w2",), ("--autocast",)),
    },
  ),
}


def python(name: str) -> pathlib.Path:
  """The Python of a peer's environment, installed if it is not there.

  Args:
    name: a key of `PEERS`.

  Raises:
    ValueError: if pip cannot install it; nothing is left behind.
  """
  packages = PEERS[name].packages
  mark = hashlib.sha256("\n".join(packages).encode()).hexdigest()[:8]
  home = os.environ.get("FEDJAX_PEFT_HOME") or "~/.cache/fedjax_peft"
  place = pathlib.Path(home).expanduser() / "peers" / f"{name}-{mark}"
  binary, done = place / "bin" / "python", place / "installed"
  if done.exists():
    return binary
  place.parent.mkdir(parents=True, exist_ok=True)
  make = [sys.executable, "-m", "venv", "--clear", place]
  install = [binary, "-m", "pip", "install", "-q", *packages]
  for command in (make, install):
    got = subprocess.run(command, capture_output=True, text=True)
    if got.returncode:
      last = (got.stderr.strip().splitlines() or ["no message"])[-1]
      raise ValueError(
        f"peer {name} must install with pip {' '.join(packages)}: {last}"
      )
  done.touch()
  return binary
