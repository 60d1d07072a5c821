#pragma once

#include <cstddef>
#include <map>
#include <mutex>

namespace pneumo {

/// Hands out parts of a fixed piece of memory, the first that is large enough; safe to use from several threads.
class Arena {
   public:
    static constexpr size_t kAlign = 4096;

    /// `memory` is not touched, and has to begin at a multiple of kAlign.
    Arena(std::byte* memory, size_t bytes);

    /// Memory for `bytes`, aligned to kAlign; null where there is no room.
    std::byte* allocate(size_t bytes);
    /// Give back what `allocate` returned.
    void free(std::byte* block);
    /// Whether these bytes lie within the arena, allocated or not.
    bool holds(const void* data, size_t bytes) const;
    size_t bytes() const { return bytes_; }

   private:
    std::byte* memory_;
    size_t bytes_;
    std::mutex mutex_;
    std::map<size_t, size_t> free_, used_;  // offset to length
};

}  // namespace pneumo
