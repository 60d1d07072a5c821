// Messages between nodes through MPI: a library of its own, so that the rest loads where no MPI is.

#include <mpi.h>
#include <pybind11/pybind11.h>

#include <limits>
#include <string>
#include <vector>

#include "../core/error.hpp"
#include "../core/wire.hpp"

namespace pneumo {
namespace {

/// Throws Error for what MPI did not do.
void check(int code, const char* call) {
    if (code == MPI_SUCCESS) return;
    char text[MPI_MAX_ERROR_STRING];
    int length = 0;
    MPI_Error_string(code, text, &length);
    throw Error(Error::Kind::SYSTEM, std::string(call) + ": " + std::string(text, static_cast<size_t>(length)));
}

class MpiRequest final : public Wire::Request {
   public:
    explicit MpiRequest(size_t expected) : expected_(expected) {}
    ~MpiRequest() override {
        int finalized = 0;
        MPI_Finalized(&finalized);
        if (request == MPI_REQUEST_NULL || finalized != 0) return;
        MPI_Cancel(&request);
        MPI_Request_free(&request);
    }
    bool done() override {
        int flag = 0;
        MPI_Status status;
        check(MPI_Test(&request, &flag, &status), "MPI_Test");
        if (flag == 0 || expected_ == kSent) return flag != 0;
        int count = 0;
        MPI_Get_count(&status, MPI_BYTE, &count);
        if (static_cast<size_t>(count) != expected_) {
            throw Error(Error::Kind::MISMATCH, "a message of " + std::to_string(count) + " bytes came where " +
                                                   std::to_string(expected_) + " were expected");
        }
        expected_ = kSent;
        return true;
    }

    static constexpr size_t kSent = std::numeric_limits<size_t>::max();
    MPI_Request request = MPI_REQUEST_NULL;

   private:
    size_t expected_;  // of a receive that is not done
};

class MpiFound final : public Wire::Found {
   public:
    MpiFound(MPI_Message message, const MPI_Status& status) : message_(message), source_(status.MPI_SOURCE) {
        int count = 0;
        MPI_Get_count(&status, MPI_BYTE, &count);
        bytes_ = static_cast<size_t>(count);
    }
    int source() const override { return source_; }
    size_t bytes() const override { return bytes_; }
    std::unique_ptr<Wire::Request> receive(void* data) override {
        auto request = std::make_unique<MpiRequest>(bytes_);
        check(MPI_Imrecv(data, static_cast<int>(bytes_), MPI_BYTE, &message_, &request->request), "MPI_Imrecv");
        return request;
    }

   private:
    MPI_Message message_;
    int source_;
    size_t bytes_;
};

class MpiWire final : public Wire {
   public:
    /// Collective over the members, whose ranks in MPI_COMM_WORLD are given in the order of the group.
    explicit MpiWire(const std::vector<int>& world_ranks) {
        MPI_Group world = MPI_GROUP_NULL, members = MPI_GROUP_NULL;
        check(MPI_Comm_group(MPI_COMM_WORLD, &world), "MPI_Comm_group");
        check(MPI_Group_incl(world, static_cast<int>(world_ranks.size()), world_ranks.data(), &members),
              "MPI_Group_incl");
        check(MPI_Comm_create_group(MPI_COMM_WORLD, members, 0, &comm_), "MPI_Comm_create_group");
        MPI_Group_free(&members);
        MPI_Group_free(&world);
        check(MPI_Comm_set_errhandler(comm_, MPI_ERRORS_RETURN), "MPI_Comm_set_errhandler");
    }
    ~MpiWire() override {
        int finalized = 0;
        MPI_Finalized(&finalized);
        if (finalized == 0) MPI_Comm_free(&comm_);
    }
    MpiWire(const MpiWire&) = delete;
    MpiWire& operator=(const MpiWire&) = delete;

    std::unique_ptr<Request> send(const void* data, size_t bytes, int to, int tag) override {
        auto message = std::make_unique<MpiRequest>(MpiRequest::kSent);
        check(MPI_Isend(data, static_cast<int>(bytes), MPI_BYTE, to, tag, comm_, &message->request), "MPI_Isend");
        return message;
    }
    std::unique_ptr<Request> receive(void* data, size_t bytes, int from, int tag) override {
        auto message = std::make_unique<MpiRequest>(bytes);
        check(MPI_Irecv(data, static_cast<int>(bytes), MPI_BYTE, from, tag, comm_, &message->request), "MPI_Irecv");
        return message;
    }
    std::unique_ptr<Found> find(int tag) override {
        int flag = 0;
        MPI_Message message = MPI_MESSAGE_NULL;
        MPI_Status status;
        check(MPI_Improbe(MPI_ANY_SOURCE, tag, comm_, &flag, &message, &status), "MPI_Improbe");
        if (flag == 0) return nullptr;
        return std::make_unique<MpiFound>(message, status);
    }

   private:
    MPI_Comm comm_ = MPI_COMM_NULL;
};

std::unique_ptr<Wire> make(const std::vector<int>& world_ranks) { return std::make_unique<MpiWire>(world_ranks); }

}  // namespace
}  // namespace pneumo

PYBIND11_MODULE(_mpi, module) {
    module.doc() = "Messages between nodes through MPI, for pneumo.comm.";
    module.def(
        "wire", [] { return pybind11::capsule(reinterpret_cast<void*>(&pneumo::make), "pneumo.wire"); },
        "The function that makes a wire, for _native.use_mpi.");
}
