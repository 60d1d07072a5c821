// Flags: those in kernels.hpp, and -mavx2 -mfma.

#define PNEUMO_SIMD_NAMESPACE avx2
#include "kernels.hpp"

namespace pneumo::layers::avx2 {

const Passes<float>& of_floats() { return PASSES<float>; }
const Passes<double>& of_doubles() { return PASSES<double>; }

}  // namespace pneumo::layers::avx2
