"""Compute kernels; imported as `fedjax_peft.kernels`, whatever the install.

The folder lies at the top of the repository so that each kernel keeps its
sources, shapes and benchmarks together; `setup.py` maps it into the package.

A kernel is a folder: `api` (the functions), `reference` (plain jnp, the
specification), `pallas_tpu`, `pallas_gpu`, and `specs` (shapes of real
adapters that tests and benchmarks share). Its C++ for CPUs is in `native/`.
"""

if __name__ != "fedjax_peft.kernels":
  raise ImportError(
    "kernels must be imported as fedjax_peft.kernels, got a top-level "
    f"{__name__!r}; install the project (make install) and import it from there"
  )

from fedjax_peft.kernels.dispatch import explain
from fedjax_peft.kernels.lora.api import lora_matmul
from fedjax_peft.kernels.mask.api import mask_add
from fedjax_peft.kernels.quantization.api import dequantize, quantize
from fedjax_peft.kernels.rotation import rotate, unrotate
from fedjax_peft.kernels.selection.api import scatter_add, top_k
from fedjax_peft.kernels.summation.api import add_rows, weighted_sum

__all__ = [
  "add_rows",
  "dequantize",
  "explain",
  "lora_matmul",
  "mask_add",
  "quantize",
  "rotate",
  "scatter_add",
  "top_k",
  "unrotate",
  "weighted_sum",
]
