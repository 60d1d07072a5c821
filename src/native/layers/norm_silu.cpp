#include "norm_silu.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <vector>

#include "passes.hpp"
#include "reduce/reduce.hpp"

namespace pneumo::layers {
namespace {

constexpr size_t CHUNK_BYTES = 16 << 10;  // of values that are summed in their own type, before double takes over
constexpr size_t WIDTH = 64;              // values of a row at least, as far as there are so many

/// Rows of few channels are taken several at a time, as one wide row: the loops along a row are then long ones.
struct Layout {
    size_t channels;
    size_t repeats;  // rows in a wide row
    size_t chunk;    // rows that are summed in T before they are added in double

    Layout(size_t channels, size_t rows, size_t size)
        : channels(channels),
          repeats(std::clamp<size_t>(WIDTH / channels, 1, std::max<size_t>(1, rows))),
          chunk(std::max<size_t>(1, CHUNK_BYTES / size / (channels * repeats)) * repeats) {}

    size_t width() const { return channels * repeats; }

    /// An array a channel, in T and as often as rows stand in a wide row.
    template <class T, class Value>
    std::vector<T> repeat(Value value) const {
        std::vector<T> wide(width());
        for (size_t i = 0; i < wide.size(); ++i) wide[i] = static_cast<T>(value(i % channels));
        return wide;
    }

    /// Calls pass(first row, wide rows, their width) for the rows [begin, end): wide ones, and what is left of one.
    template <class Pass>
    void each(size_t begin, size_t end, Pass pass) const {
        const size_t wide_rows = (end - begin) / repeats, left = (end - begin) % repeats;
        if (wide_rows) pass(begin, wide_rows, width());
        if (left) pass(end - left, size_t{1}, left * channels);
    }

    /// Adds sums of wide rows to sums a channel.
    template <class T>
    void fold(const std::vector<T>& wide, double* sums) const {
        for (size_t i = 0; i < wide.size(); ++i) sums[i % channels] += static_cast<double>(wide[i]);
    }
};

/// Calls work(part, first row, end) for equal parts of the rows, each on a thread; torch's own threads where it uses
/// the same OpenMP.
template <class Work>
void in_parts(size_t rows, int threads, Work work) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int part = 0; part < threads; ++part) work(part, rows * part / threads, rows * (part + 1) / threads);
}

/// Mean and sum of squares about it, of so many values; `add` is Chan, Golub and LeVeque's rule for two samples.
struct Moments {
    std::vector<double> mean, squares;
    double count = 0;

    explicit Moments(size_t channels) : mean(channels), squares(channels) {}

    void add(const double* other_mean, const double* other_squares, double other_count) {
        if (other_count == 0) return;
        const double total = count + other_count;
        for (size_t c = 0; c < mean.size(); ++c) {
            const double distance = other_mean[c] - mean[c];
            mean[c] += distance * (other_count / total);
            squares[c] += other_squares[c] + distance * distance * (count * other_count / total);
        }
        count = total;
    }
};

template <class T>
void moments(const T* x, size_t rows, size_t channels, double* mean, double* variance, int threads) {
    const Layout layout(channels, rows, sizeof(T));
    const Passes<T>& loops = passes<T>();
    std::vector<Moments> parts(threads, Moments(channels));
    in_parts(rows, threads, [&](int part, size_t begin, size_t end) {
        Moments& mine = parts[part];
        std::vector<T> pivot(layout.width()), sum(layout.width()), squares(layout.width());
        std::vector<double> sums(channels), sums_of_squares(channels);
        const auto look = [&](size_t first, size_t last, auto pivot_of) {
            for (size_t i = 0; i < pivot.size(); ++i) pivot[i] = static_cast<T>(pivot_of(i % channels));
            std::fill(sum.begin(), sum.end(), T(0));
            std::fill(squares.begin(), squares.end(), T(0));
            layout.each(first, last, [&](size_t row, size_t num, size_t width) {
                loops.add(x + row * channels, num, width, pivot.data(), sum.data(), squares.data());
            });
            std::fill(sums.begin(), sums.end(), 0.0);
            std::fill(sums_of_squares.begin(), sums_of_squares.end(), 0.0);
            layout.fold(sum, sums.data());
            layout.fold(squares, sums_of_squares.data());
            const double count = static_cast<double>(last - first);
            for (size_t c = 0; c < channels; ++c) {
                sums_of_squares[c] = std::max(0.0, sums_of_squares[c] - sums[c] * sums[c] / count);
                sums[c] = static_cast<double>(pivot[c]) + sums[c] / count;
            }
            return count;
        };
        // Squares of distances from the mean so far lose no digits. The first chunk is looked at twice, from a pixel
        // and from the mean that this finds.
        for (size_t first = begin; first < end; first += layout.chunk) {
            const size_t last = std::min(end, first + layout.chunk);
            if (first == begin) {
                look(first, last, [&](size_t c) { return x[begin * channels + c]; });
                mine.mean = sums;
            }
            const double count = look(first, last, [&](size_t c) { return mine.mean[c]; });
            mine.add(sums.data(), sums_of_squares.data(), count);
        }
    });
    Moments whole(channels);
    for (const Moments& part : parts) whole.add(part.mean.data(), part.squares.data(), part.count);
    for (size_t c = 0; c < channels; ++c) {
        mean[c] = whole.mean[c];
        variance[c] = whole.squares[c] / whole.count;
    }
}

template <class T>
void forward(const T* x, T* z, size_t rows, size_t channels, const double* mean, const double* invstd, const T* weight,
             const T* bias, int threads) {
    const Layout layout(channels, rows, sizeof(T));
    const Passes<T>& loops = passes<T>();
    const auto centre = layout.repeat<T>([&](size_t c) { return mean[c]; });
    const auto scale = layout.repeat<T>([&](size_t c) { return weight[c] * invstd[c]; });
    const auto shift = layout.repeat<T>([&](size_t c) { return bias[c]; });
    in_parts(rows, threads, [&](int, size_t begin, size_t end) {
        layout.each(begin, end, [&](size_t row, size_t num, size_t width) {
            const size_t at = row * channels;
            loops.activate(x + at, z + at, num, width, centre.data(), scale.data(), shift.data());
        });
    });
}

template <class T>
void backward(const T* x, const T* dz, T* dy, size_t rows, size_t channels, const double* mean, const double* invstd,
              const T* weight, const T* bias, double* sums, int threads) {
    const Layout layout(channels, rows, sizeof(T));
    const Passes<T>& loops = passes<T>();
    const auto centre = layout.repeat<T>([&](size_t c) { return mean[c]; });
    const auto scale = layout.repeat<T>([&](size_t c) { return weight[c] * invstd[c]; });
    const auto shift = layout.repeat<T>([&](size_t c) { return bias[c]; });
    std::vector<std::vector<double>> parts(threads, std::vector<double>(2 * channels));
    in_parts(rows, threads, [&](int part, size_t begin, size_t end) {
        std::vector<T> sum(layout.width()), product(layout.width());
        for (size_t first = begin; first < end; first += layout.chunk) {
            std::fill(sum.begin(), sum.end(), T(0));
            std::fill(product.begin(), product.end(), T(0));
            layout.each(first, std::min(end, first + layout.chunk), [&](size_t row, size_t num, size_t width) {
                const size_t at = row * channels;
                loops.activate_backward(x + at, dz + at, dy + at, num, width, centre.data(), scale.data(), shift.data(),
                                        sum.data(), product.data());
            });
            layout.fold(product, parts[part].data());
            layout.fold(sum, parts[part].data() + channels);
        }
    });
    std::fill(sums, sums + 2 * channels, 0.0);
    for (const auto& part : parts) {
        for (size_t i = 0; i < part.size(); ++i) sums[i] += part[i];
    }
    for (size_t c = 0; c < channels; ++c) sums[c] *= invstd[c];
}

template <class T>
void input_gradients(const T* x, T* dy, size_t rows, size_t channels, const double* mean, const double* invstd,
                     const T* weight, const double* sums, double count, int threads) {
    const Layout layout(channels, rows, sizeof(T));
    const Passes<T>& loops = passes<T>();
    const auto slope_of = [&](size_t c) { return weight[c] * invstd[c]; };
    const auto centre = layout.repeat<T>([&](size_t c) { return mean[c]; });
    const auto scale = layout.repeat<T>(slope_of);
    const auto slope = layout.repeat<T>([&](size_t c) { return -slope_of(c) * invstd[c] * sums[c] / count; });
    const auto constant = layout.repeat<T>([&](size_t c) { return -slope_of(c) * sums[channels + c] / count; });
    in_parts(rows, threads, [&](int, size_t begin, size_t end) {
        layout.each(begin, end, [&](size_t row, size_t num, size_t width) {
            const size_t at = row * channels;
            loops.input_gradients(x + at, dy + at, num, width, centre.data(), scale.data(), slope.data(),
                                  constant.data());
        });
    });
}

/// Calls with(null pointer of the values' type).
template <class With>
void of_type(bool of_doubles, With with) {
    if (of_doubles) {
        with(static_cast<double*>(nullptr));
    } else {
        with(static_cast<float*>(nullptr));
    }
}

}  // namespace
}  // namespace pneumo::layers

using pneumo::layers::of_type;

const char* pneumo_layers_simd() {
    try {
        return pneumo::simd_level();
    } catch (const std::exception&) {
        return nullptr;
    }
}

void pneumo_moments(bool of_doubles, const void* x, int64_t rows, int64_t channels, double* mean, double* variance,
                    int threads) {
    of_type(of_doubles, [&]<class T>(T*) {
        pneumo::layers::moments(static_cast<const T*>(x), rows, channels, mean, variance, threads);
    });
}

void pneumo_norm_silu(bool of_doubles, const void* x, void* z, int64_t rows, int64_t channels, const double* mean,
                      const double* invstd, const void* weight, const void* bias, int threads) {
    of_type(of_doubles, [&]<class T>(T*) {
        pneumo::layers::forward(static_cast<const T*>(x), static_cast<T*>(z), rows, channels, mean, invstd,
                                static_cast<const T*>(weight), static_cast<const T*>(bias), threads);
    });
}

void pneumo_norm_silu_backward(bool of_doubles, const void* x, const void* dz, void* dy, int64_t rows, int64_t channels,
                               const double* mean, const double* invstd, const void* weight, const void* bias,
                               double* sums, int threads) {
    of_type(of_doubles, [&]<class T>(T*) {
        pneumo::layers::backward(static_cast<const T*>(x), static_cast<const T*>(dz), static_cast<T*>(dy), rows,
                                 channels, mean, invstd, static_cast<const T*>(weight), static_cast<const T*>(bias),
                                 sums, threads);
    });
}

void pneumo_norm_input_gradients(bool of_doubles, const void* x, void* dy, int64_t rows, int64_t channels,
                                 const double* mean, const double* invstd, const void* weight, const double* sums,
                                 double count, int threads) {
    of_type(of_doubles, [&]<class T>(T*) {
        pneumo::layers::input_gradients(static_cast<const T*>(x), static_cast<T*>(dy), rows, channels, mean, invstd,
                                        static_cast<const T*>(weight), sums, count, threads);
    });
}
