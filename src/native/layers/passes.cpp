#include "passes.hpp"

#include <string_view>

#include "reduce/reduce.hpp"

namespace pneumo::layers {

// One of these in each kernels_*.cpp, compiled for what the level can do.
namespace scalar {
const Passes<float>& of_floats();
const Passes<double>& of_doubles();
}  // namespace scalar
#if defined(__x86_64__)
namespace avx2 {
const Passes<float>& of_floats();
const Passes<double>& of_doubles();
}  // namespace avx2
namespace avx512 {
const Passes<float>& of_floats();
const Passes<double>& of_doubles();
}  // namespace avx512
#endif

namespace {

template <class T>
const Passes<T>& chosen([[maybe_unused]] const Passes<T>& (*of_avx512)(),
                        [[maybe_unused]] const Passes<T>& (*of_avx2)(), const Passes<T>& (*of_scalar)()) {
#if defined(__x86_64__)
    const std::string_view level = simd_level();
    if (level == "avx512" && __builtin_cpu_supports("fma")) return of_avx512();
    if (level == "avx2" && __builtin_cpu_supports("fma")) return of_avx2();
#endif
    return of_scalar();
}

}  // namespace

#if defined(__x86_64__)
template <>
const Passes<float>& passes() {
    return chosen(avx512::of_floats, avx2::of_floats, scalar::of_floats);
}

template <>
const Passes<double>& passes() {
    return chosen(avx512::of_doubles, avx2::of_doubles, scalar::of_doubles);
}
#else
template <>
const Passes<float>& passes() {
    return scalar::of_floats();
}

template <>
const Passes<double>& passes() {
    return scalar::of_doubles();
}
#endif

}  // namespace pneumo::layers
