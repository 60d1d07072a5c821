#pragma once

#include <cstddef>
#include <string>

namespace pneumo {

/// Memory that several processes of a node share, and that the kernel frees when the last of them ends.
///
/// A memfd has no name in a file system: peers open it through the creator's /proc/PID/fd, so nothing can be left
/// behind at any moment. Where that is not allowed (another PID namespace, a hardened /proc), a POSIX object in
/// /dev/shm does it, whose name is removed as soon as every peer has opened it. Until then its creator holds a lock on
/// it, which ends with the creator, so that anybody can tell what is left of the dead.
class Segment {
   public:
    enum class Kind { MEMFD, POSIX };

    /// Make a segment of zeros; throws Error when the system has no room for it.
    static Segment create(Kind kind, size_t bytes);
    /// Map the segment that a peer's `handle()` names; throws Error.
    static Segment open(const std::string& handle);

    Segment() = default;
    Segment(Segment&& other) noexcept { swap(other); }
    Segment& operator=(Segment&& other) noexcept {
        swap(other);
        return *this;
    }
    ~Segment();

    std::byte* data() const { return data_; }
    size_t bytes() const { return bytes_; }
    /// Whether it has a name in /dev/shm now, made by this process.
    bool named() const { return !name_.empty(); }
    /// How a peer finds this segment, as text.
    const std::string& handle() const { return handle_; }
    /// Called by the creator once every peer has opened it: nobody else can from now on.
    void hide();
    /// Remove the names of POSIX objects whose creators have ended without hiding them.
    static void sweep();
    /// Forget the mapping without undoing it: for a forked child, to which it does not belong.
    void release() { data_ = nullptr, fd_ = -1, name_.clear(); }

   private:
    void swap(Segment& other) noexcept;
    void map(int fd);

    std::byte* data_ = nullptr;
    size_t bytes_ = 0;
    int fd_ = -1;       // the creator's, until hidden
    std::string name_;  // of a POSIX object, until hidden
    std::string handle_;
};

}  // namespace pneumo
