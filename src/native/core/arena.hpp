#pragma once

#include <cstddef>
#include <map>
#include <mutex>

namespace pneumo {

/// Hands out parts of a fixed piece of memory, the first that is large enough; safe to use from several threads.
///
/// A forked child gets a copy of the parts that were in use, at their places: the memory is shared with other
/// processes, but what lies in it are a process's own tensors.
class Arena {
   public:
    static constexpr size_t kAlign = 4096;
    static constexpr size_t kPage = 1 << 16;  // of any machine, at most

    /// `memory` is not touched, and has to begin at a multiple of kPage.
    Arena(std::byte* memory, size_t bytes);
    ~Arena();
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;

    /// Memory for `bytes`, aligned to kAlign; null where there is no room.
    std::byte* allocate(size_t bytes);
    /// Give back what `allocate` returned.
    void free(std::byte* block);
    /// Whether these bytes lie within the arena, allocated or not.
    bool holds(const void* data, size_t bytes) const;
    size_t bytes() const { return bytes_; }

   private:
    struct AtFork;
    void copy();
    void drop_copy();
    void keep_copy();

    std::byte* memory_;
    std::byte* copy_ = nullptr;  // while the process forks
    size_t bytes_;
    std::mutex mutex_;
    std::map<size_t, size_t> free_, used_;  // offset to length
};

}  // namespace pneumo
