// Flags: those in kernels.hpp alone: SSE2 on x86-64, NEON on aarch64.

#define PNEUMO_SIMD_NAMESPACE scalar
#include "kernels.hpp"

namespace pneumo::layers::scalar {

const Passes<float>& of_floats() { return PASSES<float>; }
const Passes<double>& of_doubles() { return PASSES<double>; }

}  // namespace pneumo::layers::scalar
