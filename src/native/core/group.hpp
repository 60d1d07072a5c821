#pragma once

#include <cstring>
#include <limits>
#include <list>
#include <mutex>

#include "communicator.hpp"
#include "stores.hpp"

namespace pneumo {

/// Sizes that follow from the number of ranks and the room there is; equal on all ranks of a group.
struct Tuning {
    size_t one_shot_bytes = 16 << 10;  // up to here every rank reads everybody's data at once
    size_t chunk_bytes = 256 << 10;    // of a rank and round, beyond
    size_t channel_bytes = 64 << 10;   // of a point-to-point message's piece
    Stores stores = Stores::MEASURED;  // how slots are written
    size_t arena_bytes = 0;            // of a rank's arena, for tensors that live in the shared memory

    /// Fit into `limit` bytes for `size` ranks, the arenas taking what is left, if `arenas`; throws Error where that is
    /// too little to work with.
    static Tuning fit(Tuning wished, int size, size_t limit, bool arenas);
};

/// Where everything is in a group's shared memory.
struct Layout {
    static constexpr int kDepth = 4;   // rounds in flight
    static constexpr int kNotes = 32;  // about messages, that the other rank has not yet read, for each pair of ranks
    static constexpr int kPieces = 2;  // of a message in flight

    Layout(const Tuning& tuning, int size);
    size_t ranks, steps, small, slots, channels, arenas, total;
    size_t small_stride, slot_stride, channel_stride, arena_stride;
};

/// The ranks of one node that do collectives together through shared memory; see ../README.md for the protocol.
///
/// Every rank makes one with the same memory (all zeros at first), size and tuning.
class Group final : public Communicator {
   public:
    struct Member {
        std::shared_ptr<Doorbell> doorbell;
        int name = 0;  // the rank by which users know it
    };

    Group(Engine& engine, std::byte* memory, int rank, std::vector<Member> members, Tuning tuning, Patience patience);
    ~Group() override;

    int rank() const { return rank_; }
    int size() const { return size_; }
    Lane* lane() override { return &lane_; }
    Engine& engine() override { return engine_; }
    Arena* arena() override { return &arena_; }
    int last_tag() const override { return std::numeric_limits<int>::max(); }

    /// An operation of this group, ready to be submitted; `lane` null for point-to-point ones.
    std::shared_ptr<Operation> operation(Operation::Body body, std::chrono::milliseconds timeout, Lane* lane) override;
    Task allreduce(Operation& operation, Call call, const void* in, void* out, DType dtype, Scale scale) override;
    Task reduce(Operation& operation, Call call, const void* in, void* out, DType dtype, Scale scale) override;
    Task reduce_scatter(Operation& operation, Call call, std::vector<const void*> in, void* out, DType dtype,
                        Scale scale) override;
    Task broadcast(Operation& operation, Call call, void* data, size_t bytes) override;
    Task allgather(Operation& operation, Call call, const void* in, std::vector<void*> out, size_t bytes) override;
    Task gather(Operation& operation, Call call, const void* in, std::vector<void*> out, size_t bytes) override;
    Task scatter(Operation& operation, Call call, std::vector<const void*> in, void* out, size_t bytes) override;
    Task alltoall(Operation& operation, Call call, std::vector<const void*> in, std::vector<size_t> in_bytes,
                  std::vector<void*> out, std::vector<size_t> out_bytes) override;
    Task barrier(Operation& operation, Call call) override;
    Task send(Operation& operation, const void* data, size_t bytes, int to, int tag) override;
    Task receive(Operation& operation, void* data, size_t bytes, int from, int tag, int* source) override;
    void abort(const std::string& reason) override;
    void leave() override;
    std::string broken() const override;

    /// As `receive`, but ends with `source` -1 and nothing received as soon as `elsewhere` says that there is a message
    /// elsewhere, which it is asked every 50 us.
    Task receive_unless(Operation& operation, void* data, size_t bytes, int from, int tag, int* source,
                        std::function<bool()> elsewhere);
    /// Called once, with the reason, when no operation can be done any more; set before the group is used.
    std::function<void(const std::string&)> on_break;

   private:
    friend struct Layout;
    friend struct Tuning;
    friend struct Reached;
    friend struct Matched;
    struct RankState;
    struct Channel;
    struct Receive;
    struct Pair;
    struct Allreduce;
    enum Stage { ARRIVED, FILLED, REDUCED, DRAINED, kStages };
    static constexpr int kWindow = 8;  // steps of a stage that may be open at once, more than kDepth

    /// One step of a stage: who has to contribute, and the counter that tells how many have.
    struct Step {
        std::atomic<uint64_t>* count = nullptr;
        uint64_t full = 0;
        uint64_t index = 0;
        Stage stage = ARRIVED;
        int only = -1;  // the one rank that contributes, -1: all
        bool done() const { return count == nullptr || count->load(std::memory_order_acquire) >= full; }
    };

    RankState& state(int rank) const;
    std::byte* small(int rank) const;
    /// Which of its slots a rank uses in a round of the operation that runs, or ran last.
    size_t slot_index(uint64_t round) const { return (round + shift_) % Layout::kDepth; }
    /// Decide where the rounds of the next operation lie: a single one takes turns with the last in two slots, so that
    /// less memory stays in the cache; others go on through all.
    void choose_slots(size_t rounds);
    std::byte* slot(int rank, uint64_t round) const;
    /// This rank's slot, to be written.
    Slot my_slot(uint64_t round) const { return {slot(rank_, round), choice_.streamed(round)}; }
    /// Enter a round of a collective, in which `bytes` pass from a rank to each that reads them.
    void enter(uint64_t round, Kind kind, size_t bytes);
    Channel& channel(int from, int to) const;
    /// Where a buffer lies in the shared memory, if it lies in this rank's arena; else 0.
    uint64_t place_of(const void* data, size_t bytes) const;

    Step open(Stage stage, int only = -1);
    void contribute(const Step& step);
    /// Open the next step of a stage and contribute to it.
    Step say(Stage stage);
    /// Announce a call, with up to one_shot_bytes of data that go with it.
    Step arrive(const Call& call, const void* data, size_t bytes);
    const std::byte* announced(int rank) const;
    /// Throws on every rank alike if the ranks do not call the same.
    void check_calls();
    [[noreturn]] void disagree();
    /// Throws if another rank has given this call up, although it had done its part.
    void check_given_up();
    void ring_all();

    /// A collective's turn, from its begin to its end; throws at once if the group is broken.
    struct Turn {
        explicit Turn(Group& group) : group(group) {
            ++group.sequence_;
            group.throw_if_broken();
        }
        ~Turn() { group.ended_ = group.sequence_.load(); }
        Group& group;
    };
    void throw_if_broken() const;
    [[noreturn]] void fail(Error::Kind kind, const std::string& message);
    std::exception_ptr examine(Waiting& waiting, bool late, bool deep);
    std::string name(const std::vector<int>& ranks) const;
    void match_receives();
    void match(Receive& receive);
    void read_offers(int from);
    void read_answers(int to);
    std::string describe() const;

    /// Run the rounds of a cut, in which ranks fill their slots and then read those of others; `filler`: who fills, -1
    /// all. If every rank's data has a place in its arena, `direct` reads all of it there instead.
    template <class Fill, class Consume, class Direct>
    Task exchange(Operation& operation, const Call& call, const Cut& cut, int filler, Fill fill, Consume consume,
                  uint64_t place, Direct direct);
    template <class Fill, class Consume>
    Task exchange(Operation& operation, const Call& call, const Cut& cut, int filler, Fill fill, Consume consume);
    /// All-reduce of tensors that lie in arenas, at `places`, after the arrival.
    Task allreduce_in_place(Operation& operation, Allreduce& work, const std::vector<const std::byte*>& places);
    /// After an arrival with `place`: `places` become those of all ranks' data if all lie in arenas, else none; `fill`
    /// is called if this rank held its first chunk back in vain, and its slot is needed now.
    template <class Fill>
    Task settle(Operation& operation, uint64_t place, std::vector<const std::byte*>& places, Fill fill) {
        check_calls();
        if (read_places(places) || places.empty()) co_return;
        places.clear();
        if (place != 0) fill();
        co_await all_have(operation, FILLED);
    }
    /// The places that all ranks have announced: whether all have one. Empty if nobody has.
    bool read_places(std::vector<const std::byte*>& places) const;
    /// Say that this rank has come to a stage, and wait until all have.
    Task all_have(Operation& operation, Stage stage);
    /// Wait until no rank reads another's tensor any more. Throws if one gave up meanwhile: its tensor may have
    /// changed.
    Task release_all(Operation& operation);

    Engine& engine_;
    std::byte* memory_;
    int rank_, size_;
    std::vector<Member> members_;
    Tuning tuning_;
    Layout layout_;
    Patience patience_;
    StoreChoice choice_;
    Lane lane_;
    Arena arena_;
    std::atomic<uint64_t> sequence_{0}, ended_{0};  // collectives begun and ended
    uint64_t round_ = 0;                            // of all operations together
    uint64_t shift_ = 0;                            // from a round's number to its slot's, modulo kDepth
    std::array<uint64_t, kStages> next_{};
    std::array<std::array<uint64_t, kWindow>, kStages> full_{};
    std::array<Step, Layout::kDepth> drained_{};  // by slot
    Call call_;                                   // the one that runs
    std::list<Receive*> receives_;                // posted and not yet matched, in order
    bool matchable_ = false;                      // receives or offers have come since they were last matched
    std::vector<Pair> pairs_;                     // with each rank
    mutable std::mutex broken_mutex_;
    std::string broken_;
    Error::Kind broken_kind_ = Error::Kind::ABORTED;
    std::atomic<bool> is_broken_{false}, left_{false};
};

}  // namespace pneumo
