#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "group.hpp"

namespace pneumo {

/// This process as its peers see it, made at first use and never destroyed: its doorbell and its engine.
struct Process {
    Engine& engine;
    const std::string& doorbell_handle;

    static Process get(Segment::Kind kind);
    /// End what still runs with this reason, and the threads.
    static void stop(const std::string& reason);
};

/// What the system says about where this process runs: equal for two processes that can share memory.
std::string node_identity();

/// The cores that this process may use: those of its affinity mask, as a sorted list of ids.
std::vector<int> usable_cores();

/// The cores' worth of time that the process's control group allows, a large number without a limit.
double core_quota();

/// How many of a node's ranks can have a core of their own at the same time, from what each may use.
size_t cores_at_once(const std::vector<std::vector<int>>& masks);

/// How long the ranks of a group on this node spin: shortly, offering the core to others, where there are more than
/// cores. PNEUMO_COMM_SPIN_US overrides it.
Patience patience_for(int ranks, size_t cores, double quota);

/// What a user may set, as numbers with an optional K, M or G: PNEUMO_COMM_BYTES (limit of a group's shared memory on a
/// node), PNEUMO_COMM_CHUNK, PNEUMO_COMM_ONE_SHOT. Throws Error for what is not a number.
size_t setting(const char* name, size_t otherwise);

}  // namespace pneumo
