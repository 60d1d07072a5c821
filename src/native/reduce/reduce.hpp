#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace pneumo {

enum class DType : uint8_t { F64, F32, F16, BF16, I8, I16, I32, I64, U8, U16, U32, U64, BOOL };
enum class Op : uint8_t { SUM, PRODUCT, MIN, MAX, BAND, BOR, BXOR };

/// Multiplied to every input before, and to the result after the reduction (PREMUL_SUM; AVG). 1 means untouched.
///
/// Floats multiply in the type in which they are reduced (float for 16 bits). For integers, 1/n (AVG) is an exact
/// division by n that truncates towards zero, also of 64 bits; other factors go through double, where the fraction is
/// cut off, what is out of range becomes the nearest that is in it, and NaN becomes 0. BOOL ignores the scale.
struct Scale {
    double before = 1.0;
    double after = 1.0;
};

/// dst[i] = after * ((before*srcs[0][i]) op (before*srcs[1][i]) op ...), in exactly that order.
///
/// dst may be one of the srcs (the same address), else it must not overlap them; num_srcs >= 1; the alignment that the
/// element itself needs is enough. The bits of the result are the same at every SIMD level:
///
/// - 16-bit floats accumulate in float and are rounded once, to the nearest even value.
/// - Integers wrap around.
/// - MIN and MAX of floats are NaN where an input is (as NumPy's minimum), and -0 is less than +0, so that the order of
///   the sources does not matter.
/// - A NaN in a result is the positive quiet one without payload: which payload survives an addition depends on the
///   order of operands in the instruction, thus on the compiler. A single unscaled source is copied as it is.
/// - BOOL: any byte but 0 is true, results are 0 or 1; SUM, MAX and BOR are "or", PRODUCT, MIN and BAND "and".
using ReduceFn = void (*)(void* dst, const void* const* srcs, int num_srcs, size_t count, Scale scale);

/// The function for this machine, or nullptr where `op` has no meaning (bitwise on floats).
ReduceFn find_reduce(DType dtype, Op op);

/// Bytes of an element.
size_t size_of(DType dtype);

const char* name_of(DType dtype);
const char* name_of(Op op);

/// The instructions in use: "avx512", "avx2", "neon" or "scalar".
///
/// That is the best this machine can do, or what the environment's PNEUMO_SIMD says at the first use of this function
/// or of find_reduce (std::invalid_argument where the machine can't do that).
const char* simd_level();

/// Overrides the level for the functions found from now on; std::invalid_argument for one this machine can't do.
void set_simd_level(std::string_view level);

}  // namespace pneumo
