// Calls that only move data: broadcast, gather and scatter in their forms, all_to_all, messages, barriers.

#include "tensors.hpp"

namespace pneumo {

using c10d::OpType;

namespace {

/// How a tensor's first dimension is shared out among the ranks; no splits: evenly.
void check_splits(const char* operation, const at::Tensor& tensor, const std::vector<int64_t>& splits, int size) {
    const int64_t rows = tensor.dim() == 0 ? 1 : tensor.size(0);
    if (splits.empty()) {
        TORCH_CHECK(rows % size == 0, "pneumo: ", operation, " cannot share ", rows, " rows out among ", size,
                    " ranks");
        return;
    }
    TORCH_CHECK(static_cast<int>(splits.size()) == size, "pneumo: ", operation, " needs ", size, " splits, got ",
                splits.size());
    int64_t sum = 0;
    for (const auto split : splits) {
        TORCH_CHECK(split >= 0, "pneumo: ", operation, " got a negative split");
        sum += split;
    }
    TORCH_CHECK(sum == rows, "pneumo: ", operation, " got splits of ", sum, " rows for a tensor of ", rows);
}

void check_tag(const char* operation, int tag, const Communicator& group) {
    TORCH_CHECK(tag >= 0, "pneumo: ", operation, " needs a tag of at least 0, got ", tag);
    TORCH_CHECK(tag <= group.last_tag(), "pneumo: ", operation, " needs a tag of at most ", group.last_tag(),
                " between nodes, got ", tag);
}

}  // namespace

WorkPtr PneumoBackend::broadcast(Tensors& tensors, const c10d::BroadcastOptions& opts) {
    const at::Tensor& tensor = only("broadcast", tensors);
    const int root = check_root("broadcast", opts.rootRank);
    const bool mine = root == rank_;
    if (!mine) check_output("broadcast", tensor);
    const Call call = this->call(Kind::BROADCAST, tensor, tensor.numel(), root);
    const at::Tensor dense = tensor.contiguous();
    auto group = node_->communicator;
    const auto body = [group, call, dense, tensor, mine](Operation& operation) -> Task {
        co_await group->broadcast(operation, call, dense.data_ptr(), dense.nbytes());
        if (!mine) deliver({tensor}, {dense});
    };
    return issue({OpType::BROADCAST, "pneumo:broadcast", tensors, tensors, body, opts.timeout, opts.asyncOp});
}

WorkPtr PneumoBackend::allgather(std::vector<Tensors>& outputs, Tensors& inputs, const c10d::AllgatherOptions& opts) {
    const at::Tensor& input = only("all_gather", inputs);
    TORCH_CHECK(outputs.size() == 1 && outputs[0].size() == static_cast<size_t>(size_), "pneumo: all_gather needs ",
                size_, " output tensors");
    check_same("all_gather", outputs[0], input);
    const Call call = this->call(Kind::ALLGATHER, input, input.numel());
    const at::Tensor dense = input.contiguous();
    const Tensors wanted = outputs[0], rooms = rooms_for(wanted);
    auto group = node_->communicator;
    const auto body = [group, call, dense, wanted, rooms](Operation& operation) -> Task {
        co_await group->allgather(operation, call, dense.const_data_ptr(), pointers(rooms), dense.nbytes());
        deliver(wanted, rooms);
    };
    return issue({OpType::ALLGATHER, "pneumo:all_gather", inputs, wanted, body, opts.timeout, opts.asyncOp});
}

WorkPtr PneumoBackend::all_gather_single(at::Tensor& output, at::Tensor& input, const c10d::AllgatherOptions& opts) {
    return gather_all("all_gather_single", OpType::_ALLGATHER_BASE, {output}, {input}, opts);
}

WorkPtr PneumoBackend::all_gather_single_coalesced(Tensors& outputs, Tensors& inputs,
                                                   const c10d::AllgatherOptions& opts) {
    return gather_all("all_gather_single_coalesced", OpType::ALLGATHER_INTO_TENSOR_COALESCED, outputs, inputs, opts);
}

WorkPtr PneumoBackend::gather_all(const char* operation, OpType type, const Tensors& outputs, const Tensors& inputs,
                                  const c10d::AllgatherOptions& opts) {
    TORCH_CHECK(outputs.size() == inputs.size(), "pneumo: ", operation, " needs as many outputs as inputs");
    std::vector<Call> calls;
    for (const auto i : c10::irange(inputs.size())) {
        check_tensor(operation, inputs[i]);
        check_output(operation, outputs[i]);
        TORCH_CHECK(
            outputs[i].numel() == inputs[i].numel() * size_ && outputs[i].scalar_type() == inputs[i].scalar_type(),
            "pneumo: ", operation, " needs an output of ", inputs[i].numel() * size_, " x ", inputs[i].scalar_type(),
            ", got ", outputs[i].numel(), " x ", outputs[i].scalar_type());
        calls.push_back(call(Kind::ALLGATHER, inputs[i], inputs[i].numel()));
    }
    const Tensors dense = contiguous(inputs), rooms = rooms_for(outputs);
    auto group = node_->communicator;
    const int size = size_;
    const auto body = [group, calls, dense, outputs, rooms, size](Operation& operation) -> Task {
        for (size_t i = 0; i < calls.size(); ++i) {
            co_await group->allgather(operation, calls[i], dense[i].const_data_ptr(),
                                      parts(rooms[i], size, dense[i].nbytes()), dense[i].nbytes());
        }
        deliver(outputs, rooms);
    };
    return issue({type, "pneumo:all_gather_single", inputs, outputs, body, opts.timeout, opts.asyncOp});
}

WorkPtr PneumoBackend::allgather_coalesced(std::vector<Tensors>& outputs, Tensors& inputs,
                                           const c10d::AllgatherOptions& opts) {
    TORCH_CHECK(outputs.size() == static_cast<size_t>(size_), "pneumo: all_gather_coalesced needs ", size_,
                " output lists");
    std::vector<Call> calls;
    Tensors wanted;
    for (const auto i : c10::irange(inputs.size())) {
        check_tensor("all_gather_coalesced", inputs[i]);
        calls.push_back(call(Kind::ALLGATHER, inputs[i], inputs[i].numel()));
        for (const auto& list : outputs) {
            TORCH_CHECK(list.size() == inputs.size(), "pneumo: all_gather_coalesced needs lists of one length");
            check_same("all_gather_coalesced", {list[i]}, inputs[i]);
            wanted.push_back(list[i]);
        }
    }
    const Tensors dense = contiguous(inputs), rooms = rooms_for(wanted);
    auto group = node_->communicator;
    const auto size = static_cast<size_t>(size_);
    const auto body = [group, calls, dense, wanted, rooms, size](Operation& operation) -> Task {
        const auto places = pointers(rooms);
        for (size_t i = 0; i < calls.size(); ++i) {
            std::vector<void*> to(places.begin() + static_cast<std::ptrdiff_t>(i * size),
                                  places.begin() + static_cast<std::ptrdiff_t>((i + 1) * size));
            co_await group->allgather(operation, calls[i], dense[i].const_data_ptr(), std::move(to), dense[i].nbytes());
        }
        deliver(wanted, rooms);
    };
    return issue({OpType::ALLGATHER_COALESCED, "pneumo:all_gather_coalesced", inputs, wanted, body, opts.timeout,
                  opts.asyncOp, size_ > 1 ? outputs : std::vector<Tensors>()});
}

WorkPtr PneumoBackend::gather(std::vector<Tensors>& outputs, Tensors& inputs, const c10d::GatherOptions& opts) {
    const at::Tensor& input = only("gather", inputs);
    const int root = check_root("gather", opts.rootRank);
    Tensors wanted;
    if (root == rank_) {
        TORCH_CHECK(outputs.size() == 1 && outputs[0].size() == static_cast<size_t>(size_), "pneumo: gather needs ",
                    size_, " output tensors on the root");
        check_same("gather", outputs[0], input);
        wanted = outputs[0];
    } else {
        TORCH_CHECK(outputs.empty(), "pneumo: gather takes outputs on the root only");
    }
    return gather_to("pneumo:gather", root, wanted, input, opts);
}

WorkPtr PneumoBackend::gather_single(at::Tensor& output, at::Tensor& input, const c10d::GatherOptions& opts) {
    check_tensor("gather_single", input);
    const int root = check_root("gather_single", opts.rootRank);
    const bool mine = root == rank_;
    if (mine) {
        check_output("gather_single", output);
        TORCH_CHECK(output.numel() == input.numel() * size_ && output.scalar_type() == input.scalar_type(),
                    "pneumo: gather_single needs an output of ", size_, " times the input");
    }
    Tensors wanted;
    if (mine) wanted.push_back(output);
    return gather_to("pneumo:gather_single", root, wanted, input, opts);
}

WorkPtr PneumoBackend::gather_to(const char* title, int root, const Tensors& wanted, const at::Tensor& input,
                                 const c10d::GatherOptions& opts) {
    const Call call = this->call(Kind::GATHER, input, input.numel(), root);
    const at::Tensor dense = input.contiguous();
    const Tensors rooms = rooms_for(wanted);
    auto group = node_->communicator;
    const int size = size_;
    const auto body = [group, call, dense, wanted, rooms, size](Operation& operation) -> Task {
        auto to = rooms.size() == 1 ? parts(rooms[0], size, dense.nbytes()) : pointers(rooms);
        co_await group->gather(operation, call, dense.const_data_ptr(), std::move(to), dense.nbytes());
        deliver(wanted, rooms);
    };
    return issue({OpType::GATHER, title, {input}, wanted, body, opts.timeout, opts.asyncOp});
}

WorkPtr PneumoBackend::scatter(Tensors& outputs, std::vector<Tensors>& inputs, const c10d::ScatterOptions& opts) {
    const at::Tensor& output = only("scatter", outputs);
    check_output("scatter", output);
    const int root = check_root("scatter", opts.rootRank);
    Tensors dense;
    if (root == rank_) {
        TORCH_CHECK(inputs.size() == 1 && inputs[0].size() == static_cast<size_t>(size_), "pneumo: scatter needs ",
                    size_, " input tensors on the root");
        for (const auto& input : inputs[0]) check_tensor("scatter", input);
        check_sizes("scatter", inputs[0], output);
        dense = contiguous(inputs[0]);
    } else {
        TORCH_CHECK(inputs.empty(), "pneumo: scatter takes inputs on the root only");
    }
    const Call call = this->call(Kind::SCATTER, output, output.numel(), root);
    const at::Tensor wanted = output, room = room_for(output);
    auto group = node_->communicator;
    const auto body = [group, call, dense, wanted, room](Operation& operation) -> Task {
        co_await group->scatter(operation, call, const_pointers(dense), room.data_ptr(), room.nbytes());
        deliver({wanted}, {room});
    };
    return issue({OpType::SCATTER, "pneumo:scatter", dense, outputs, body, opts.timeout, opts.asyncOp});
}

WorkPtr PneumoBackend::alltoall(Tensors& outputs, Tensors& inputs, const c10d::AllToAllOptions& opts) {
    const auto size = static_cast<size_t>(size_);
    TORCH_CHECK(outputs.size() == size && inputs.size() == size, "pneumo: all_to_all needs ", size,
                " tensors in each list");
    std::vector<size_t> in_bytes, out_bytes;
    for (const auto k : c10::irange(size)) {
        check_tensor("all_to_all", inputs[k]);
        check_output("all_to_all", outputs[k]);
        TORCH_CHECK(
            inputs[k].scalar_type() == inputs[0].scalar_type() && outputs[k].scalar_type() == inputs[0].scalar_type(),
            "pneumo: all_to_all needs tensors of one type");
        in_bytes.push_back(inputs[k].nbytes());
        out_bytes.push_back(outputs[k].nbytes());
    }
    const Call call = this->call(Kind::ALLTOALL, inputs[0], 0);
    const Tensors dense = contiguous(inputs), wanted = outputs, rooms = rooms_for(wanted);
    auto group = node_->communicator;
    const auto body = [group, call, dense, wanted, rooms, in_bytes, out_bytes](Operation& operation) -> Task {
        co_await group->alltoall(operation, call, const_pointers(dense), in_bytes, pointers(rooms), out_bytes);
        deliver(wanted, rooms);
    };
    return issue({OpType::ALLTOALL, "pneumo:all_to_all", inputs, outputs, body, opts.timeout, opts.asyncOp});
}

WorkPtr PneumoBackend::all_to_all_single(at::Tensor& output, at::Tensor& input, std::vector<int64_t>& output_splits,
                                         std::vector<int64_t>& input_splits, const c10d::AllToAllOptions& opts) {
    check_tensor("all_to_all_single", input);
    check_output("all_to_all_single", output);
    TORCH_CHECK(output.scalar_type() == input.scalar_type(), "pneumo: all_to_all_single needs tensors of one type");
    check_splits("all_to_all_single", input, input_splits, size_);
    check_splits("all_to_all_single", output, output_splits, size_);
    const at::Tensor dense = input.contiguous(), wanted = output, room = room_for(output);
    const int size = size_;
    const auto cut = [size](const at::Tensor& tensor, const std::vector<int64_t>& splits) {
        std::vector<size_t> bytes(static_cast<size_t>(size));
        const auto row = tensor.dim() == 0 || tensor.size(0) == 0 ? 0 : bytes_of(tensor) / tensor.size(0);
        for (const auto k : c10::irange(bytes.size())) {
            bytes[k] = static_cast<size_t>(splits.empty() ? bytes_of(tensor) / size : splits[k] * row);
        }
        return bytes;
    };
    const auto in_bytes = cut(input, input_splits), out_bytes = cut(output, output_splits);
    const Call call = this->call(Kind::ALLTOALL, input, 0);
    auto group = node_->communicator;
    const auto body = [group, call, dense, wanted, room, in_bytes, out_bytes](Operation& operation) -> Task {
        std::vector<const void*> from;
        std::vector<void*> to;
        size_t in_begin = 0, out_begin = 0;
        for (size_t k = 0; k < in_bytes.size(); ++k) {
            from.push_back(static_cast<const std::byte*>(dense.const_data_ptr()) + in_begin);
            to.push_back(static_cast<std::byte*>(room.data_ptr()) + out_begin);
            in_begin += in_bytes[k], out_begin += out_bytes[k];
        }
        co_await group->alltoall(operation, call, std::move(from), in_bytes, std::move(to), out_bytes);
        deliver({wanted}, {room});
    };
    return issue(
        {OpType::ALLTOALL_BASE, "pneumo:all_to_all_single", {input}, {output}, body, opts.timeout, opts.asyncOp});
}

WorkPtr PneumoBackend::send(Tensors& tensors, int to, int tag) {
    check_tag("send", tag, *node_->communicator);
    const at::Tensor dense = only("send", tensors).contiguous();
    check_root("send", to);
    auto group = node_->communicator;
    const auto body = [group, dense, to, tag](Operation& operation) {
        return group->send(operation, dense.const_data_ptr(), dense.nbytes(), to, tag);
    };
    return issue({OpType::SEND, "pneumo:send", tensors, {}, body, c10d::kUnsetTimeout, true, {}, false});
}

WorkPtr PneumoBackend::recv(Tensors& tensors, int from, int tag) {
    check_root("recv", from);
    return receive(tensors, from, tag, OpType::RECV);
}

WorkPtr PneumoBackend::recvAnysource(Tensors& tensors, int tag) {
    return receive(tensors, -1, tag, OpType::RECVANYSOURCE);
}

WorkPtr PneumoBackend::receive(Tensors& tensors, int from, int tag, OpType type) {
    check_tag("recv", tag, *node_->communicator);
    check_output("recv", only("recv", tensors));
    const at::Tensor wanted = tensors[0], room = room_for(wanted);
    auto group = node_->communicator;
    auto source = std::make_shared<int>(-1);
    const auto body = [group, wanted, room, from, tag, source](Operation& operation) -> Task {
        co_await group->receive(operation, room.data_ptr(), room.nbytes(), from, tag, source.get());
        deliver({wanted}, {room});
    };
    auto work = issue({type, "pneumo:recv", {}, tensors, body, c10d::kUnsetTimeout, true, {}, false});
    static_cast<Work&>(*work).source = source;
    return work;
}

WorkPtr PneumoBackend::barrier(const c10d::BarrierOptions& opts) {
    auto group = node_->communicator;
    const auto body = [group](Operation& operation) { return group->barrier(operation, Call()); };
    return issue({OpType::BARRIER, "pneumo:barrier", {}, {}, body, opts.timeout, opts.asyncOp});
}

void PneumoBackend::monitoredBarrier(const c10d::BarrierOptions& opts, bool /*wait_all_ranks*/) {
    // Every rank learns all that are missing: more than is asked for in either case.
    auto group = node_->communicator;
    Call call;
    call.kind = Kind::MONITORED_BARRIER;
    const auto body = [group, call](Operation& operation) { return group->barrier(operation, call); };
    issue({OpType::BARRIER, "pneumo:monitored_barrier", {}, {}, body, opts.timeout, false})->wait();
}

}  // namespace pneumo
