// Batch norm with SiLU against the textbook's formulas in long double, at every SIMD level; every array is exactly as
// long as it has to be, so that AddressSanitizer sees what goes beyond.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../src/native/layers/norm_silu.hpp"
#include "../../src/native/reduce/reduce.hpp"
#include "check.hpp"

namespace {

using Real = long double;

template <class T>
struct Case {
    size_t rows, channels;
    int threads;
    std::vector<T> x, dz, weight, bias;

    Case(size_t rows, size_t channels, int threads)
        : rows(rows),
          channels(channels),
          threads(threads),
          x(rows * channels),
          dz(x.size()),
          weight(channels),
          bias(channels) {
        std::mt19937 generator(static_cast<unsigned>(rows * 1000 + channels));
        std::normal_distribution<double> normal;
        for (auto* values : {&x, &dz, &weight, &bias}) {
            for (T& value : *values) value = static_cast<T>(normal(generator) + 0.5);
        }
    }

    /// CHECKs that found[c or row, c] is what `expected` says, but for so many roundings of `magnitude`.
    template <class Found, class Expected>
    void compare(const std::vector<Found>& found, Expected expected, Real roundings) const {
        const Real epsilon = sizeof(T) == 4 ? 6e-8L : 1.2e-16L;
        for (size_t i = 0; i < found.size(); ++i) {
            const Real wanted = expected(i / channels, i % channels);
            const Real error = std::fabs(static_cast<Real>(found[i]) - wanted);
            if (error > roundings * epsilon * (1 + std::fabs(wanted))) {
                std::printf("%s, %zu x %zu, %d threads, at %zu: %Lg instead of %Lg\n", pneumo_layers_simd(), rows,
                            channels, threads, i, static_cast<Real>(found[i]), wanted);
                CHECK(false);
            }
            CHECK(true);
        }
    }

    void run() const {
        constexpr bool DOUBLES = sizeof(T) == 8;
        constexpr Real EPS = 1e-3L;
        const auto value = [&](const std::vector<T>& of, size_t r, size_t c) -> Real { return of[r * channels + c]; };
        std::vector<Real> means(channels), variances(channels), slopes(channels), dweights(channels), dbiases(channels);
        const auto xhat = [&](size_t r, size_t c) { return (value(x, r, c) - means[c]) * slopes[c]; };
        const auto y = [&](size_t r, size_t c) { return xhat(r, c) * weight[c] + bias[c]; };
        const auto gradient = [&](size_t r, size_t c) {
            const Real s = 1 / (1 + std::exp(-y(r, c)));
            return value(dz, r, c) * s * (1 + y(r, c) * (1 - s));
        };
        for (size_t c = 0; c < channels; ++c) {
            for (size_t r = 0; r < rows; ++r) means[c] += value(x, r, c) / rows;
            for (size_t r = 0; r < rows; ++r) variances[c] += std::pow(value(x, r, c) - means[c], 2) / rows;
            slopes[c] = 1 / std::sqrt(variances[c] + EPS);
            for (size_t r = 0; r < rows; ++r) {
                dweights[c] += gradient(r, c) * xhat(r, c);
                dbiases[c] += gradient(r, c);
            }
        }
        const auto n = static_cast<int64_t>(rows), width = static_cast<int64_t>(channels);
        std::vector<double> mean(channels), variance(channels), invstd(channels), sums(2 * channels);
        pneumo_moments(DOUBLES, x.data(), n, width, mean.data(), variance.data(), threads);
        compare(mean, [&](size_t, size_t c) { return means[c]; }, 20);
        compare(variance, [&](size_t, size_t c) { return variances[c]; }, 200);
        for (size_t c = 0; c < channels; ++c) invstd[c] = 1 / std::sqrt(variance[c] + static_cast<double>(EPS));

        std::vector<T> z(x.size()), dy(x.size());
        const Real steep = 1 + *std::max_element(slopes.begin(), slopes.end());  // how rounding of x - mean grows
        pneumo_norm_silu(DOUBLES, x.data(), z.data(), n, width, mean.data(), invstd.data(), weight.data(), bias.data(),
                         threads);
        compare(z, [&](size_t r, size_t c) { return y(r, c) / (1 + std::exp(-y(r, c))); }, 100 * steep);
        pneumo_norm_silu_backward(DOUBLES, x.data(), dz.data(), dy.data(), n, width, mean.data(), invstd.data(),
                                  weight.data(), bias.data(), sums.data(), threads);
        compare(dy, gradient, 200 * steep);
        const Real total = 300 * steep * std::sqrt(static_cast<Real>(rows));
        compare(sums, [&](size_t of, size_t c) { return of ? dbiases[c] : dweights[c]; }, total);
        pneumo_norm_input_gradients(DOUBLES, x.data(), dy.data(), n, width, mean.data(), invstd.data(), weight.data(),
                                    sums.data(), static_cast<double>(rows), threads);
        const auto dx = [&](size_t r, size_t c) {
            return weight[c] * slopes[c] * (gradient(r, c) - dbiases[c] / rows - xhat(r, c) * dweights[c] / rows);
        };
        compare(dy, dx, total * steep);
    }
};

void levels() {
    for (const char* level : {"scalar", "avx2", "avx512", "neon"}) {
        try {
            pneumo::set_simd_level(level);
        } catch (const std::invalid_argument&) {
            continue;
        }
        CHECK(pneumo_layers_simd() == std::string(level));
        for (const size_t channels : {1UL, 3UL, 16UL, 17UL, 64UL, 80UL, 300UL}) {
            for (const size_t rows : {1UL, 2UL, 5UL, 100UL, 777UL}) {
                for (const int threads : {1, 3}) {
                    Case<float>(rows, channels, threads).run();
                    Case<double>(rows, channels, threads).run();
                }
            }
        }
    }
}

}  // namespace

int main() {
    levels();
    std::printf("%d checks\n", checks.load());
}
