// Messages between nodes through MPI: a library of its own, so that the rest loads where no MPI is.

#include <mpi.h>
#include <pybind11/pybind11.h>

#include <array>
#include <chrono>
#include <limits>
#include <string>
#include <vector>

#include "../core/error.hpp"
#include "../core/futex.hpp"
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

/// `bytes` bytes as a count of a type, since MPI counts in int.
class Bytes {
   public:
    explicit Bytes(size_t bytes) {
        constexpr size_t kBlock = 1 << 20;
        if (bytes <= static_cast<size_t>(std::numeric_limits<int>::max())) {
            count = static_cast<int>(bytes);
            return;
        }
        MPI_Datatype block = MPI_DATATYPE_NULL;
        check(MPI_Type_contiguous(kBlock, MPI_BYTE, &block), "MPI_Type_contiguous");
        const std::array<int, 2> lengths{static_cast<int>(bytes / kBlock), static_cast<int>(bytes % kBlock)};
        const std::array<MPI_Aint, 2> places{0, static_cast<MPI_Aint>(bytes / kBlock * kBlock)};
        const std::array<MPI_Datatype, 2> types{block, MPI_BYTE};
        check(MPI_Type_create_struct(2, lengths.data(), places.data(), types.data(), &type), "MPI_Type_create_struct");
        check(MPI_Type_commit(&type), "MPI_Type_commit");
        MPI_Type_free(&block);
    }
    ~Bytes() {
        if (type != MPI_BYTE) MPI_Type_free(&type);  // once what uses it is done
    }
    Bytes(const Bytes&) = delete;
    Bytes& operator=(const Bytes&) = delete;

    int count = 1;
    MPI_Datatype type = MPI_BYTE;
};

size_t bytes_of(const MPI_Status& status) {
    MPI_Count count = 0;
    MPI_Get_elements_x(&status, MPI_BYTE, &count);
    return static_cast<size_t>(count);
}

class MpiRequest final : public Wire::Request {
   public:
    explicit MpiRequest(size_t expected) : expected_(expected) {}
    ~MpiRequest() override {
        int finalized = 0;
        MPI_Finalized(&finalized);
        if (request == MPI_REQUEST_NULL || finalized != 0) return;
        if (expected_ != kSent) MPI_Cancel(&request);  // a send cannot be cancelled
        // What is on its way goes on for a moment; of a peer that is gone nothing comes any more.
        const auto limit = Clock::now() + kLetGo;
        for (int flag = 0; flag == 0 && Clock::now() < limit;) MPI_Test(&request, &flag, MPI_STATUS_IGNORE);
        if (request != MPI_REQUEST_NULL) MPI_Request_free(&request);
    }
    bool done() override {
        int flag = 0;
        MPI_Status status;
        check(MPI_Test(&request, &flag, &status), "MPI_Test");
        if (flag == 0 || expected_ == kSent) return flag != 0;
        if (bytes_of(status) != expected_) {
            throw Error(Error::Kind::MISMATCH, "a message of " + std::to_string(bytes_of(status)) +
                                                   " bytes came where " + std::to_string(expected_) + " were expected");
        }
        expected_ = kSent;
        return true;
    }

    static constexpr std::chrono::milliseconds kLetGo{100};
    static constexpr size_t kSent = std::numeric_limits<size_t>::max();
    MPI_Request request = MPI_REQUEST_NULL;

   private:
    size_t expected_;  // of a receive that is not done; kSent else
};

class MpiFound final : public Wire::Found {
   public:
    MpiFound(MPI_Message message, const MPI_Status& status)
        : message_(message), source_(status.MPI_SOURCE), bytes_(bytes_of(status)) {}
    int source() const override { return source_; }
    size_t bytes() const override { return bytes_; }
    std::unique_ptr<Wire::Request> receive(void* data) override {
        auto request = std::make_unique<MpiRequest>(bytes_);
        const Bytes whole(bytes_);
        check(MPI_Imrecv(data, whole.count, whole.type, &message_, &request->request), "MPI_Imrecv");
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
    int last_tag() const override {
        int *last = nullptr, known = 0;
        check(MPI_Comm_get_attr(comm_, MPI_TAG_UB, &last, &known), "MPI_Comm_get_attr");
        return known != 0 ? *last : 32767;  // which MPI promises at least
    }

    MpiWire(const MpiWire&) = delete;
    MpiWire& operator=(const MpiWire&) = delete;

    std::unique_ptr<Request> send(const void* data, size_t bytes, int to, int tag) override {
        auto message = std::make_unique<MpiRequest>(MpiRequest::kSent);
        const Bytes whole(bytes);
        check(MPI_Isend(data, whole.count, whole.type, to, tag, comm_, &message->request), "MPI_Isend");
        return message;
    }
    std::unique_ptr<Request> receive(void* data, size_t bytes, int from, int tag) override {
        auto message = std::make_unique<MpiRequest>(bytes);
        const Bytes whole(bytes);
        check(MPI_Irecv(data, whole.count, whole.type, from, tag, comm_, &message->request), "MPI_Irecv");
        return message;
    }
    std::unique_ptr<Found> find(int tag, int from) override {
        int flag = 0;
        MPI_Message message = MPI_MESSAGE_NULL;
        MPI_Status status;
        check(MPI_Improbe(from < 0 ? MPI_ANY_SOURCE : from, tag, comm_, &flag, &message, &status), "MPI_Improbe");
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
