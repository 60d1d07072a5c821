#pragma once

#include <memory>
#include <string>
#include <torch/csrc/distributed/c10d/Store.hpp>
#include <vector>

#include "../core/cluster.hpp"

namespace pneumo {

/// How ranks on several nodes reach each other: set where MPI runs.
struct WireMaker {
    using Make = std::unique_ptr<Wire> (*)(const std::vector<int>& world_ranks);
    Make make = nullptr;
    int world_rank = -1;
    std::string missing =
        "start all ranks with mpirun or srun and initialise MPI (import mpi4py.MPI) before the process group";
};
inline WireMaker wire_maker;

/// A process group's ranks as this process reaches them: the memory it shares with some, and what passes data to all.
struct Node {
    Segment segment;
    std::shared_ptr<Communicator> communicator;
};

/// Meet the other ranks through the store and set up the memory that they share. Collective.
///
/// `names[k]` is what users call rank k. Throws Error naming who did not come within the timeout, or why ranks on
/// several hosts cannot be joined.
std::shared_ptr<Node> bootstrap(c10d::Store& store, int rank, int size, const std::vector<int>& names,
                                std::chrono::milliseconds timeout);

}  // namespace pneumo
