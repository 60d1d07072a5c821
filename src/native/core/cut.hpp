#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>

namespace pneumo {

inline const std::byte* at(const void* data, size_t offset) { return static_cast<const std::byte*>(data) + offset; }
inline std::byte* at(void* data, size_t offset) { return static_cast<std::byte*>(data) + offset; }

inline void transfer(void* to, const void* from, size_t bytes) {
    if (bytes > 0 && to != from) std::memcpy(to, from, bytes);
}

inline size_t ceil_div(size_t a, size_t b) { return (a + b - 1) / b; }

/// How a vector of elements is cut into rounds, and a round into one part a rank; cuts lie on cache lines.
struct Cut {
    Cut(size_t count, size_t element, size_t chunk_bytes, size_t parts) : count(count), element(element), parts(parts) {
        grain = std::max<size_t>(1, 64 / element);
        const size_t most = chunk_bytes / element / (grain * parts) * (grain * parts);
        rounds = ceil_div(count, most);
        length = rounds == 0 ? 0 : ceil_div(ceil_div(count, rounds), grain * parts) * (grain * parts);
        rounds = length == 0 ? 0 : ceil_div(count, length);
    }
    size_t begin(size_t round) const { return round * length; }
    size_t size(size_t round) const { return std::min(length, count - begin(round)); }
    size_t bytes(size_t round) const { return size(round) * element; }
    /// Where a rank's part of a round begins, within the round; part `parts` is the round's end.
    size_t part(size_t round, size_t rank) const {
        const size_t whole = size(round);
        return std::min(whole, rank * (ceil_div(ceil_div(whole, parts), grain) * grain));
    }

    size_t count, element, parts, grain, rounds, length;
};

}  // namespace pneumo
