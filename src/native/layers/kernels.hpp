// The passes over a layer's values, as templates that each SIMD level compiles for itself; included by kernels_*.cpp.
//
// All code here has internal linkage, in a namespace per level, for the reason that reduce/kernels.hpp gives. The loops
// are plain ones, which gcc vectorises under these flags, beside those that the levels name:
//   -O3                  vectorises whatever the loop costs
//   -ffp-contract=fast   fused multiply-adds: levels may round differently here, as a machine's convolutions do too
//   -fno-trapping-math   both sides of a choice may be computed, as vectors have to
//   -ffinite-math-only, -fno-signed-zeros   for gcc, which else makes branches of a limit; NaN stays NaN (tests look)

#pragma once

#ifndef PNEUMO_SIMD_NAMESPACE
#error "define PNEUMO_SIMD_NAMESPACE, the namespace of this SIMD level, before including kernels.hpp"
#endif

#include <cstddef>
#include <cstdint>

#include "passes.hpp"

namespace pneumo::layers::PNEUMO_SIMD_NAMESPACE {
namespace {

/// What e^x is made of: x = n log(2) + r with |r| <= log(2)/2, and a polynomial of e^r up to the last bit or two.
template <class T>
struct Exp;

template <>
struct Exp<float> {
    using Bits = int32_t;
    static constexpr int MANTISSA = 23;
    static constexpr float LIMIT = 87.0F;             // e^-87 is still a normal number
    static constexpr float ROUND = 12582912.0F;       // 1.5 * 2^23: adding it rounds to a whole number
    static constexpr float LOG2_HIGH = 0.693359375F;  // log(2) in two parts, the first of few bits
    static constexpr float LOG2_LOW = -2.12194440e-4F;
    static constexpr int DEGREE = 6;  // its remainder is less than 2e-7 of e^r
};

template <>
struct Exp<double> {
    using Bits = int64_t;
    static constexpr int MANTISSA = 52;
    static constexpr double LIMIT = 700.0;
    static constexpr double ROUND = 6755399441055744.0;  // 1.5 * 2^52
    static constexpr double LOG2_HIGH = 0.693145751953125;
    static constexpr double LOG2_LOW = 1.42860682030941723212e-6;
    static constexpr int DEGREE = 13;
};

template <class T>
constexpr T inverse_factorial(int k) {
    double product = 1;
    for (int i = 2; i <= k; ++i) product *= i;
    return static_cast<T>(1 / product);
}

/// e^x for |x| <= LIMIT by Taylor's polynomial (Horner), scaled by 2^n through the exponent's bits.
template <class T>
inline __attribute__((always_inline)) T exponential(T x) {
    using E = Exp<T>;
    using Bits = typename E::Bits;
    const T shifted = x * T(1.44269504088896340736) + E::ROUND;
    const T n = shifted - E::ROUND;
    const T r = (x - n * E::LOG2_HIGH) - n * E::LOG2_LOW;
    T sum = inverse_factorial<T>(E::DEGREE);
#pragma GCC unroll 16
    for (int k = E::DEGREE - 1; k >= 0; --k) sum = sum * r + inverse_factorial<T>(k);
    Bits power;
    __builtin_memcpy(&power, &shifted, sizeof power);
    Bits bits;
    __builtin_memcpy(&bits, &sum, sizeof bits);
    bits += power << E::MANTISSA;  // the whole number n stands in the lowest bits; what is above is shifted out
    __builtin_memcpy(&sum, &bits, sizeof sum);
    return sum;
}

/// 1 / (1 + e^-y); of NaN whatever the limits make of it: the caller multiplies by y.
template <class T>
inline __attribute__((always_inline)) T sigmoid(T y) {
    constexpr T LIMIT = Exp<T>::LIMIT;
    T x = -y < LIMIT ? -y : LIMIT;
    x = x > -LIMIT ? x : -LIMIT;
    return T(1) / (T(1) + exponential(x));
}

template <class T>
void add(const T* __restrict x, size_t rows, size_t width, const T* __restrict pivot, T* __restrict sum,
         T* __restrict squares) {
    for (size_t row = 0; row < rows; ++row, x += width) {
        for (size_t i = 0; i < width; ++i) {
            const T distance = x[i] - pivot[i];
            sum[i] += distance;
            squares[i] += distance * distance;
        }
    }
}

template <class T>
void activate(const T* __restrict x, T* __restrict z, size_t rows, size_t width, const T* __restrict mean,
              const T* __restrict scale, const T* __restrict bias) {
    for (size_t row = 0; row < rows; ++row, x += width, z += width) {
        for (size_t i = 0; i < width; ++i) {
            const T y = (x[i] - mean[i]) * scale[i] + bias[i];
            z[i] = y * sigmoid(y);
        }
    }
}

template <class T>
void activate_backward(const T* __restrict x, const T* __restrict dz, T* __restrict dy, size_t rows, size_t width,
                       const T* __restrict mean, const T* __restrict scale, const T* __restrict bias, T* __restrict sum,
                       T* __restrict product) {
    for (size_t row = 0; row < rows; ++row, x += width, dz += width, dy += width) {
        for (size_t i = 0; i < width; ++i) {
            const T distance = x[i] - mean[i];
            const T y = distance * scale[i] + bias[i];
            const T s = sigmoid(y);
            const T gradient = dz[i] * (s * (T(1) + y * (T(1) - s)));
            dy[i] = gradient;
            sum[i] += gradient;
            product[i] += gradient * distance;
        }
    }
}

template <class T>
void input_gradients(const T* __restrict x, T* __restrict dy, size_t rows, size_t width, const T* __restrict mean,
                     const T* __restrict scale, const T* __restrict slope, const T* __restrict constant) {
    for (size_t row = 0; row < rows; ++row, x += width, dy += width) {
        for (size_t i = 0; i < width; ++i) {
            dy[i] = dy[i] * scale[i] + ((x[i] - mean[i]) * slope[i] + constant[i]);
        }
    }
}

template <class T>
constexpr Passes<T> PASSES = {add<T>, activate<T>, activate_backward<T>, input_gradients<T>};

}  // namespace
}  // namespace pneumo::layers::PNEUMO_SIMD_NAMESPACE
