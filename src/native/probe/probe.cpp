// A PMPI library: what another library's own thread does in MPI, with stamps. Made for Horovod, whose background thread
// tells nobody when a fused response travels.
//
// It has to be in the process's global scope before that library is loaded (dlopen with RTLD_GLOBAL, or LD_PRELOAD):
// then the names below are found here first, and go on to MPI under their second names, PMPI_...
//
// One thread produces, one consumes: a ring without locks. Calls of the thread that has loaded this are not recorded,
// and neither are those by which Horovod negotiates: sums and moves of tensors are data, bitwise reductions, gathers
// and broadcasts are not.

#include <mpi.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <ctime>

#define EXPORT __attribute__((visibility("default")))

namespace {

struct Call {
    int64_t begin_ns, end_ns, bytes, kind;  // kind: see Kind
};
enum Kind : int64_t { kAllreduce, kAllgather, kAlltoall, kReduceScatter };

constexpr uint64_t kCapacity = 1 << 14;
std::array<Call, kCapacity> ring;
std::atomic<uint64_t> written{0}, taken{0}, dropped{0};
const pid_t loader = static_cast<pid_t>(syscall(SYS_gettid));

int64_t now_ns() {
    timespec now{};
    clock_gettime(CLOCK_MONOTONIC, &now);
    return int64_t{now.tv_sec} * 1'000'000'000 + now.tv_nsec;
}

template <typename Function>
int recorded(Kind kind, int64_t count, MPI_Datatype type, Function&& call) {
    if (static_cast<pid_t>(syscall(SYS_gettid)) == loader) return call();
    int size = 0;
    PMPI_Type_size(type, &size);
    const int64_t begin = now_ns();
    const int result = call();
    const uint64_t at = written.load(std::memory_order_relaxed);
    if (at - taken.load(std::memory_order_acquire) == kCapacity) {
        ++dropped;
        return result;
    }
    ring[at % kCapacity] = {begin, now_ns(), count * size, kind};
    written.store(at + 1, std::memory_order_release);
    return result;
}

/// The sum of a count for each rank of a communicator.
int64_t total(const int* counts, MPI_Comm comm) {
    int ranks = 0;
    PMPI_Comm_size(comm, &ranks);
    int64_t sum = 0;
    for (int i = 0; i < ranks; ++i) sum += counts[i];
    return sum;
}

}  // namespace

extern "C" {

/// Move up to `most` records, oldest first, each as (begin_ns, end_ns, bytes, kind); returns how many.
EXPORT int64_t pneumo_probe_take(int64_t* out, int64_t most) {
    const uint64_t first = taken.load(std::memory_order_relaxed);
    const uint64_t ready = written.load(std::memory_order_acquire) - first;
    const uint64_t count = ready < static_cast<uint64_t>(most) ? ready : static_cast<uint64_t>(most);
    for (uint64_t i = 0; i < count; ++i) {
        const Call& call = ring[(first + i) % kCapacity];
        for (const int64_t value : {call.begin_ns, call.end_ns, call.bytes, call.kind}) *out++ = value;
    }
    taken.store(first + count, std::memory_order_release);
    return static_cast<int64_t>(count);
}

/// How many records found no place because nobody took them in time.
EXPORT int64_t pneumo_probe_dropped() { return static_cast<int64_t>(dropped.load()); }

EXPORT int MPI_Allreduce(const void* send, void* receive, int count, MPI_Datatype type, MPI_Op op, MPI_Comm comm) {
    const auto call = [&] { return PMPI_Allreduce(send, receive, count, type, op, comm); };
    return op == MPI_BAND || op == MPI_BOR ? call() : recorded(kAllreduce, count, type, call);
}

EXPORT int MPI_Allgatherv(const void* send, int count, MPI_Datatype send_type, void* receive, const int counts[],
                          const int offsets[], MPI_Datatype type, MPI_Comm comm) {
    return recorded(kAllgather, total(counts, comm), type,
                    [&] { return PMPI_Allgatherv(send, count, send_type, receive, counts, offsets, type, comm); });
}

EXPORT int MPI_Alltoallv(const void* send, const int send_counts[], const int send_offsets[], MPI_Datatype send_type,
                         void* receive, const int counts[], const int offsets[], MPI_Datatype type, MPI_Comm comm) {
    return recorded(kAlltoall, total(counts, comm), type, [&] {
        return PMPI_Alltoallv(send, send_counts, send_offsets, send_type, receive, counts, offsets, type, comm);
    });
}

EXPORT int MPI_Reduce_scatter(const void* send, void* receive, const int counts[], MPI_Datatype type, MPI_Op op,
                              MPI_Comm comm) {
    return recorded(kReduceScatter, total(counts, comm), type,
                    [&] { return PMPI_Reduce_scatter(send, receive, counts, type, op, comm); });
}

}  // extern "C"
