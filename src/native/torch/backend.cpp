#include "backend.hpp"

#include <ATen/Functions.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/util/irange.h>
#include <unistd.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>

namespace pneumo {
namespace {

using c10d::OpType;

/// How a reduction of c10d is done with what the kernels offer.
struct Reduction {
    DType dtype;
    Op op;
    Scale scale;
    bool averages;
    int64_t factor;  // kernel elements in one of the tensor's: 2 for a complex number
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
            break;
        case c10d::ReduceOp::PREMUL_SUM: {
            const auto* factor = static_cast<const c10d::PreMulSumSupplement*>(op.supplement_.get());
            TORCH_CHECK(factor != nullptr, "pneumo: ", operation, " with PREMUL_SUM needs a factor");
            result.scale.before =
                factor->tensor_factor.defined() ? factor->tensor_factor.item<double>() : factor->double_factor;
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
    TORCH_CHECK(result.factor == 1 || result.op == Op::SUM, "pneumo: ", operation, " of complex numbers can only sum");
    TORCH_CHECK(find_reduce(result.dtype, result.op) != nullptr, "pneumo: ", operation, " has no ", name_of(result.op),
                " for ", type);
    return result;
}

int64_t bytes_of(const at::Tensor& tensor) { return static_cast<int64_t>(tensor.nbytes()); }

/// A contiguous tensor with the place of `tensor`, where it is one itself, else new and of the same shape.
at::Tensor room_for(const at::Tensor& tensor) {
    return tensor.is_contiguous() ? tensor : at::empty(tensor.sizes(), tensor.options());
}

/// Copy what arrived in `rooms` to where it was wanted.
void deliver(const Tensors& outputs, const Tensors& rooms) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    for (const auto i : c10::irange(outputs.size())) {
        if (!outputs[i].is_same(rooms[i])) outputs[i].copy_(rooms[i]);
    }
}

std::vector<void*> pointers(const Tensors& tensors) {
    std::vector<void*> addresses;
    for (const auto& tensor : tensors) addresses.push_back(tensor.data_ptr());
    return addresses;
}

std::vector<const void*> const_pointers(const Tensors& tensors) {
    std::vector<const void*> addresses;
    for (const auto& tensor : tensors) addresses.push_back(tensor.const_data_ptr());
    return addresses;
}

/// The parts of a contiguous buffer that begin at multiples of `bytes`.
std::vector<void*> parts(const at::Tensor& tensor, int count, size_t bytes) {
    std::vector<void*> addresses;
    for (const auto k : c10::irange(count))
        addresses.push_back(static_cast<std::byte*>(tensor.data_ptr()) + static_cast<size_t>(k) * bytes);
    return addresses;
}

Tensors contiguous(const Tensors& tensors) {
    Tensors result;
    const at::AutoDispatchBelowADInplaceOrView guard;
    for (const auto& tensor : tensors) result.push_back(tensor.contiguous());
    return result;
}

Tensors rooms_for(const Tensors& tensors) {
    Tensors result;
    for (const auto& tensor : tensors) result.push_back(room_for(tensor));
    return result;
}

void check_same(const char* operation, const Tensors& tensors, const at::Tensor& like) {
    for (const auto& tensor : tensors) {
        TORCH_CHECK(tensor.scalar_type() == like.scalar_type(), "pneumo: ", operation, " got tensors of ",
                    tensor.scalar_type(), " and ", like.scalar_type());
        TORCH_CHECK(tensor.numel() == like.numel(), "pneumo: ", operation, " got tensors of ", tensor.numel(), " and ",
                    like.numel(), " elements");
    }
}

}  // namespace

/// All that is needed to start an operation: `body` runs in the engine and must capture what it uses by value.
struct PneumoBackend::Issue {
    OpType type;
    const char* title;
    Tensors inputs;
    Tensors outputs;
    Operation::Body body;
    std::chrono::milliseconds timeout = c10d::kUnsetTimeout;
    bool async = true;
    bool in_order = true;  // with the other collectives of the group
};

PneumoBackend::PneumoBackend(const c10::intrusive_ptr<c10d::Store>& store, int rank, int size, std::vector<int> names,
                             std::chrono::milliseconds timeout)
    : Backend(rank, size), options_(c10::make_intrusive<Options>(timeout)), names_(std::move(names)) {
    if (names_.empty()) {
        names_.resize(static_cast<size_t>(size));
        std::iota(names_.begin(), names_.end(), 0);
    }
    try {
        node_ = bootstrap(*store, rank, size, names_, timeout);
    } catch (const Error&) {
        std::rethrow_exception(as_torch_error(std::current_exception()));
    }
    init();
}

PneumoBackend::~PneumoBackend() { shutdown(); }

void PneumoBackend::shutdown() {
    if (!node_ || shut_.exchange(true) || !node_->communicator->engine().usable()) return;
    node_->communicator->leave();
}

void PneumoBackend::abort() {
    if (!node_->communicator->engine().usable()) return;
    node_->communicator->abort("the process group was aborted");
}

c10d::ErrorType PneumoBackend::getError() {
    return node_->communicator->broken().empty() ? c10d::ErrorType::SUCCESS : c10d::ErrorType::COMM_ERROR;
}

c10::intrusive_ptr<c10d::Backend> PneumoBackend::split(const c10::intrusive_ptr<c10d::Store>& store,
                                                       const std::vector<int>& ranks,
                                                       const c10::intrusive_ptr<c10d::Backend::Options>& options) {
    const auto mine = std::find(ranks.begin(), ranks.end(), rank_);
    if (mine == ranks.end()) return nullptr;
    std::vector<int> names;
    for (const int rank : ranks) names.push_back(names_.at(static_cast<size_t>(rank)));
    return c10::make_intrusive<PneumoBackend>(store, static_cast<int>(mine - ranks.begin()),
                                              static_cast<int>(ranks.size()), std::move(names),
                                              options ? options->timeout : options_->timeout);
}

c10::intrusive_ptr<c10d::Backend> PneumoBackend::merge(const c10::intrusive_ptr<c10d::Store>& store,
                                                       const c10::intrusive_ptr<c10d::Backend::Options>& options,
                                                       const int& rank, const int& size) {
    return c10::make_intrusive<PneumoBackend>(store, rank, size, std::vector<int>{},
                                              options ? options->timeout : options_->timeout);
}

void PneumoBackend::check_usable(const char* operation) const {
    TORCH_CHECK(node_->communicator->engine().usable(), "pneumo: ", operation,
                " in a process that was forked from one which uses this backend");
    TORCH_CHECK_WITH(DistBackendError, !shut_, "pneumo: ", operation, " on a process group that was shut down");
}

void PneumoBackend::check_tensor(const char* operation, const at::Tensor& tensor) const {
    TORCH_CHECK(tensor.device().is_cpu(), "pneumo: ", operation, " needs CPU tensors, this one is on ",
                tensor.device());
    TORCH_CHECK(tensor.layout() == at::kStrided, "pneumo: ", operation, " does not support ", tensor.layout(),
                " tensors");
}

const at::Tensor& PneumoBackend::only(const char* operation, const Tensors& tensors) const {
    TORCH_CHECK(tensors.size() == 1, "pneumo: ", operation, " needs one tensor a rank, got ", tensors.size());
    check_tensor(operation, tensors[0]);
    return tensors[0];
}

int PneumoBackend::check_root(const char* operation, int64_t root) const {
    TORCH_CHECK(root >= 0 && root < size_, "pneumo: ", operation, " has no rank ", root, " in a group of ", size_);
    return static_cast<int>(root);
}

Call PneumoBackend::call(Kind kind, const at::Tensor& tensor, int64_t count, int64_t root) const {
    Call call;
    call.kind = kind;
    call.root = static_cast<int32_t>(root);
    call.count = static_cast<uint64_t>(count);
    c10::getDtypeNames(tensor.scalar_type()).first.copy(call.type.data(), call.type.size() - 1);
    return call;
}

WorkPtr PneumoBackend::issue(Issue issue) {
    check_usable(issue.title);
    const auto timeout = issue.timeout == c10d::kUnsetTimeout ? options_->timeout : issue.timeout;
    Communicator& group = *node_->communicator;
    auto work = c10::make_intrusive<Work>(group.engine(), rank_, issue.type, issue.title, std::move(issue.inputs),
                                          std::move(issue.outputs), issue.in_order ? ++sequence_ : sequence_.load());
    auto operation = group.operation(std::move(issue.body), timeout, issue.in_order ? group.lane() : nullptr);
    operation->owner = node_;
    work->submit(std::move(operation), !issue.async);
    return work;
}

WorkPtr PneumoBackend::allreduce(Tensors& tensors, const c10d::AllreduceOptions& opts) {
    if (tensors.size() == 1 && tensors[0].layout() == at::kSparse) return allreduce_sparse(tensors, opts);
    const at::Tensor& tensor = only("all_reduce", tensors);
    const auto how = reduction("all_reduce", opts.reduceOp, tensor.scalar_type(), size_);
    Call call = this->call(Kind::ALLREDUCE, tensor, tensor.numel() * how.factor);
    call.op = how.op, call.averages = how.averages;
    auto group = node_->communicator;
    if (tensor.is_contiguous()) {
        void* data = tensor.data_ptr();
        const auto body = [group, call, how, data](Operation& operation) {
            return group->allreduce(operation, call, data, data, how.dtype, how.scale);
        };
        return issue({OpType::ALLREDUCE, "pneumo:all_reduce", tensors, tensors, body, opts.timeout, opts.asyncOp});
    }
    const at::Tensor dense = tensor.contiguous();
    const auto body = [group, call, how, dense, tensor](Operation& operation) -> Task {
        co_await group->allreduce(operation, call, dense.data_ptr(), dense.data_ptr(), how.dtype, how.scale);
        deliver({tensor}, {dense});
    };
    return issue({OpType::ALLREDUCE, "pneumo:all_reduce", tensors, tensors, body, opts.timeout, opts.asyncOp});
}

WorkPtr PneumoBackend::allreduce_coalesced(Tensors& tensors, const c10d::AllreduceCoalescedOptions& opts) {
    TORCH_CHECK(!tensors.empty(), "pneumo: all_reduce_coalesced needs a tensor");
    for (const auto& tensor : tensors) {
        check_tensor("all_reduce_coalesced", tensor);
        TORCH_CHECK(tensor.scalar_type() == tensors[0].scalar_type(), "pneumo: all_reduce_coalesced got tensors of ",
                    tensor.scalar_type(), " and ", tensors[0].scalar_type());
    }
    const auto how = reduction("all_reduce_coalesced", opts.reduceOp, tensors[0].scalar_type(), size_);
    Tensors flat;
    for (const auto& tensor : tensors) flat.push_back(tensor.reshape({-1}));
    const at::AutoDispatchBelowADInplaceOrView guard;
    const at::Tensor all = at::cat(flat);
    Call call = this->call(Kind::ALLREDUCE, all, all.numel() * how.factor);
    call.op = how.op, call.averages = how.averages;
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
    Call sizes = call(Kind::ALLGATHER, indices, 1);
    const Call base =
        call(Kind::ALLGATHER, values, values.dim() > 0 ? values.numel() / std::max<int64_t>(1, values.size(0)) : 0);
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
        Call call = base;
        co_await group->allgather(operation, call, all_indices[0].data_ptr(), outputs(all_indices),
                                  all_indices[0].nbytes());
        co_await group->allgather(operation, call, all_values[0].data_ptr(), outputs(all_values),
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

WorkPtr PneumoBackend::broadcast(Tensors& tensors, const c10d::BroadcastOptions& opts) {
    const at::Tensor& tensor = only("broadcast", tensors);
    const int root = check_root("broadcast", opts.rootRank);
    const Call call = this->call(Kind::BROADCAST, tensor, tensor.numel(), root);
    const at::Tensor dense = tensor.contiguous();
    auto group = node_->communicator;
    const auto body = [group, call, dense, tensor](Operation& operation) -> Task {
        co_await group->broadcast(operation, call, dense.data_ptr(), dense.nbytes());
        deliver({tensor}, {dense});
    };
    return issue({OpType::BROADCAST, "pneumo:broadcast", tensors, tensors, body, opts.timeout, opts.asyncOp});
}

WorkPtr PneumoBackend::reduce(Tensors& tensors, const c10d::ReduceOptions& opts) {
    const at::Tensor& tensor = only("reduce", tensors);
    const int root = check_root("reduce", opts.rootRank);
    const auto how = reduction("reduce", opts.reduceOp, tensor.scalar_type(), size_);
    Call call = this->call(Kind::REDUCE, tensor, tensor.numel() * how.factor, root);
    call.op = how.op, call.averages = how.averages;
    const at::Tensor dense = tensor.contiguous();
    auto group = node_->communicator;
    const auto body = [group, call, how, dense, tensor](Operation& operation) -> Task {
        co_await group->reduce(operation, call, dense.data_ptr(), dense.data_ptr(), how.dtype, how.scale);
        deliver({tensor}, {dense});
    };
    return issue({OpType::REDUCE, "pneumo:reduce", tensors, tensors, body, opts.timeout, opts.asyncOp});
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
    check_tensor("all_gather_single", input);
    check_tensor("all_gather_single", output);
    TORCH_CHECK(output.scalar_type() == input.scalar_type() && output.numel() == input.numel() * size_,
                "pneumo: all_gather_single needs an output of ", input.numel() * size_, " x ", input.scalar_type(),
                ", got ", output.numel(), " x ", output.scalar_type());
    const Call call = this->call(Kind::ALLGATHER, input, input.numel());
    const at::Tensor dense = input.contiguous(), wanted = output, room = room_for(output);
    auto group = node_->communicator;
    const int size = size_;
    const auto body = [group, call, dense, wanted, room, size](Operation& operation) -> Task {
        co_await group->allgather(operation, call, dense.const_data_ptr(), parts(room, size, dense.nbytes()),
                                  dense.nbytes());
        deliver({wanted}, {room});
    };
    return issue(
        {OpType::_ALLGATHER_BASE, "pneumo:all_gather_single", {input}, {output}, body, opts.timeout, opts.asyncOp});
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
    return issue(
        {OpType::ALLGATHER_COALESCED, "pneumo:all_gather_coalesced", inputs, wanted, body, opts.timeout, opts.asyncOp});
}

WorkPtr PneumoBackend::all_gather_single_coalesced(Tensors& outputs, Tensors& inputs,
                                                   const c10d::AllgatherOptions& opts) {
    TORCH_CHECK(outputs.size() == inputs.size(), "pneumo: all_gather_single_coalesced needs as many outputs as inputs");
    std::vector<Call> calls;
    for (const auto i : c10::irange(inputs.size())) {
        check_tensor("all_gather_single_coalesced", inputs[i]);
        TORCH_CHECK(
            outputs[i].numel() == inputs[i].numel() * size_ && outputs[i].scalar_type() == inputs[i].scalar_type(),
            "pneumo: all_gather_single_coalesced needs outputs of ", size_, " times the input");
        calls.push_back(call(Kind::ALLGATHER, inputs[i], inputs[i].numel()));
    }
    const Tensors dense = contiguous(inputs), wanted = outputs, rooms = rooms_for(wanted);
    auto group = node_->communicator;
    const int size = size_;
    const auto body = [group, calls, dense, wanted, rooms, size](Operation& operation) -> Task {
        for (size_t i = 0; i < calls.size(); ++i) {
            co_await group->allgather(operation, calls[i], dense[i].const_data_ptr(),
                                      parts(rooms[i], size, dense[i].nbytes()), dense[i].nbytes());
        }
        deliver(wanted, rooms);
    };
    return issue({OpType::ALLGATHER_INTO_TENSOR_COALESCED, "pneumo:all_gather_single_coalesced", inputs, wanted, body,
                  opts.timeout, opts.asyncOp});
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
    const Call call = this->call(Kind::GATHER, input, input.numel(), root);
    const at::Tensor dense = input.contiguous();
    const Tensors rooms = rooms_for(wanted);
    auto group = node_->communicator;
    const auto body = [group, call, dense, wanted, rooms](Operation& operation) -> Task {
        co_await group->gather(operation, call, dense.const_data_ptr(), pointers(rooms), dense.nbytes());
        deliver(wanted, rooms);
    };
    return issue({OpType::GATHER, "pneumo:gather", inputs, wanted, body, opts.timeout, opts.asyncOp});
}

WorkPtr PneumoBackend::gather_single(at::Tensor& output, at::Tensor& input, const c10d::GatherOptions& opts) {
    check_tensor("gather_single", input);
    const int root = check_root("gather_single", opts.rootRank);
    const bool mine = root == rank_;
    if (mine) {
        check_tensor("gather_single", output);
        TORCH_CHECK(output.numel() == input.numel() * size_ && output.scalar_type() == input.scalar_type(),
                    "pneumo: gather_single needs an output of ", size_, " times the input");
    }
    const Call call = this->call(Kind::GATHER, input, input.numel(), root);
    const at::Tensor dense = input.contiguous();
    Tensors wanted;
    if (mine) wanted.push_back(output);
    const Tensors rooms = rooms_for(wanted);
    auto group = node_->communicator;
    const int size = size_;
    const auto body = [group, call, dense, wanted, rooms, size](Operation& operation) -> Task {
        auto to = rooms.empty() ? std::vector<void*>() : parts(rooms[0], size, dense.nbytes());
        co_await group->gather(operation, call, dense.const_data_ptr(), std::move(to), dense.nbytes());
        deliver(wanted, rooms);
    };
    return issue({OpType::GATHER, "pneumo:gather_single", {input}, wanted, body, opts.timeout, opts.asyncOp});
}

WorkPtr PneumoBackend::scatter(Tensors& outputs, std::vector<Tensors>& inputs, const c10d::ScatterOptions& opts) {
    const at::Tensor& output = only("scatter", outputs);
    const int root = check_root("scatter", opts.rootRank);
    Tensors dense;
    if (root == rank_) {
        TORCH_CHECK(inputs.size() == 1 && inputs[0].size() == static_cast<size_t>(size_), "pneumo: scatter needs ",
                    size_, " input tensors on the root");
        check_same("scatter", inputs[0], output);
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

WorkPtr PneumoBackend::reduce_scatter(Tensors& outputs, std::vector<Tensors>& inputs,
                                      const c10d::ReduceScatterOptions& opts) {
    const at::Tensor& output = only("reduce_scatter", outputs);
    TORCH_CHECK(inputs.size() == 1 && inputs[0].size() == static_cast<size_t>(size_), "pneumo: reduce_scatter needs ",
                size_, " input tensors");
    check_same("reduce_scatter", inputs[0], output);
    const auto how = reduction("reduce_scatter", opts.reduceOp, output.scalar_type(), size_);
    Call call = this->call(Kind::REDUCE_SCATTER, output, output.numel() * how.factor);
    call.op = how.op, call.averages = how.averages;
    const Tensors dense = contiguous(inputs[0]);
    const at::Tensor wanted = output, room = room_for(output);
    auto group = node_->communicator;
    const auto body = [group, call, how, dense, wanted, room](Operation& operation) -> Task {
        co_await group->reduce_scatter(operation, call, const_pointers(dense), room.data_ptr(), how.dtype, how.scale);
        deliver({wanted}, {room});
    };
    return issue(
        {OpType::REDUCE_SCATTER, "pneumo:reduce_scatter", inputs[0], outputs, body, opts.timeout, opts.asyncOp});
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
        check_tensor("reduce_scatter_single", outputs[i]);
        TORCH_CHECK(
            inputs[i].numel() == outputs[i].numel() * size_ && inputs[i].scalar_type() == outputs[i].scalar_type(),
            "pneumo: reduce_scatter_single needs an input of ", outputs[i].numel() * size_, " x ",
            outputs[i].scalar_type(), ", got ", inputs[i].numel(), " x ", inputs[i].scalar_type());
        const auto how = reduction("reduce_scatter_single", opts.reduceOp, inputs[i].scalar_type(), size_);
        Call call = this->call(Kind::REDUCE_SCATTER, outputs[i], outputs[i].numel() * how.factor);
        call.op = how.op, call.averages = how.averages;
        calls.emplace_back(call, how);
    }
    const Tensors dense = contiguous(inputs), wanted = outputs, rooms = rooms_for(wanted);
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

WorkPtr PneumoBackend::alltoall(Tensors& outputs, Tensors& inputs, const c10d::AllToAllOptions& opts) {
    const auto size = static_cast<size_t>(size_);
    TORCH_CHECK(outputs.size() == size && inputs.size() == size, "pneumo: all_to_all needs ", size,
                " tensors in each list");
    std::vector<size_t> in_bytes, out_bytes;
    for (const auto k : c10::irange(size)) {
        check_tensor("all_to_all", inputs[k]);
        check_tensor("all_to_all", outputs[k]);
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
    check_tensor("all_to_all_single", output);
    TORCH_CHECK(output.scalar_type() == input.scalar_type(), "pneumo: all_to_all_single needs tensors of one type");
    c10d::checkSplitSizes(input_splits, input, size_);
    c10d::checkSplitSizes(output_splits, output, size_);
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
    const at::Tensor dense = only("send", tensors).contiguous();
    check_root("send", to);
    auto group = node_->communicator;
    const auto body = [group, dense, to, tag](Operation& operation) {
        return group->send(operation, dense.const_data_ptr(), dense.nbytes(), to, tag);
    };
    return issue({OpType::SEND, "pneumo:send", tensors, {}, body, c10d::kUnsetTimeout, true, false});
}

WorkPtr PneumoBackend::recv(Tensors& tensors, int from, int tag) {
    check_root("recv", from);
    return receive(tensors, from, tag, OpType::RECV);
}

WorkPtr PneumoBackend::recvAnysource(Tensors& tensors, int tag) {
    return receive(tensors, -1, tag, OpType::RECVANYSOURCE);
}

WorkPtr PneumoBackend::receive(Tensors& tensors, int from, int tag, OpType type) {
    const at::Tensor wanted = only("recv", tensors), room = room_for(wanted);
    auto group = node_->communicator;
    auto source = std::make_shared<int>(-1);
    const auto body = [group, wanted, room, from, tag, source](Operation& operation) -> Task {
        co_await group->receive(operation, room.data_ptr(), room.nbytes(), from, tag, source.get());
        deliver({wanted}, {room});
    };
    auto work = issue({type, "pneumo:recv", {}, tensors, body, c10d::kUnsetTimeout, true, false});
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
    const auto body = [group](Operation& operation) { return group->barrier(operation, Call()); };
    issue({OpType::BARRIER, "pneumo:monitored_barrier", {}, {}, body, opts.timeout, false})->wait();
}

}  // namespace pneumo
