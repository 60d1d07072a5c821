#include "node.hpp"

#include <pthread.h>
#include <sched.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdlib>
#include <fstream>
#include <functional>
#include <limits>
#include <map>
#include <set>
#include <sstream>

#include "cluster.hpp"

namespace pneumo {
namespace {

std::string first_line(const std::string& path) {
    std::ifstream file(path);
    std::string line;
    std::getline(file, line);
    return line;
}

struct Own {
    explicit Own(Segment::Kind kind) : segment(Segment::create(kind, 4096)) {
        auto* doorbell = reinterpret_cast<Doorbell*>(segment.data());
        sign(*doorbell);
        engine = new Engine(*doorbell);  // lives as long as the process: a thread may be asleep in it at its end
    }
    Segment segment;
    Engine* engine;
};

Own* own = nullptr;  // of the process; a forked child sees its parent's

}  // namespace

Process Process::get(Segment::Kind kind) {
    static std::mutex mutex;
    std::lock_guard lock(mutex);
    if (own != nullptr && !own->engine->usable()) {
        throw Error(Error::Kind::SYSTEM, "a process that was forked from one which uses this backend cannot use it");
    }
    if (own == nullptr) {
        own = new Own(kind);
        pthread_atfork(nullptr, nullptr, [] { own->engine->forked(); });
    }
    return {*own->engine, own->segment.handle()};
}

void Process::stop(const std::string& reason) {
    if (own == nullptr || !own->engine->usable()) return;
    Cluster::abort_all(reason);
    own->engine->shutdown(std::make_exception_ptr(Error(Error::Kind::ABORTED, reason)));
    const bool named = own->segment.named();
    own->segment.hide();
    // Whoever noticed a death may have come before the last thread of the dead, which holds its files.
    if (named) Segment::sweep();
}

std::string node_identity() {
    std::ostringstream text;
    char host[256] = {};
    gethostname(host, sizeof(host) - 1);
    struct stat pids{};
    stat("/proc/self/ns/pid", &pids);
    text << host << " " << first_line("/proc/sys/kernel/random/boot_id") << " " << pids.st_ino << " " << getuid();
    return text.str();
}

std::vector<int> usable_cores() {
    std::vector<int> cores;
    for (int most = 1024; most <= 1 << 20; most *= 2) {
        cpu_set_t* mask = CPU_ALLOC(static_cast<size_t>(most));
        const size_t bytes = CPU_ALLOC_SIZE(static_cast<size_t>(most));
        const bool known = sched_getaffinity(0, bytes, mask) == 0;
        for (int core = 0; known && core < most; ++core) {
            if (CPU_ISSET_S(static_cast<size_t>(core), bytes, mask)) cores.push_back(core);
        }
        CPU_FREE(mask);
        if (known) break;
    }
    return cores;
}

double core_quota() {
    // The limits of all groups above this process's count too.
    double quota = std::numeric_limits<double>::max();
    const auto limited = [&quota](double micros, double period) {
        if (micros > 0 && period > 0) quota = std::min(quota, micros / period);
    };
    std::ifstream file("/proc/self/cgroup");
    for (std::string line; std::getline(file, line);) {  // id:controllers:path
        const size_t first = line.find(':'), second = line.find(':', first + 1);
        if (second == std::string::npos) continue;
        const std::string controllers = line.substr(first + 1, second - first - 1);
        const bool unified = controllers.empty();  // version 2
        if (!unified && ("," + controllers + ",").find(",cpu,") == std::string::npos) continue;
        const std::string base = "/sys/fs/cgroup" + (unified ? "" : "/" + controllers);
        for (std::string path = line.substr(second + 1);; path = path.substr(0, path.rfind('/'))) {
            if (path == "/") path.clear();
            double micros = 0, period = 0;
            std::istringstream(first_line(base + path + "/cpu.max")) >> micros >> period;
            limited(micros, period);
            micros = period = 0;
            std::istringstream(first_line(base + path + "/cpu.cfs_quota_us")) >> micros;
            std::istringstream(first_line(base + path + "/cpu.cfs_period_us")) >> period;
            limited(micros, period);
            if (path.empty()) break;
        }
    }
    return quota;
}

size_t cores_at_once(const std::vector<std::vector<int>>& masks) {
    // A largest matching of ranks with cores, by augmenting paths.
    std::map<int, size_t> owner;
    size_t found = 0;
    for (size_t rank = 0; rank < masks.size(); ++rank) {
        std::set<int> seen;
        const std::function<bool(size_t)> place = [&](size_t who) {
            for (const int core : masks[who]) {
                if (!seen.insert(core).second) continue;
                const auto taken = owner.find(core);
                if (taken != owner.end() && !place(taken->second)) continue;
                owner[core] = who;
                return true;
            }
            return false;
        };
        if (place(rank)) ++found;
    }
    return found;
}

size_t setting(const char* name, size_t otherwise) {
    const char* text = std::getenv(name);
    if (text == nullptr || *text == 0) return otherwise;
    char* end = nullptr;
    double value = std::strtod(text, &end);
    const std::string unit(end);
    const size_t found = unit.size() == 1 ? std::string("KMG").find(unit) : std::string::npos;
    const size_t power = unit.empty() ? 0 : found + 1;
    if (end == text || !(value >= 0 && value < 1e15) || (!unit.empty() && found == std::string::npos)) {
        throw Error(Error::Kind::SYSTEM, std::string(name) + " is \"" + text + "\", not a number (with K, M or G)");
    }
    for (size_t i = 0; i < power; ++i) value *= 1024;
    return static_cast<size_t>(value);
}

Patience patience_for(int ranks, size_t cores, double quota) {
    const bool enough = static_cast<double>(ranks) <= std::min(static_cast<double>(cores), quota);
    const auto blocked = static_cast<int64_t>(setting("PNEUMO_COMM_SPIN_US", enough ? 1000 : 300));
    return {std::chrono::microseconds(blocked), std::chrono::microseconds(std::min<int64_t>(blocked, 50)), !enough};
}

}  // namespace pneumo
