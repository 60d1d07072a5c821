#include "work.hpp"

#include <c10/util/Exception.h>
#include <pybind11/pybind11.h>

#include <algorithm>

#include "../core/error.hpp"

namespace pneumo {

std::exception_ptr as_torch_error(const std::exception_ptr& error) {
    if (!error) return nullptr;
    try {
        std::rethrow_exception(error);
    } catch (const Error& known) {
        const std::string message = std::string("pneumo: ") + known.what();
        const c10::SourceLocation where{__func__, __FILE__, static_cast<uint32_t>(__LINE__)};
        return std::make_exception_ptr(c10::DistBackendError(where, message));
    } catch (...) {
        return std::current_exception();
    }
}

Work::Work(Engine& engine, int rank, c10d::OpType type, const char* title, std::vector<at::Tensor> inputs,
           std::vector<at::Tensor> outputs, uint64_t sequence)
    : c10d::Work(rank, type, title, std::move(inputs)),
      engine_(engine),
      outputs_(std::move(outputs)),
      sequence_(sequence) {}

void Work::submit(std::shared_ptr<Operation> operation, bool awaited) {
    operation_ = std::move(operation);
    auto self = c10::intrusive_ptr<Work>::reclaim_copy(this);
    operation_->on_end = [self] {
        if (self->recordFunctionEndCallback_) self->recordFunctionEndCallback_();
        std::lock_guard lock(self->future_mutex_);
        self->ended_ = true;
        return static_cast<bool>(self->future_);
    };
    operation_->completed = [self] { self->complete(); };
    engine_.submit(operation_, awaited);
    if (awaited) wait_for(engine_, *operation_);
}

namespace {

/// A blocked thread looks for signals now and then: Ctrl-C shall not wait for a peer.
constexpr std::chrono::milliseconds kSlice{200};

void check_signals() {
    const pybind11::gil_scoped_acquire python;
    if (PyErr_CheckSignals() != 0) throw pybind11::error_already_set();
}

}  // namespace

bool wait_for(Engine& engine, Operation& operation, std::chrono::milliseconds timeout) {
    TORCH_CHECK(operation.done() || engine.usable(),
                "pneumo: a process that was forked from one which uses this backend ",
                "cannot wait for its operations");
    const auto limit = Clock::now() + timeout;
    for (;;) {
        auto slice = kSlice;
        if (timeout.count() > 0)
            slice = std::min(slice, std::chrono::ceil<std::chrono::milliseconds>(limit - Clock::now()));
        if (slice.count() > 0 && engine.wait(operation, slice)) return true;
        if (timeout.count() > 0 && Clock::now() >= limit) return operation.done();
        if (!engine.usable()) return operation.done();
        check_signals();
    }
}

bool Work::isCompleted() {
    if (!operation_->done()) return false;
    std::lock_guard lock(future_mutex_);
    return !future_ || completed_;
}

bool Work::isSuccess() const { return operation_->done() && !operation_->error(); }

std::exception_ptr Work::exception() const {
    return operation_->done() ? as_torch_error(operation_->error()) : nullptr;
}

int Work::sourceRank() const { return source ? *source : c10d::Work::sourceRank(); }

std::vector<at::Tensor> Work::result() { return outputs_; }

bool Work::wait(std::chrono::milliseconds timeout) {
    operation_->awaited();
    if (!wait_for(engine_, *operation_, timeout)) {
        TORCH_CHECK_WITH(DistBackendError, false, "pneumo: ", c10d::opTypeToString(retrieveOpType()), ", number ",
                         sequence_, " of its group, is not done after ", timeout.count(), " ms");
    }
    settle();
    if (auto error = exception()) std::rethrow_exception(error);
    return true;
}

void Work::abort() { TORCH_CHECK(false, "pneumo: one Work cannot be aborted, only its process group"); }

c10::intrusive_ptr<c10::ivalue::Future> Work::getFuture() {
    bool ended = false;
    engine_.expect_callbacks();
    {
        std::lock_guard lock(future_mutex_);
        if (future_) return future_;
        c10::TypePtr type = c10::ListType::create(c10::TensorType::get());
        if (!lists.empty()) type = c10::ListType::create(std::move(type));
        future_ = c10::make_intrusive<c10::ivalue::Future>(std::move(type));
        ended = ended_;
    }
    if (ended) {
        engine_.wait(*operation_);  // its end is a matter of instructions
        complete();
    }
    return future_;
}

bool Work::complete() {
    {
        std::lock_guard lock(future_mutex_);
        if (!future_ || completing_ != std::thread::id()) return false;
        completing_ = std::this_thread::get_id();
    }
    if (operation_->error()) {
        future_->setError(as_torch_error(operation_->error()));
    } else {
        future_->markCompleted(lists.empty() ? c10::IValue(outputs_) : c10::IValue(lists));
    }
    {
        std::lock_guard lock(future_mutex_);
        completed_ = true;
    }
    completed_now_.notify_all();
    return true;
}

void Work::settle() {
    if (!engine_.usable()) return;
    if (complete()) engine_.forget(*operation_);
    std::unique_lock lock(future_mutex_);
    const auto over = [this] { return !future_ || completed_ || completing_ == std::this_thread::get_id(); };
    while (!completed_now_.wait_for(lock, kSlice, over)) {
        lock.unlock();
        check_signals();
        lock.lock();
    }
}

}  // namespace pneumo
