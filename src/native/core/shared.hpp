#pragma once

#include <numeric>

#include "group.hpp"

namespace pneumo {

/// What lies in a group's shared memory. All of it is zero at first, which is a valid state of everything.
struct alignas(64) Counter {
    std::atomic<uint64_t> value;
};

/// Written by one rank, read by those that want to know why it does not come.
struct alignas(64) Group::RankState {
    enum : uint32_t { PRESENT = 0, LEFT = 1, ABORTED = 2 };
    std::atomic<uint32_t> presence;
    std::array<std::atomic<uint64_t>, kStages> position;  // one past the last step contributed to, for each stage
    uint64_t given_up;  // the first collective that this rank did not finish; written before ABORTED, like the reason
    char reason[440];
};

/// From one rank to another: what is posted, and a ring of pieces of the one message that is under way.
struct alignas(64) Group::Channel {
    struct Header {
        enum : uint32_t { FREE, POSTED, TAKEN, GRANTED, REFUSED };
        std::atomic<uint32_t> state;
        int32_t tag;
        uint64_t bytes;
        uint64_t number;  // in the order of posting
    };
    std::array<Header, Layout::kHeaders> headers;
    alignas(64) std::atomic<uint64_t> filled;   // pieces, by the sender
    alignas(64) std::atomic<uint64_t> drained;  // pieces, by the receiver

    Header* find(uint32_t state) {
        for (auto& header : headers) {
            if (header.state.load(std::memory_order_acquire) == state) return &header;
        }
        return nullptr;
    }
    std::byte* piece(uint64_t index, size_t bytes) {
        return reinterpret_cast<std::byte*>(this + 1) + index % Layout::kPieces * ((bytes + 63) / 64 * 64);
    }
};

/// Waits for a step of a stage.
struct Reached final : Waiting {
    Reached(const Group& group, const Group::Step& step) : group(group), step(step) {}
    bool ready() override { return step.done(); }
    bool for_arrival() const override { return step.stage == Group::ARRIVED; }
    std::string what() const override { return group.describe(); }
    std::vector<int> involved() const override {
        std::vector<int> ranks(static_cast<size_t>(group.size()));
        std::iota(ranks.begin(), ranks.end(), 0);
        return ranks;
    }
    std::vector<int> missing() const override {
        std::vector<int> ranks;
        for (int rank = 0; rank < group.size(); ++rank) {
            if (step.only >= 0 && rank != step.only) continue;
            if (group.state(rank).position[step.stage].load(std::memory_order_relaxed) <= step.index)
                ranks.push_back(rank);
        }
        return ranks;
    }

    const Group& group;
    const Group::Step step;
};

}  // namespace pneumo
