#pragma once

#include <deque>
#include <map>
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
    StoreChoice::Costs costs;
    uint64_t given_up;  // the first collective that this rank did not finish; written before ABORTED, like the reason
    char reason[432];
};

/// Notes from one rank to another, in order; one writes and one reads.
template <class Note>
struct Mailbox {
    alignas(64) std::atomic<uint64_t> put;
    alignas(64) std::atomic<uint64_t> taken;
    std::array<Note, Layout::kNotes> notes;

    bool full() const {
        return put.load(std::memory_order_relaxed) - taken.load(std::memory_order_acquire) == notes.size();
    }
    bool empty() const { return put.load(std::memory_order_acquire) == taken.load(std::memory_order_relaxed); }
    /// By the reader, who has taken all since `before`: whether the writer may have gone to sleep because it was full.
    /// Fenced as a doorbell's `ring`: of the two, one sees what the other has done.
    bool held_up(uint64_t before) const {
        if (taken.load(std::memory_order_relaxed) == before) return false;
        std::atomic_thread_fence(std::memory_order_seq_cst);
        return put.load(std::memory_order_relaxed) - before >= notes.size();
    }
    /// By the writer, unless it is full.
    void push(const Note& note) {
        const uint64_t index = put.load(std::memory_order_relaxed);
        notes[index % notes.size()] = note;
        put.store(index + 1, std::memory_order_release);
    }
    /// By the reader, unless it is empty.
    Note pop() {
        const uint64_t index = taken.load(std::memory_order_relaxed);
        const Note note = notes[index % notes.size()];
        taken.store(index + 1, std::memory_order_release);
        return note;
    }
};

/// Messages from one rank, the sender, to another: what is offered, what is answered, and a ring of pieces of the one
/// message that is under way.
struct alignas(64) Group::Channel {
    struct Offer {
        uint64_t bytes;
        int32_t tag;
    };
    struct Answer {
        uint64_t number;  // of the offer, from 0
        bool granted;
    };
    Mailbox<Offer> offers;
    Mailbox<Answer> answers;                    // by the receiver
    alignas(64) std::atomic<uint64_t> filled;   // pieces, by the sender
    alignas(64) std::atomic<uint64_t> drained;  // pieces, by the receiver

    std::byte* piece(uint64_t index, size_t bytes) {
        return reinterpret_cast<std::byte*>(this + 1) + index % Layout::kPieces * ((bytes + 63) / 64 * 64);
    }
};

/// What this rank knows of the messages between it and another.
struct Group::Pair {
    struct Offer {
        uint64_t number, bytes;
    };
    std::list<Operation*> sends;  // that have not yet made their offer, in order
    uint64_t sent = 0, offered = 0;
    std::map<uint64_t, bool> answers;             // to its sends, by the number of the offer
    std::map<int32_t, std::deque<Offer>> offers;  // by tag, in order: those that no receive has taken
    bool receiving = false;                       // a message is under way
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
