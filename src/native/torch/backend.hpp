#pragma once

#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <vector>

#include "bootstrap.hpp"
#include "work.hpp"

namespace pneumo {

using Tensors = std::vector<at::Tensor>;
using WorkPtr = c10::intrusive_ptr<c10d::Work>;

/// c10d's backend `pneumo` for CPU tensors: checks and prepares tensors, and has `Group` move them.
///
/// Tensors that are not contiguous travel through contiguous copies. Calls with asyncOp = false return when they are
/// done.
class PneumoBackend final : public c10d::Backend {
   public:
    struct Options : c10d::Backend::Options {
        explicit Options(std::chrono::milliseconds timeout) : c10d::Backend::Options("pneumo", timeout) {}
        /// torch gives a part of a group its own copy; one of another type it would share with the whole.
        c10::intrusive_ptr<c10d::Backend::Options> clone() const override {
            return c10::make_intrusive<Options>(*this);
        }
    };

    /// Collective over the group. `names[k]` is the global rank of the group's rank k, empty: the same.
    PneumoBackend(const c10::intrusive_ptr<c10d::Store>& store, int rank, int size, std::vector<int> names,
                  std::chrono::milliseconds timeout);
    ~PneumoBackend() override;

    const std::string getBackendName() const override { return "pneumo"; }
    c10::intrusive_ptr<c10d::Backend::Options> getBackendOptions() override { return options_; }
    void setTimeout(std::chrono::milliseconds timeout) override { options_->timeout = timeout; }
    uint64_t getSequenceNumberForGroup() override { return sequence_; }
    c10d::ErrorType getError() override;
    void abort() override;
    /// Wait for the collectives under way, each up to its timeout, and a second for messages, then leave the group;
    /// messages that no peer has taken end with an error.
    void shutdown() override;
    void enableCollectivesTiming() override {}  // an operation's begin and end are noted in any case
    bool supportsTensorAlloc(c10::DeviceIndex) override { return node_->communicator->arena()->bytes() > 0; }
    /// An uninitialised tensor of `size` elements in memory that this node's ranks share, in which collectives read and
    /// write without copies; an ordinary one where there is no room for it. It may outlive the group.
    /// For DDP's buckets: for a complex type real numbers, twice as many, which its reducer takes for them elsewhere.
    at::Tensor allocateTensor(long size, at::TensorOptions options) override;
    /// A tensor of `size` elements in the memory that the ranks share, if there is room; else in ordinary memory.
    at::Tensor allocate(long size, at::TensorOptions options);
    bool supportsSplitting() const override { return true; }
    c10::intrusive_ptr<c10d::Backend> split(const c10::intrusive_ptr<c10d::Store>& store, const std::vector<int>& ranks,
                                            const c10::intrusive_ptr<c10d::Backend::Options>& options) override;
    c10::intrusive_ptr<c10d::Backend> merge(const c10::intrusive_ptr<c10d::Store>& store,
                                            const c10::intrusive_ptr<c10d::Backend::Options>& options, const int& rank,
                                            const int& size) override;

    WorkPtr broadcast(Tensors& tensors, const c10d::BroadcastOptions& opts) override;
    WorkPtr allreduce(Tensors& tensors, const c10d::AllreduceOptions& opts) override;
    WorkPtr allreduce_sparse(Tensors& tensors, const c10d::AllreduceOptions& opts) override;
    WorkPtr allreduce_coalesced(Tensors& tensors, const c10d::AllreduceCoalescedOptions& opts) override;
    WorkPtr reduce(Tensors& tensors, const c10d::ReduceOptions& opts) override;
    WorkPtr allgather(std::vector<Tensors>& outputs, Tensors& inputs, const c10d::AllgatherOptions& opts) override;
    WorkPtr all_gather_single(at::Tensor& output, at::Tensor& input, const c10d::AllgatherOptions& opts) override;
    WorkPtr allgather_coalesced(std::vector<Tensors>& outputs, Tensors& inputs,
                                const c10d::AllgatherOptions& opts) override;
    WorkPtr all_gather_single_coalesced(Tensors& outputs, Tensors& inputs, const c10d::AllgatherOptions& opts) override;
    WorkPtr gather(std::vector<Tensors>& outputs, Tensors& inputs, const c10d::GatherOptions& opts) override;
    WorkPtr gather_single(at::Tensor& output, at::Tensor& input, const c10d::GatherOptions& opts) override;
    WorkPtr scatter(Tensors& outputs, std::vector<Tensors>& inputs, const c10d::ScatterOptions& opts) override;
    WorkPtr reduce_scatter(Tensors& outputs, std::vector<Tensors>& inputs,
                           const c10d::ReduceScatterOptions& opts) override;
    WorkPtr reduce_scatter_single(at::Tensor& output, at::Tensor& input,
                                  const c10d::ReduceScatterOptions& opts) override;
    WorkPtr reduce_scatter_single_coalesced(Tensors& outputs, Tensors& inputs,
                                            const c10d::ReduceScatterOptions& opts) override;
    WorkPtr alltoall(Tensors& outputs, Tensors& inputs, const c10d::AllToAllOptions& opts) override;
    WorkPtr all_to_all_single(at::Tensor& output, at::Tensor& input, std::vector<int64_t>& output_splits,
                              std::vector<int64_t>& input_splits, const c10d::AllToAllOptions& opts) override;
    WorkPtr send(Tensors& tensors, int to, int tag) override;
    WorkPtr recv(Tensors& tensors, int from, int tag) override;
    WorkPtr recvAnysource(Tensors& tensors, int tag) override;
    WorkPtr barrier(const c10d::BarrierOptions& opts) override;
    void monitoredBarrier(const c10d::BarrierOptions& opts, bool wait_all_ranks) override;

   private:
    struct Issue;

    WorkPtr issue(Issue issue);
    /// Keep what `shutdown` has to wait for.
    void remember(std::weak_ptr<Operation> issued, bool in_order);
    WorkPtr gather_all(const char* operation, c10d::OpType type, const Tensors& outputs, const Tensors& inputs,
                       const c10d::AllgatherOptions& opts);
    /// `wanted`: on the root one tensor for each rank, or one for all; empty elsewhere.
    WorkPtr gather_to(const char* title, int root, const Tensors& wanted, const at::Tensor& input,
                      const c10d::GatherOptions& opts);
    WorkPtr receive(Tensors& tensors, int from, int tag, c10d::OpType type);
    /// Reduce-scatter of parts of unequal size.
    WorkPtr reduce_to_each(const at::Tensor& output, const Tensors& inputs, const c10d::ReduceScatterOptions& opts);
    Call call(Kind kind, const at::Tensor& tensor, int64_t count, int64_t root = -1) const;
    const at::Tensor& only(const char* operation, const Tensors& tensors) const;
    int check_root(const char* operation, int64_t root) const;
    void check_usable(const char* operation) const;
    /// Say that this rank will do nothing more in the group.
    void leave();

    c10::intrusive_ptr<Options> options_;
    std::vector<int> names_;
    std::shared_ptr<Node> node_;
    std::atomic<uint64_t> sequence_{0};
    std::mutex issued_mutex_;
    // What may be under way; guarded by issued_mutex_. Not weak pointers of c10: those keep a Work with its tensors.
    // Collectives end in order; a receive may stay open as long as the group.
    std::deque<std::weak_ptr<Operation>> collectives_;
    std::vector<std::weak_ptr<Operation>> messages_;
    size_t swept_messages_ = 0;  // those that were left when the ended ones were last taken out
    std::atomic<bool> shut_{false}, left_{false};
};

}  // namespace pneumo
