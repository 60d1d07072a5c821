#pragma once

#include <torch/csrc/distributed/c10d/Work.hpp>

#include "../core/engine.hpp"

namespace pneumo {

/// c10d's handle of one operation. Its Future is made only when somebody asks for it.
class Work final : public c10d::Work {
   public:
    Work(Engine& engine, int rank, c10d::OpType type, const char* title, std::vector<at::Tensor> inputs,
         std::vector<at::Tensor> outputs, uint64_t sequence);

    /// Give the operation over to the engine; `awaited`: wait here until it is done.
    void submit(std::shared_ptr<Operation> operation, bool awaited);

    bool isCompleted() override;
    bool isSuccess() const override;
    std::exception_ptr exception() const override;
    int sourceRank() const override;
    std::vector<at::Tensor> result() override;
    void synchronize() override { wait(); }
    bool wait(std::chrono::milliseconds timeout = kNoTimeout) override;
    void abort() override;
    c10::intrusive_ptr<c10::ivalue::Future> getFuture() override;
    uint64_t getSequencenumber() const override { return sequence_; }
    std::chrono::milliseconds getTimeout() const override { return operation_->timeout(); }

    std::shared_ptr<const Life> life() const { return operation_->life; }

    std::shared_ptr<int> source;                 // of a receive, set by it
    std::vector<std::vector<at::Tensor>> lists;  // the Future's value where it is a list of lists, as Gloo has it

   private:
    /// Complete the Future, if there is one, and call its callbacks; false if another thread has begun to.
    bool complete();
    /// The same, and wait for that thread: what hangs on the Future is done when the Work is, as Gloo has it. Not if
    /// this thread is in one of its callbacks.
    void settle();

    Engine& engine_;
    std::shared_ptr<Operation> operation_;
    std::vector<at::Tensor> outputs_;
    const uint64_t sequence_;
    std::mutex future_mutex_;  // guards what follows
    std::condition_variable completed_now_;
    c10::intrusive_ptr<c10::ivalue::Future> future_;
    bool ended_ = false, completed_ = false;
    std::thread::id completing_;  // the thread that completes it or has
};

/// Wait for an operation's end with an eye on signals; false if `timeout` (0: none) is over before.
bool wait_for(Engine& engine, Operation& operation, std::chrono::milliseconds timeout = std::chrono::milliseconds(0));

/// An operation's error as c10d and Python know it.
std::exception_ptr as_torch_error(const std::exception_ptr& error);

}  // namespace pneumo
