// Calls that reduce: all_reduce in its forms, reduce, reduce_scatter.

#include <algorithm>
#include <optional>

#include "tensors.hpp"

namespace pneumo {
namespace {

using c10d::OpType;

/// How a reduction of c10d is done with what the kernels offer.
struct Reduction {
    DType dtype;
    Op op;
    Scale scale;
    bool averages;
    int64_t width;        // kernel elements in one of the tensor's: 2 for a complex number
    double factor = 1.0;  // by which this rank multiplies what it gives
    std::optional<at::ScalarType> wide = std::nullopt;  // as what it travels, where a sum would lose in its own type
};

std::optional<DType> dtype_of(at::ScalarType type) {
    switch (c10::toRealValueType(type)) {
        case at::kDouble: return DType::F64;
        case at::kFloat: return DType::F32;
        case at::kHalf: return DType::F16;
        case at::kBFloat16: return DType::BF16;
        case at::kChar: return DType::I8;
        case at::kShort: return DType::I16;
        case at::kInt: return DType::I32;
        case at::kLong: return DType::I64;
        case at::kByte: return DType::U8;
        case at::kUInt16: return DType::U16;
        case at::kUInt32: return DType::U32;
        case at::kUInt64: return DType::U64;
        case at::kBool: return DType::BOOL;
        default: return std::nullopt;
    }
}

Reduction reduction(const char* operation, const c10d::ReduceOp& op, at::ScalarType type, int size) {
    const auto dtype = dtype_of(type);
    TORCH_CHECK(dtype, "pneumo: ", operation, " does not support ", type);
    Reduction result{*dtype, Op::SUM, {}, false, c10::isComplexType(type) ? 2 : 1};
    switch (op.op_) {
        case c10d::ReduceOp::SUM: break;
        case c10d::ReduceOp::AVG:
            TORCH_CHECK(type != at::kBool, "pneumo: ", operation, " cannot average Booleans");
            result.scale.after = 1.0 / size;
            result.averages = true;
            if (c10::isIntegralType(type, false) && c10::elementSize(type) < 8) {  // an average fits, a sum may not
                result.wide = at::kLong;
                result.dtype = DType::I64;
            }
            break;
        case c10d::ReduceOp::PREMUL_SUM: {
            const auto* factor = static_cast<const c10d::PreMulSumSupplement*>(op.supplement_.get());
            TORCH_CHECK(factor != nullptr, "pneumo: ", operation, " with PREMUL_SUM needs a factor");
            result.factor =
                factor->tensor_factor.defined() ? factor->tensor_factor.item<double>() : factor->double_factor;
            if (result.dtype == DType::F16 || result.dtype == DType::BF16) {  // products are not rounded before the sum
                result.wide = at::kFloat;
                result.dtype = DType::F32;
            }
            break;
        }
        case c10d::ReduceOp::PRODUCT: result.op = Op::PRODUCT; break;
        case c10d::ReduceOp::MIN: result.op = Op::MIN; break;
        case c10d::ReduceOp::MAX: result.op = Op::MAX; break;
        case c10d::ReduceOp::BAND: result.op = Op::BAND; break;
        case c10d::ReduceOp::BOR: result.op = Op::BOR; break;
        case c10d::ReduceOp::BXOR: result.op = Op::BXOR; break;
        default: TORCH_CHECK(false, "pneumo: ", operation, " does not support this ReduceOp");
    }
    TORCH_CHECK(result.width == 1 || result.op == Op::SUM, "pneumo: ", operation, " of complex numbers can only sum");
    TORCH_CHECK(find_reduce(result.dtype, result.op) != nullptr, "pneumo: ", operation, " has no ", name_of(result.op),
                " for ", type);
    return result;
}

/// What this rank gives to a reduction: contiguous, and multiplied by its own factor, which other ranks need not share.
at::Tensor given(const at::Tensor& tensor, const Reduction& how) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const at::Tensor dense = how.wide ? tensor.to(*how.wide).contiguous() : tensor.contiguous();
    if (how.factor == 1.0) return dense;
    at::Tensor scaled = at::empty_like(dense);
    const void* from = dense.const_data_ptr();
    const auto count = static_cast<size_t>(dense.numel() * how.width);
    if (count > 0) find_reduce(how.dtype, Op::SUM)(scaled.data_ptr(), &from, 1, count, {how.factor, 1.0});
    return scaled;
}

Call reducing(Call call, const Reduction& how) {
    call.op = how.op, call.averages = how.averages;
    return call;
}

/// Where the result of a reduction comes to: the tensor itself where it can.
at::Tensor room_for_sum(const at::Tensor& tensor, const Reduction& how) {
    return how.wide ? at::empty(tensor.sizes(), tensor.options().dtype(*how.wide)) : room_for(tensor);
}

}  // namespace

WorkPtr PneumoBackend::allreduce(Tensors& tensors, const c10d::AllreduceOptions& opts) {
    if (tensors.size() == 1 && tensors[0].layout() == at::kSparse) return allreduce_sparse(tensors, opts);
    const at::Tensor& tensor = only("all_reduce", tensors);
    check_output("all_reduce", tensor);
    const auto how = reduction("all_reduce", opts.reduceOp, tensor.scalar_type(), size_);
    const Call call = reducing(this->call(Kind::ALLREDUCE, tensor, tensor.numel() * how.width), how);
    auto group = node_->communicator;
    if (tensor.is_contiguous() && how.factor == 1.0 && !how.wide) {
        void* data = tensor.data_ptr();
        const auto body = [group, call, how, data](Operation& operation) {
            return group->allreduce(operation, call, data, data, how.dtype, how.scale);
        };
        return issue({OpType::ALLREDUCE, "pneumo:all_reduce", tensors, tensors, body, opts.timeout, opts.asyncOp});
    }
    const at::Tensor dense = given(tensor, how);
    const auto body = [group, call, how, dense, tensor](Operation& operation) -> Task {
        co_await group->allreduce(operation, call, dense.data_ptr(), dense.data_ptr(), how.dtype, how.scale);
        deliver({tensor}, {dense});
    };
    return issue({OpType::ALLREDUCE, "pneumo:all_reduce", tensors, tensors, body, opts.timeout, opts.asyncOp});
}

WorkPtr PneumoBackend::allreduce_coalesced(Tensors& tensors, const c10d::AllreduceCoalescedOptions& opts) {
    TORCH_CHECK(!tensors.empty(), "pneumo: all_reduce_coalesced needs a tensor");
    for (const auto& tensor : tensors) {
        check_output("all_reduce_coalesced", tensor);
        TORCH_CHECK(tensor.scalar_type() == tensors[0].scalar_type(), "pneumo: all_reduce_coalesced got tensors of ",
                    tensor.scalar_type(), " and ", tensors[0].scalar_type());
    }
    const auto how = reduction("all_reduce_coalesced", opts.reduceOp, tensors[0].scalar_type(), size_);
    Tensors flat;
    for (const auto& tensor : tensors) flat.push_back(tensor.reshape({-1}));
    const at::AutoDispatchBelowADInplaceOrView guard;
    const at::Tensor all = given(at::cat(flat), how);
    const Call call = reducing(this->call(Kind::ALLREDUCE, all, all.numel() * how.width), how);
    auto group = node_->communicator;
    const auto body = [group, call, how, all, tensors](Operation& operation) -> Task {
        co_await group->allreduce(operation, call, all.data_ptr(), all.data_ptr(), how.dtype, how.scale);
        Tensors pieces;
        int64_t begin = 0;
        for (const auto& tensor : tensors) {
            pieces.push_back(all.narrow(0, begin, tensor.numel()).view(tensor.sizes()));
            begin += tensor.numel();
        }
        deliver(tensors, pieces);
    };
    return issue({OpType::ALLREDUCE_COALESCED, "pneumo:all_reduce_coalesced", tensors, tensors, body, opts.timeout,
                  opts.asyncOp});
}

WorkPtr PneumoBackend::allreduce_sparse(Tensors& tensors, const c10d::AllreduceOptions& opts) {
    TORCH_CHECK(tensors.size() == 1 && tensors[0].layout() == at::kSparse,
                "pneumo: all_reduce_sparse needs one sparse tensor");
    TORCH_CHECK(opts.reduceOp == c10d::ReduceOp::SUM, "pneumo: all_reduce of sparse tensors can only sum");
    const at::Tensor tensor = tensors[0], mine = tensor.coalesce();
    const at::Tensor indices = mine._indices().contiguous(), values = mine._values().contiguous();
    auto group = node_->communicator;
    const int size = size_;
    const Call sizes = call(Kind::ALLGATHER, indices, 1);
    int64_t row = 1;  // elements of a value
    for (const auto length : values.sizes().slice(1)) row *= length;
    const Call base = call(Kind::ALLGATHER, values, row);
    const auto body = [group, size, sizes, base, tensor, indices, values](Operation& operation) -> Task {
        // Every rank has another number of entries: exchange the numbers, then entries padded to the largest.
        int64_t entries = values.size(0);
        std::vector<int64_t> counts(static_cast<size_t>(size));
        std::vector<void*> places;
        for (auto& count : counts) places.push_back(&count);
        co_await group->allgather(operation, sizes, &entries, places, sizeof(int64_t));
        const int64_t most = *std::max_element(counts.begin(), counts.end());
        const auto gather = [&](const at::Tensor& part, int64_t dimension) {
            auto shape = part.sizes().vec();
            shape[static_cast<size_t>(dimension)] = most;
            at::Tensor padded = at::zeros(shape, part.options());
            padded.narrow(dimension, 0, entries).copy_(part);
            return padded;
        };
        Tensors all_indices, all_values;
        {
            const at::AutoDispatchBelowADInplaceOrView guard;
            all_indices.push_back(gather(indices, 1));
            all_values.push_back(gather(values, 0));
            for (int k = 0; k < size; ++k) {
                all_indices.push_back(at::empty_like(all_indices[0]));
                all_values.push_back(at::empty_like(all_values[0]));
            }
        }
        const auto outputs = [](const Tensors& tensors) {
            return pointers(Tensors(tensors.begin() + 1, tensors.end()));
        };
        co_await group->allgather(operation, base, all_indices[0].data_ptr(), outputs(all_indices),
                                  all_indices[0].nbytes());
        co_await group->allgather(operation, base, all_values[0].data_ptr(), outputs(all_values),
                                  all_values[0].nbytes());
        const at::AutoDispatchBelowADInplaceOrView guard;
        Tensors index_parts, value_parts;
        for (size_t k = 0; k < counts.size(); ++k) {
            index_parts.push_back(all_indices[k + 1].narrow(1, 0, counts[k]));
            value_parts.push_back(all_values[k + 1].narrow(0, 0, counts[k]));
        }
        const at::Tensor sum =
            at::sparse_coo_tensor(at::cat(index_parts, 1), at::cat(value_parts, 0), tensor.sizes()).coalesce();
        tensor.copy_(sum);
    };
    return issue(
        {OpType::_ALLREDUCE_SPARSE, "pneumo:all_reduce_sparse", tensors, tensors, body, opts.timeout, opts.asyncOp});
}

WorkPtr PneumoBackend::reduce(Tensors& tensors, const c10d::ReduceOptions& opts) {
    const at::Tensor& tensor = only("reduce", tensors);
    const int root = check_root("reduce", opts.rootRank);
    const auto how = reduction("reduce", opts.reduceOp, tensor.scalar_type(), size_);
    const Call call = reducing(this->call(Kind::REDUCE, tensor, tensor.numel() * how.width, root), how);
    if (root == rank_) check_output("reduce", tensor);
    const at::Tensor dense = given(tensor, how), room = root == rank_ ? room_for_sum(tensor, how) : at::Tensor();
    auto group = node_->communicator;
    const auto body = [group, call, how, dense, tensor, room](Operation& operation) -> Task {
        void* out = room.defined() ? room.data_ptr() : nullptr;
        co_await group->reduce(operation, call, dense.const_data_ptr(), out, how.dtype, how.scale);
        if (room.defined()) deliver({tensor}, {room});
    };
    return issue({OpType::REDUCE, "pneumo:reduce", tensors, tensors, body, opts.timeout, opts.asyncOp});
}

WorkPtr PneumoBackend::reduce_scatter(Tensors& outputs, std::vector<Tensors>& inputs,
                                      const c10d::ReduceScatterOptions& opts) {
    const at::Tensor& output = only("reduce_scatter", outputs);
    TORCH_CHECK(inputs.size() == 1 && inputs[0].size() == static_cast<size_t>(size_), "pneumo: reduce_scatter needs ",
                size_, " input tensors");
    check_output("reduce_scatter", output);
    for (const auto& input : inputs[0]) check_tensor("reduce_scatter", input);
    const bool even = std::all_of(inputs[0].begin(), inputs[0].end(),
                                  [&](const at::Tensor& input) { return input.numel() == inputs[0][0].numel(); });
    if (!even) return reduce_to_each(output, inputs[0], opts);
    check_sizes("reduce_scatter", inputs[0], output);
    const auto how = reduction("reduce_scatter", opts.reduceOp, output.scalar_type(), size_);
    const Call call = reducing(this->call(Kind::REDUCE_SCATTER, output, output.numel() * how.width), how);
    Tensors dense;
    for (const auto& input : inputs[0]) dense.push_back(given(input, how));
    const at::Tensor wanted = output, room = room_for_sum(output, how);
    auto group = node_->communicator;
    const auto body = [group, call, how, dense, wanted, room](Operation& operation) -> Task {
        co_await group->reduce_scatter(operation, call, const_pointers(dense), room.data_ptr(), how.dtype, how.scale);
        deliver({wanted}, {room});
    };
    return issue(
        {OpType::REDUCE_SCATTER, "pneumo:reduce_scatter", inputs[0], outputs, body, opts.timeout, opts.asyncOp});
}

WorkPtr PneumoBackend::reduce_to_each(const at::Tensor& output, const Tensors& inputs,
                                      const c10d::ReduceScatterOptions& opts) {
    check_sizes("reduce_scatter", {inputs[static_cast<size_t>(rank_)]}, output);
    const auto how = reduction("reduce_scatter", opts.reduceOp, output.scalar_type(), size_);
    std::vector<Call> calls;
    Tensors dense;
    for (const auto k : c10::irange(size_)) {
        const at::Tensor& input = inputs[static_cast<size_t>(k)];
        TORCH_CHECK(input.scalar_type() == output.scalar_type(), "pneumo: reduce_scatter got tensors of ",
                    input.scalar_type(), " and ", output.scalar_type());
        calls.push_back(reducing(call(Kind::REDUCE, input, input.numel() * how.width, k), how));
        dense.push_back(given(input, how));
    }
    const at::Tensor wanted = output, room = room_for_sum(output, how);
    auto group = node_->communicator;
    const int me = rank_;
    const auto body = [group, calls, how, dense, wanted, room, me](Operation& operation) -> Task {
        for (size_t k = 0; k < calls.size(); ++k) {
            void* out = static_cast<int>(k) == me ? room.data_ptr() : nullptr;
            co_await group->reduce(operation, calls[k], dense[k].const_data_ptr(), out, how.dtype, how.scale);
        }
        deliver({wanted}, {room});
    };
    return issue({OpType::REDUCE_SCATTER, "pneumo:reduce_scatter", inputs, {output}, body, opts.timeout, opts.asyncOp});
}

WorkPtr PneumoBackend::reduce_scatter_single(at::Tensor& output, at::Tensor& input,
                                             const c10d::ReduceScatterOptions& opts) {
    Tensors outputs{output}, inputs{input};
    return reduce_scatter_single_coalesced(outputs, inputs, opts);
}

WorkPtr PneumoBackend::reduce_scatter_single_coalesced(Tensors& outputs, Tensors& inputs,
                                                       const c10d::ReduceScatterOptions& opts) {
    TORCH_CHECK(!inputs.empty() && outputs.size() == inputs.size(),
                "pneumo: reduce_scatter_single needs as many outputs as inputs");
    std::vector<std::pair<Call, Reduction>> calls;
    for (const auto i : c10::irange(inputs.size())) {
        check_tensor("reduce_scatter_single", inputs[i]);
        check_output("reduce_scatter_single", outputs[i]);
        TORCH_CHECK(
            inputs[i].numel() == outputs[i].numel() * size_ && inputs[i].scalar_type() == outputs[i].scalar_type(),
            "pneumo: reduce_scatter_single needs an input of ", outputs[i].numel() * size_, " x ",
            outputs[i].scalar_type(), ", got ", inputs[i].numel(), " x ", inputs[i].scalar_type());
        const auto how = reduction("reduce_scatter_single", opts.reduceOp, inputs[i].scalar_type(), size_);
        const Call call = reducing(this->call(Kind::REDUCE_SCATTER, outputs[i], outputs[i].numel() * how.width), how);
        calls.emplace_back(call, how);
    }
    Tensors dense;
    for (const auto i : c10::irange(inputs.size())) dense.push_back(given(inputs[i], calls[i].second));
    const Tensors wanted = outputs;
    Tensors rooms;
    for (const auto i : c10::irange(wanted.size())) rooms.push_back(room_for_sum(wanted[i], calls[i].second));
    auto group = node_->communicator;
    const int size = size_;
    const auto body = [group, calls, dense, wanted, rooms, size](Operation& operation) -> Task {
        for (size_t i = 0; i < calls.size(); ++i) {
            const auto& [call, how] = calls[i];
            const auto from = parts(dense[i], size, rooms[i].nbytes());
            co_await group->reduce_scatter(operation, call, {from.begin(), from.end()}, rooms[i].data_ptr(), how.dtype,
                                           how.scale);
        }
        deliver(wanted, rooms);
    };
    const bool one = inputs.size() == 1;
    return issue({one ? OpType::_REDUCE_SCATTER_BASE : OpType::REDUCE_SCATTER_TENSOR_COALESCED,
                  "pneumo:reduce_scatter_single", inputs, outputs, body, opts.timeout, opts.asyncOp});
}

}  // namespace pneumo
