#include "engine.hpp"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <utility>

namespace pneumo {
namespace {

using std::chrono::milliseconds;

// A sleeping thread looks at deadlines and at what peers say of themselves this often, and asks the system whether they
// are alive at all twice a second.
constexpr milliseconds kExamine{100}, kExamineDeeply{500};

}  // namespace

void Operation::start() {
    life->started = now_ns();
    if (in_order()) count_down();
    task_ = body_(*this);
    resume_point_ = task_.handle_;
}

bool Operation::runnable() {
    if (interruption_ || waiting_ == nullptr) return true;
    try {
        return waiting_->ready();
    } catch (...) {
        interrupt(std::current_exception());
        return true;
    }
}

bool Operation::advance() {
    resume_point_.resume();
    if (!task_.handle_.done()) return false;
    end(task_.handle_.promise().error);
    return true;
}

void Operation::end(std::exception_ptr error) {
    error_ = std::move(error);
    life->ended = now_ns();
    waiting_ = nullptr;
    task_ = Task();
    body_ = nullptr;  // frees what it captured
}

bool Operation::release() {
    // Before `done`: whoever waited may end the group next, whose memory shall not wait for this thread to get on.
    owner = nullptr;
    // Both are cleared: they may own who owns the operation.
    const auto last = std::exchange(on_end, nullptr);
    const bool callback = last && last();
    if (!callback) completed = nullptr;
    done_.store(true, std::memory_order_release);
    return callback;
}

Engine::Engine(Doorbell& doorbell) : doorbell_(doorbell) { add_thread(); }

void Engine::add_thread() {
    threads_.emplace_back([this] { progress_loop(); });
    pthread_setname_np(threads_.back().native_handle(), "pneumo");
}

void Engine::expect_callbacks() {
    std::lock_guard lock(mutex_);
    if (threads_.size() < 2 && !stopping_ && usable_) add_thread();
}

Engine::~Engine() { shutdown(nullptr); }

void Engine::forget(const Operation& operation) {
    std::shared_ptr<Operation> held;  // ends when the lock is gone
    std::lock_guard lock(mutex_);
    const auto here =
        std::find_if(ended_.begin(), ended_.end(), [&](const auto& one) { return one.get() == &operation; });
    if (here == ended_.end()) return;
    held = std::move(*here);
    ended_.erase(here);
    has_ended_ = !ended_.empty();
}

void Engine::submit(std::shared_ptr<Operation> operation, bool awaited) {
    bool idle = false, driven = false;
    {
        std::lock_guard lock(mutex_);
        if (stopped_) {  // by a callback at the end of the process, say
            operation->end(stopped_by_);
            operation->release();
            return;
        }
        incoming_.push_back(std::move(operation));
        has_incoming_.store(true, std::memory_order_release);
        ++pending_;
        driven = driving_;
        idle = !driven && !watched_;
    }
    // Who waits for it drives it, but for a thread that drives already and may be asleep over something else.
    if (awaited && !driven) return;
    doorbell_.ring();
    if (idle) changed_.notify_one();
}

bool Engine::wait(Operation& operation, milliseconds timeout) {
    if (operation.done()) return true;
    const auto limit = timeout.count() > 0 ? Clock::now() + timeout : Clock::time_point::max();
    Lock lock(mutex_);
    while (!operation.done()) {
        const auto now = Clock::now();
        if (now >= limit) break;
        if (driving_ || stopping_) {
            const auto over = [&] { return operation.done() || !(driving_ || stopping_); };
            ++wanted_;
            changed_.wait_for(lock, std::min<Clock::duration>(limit - now, std::chrono::seconds(1)), over);
            --wanted_;
            // A progress thread may have given way for nothing: what this one waited for was done already.
            if (wanted_ == 0 && pending_ > 0 && !driving_) changed_.notify_all();
            continue;
        }
        driving_ = true;
        lock.unlock();
        while (!operation.done() && Clock::now() < limit && !stopping_) {
            if (poll() || spin(blocked_patience(operation), operation.patience.yields) || operation.done()) {
                examine();
                continue;
            }
            if (const auto seen = lie_down()) {
                examine();
                sleep(*seen, std::min<Clock::duration>(limit - Clock::now(), longest_sleep()));
            }
        }
        lock.lock();
        release();
    }
    return operation.done();
}

void Engine::release() {
    driving_ = false;
    if (wanted_ > 0 || !ended_.empty()) changed_.notify_all();
    if (pending_ == 0) return;
    if (watched_) {  // what the sleeper waits for may have come meanwhile, or a next operation may have begun
        doorbell_.bell.fetch_add(1, std::memory_order_release);
        futex_wake(doorbell_.bell);
    } else {
        changed_.notify_all();
    }
}

void Engine::complete(Lock& lock) {
    while (!ended_.empty()) {
        const auto operation = std::move(ended_.front());
        ended_.erase(ended_.begin());
        has_ended_ = !ended_.empty();
        lock.unlock();
        std::exchange(operation->completed, nullptr)();
        lock.lock();
    }
}

void Engine::progress_loop() {
    Lock lock(mutex_);
    for (;;) {
        const auto can_drive = [this] { return pending_ > 0 && !driving_ && !watched_ && wanted_ == 0; };
        changed_.wait(lock, [&] { return stopped_ || !ended_.empty() || can_drive(); });
        complete(lock);
        if (stopped_) return;
        if (!can_drive()) continue;
        driving_ = true;
        lock.unlock();
        std::optional<uint32_t> seen;
        while (!stopped_ && pending_ > 0 && !has_ended_ && wanted_ == 0) {
            if (poll() || spin(progress_patience(), true)) {
                examine();
                continue;
            }
            if ((seen = lie_down())) break;
        }
        if (seen) examine();
        const auto longest = longest_sleep();
        lock.lock();
        if (!seen) {
            release();
            continue;
        }
        watched_ = true;
        driving_ = false;
        if (wanted_ > 0 || !ended_.empty()) changed_.notify_all();
        lock.unlock();
        sleep(*seen, longest);
        lock.lock();
        watched_ = false;
    }
}

bool Engine::poll() {
    bool progressed = false;
    if (has_incoming_.load(std::memory_order_acquire)) {
        std::vector<std::shared_ptr<Operation>> incoming;
        {
            std::lock_guard lock(mutex_);
            incoming.swap(incoming_);
            has_incoming_.store(false, std::memory_order_relaxed);
        }
        for (auto& operation : incoming) {
            if (operation->lane_ != nullptr) {
                operation->lane_->queue.push_back(operation);
                if (operation->lane_->queue.size() > 1) continue;
            }
            activate(std::move(operation));
        }
        progressed = true;
    }
    for (size_t i = 0; i < active_.size();) {
        if (!active_[i]->runnable()) {
            ++i;
            continue;
        }
        progressed = true;
        if (!active_[i]->advance()) {
            ++i;
            continue;
        }
        auto operation = std::move(active_[i]);
        active_.erase(active_.begin() + static_cast<std::ptrdiff_t>(i));
        finish(std::move(operation));
    }
    return progressed;
}

void Engine::activate(std::shared_ptr<Operation> operation) {
    operation->start();
    active_.push_back(std::move(operation));
}

void Engine::finish(std::shared_ptr<Operation> operation) {
    std::shared_ptr<Operation> next;
    if (operation->lane_ != nullptr) {
        auto& queue = operation->lane_->queue;
        queue.pop_front();
        if (!queue.empty()) next = queue.front();
    }
    const bool callback = operation->release();
    --pending_;
    if (wanted_ > 0) {
        // Taken and given back, so that nobody is between looking at `done` and going to sleep.
        {
            std::lock_guard lock(mutex_);
        }
        changed_.notify_all();
    }
    if (callback) {
        {
            std::lock_guard lock(mutex_);
            ended_.push_back(std::move(operation));
            has_ended_ = true;
        }
        changed_.notify_all();  // whoever drives may be a waiting thread, which goes on
    }
    if (next) activate(std::move(next));
}

bool Engine::spin(std::chrono::microseconds patience, bool yields) {
    if (patience.count() == 0) return false;
    const auto limit = Clock::now() + std::min<Clock::duration>(patience, kExamine);
    for (;;) {
        for (int i = 0; i < (yields ? 1 : 64); ++i) {
            if (yields) {
                sched_yield();
            } else {
                relax();
            }
            if (poll()) return true;
        }
        if (Clock::now() >= limit || examine_now_.load(std::memory_order_relaxed)) return false;
    }
}

std::optional<uint32_t> Engine::lie_down() {
    doorbell_.sleepers.fetch_add(1, std::memory_order_seq_cst);
    const uint32_t seen = doorbell_.bell.load(std::memory_order_acquire);
    std::atomic_thread_fence(std::memory_order_seq_cst);
    if (!poll()) return seen;
    doorbell_.sleepers.fetch_sub(1, std::memory_order_relaxed);
    return std::nullopt;
}

void Engine::sleep(uint32_t seen, std::chrono::nanoseconds longest) {
    futex_wait(doorbell_.bell, seen, longest);
    doorbell_.sleepers.fetch_sub(1, std::memory_order_relaxed);
}

std::chrono::microseconds Engine::blocked_patience(const Operation& operation) const {
    // What nobody rings for is looked at again and again, with short sleeps that leave the core to others.
    const auto again = operation.waiting_ != nullptr ? operation.waiting_->look_again() : std::chrono::microseconds(0);
    return again.count() > 0 ? std::min(operation.patience.blocked, again) : operation.patience.blocked;
}

std::chrono::microseconds Engine::progress_patience() const {
    std::chrono::microseconds longest{0};
    for (const auto& operation : active_) {
        if (operation->waiting_ != nullptr && !operation->waiting_->for_arrival()) {
            longest = std::max(longest, operation->patience.progress);
        }
    }
    return longest;
}

std::chrono::microseconds Engine::longest_sleep() const {
    std::chrono::microseconds longest = kExamine;
    for (const auto& operation : active_) {
        if (operation->waiting_ == nullptr) continue;
        const auto wished = operation->waiting_->look_again();
        if (wished.count() > 0) longest = std::min(longest, wished);
    }
    return longest;
}

void Engine::examine() {
    const auto now = Clock::now();
    const bool asked = examine_now_.exchange(false);
    if (!asked && now - examined_ < kExamine) return;
    examined_ = now;
    const bool deep = now - examined_deeply_ >= kExamineDeeply;
    if (deep) examined_deeply_ = now;
    for (const auto& operation : active_) {
        if (operation->waiting_ == nullptr) continue;
        if (!operation->examine) continue;
        const bool late = now.time_since_epoch() >= operation->deadline_.load(std::memory_order_relaxed);
        try {
            if (auto error = operation->examine(*operation->waiting_, late, deep)) operation->interrupt(error);
        } catch (...) {
            operation->interrupt(std::current_exception());
        }
    }
}

void Engine::nudge() {
    examine_now_ = true;
    doorbell_.ring();
}

void Engine::shutdown(const std::exception_ptr& error) {
    {
        Lock lock(mutex_);
        if (stopped_ || !usable_) return;
        stopping_ = true;  // who drives while it waits gives way
        doorbell_.bell.fetch_add(1);
        futex_wake(doorbell_.bell);
        ++wanted_;
        changed_.wait(lock, [this] { return !driving_; });
        --wanted_;
        driving_ = true;
        stopped_ = true;
        stopped_by_ = error;
    }
    for (int rounds = 0; pending_ > 0 && rounds < 1000; ++rounds) {
        for (const auto& operation : active_) operation->interrupt(error);
        poll();
    }
    {
        Lock lock(mutex_);
        release();
    }
    changed_.notify_all();
    doorbell_.ring();
    for (auto& thread : threads_) thread.join();
    threads_.clear();
    usable_ = false;
    changed_.notify_all();
}

}  // namespace pneumo
