#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>

#include "futex.hpp"
#include "segment.hpp"

namespace pneumo {

/// The one word of a process on which its threads sleep, in memory that its peers can write; and who the process is.
///
/// Whoever makes something true that others may wait for calls `ring` afterwards. Whoever is about to sleep announces
/// it (`sleepers`), looks once more at what it waits for, and only then sleeps: of the two, one always sees the other,
/// because both write first and read afterwards with sequential consistency.
struct Doorbell {
    alignas(64) std::atomic<uint32_t> sleepers;
    alignas(64) std::atomic<uint32_t> bell;
    alignas(64) int64_t pid;
    int64_t start_time;  // field 22 of /proc/PID/stat: a PID alone may have been given to another process

    /// Wake the owner's threads where any sleeps.
    void ring() {
        std::atomic_thread_fence(std::memory_order_seq_cst);
        if (sleepers.load(std::memory_order_relaxed) == 0) return;
        bell.fetch_add(1, std::memory_order_release);
        futex_wake(bell);
    }
};

/// Whether a process of this node is gone (a zombie is).
bool has_ended(int64_t pid);

/// Whether the process that wrote this doorbell is gone; false where the system does not tell.
bool has_died(const Doorbell& doorbell);

/// Fill in who this process is.
void sign(Doorbell& doorbell);

/// Map a peer's doorbell; one mapping a process and peer, however many groups they share.
std::shared_ptr<Doorbell> open_doorbell(const std::string& handle);

}  // namespace pneumo
