"""Native kernels on machines that can do less than this one."""

import os
import pathlib
import platform
import subprocess
import sys

import pytest

from fedjax_peft.kernels import native

HERE = pathlib.Path(__file__).resolve().parent

pytestmark = pytest.mark.skipif(
  bool(native.missing()), reason="native kernels were not built here"
)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("cap", "name"), [("base", "the compiler's baseline"), ("avx2", "AVX2")]
)
def test_every_instruction_set_computes_the_same(cap, name):
  if platform.machine() != "x86_64":
    pytest.skip("other machines have one instruction set here")
  path = os.pathsep.join([str(HERE.parent), *filter(None, sys.path)])
  done = subprocess.run(
    [sys.executable, HERE / "isa_cases.py"],
    env=os.environ
    | {
      "FEDJAX_PEFT_ISA": cap,
      "PYTHONPATH": path,
      "JAX_COMPILATION_CACHE_DIR": str(HERE.parent.parent / ".cache" / "jax"),
    },
    capture_output=True,
    text=True,
    check=False,
  )
  first, *rest = done.stdout.splitlines() or [done.stderr[-800:]]
  assert first == name
  assert rest == []
  assert done.returncode == 0, done.stderr[-800:]
