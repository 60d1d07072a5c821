// The reductions, as templates that each SIMD level compiles for itself; included by kernels_*.cpp only.
//
// Those files differ in their compiler flags, and the linker merges inline functions of equal names: one compiled for
// AVX-512 could then serve the scalar level on a machine without. So all code here has internal linkage, in a
// namespace per level, and of the standard headers only types are used.
//
// The loops are plain ones, which gcc vectorises under these flags, beside those that the levels name:
//   -O3                   vectorises whatever the loop costs
//   -ffp-contract=off     no fused multiply-add, which rounds once instead of twice, so that all levels agree
//   -fno-trapping-math    both sides of a choice may be computed, as vectors have to; no value depends on it

#pragma once

#ifndef PNEUMO_SIMD_NAMESPACE
#error "define PNEUMO_SIMD_NAMESPACE, the namespace of this SIMD level, before including kernels.hpp"
#endif

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "elements.hpp"
#include "operations.hpp"
#include "reduce.hpp"

namespace pneumo::PNEUMO_SIMD_NAMESPACE {
namespace {

constexpr size_t BLOCK_BYTES = 256;
constexpr size_t PREFETCH_BYTES = 1024;

/// Fetches what comes PREFETCH_BYTES later, for elements that have to be widened.
///
/// Those keep the processor so busy that it doesn't itself look far enough ahead: from memory, this makes the sum of
/// four sources in bf16 a fifth faster or more (on Zen 3), and no difference within L2. Others don't need it.
template <class Stored>
void prefetch_block(const Stored* from) {
    const auto start = reinterpret_cast<uintptr_t>(from) + PREFETCH_BYTES;  // an integer, as it may be past the end
    for (size_t line = 0; line < BLOCK_BYTES; line += 64) __builtin_prefetch(reinterpret_cast<void*>(start + line));
}

/// One pass over `NUM` sources: `first`, and what `rest` points to at the index `at`.
///
/// No iteration touches what another does, though `out` may be a source: hence ivdep. Not inlined, since many callers
/// share it.
template <class First, class Rest, class Out, class Operation, int NUM>
__attribute__((noinline)) void fused(typename Out::Stored* out, const typename First::Stored* first,
                                     const void* const* rest, size_t at, size_t count, typename Out::After after) {
    using Source = const typename Rest::Stored*;
    [[maybe_unused]] const Source second = NUM > 1 ? static_cast<Source>(rest[0]) + at : nullptr;
    [[maybe_unused]] const Source third = NUM > 2 ? static_cast<Source>(rest[1]) + at : nullptr;
    [[maybe_unused]] const Source fourth = NUM > 3 ? static_cast<Source>(rest[2]) + at : nullptr;
    const auto step = [=](size_t i, size_t width) __attribute__((always_inline)) {
        auto acc = Operation::enter(First::load(first, i, width));
        if constexpr (NUM > 1) acc = Operation::apply(acc, Operation::enter(Rest::load(second, i, width)));
        if constexpr (NUM > 2) acc = Operation::apply(acc, Operation::enter(Rest::load(third, i, width)));
        if constexpr (NUM > 3) acc = Operation::apply(acc, Operation::enter(Rest::load(fourth, i, width)));
        Out::store(out, i, after(Operation::leave(acc)), width);
    };
    constexpr size_t WIDTH = Rest::WIDTH;
    const size_t num_whole = count / WIDTH;
    size_t i = 0;
    if constexpr (!std::is_same_v<Rest, typename Rest::Wide>) {
        constexpr size_t BLOCK = BLOCK_BYTES / sizeof(typename Rest::Stored) / WIDTH;
        for (; i + BLOCK <= num_whole; i += BLOCK) {
            if constexpr (std::is_same_v<First, Rest>) prefetch_block(first + i * WIDTH);  // else it is a tile
            if constexpr (NUM > 1) prefetch_block(second + i * WIDTH);
            if constexpr (NUM > 2) prefetch_block(third + i * WIDTH);
            if constexpr (NUM > 3) prefetch_block(fourth + i * WIDTH);
#pragma GCC ivdep
            for (size_t j = 0; j < BLOCK; ++j) step(i + j, WIDTH);
        }
    }
#pragma GCC ivdep
    for (; i < num_whole; ++i) step(i, WIDTH);
    if (count % WIDTH != 0) step(num_whole, count % WIDTH);
}

/// A tile that stays in the L1 cache takes the sources beyond the first four, three in a pass.
template <class Element, class Operation>
void reduce_tiled(typename Element::Stored* dst, const void* const* srcs, int num_srcs, size_t begin, size_t end,
                  typename Element::After after) {
    using Wide = typename Element::Wide;
    constexpr size_t TILE_LENGTH = TILE_BYTES / sizeof(typename Wide::Stored);
    alignas(64) typename Wide::Stored tile[TILE_LENGTH];
    const typename Wide::After unscaled(1.0);
    for (size_t at = begin; at < end; at += TILE_LENGTH) {
        const size_t count = end - at < TILE_LENGTH ? end - at : TILE_LENGTH;
        const auto* const first = static_cast<const typename Element::Stored*>(srcs[0]) + at;
        fused<Element, Element, Wide, Operation, 4>(tile, first, srcs + 1, at, count, unscaled);
        int k = 4;
        for (; num_srcs - k > 3; k += 3) {
            fused<Wide, Element, Wide, Operation, 4>(tile, tile, srcs + k, at, count, unscaled);
        }
        switch (num_srcs - k) {
            case 1: fused<Wide, Element, Element, Operation, 2>(dst + at, tile, srcs + k, at, count, after); break;
            case 2: fused<Wide, Element, Element, Operation, 3>(dst + at, tile, srcs + k, at, count, after); break;
            default: fused<Wide, Element, Element, Operation, 4>(dst + at, tile, srcs + k, at, count, after);
        }
    }
}

template <class Element, class Operation>
void reduce_range(typename Element::Stored* dst, const void* const* srcs, int num_srcs, size_t begin, size_t end,
                  typename Element::After after) {
    const auto* const first = static_cast<const typename Element::Stored*>(srcs[0]) + begin;
    auto* const out = dst + begin;
    const size_t count = end - begin;
    switch (num_srcs) {
        case 1: return fused<Element, Element, Element, AsIs, 1>(out, first, nullptr, begin, count, after);
        case 2: return fused<Element, Element, Element, Operation, 2>(out, first, srcs + 1, begin, count, after);
        case 3: return fused<Element, Element, Element, Operation, 3>(out, first, srcs + 1, begin, count, after);
        case 4: return fused<Element, Element, Element, Operation, 4>(out, first, srcs + 1, begin, count, after);
        default: return reduce_tiled<Element, Operation>(dst, srcs, num_srcs, begin, end, after);
    }
}

template <class Element>
constexpr bool HAS_FACTOR = !std::is_same_v<typename Element::After, NoFactor>;

/// A tile of a source, widened and scaled.
template <class Element>
void premultiply(typename Element::Wide::Stored* to, const typename Element::Stored* from, size_t count,
                 double factor) {
    if constexpr (HAS_FACTOR<Element>) {
        const typename Element::Wide::After before(factor);
        fused<Element, Element, typename Element::Wide, AsIs, 1>(to, from, nullptr, 0, count, before);
    } else {
        scale_integers(to, from, count, factor);
    }
}

/// The reductions with a scale that the loops above don't apply, in passes of their own over a tile: what comes before,
/// and what integers have afterwards. `Reduced` is the element that the operation may take them for.
template <class Element, class Operation, class Reduced>
void reduce_scaled(typename Element::Stored* dst, const void* const* srcs, int num_srcs, size_t count, Scale scale) {
    using Wide = typename Element::Wide;
    using ReducedWide = typename Reduced::Wide;
    constexpr size_t PARTS = sizeof(typename Element::Stored) / sizeof(typename Reduced::Stored);
    constexpr size_t TILE_LENGTH = TILE_BYTES / sizeof(typename Wide::Stored);
    alignas(64) typename Wide::Stored tile[TILE_LENGTH];
    alignas(64) typename Wide::Stored scaled[TILE_LENGTH];
    const void* const rest[] = {scaled};
    const typename ReducedWide::After unscaled(1.0);
    const typename Element::After after(scale.after);
    for (size_t at = 0; at < count; at += TILE_LENGTH) {
        const size_t length = count - at < TILE_LENGTH ? count - at : TILE_LENGTH;
        auto* const out = dst + at;
        if (scale.before == 1.0) {
            reduce_range<Reduced, Operation>(reinterpret_cast<typename Reduced::Stored*>(dst), srcs, num_srcs,
                                             at * PARTS, (at + length) * PARTS, typename Reduced::After(scale.after));
        } else {
            auto* const result = reinterpret_cast<typename ReducedWide::Stored*>(tile);
            for (int k = 0; k < num_srcs; ++k) {
                const auto* const source = static_cast<const typename Element::Stored*>(srcs[k]) + at;
                premultiply<Element>(k == 0 ? tile : scaled, source, length, scale.before);
                if (k == 0) continue;
                fused<ReducedWide, ReducedWide, ReducedWide, Operation, 2>(result, result, rest, 0, length * PARTS,
                                                                           unscaled);
            }
            fused<Wide, Wide, Element, AsIs, 1>(out, tile, nullptr, 0, length, after);
        }
        if constexpr (!HAS_FACTOR<Element>) {
            if (scale.after != 1.0) scale_integers(out, out, length, scale.after);
        }
    }
}

template <class Element, class Operation, class Reduced = Element>
void reduce(void* dst, const void* const* srcs, int num_srcs, size_t count, Scale scale) {
    using Stored = typename Element::Stored;
    using ReducedStored = typename Reduced::Stored;
    constexpr bool IS_BOOL = std::is_same_v<Element, Bool>;
    const bool is_scaled = scale.before != 1.0 || scale.after != 1.0;
    if constexpr (!IS_BOOL) {
        if (num_srcs == 1 && !is_scaled) {
            if (dst != srcs[0]) __builtin_memcpy(dst, srcs[0], count * sizeof(Stored));
            return;
        }
        if (scale.before != 1.0 || (!HAS_FACTOR<Element> && is_scaled)) {
            return reduce_scaled<Element, Operation, Reduced>(static_cast<Stored*>(dst), srcs, num_srcs, count, scale);
        }
    }
    const size_t length = count * (sizeof(Stored) / sizeof(ReducedStored));
    const typename Reduced::After after(scale.after);
    reduce_range<Reduced, Operation>(static_cast<ReducedStored*>(dst), srcs, num_srcs, 0, length, after);
}

// --- The table ---

template <class Element>
ReduceFn find_float(Op op) {
    switch (op) {
        case Op::SUM: return reduce<Element, Sum>;
        case Op::PRODUCT: return reduce<Element, Product>;
        case Op::MIN: return reduce<Element, Min>;
        case Op::MAX: return reduce<Element, Max>;
        default: return nullptr;
    }
}

/// Wrapping sums and products have the same bits with and without a sign, and bits know no elements at all.
template <class T>
ReduceFn find_integer(Op op) {
    using Signless = Integer<std::make_unsigned_t<T>>;
    using Byte = Integer<uint8_t>;
    switch (op) {
        case Op::SUM: return reduce<Integer<T>, Sum, Signless>;
        case Op::PRODUCT: return reduce<Integer<T>, Product, Signless>;
        case Op::MIN: return reduce<Integer<T>, Min>;
        case Op::MAX: return reduce<Integer<T>, Max>;
        case Op::BAND: return reduce<Integer<T>, And, Byte>;
        case Op::BOR: return reduce<Integer<T>, Or, Byte>;
        case Op::BXOR: return reduce<Integer<T>, Xor, Byte>;
    }
    return nullptr;
}

inline ReduceFn find_bool(Op op) {
    switch (op) {
        case Op::SUM:
        case Op::MAX:
        case Op::BOR: return reduce<Bool, Or>;
        case Op::PRODUCT:
        case Op::MIN:
        case Op::BAND: return reduce<Bool, And>;
        case Op::BXOR: return reduce<Bool, Xor>;
    }
    return nullptr;
}

/// `Float16` is the element for IEEE's 16 bits, which the levels read and write differently.
template <class Float16>
ReduceFn find_kernel(DType dtype, Op op) {
    switch (dtype) {
        case DType::F64: return find_float<Float<double>>(op);
        case DType::F32: return find_float<Float<float>>(op);
        case DType::F16: return find_float<Float16>(op);
        case DType::BF16: return find_float<Paired<BFloat16>>(op);
        case DType::I8: return find_integer<int8_t>(op);
        case DType::I16: return find_integer<int16_t>(op);
        case DType::I32: return find_integer<int32_t>(op);
        case DType::I64: return find_integer<int64_t>(op);
        case DType::U8: return find_integer<uint8_t>(op);
        case DType::U16: return find_integer<uint16_t>(op);
        case DType::U32: return find_integer<uint32_t>(op);
        case DType::U64: return find_integer<uint64_t>(op);
        case DType::BOOL: return find_bool(op);
    }
    return nullptr;
}

}  // namespace
}  // namespace pneumo::PNEUMO_SIMD_NAMESPACE
