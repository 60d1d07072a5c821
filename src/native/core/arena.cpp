#include "arena.hpp"

#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <iterator>
#include <set>
#include <utility>

namespace pneumo {

/// All arenas of the process, and what happens to them when it forks: every lock is held meanwhile.
struct Arena::AtFork {
    static AtFork& get() {
        static auto* one = new AtFork;  // for as long as the process lives, whoever ends last
        return *one;
    }
    AtFork() {
        pthread_atfork([] { get().prepare(); }, [] { get().end(&Arena::drop_copy); },
                       [] { get().end(&Arena::keep_copy); });
    }
    void prepare() {
        mutex.lock();
        for (Arena* arena : arenas) {
            arena->mutex_.lock();
            arena->copy();
        }
    }
    void end(void (Arena::*with_copy)()) {
        for (Arena* arena : arenas) {
            (arena->*with_copy)();
            arena->mutex_.unlock();
        }
        mutex.unlock();
    }

    std::mutex mutex;
    std::set<Arena*> arenas;
};

Arena::Arena(std::byte* memory, size_t bytes) : memory_(memory), bytes_(bytes / kAlign * kAlign) {
    if (bytes_ == 0) return;
    free_[0] = bytes_;
    AtFork& all = AtFork::get();
    std::lock_guard lock(all.mutex);
    all.arenas.insert(this);
}

Arena::~Arena() {
    AtFork& all = AtFork::get();
    std::lock_guard lock(all.mutex);
    all.arenas.erase(this);
}

void Arena::copy() {
    if (used_.empty()) return;
    void* room = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (room == MAP_FAILED) return;  // the child then shares its parent's tensors
    copy_ = static_cast<std::byte*>(room);
    for (const auto& [offset, length] : used_) std::memcpy(copy_ + offset, memory_ + offset, length);
}

void Arena::drop_copy() {
    if (copy_ != nullptr) munmap(std::exchange(copy_, nullptr), bytes_);
}

void Arena::keep_copy() {
    if (copy_ == nullptr) return;
    mremap(std::exchange(copy_, nullptr), bytes_, bytes_, MREMAP_MAYMOVE | MREMAP_FIXED, memory_);
}

std::byte* Arena::allocate(size_t bytes) {
    if (bytes > bytes_) return nullptr;
    const size_t length = std::max(kAlign, (bytes + kAlign - 1) / kAlign * kAlign);
    std::lock_guard lock(mutex_);
    const auto large_enough = [&](const auto& hole) { return hole.second >= length; };
    const auto hole = std::find_if(free_.begin(), free_.end(), large_enough);
    if (hole == free_.end()) return nullptr;
    const auto [offset, room] = *hole;
    free_.erase(hole);
    if (room > length) free_[offset + length] = room - length;
    used_[offset] = length;
    return memory_ + offset;
}

void Arena::free(std::byte* block) {
    std::lock_guard lock(mutex_);
    const auto used = used_.find(static_cast<size_t>(block - memory_));
    if (used == used_.end()) return;
    auto hole = free_.insert(*used).first;
    used_.erase(used);
    const auto next = std::next(hole);
    if (next != free_.end() && hole->first + hole->second == next->first) {
        hole->second += next->second;
        free_.erase(next);
    }
    if (hole == free_.begin()) return;
    const auto previous = std::prev(hole);
    if (previous->first + previous->second == hole->first) {
        previous->second += hole->second;
        free_.erase(hole);
    }
}

bool Arena::holds(const void* data, size_t bytes) const {
    const auto* begin = static_cast<const std::byte*>(data);
    const std::less_equal<const std::byte*> before;
    return bytes <= bytes_ && before(memory_, begin) && before(begin, memory_ + (bytes_ - bytes));
}

}  // namespace pneumo
