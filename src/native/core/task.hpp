#pragma once

#include <atomic>
#include <chrono>
#include <coroutine>
#include <exception>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "futex.hpp"

namespace pneumo {

class Operation;

/// A part of an operation, written as straight-line code that suspends where it has to wait for a peer.
///
/// Starts when awaited, and then goes on in whichever thread drives the engine; an exception reaches who awaits it.
class [[nodiscard]] Task {
   public:
    struct promise_type {
        struct Final {
            bool await_ready() const noexcept { return false; }
            std::coroutine_handle<> await_suspend(std::coroutine_handle<promise_type> self) const noexcept {
                return self.promise().continuation;
            }
            void await_resume() const noexcept {}
        };
        Task get_return_object() { return Task(std::coroutine_handle<promise_type>::from_promise(*this)); }
        std::suspend_always initial_suspend() const noexcept { return {}; }
        Final final_suspend() const noexcept { return {}; }
        void unhandled_exception() { error = std::current_exception(); }
        void return_void() const {}

        std::coroutine_handle<> continuation = std::noop_coroutine();
        std::exception_ptr error;
    };

    Task() = default;
    explicit Task(std::coroutine_handle<promise_type> handle) : handle_(handle) {}
    Task(Task&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
    Task& operator=(Task&& other) noexcept {
        std::swap(handle_, other.handle_);
        return *this;
    }
    ~Task() {
        if (handle_) handle_.destroy();
    }

    bool await_ready() const noexcept { return false; }
    std::coroutine_handle<> await_suspend(std::coroutine_handle<> caller) const noexcept {
        handle_.promise().continuation = caller;
        return handle_;
    }
    void await_resume() const {
        if (handle_.promise().error) std::rethrow_exception(handle_.promise().error);
    }

   private:
    friend class Operation;
    std::coroutine_handle<promise_type> handle_;
};

/// What a suspended operation waits for.
class Waiting {
   public:
    virtual ~Waiting() = default;
    /// Whether the wait is over; polled by the thread that drives the engine. What it throws ends the operation.
    virtual bool ready() = 0;
    /// The ranks that have not yet done what is waited for.
    virtual std::vector<int> missing() const { return {}; }
    /// The ranks without which it fails, whether they have done their part or not.
    virtual std::vector<int> involved() const { return missing(); }
    /// What is being done, for an error's sentence.
    virtual std::string what() const { return "an operation"; }
    /// Whether it is in vain when so many of the missing ranks are gone; only a receive from any rank may still
    /// succeed.
    virtual bool in_vain_without(size_t) const { return true; }
    /// How long a sleeping thread may take no look at it, where nobody rings for it; 0: it is rung for.
    virtual std::chrono::microseconds look_again() const { return std::chrono::microseconds(0); }
    /// Whether this waits for peers to come at all, and not for the next chunk of one that is at work.
    virtual bool for_arrival() const { return false; }
};

/// How long a thread may spin before it sleeps.
struct Patience {
    std::chrono::microseconds blocked{0};   // of a thread that has nothing else to do than to wait
    std::chrono::microseconds progress{0};  // of the progress thread, while a peer is at work on the same operation
    bool yields = false;  // between looks the core is offered to others: there are more ranks than cores
};

/// When an operation's turn came and when it ended, in ns of CLOCK_MONOTONIC; 0: not yet.
struct Life {
    std::atomic<int64_t> started{0}, ended{0};
};

/// Operations that must run one after the other in the order of their submission: those of one group.
struct Lane;

/// One collective or point-to-point call of one rank, from its submission to its end.
class Operation {
   public:
    using Body = std::function<Task(Operation&)>;

    /// `body` makes the coroutine when the operation's turn comes; the timeout (0: none) counts from there, and that of
    /// an operation without a lane, a message, from the first `awaited`: nobody knows when a peer will send.
    Operation(Body body, std::chrono::milliseconds timeout, Lane* lane = nullptr)
        : body_(std::move(body)), timeout_(timeout), lane_(lane) {}

    /// Suspends the coroutine that awaits it until `waiting.ready()`, or throws what `interrupt` was given.
    auto until(Waiting& waiting) {
        struct Awaiter {
            Operation& operation;
            Waiting& waiting;
            bool await_ready() { return waiting.ready(); }
            void await_suspend(std::coroutine_handle<> caller) {
                operation.resume_point_ = caller;
                operation.waiting_ = &waiting;
            }
            void await_resume() {
                operation.waiting_ = nullptr;
                if (operation.interruption_) std::rethrow_exception(std::exchange(operation.interruption_, nullptr));
            }
        };
        return Awaiter{*this, waiting};
    }

    bool done() const { return done_.load(std::memory_order_acquire); }
    /// What it ended with, null after success; valid once done.
    std::exception_ptr error() const { return error_; }
    std::chrono::milliseconds timeout() const { return timeout_; }
    /// Somebody waits for it now.
    void awaited() {
        if (!in_order()) count_down();
    }
    /// Whether it is one of a lane; else a message.
    bool in_order() const { return lane_ != nullptr; }
    Patience patience;
    /// For who keeps a record of it: what is left when the operation and all that it holds are gone.
    const std::shared_ptr<Life> life = std::make_shared<Life>();
    /// What must live until the operation is done, above all its lane.
    std::shared_ptr<void> owner;
    /// Called by the engine, with its role, before it is done: true if `completed` has to be called afterwards.
    std::function<bool()> on_end;
    /// Called without the engine's role, so that it may wait for other operations.
    std::function<void()> completed;
    /// Looks for reasons to give up, now and then while it waits. `late`: the timeout is over; `deep`: ask the system
    /// too.
    std::function<std::exception_ptr(Waiting&, bool late, bool deep)> examine;

   private:
    friend class Engine;

    void start();
    /// Let the timeout begin, unless it has.
    void count_down() {
        auto never = kNever;
        if (timeout_.count() > 0)
            deadline_.compare_exchange_strong(never, (Clock::now() + timeout_).time_since_epoch());
    }
    /// Whether it can go on; an error of what it waits for is its own, and nobody else's.
    bool runnable();
    void interrupt(std::exception_ptr error) { interruption_ = std::move(error); }
    /// Run to the next wait; true when there is none: the operation has ended.
    bool advance();
    void end(std::exception_ptr error);
    /// Make the end visible: `done` from here on. True if `completed` has to be called.
    bool release();

    Body body_;
    Task task_;
    std::chrono::milliseconds timeout_;
    static constexpr Clock::duration kNever = Clock::duration::max();
    std::atomic<Clock::duration> deadline_{kNever};  // since the clock's epoch
    Lane* lane_;
    Waiting* waiting_ = nullptr;
    std::coroutine_handle<> resume_point_;
    std::exception_ptr interruption_, error_;
    std::atomic<bool> done_{false};
};

}  // namespace pneumo
