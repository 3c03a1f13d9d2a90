"""What the compilers say, asked once for all tests."""

import concurrent.futures
import functools
import importlib.util
import os

import pytest

import deviceless

CORES = len(os.sched_getaffinity(0))


@pytest.fixture(scope="session")
def compilers():
  """Fails where there are none."""
  for name in ("libtpu", "jax_cuda13_plugin"):
    if importlib.util.find_spec(name) is None:
      pytest.fail(f"{name} is not installed here; use make test-aot")


@pytest.fixture(scope="session")
def pool(compilers):
  """Runs programs, as many at once as there are cores."""
  with concurrent.futures.ThreadPoolExecutor(CORES) as pool:
    yield pool


@pytest.fixture(scope="session")
def facts(pool, tmp_path_factory):
  """{target: {case: what is known of a compiled kernel}}."""

  def run(targets):
    dump = str(tmp_path_factory.mktemp("dump"))
    return deviceless.run("compile_kernels.py", ",".join(targets), dump)

  tpus, gpus = pool.map(run, (deviceless.TPUS, deviceless.GPUS))
  return tpus | gpus


@pytest.fixture(scope="session")
def schedule(compilers, tmp_path_factory):
  """(case) -> {kernel: its schedule} on a TPU v5e."""

  @functools.cache
  def of(case):
    dump = str(tmp_path_factory.mktemp("dump"))
    found = deviceless.run("compile_kernels.py", "v5e", dump, case, dump=dump)
    return found["v5e"][case]["schedule"]

  return of


@pytest.fixture(scope="session")
def rounds(pool):
  """{(target, uplink): what will be known of a compiled round}."""
  return {
    (target, uplink): pool.submit(
      deviceless.run, "compile_round.py", target, uplink
    )
    for uplink in ("mask", "int8")
    for target in ("v5e:16x16", "sm_90")
  }
