#include "group.hpp"

#include <algorithm>
#include <map>
#include <sstream>

#include "shared.hpp"

namespace pneumo {
namespace {

constexpr size_t kLine = 64;

size_t align(size_t bytes, size_t to = kLine) { return (bytes + to - 1) / to * to; }

const char* name_of(Kind kind) {
    switch (kind) {
        case Kind::ALLREDUCE: return "all_reduce";
        case Kind::BROADCAST: return "broadcast";
        case Kind::REDUCE: return "reduce";
        case Kind::ALLGATHER: return "all_gather";
        case Kind::GATHER: return "gather";
        case Kind::SCATTER: return "scatter";
        case Kind::REDUCE_SCATTER: return "reduce_scatter";
        case Kind::ALLTOALL: return "all_to_all";
        case Kind::BARRIER: return "barrier";
        case Kind::MONITORED_BARRIER: return "monitored_barrier";
    }
    return "?";
}

bool reduces(Kind kind) { return kind == Kind::ALLREDUCE || kind == Kind::REDUCE || kind == Kind::REDUCE_SCATTER; }

}  // namespace

std::string Call::text() const {
    std::ostringstream text;
    text << name_of(kind) << "(";
    const char* comma = "";
    if (reduces(kind)) text << (averages ? "average" : pneumo::name_of(op)), comma = ", ";
    if (root >= 0) text << comma << "root " << root, comma = ", ";
    if (type[0] != 0) text << comma << count << " x " << type.data();
    text << ")";
    return text.str();
}

Tuning Tuning::fit(Tuning wished, int size, size_t limit, bool arenas) {
    const auto ranks = static_cast<size_t>(size);
    const auto fit = [](size_t bytes, size_t room) { return std::min(bytes, room / kLine * kLine); };
    const size_t chunk = ranks * 4 * kLine, one_shot = 2 * ranks * sizeof(size_t);  // the least that works
    if (wished.chunk_bytes < chunk || wished.one_shot_bytes < one_shot) {
        throw Error(Error::Kind::SYSTEM, std::to_string(size) +
                                             " ranks on a node need a PNEUMO_COMM_CHUNK of at least " +
                                             std::to_string(chunk) + " bytes and a PNEUMO_COMM_ONE_SHOT of at least " +
                                             std::to_string(one_shot));
    }
    Tuning fitted;
    fitted.stores = wished.stores;
    // Three eighths at most for messages between pairs of ranks, an eighth for small calls, the rest for the slots.
    const size_t pair = limit * 3 / 8 / (ranks * ranks);
    const size_t header = align(sizeof(Group::Channel));
    fitted.channel_bytes = fit(wished.channel_bytes, pair > header ? (pair - header) / Layout::kPieces : 0);
    fitted.one_shot_bytes = fit(wished.one_shot_bytes, limit / 8 / (ranks * 2) - kLine);
    fitted.chunk_bytes = fit(wished.chunk_bytes, limit * 15 / 32 / (ranks * Layout::kDepth));
    if (fitted.channel_bytes < kLine || fitted.one_shot_bytes < one_shot || fitted.chunk_bytes < chunk) {
        throw Error(Error::Kind::SYSTEM, std::to_string(size) + " ranks on a node need more than " +
                                             std::to_string(limit >> 20) +
                                             " MiB of shared memory for a group; raise PNEUMO_COMM_BYTES");
    }
    const size_t taken = Layout(fitted, size).total;
    if (arenas && limit > taken) fitted.arena_bytes = (limit - taken) / ranks / Arena::kPage * Arena::kPage;
    return fitted;
}

Layout::Layout(const Tuning& tuning, int size) {
    const auto count = static_cast<size_t>(size);
    small_stride = kLine + align(tuning.one_shot_bytes);
    slot_stride = align(tuning.chunk_bytes);
    channel_stride = align(sizeof(Group::Channel)) + kPieces * align(tuning.channel_bytes);
    ranks = 0;
    steps = ranks + count * sizeof(Group::RankState);
    small = align(steps + Group::kStages * Group::kWindow * kLine, 4096);
    slots = align(small + count * 2 * small_stride, 4096);
    channels = align(slots + count * kDepth * slot_stride, 4096);
    arenas = align(channels + count * count * channel_stride, Arena::kPage);
    arena_stride = tuning.arena_bytes;
    total = arenas + count * arena_stride;
}

Group::Group(Engine& engine, std::byte* memory, int rank, std::vector<Member> members, Tuning tuning, Patience patience)
    : engine_(engine),
      memory_(memory),
      rank_(rank),
      size_(static_cast<int>(members.size())),
      members_(std::move(members)),
      tuning_(tuning),
      layout_(tuning, size_),
      patience_(patience),
      choice_(tuning.stores),
      arena_(memory + layout_.arenas + static_cast<size_t>(rank) * layout_.arena_stride, layout_.arena_stride),
      pairs_(static_cast<size_t>(size_)) {}

Group::~Group() = default;

Group::RankState& Group::state(int rank) const { return reinterpret_cast<RankState*>(memory_ + layout_.ranks)[rank]; }

std::byte* Group::small(int rank) const {
    return memory_ + layout_.small + (static_cast<size_t>(rank) * 2 + sequence_ % 2) * layout_.small_stride;
}

std::byte* Group::slot(int rank, uint64_t round) const {
    return memory_ + layout_.slots +
           (static_cast<size_t>(rank) * Layout::kDepth + slot_index(round)) * layout_.slot_stride;
}

void Group::choose_slots(size_t rounds) {
    const size_t last = slot_index(round_ - 1);
    const size_t first = rounds == 1 ? (last == 0 ? 1 : 0) : (last + 1) % Layout::kDepth;
    shift_ = first - round_;
}

void Group::enter(uint64_t round, Kind kind, size_t bytes) {
    const StoreChoice::Load load{static_cast<int>(kind), bytes};
    choice_.enter(round, load, rank_, size_, [this](int rank) -> StoreChoice::Costs& { return state(rank).costs; });
}

Group::Channel& Group::channel(int from, int to) const {
    const auto index = static_cast<size_t>(from) * static_cast<size_t>(size_) + static_cast<size_t>(to);
    return *reinterpret_cast<Channel*>(memory_ + layout_.channels + index * layout_.channel_stride);
}

uint64_t Group::place_of(const void* data, size_t bytes) const {
    if (bytes == 0 || !arena_.holds(data, bytes)) return 0;
    return static_cast<uint64_t>(static_cast<const std::byte*>(data) - memory_);
}

bool Group::read_places(std::vector<const std::byte*>& places) const {
    size_t found = 0;
    places.resize(static_cast<size_t>(size_));
    for (size_t rank = 0; rank < places.size(); ++rank) {
        uint64_t place = 0;
        std::memcpy(&place, announced(static_cast<int>(rank)), sizeof(place));
        places[rank] = memory_ + place;
        if (place != 0) ++found;
    }
    const bool all = found == places.size();
    if (found == 0) places.clear();
    return all;
}

std::shared_ptr<Operation> Group::operation(Operation::Body body, std::chrono::milliseconds timeout, Lane* lane) {
    auto operation = std::make_shared<Operation>(std::move(body), timeout, lane);
    operation->patience = patience_;
    operation->examine = [this, message = lane == nullptr](Waiting& waiting, bool late, bool deep) {
        if (!message || !left_ || is_broken_) return examine(waiting, late, deep);
        const std::string why = waiting.what() + " cannot be done: the process group was destroyed";
        return std::make_exception_ptr(Error(Error::Kind::ABORTED, why));
    };
    return operation;
}

Group::Step Group::open(Stage stage, int only) {
    const uint64_t index = next_[stage]++;
    uint64_t& full = full_[stage][index % kWindow];
    full += only < 0 ? static_cast<uint64_t>(size_) : 1;
    auto* counters = reinterpret_cast<Counter*>(memory_ + layout_.steps);
    return {&counters[stage * kWindow + static_cast<int>(index % kWindow)].value, full, index, stage, only};
}

void Group::contribute(const Step& step) {
    state(rank_).position[step.stage].store(step.index + 1, std::memory_order_relaxed);
    if (step.count->fetch_add(1, std::memory_order_seq_cst) + 1 == step.full) ring_all();
}

Group::Step Group::say(Stage stage) {
    const Step step = open(stage);
    contribute(step);
    return step;
}

void Group::ring_all() {
    for (int other = 0; other < size_; ++other) {
        if (other != rank_) members_[static_cast<size_t>(other)].doorbell->ring();
    }
}

Group::Step Group::arrive(const Call& call, const void* data, size_t bytes) {
    call_ = call;
    std::byte* mine = small(rank_);
    static_assert(sizeof(Call) <= kLine && std::has_unique_object_representations_v<Call>);
    std::memcpy(mine, &call, sizeof(Call));
    if (bytes > 0) std::memcpy(mine + kLine, data, bytes);
    return say(ARRIVED);
}

const std::byte* Group::announced(int rank) const { return small(rank) + kLine; }

void Group::check_calls() {
    bool same = true;
    for (int other = 0; other < size_; ++other) same &= std::memcmp(small(other), &call_, sizeof(Call)) == 0;
    if (!same) disagree();
    check_given_up();  // one may have, before the last rank, which is this one, came
}

void Group::check_given_up() {
    for (int other = 0; other < size_; ++other) {
        const auto& peer = state(other);
        if (peer.presence.load(std::memory_order_acquire) != RankState::ABORTED || peer.given_up > sequence_) continue;
        fail(Error::Kind::PEER_LOST, describe() + " cannot be done: " + name({other}) + " gave up: " + peer.reason);
    }
}

void Group::disagree() {
    std::map<std::string, std::vector<int>> calls;
    for (int other = 0; other < size_; ++other) {
        Call call;
        std::memcpy(&call, small(other), sizeof(Call));
        calls[call.text()].push_back(other);
    }
    std::string message =
        "the ranks disagree about collective " + std::to_string(sequence_.load()) + " of their group: ";
    const char* comma = "";
    for (const auto& [text, ranks] : calls) {
        message += comma + name(ranks) + (ranks.size() > 1 ? " call " : " calls ") + text;
        comma = ", ";
    }
    fail(Error::Kind::MISMATCH, message);
}

std::string Group::name(const std::vector<int>& ranks) const {
    std::string text = ranks.size() > 1 ? "ranks " : "rank ";
    const char* comma = "";
    for (const int rank : ranks) {
        text += comma + std::to_string(members_[static_cast<size_t>(rank)].name);
        comma = ", ";
    }
    return text;
}

void Group::throw_if_broken() const {
    if (!is_broken_) return;
    std::lock_guard lock(broken_mutex_);
    throw Error(broken_kind_, broken_);
}

std::string Group::describe() const {
    return call_.text() + " (collective " + std::to_string(sequence_.load()) + " of its group)";
}

std::string Group::broken() const {
    std::lock_guard lock(broken_mutex_);
    return broken_;
}

void Group::fail(Error::Kind kind, const std::string& message) {
    abort(message);
    {
        std::lock_guard lock(broken_mutex_);
        broken_kind_ = kind;
    }
    throw Error(kind, message);
}

void Group::abort(const std::string& reason) {
    bool first = false;
    {
        std::lock_guard lock(broken_mutex_);
        if (broken_.empty()) {
            first = true;
            broken_ = reason;
            auto& mine = state(rank_);
            const size_t length = std::min(reason.size(), sizeof(mine.reason) - 1);
            std::memcpy(mine.reason, reason.data(), length);
            mine.reason[length] = 0;
            mine.given_up = ended_ == sequence_ ? sequence_ + 1 : sequence_.load();
            mine.presence.store(RankState::ABORTED, std::memory_order_release);
        }
        is_broken_ = true;
    }
    if (first && on_break) on_break(reason);
    ring_all();
    engine_.nudge();
}

void Group::leave() {
    auto present = static_cast<uint32_t>(RankState::PRESENT);
    state(rank_).presence.compare_exchange_strong(present, RankState::LEFT, std::memory_order_release);
    left_ = true;
    ring_all();
    engine_.nudge();
}

std::exception_ptr Group::examine(Waiting& waiting, bool late, bool deep) {
    const auto error = [&](Error::Kind kind, const std::string& message) {
        try {
            fail(kind, message);
        } catch (...) {
            return std::current_exception();
        }
    };
    if (is_broken_) {
        std::lock_guard lock(broken_mutex_);
        return std::make_exception_ptr(Error(broken_kind_, broken_));
    }
    const std::vector<int> missing = waiting.missing();
    const std::string what = waiting.what();
    std::vector<int> aborted, gone, dead;
    for (const int rank : waiting.involved()) {
        const auto& peer = state(rank);
        if (peer.presence.load(std::memory_order_acquire) != RankState::ABORTED) continue;
        if (peer.given_up <= sequence_ || std::count(missing.begin(), missing.end(), rank) > 0) aborted.push_back(rank);
    }
    for (const int rank : missing) {
        if (state(rank).presence.load(std::memory_order_acquire) == RankState::LEFT) gone.push_back(rank);
        if (deep && has_died(*members_[static_cast<size_t>(rank)].doorbell)) dead.push_back(rank);
    }
    // Who is gone may have done its part just before: what it did is seen by now, since it came before its going.
    if (waiting.ready()) return nullptr;
    if (!aborted.empty()) {
        const int rank = aborted.front();
        return error(Error::Kind::PEER_LOST,
                     what + " cannot be done: " + name({rank}) + " gave up: " + state(rank).reason);
    }
    if (!gone.empty() && waiting.in_vain_without(gone.size())) {
        return error(Error::Kind::PEER_LOST, what + " cannot be done: " + name(gone) + " left the group");
    }
    if (!dead.empty()) Segment::sweep();
    if (!dead.empty() && waiting.in_vain_without(dead.size())) {
        return error(Error::Kind::PEER_LOST, what + " cannot be done: " + name(dead) + " died");
    }
    if (late) {
        if (missing.empty()) return error(Error::Kind::TIMEOUT, what + " timed out");
        return error(Error::Kind::TIMEOUT,
                     what + " timed out: " + name(missing) + (missing.size() > 1 ? " have" : " has") + " not come");
    }
    return nullptr;
}

}  // namespace pneumo
