#pragma once

#include <stdexcept>
#include <string>

namespace pneumo {

/// What a collective ends with when it cannot be done; the message names operation, sequence number and ranks.
class Error : public std::runtime_error {
   public:
    enum class Kind { MISMATCH, TIMEOUT, PEER_LOST, ABORTED, SYSTEM };

    Error(Kind kind, const std::string& message) : std::runtime_error(message), kind_(kind) {}
    Kind kind() const { return kind_; }

   private:
    Kind kind_;
};

}  // namespace pneumo
