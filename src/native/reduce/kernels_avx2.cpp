// Flags: those in kernels.hpp, and -mavx2 -mf16c, without -mfma.

#define PNEUMO_SIMD_NAMESPACE avx2
#include "kernels.hpp"

#include <immintrin.h>

namespace pneumo::avx2 {
namespace {

struct Convert {
    using Register = __m256;

    static Register widen(const uint16_t* from) {
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    }

    static void narrow(uint16_t* to, Register value) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
    }
};

}  // namespace

ReduceFn find(DType dtype, Op op) { return find_kernel<HardFloat16<Convert>>(dtype, op); }

}  // namespace pneumo::avx2
