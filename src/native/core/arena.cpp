#include "arena.hpp"

#include <algorithm>
#include <functional>
#include <iterator>

namespace pneumo {

Arena::Arena(std::byte* memory, size_t bytes) : memory_(memory), bytes_(bytes / kAlign * kAlign) {
    if (bytes_ > 0) free_[0] = bytes_;
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
