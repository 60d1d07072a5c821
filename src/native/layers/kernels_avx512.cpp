// Flags: those in kernels.hpp, and -mavx512f -mavx512dq -mfma.

#define PNEUMO_SIMD_NAMESPACE avx512
#include "kernels.hpp"

namespace pneumo::layers::avx512 {

const Passes<float>& of_floats() { return PASSES<float>; }
const Passes<double>& of_doubles() { return PASSES<double>; }

}  // namespace pneumo::layers::avx512
