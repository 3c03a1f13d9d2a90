// Says which instruction set the kernels use here.

#include "parallel.h"

extern "C" const char* Isa() {
  switch (fedjax_peft::Machine()) {
    case fedjax_peft::Isa::kAvx512: return "AVX-512";
    case fedjax_peft::Isa::kAvx2: return "AVX2";
    default: return "the compiler's baseline";
  }
}
