#pragma once

#include <chrono>
#include <cstddef>
#include <memory>

namespace pneumo {

/// Nobody rings for what comes over a wire: it is looked at this often.
constexpr std::chrono::microseconds kWirePoll{50};

/// Messages between any two ranks of a group, through something that has to be polled: MPI.
class Wire {
   public:
    class Request {
       public:
        /// Of one that is not done: as far as that can be had, nobody reads or writes its buffer afterwards.
        virtual ~Request() = default;
        /// Whether the message has been taken over (sent) or is there (received); throws Error.
        virtual bool done() = 0;
    };

    /// A message that has come and that nobody else will get.
    class Found {
       public:
        virtual ~Found() = default;
        virtual int source() const = 0;
        virtual size_t bytes() const = 0;
        /// Start to receive it, once, into `bytes()` bytes.
        virtual std::unique_ptr<Request> receive(void* data) = 0;
    };

    virtual ~Wire() = default;
    /// The largest tag of a message.
    virtual int last_tag() const = 0;
    /// Start to send `bytes` to a rank of the group; messages of one tag arrive in order.
    virtual std::unique_ptr<Request> send(const void* data, size_t bytes, int to, int tag) = 0;
    /// Start to receive exactly `bytes` from a rank of the group.
    virtual std::unique_ptr<Request> receive(void* data, size_t bytes, int from, int tag) = 0;
    /// Look for a message with this tag from a rank, -1: from any; null where there is none.
    virtual std::unique_ptr<Found> find(int tag, int from = -1) = 0;
};

}  // namespace pneumo
