"""What the compilers say, asked once for all tests.

All programs are started before the first test, as many at once as there are
cores, the longest first.
"""

import concurrent.futures
import importlib.util
import os

import pytest

import deviceless

FAMILIES = {"tpu": deviceless.TPUS, "gpu": deviceless.GPUS}
CORES = len(os.sched_getaffinity(0))
ROUNDS = [
  (target, uplink)
  for uplink in ("mask", "int8")
  for target in ("v5e:16x16", "sm_90")  # 256 TPUs, 8 GPUs
]


@pytest.fixture(scope="session")
def jobs(request, tmp_path_factory):
  """{name: what a program will say}, for the fixtures that tests ask for."""
  for name in ("libtpu", "jax_cuda13_plugin"):
    if importlib.util.find_spec(name) is None:
      pytest.fail(f"{name} is not installed here; use make test-aot")
  asked = {name for item in request.session.items for name in item.fixturenames}
  scheduled = {
    case
    for item in request.session.items
    for case in getattr(item.module, "SCHEDULED", ())
  }
  found = {}

  def submit(fixture, name, *command, **options):
    if fixture in asked:
      found[name] = pool.submit(deviceless.run, *command, **options)

  def folder():
    return str(tmp_path_factory.mktemp("dump"))

  with concurrent.futures.ThreadPoolExecutor(CORES) as pool:
    for name, targets in FAMILIES.items():
      of = ",".join(targets)
      submit("facts", name, "compile_kernels.py", of, folder())
    for where in ROUNDS:
      submit("rounds", where, "compile_round.py", *where)
    dump = folder()
    command = ("compile_kernels.py", "v5e", dump, *sorted(scheduled))
    submit("schedules", "schedules", *command, dump=dump)
    yield found
    pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="session")
def facts(jobs):
  """{target: {case: what is known of a compiled kernel}}."""
  tpus, gpus = (jobs[name].result() for name in FAMILIES)
  return tpus | gpus


@pytest.fixture(scope="session")
def schedules(jobs):
  """{case of a module's SCHEDULED: {kernel: schedule}}, on a TPU v5e."""
  found = jobs["schedules"].result()["v5e"]
  return {case: of["schedule"] for case, of in found.items()}


@pytest.fixture(scope="session")
def rounds(jobs):
  """(target, uplink) -> what is known of a compiled round."""
  return lambda *where: jobs[where].result()
