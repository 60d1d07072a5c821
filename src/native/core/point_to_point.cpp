// Messages between two ranks: the sender posts a header, the receiver grants it when a receive matches, and the sender
// then passes the data in pieces. One message at a time is under way in a channel, in the order in which they were
// granted.

#include <algorithm>

#include "shared.hpp"

namespace pneumo {

/// A posted receive, and the message that was found for it.
struct Group::Receive {
    int from, tag;
    int source = -1;
    Channel::Header* header = nullptr;
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

/// A header in use: it belongs to its sender, who gives it back however the message ends.
struct Group::Posted {
    ~Posted() { header->state.store(Channel::Header::FREE, std::memory_order_release); }
    Channel::Header* header;
};

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
    Matched(Group& group, Group::Receive& receive, std::string text)
        : group(group), receive(receive), text(std::move(text)) {}
    bool ready() override {
        group.match_receives();
        return receive.header != nullptr;
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
        return receive.from >= 0 || gone == static_cast<size_t>(group.size() - 1);
    }

    Group& group;
    Group::Receive& receive;
    std::string text;
};

void Group::match_receives() {
    for (auto it = receives_.begin(); it != receives_.end();) {
        Receive& receive = **it;
        Channel::Header* oldest = nullptr;
        for (int from = 0; from < size_ && oldest == nullptr; ++from) {
            if (receive.from >= 0 && from != receive.from) continue;
            for (auto& header : channel(from, rank_).headers) {
                if (header.state.load(std::memory_order_acquire) != Channel::Header::POSTED) continue;
                if (header.tag != receive.tag || (oldest != nullptr && oldest->number < header.number)) continue;
                oldest = &header;
                receive.source = from;
            }
        }
        if (oldest == nullptr) {
            ++it;
            continue;
        }
        receive.header = oldest;
        oldest->state.store(Channel::Header::TAKEN, std::memory_order_relaxed);
        it = receives_.erase(it);
    }
}

Task Group::send(Operation& operation, const void* data, size_t bytes, int to, int tag) {
    throw_if_broken();
    Channel& out = channel(rank_, to);
    Doorbell& peer = *members_[static_cast<size_t>(to)].doorbell;
    const std::string text = message_text("sending", "to " + name({to}), tag, bytes);
    Channel::Header* header = nullptr;
    {
        const Queued turn(sends_[static_cast<size_t>(to)], &operation);  // headers are posted in the order of the calls
        PeerDid free(to, text, [&] {
            header = turn.first() ? out.find(Channel::Header::FREE) : nullptr;
            return header != nullptr;
        });
        co_await operation.until(free);
    }
    header->tag = tag;
    header->bytes = bytes;
    header->number = messages_++;
    header->state.store(Channel::Header::POSTED, std::memory_order_release);
    peer.ring();
    const Posted posted{header};
    uint32_t state = 0;
    const auto answered = [&] {
        state = header->state.load(std::memory_order_acquire);
        return state != Channel::Header::POSTED && state != Channel::Header::TAKEN;
    };
    PeerDid asked(to, text, answered, true);
    co_await operation.until(asked);
    if (state == Channel::Header::REFUSED) {
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
    throw_if_broken();
    Receive receive{from, tag};
    const Queued posted(receives_, &receive);
    const std::string text = message_text("receiving", from < 0 ? "from any rank" : "from " + name({from}), tag, bytes);
    Matched matched(*this, receive, text);
    co_await operation.until(matched);
    *source = receive.source;
    Channel& in = channel(receive.source, rank_);
    Doorbell& peer = *members_[static_cast<size_t>(receive.source)].doorbell;
    if (receive.header->bytes != bytes) {
        const size_t offered = receive.header->bytes;
        receive.header->state.store(Channel::Header::REFUSED, std::memory_order_release);
        peer.ring();
        throw Error(Error::Kind::MISMATCH, text + ": " + name({receive.source}) + " sends " + std::to_string(offered));
    }
    // One message at a time is under way in a channel.
    char& busy = receiving_[static_cast<size_t>(receive.source)];
    PeerDid turn(receive.source, text, [&] { return busy == 0; });
    co_await operation.until(turn);
    busy = 1;
    receive.header->state.store(Channel::Header::GRANTED, std::memory_order_release);
    peer.ring();
    for (size_t begin = 0; begin < bytes; begin += tuning_.channel_bytes) {
        const uint64_t piece = in.drained.load(std::memory_order_relaxed);
        PeerDid filled(receive.source, text, [&] { return in.filled.load(std::memory_order_acquire) > piece; });
        co_await operation.until(filled);
        std::memcpy(static_cast<std::byte*>(data) + begin, in.piece(piece, tuning_.channel_bytes),
                    std::min(tuning_.channel_bytes, bytes - begin));
        in.drained.store(piece + 1, std::memory_order_release);
        peer.ring();
    }
    busy = 0;
}

}  // namespace pneumo
