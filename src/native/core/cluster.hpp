#pragma once

#include "group.hpp"
#include "wire.hpp"

namespace pneumo {

/// The ranks of a process group that are on several nodes: shared memory within each, a wire between them.
///
/// Where all nodes have equally many ranks, every rank exchanges its own part with the ranks of the same place on the
/// other nodes, so that all of them feed the network; otherwise the first rank of each node speaks for it.
class Cluster final : public Communicator {
   public:
    /// `nodes[k]` lists the group's ranks on node k in ascending order; `local` joins those of this rank's node.
    Cluster(std::shared_ptr<Group> local, std::unique_ptr<Wire> wire, int rank, std::vector<std::vector<int>> nodes,
            std::vector<int> names);
    ~Cluster() override;

    Engine& engine() override { return local_->engine(); }
    Lane* lane() override { return &lane_; }
    Arena* arena() override { return local_->arena(); }
    int last_tag() const override { return last_tag_; }
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
    void abort(const std::string& reason) override { local_->abort(reason); }
    void leave() override;
    std::string broken() const override { return local_->broken(); }

    /// Abort all clusters of this process that it has not left; for the end of the process.
    static void abort_all(const std::string& reason);

   private:
    struct Message {
        enum Way { TO, FROM } way;
        int peer;
        const void* data;  // written to if it comes FROM the peer
        size_t bytes;
    };

    /// Throws on all ranks of all nodes if they do not call the same.
    Task agree(Operation& operation, const Call& call);
    /// Pass messages that do not depend on each other.
    Task pass(Operation& operation, std::vector<Message> messages);
    Task give(Operation& operation, int to, const void* data, size_t bytes);
    Task take(Operation& operation, int from, void* data, size_t bytes);
    Task pass(Operation& operation, int to, const void* data, size_t bytes, int from, void* room, size_t room_bytes);
    /// Reduce the nodes' partial results: `peers[k]` on node k holds one of `count` elements in `data`, where the sum
    /// comes to.
    Task ring(Operation& operation, const std::vector<int>& peers, std::byte* data, size_t count, DType dtype, Op op,
              Scale scale);
    /// Tell the ranks on other nodes why nothing can be done any more, and hear what they say of that.
    void tell(const std::string& reason);
    void hear();
    void forget();
    std::string name(int rank) const;
    Call local_call(Kind kind, size_t count, const Call& like) const;
    bool here(int rank) const { return node_of_[static_cast<size_t>(rank)] == node_; }
    int place_of(int rank) const { return place_of_[static_cast<size_t>(rank)]; }
    const std::vector<int>& mine() const { return nodes_[static_cast<size_t>(node_)]; }
    /// The ranks of the same place (or the first ones) on every node.
    std::vector<int> peers(size_t place) const;
    /// Memory of the operation that runs: a small one's is kept for the next, a large one's is freed at its end.
    struct Scratch {
        std::unique_ptr<std::byte[]> large;
        std::byte* data;
    };
    Scratch scratch(size_t bytes);

    std::shared_ptr<Group> local_;
    std::unique_ptr<Wire> wire_;
    int rank_;
    std::vector<std::vector<int>> nodes_;
    std::vector<int> names_, node_of_, place_of_;
    int last_tag_;
    int node_ = 0;
    bool uniform_ = true;
    Lane lane_;
    std::unique_ptr<std::byte[]> scratch_;
    size_t scratch_bytes_ = 0;
    std::string doing_;      // the collective that runs, for an error's sentence
    uint64_t sequence_ = 0;  // of collectives
    std::string last_words_, heard_;
    std::unique_ptr<Wire::Request> hearing_;
    Clock::time_point heard_at_{};
    std::vector<std::unique_ptr<Wire::Request>> last_requests_;
};

}  // namespace pneumo
