// All-reduce in its three ways: small data at once, large data in rounds through the slots, and in place of tensors
// that lie in the arenas. ../README.md explains the protocol and the bytes that each moves.

#include <algorithm>

#include "cut.hpp"
#include "shared.hpp"

namespace pneumo {
namespace {

constexpr size_t kTile = 8 << 10;  // bytes that are reduced and copied on while they are in the first-level cache

}  // namespace

/// What a rank does in each round with the data of an all-reduce. Of a round, every rank reduces its own part.
struct Group::Allreduce {
    Allreduce(Group& group, const Call& call, const void* in, void* out, DType dtype, Scale scale)
        : group(group),
          in(in),
          out(out),
          element(size_of(dtype)),
          ranks(static_cast<size_t>(group.size_)),
          me(static_cast<size_t>(group.rank_)),
          reduce(find_reduce(dtype, call.op)),
          scale(scale),
          cut(call.count, element, group.tuning_.chunk_bytes, ranks),
          sources(ranks) {}

    /// Small data that all have announced.
    void reduce_announced(size_t count) {
        for (size_t k = 0; k < ranks; ++k) sources[k] = group.announced(static_cast<int>(k));
        if (count > 0) reduce(out, sources.data(), group.size_, count, scale);
    }

    /// What other ranks reduce of a round goes to my slot.
    void copy_in(size_t round) {
        const StoreChoice::Watch watch(group.choice_, group.round_ + round);
        const std::byte* from = at(in, cut.begin(round) * element);
        const Slot slot = group.my_slot(group.round_ + round);
        const size_t begin = cut.part(round, me) * element, end = cut.part(round, me + 1) * element;
        slot.put(0, from, begin);
        slot.put(end, from + end, cut.bytes(round) - end);
    }

    /// My part comes from everybody's slot, and goes to my output and from there, in cache, to my slot.
    void reduce_mine(size_t round) {
        const StoreChoice::Watch watch(group.choice_, group.round_ + round);
        const Slot mine = group.my_slot(group.round_ + round);
        const size_t offset = cut.begin(round) * element, end = cut.part(round, me + 1) * element;
        for (size_t tile = cut.part(round, me) * element; tile < end; tile += kTile) {
            const size_t bytes = std::min(kTile, end - tile);
            const auto slot = [&](size_t k) { return group.slot(static_cast<int>(k), group.round_ + round) + tile; };
            for (size_t k = 0; k < ranks; ++k) sources[k] = k == me ? at(in, offset + tile) : slot(k);
            reduce(at(out, offset + tile), sources.data(), group.size_, bytes / element, scale);
            mine.put(tile, at(out, offset + tile), bytes);
        }
    }

    /// The other parts of a round come from those who reduced them; `of(k)` is where rank k has the round.
    template <class Origin>
    void take(size_t round, Origin of) {
        for (size_t k = 0; k < ranks; ++k) {
            if (k == me) continue;
            const size_t begin = cut.part(round, k) * element, end = cut.part(round, k + 1) * element;
            transfer(at(out, cut.begin(round) * element + begin), of(k) + begin, end - begin);
        }
    }

    void copy_out(size_t round) {
        const StoreChoice::Watch watch(group.choice_, group.round_ + round);
        take(round, [&](size_t k) { return group.slot(static_cast<int>(k), group.round_ + round); });
    }

    void pull(size_t round, const std::vector<const std::byte*>& places) {
        take(round, [&](size_t k) { return places[k] + cut.begin(round) * element; });
    }

    /// My part of everybody's tensor, in place; nobody else reads or writes mine before I say so.
    void reduce_in_place(size_t round, const std::vector<const std::byte*>& places) {
        const size_t begin = cut.part(round, me), length = cut.part(round, me + 1) - begin;
        const size_t offset = (cut.begin(round) + begin) * element;
        for (size_t k = 0; k < ranks; ++k) sources[k] = places[k] + offset;
        if (length > 0) reduce(at(out, offset), sources.data(), group.size_, length, scale);
    }

    Group& group;
    const void* in;
    void* out;
    size_t element, ranks, me;
    ReduceFn reduce;
    Scale scale;
    Cut cut;
    std::vector<const void*> sources;
};

Task Group::allreduce(Operation& operation, Call call, const void* in, void* out, DType dtype, Scale scale) {
    const Turn turn(*this);
    Allreduce work(*this, call, in, out, dtype, scale);
    const size_t bytes = call.count * work.element;
    if (bytes <= tuning_.one_shot_bytes) {
        Reached all(*this, arrive(call, in, bytes));
        co_await operation.until(all);
        check_calls();
        work.reduce_announced(call.count);
        co_return;
    }
    const uint64_t place = in == out ? place_of(in, bytes) : 0;
    const size_t rounds = work.cut.rounds;
    choose_slots(rounds);
    Step filled[2], reduced[2];
    for (size_t round = 0; round < rounds + 2; ++round) {
        if (round < rounds) {
            Reached free(*this, drained_[slot_index(round_ + round)]);
            co_await operation.until(free);
            enter(round_ + round, call.kind, work.cut.bytes(round));
            if (round > 0 || place == 0) work.copy_in(round);
            filled[round % 2] = round == 0 ? arrive(call, &place, sizeof(place)) : say(FILLED);
        }
        if (round > 0 && round <= rounds) {
            const size_t i = round - 1;
            Reached full(*this, filled[i % 2]);
            co_await operation.until(full);
            if (i == 0) {
                std::vector<const std::byte*> places;
                co_await settle(operation, place, places, [&] { work.copy_in(0); });
                if (!places.empty()) {
                    co_await allreduce_in_place(operation, work, places);
                    co_return;
                }
            }
            work.reduce_mine(i);
            reduced[i % 2] = say(REDUCED);
        }
        if (round > 1) {
            Reached ready(*this, reduced[round % 2]);
            co_await operation.until(ready);
            work.copy_out(round - 2);
            drained_[slot_index(round_ + round - 2)] = say(DRAINED);
        }
    }
    round_ += rounds;
}

Task Group::allreduce_in_place(Operation& operation, Allreduce& work, const std::vector<const std::byte*>& places) {
    Step reduced[2];
    for (size_t round = 0; round < work.cut.rounds + 1; ++round) {
        if (round < work.cut.rounds) {
            work.reduce_in_place(round, places);
            reduced[round % 2] = say(REDUCED);
        }
        if (round > 0) {
            Reached ready(*this, reduced[(round - 1) % 2]);
            co_await operation.until(ready);
            work.pull(round - 1, places);
        }
    }
    co_await release_all(operation);
}

}  // namespace pneumo
