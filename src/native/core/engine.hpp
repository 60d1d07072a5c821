#pragma once

#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#include "doorbell.hpp"
#include "task.hpp"

namespace pneumo {

struct Lane {
    std::deque<std::shared_ptr<Operation>> queue;  // its front runs
};

/// Runs the operations of a process.
///
/// At any moment at most one thread *drives*: it resumes whatever can go on. A thread that waits for an operation
/// drives by itself, so a blocking call costs no change of threads. The progress thread drives while nobody waits, and
/// sleeps on the doorbell when nothing can go on. It calls completion callbacks too, without the role: a callback may
/// wait for other operations, and must not hold up who waits for something else. Once there are callbacks there are two
/// progress threads, so that one drives while the other is in a callback. Who waits for an operation may call those of
/// this one itself, and then has the engine `forget` it.
class Engine {
   public:
    /// `doorbell` is this process's; it must outlive the engine.
    explicit Engine(Doorbell& doorbell);
    ~Engine();

    /// Take an operation over; after `shutdown` it ends at once with that error. `awaited`: the caller will call `wait`
    /// at once, and the progress thread is left asleep.
    void submit(std::shared_ptr<Operation> operation, bool awaited);
    /// Drive until the operation is done; false if `timeout` (0: none) is over before.
    bool wait(Operation& operation, std::chrono::milliseconds timeout = std::chrono::milliseconds(0));
    /// Be ready for completion callbacks; before the first one.
    void expect_callbacks();
    /// The callbacks of this operation have been called by another thread: let go of it.
    void forget(const Operation& operation);
    /// Have every operation examined soon, from any thread.
    void nudge();
    /// End all that still runs with this error, and the threads; for the end of the process.
    void shutdown(const std::exception_ptr& error);
    /// Called in a forked child: the threads exist only in the parent, and the locks may be held by them.
    void forked() { usable_ = false; }
    bool usable() const { return usable_; }

   private:
    using Lock = std::unique_lock<std::mutex>;

    void add_thread();
    void progress_loop();
    /// One look at every operation; true if any went on. Needs the role, as all that follow do.
    bool poll();
    void activate(std::shared_ptr<Operation> operation);
    void finish(std::shared_ptr<Operation> operation);
    /// Poll for at most this long; true if something went on.
    bool spin(std::chrono::microseconds patience, bool yields);
    /// Announce that this thread is about to sleep, and look once more: what the bell has shown, nothing if it must
    /// not.
    std::optional<uint32_t> lie_down();
    /// Sleep, as announced by `lie_down`, until the bell shows something else than `seen`; needs no role.
    void sleep(uint32_t seen, std::chrono::nanoseconds longest);
    /// Interrupt what has waited too long or in vain.
    void examine();
    /// Give the role up, and see to it that somebody goes on.
    void release();
    /// Call the callbacks of what has ended.
    void complete(Lock& lock);
    std::chrono::microseconds blocked_patience(const Operation& operation) const;
    std::chrono::microseconds progress_patience() const;
    std::chrono::microseconds longest_sleep() const;

    Doorbell& doorbell_;
    std::mutex mutex_;
    std::condition_variable changed_;  // the role is free, an operation has ended, or there is something to do
    bool driving_ = false;             // guarded by mutex_, like the next two
    bool watched_ = false;             // a progress thread sleeps on the doorbell
    std::vector<std::shared_ptr<Operation>> incoming_;
    std::atomic<bool> has_incoming_{false}, examine_now_{false}, stopping_{false}, stopped_{false}, usable_{true};
    std::atomic<int> wanted_{0};                      // threads in `wait` that cannot drive because another one does
    std::atomic<int> pending_{0};                     // operations submitted and not done
    std::vector<std::shared_ptr<Operation>> ended_;   // with callbacks still to be called; guarded by mutex_
    std::vector<std::shared_ptr<Operation>> active_;  // of the thread with the role
    std::atomic<bool> has_ended_{false};
    std::exception_ptr stopped_by_;  // what operations that come after the end are ended with; guarded by mutex_
    Clock::time_point examined_{}, examined_deeply_{};
    std::vector<std::thread> threads_;
};

}  // namespace pneumo
