#include "cluster.hpp"

#include <algorithm>
#include <mutex>
#include <set>

namespace pneumo {
namespace {

constexpr size_t kMessage = 64 << 20;  // longer ones are passed in pieces
constexpr size_t kSmall = 64 << 10;    // up to here the first ranks exchange whole partial results
// Tags on the wire: collectives are in order, users' own begin at the last.
constexpr int kCollective = 0, kBroken = 1, kUser = 2;
constexpr size_t kKeptScratch = 32 << 20;
// What somebody did before it gave up may still be on its way.
constexpr std::chrono::seconds kGrace{1};

std::mutex living_mutex;
std::set<Cluster*> living;  // those that this rank has not left

/// One message under way, and the rank at its other end as users know it.
struct Exchanged {
    std::unique_ptr<Wire::Request> request;
    int name;
};

std::string ranks(const std::vector<Exchanged>& messages) {
    std::set<int> names;
    for (const auto& message : messages) names.insert(message.name);
    std::string text;
    for (const int name : names) text += (text.empty() ? "" : ", ") + std::to_string(name);
    return (names.size() == 1 ? "rank " : "ranks ") + text;
}

/// Waits for messages on the wire, which nobody rings for.
struct Passed final : Waiting {
    Passed(std::vector<Exchanged>& messages, const std::string& doing) : messages(messages), doing(doing) {}
    bool ready() override {
        while (!messages.empty() && messages.back().request->done()) messages.pop_back();
        return messages.empty();
    }
    std::chrono::microseconds look_again() const override { return kWirePoll; }
    std::string what() const override { return doing + ", an exchange with " + ranks(messages) + " on other nodes,"; }

    std::vector<Exchanged>& messages;
    const std::string& doing;
};

/// Waits for a message from a rank on another node to come.
struct Came final : Waiting {
    Came(Wire& wire, int from, int tag, std::string who) : wire(wire), from(from), tag(tag), who(std::move(who)) {}
    bool ready() override {
        if (!found) found = wire.find(tag, from);
        return found != nullptr;
    }
    std::chrono::microseconds look_again() const override { return kWirePoll; }
    std::string what() const override { return "recv from " + who + " on another node"; }

    Wire& wire;
    int from, tag;
    std::string who;
    std::unique_ptr<Wire::Found> found;
};

}  // namespace

Cluster::Cluster(std::shared_ptr<Group> local, std::unique_ptr<Wire> wire, int rank,
                 std::vector<std::vector<int>> nodes, std::vector<int> names)
    : local_(std::move(local)),
      wire_(std::move(wire)),
      rank_(rank),
      nodes_(std::move(nodes)),
      names_(std::move(names)),
      last_tag_(wire_->last_tag() - kUser) {
    node_of_.resize(names_.size());
    place_of_.resize(names_.size());
    for (size_t k = 0; k < nodes_.size(); ++k) {
        uniform_ &= nodes_[k].size() == nodes_[0].size();
        for (size_t place = 0; place < nodes_[k].size(); ++place) {
            const auto member = static_cast<size_t>(nodes_[k][place]);
            node_of_[member] = static_cast<int>(k);
            place_of_[member] = static_cast<int>(place);
        }
    }
    node_ = node_of_[static_cast<size_t>(rank)];
    local_->on_break = [this](const std::string& reason) { tell(reason); };
    std::lock_guard lock(living_mutex);
    living.insert(this);
}

Cluster::~Cluster() { forget(); }

void Cluster::forget() {
    std::lock_guard lock(living_mutex);
    living.erase(this);
}

void Cluster::leave() {
    forget();
    local_->leave();
}

void Cluster::abort_all(const std::string& reason) {
    std::lock_guard lock(living_mutex);
    for (auto* cluster : living) cluster->abort(reason);
}

std::shared_ptr<Operation> Cluster::operation(Operation::Body body, std::chrono::milliseconds timeout, Lane* lane) {
    auto operation = local_->operation(std::move(body), timeout, lane);
    operation->examine = [this, local = std::move(operation->examine), late_at = Clock::time_point::max()](
                             Waiting& waiting, bool late, bool deep) mutable {
        try {
            hear();
        } catch (...) {
            return std::current_exception();
        }
        // Who waits for another node lets that node speak first: it knows which of its ranks is missing.
        if (late) late_at = std::min(late_at, Clock::now());
        const bool alone = waiting.missing().empty() && local_->broken().empty();
        return local(waiting, late && (!alone || Clock::now() - late_at >= 2 * kGrace), deep);
    };
    return operation;
}

void Cluster::tell(const std::string& reason) {
    last_words_ = name(rank_) + " gave up: " + reason;
    for (int rank = 0; rank < static_cast<int>(names_.size()); ++rank) {
        if (here(rank)) continue;
        last_requests_.push_back(wire_->send(last_words_.data(), last_words_.size(), rank, kBroken));
    }
}

void Cluster::hear() {
    if (heard_.empty()) {
        const auto found = wire_->find(kBroken);
        if (!found) return;
        heard_.resize(found->bytes());
        hearing_ = found->receive(heard_.data());
        heard_at_ = Clock::now();
    }
    if (hearing_ && hearing_->done()) hearing_.reset();
    if (!hearing_ && Clock::now() - heard_at_ >= kGrace) local_->abort(heard_);
}

std::string Cluster::name(int rank) const { return "rank " + std::to_string(names_[static_cast<size_t>(rank)]); }

std::vector<int> Cluster::peers(size_t place) const {
    std::vector<int> ranks;
    for (const auto& node : nodes_) ranks.push_back(node[place]);
    return ranks;
}

Cluster::Scratch Cluster::scratch(size_t bytes) {
    if (bytes > kKeptScratch) {
        std::unique_ptr<std::byte[]> large(new std::byte[bytes]);
        std::byte* data = large.get();
        return {std::move(large), data};
    }
    if (bytes > scratch_bytes_) {
        scratch_.reset(new std::byte[bytes]);
        scratch_bytes_ = bytes;
    }
    return {nullptr, scratch_.get()};
}

Call Cluster::local_call(Kind kind, size_t count, const Call& like) const {
    Call call = like;
    call.kind = kind;
    call.root = -1;
    call.count = count;
    return call;
}

Task Cluster::pass(Operation& operation, std::vector<Message> messages) {
    std::vector<Exchanged> under_way;
    for (const auto& message : messages) {
        for (size_t begin = 0; begin < message.bytes || begin == 0; begin += kMessage) {
            const size_t bytes = std::min(kMessage, message.bytes - begin);
            auto* at = static_cast<std::byte*>(const_cast<void*>(message.data)) + begin;
            const bool gives = message.way == Message::TO;
            auto request = gives ? wire_->send(at, bytes, message.peer, kCollective)
                                 : wire_->receive(at, bytes, message.peer, kCollective);
            under_way.push_back({std::move(request), names_[static_cast<size_t>(message.peer)]});
        }
    }
    Passed passed(under_way, doing_);
    co_await operation.until(passed);
}

Task Cluster::give(Operation& operation, int to, const void* data, size_t bytes) {
    return pass(operation, {{Message::TO, to, data, bytes}});
}

Task Cluster::take(Operation& operation, int from, void* data, size_t bytes) {
    return pass(operation, {{Message::FROM, from, data, bytes}});
}

Task Cluster::pass(Operation& operation, int to, const void* data, size_t bytes, int from, void* room,
                   size_t room_bytes) {
    return pass(operation, {{Message::TO, to, data, bytes}, {Message::FROM, from, room, room_bytes}});
}

Task Cluster::agree(Operation& operation, const Call& call) {
    doing_ = call.text() + " (collective " + std::to_string(++sequence_) + " of its group)";
    co_await local_->barrier(operation, call);
    std::array<char, 512> verdict{};
    const auto first = peers(0);
    if (rank_ == mine()[0]) {
        std::vector<Call> calls(first.size(), call);
        std::vector<Message> messages;
        for (size_t k = 0; k < first.size(); ++k) {
            if (static_cast<int>(k) == node_) continue;
            messages.push_back({Message::FROM, first[k], &calls[k], sizeof(Call)});
            messages.push_back({Message::TO, first[k], &call, sizeof(Call)});
        }
        co_await pass(operation, std::move(messages));
        std::string text;
        for (size_t k = 0; k < first.size(); ++k) {
            text += (k > 0 ? "; " : "") + std::string("the node of rank ") +
                    std::to_string(names_[static_cast<size_t>(first[k])]) + " calls " + calls[k].text();
        }
        const bool same = std::all_of(calls.begin(), calls.end(), [&](const Call& other) { return other == call; });
        if (!same) text.copy(verdict.data(), verdict.size() - 1);
    }
    Call tell;
    tell.kind = Kind::BROADCAST;
    tell.root = 0;
    co_await local_->broadcast(operation, tell, verdict.data(), verdict.size());
    if (verdict[0] == 0) co_return;
    const std::string message = std::string("the nodes disagree about a collective: ") + verdict.data();
    abort(message);
    throw Error(Error::Kind::MISMATCH, message);
}

Task Cluster::ring(Operation& operation, const std::vector<int>& peers, std::byte* data, size_t count, DType dtype,
                   Op op, Scale scale) {
    const size_t nodes = peers.size(), me = static_cast<size_t>(node_), element = size_of(dtype);
    const ReduceFn reduce = find_reduce(dtype, op);
    const auto begin = [&](size_t segment) { return count * segment / nodes; };
    const auto bytes = [&](size_t segment) { return (begin(segment + 1) - begin(segment)) * element; };
    const auto place = [&](size_t segment) { return data + begin(segment) * element; };
    const int next = peers[(me + 1) % nodes], previous = peers[(me + nodes - 1) % nodes];
    std::vector<std::byte> arrived(bytes(0) + 2 * element);
    for (size_t step = 0; step + 1 < nodes; ++step) {  // each segment travels once around and gathers the nodes' parts
        const size_t gives = (me + nodes - step) % nodes, takes = (me + 2 * nodes - step - 1) % nodes;
        co_await pass(operation, next, place(gives), bytes(gives), previous, arrived.data(), bytes(takes));
        const void* sources[] = {arrived.data(), place(takes)};
        const bool last = step + 2 == nodes;
        if (bytes(takes) > 0) reduce(place(takes), sources, 2, bytes(takes) / element, last ? scale : Scale{});
    }
    for (size_t step = 0; step + 1 < nodes; ++step) {  // and once more, finished
        const size_t gives = (me + 1 + nodes - step) % nodes, takes = (me + nodes - step) % nodes;
        co_await pass(operation, next, place(gives), bytes(gives), previous, place(takes), bytes(takes));
    }
}

Task Cluster::allreduce(Operation& operation, Call call, const void* in, void* out, DType dtype, Scale scale) {
    co_await agree(operation, call);
    const size_t count = call.count, element = size_of(dtype), ranks = mine().size();
    if (count == 0) co_return;
    const Scale first{scale.before, 1.0}, last{1.0, scale.after};
    if (!uniform_ || count * element <= kSmall) {
        // The first ranks combine the nodes' sums; everybody else waits for theirs.
        Call partial = local_call(Kind::REDUCE, count, call), result = local_call(Kind::BROADCAST, count, call);
        partial.root = result.root = 0;
        const Scratch room = scratch(count * element);
        std::byte* sum = room.data;
        co_await local_->reduce(operation, partial, in, sum, dtype, first);
        if (rank_ == mine()[0]) co_await ring(operation, peers(0), sum, count, dtype, call.op, last);
        co_await local_->broadcast(operation, result, sum, count * element);
        std::memcpy(out, sum, count * element);
        co_return;
    }
    // Shares of equal size; the last one overlaps the one before where they do not divide the whole.
    const size_t share = (count + ranks - 1) / ranks;
    const auto begin = [&](size_t k) { return std::min(k * share, count - share) * element; };
    std::vector<const void*> from;
    std::vector<void*> to;
    for (size_t k = 0; k < ranks; ++k) {
        from.push_back(static_cast<const std::byte*>(in) + begin(k));
        to.push_back(static_cast<std::byte*>(out) + begin(k));
    }
    const Scratch room = scratch(share * element);
    std::byte* sum = room.data;
    co_await local_->reduce_scatter(operation, local_call(Kind::REDUCE_SCATTER, share, call), std::move(from), sum,
                                    dtype, first);
    co_await ring(operation, peers(static_cast<size_t>(place_of(rank_))), sum, share, dtype, call.op, last);
    co_await local_->allgather(operation, local_call(Kind::ALLGATHER, share, call), sum, std::move(to),
                               share * element);
}

Task Cluster::reduce(Operation& operation, Call call, const void* in, void* out, DType dtype, Scale scale) {
    co_await agree(operation, call);
    const size_t count = call.count, bytes = count * size_of(dtype);
    if (count == 0) co_return;
    const Scale first{scale.before, 1.0}, last{1.0, scale.after};
    Call partial = local_call(Kind::REDUCE, count, call);
    partial.root = 0;
    const Scratch room = scratch(bytes);
    std::byte* sum = room.data;
    co_await local_->reduce(operation, partial, in, sum, dtype, first);
    if (rank_ == mine()[0]) co_await ring(operation, peers(0), sum, count, dtype, call.op, last);
    const int speaker = nodes_[static_cast<size_t>(node_of_[static_cast<size_t>(call.root)])][0];
    if (speaker != call.root && rank_ == speaker) co_await give(operation, call.root, sum, bytes);
    if (speaker != call.root && rank_ == call.root) co_await take(operation, speaker, sum, bytes);
    if (rank_ == call.root) std::memcpy(out, sum, bytes);
}

Task Cluster::broadcast(Operation& operation, Call call, void* data, size_t bytes) {
    co_await agree(operation, call);
    const int source = node_of_[static_cast<size_t>(call.root)], nodes = static_cast<int>(nodes_.size());
    const int speaker = node_ == source ? call.root : mine()[0];
    if (rank_ == speaker && bytes > 0) {  // a binomial tree over the nodes, counted from the root's
        const int me = (node_ - source + nodes) % nodes;
        const auto speaker_of = [&](int node) {
            const int number = (node + source) % nodes;
            return number == source ? call.root : nodes_[static_cast<size_t>(number)][0];
        };
        int bit = 1;
        while (bit <= me) bit *= 2;
        if (me > 0) co_await take(operation, speaker_of(me - bit / 2), data, bytes);
        for (; me + bit < nodes; bit *= 2) co_await give(operation, speaker_of(me + bit), data, bytes);
    }
    Call within = local_call(Kind::BROADCAST, call.count, call);
    within.root = place_of(speaker);
    co_await local_->broadcast(operation, within, data, bytes);
}

Task Cluster::allgather(Operation& operation, Call call, const void* in, std::vector<void*> out, size_t bytes) {
    co_await agree(operation, call);
    std::vector<void*> here;
    for (const int rank : mine()) here.push_back(out[static_cast<size_t>(rank)]);
    if (!uniform_) {
        std::vector<Message> messages;
        for (int rank = 0; rank < static_cast<int>(out.size()); ++rank) {
            if (this->here(rank)) continue;
            messages.push_back({Message::FROM, rank, out[static_cast<size_t>(rank)], bytes});
            messages.push_back({Message::TO, rank, in, bytes});
        }
        co_await pass(operation, std::move(messages));
        co_await local_->allgather(operation, local_call(Kind::ALLGATHER, call.count, call), in, std::move(here),
                                   bytes);
        co_return;
    }
    // Everybody collects from its place on the other nodes, and tells its own node.
    const size_t nodes = nodes_.size(), ranks = mine().size();
    const auto across = peers(static_cast<size_t>(place_of(rank_)));
    const Scratch room = scratch(nodes * bytes * (ranks + 1));
    std::byte* column = room.data;
    std::vector<Message> messages;
    for (size_t k = 0; k < nodes; ++k) {
        if (static_cast<int>(k) == node_) {
            if (bytes > 0) std::memcpy(column + k * bytes, in, bytes);
            continue;
        }
        messages.push_back({Message::FROM, across[k], column + k * bytes, bytes});
        messages.push_back({Message::TO, across[k], in, bytes});
    }
    co_await pass(operation, std::move(messages));
    std::vector<void*> columns;
    for (size_t place = 0; place < ranks; ++place) columns.push_back(column + (place + 1) * nodes * bytes);
    co_await local_->allgather(operation, local_call(Kind::ALLGATHER, call.count * nodes, call), column, columns,
                               nodes * bytes);
    for (size_t k = 0; k < nodes; ++k) {
        for (size_t place = 0; place < ranks && bytes > 0; ++place) {
            std::memcpy(out[static_cast<size_t>(nodes_[k][place])], static_cast<std::byte*>(columns[place]) + k * bytes,
                        bytes);
        }
    }
}

Task Cluster::reduce_scatter(Operation& operation, Call call, std::vector<const void*> in, void* out, DType dtype,
                             Scale scale) {
    co_await agree(operation, call);
    const size_t bytes = call.count * size_of(dtype), nodes = nodes_.size();
    if (bytes == 0) co_return;
    const Scale first{scale.before, 1.0}, last{1.0, scale.after};
    // For each node's ranks in turn, this node sums what it has for them; the sum for rank r lies with the rank of its
    // place.
    const Scratch room = scratch((nodes + in.size()) * bytes);
    std::byte* sums = room.data;
    std::byte* arrived = sums + nodes * bytes;
    std::vector<const void*> sources(nodes);
    std::vector<Message> messages;
    for (size_t k = 0; k < nodes && uniform_; ++k) {
        std::vector<const void*> for_node;
        for (const int rank : nodes_[k]) for_node.push_back(in[static_cast<size_t>(rank)]);
        co_await local_->reduce_scatter(operation, local_call(Kind::REDUCE_SCATTER, call.count, call),
                                        std::move(for_node), sums + k * bytes, dtype, first);
        const int peer = nodes_[k][static_cast<size_t>(place_of(rank_))];
        sources[k] = sums + k * bytes;
        if (static_cast<int>(k) == node_) continue;
        sources[k] = arrived + k * bytes;
        messages.push_back({Message::TO, peer, sums + k * bytes, bytes});
        messages.push_back({Message::FROM, peer, arrived + k * bytes, bytes});
    }
    if (!uniform_) {
        std::vector<const void*> for_node;
        for (const int rank : mine()) for_node.push_back(in[static_cast<size_t>(rank)]);
        co_await local_->reduce_scatter(operation, local_call(Kind::REDUCE_SCATTER, call.count, call),
                                        std::move(for_node), sums, dtype, first);
        sources.assign(1, sums);
        for (size_t rank = 0; rank < in.size(); ++rank) {
            if (here(static_cast<int>(rank))) continue;
            messages.push_back({Message::TO, static_cast<int>(rank), in[rank], bytes});
            messages.push_back({Message::FROM, static_cast<int>(rank), arrived + rank * bytes, bytes});
        }
    }
    co_await pass(operation, std::move(messages));
    const ReduceFn reduce = find_reduce(dtype, call.op);
    if (!uniform_) {  // what came from other nodes is not scaled yet
        for (size_t rank = 0; rank < in.size(); ++rank) {
            if (here(static_cast<int>(rank))) continue;
            const void* one = arrived + rank * bytes;
            reduce(arrived + rank * bytes, &one, 1, call.count, first);
            sources.push_back(one);
        }
    }
    reduce(out, sources.data(), static_cast<int>(sources.size()), call.count, last);
}

Task Cluster::gather(Operation& operation, Call call, const void* in, std::vector<void*> out, size_t bytes) {
    co_await agree(operation, call);
    if (!here(call.root)) {
        co_await give(operation, call.root, in, bytes);
        co_return;
    }
    std::vector<void*> near;
    std::vector<Message> messages;
    for (int rank = 0; rank < static_cast<int>(out.size()); ++rank) {
        if (here(rank)) {
            near.push_back(out[static_cast<size_t>(rank)]);
        } else {
            messages.push_back({Message::FROM, rank, out[static_cast<size_t>(rank)], bytes});
        }
    }
    co_await pass(operation, std::move(messages));
    Call within = local_call(Kind::GATHER, call.count, call);
    within.root = place_of(call.root);
    co_await local_->gather(operation, within, in, std::move(near), bytes);
}

Task Cluster::scatter(Operation& operation, Call call, std::vector<const void*> in, void* out, size_t bytes) {
    co_await agree(operation, call);
    if (!here(call.root)) {
        co_await take(operation, call.root, out, bytes);
        co_return;
    }
    std::vector<const void*> near;
    std::vector<Message> messages;
    for (int rank = 0; rank < static_cast<int>(in.size()); ++rank) {
        if (here(rank)) {
            near.push_back(in[static_cast<size_t>(rank)]);
        } else {
            messages.push_back({Message::TO, rank, in[static_cast<size_t>(rank)], bytes});
        }
    }
    co_await pass(operation, std::move(messages));
    Call within = local_call(Kind::SCATTER, call.count, call);
    within.root = place_of(call.root);
    co_await local_->scatter(operation, within, std::move(near), out, bytes);
}

Task Cluster::alltoall(Operation& operation, Call call, std::vector<const void*> in, std::vector<size_t> in_bytes,
                       std::vector<void*> out, std::vector<size_t> out_bytes) {
    co_await agree(operation, call);
    // First everybody tells what it sends: a message of another length than its room could not be named any more.
    std::vector<Message> messages;
    std::vector<size_t> announced(in.size());
    for (size_t rank = 0; rank < in.size(); ++rank) {
        if (here(static_cast<int>(rank))) continue;
        messages.push_back({Message::TO, static_cast<int>(rank), &in_bytes[rank], sizeof(size_t)});
        messages.push_back({Message::FROM, static_cast<int>(rank), &announced[rank], sizeof(size_t)});
    }
    co_await pass(operation, std::move(messages));
    for (size_t rank = 0; rank < in.size(); ++rank) {
        if (here(static_cast<int>(rank)) || announced[rank] == out_bytes[rank]) continue;
        const std::string message = doing_ + ": " + name(static_cast<int>(rank)) + " sends " +
                                    std::to_string(announced[rank]) + " bytes to " + name(rank_) + ", which expects " +
                                    std::to_string(out_bytes[rank]);
        abort(message);
        throw Error(Error::Kind::MISMATCH, message);
    }
    messages.clear();
    std::vector<const void*> from;
    std::vector<void*> to;
    std::vector<size_t> from_bytes, to_bytes;
    for (size_t rank = 0; rank < in.size(); ++rank) {
        const int peer = static_cast<int>(rank);
        if (here(peer)) {
            from.push_back(in[rank]), from_bytes.push_back(in_bytes[rank]);
            to.push_back(out[rank]), to_bytes.push_back(out_bytes[rank]);
        } else {
            messages.push_back({Message::TO, peer, in[rank], in_bytes[rank]});
            messages.push_back({Message::FROM, peer, out[rank], out_bytes[rank]});
        }
    }
    co_await pass(operation, std::move(messages));
    co_await local_->alltoall(operation, local_call(Kind::ALLTOALL, 0, call), std::move(from), std::move(from_bytes),
                              std::move(to), std::move(to_bytes));
}

Task Cluster::barrier(Operation& operation, Call call) { co_await agree(operation, call); }

Task Cluster::send(Operation& operation, const void* data, size_t bytes, int to, int tag) {
    if (here(to)) {
        co_await local_->send(operation, data, bytes, place_of(to), tag);
        co_return;
    }
    const std::string doing = "send to " + name(to);
    std::vector<Exchanged> under_way;
    under_way.push_back({wire_->send(data, bytes, to, kUser + tag), names_[static_cast<size_t>(to)]});
    Passed passed(under_way, doing);
    co_await operation.until(passed);
}

Task Cluster::receive(Operation& operation, void* data, size_t bytes, int from, int tag, int* source) {
    std::unique_ptr<Wire::Found> found;
    const auto elsewhere = [&] {
        if (!found) found = wire_->find(kUser + tag);
        return found != nullptr;
    };
    if (from < 0) {
        int place = -1;
        co_await local_->receive_unless(operation, data, bytes, -1, tag, &place, elsewhere);
        if (place >= 0) {
            *source = mine()[static_cast<size_t>(place)];
            co_return;
        }
        from = found->source();
    } else if (here(from)) {
        int place = 0;
        co_await local_->receive(operation, data, bytes, place_of(from), tag, &place);
        *source = from;
        co_return;
    } else {
        Came came(*wire_, from, kUser + tag, name(from));
        co_await operation.until(came);
        found = std::move(came.found);
    }
    *source = from;
    // What is too long or too short is received too, and thrown away: nobody else will get it.
    std::vector<std::byte> unwanted(found->bytes() == bytes ? 0 : found->bytes());
    const std::string doing = "recv from " + name(from);
    std::vector<Exchanged> under_way;
    under_way.push_back(
        {found->receive(found->bytes() == bytes ? data : unwanted.data()), names_[static_cast<size_t>(from)]});
    Passed passed(under_way, doing);
    co_await operation.until(passed);
    if (found->bytes() == bytes) co_return;
    throw Error(Error::Kind::MISMATCH, name(from) + " sends " + std::to_string(found->bytes()) +
                                           " bytes to who receives " + std::to_string(bytes));
}

}  // namespace pneumo
