"""Settings of the whole suite; they must be made before jax is imported."""

import ctypes
import os
import pathlib
import platform

ROOT = pathlib.Path(__file__).resolve().parent.parent

# Two devices, so that placement on several is tested on every machine, and
# the threads of one process (the command's own streams are tested apart).
os.environ["JAX_PLATFORMS"] = "cpu"
# Programs of tests run for milliseconds and compile for seconds, so that they
# are compiled in a hurry, in less than half; TEST_XLA_FLAGS="" compiles them as
# users do, and so do benchmarks and the commands of BUILD.md.
# The instruction set is named too: it is what rounds and contracts, and decides
# which programs agree to the last bit; this one has no multiply-add, which one
# program would contract to and another not.
HURRY = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
if platform.machine() in ("x86_64", "AMD64"):
  HURRY += " --xla_cpu_max_isa=AVX"
os.environ["XLA_FLAGS"] = " ".join(
  (
    "--xla_force_host_platform_device_count=2",
    os.environ.get("TEST_XLA_FLAGS", HURRY),
  )
)
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing hangs on a network

import jax  # noqa: E402
import pytest  # noqa: E402

import tolerance  # noqa: E402

# What compiled once is not compiled again: by the next test, or tomorrow.
jax.config.update("jax_compilation_cache_dir", str(ROOT / ".cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="module", autouse=True)
def programs():
  """Forgets compiled programs once they take up gigabytes."""
  yield
  if memory() > 2 * 2**30:
    jax.clear_caches()
    # What is free goes back to the system, or it would be counted again.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
      trim(0)


def memory() -> int:
  """Bytes that this process takes up, 0 where nobody says."""
  statm = pathlib.Path("/proc/self/statm")
  if not statm.exists():
    return 0
  return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def tol():
  """The tolerance 4 eps sqrt(n): `tol(dtype, n)`."""
  return tolerance.tol


@pytest.fixture
def standard_promotion():
  """Lets dtypes mix: optax's Adam raises a float to an integer power."""
  with jax.numpy_dtype_promotion("standard"):
    yield
