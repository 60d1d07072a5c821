// What every machine of the architecture can do: SSE2 on x86-64, NEON on aarch64. Flags: those in kernels.hpp alone.

#define PNEUMO_SIMD_NAMESPACE scalar
#include "kernels.hpp"

namespace pneumo::scalar {

ReduceFn find(DType dtype, Op op) { return find_kernel<Paired<SoftFloat16>>(dtype, op); }

}  // namespace pneumo::scalar
