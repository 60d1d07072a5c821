#include <torch/csrc/utils/pybind.h>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include <chrono>

#include "../core/node.hpp"
#include "../reduce/reduce.hpp"
#include "backend.hpp"

namespace py = pybind11;

namespace {

using pneumo::PneumoBackend;

c10::intrusive_ptr<PneumoBackend> create(const c10d::DistributedBackendOptions& options, const py::object&) {
    std::vector<int> names(options.global_ranks_in_group.begin(), options.global_ranks_in_group.end());
    const auto timeout = std::chrono::duration_cast<std::chrono::milliseconds>(options.timeout);
    const py::gil_scoped_release released;
    return c10::make_intrusive<PneumoBackend>(options.store, options.group_rank, options.group_size, std::move(names),
                                              timeout);
}

}  // namespace

PYBIND11_MODULE(_native, module) {
    module.doc() = "The native part of pneumo.comm: c10d's backend `pneumo`.";
    py::module_::import("torch");  // the classes below derive from its own
    py::class_<PneumoBackend, c10::intrusive_ptr<PneumoBackend>, c10d::Backend>(module, "PneumoBackend");
    module.def("create", &create, py::arg("options"), py::arg("backend_options") = py::none(),
               "Make the backend of one process group; collective.");
    module.def("simd_level", &pneumo::simd_level, "The instructions that reductions use on this machine.");
    module.def(
        "use_mpi",
        [](const py::capsule& wire, int world_rank) {
            pneumo::wire_maker = {reinterpret_cast<pneumo::WireMaker::Make>(wire.get_pointer()), world_rank};
        },
        py::arg("wire"), py::arg("world_rank"),
        "Reach ranks on other nodes through MPI, with what _mpi.wire() returns.");
    module.def(
        "shutdown",
        [] {
            const py::gil_scoped_release released;
            pneumo::Process::stop("the process ends");
        },
        "End what still runs, and the threads; for the end of the process.");
}
