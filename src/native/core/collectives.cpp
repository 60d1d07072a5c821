// The collectives: each is one coroutine, in rounds of a chunk. ../README.md explains the protocol and the bytes that
// each moves.

#include <algorithm>

#include "cut.hpp"
#include "shared.hpp"

namespace pneumo {

template <class Fill, class Consume, class Direct>
Task Group::exchange(Operation& operation, const Call& call, const Cut& cut, int filler, Fill fill, Consume consume,
                     uint64_t place, Direct direct) {
    const bool fills = filler < 0 || filler == rank_;
    const auto fill_slot = [&](size_t round) {
        const StoreChoice::Watch watch(choice_, round_ + round);
        fill(round, my_slot(round_ + round));
    };
    std::vector<const std::byte*> places;
    choose_slots(cut.rounds);
    Step filled[2];
    for (size_t round = 0; round <= cut.rounds; ++round) {
        if (round < cut.rounds) {
            Reached free(*this, drained_[slot_index(round_ + round)]);
            co_await operation.until(free);
            enter(round_ + round, call.kind, cut.bytes(round));
            if (fills && (round > 0 || place == 0)) fill_slot(round);
            if (round > 0) {
                filled[round % 2] = open(FILLED, filler);
                if (fills) contribute(filled[round % 2]);
            }
        }
        if (round == 0) {
            // The arrival tells at once that the first slot is filled, or where the data lies.
            Reached all(*this, arrive(call, &place, sizeof(place)));
            co_await operation.until(all);
            co_await settle(operation, place, places, [&] { fill_slot(0); });
            if (!places.empty()) {
                direct(places);
                co_await release_all(operation);
                co_return;
            }
            continue;
        }
        if (round > 1) {
            Reached full(*this, filled[(round - 1) % 2]);
            co_await operation.until(full);
        }
        {
            const StoreChoice::Watch watch(choice_, round_ + round - 1);
            consume(round - 1, round_ + round - 1);
        }
        drained_[slot_index(round_ + round - 1)] = say(DRAINED);
    }
    round_ += cut.rounds;
}

template <class Fill, class Consume>
Task Group::exchange(Operation& operation, const Call& call, const Cut& cut, int filler, Fill fill, Consume consume) {
    const auto direct = [](const std::vector<const std::byte*>&) {};
    return exchange(operation, call, cut, filler, std::move(fill), std::move(consume), uint64_t{0}, direct);
}

Task Group::all_have(Operation& operation, Stage stage) {
    Reached all(*this, say(stage));
    co_await operation.until(all);
}

Task Group::release_all(Operation& operation) {
    co_await all_have(operation, DRAINED);
    check_given_up();
}

Task Group::reduce(Operation& operation, Call call, const void* in, void* out, DType dtype, Scale scale) {
    const Turn turn(*this);
    const size_t element = size_of(dtype);
    const ReduceFn reduce = find_reduce(dtype, call.op);
    const Cut cut(call.count, element, tuning_.chunk_bytes, 1);
    const bool root = call.root == rank_;
    std::vector<const void*> sources(static_cast<size_t>(size_));
    const auto fill = [&](size_t round, Slot mine) {
        if (!root) mine.put(0, at(in, cut.begin(round) * element), cut.bytes(round));
    };
    const auto consume = [&](size_t round, uint64_t number) {
        if (!root) return;
        for (int k = 0; k < size_; ++k) {
            sources[static_cast<size_t>(k)] = k == rank_ ? at(in, cut.begin(round) * element) : slot(k, number);
        }
        reduce(at(out, cut.begin(round) * element), sources.data(), size_, cut.size(round), scale);
    };
    co_await exchange(operation, call, cut, -1, fill, consume);
}

Task Group::reduce_scatter(Operation& operation, Call call, std::vector<const void*> in, void* out, DType dtype,
                           Scale scale) {
    const Turn turn(*this);
    const size_t element = size_of(dtype), ranks = static_cast<size_t>(size_), me = static_cast<size_t>(rank_);
    const ReduceFn reduce = find_reduce(dtype, call.op);
    const size_t share = tuning_.chunk_bytes / ranks / 64 * 64;  // of a slot, for each rank that reads it
    const Cut cut(call.count, element, share, 1);
    std::vector<const void*> sources(ranks);
    const auto fill = [&](size_t round, Slot mine) {
        for (size_t k = 0; k < ranks; ++k) {
            if (k != me) mine.put(k * share, at(in[k], cut.begin(round) * element), cut.bytes(round));
        }
    };
    const auto consume = [&](size_t round, uint64_t number) {
        for (size_t k = 0; k < ranks; ++k) {
            sources[k] =
                k == me ? at(in[me], cut.begin(round) * element) : slot(static_cast<int>(k), number) + me * share;
        }
        reduce(at(out, cut.begin(round) * element), sources.data(), size_, cut.size(round), scale);
    };
    const size_t bytes = call.count * element;
    const auto direct = [&](const std::vector<const std::byte*>& places) {
        for (size_t k = 0; k < ranks; ++k) sources[k] = places[k] + me * bytes;
        reduce(out, sources.data(), size_, call.count, scale);
    };
    bool whole = true;  // one tensor, cut into equal parts
    for (size_t k = 0; k < ranks; ++k) whole &= in[k] == at(in[0], k * bytes);
    const uint64_t place = whole ? place_of(in[0], ranks * bytes) : 0;
    co_await exchange(operation, call, cut, -1, fill, consume, place, direct);
}

Task Group::broadcast(Operation& operation, Call call, void* data, size_t bytes) {
    const Turn turn(*this);
    const bool root = call.root == rank_;
    if (bytes <= tuning_.one_shot_bytes) {
        Reached all(*this, arrive(call, data, root ? bytes : 0));
        co_await operation.until(all);
        check_calls();
        if (!root) transfer(data, announced(call.root), bytes);
        co_return;
    }
    const Cut cut(bytes, 1, tuning_.chunk_bytes, 1);
    const auto fill = [&](size_t round, Slot mine) { mine.put(0, at(data, cut.begin(round)), cut.size(round)); };
    const auto consume = [&](size_t round, uint64_t number) {
        if (!root) transfer(at(data, cut.begin(round)), slot(call.root, number), cut.size(round));
    };
    co_await exchange(operation, call, cut, call.root, fill, consume);
}

Task Group::allgather(Operation& operation, Call call, const void* in, std::vector<void*> out, size_t bytes) {
    const Turn turn(*this);
    if (bytes <= tuning_.one_shot_bytes) {
        Reached all(*this, arrive(call, in, bytes));
        co_await operation.until(all);
        check_calls();
        for (int k = 0; k < size_; ++k) transfer(out[static_cast<size_t>(k)], announced(k), bytes);
        co_return;
    }
    const Cut cut(bytes, 1, tuning_.chunk_bytes, 1);
    const auto fill = [&](size_t round, Slot mine) { mine.put(0, at(in, cut.begin(round)), cut.size(round)); };
    const auto consume = [&](size_t round, uint64_t number) {
        for (int k = 0; k < size_; ++k) {
            const void* from = k == rank_ ? at(in, cut.begin(round)) : slot(k, number);
            transfer(at(out[static_cast<size_t>(k)], cut.begin(round)), from, cut.size(round));
        }
    };
    const auto direct = [&](const std::vector<const std::byte*>& places) {
        for (size_t k = 0; k < out.size(); ++k) transfer(out[k], places[k], bytes);
    };
    co_await exchange(operation, call, cut, -1, fill, consume, place_of(in, bytes), direct);
}

Task Group::gather(Operation& operation, Call call, const void* in, std::vector<void*> out, size_t bytes) {
    const Turn turn(*this);
    const bool root = call.root == rank_;
    const Cut cut(bytes, 1, tuning_.chunk_bytes, 1);
    const auto fill = [&](size_t round, Slot mine) {
        if (!root) mine.put(0, at(in, cut.begin(round)), cut.size(round));
    };
    const auto consume = [&](size_t round, uint64_t number) {
        if (!root) return;
        for (int k = 0; k < size_; ++k) {
            const void* from = k == rank_ ? at(in, cut.begin(round)) : slot(k, number);
            transfer(at(out[static_cast<size_t>(k)], cut.begin(round)), from, cut.size(round));
        }
    };
    co_await exchange(operation, call, cut, -1, fill, consume);
}

Task Group::scatter(Operation& operation, Call call, std::vector<const void*> in, void* out, size_t bytes) {
    const Turn turn(*this);
    const bool root = call.root == rank_;
    const size_t ranks = static_cast<size_t>(size_), share = tuning_.chunk_bytes / ranks / 64 * 64;
    const Cut cut(bytes, 1, share, 1);
    const auto fill = [&](size_t round, Slot mine) {
        for (size_t k = 0; k < ranks; ++k) mine.put(k * share, at(in[k], cut.begin(round)), cut.size(round));
    };
    const auto consume = [&](size_t round, uint64_t number) {
        const std::byte* from = slot(call.root, number) + static_cast<size_t>(rank_) * share;
        transfer(at(out, cut.begin(round)), root ? at(in[static_cast<size_t>(rank_)], cut.begin(round)) : from,
                 cut.size(round));
    };
    co_await exchange(operation, call, cut, call.root, fill, consume);
}

Task Group::alltoall(Operation& operation, Call call, std::vector<const void*> in, std::vector<size_t> in_bytes,
                     std::vector<void*> out, std::vector<size_t> out_bytes) {
    const Turn turn(*this);
    const size_t ranks = static_cast<size_t>(size_), me = static_cast<size_t>(rank_);
    const size_t share = tuning_.chunk_bytes / ranks / 64 * 64;
    // Everybody tells what it sends to whom, and what it expects: the number of rounds follows from the largest
    // message.
    std::vector<size_t> plans(ranks * 2 * ranks);
    std::copy(in_bytes.begin(), in_bytes.end(), plans.begin());
    std::copy(out_bytes.begin(), out_bytes.end(), plans.begin() + size_);
    Reached all(*this, arrive(call, plans.data(), 2 * ranks * sizeof(size_t)));
    co_await operation.until(all);
    check_calls();
    for (size_t k = 0; k < ranks; ++k) {
        std::memcpy(&plans[k * 2 * ranks], announced(static_cast<int>(k)), 2 * ranks * sizeof(size_t));
    }
    size_t largest = 0;
    for (size_t from = 0; from < ranks; ++from) {
        for (size_t to = 0; to < ranks; ++to) {
            const size_t sends = plans[from * 2 * ranks + to], expects = plans[to * 2 * ranks + ranks + from];
            largest = std::max(largest, sends);
            if (sends == expects) continue;
            fail(Error::Kind::MISMATCH, call.text() + ": " + name({static_cast<int>(from)}) + " sends " +
                                            std::to_string(sends) + " bytes to " + name({static_cast<int>(to)}) +
                                            ", which expects " + std::to_string(expects));
        }
    }
    const Cut cut(largest, 1, share, 1);
    const auto length = [&](size_t round, size_t bytes) {
        return cut.begin(round) < bytes ? std::min(cut.size(round), bytes - cut.begin(round)) : 0;
    };
    const auto fill = [&](size_t round, Slot mine) {
        for (size_t k = 0; k < ranks; ++k) {
            if (k != me) mine.put(k * share, at(in[k], cut.begin(round)), length(round, in_bytes[k]));
        }
    };
    const auto consume = [&](size_t round, uint64_t number) {
        for (size_t k = 0; k < ranks; ++k) {
            const void* from = k == me ? at(in[me], cut.begin(round)) : slot(static_cast<int>(k), number) + me * share;
            transfer(at(out[k], cut.begin(round)), from, length(round, out_bytes[k]));
        }
    };
    if (cut.rounds == 0) co_return;
    ++sequence_;
    co_await exchange(operation, call, cut, -1, fill, consume);
}

Task Group::barrier(Operation& operation, Call call) {
    const Turn turn(*this);
    Reached all(*this, arrive(call, nullptr, 0));
    co_await operation.until(all);
    check_calls();
}

}  // namespace pneumo
