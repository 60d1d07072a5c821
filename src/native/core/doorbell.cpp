#include "doorbell.hpp"

#include <unistd.h>

#include <fstream>
#include <map>
#include <mutex>
#include <optional>
#include <sstream>

namespace pneumo {
namespace {

struct ProcessStatus {
    char state;
    int64_t start_time;
};

std::optional<ProcessStatus> status_of(int64_t pid) {
    std::ifstream file("/proc/" + std::to_string(pid) + "/stat");
    std::string line;
    if (!std::getline(file, line)) return std::nullopt;
    // The command's name, in parentheses, may itself hold spaces and parentheses.
    std::istringstream fields(line.substr(line.rfind(')') + 1));
    ProcessStatus status{};
    std::string skipped;
    fields >> status.state;
    for (int field = 4; field < 22; ++field) fields >> skipped;
    fields >> status.start_time;
    return status;
}

bool alive(const std::optional<ProcessStatus>& status) {
    return status && status->state != 'Z' && status->state != 'X';
}

}  // namespace

bool has_ended(int64_t pid) { return !alive(status_of(pid)); }

bool has_died(const Doorbell& doorbell) {
    if (doorbell.pid == 0) return false;
    const auto status = status_of(doorbell.pid);
    return !alive(status) || status->start_time != doorbell.start_time;
}

void sign(Doorbell& doorbell) {
    const auto status = status_of(getpid());
    doorbell.start_time = status ? status->start_time : 0;
    doorbell.pid = status ? getpid() : 0;
}

std::shared_ptr<Doorbell> open_doorbell(const std::string& handle) {
    static std::mutex mutex;
    static std::map<std::string, std::weak_ptr<Segment>> known;
    std::lock_guard lock(mutex);
    auto segment = known[handle].lock();
    if (!segment) {
        segment = std::make_shared<Segment>(Segment::open(handle));
        known[handle] = segment;
    }
    return {segment, reinterpret_cast<Doorbell*>(segment->data())};
}

}  // namespace pneumo
