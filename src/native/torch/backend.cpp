#include "backend.hpp"

#include <ATen/core/Tensor.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <numeric>

#include "tensors.hpp"

namespace pneumo {
namespace {

// What messages that are under way when a group ends are waited for, all together; who sends may never come.
constexpr std::chrono::milliseconds kGrace{1000};
constexpr size_t kFewMessages = 64;  // are not worth looking through

}  // namespace

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

PneumoBackend::~PneumoBackend() { leave(); }

void PneumoBackend::leave() {
    shut_ = true;
    if (node_ && !left_.exchange(true) && node_->communicator->engine().usable()) node_->communicator->leave();
}

void PneumoBackend::shutdown() {
    if (!node_ || shut_.exchange(true) || !node_->communicator->engine().usable()) return;
    std::deque<std::weak_ptr<Operation>> collectives;
    std::vector<std::weak_ptr<Operation>> messages;
    {
        std::lock_guard lock(issued_mutex_);
        collectives.swap(collectives_);
        messages.swap(messages_);
    }
    for (const auto& issued : collectives) {
        if (const auto collective = issued.lock()) wait_for(node_->communicator->engine(), *collective);
    }
    const auto limit = Clock::now() + kGrace;
    for (const auto& issued : messages) {
        const auto message = issued.lock();
        if (!message) continue;
        const auto left = std::chrono::ceil<std::chrono::milliseconds>(limit - Clock::now());
        wait_for(node_->communicator->engine(), *message, std::max(left, std::chrono::milliseconds(1)));
    }
    leave();
}

void PneumoBackend::abort() {
    if (!node_->communicator->engine().usable()) return;
    node_->communicator->abort("the process group was aborted");
}

c10d::ErrorType PneumoBackend::getError() {
    return node_->communicator->broken().empty() ? c10d::ErrorType::SUCCESS : c10d::ErrorType::COMM_ERROR;
}

at::Tensor PneumoBackend::allocateTensor(long size, at::TensorOptions options) {
    const at::Tensor tensor = allocate(size, options);
    return tensor.is_complex() ? at::view_as_real(tensor).flatten() : tensor;
}

at::Tensor PneumoBackend::allocate(long size, at::TensorOptions options) {
    TORCH_CHECK(size >= 0, "pneumo: allocate_tensor of ", size, " elements");
    TORCH_CHECK(options.device().is_cpu(), "pneumo: allocate_tensor offers memory of the CPU, not of ",
                options.device());
    Arena& arena = *node_->communicator->arena();
    std::byte* block = arena.allocate(static_cast<size_t>(size) * options.dtype().itemsize());
    if (block == nullptr) return at::empty({size}, options);
    // Of a storage that can be resized, as those of ordinary tensors can: then it moves to ordinary memory.
    struct Lent {
        std::shared_ptr<Node> node;
        std::byte* block;
    };
    const auto give_back = [](void* context) {
        const std::unique_ptr<Lent> lent(static_cast<Lent*>(context));
        lent->node->communicator->arena()->free(lent->block);
    };
    c10::DataPtr data(block, new Lent{node_, block}, give_back, at::kCPU);
    auto storage = c10::make_intrusive<c10::StorageImpl>(c10::StorageImpl::use_byte_size_t(),
                                                         static_cast<size_t>(size) * options.dtype().itemsize(),
                                                         std::move(data), c10::GetCPUAllocator(), /*resizable=*/true);
    auto tensor = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(std::move(storage)),
                                                           c10::DispatchKeySet(c10::DispatchKey::CPU), options.dtype());
    tensor.unsafeGetTensorImpl()->set_sizes_contiguous({size});
    return tensor;
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
    work->lists = std::move(issue.lists);
    auto operation = group.operation(std::move(issue.body), timeout, issue.in_order ? group.lane() : nullptr);
    operation->owner = node_;
    const std::weak_ptr<Operation> issued = operation;
    work->submit(std::move(operation), !issue.async);
    if (issue.async) remember(issued, issue.in_order);
    return work;
}

void PneumoBackend::remember(std::weak_ptr<Operation> issued, bool in_order) {
    const auto over = [](const auto& one) {
        const auto earlier = one.lock();
        return !earlier || earlier->done();
    };
    std::lock_guard lock(issued_mutex_);
    if (in_order) {
        while (!collectives_.empty() && over(collectives_.front())) collectives_.pop_front();
        collectives_.push_back(std::move(issued));
        return;
    }
    messages_.push_back(std::move(issued));
    if (messages_.size() < 2 * swept_messages_ + kFewMessages) return;
    std::erase_if(messages_, over);
    swept_messages_ = messages_.size();
}

}  // namespace pneumo
