#include "segment.hpp"

#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <sstream>
#include <utility>

#include "error.hpp"

namespace pneumo {
namespace {

[[noreturn]] void fail(const std::string& what) {
    throw Error(Error::Kind::SYSTEM, what + ": " + std::strerror(errno));
}

constexpr char kPrefix[] = "pneumo-";

/// A new POSIX object under a name of its own, locked; `name` is set to it.
int create_named(std::string& name) {
    std::random_device random;
    for (;;) {
        name = std::string("/") + kPrefix + std::to_string(getpid()) + "-" + std::to_string(random());
        const int fd = shm_open(name.c_str(), O_CREAT | O_EXCL | O_RDWR | O_CLOEXEC, 0600);
        if (fd < 0) return fd;
        struct stat status{};
        // A sweep may have come between the two calls, and have taken it for a dead one's.
        if (flock(fd, LOCK_EX | LOCK_NB) == 0 && fstat(fd, &status) == 0 && status.st_nlink > 0) return fd;
        close(fd);
    }
}

std::string mebibytes(size_t bytes) { return std::to_string((bytes + (1 << 20) - 1) >> 20) + " MiB"; }

}  // namespace

Segment Segment::create(Kind kind, size_t bytes) {
    Segment segment;
    segment.bytes_ = bytes;
    if (kind == Kind::MEMFD) {
        segment.fd_ = memfd_create("pneumo", MFD_CLOEXEC);
        if (segment.fd_ < 0) fail("memfd_create");
        if (ftruncate(segment.fd_, static_cast<off_t>(bytes)) != 0) fail("ftruncate of a memfd to " + mebibytes(bytes));
        segment.handle_ = "memfd " + std::to_string(bytes) + " /proc/" + std::to_string(getpid()) + "/fd/" +
                          std::to_string(segment.fd_);
    } else {
        sweep();
        segment.fd_ = create_named(segment.name_);
        if (segment.fd_ < 0) {
            segment.name_.clear();
            fail("shm_open in /dev/shm");
        }
        // Reserved now: a full /dev/shm would otherwise kill the process by SIGBUS in the midst of a collective.
        if (const int code = posix_fallocate(segment.fd_, 0, static_cast<off_t>(bytes)); code != 0) {
            errno = code;
            fail("/dev/shm has no room for " + mebibytes(bytes) +
                 " of shared memory (PNEUMO_COMM_BYTES sets the limit)");
        }
        segment.handle_ = "posix " + std::to_string(bytes) + " " + segment.name_;
    }
    segment.map(segment.fd_);
    return segment;
}

Segment Segment::open(const std::string& handle) {
    std::istringstream words(handle);
    std::string kind, path;
    Segment segment;
    words >> kind >> segment.bytes_ >> path;
    segment.handle_ = handle;
    const int fd = kind == "memfd" ? ::open(path.c_str(), O_RDWR | O_CLOEXEC) : shm_open(path.c_str(), O_RDWR, 0600);
    if (fd < 0) fail("a peer's shared memory (" + path + ") cannot be opened");
    struct stat status{};
    if (fstat(fd, &status) != 0 || static_cast<size_t>(status.st_size) != segment.bytes_) {
        close(fd);
        errno = ESTALE;
        fail("a peer's shared memory (" + path + ") is not what it was said to be");
    }
    try {
        segment.map(fd);
    } catch (...) {
        close(fd);
        throw;
    }
    close(fd);
    return segment;
}

void Segment::map(int fd) {
    void* address = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (address == MAP_FAILED) fail("mmap of " + mebibytes(bytes_) + " of shared memory");
    data_ = static_cast<std::byte*>(address);
}

void Segment::hide() {
    if (fd_ >= 0) close(std::exchange(fd_, -1));
    if (!name_.empty()) shm_unlink(std::exchange(name_, {}).c_str());
}

void Segment::sweep() {
    const std::unique_ptr<DIR, int (*)(DIR*)> folder(opendir("/dev/shm"), closedir);
    if (!folder) return;
    while (const dirent* entry = readdir(folder.get())) {
        const std::string name = std::string("/") + entry->d_name;
        if (name.rfind(kPrefix, 1) != 1) continue;
        const int fd = shm_open(name.c_str(), O_RDWR, 0600);  // fails for other users' objects
        if (fd < 0) continue;
        if (flock(fd, LOCK_EX | LOCK_NB) == 0) shm_unlink(name.c_str());
        close(fd);
    }
}

Segment::~Segment() {
    if (data_ != nullptr) munmap(data_, bytes_);
    hide();
}

void Segment::swap(Segment& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    std::swap(fd_, other.fd_);
    std::swap(name_, other.name_);
    std::swap(handle_, other.handle_);
}

}  // namespace pneumo
