// Batch norm followed by SiLU, of values that lie with their channels innermost, in the fewest passes over memory:
// two forward (statistics; normalise and activate) and two backward (gradients and their sums; gradients of the input).
//
// One call is for one group of images whose statistics are taken together: `rows` pixels of `channels` values. Between
// the passes stand statistics and sums of each channel in double, which may be summed over ranks on the way. Called
// from Python through ctypes, see pneumo/models/norm_silu.py: hence the C interface. `of_doubles` says of which type
// the values, `weight` and `bias` are, else they are floats. No argument is checked, nothing is thrown. The bits of a
// result depend on the level of SIMD and on the number of threads, and on nothing else.

#pragma once

#include <cstdint>

#define PNEUMO_EXPORT extern "C" __attribute__((visibility("default")))

/// The instructions in use, or nullptr where the environment's PNEUMO_SIMD names some that this machine does not have.
PNEUMO_EXPORT const char* pneumo_layers_simd();

/// Mean and biased variance of each channel of x (rows, channels).
PNEUMO_EXPORT void pneumo_moments(bool of_doubles, const void* x, int64_t rows, int64_t channels, double* mean,
                                  double* variance, int threads);

/// z = y sigmoid(y) of y = (x - mean) invstd weight + bias.
PNEUMO_EXPORT void pneumo_norm_silu(bool of_doubles, const void* x, void* z, int64_t rows, int64_t channels,
                                    const double* mean, const double* invstd, const void* weight, const void* bias,
                                    int threads);

/// The gradients dy of y, of the gradients dz of z; sums (2, channels) gets those of dy xhat, and of dy.
PNEUMO_EXPORT void pneumo_norm_silu_backward(bool of_doubles, const void* x, const void* dz, void* dy, int64_t rows,
                                             int64_t channels, const double* mean, const double* invstd,
                                             const void* weight, const void* bias, double* sums, int threads);

/// dy becomes dx = weight invstd (dy - xhat sums[0] / count - sums[1] / count).
PNEUMO_EXPORT void pneumo_norm_input_gradients(bool of_doubles, const void* x, void* dy, int64_t rows, int64_t channels,
                                               const double* mean, const double* invstd, const void* weight,
                                               const double* sums, double count, int threads);
