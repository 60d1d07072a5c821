#pragma once

#include <cstddef>

namespace pneumo::layers {

/// One SIMD level's loops over `rows` rows of `width` values, one beside the other; the other arrays have `width`.
///
/// `add` adds distances from `pivot` to `sum`, and their squares to `squares`. `activate` writes y sigmoid(y) of y = (x
/// - mean) scale + bias. `activate_backward` writes the gradients of y, and adds them to `sum`, and times (x - mean) to
/// `product`. `input_gradients` replaces them by dy scale + (x - mean) slope + constant.
template <class T>
struct Passes {
    void (*add)(const T* x, size_t rows, size_t width, const T* pivot, T* sum, T* squares);
    void (*activate)(const T* x, T* z, size_t rows, size_t width, const T* mean, const T* scale, const T* bias);
    void (*activate_backward)(const T* x, const T* dz, T* dy, size_t rows, size_t width, const T* mean, const T* scale,
                              const T* bias, T* sum, T* product);
    void (*input_gradients)(const T* x, T* dy, size_t rows, size_t width, const T* mean, const T* scale, const T* slope,
                            const T* constant);
};

/// The loops of the level in use, which `simd_level` of reduce/reduce.hpp says.
template <class T>
const Passes<T>& passes();
template <>
const Passes<float>& passes();
template <>
const Passes<double>& passes();

}  // namespace pneumo::layers
