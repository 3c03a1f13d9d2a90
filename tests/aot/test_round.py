"""A federated round, compiled for many devices that are not there."""

import pytest

pytestmark = pytest.mark.aot

TARGETS = ("v5e:16x16", "sm_90")  # 256 TPUs, 8 GPUs
CLIENTS = {"v5e:16x16": 1024, "sm_90": 32}


@pytest.fixture(params=TARGETS)
def target(request):
  return request.param


def test_masked_messages_are_added_modulo_two_to_the_32(target, rounds):
  found = rounds(target, "mask")
  values = found["values"]
  # All values once, the weight, and who arrived; floats are for the record.
  assert values < found["exchanged"]["u32"] <= values + CLIENTS[target]
  assert found["exchanged"].get("f32", 0) < 8 * CLIENTS[target]
  assert "mask_add" in found["kernels"]


def test_quantized_messages_are_decoded_where_they_are(target, rounds):
  found = rounds(target, "int8")
  values = found["values"]
  assert values < found["exchanged"]["f32"] < values + 8 * CLIENTS[target]
  assert "s8" not in found["exchanged"]
  assert {"quantize", "weighted_sum"} <= set(found["kernels"])
