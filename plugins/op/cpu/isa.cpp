#include <cstdlib>

#include "chai/attention.h"
#include "op/cpu/kernels.h"

namespace chai {

const char* name(Isa isa) {
  switch (isa) {
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    default:
      return "portable";
  }
}

bool available(Isa isa) {
#if defined(CHAI_X86_KERNELS)
  if (isa == Isa::kAvx512) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && available(Isa::kAvx2);
  }
  if (isa == Isa::kAvx2) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  }
#endif
  return isa == Isa::kPortable;
}

bool choose_isa(Isa* isa, std::string* error) {
  constexpr Isa kWidestFirst[] = {Isa::kAvx512, Isa::kAvx2, Isa::kPortable};
  const char* wanted = std::getenv("CHAI_ISA");
  const bool any = wanted == nullptr || *wanted == '\0';
  for (Isa candidate : kWidestFirst) {
    if (available(candidate) && (any || std::string(wanted) == name(candidate))) {
      *isa = candidate;
      return true;
    }
  }
  *error = "CHAI_ISA is '" + std::string(wanted) + "', which this processor does not have";
  *error += "; unset it or use one of:";
  for (Isa candidate : kWidestFirst) {
    if (available(candidate)) *error += std::string(" ") + name(candidate);
  }
  return false;
}

const Kernels& kernels(Isa isa) {
#if defined(CHAI_X86_KERNELS)
  if (isa == Isa::kAvx512) return avx512::kKernels;
  if (isa == Isa::kAvx2) return avx2::kKernels;
#endif
  (void)isa;
  return portable::kKernels;
}

}  // namespace chai
