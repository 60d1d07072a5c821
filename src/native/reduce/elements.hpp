// The elements in memory, and their scales; part of kernels.hpp, which says its rules.

#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "operations.hpp"

namespace pneumo::PNEUMO_SIMD_NAMESPACE {
namespace {

// --- Scales ---

/// A factor for floats, which multiply even by 1: that hides behind the memory, and spares the loops without a scale.
template <class Acc>
class Factor {
   public:
    explicit Factor(double factor) : factor_(static_cast<Acc>(factor)) {}
    Acc operator()(Acc value) const { return value * factor_; }

   private:
    Acc factor_;
};

template <class Convert>
class Factor<Vectors<Convert>> {
   public:
    explicit Factor(double factor) : factor_{typename Convert::Register{} + static_cast<float>(factor)} {}
    Vectors<Convert> operator()(Vectors<Convert> value) const { return value * factor_; }

   private:
    Vectors<Convert> factor_;
};

template <>
class Factor<Pair> {
   public:
    explicit Factor(double factor) : factor_(static_cast<float>(factor)) {}
    Pair operator()(Pair value) const { return {value.low * factor_, value.high * factor_}; }

   private:
    float factor_;
};

/// What integers have in its place: their scale takes a pass of its own.
struct NoFactor {
    explicit NoFactor(double) {}
    template <class Acc>
    Acc operator()(Acc value) const {
        return value;
    }
};

template <class T>
constexpr T GREATEST = static_cast<T>(static_cast<std::make_unsigned_t<T>>(-1) >> (std::is_signed_v<T> ? 1 : 0));
template <class T>
constexpr T LEAST = std::is_signed_v<T> ? static_cast<T>(-GREATEST<T> - 1) : T{0};

template <class T>
T multiplied(T value, double factor) {
    constexpr double END = 2.0 * static_cast<double>(GREATEST<T> / 2 + 1);  // GREATEST + 1, which is no T
    const double product = static_cast<double>(value) * factor;
    if (product >= END) return GREATEST<T>;
    if (product <= static_cast<double>(LEAST<T>)) return LEAST<T>;
    return product == product ? static_cast<T>(product) : T{0};
}

template <class T>
T divided(T value, int64_t divisor) {
    if constexpr (sizeof(T) < 8) {
        // Exact, and vectorises: a quotient that isn't an integer is at least 2^-32 of itself away from the next one,
        // which rounding to 53 bits can't bridge.
        return static_cast<T>(static_cast<double>(value) / static_cast<double>(divisor));
    } else {
        return value / static_cast<T>(divisor);
    }
}

/// n where `factor` is 1/n and n > 1, else 0.
inline int64_t divisor_of(double factor) {
    const double inverse = 1.0 / factor;
    if (!(inverse >= 1.5 && inverse <= 0x1p62)) return 0;  // what is within int64_t
    const int64_t nearest = __builtin_llround(inverse);
    return 1.0 / static_cast<double>(nearest) == factor ? nearest : 0;
}

/// to[i] = factor * from[i] as Scale promises; `to` may be `from`.
template <class T>
void scale_integers(T* to, const T* from, size_t count, double factor) {
    const int64_t divisor = divisor_of(factor);
    if (divisor != 0) {
#pragma GCC ivdep
        for (size_t i = 0; i < count; ++i) to[i] = divided(from[i], divisor);
    } else {
        for (size_t i = 0; i < count; ++i) to[i] = multiplied(from[i], factor);
    }
}

// --- Elements: how the i-th group of WIDTH is read into Acc, in which they are reduced, and written back; `count` of
// them, less than WIDTH at a range's end. Wide keeps the intermediate results of a tile unrounded ---

constexpr size_t TILE_BYTES = 4096;

template <class T>
struct Float {
    using Stored = T;
    using Acc = T;
    using Wide = Float;
    using After = Factor<Acc>;
    static constexpr size_t WIDTH = 1;
    static Acc load(const Stored* from, size_t i, size_t) { return from[i]; }
    static void store(Stored* to, size_t i, Acc value, size_t) { to[i] = canonical(value); }
};

/// Pairs of floats, with the low ones in one half of a tile and the high ones in the other: to vectors of each, that is
/// how they lie side by side.
struct WidePair {
    using Stored = float;
    using Acc = Pair;
    using Wide = WidePair;
    using After = Factor<Acc>;
    static constexpr size_t WIDTH = 2;
    static constexpr size_t HIGH = TILE_BYTES / sizeof(Stored) / 2;
    static Acc load(const Stored* from, size_t i, size_t) { return {from[i], from[HIGH + i]}; }
    static void store(Stored* to, size_t i, Acc value, size_t) {
        to[i] = value.low;
        to[HIGH + i] = value.high;
    }
};

/// 16-bit floats, two in a word, which are widened and narrowed where they are: that takes no shuffles.
///
/// `Format` converts them in the upper half of a word; what its narrow() leaves in the lower half does not matter.
template <class Format>
struct Paired {
    using Stored = uint16_t;
    using Acc = Pair;
    using Wide = WidePair;
    using After = Factor<Acc>;
    static constexpr size_t WIDTH = 2;

    static Acc load(const Stored* from, size_t i, size_t count) {
        uint32_t word = 0;
        __builtin_memcpy(&word, from + i * WIDTH, count * sizeof(Stored));
        return {Format::widen(word << 16), Format::widen(word & 0xffff0000)};
    }

    static void store(Stored* to, size_t i, Acc value, size_t count) {
        const uint32_t word = Format::narrow(value.low) >> 16 | (Format::narrow(value.high) & 0xffff0000);
        __builtin_memcpy(to + i * WIDTH, &word, count * sizeof(Stored));
    }
};

/// The upper half of a float.
struct BFloat16 {
    static float widen(uint32_t bits) { return __builtin_bit_cast(float, bits); }
    static uint32_t narrow(float value) {
        const uint32_t bits = __builtin_bit_cast(uint32_t, canonical(value));
        return bits + 0x7fff + (bits >> 16 & 1);  // a tie goes to the even one
    }
};

/// IEEE's 16 bits by integer arithmetic, for where there is no instruction; exact.
///
/// Magnitudes are signed, since SSE2 compares no others.
struct SoftFloat16 {
    static float widen(uint32_t bits) {
        const auto magnitude = static_cast<int32_t>(bits & 0x7fff0000);
        const int32_t normal = (magnitude >> 3) + REBIAS;
        const int32_t special = normal + REBIAS;  // infinity and NaN: float's greatest exponent
        // A float from 0.5 on counts in steps of 2^-24, as denormal halves do.
        const float denormal = __builtin_bit_cast(float, (magnitude >> 16) + HALF) - 0.5F;
        int32_t wide = magnitude >= 0x7c000000 ? special : normal;
        wide = magnitude < 0x04000000 ? __builtin_bit_cast(int32_t, denormal) : wide;
        return __builtin_bit_cast(float, static_cast<uint32_t>(wide) | (bits & 0x80000000));
    }

    static uint32_t narrow(float value) {
        const uint32_t bits = __builtin_bit_cast(uint32_t, value);
        const auto magnitude = static_cast<int32_t>(bits & 0x7fffffff);
        const int32_t to_even = magnitude >> 13 & 1;  // of a tie
        const int32_t normal = (magnitude - REBIAS + 0xfff + to_even) >> 13;
        const float in_steps = __builtin_bit_cast(float, magnitude < LEAST_NORMAL ? magnitude : 0) + 0.5F;
        int32_t half = magnitude < LEAST_NORMAL ? __builtin_bit_cast(int32_t, in_steps) - HALF : normal;
        half = magnitude >= OVERFLOWS ? 0x7c00 : half;
        const uint32_t signed_half = static_cast<uint32_t>(half) << 16 | (bits & 0x80000000);
        return magnitude > 0x7f800000 ? 0x7e000000 : signed_half;
    }

   private:
    static constexpr int32_t REBIAS = (127 - 15) << 23;
    static constexpr int32_t HALF = 126 << 23;                 // the bits of 0.5F
    static constexpr int32_t LEAST_NORMAL = (127 - 14) << 23;  // of 2^-14
    static constexpr int32_t OVERFLOWS = 0x477ff000;           // of 65520, half-way to what would come after 65504
};

/// Registers of floats, of which a tile always holds whole ones.
template <class Convert>
struct WideVectors {
    using Stored = float;
    using Acc = Vectors<Convert>;
    using Wide = WideVectors;
    using After = Factor<Acc>;
    static constexpr size_t WIDTH = sizeof(Acc) / sizeof(float);
    static Acc load(const Stored* from, size_t i, size_t) {
        Acc value;
        __builtin_memcpy(&value, from + i * WIDTH, sizeof value);
        return value;
    }
    static void store(Stored* to, size_t i, Acc value, size_t) {
        __builtin_memcpy(to + i * WIDTH, &value, sizeof value);
    }
};

/// IEEE's 16 bits with the instructions in `Convert`, which gcc doesn't find by itself.
template <class Convert>
struct HardFloat16 {
    using Stored = uint16_t;
    using Acc = Vectors<Convert>;
    using Wide = WideVectors<Convert>;
    using After = Factor<Acc>;
    static constexpr size_t WIDTH = Wide::WIDTH;

    static Acc load(const Stored* from, size_t i, size_t count) {
        if (count == WIDTH) return {Convert::widen(from + i * WIDTH)};
        Stored padded[WIDTH] = {};
        __builtin_memcpy(padded, from + i * WIDTH, count * sizeof(Stored));
        return {Convert::widen(padded)};
    }

    static void store(Stored* to, size_t i, Acc value, size_t count) {
        if (count == WIDTH) return Convert::narrow(to + i * WIDTH, canonical(value).lanes);
        Stored padded[WIDTH];
        Convert::narrow(padded, canonical(value).lanes);
        __builtin_memcpy(to + i * WIDTH, padded, count * sizeof(Stored));
    }
};

template <class T>
struct Integer {
    using Stored = T;
    using Acc = T;
    using Wide = Integer;
    using After = NoFactor;
    static constexpr size_t WIDTH = 1;
    static Acc load(const Stored* from, size_t i, size_t) { return from[i]; }
    static void store(Stored* to, size_t i, Acc value, size_t) { to[i] = value; }
};

struct Bool {
    using Stored = uint8_t;
    using Acc = uint8_t;
    using Wide = Bool;
    using After = NoFactor;
    static constexpr size_t WIDTH = 1;
    static Acc load(const Stored* from, size_t i, size_t) { return from[i] != 0; }
    static void store(Stored* to, size_t i, Acc value, size_t) { to[i] = value; }
};

}  // namespace
}  // namespace pneumo::PNEUMO_SIMD_NAMESPACE
