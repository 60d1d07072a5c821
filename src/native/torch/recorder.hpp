#pragma once

#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include <array>
#include <atomic>
#include <memory>
#include <optional>
#include <vector>

#include "../core/task.hpp"

namespace pneumo {

/// One call of a process group on this rank; stamps in ns of CLOCK_MONOTONIC, 0 where nobody can tell.
struct Record : c10::intrusive_ptr_target {
    c10d::HookOpName op = c10d::HookOpName::UNKNOWN;
    std::optional<at::ScalarType> dtype;
    int64_t bytes = 0;     // of its input or of its output, whichever is more
    int64_t sequence = 0;  // among the collectives of its group, or among the messages of its pair of ranks
    int64_t peer = -1;     // of a message, the other rank in the group
    bool on_cpu = true;    // on a GPU a Work's Future says nothing of when data moves
    int64_t enqueued = 0;
    std::atomic<int64_t> finished{0};
    std::atomic<int64_t> wait_begin{0}, wait_end{0};  // of the thread that issued it, the first time
    std::shared_ptr<const Life> life;                 // of a backend that tells more
    bool taken = false;                               // nobody looks at later stamps; for the issuing thread
};

/// Records every call of a process group over any c10d backend, from torch's own hooks before and after its issue.
///
/// A call's end is the completion of its Work's Future, stamped by the thread that completes it, or what the backend
/// `pneumo` notes of the operation itself. The issuing thread's blocking is timed in Python's `Work.wait` (see
/// `time_waits`), or in the call where that blocks. No lock is taken: records are pushed onto a list with one
/// compare-and-swap.
class Recorder : public std::enable_shared_from_this<Recorder> {
   public:
    /// Begin with the calls of a group; they end with `detach` or with the last pointer.
    static std::shared_ptr<Recorder> attach(c10::intrusive_ptr<c10d::ProcessGroup> group);
    explicit Recorder(c10::intrusive_ptr<c10d::ProcessGroup> group);
    ~Recorder() { detach(); }
    Recorder(const Recorder&) = delete;
    Recorder& operator=(const Recorder&) = delete;

    void detach();
    /// The calls that were issued since the last `take`, in order; those still under way have no end, or, with `ended`,
    /// are left for the next time. For one thread.
    std::vector<c10::intrusive_ptr<Record>> take(bool ended = false);

   private:
    void before(const c10d::PreHookArgs& call);
    void after(const c10d::PostHookArgs& call);
    /// Have the end of a Work noted.
    void watch(const c10::intrusive_ptr<c10d::Work>& work, const c10::intrusive_ptr<Record>& record);

    c10::intrusive_ptr<c10d::ProcessGroup> group_;
    const int64_t hook_;
    std::atomic<int64_t> collectives_{0};
    std::array<std::atomic<bool>, static_cast<size_t>(c10d::HookOpName::SPLIT)> futureless_{};  // by operation
    std::vector<std::array<std::atomic<int64_t>, 2>> messages_;                                 // to and from each rank
    struct Link {
        c10::intrusive_ptr<Record> record;
        Link* before;
    };
    std::atomic<Link*> latest_{nullptr};
    std::vector<c10::intrusive_ptr<Record>> left_;  // under way at the last `take`
};

/// Wait for a Work, noting in its record that this thread does, if it has issued it lately.
bool timed_wait(const c10::intrusive_ptr<c10d::Work>& work, std::chrono::milliseconds timeout);

}  // namespace pneumo
