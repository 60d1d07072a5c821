// Messages between two ranks: the sender offers one, the receiver grants it when a receive matches, and the sender then
// passes the data in pieces. One message at a time is under way in a channel, in the order in which they were granted.

#include <algorithm>
#include <utility>

#include "shared.hpp"
#include "wire.hpp"

namespace pneumo {

/// A posted receive, and the message that was found for it.
struct Group::Receive {
    int from, tag;
    int source = -1;
    uint64_t number = 0, bytes = 0;  // of the message, once there is a source
};

namespace {

std::string message_text(const char* verb, const std::string& peer, int tag, size_t bytes) {
    return std::string(verb) + " " + std::to_string(bytes) + " bytes " + peer + " (tag " + std::to_string(tag) + ")";
}

/// A place in a list for as long as this lives, however it ends.
template <class T>
struct Queued {
    explicit Queued(std::list<T*>& list, T* item) : list(list), item(item) { list.push_back(item); }
    ~Queued() { list.remove(item); }
    Queued(const Queued&) = delete;
    Queued& operator=(const Queued&) = delete;
    bool first() const { return list.front() == item; }

    std::list<T*>& list;
    T* item;
};

}  // namespace

/// Waits for something that one peer does to a channel.
struct PeerDid final : Waiting {
    PeerDid(int peer, std::string text, std::function<bool()> test, bool arrival = false)
        : peer(peer), text(std::move(text)), test(std::move(test)), arrival(arrival) {}
    bool ready() override { return test(); }
    bool for_arrival() const override { return arrival; }
    std::vector<int> missing() const override { return {peer}; }
    std::string what() const override { return text; }

    int peer;
    std::string text;
    std::function<bool()> test;
    bool arrival;
};

/// Waits for a message that a receive can take.
struct Matched final : Waiting {
    Matched(Group& group, Group::Receive& receive, std::string text, const std::function<bool()>& elsewhere)
        : group(group), receive(receive), text(std::move(text)), elsewhere(elsewhere) {}
    bool ready() override {
        if (receive.source < 0) group.match_receives();
        return receive.source >= 0 || (elsewhere && elsewhere());
    }
    bool for_arrival() const override { return true; }
    std::string what() const override { return text; }
    std::vector<int> missing() const override {
        if (receive.from >= 0) return {receive.from};
        std::vector<int> ranks;
        for (int rank = 0; rank < group.size(); ++rank) {
            if (rank != group.rank()) ranks.push_back(rank);
        }
        return ranks;
    }
    bool in_vain_without(size_t gone) const override {
        return receive.from >= 0 || (!elsewhere && gone == static_cast<size_t>(group.size() - 1));
    }
    std::chrono::microseconds look_again() const override {
        return elsewhere ? kWirePoll : std::chrono::microseconds(0);
    }

    Group& group;
    Group::Receive& receive;
    std::string text;
    const std::function<bool()>& elsewhere;
};

void Group::read_offers(int from) {
    Channel& in = channel(from, rank_);
    Pair& pair = pairs_[static_cast<size_t>(from)];
    const uint64_t before = in.offers.taken.load(std::memory_order_relaxed);
    while (!in.offers.empty()) {
        const auto [bytes, tag] = in.offers.pop();
        pair.offers[tag].push_back({pair.offered++, bytes});
        matchable_ = true;
    }
    if (in.offers.held_up(before)) members_[static_cast<size_t>(from)].doorbell->ring();
}

void Group::read_answers(int to) {
    Channel& out = channel(rank_, to);
    const uint64_t before = out.answers.taken.load(std::memory_order_relaxed);
    while (!out.answers.empty()) {
        const auto [number, granted] = out.answers.pop();
        pairs_[static_cast<size_t>(to)].answers[number] = granted;
    }
    if (out.answers.held_up(before)) members_[static_cast<size_t>(to)].doorbell->ring();
}

void Group::match_receives() {
    for (int from = 0; from < size_; ++from) read_offers(from);
    if (!std::exchange(matchable_, false)) return;
    receives_.remove_if([this](Receive* receive) {
        match(*receive);
        return receive->source >= 0;
    });
}

void Group::match(Receive& receive) {
    for (int from = 0; from < size_; ++from) {
        if (receive.from >= 0 && from != receive.from) continue;
        auto& offers = pairs_[static_cast<size_t>(from)].offers;
        const auto same_tag = offers.find(receive.tag);
        if (same_tag == offers.end()) continue;
        const auto oldest = same_tag->second.front();
        same_tag->second.pop_front();
        if (same_tag->second.empty()) offers.erase(same_tag);
        receive.source = from, receive.number = oldest.number, receive.bytes = oldest.bytes;
        return;
    }
}

Task Group::send(Operation& operation, const void* data, size_t bytes, int to, int tag) {
    throw_if_broken();
    Channel& out = channel(rank_, to);
    Pair& pair = pairs_[static_cast<size_t>(to)];
    Doorbell& peer = *members_[static_cast<size_t>(to)].doorbell;
    const std::string text = message_text("sending", "to " + name({to}), tag, bytes);
    {
        const Queued turn(pair.sends, &operation);  // offers are made in the order of the calls
        PeerDid room(to, text, [&] { return turn.first() && !out.offers.full(); });
        co_await operation.until(room);
    }
    const uint64_t number = pair.sent++;
    out.offers.push({bytes, tag});
    peer.ring();
    const auto answered = [&] {
        read_answers(to);
        return pair.answers.count(number) > 0;
    };
    PeerDid asked(to, text, answered, true);
    co_await operation.until(asked);
    if (!pair.answers.extract(number).mapped()) {
        throw Error(Error::Kind::MISMATCH, text + ": the receiver expects another size");
    }
    for (size_t begin = 0; begin < bytes; begin += tuning_.channel_bytes) {
        const uint64_t piece = out.filled.load(std::memory_order_relaxed);
        PeerDid room(to, text, [&] { return piece - out.drained.load(std::memory_order_acquire) < Layout::kPieces; });
        co_await operation.until(room);
        std::memcpy(out.piece(piece, tuning_.channel_bytes), static_cast<const std::byte*>(data) + begin,
                    std::min(tuning_.channel_bytes, bytes - begin));
        out.filled.store(piece + 1, std::memory_order_release);
        peer.ring();
    }
}

Task Group::receive(Operation& operation, void* data, size_t bytes, int from, int tag, int* source) {
    return receive_unless(operation, data, bytes, from, tag, source, nullptr);
}

Task Group::receive_unless(Operation& operation, void* data, size_t bytes, int from, int tag, int* source,
                           std::function<bool()> elsewhere) {
    throw_if_broken();
    Receive receive{from, tag};
    const Queued posted(receives_, &receive);
    matchable_ = true;
    const std::string text = message_text("receiving", from < 0 ? "from any rank" : "from " + name({from}), tag, bytes);
    Matched matched(*this, receive, text, elsewhere);
    co_await operation.until(matched);
    *source = receive.source;
    if (receive.source < 0) co_return;
    Channel& in = channel(receive.source, rank_);
    Pair& pair = pairs_[static_cast<size_t>(receive.source)];
    Doorbell& peer = *members_[static_cast<size_t>(receive.source)].doorbell;
    const bool fits = receive.bytes == bytes;
    // One message at a time is under way in a channel.
    PeerDid turn(receive.source, text, [&] { return !(fits && pair.receiving) && !in.answers.full(); });
    co_await operation.until(turn);
    in.answers.push({receive.number, fits});
    peer.ring();
    if (!fits) {
        throw Error(Error::Kind::MISMATCH,
                    text + ": " + name({receive.source}) + " sends " + std::to_string(receive.bytes));
    }
    pair.receiving = true;
    for (size_t begin = 0; begin < bytes; begin += tuning_.channel_bytes) {
        const uint64_t piece = in.drained.load(std::memory_order_relaxed);
        PeerDid filled(receive.source, text, [&] { return in.filled.load(std::memory_order_acquire) > piece; });
        co_await operation.until(filled);
        std::memcpy(static_cast<std::byte*>(data) + begin, in.piece(piece, tuning_.channel_bytes),
                    std::min(tuning_.channel_bytes, bytes - begin));
        in.drained.store(piece + 1, std::memory_order_release);
        peer.ring();
    }
    pair.receiving = false;
}

}  // namespace pneumo
