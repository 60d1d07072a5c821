// The values in which elements are reduced, and the operations on them; part of kernels.hpp, which says its rules.

#pragma once

#include <cstdint>
#include <type_traits>

namespace pneumo::PNEUMO_SIMD_NAMESPACE {
namespace {

// --- Values: what the operations need beyond + and *. Vectors is a register of floats, which `Convert` names ---

template <class Convert>
struct Vectors {
    using Register = typename Convert::Register;
    Register lanes;

    friend Vectors operator+(Vectors a, Vectors b) { return {a.lanes + b.lanes}; }
    friend Vectors operator*(Vectors a, Vectors b) { return {a.lanes * b.lanes}; }
    friend Vectors operator-(Vectors a) { return {-a.lanes}; }
};

/// Two floats, from the halves of a 32-bit word.
struct Pair {
    float low;
    float high;

    friend Pair operator+(Pair a, Pair b) { return {a.low + b.low, a.high + b.high}; }
    friend Pair operator*(Pair a, Pair b) { return {a.low * b.low, a.high * b.high}; }
    friend Pair operator-(Pair a) { return {-a.low, -a.high}; }
};

/// Gives every NaN the same bits (see ReduceFn).
inline float canonical(float value) { return value == value ? value : __builtin_nanf(""); }
inline double canonical(double value) { return value == value ? value : __builtin_nan(""); }
template <class Convert>
Vectors<Convert> canonical(Vectors<Convert> value) {
    return {value.lanes == value.lanes ? value.lanes : typename Convert::Register{} + __builtin_nanf("")};
}

/// `a` where a < b, else `b`: the instruction minps, also in what it does with NaN.
template <class Acc>
Acc first_if_less(Acc a, Acc b) {
    return a < b ? a : b;
}
template <class Convert>
Vectors<Convert> first_if_less(Vectors<Convert> a, Vectors<Convert> b) {
    return {a.lanes < b.lanes ? a.lanes : b.lanes};
}

inline float either_bits(float a, float b) {
    return __builtin_bit_cast(float, __builtin_bit_cast(uint32_t, a) | __builtin_bit_cast(uint32_t, b));
}
inline double either_bits(double a, double b) {
    return __builtin_bit_cast(double, __builtin_bit_cast(uint64_t, a) | __builtin_bit_cast(uint64_t, b));
}
template <class Convert>
Vectors<Convert> either_bits(Vectors<Convert> a, Vectors<Convert> b) {
    using Bits = decltype(a.lanes < b.lanes);
    const Bits bits = __builtin_bit_cast(Bits, a.lanes) | __builtin_bit_cast(Bits, b.lanes);
    return {__builtin_bit_cast(typename Convert::Register, bits)};
}

inline Pair first_if_less(Pair a, Pair b) { return {first_if_less(a.low, b.low), first_if_less(a.high, b.high)}; }
inline Pair either_bits(Pair a, Pair b) { return {either_bits(a.low, b.low), either_bits(a.high, b.high)}; }

/// Unsigned and at least 32 bits wide: signed overflow is undefined, and narrower types are promoted to int.
template <class T>
using Wrapping = std::conditional_t<sizeof(T) < 4, uint32_t, std::make_unsigned_t<T>>;

// --- Operations: enter() and leave() map values into and out of the form in which apply() reduces them ---

struct AsIs {
    template <class Acc>
    static Acc enter(Acc value) {
        return value;
    }
    template <class Acc>
    static Acc leave(Acc value) {
        return value;
    }
};

struct Sum : AsIs {
    template <class Acc>
    static Acc apply(Acc a, Acc b) {
        if constexpr (std::is_integral_v<Acc>) {
            return static_cast<Acc>(static_cast<Wrapping<Acc>>(a) + static_cast<Wrapping<Acc>>(b));
        } else {
            return a + b;
        }
    }
};

struct Product : AsIs {
    template <class Acc>
    static Acc apply(Acc a, Acc b) {
        if constexpr (std::is_integral_v<Acc>) {
            return static_cast<Acc>(static_cast<Wrapping<Acc>>(a) * static_cast<Wrapping<Acc>>(b));
        } else {
            return a * b;
        }
    }
};

/// Of floats, min(a, b) | min(b, a): the two differ only where a and b are zeros of unlike sign, and "or" finds the
/// negative one, or where one is NaN, and "or" with any bits leaves a NaN one.
struct Min : AsIs {
    template <class Acc>
    static Acc apply(Acc a, Acc b) {
        if constexpr (std::is_integral_v<Acc>) {
            return a < b ? a : b;
        } else {
            return either_bits(first_if_less(a, b), first_if_less(b, a));
        }
    }
};

/// Of floats, -min(-a, -b): an "and" for the zeros could turn a NaN into a number.
struct Max {
    template <class Acc>
    static Acc enter(Acc value) {
        if constexpr (std::is_integral_v<Acc>) {
            return value;
        } else {
            return -value;
        }
    }
    template <class Acc>
    static Acc leave(Acc value) {
        return enter(value);
    }
    template <class Acc>
    static Acc apply(Acc a, Acc b) {
        if constexpr (std::is_integral_v<Acc>) {
            return a < b ? b : a;
        } else {
            return Min::apply(a, b);
        }
    }
};

struct And : AsIs {
    template <class Acc>
    static Acc apply(Acc a, Acc b) {
        return static_cast<Acc>(a & b);
    }
};

struct Or : AsIs {
    template <class Acc>
    static Acc apply(Acc a, Acc b) {
        return static_cast<Acc>(a | b);
    }
};

struct Xor : AsIs {
    template <class Acc>
    static Acc apply(Acc a, Acc b) {
        return static_cast<Acc>(a ^ b);
    }
};

}  // namespace
}  // namespace pneumo::PNEUMO_SIMD_NAMESPACE
