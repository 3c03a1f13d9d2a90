"""Kernels, compiled by the compilers of TPUs and GPUs that are not there."""

import pytest

import deviceless
import kernel_cases
from fedjax_peft.kernels import dispatch

pytestmark = pytest.mark.aot

KIB, MIB = 2**10, 2**20

# What a kernel may need beside its arguments and results, as a multiple of
# their bytes and a constant, and what for. Any other kernel needs nothing.
TEMPORARY = {
  ("top_k", "tpu"): ((8, 256 * KIB), "XLA finds the indices of what is kept"),
  ("top_k", "gpu"): ((8, 256 * KIB), "XLA finds the indices of what is kept"),
  ("quantize", "gpu"): ((0, KIB), "the key, and a short block padded"),
  ("dequantize", "gpu"): ((0, KIB), "a short block padded"),
}
# The analysis for a v5p counts what XLA keeps in VMEM, for others it does not.
VMEM = {"v5p": 16 * MIB}
# Registers of a thread at most. 56 leave room for nine programs of 128 threads
# on a core; `weighted_sum` needs 32 but for one width on one card.
REGISTERS = {"mask_add": 56, "weighted_sum": 56, "add_rows": 32, "quantize": 48}


@pytest.fixture(params=deviceless.TARGETS)
def target(request):
  return request.param


@pytest.fixture
def platform(target):
  return deviceless.platform(target)


@pytest.fixture(params=kernel_cases.names())
def kernel(request, platform):
  """A kernel that is written for the platform."""
  kernel = dispatch.KERNELS[request.param]
  if getattr(kernel, f"pallas_{platform}") is None:
    pytest.skip(f"XLA is left in charge: {kernel.why[platform]}")
  return kernel


@pytest.fixture
def compiled(kernel, target, facts):
  """{case: facts} of the kernel's shapes."""
  of = {
    name: found
    for name, found in facts[target].items()
    if name.startswith(f"{kernel.name}: ")
  }
  assert of
  return of


def test_every_shape_compiles(compiled):
  errors = {name: found.get("error") for name, found in compiled.items()}
  assert errors == dict.fromkeys(compiled)


def test_the_kernel_is_in_the_program(compiled):
  for name, found in compiled.items():
    assert found["empty"] or found["calls"], name


def test_no_more_memory_is_needed_than_for_what_comes_and_goes(
  compiled, kernel, platform, target
):
  (times, more), _ = TEMPORARY.get((kernel.name, platform), ((0, 0), ""))
  for name, found in compiled.items():
    limit = max(times * found["bytes"] + more, VMEM.get(target, 0))
    assert found["temp"] <= limit, name


def test_a_donated_accumulator_holds_the_result(compiled, platform):
  for name, found in compiled.items():
    assert found["alias"] >= found["donated"], name
    if platform == "gpu":  # a TPU's tiles are padded
      assert found["alias"] == found["donated"], name


@pytest.mark.parametrize("target", deviceless.TPUS, indirect=True)
@pytest.mark.parametrize(
  "kernel", ["mask_add", "weighted_sum", "add_rows"], indirect=True
)
def test_rows_are_read_where_they_lie(compiled, kernel):
  for name, found in compiled.items():
    moved = 128 * KIB  # keys, weights, and what is too small to matter
    if kernel.name != "mask_add" and found["donated"] % (4 * KIB):
      moved += 2 * found["donated"]  # the sum, its length no whole tiles
    assert found["moved"] <= moved, name


@pytest.mark.parametrize("target", deviceless.GPUS, indirect=True)
def test_no_register_is_spilled(compiled, kernel):
  if deviceless.ptxas() is None:
    pytest.skip("nvidia-cuda-nvcc is not installed")
  for name, found in compiled.items():
    assert found["empty"] or found["ptx"], name
    for program in found["ptx"].values():
      assert program["spills"] == 0, name
      assert program["registers"] <= REGISTERS.get(kernel.name, 255), name


@pytest.mark.parametrize("target", deviceless.GPUS, indirect=True)
@pytest.mark.parametrize("kernel", ["mask_add"], indirect=True)
def test_masks_shift_no_sign_in_on_a_gpu(compiled):
  for name, found in compiled.items():
    for program in found["ptx"].values():
      assert program["shr.s32"] == 0, name


# Bundles of a kernel's busiest loops on a TPU v5e: {case: (loops around them,
# limit)}, and what they work on; the limits are 5 % more than they need. To
# read 256 KiB takes 480 cycles at 819 GB/s and 1.5 GHz.
BUDGETS = {
  "weighted_sum: 256 clients of 2^20 values, 8 bits": (2, 551),  # 256 KiB
  "weighted_sum: 256 clients of 2^20 values, 4 bits": (2, 1009),  # 256 KiB
  "add_rows: 64 clients of 2^20 values, uint32": (2, 164),  # 256 KiB
  "quantize: message of 76,038 values, 8 bits": (1, 147),
  "dequantize: message of 76,038 values, 8 bits": (1, 23),
}
MASK = "mask_add: a large message, one client"
SCHEDULED = (*BUDGETS, MASK)


@pytest.mark.parametrize("case", BUDGETS)
def test_schedules_keep_to_their_budgets(case, schedules):
  loops, limit = BUDGETS[case]
  (found,) = schedules[case].values()
  assert sum(found["bundles"][loops]) <= limit
  assert found["spills"] == 0


def test_masks_are_made_once_and_shift_no_sign_in_on_a_tpu(schedules):
  found = schedules[MASK]["mask_add"]
  body, subtract, rest = found["bundles"][2]
  assert body + rest <= 926  # what is not added is subtracted: one of the two
  assert body + subtract + rest <= 970
  rotations = 2 * 320  # 20 rounds of 4 quarter rounds, on two tiles
  operations = found["operations"]
  assert operations["vshll"] <= rotations
  assert operations["vshrl"] <= rotations + 8
  assert operations["vor"] <= rotations
  assert "vshra" not in operations
  assert found["spills"] == 0
