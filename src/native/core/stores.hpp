#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>

#include "cut.hpp"

namespace pneumo {

/// How ranks write their slots: as usual, so that the data stays in the cache of who wrote it (CACHED), or past the
/// caches into memory (STREAMED). MEASURED: as it was faster not long ago.
enum class Stores : uint8_t { MEASURED, CACHED, STREAMED };

/// memcpy past the caches; ordered before whatever is published next. Plain memcpy where the compiler knows no such
/// stores (kCanStream).
void stream(void* to, const void* from, size_t bytes);
extern const bool kCanStream;

/// A rank's slot of one round, to be written.
struct Slot {
    std::byte* data;
    bool streamed;

    void put(size_t offset, const void* from, size_t bytes) const {
        if (streamed) {
            stream(data + offset, from, bytes);
        } else {
            transfer(data + offset, from, bytes);
        }
    }
};

/// Decides how the slots are written. A slot that a peer has read lies in that peer's caches, and to write it again
/// takes it from there: cheap where both cores share a last-level cache, dear where they do not. Topology does not tell
/// (a virtual machine moves its cores between caches), so in every period all ranks write some rounds in one way
/// and some in the other, time their own work in them, and tell each other.
///
/// Ranks go through the same rounds, so they try, tell and decide in the same ones; the data is the same either way.
class StoreChoice {
   public:
    static constexpr uint64_t kPeriod = 512;           // rounds
    static constexpr uint64_t kFirst = 64;             // of the first two periods, which are within the third
    static constexpr uint64_t kTrial = 8;              // rounds of each way at the beginning of a period
    static constexpr uint64_t kSettled = 4;            // of them not timed: slots are as the last way left them
    static constexpr uint64_t kTell = 2 * kTrial + 2;  // by then a rank has read what it wrote in the trial
    static constexpr uint64_t kDecide = kTell + 4;     // by then all have told: nobody is 4 rounds behind
    static constexpr uint64_t kLeastBytes = 1 << 10;   // of a round, to be timed

    /// A round's place in its period.
    static uint64_t place(uint64_t round) { return round % (round < 2 * kFirst ? kFirst : kPeriod); }

    /// What passes in a round, by its kind of collective; rounds of other kinds or sizes are not comparable.
    struct Load {
        int kind = 0;
        size_t bytes = 0;
    };

    /// Picoseconds a byte of the cheapest timed round, CACHED and STREAMED, as a rank tells them; 0: unknown.
    using Costs = std::array<std::atomic<uint32_t>, 2>;

    explicit StoreChoice(Stores wished) : wished_(kCanStream ? wished : Stores::CACHED) {}

    /// Whether this round's slot is to be written past the caches.
    bool streamed(uint64_t round) const {
        if (wished_ != Stores::MEASURED) return wished_ == Stores::STREAMED;
        const uint64_t at = place(round);
        return at < 2 * kTrial ? at >= kTrial : streams_;
    }

    /// Enter a round, `costs(k)` being those that rank k of `ranks` tells.
    template <class CostsOf>
    void enter(uint64_t round, Load load, int me, int ranks, CostsOf costs) {
        if (wished_ != Stores::MEASURED) return;
        const uint64_t at = place(round);
        if (at < 2 * kTrial) {
            trial_[at] = {std::chrono::nanoseconds(0), load};
        } else if (at == kTell) {
            for (size_t way = 0; way < 2; ++way) costs(me)[way].store(cheapest(way), std::memory_order_relaxed);
        } else if (at == kDecide && round != judged_) {  // what goes in place enters a round and does not pass it
            judged_ = round;
            double sum[2] = {0, 0};
            bool known = true;
            for (int k = 0; k < ranks; ++k) {
                for (size_t way = 0; way < 2; ++way) {
                    const uint32_t cost = costs(k)[way].load(std::memory_order_relaxed);
                    known &= cost > 0;
                    sum[way] += cost;
                }
            }
            if (known) judge(sum[0], sum[1]);
        }
    }

    /// Times this rank's own work on a round, while it exists.
    class Watch {
       public:
        Watch(StoreChoice& choice, uint64_t round) : choice_(choice), at_(place(round)) {
            if (timed()) begin_ = std::chrono::steady_clock::now();
        }
        ~Watch() {
            if (!timed()) return;
            std::atomic_thread_fence(std::memory_order_seq_cst);  // what is in the store buffer belongs to it
            choice_.trial_[at_].spent += std::chrono::steady_clock::now() - begin_;
        }
        Watch(const Watch&) = delete;
        Watch& operator=(const Watch&) = delete;

       private:
        bool timed() const { return choice_.wished_ == Stores::MEASURED && at_ < 2 * kTrial; }
        StoreChoice& choice_;
        uint64_t at_;
        std::chrono::steady_clock::time_point begin_;
    };

   private:
    struct Round {
        std::chrono::nanoseconds spent{0};
        Load load;
    };

    bool comparable() const;
    uint32_t cheapest(size_t way) const;
    void judge(double cached, double streamed);

    Stores wished_;
    bool streams_ = false;
    uint64_t judged_ = 0;   // the round of the last decision
    bool doubted_ = false;  // the last trial was against what is done
    std::array<Round, 2 * kTrial> trial_{};
};

}  // namespace pneumo
