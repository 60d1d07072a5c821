#pragma once

#include <array>
#include <chrono>
#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "../reduce/reduce.hpp"
#include "arena.hpp"
#include "engine.hpp"
#include "error.hpp"

namespace pneumo {

enum class Kind : uint8_t {
    ALLREDUCE,
    BROADCAST,
    REDUCE,
    ALLGATHER,
    GATHER,
    SCATTER,
    REDUCE_SCATTER,
    ALLTOALL,
    BARRIER,
    MONITORED_BARRIER
};

/// What a rank calls; every rank of a group must call the same.
struct Call {
    Kind kind = Kind::BARRIER;
    Op op = Op::SUM;
    uint8_t averages = 0;
    uint8_t reserved = 0;
    int32_t root = -1;
    uint64_t count = 0;           // elements, as the kind counts them; equal on all ranks
    std::array<char, 16> type{};  // the elements' type, as torch writes it

    std::string text() const;
    bool operator==(const Call&) const = default;
};

/// The ranks of a process group, wherever they are. The methods that return a Task are coroutines that run in the
/// engine, those of `lane()` one after the other in the same order on every rank. Buffers must stay alive and unaltered
/// until the operation is done; input and output may be the same address where that makes sense, else must not overlap.
class Communicator {
   public:
    virtual ~Communicator() = default;
    virtual Engine& engine() = 0;
    virtual Lane* lane() = 0;
    /// Memory for tensors that the ranks of this node read without a copy.
    virtual Arena* arena() = 0;
    /// The largest tag of a message.
    virtual int last_tag() const = 0;

    /// An operation of this group, ready to be submitted; `lane` null for point-to-point ones.
    virtual std::shared_ptr<Operation> operation(Operation::Body body, std::chrono::milliseconds timeout,
                                                 Lane* lane) = 0;

    /// out[i] = reduction over the ranks of in[i], `call.count` elements.
    virtual Task allreduce(Operation& operation, Call call, const void* in, void* out, DType dtype, Scale scale) = 0;
    /// As allreduce, but only the root's `out` is written.
    virtual Task reduce(Operation& operation, Call call, const void* in, void* out, DType dtype, Scale scale) = 0;
    /// out = reduction over the ranks of their in[my rank]; `call.count` elements each.
    virtual Task reduce_scatter(Operation& operation, Call call, std::vector<const void*> in, void* out, DType dtype,
                                Scale scale) = 0;
    /// `bytes` of the root's `data` to everybody's.
    virtual Task broadcast(Operation& operation, Call call, void* data, size_t bytes) = 0;
    /// out[k] = rank k's `in`, `bytes` each.
    virtual Task allgather(Operation& operation, Call call, const void* in, std::vector<void*> out, size_t bytes) = 0;
    /// As allgather, but only the root's `out` is written (and may be empty elsewhere).
    virtual Task gather(Operation& operation, Call call, const void* in, std::vector<void*> out, size_t bytes) = 0;
    /// out = the root's in[my rank] (`in` may be empty elsewhere), `bytes` each.
    virtual Task scatter(Operation& operation, Call call, std::vector<const void*> in, void* out, size_t bytes) = 0;
    /// out[k] = rank k's in[my rank]; sizes in bytes may differ by pair, and are checked.
    virtual Task alltoall(Operation& operation, Call call, std::vector<const void*> in, std::vector<size_t> in_bytes,
                          std::vector<void*> out, std::vector<size_t> out_bytes) = 0;
    virtual Task barrier(Operation& operation, Call call) = 0;

    /// Send to a rank; ends when the receiver has asked for it and all of it is under way.
    virtual Task send(Operation& operation, const void* data, size_t bytes, int to, int tag) = 0;
    /// Receive from a rank, or from any (`from` < 0); `source` is set to the rank it came from.
    virtual Task receive(Operation& operation, void* data, size_t bytes, int from, int tag, int* source) = 0;

    /// No operation from now on; pending ones and those of peers that wait for this rank end with an error.
    virtual void abort(const std::string& reason) = 0;
    /// This rank takes part no more; peers that still wait for it get an error. Messages of its own that no peer has
    /// taken end with one, too; collectives have ended before.
    virtual void leave() = 0;
    /// Why nothing can be done any more, empty while it can.
    virtual std::string broken() const = 0;
};

}  // namespace pneumo
