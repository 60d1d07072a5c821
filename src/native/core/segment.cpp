#include "segment.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <random>
#include <sstream>
#include <utility>

#include "error.hpp"

namespace pneumo {
namespace {

[[noreturn]] void fail(const std::string& what) {
    throw Error(Error::Kind::SYSTEM, what + ": " + std::strerror(errno));
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
        std::random_device random;
        segment.name_ = "/pneumo-" + std::to_string(getpid()) + "-" + std::to_string(random());
        segment.fd_ = shm_open(segment.name_.c_str(), O_CREAT | O_EXCL | O_RDWR | O_CLOEXEC, 0600);
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
