#include "recorder.hpp"

#include <algorithm>
#include <chrono>
#include <numeric>

#include "work.hpp"

namespace pneumo {
namespace {

using c10d::HookOpName;

/// What the calling thread has issued and may wait for. The address is never followed: the Work may be gone, and then
/// a later one can be there, which is newer and found first, or of another operation, or the record has been taken. A
/// weak pointer would be exact and costly: a Work is not destroyed before it, nor are the tensors that it holds.
struct Issued {
    const c10d::Work* work;
    c10d::OpType type;
    c10::intrusive_ptr<Record> record;
};
constexpr size_t kRemembered = 64;
thread_local std::array<std::optional<Issued>, kRemembered> issued;
thread_local size_t issues = 0;
/// Calls between their two hooks; several where a group has several recorders.
struct Open {
    const Recorder* recorder;
    int64_t id;
    c10::intrusive_ptr<Record> record;
};
thread_local std::vector<Open> open;

/// The call of a recorder that is open, which it then is no more; null if there is none with this number.
c10::intrusive_ptr<Record> close(const Recorder* recorder, int64_t id) {
    const auto mine = std::find_if(open.begin(), open.end(), [&](const Open& one) { return one.recorder == recorder; });
    if (mine == open.end()) return {};
    auto record = mine->id == id ? std::move(mine->record) : c10::intrusive_ptr<Record>();
    open.erase(mine);
    return record;
}

std::atomic<int64_t> hooks{int64_t{0x706e} << 32};

int64_t bytes(const std::vector<at::Tensor>& tensors) {
    return std::accumulate(tensors.begin(), tensors.end(), int64_t{0}, [](int64_t sum, const at::Tensor& tensor) {
        return sum + (tensor.defined() ? static_cast<int64_t>(tensor.nbytes()) : 0);
    });
}

bool is_message(HookOpName op) { return op == HookOpName::SEND || op == HookOpName::RECV; }

}  // namespace

void Recorder::watch(const c10::intrusive_ptr<c10d::Work>& work, const c10::intrusive_ptr<Record>& record) {
    if (auto* own = dynamic_cast<Work*>(work.get())) {
        record->life = own->life();
        return;
    }
    if (!record->on_cpu) return;
    if (work->isCompleted()) {
        record->finished = now_ns();
        return;
    }
    auto& futureless = futureless_[static_cast<size_t>(record->op)];
    if (futureless.load(std::memory_order_relaxed)) return;
    try {
        const auto stamp = [record](c10::ivalue::Future&) { record->finished = now_ns(); };
        work->getFuture()->addCallback(stamp, /*uses_future=*/false);
    } catch (const c10::Error&) {
        // Works without a Future (Gloo's messages and reduce-scatter): the end of the wait is all there is to know. The
        // error costs more than 20 us, so the question is not put again.
        futureless = true;
    }
}

std::shared_ptr<Recorder> Recorder::attach(c10::intrusive_ptr<c10d::ProcessGroup> group) {
    auto recorder = std::make_shared<Recorder>(std::move(group));
    const std::weak_ptr<Recorder> weak = recorder;
    recorder->group_->registerPreHook(recorder->hook_, [weak](const c10d::PreHookArgs& call) {
        if (const auto self = weak.lock()) self->before(call);
    });
    recorder->group_->registerPostHook(recorder->hook_, [weak](const c10d::PostHookArgs& call) {
        if (const auto self = weak.lock()) self->after(call);
    });
    return recorder;
}

Recorder::Recorder(c10::intrusive_ptr<c10d::ProcessGroup> group)
    : group_(std::move(group)), hook_(hooks++), messages_(group_->getSize()) {}

void Recorder::detach() {
    if (!group_) return;
    group_->unregisterPreHook(hook_);
    group_->unregisterPostHook(hook_);
    group_.reset();
    take();
}

void Recorder::before(const c10d::PreHookArgs& call) {
    if (call.name >= HookOpName::SPLIT) return;  // no data moves
    auto record = c10::make_intrusive<Record>();
    record->op = call.name;
    const auto& tensors = call.input_tensors.empty() ? call.output_tensors : call.input_tensors;
    if (!tensors.empty() && tensors.front().defined()) {
        record->dtype = tensors.front().scalar_type();
        record->on_cpu = tensors.front().is_cpu();
    }
    record->bytes = std::max(bytes(call.input_tensors), bytes(call.output_tensors));
    if (is_message(call.name)) record->peer = call.root;
    close(this, -1);  // one that has thrown between its hooks
    open.push_back({this, call.op_id, record});
    record->enqueued = now_ns();
}

void Recorder::after(const c10d::PostHookArgs& call) {
    const int64_t returned = now_ns();
    auto record = close(this, call.op_id);
    if (!record) return;
    // Only what was issued is numbered: a call that is refused does not travel.
    const bool message = is_message(record->op);
    if (message && record->peer >= 0 && record->peer < static_cast<int64_t>(messages_.size()))
        record->sequence = messages_[record->peer][record->op == HookOpName::RECV]++;
    else if (!message)
        record->sequence = collectives_++;
    if (call.work) {
        watch(call.work, record);
        const bool ended = record->finished != 0 || (record->life && record->life->ended != 0);
        if (!call.async_op && ended) {  // it has blocked until its end
            record->wait_begin = record->enqueued;
            record->wait_end = returned;
        } else {
            issued[issues++ % kRemembered] = Issued{call.work.get(), call.work->retrieveOpType(), record};
        }
    } else {  // no handle: it is over
        record->finished = returned;
        record->wait_begin = record->enqueued;
        record->wait_end = returned;
    }
    auto* const link = new Link{std::move(record), latest_.load(std::memory_order_relaxed)};
    while (!latest_.compare_exchange_weak(link->before, link, std::memory_order_release, std::memory_order_relaxed)) {
    }
}

std::vector<c10::intrusive_ptr<Record>> Recorder::take(bool ended) {
    std::vector<c10::intrusive_ptr<Record>> taken;
    for (const Link* link = latest_.exchange(nullptr, std::memory_order_acquire); link != nullptr;) {
        const std::unique_ptr<const Link> owned(link);
        taken.push_back(owned->record);
        link = owned->before;
    }
    taken.insert(taken.end(), left_.rbegin(), left_.rend());
    std::reverse(taken.begin(), taken.end());
    left_.clear();
    if (!ended) {
        for (const auto& record : taken) record->taken = true;
        return taken;
    }
    const auto over = [](const auto& record) {
        return record->finished != 0 || record->wait_end != 0 || (record->life && record->life->ended != 0);
    };
    const auto under_way = std::stable_partition(taken.begin(), taken.end(), over);
    left_.assign(under_way, taken.end());
    taken.erase(under_way, taken.end());
    for (const auto& record : taken) record->taken = true;
    return taken;
}

bool timed_wait(const c10::intrusive_ptr<c10d::Work>& work, std::chrono::milliseconds timeout) {
    Record* record = nullptr;
    for (size_t i = 0; i < std::min(issues, kRemembered) && record == nullptr; ++i) {
        const auto& one = issued[(issues - 1 - i) % kRemembered];
        if (one && one->work == work.get() && one->type == work->retrieveOpType()) record = one->record.get();
    }
    if (record == nullptr || record->taken || record->wait_begin != 0) return work->wait(timeout);
    const auto kept = c10::intrusive_ptr<Record>::reclaim_copy(record);
    kept->wait_begin = now_ns();
    struct Note {
        Record& record;
        ~Note() { record.wait_end = now_ns(); }  // also where the wait ends in an error
    } note{*kept};
    return work->wait(timeout);
}

}  // namespace pneumo
