// Flags: those in kernels.hpp, and -mavx512f -mavx512bw -mavx512vl -mavx512dq -mf16c -mprefer-vector-width=512.

#define PNEUMO_SIMD_NAMESPACE avx512
#include "kernels.hpp"

#include <immintrin.h>

namespace pneumo::avx512 {
namespace {

/// With a mask of all, since gcc 12 warns that its own header leaves the unmasked ones' old value uninitialized.
constexpr __mmask16 ALL = 0xffff;

struct Convert {
    using Register = __m512;

    static Register widen(const uint16_t* from) {
        return _mm512_maskz_cvtph_ps(ALL, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    }

    static void narrow(uint16_t* to, Register value) {
        const __m256i halves = _mm512_maskz_cvtps_ph(ALL, value, _MM_FROUND_TO_NEAREST_INT);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), halves);
    }
};

}  // namespace

ReduceFn find(DType dtype, Op op) { return find_kernel<HardFloat16<Convert>>(dtype, op); }

}  // namespace pneumo::avx512
