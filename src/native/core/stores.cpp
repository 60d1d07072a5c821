#include "stores.hpp"

#include <algorithm>
#include <limits>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace pneumo {

#if defined(__SSE2__)
const bool kCanStream = true;

void stream(void* to, const void* from, size_t bytes) {
    constexpr size_t kVector = sizeof(__m128i), kLine = 4 * kVector;
    auto* target = static_cast<std::byte*>(to);
    const auto* source = static_cast<const std::byte*>(from);
    const size_t ahead = std::min(bytes, (kVector - reinterpret_cast<uintptr_t>(target) % kVector) % kVector);
    transfer(target, source, ahead);
    size_t done = ahead;
    for (; done + kLine <= bytes; done += kLine) {
        __m128i line[4];
        for (size_t i = 0; i < 4; ++i) {
            line[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + done + i * kVector));
        }
        for (size_t i = 0; i < 4; ++i) {
            _mm_stream_si128(reinterpret_cast<__m128i*>(target + done + i * kVector), line[i]);
        }
    }
    transfer(target + done, source + done, bytes - done);
    _mm_sfence();
}
#else
const bool kCanStream = false;

void stream(void* to, const void* from, size_t bytes) { transfer(to, from, bytes); }
#endif

/// Whether the timed rounds of both ways are alike, which all ranks answer alike.
bool StoreChoice::comparable() const {
    size_t least = std::numeric_limits<size_t>::max(), most = 0;
    for (uint64_t i = 0; i < 2 * kTrial; ++i) {
        if (i % kTrial < kSettled) continue;
        if (trial_[i].load.kind != trial_[kSettled].load.kind) return false;
        least = std::min(least, trial_[i].load.bytes);
        most = std::max(most, trial_[i].load.bytes);
    }
    return least >= kLeastBytes && most <= 2 * least;
}

uint32_t StoreChoice::cheapest(size_t way) const {
    if (!comparable()) return 0;
    double least = std::numeric_limits<double>::infinity();
    for (uint64_t i = way * kTrial + kSettled; i < (way + 1) * kTrial; ++i) {
        const auto& [spent, load] = trial_[i];
        least = std::min(least, static_cast<double>(spent.count()) * 1e3 / static_cast<double>(load.bytes));
    }
    return least < 1e9 ? std::max(1U, static_cast<uint32_t>(least)) : 0;
}

/// Two trials in a row have to be against what is done, each by a tenth: one may have been disturbed.
void StoreChoice::judge(double cached, double streamed) {
    const bool against = streams_ ? cached < 0.9 * streamed : streamed < 0.9 * cached;
    if (against && doubted_) streams_ = !streams_;
    doubted_ = against && !doubted_;
}

}  // namespace pneumo
