#include <torch/csrc/utils/pybind.h>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include <pybind11/chrono.h>
#include <torch/csrc/DynamicTypes.h>

#include "../core/node.hpp"
#include "../reduce/reduce.hpp"
#include "backend.hpp"
#include "recorder.hpp"

namespace py = pybind11;

namespace {

using pneumo::PneumoBackend;

c10::intrusive_ptr<PneumoBackend> create(const c10d::DistributedBackendOptions& options, const py::object&) {
    TORCH_CHECK(!options.enable_reconfigure,
                "pneumo: init_process_group with enable_reconfigure is not supported: "
                "a group keeps its ranks");
    std::vector<int> names(options.global_ranks_in_group.begin(), options.global_ranks_in_group.end());
    const auto timeout = std::chrono::duration_cast<std::chrono::milliseconds>(options.timeout);
    const py::gil_scoped_release released;
    return c10::make_intrusive<PneumoBackend>(options.store, options.group_rank, options.group_size, std::move(names),
                                              timeout);
}

const char* name(c10d::HookOpName op) {
    constexpr const char* kNames[] = {"send",           "recv",     "broadcast", "allreduce", "reduce", "allgather",
                                      "reduce_scatter", "alltoall", "barrier",   "scatter",   "gather"};
    return op < c10d::HookOpName::SPLIT ? kNames[static_cast<int>(op)] : "unknown";
}

/// A record as Python reads it: None where nothing is known.
py::tuple as_tuple(const pneumo::Record& record) {
    const auto stamp = [](int64_t ns) { return ns != 0 ? py::object(py::int_(ns)) : py::object(py::none()); };
    py::object dtype = py::none();
    if (record.dtype)
        dtype = py::reinterpret_borrow<py::object>(reinterpret_cast<PyObject*>(torch::getTHPDtype(*record.dtype)));
    const bool told = static_cast<bool>(record.life);
    return py::make_tuple(name(record.op), dtype, record.bytes, record.sequence,
                          record.peer >= 0 ? py::object(py::int_(record.peer)) : py::object(py::none()),
                          record.enqueued, stamp(told ? record.life->started.load() : 0),
                          stamp(told ? record.life->ended.load() : record.finished.load()), stamp(record.wait_begin),
                          stamp(record.wait_end));
}

py::list take(pneumo::Recorder& recorder, bool ended) {
    py::list found;
    for (const auto& record : recorder.take(ended)) found.append(as_tuple(*record));
    return found;
}

}  // namespace

PYBIND11_MODULE(_native, module) {
    module.doc() = "The native part of pneumo.comm: c10d's backend `pneumo`.";
    py::module_::import("torch");  // the classes below derive from its own
    py::class_<PneumoBackend, c10::intrusive_ptr<PneumoBackend>, c10d::Backend>(module, "PneumoBackend")
        .def(
            "allocate_tensor",
            [](PneumoBackend& backend, int64_t size, at::ScalarType dtype, at::Device device) {
                return backend.allocate(size, at::TensorOptions().dtype(dtype).device(device));
            },
            py::arg("size"), py::kw_only(), py::arg("dtype"), py::arg("device"),
            py::call_guard<py::gil_scoped_release>(), "A tensor in the memory that the ranks share, if there is room.");
    module.def("create", &create, py::arg("options"), py::arg("backend_options") = py::none(),
               "Make the backend of one process group; collective.");
    py::class_<pneumo::Recorder, std::shared_ptr<pneumo::Recorder>>(module, "Recorder")
        .def_static("attach", &pneumo::Recorder::attach, py::arg("group"), "Begin to record a group's calls.")
        .def("detach", &pneumo::Recorder::detach, "End it; what was not taken is gone.")
        .def(
            "take", &take, py::arg("ended") = false,
            "Tuples (op, dtype, bytes, sequence, peer, enqueued, started, finished, wait_begin, wait_end) of the calls "
            "since the last time, or those of them that have ended; stamps in ns, None where nothing is known.");
    const py::object work = py::module_::import("torch._C._distributed_c10d").attr("Work");
    module.attr("timed_wait") =
        py::cpp_function(&pneumo::timed_wait, py::name("wait"), py::is_method(work), py::arg("timeout") = kNoTimeout,
                         py::call_guard<py::gil_scoped_release>(),
                         py::doc("torch.distributed.Work.wait, noted in the record of the call."));
    module.def("simd_level", &pneumo::simd_level, "The instructions that reductions use on this machine.");
    module.def(
        "use_mpi",
        [](const py::capsule& wire, int world_rank) {
            pneumo::wire_maker.make = reinterpret_cast<pneumo::WireMaker::Make>(wire.get_pointer());
            pneumo::wire_maker.world_rank = world_rank;
        },
        py::arg("wire"), py::arg("world_rank"),
        "Reach ranks on other nodes through MPI, with what _mpi.wire() returns.");
    module.def(
        "without_mpi", [](const std::string& why) { pneumo::wire_maker.missing = why; }, py::arg("why"),
        "Say why ranks on other nodes cannot be reached through MPI.");
    module.def(
        "shutdown",
        [] {
            const py::gil_scoped_release released;
            pneumo::Process::stop("the process ends");
        },
        "End what still runs, and the threads; for the end of the process.");
}
