#include "bootstrap.hpp"

#include <unistd.h>

#include <algorithm>
#include <limits>
#include <numeric>
#include <sstream>

#include "../core/node.hpp"

namespace pneumo {
namespace {

using std::chrono::milliseconds;

/// Words that ranks tell each other through the store, under keys that no earlier group has used.
class Board {
   public:
    Board(c10d::Store& store, int rank, const std::vector<int>& names, milliseconds timeout)
        : store_(store), rank_(rank), names_(names), deadline_(Clock::now() + timeout) {
        // A store may be used again for a group of the same name: the n-th start of each rank belongs together.
        const int64_t starts = store_.add("start/" + std::to_string(rank), 1);
        prefix_ = std::to_string(starts) + "/";
    }

    void write(const std::string& key, const std::string& text) { store_.set(name(key, rank_), text); }

    std::string read(const std::string& key, int rank) {
        wait(key, {rank});
        return store_.get_to_str(name(key, rank));
    }

    /// What each of these ranks, of which this is one, has to say.
    std::vector<std::string> exchange(const std::string& key, const std::string& mine, const std::vector<int>& ranks) {
        write(key, mine);
        std::vector<std::string> texts;
        wait(key, ranks);
        for (const int rank : ranks) texts.push_back(rank == rank_ ? mine : store_.get_to_str(name(key, rank)));
        return texts;
    }

   private:
    /// Wait until all of these ranks have written; throws Error that names those that have not.
    void wait(const std::string& key, const std::vector<int>& ranks) {
        std::vector<std::string> keys;
        for (const int rank : ranks) keys.push_back(name(key, rank));
        const auto left = std::chrono::duration_cast<milliseconds>(deadline_ - Clock::now());
        try {
            store_.wait(keys, std::max(left, milliseconds(1)));
        } catch (const std::exception& error) {
            if (Clock::now() + milliseconds(50) < deadline_) {
                throw Error(Error::Kind::SYSTEM, std::string("the store of the process group failed: ") +
                                                     std::string(error.what()).substr(0, 200));
            }
            std::string missing;
            int count = 0;
            for (size_t i = 0; i < ranks.size(); ++i) {
                if (store_.check({keys[i]})) continue;
                missing += (count++ > 0 ? ", " : "") + std::to_string(names_[static_cast<size_t>(ranks[i])]);
            }
            throw Error(Error::Kind::TIMEOUT, (count == 1 ? "rank " : "ranks ") + missing +
                                                  " did not come to the start of the process group");
        }
    }
    std::string name(const std::string& key, int rank) const { return prefix_ + key + "/" + std::to_string(rank); }

    c10d::Store& store_;
    int rank_;
    const std::vector<int>& names_;
    Clock::time_point deadline_;
    std::string prefix_;
};

std::vector<std::string> lines(const std::string& text) {
    std::vector<std::string> parts;
    std::istringstream stream(text);
    for (std::string line; std::getline(stream, line);) parts.push_back(line);
    return parts;
}

/// What a setting's word stands for, one of these; the first where it is not set.
template <class Value>
Value choice(const char* name, const std::vector<std::pair<std::string, Value>>& words) {
    const char* text = std::getenv(name);
    const std::string word = text == nullptr ? words.front().first : text;
    std::string all;
    for (size_t i = 0; i < words.size(); ++i) {
        if (words[i].first == word) return words[i].second;
        all += (i == 0 ? "" : i + 1 < words.size() ? ", " : " or ") + words[i].first;
    }
    throw Error(Error::Kind::SYSTEM, std::string(name) + " is \"" + word + "\", and may be " + all);
}

Segment::Kind wished_kind() {
    return choice<Segment::Kind>("PNEUMO_COMM_SHM", {{"memfd", Segment::Kind::MEMFD}, {"posix", Segment::Kind::POSIX}});
}

Stores wished_stores() {
    return choice<Stores>("PNEUMO_COMM_STORES",
                          {{"measured", Stores::MEASURED}, {"cached", Stores::CACHED}, {"streamed", Stores::STREAMED}});
}

Tuning wished_tuning() {
    Tuning tuning;
    tuning.chunk_bytes = setting("PNEUMO_COMM_CHUNK", tuning.chunk_bytes);
    tuning.one_shot_bytes = setting("PNEUMO_COMM_ONE_SHOT", tuning.one_shot_bytes);
    tuning.stores = wished_stores();
    return tuning;
}

std::string join(const std::vector<int>& numbers) {
    std::string text;
    for (const int number : numbers) text += std::to_string(number) + " ";
    return text;
}

/// What a rank says of itself at the start.
struct Introduction {
    std::string node, doorbell;
    std::vector<int> cores;
    double quota = 0;
    int world_rank = -1;
    int pid = 0;

    std::string text() const {
        std::ostringstream text;
        text << node << "\n" << doorbell << "\n" << join(cores) << "\n" << quota << "\n" << world_rank << "\n" << pid;
        return text.str();
    }
    static Introduction parse(const std::string& text) {
        const auto parts = lines(text);
        Introduction found{parts[0], parts[1], {}, std::stod(parts[3]), std::stoi(parts[4]), std::stoi(parts[5])};
        std::istringstream list(parts[2]);
        for (int core = 0; list >> core;) found.cores.push_back(core);
        return found;
    }
};

/// Set up the memory that the ranks of one node share; `all` in the order of the group, `mine` those of this node.
std::shared_ptr<Group> share_memory(Board& board, Engine& engine, Segment& segment,
                                    const std::vector<Introduction>& all, const std::vector<int>& mine, int rank,
                                    const std::vector<int>& names) {
    std::vector<std::vector<int>> cores;
    double quota = std::numeric_limits<double>::max();
    for (const int member : mine) {
        const auto& other = all[static_cast<size_t>(member)];
        cores.push_back(other.cores);
        quota = std::min(quota, other.quota);
    }
    const int size = static_cast<int>(mine.size());
    const Patience patience = patience_for(size, cores_at_once(cores), quota);
    const int place = static_cast<int>(std::find(mine.begin(), mine.end(), rank) - mine.begin());

    // The first rank makes the memory and says how it is cut. Each kind is tried until one can be opened by all.
    for (Segment::Kind kind = wished_kind();; kind = Segment::Kind::POSIX) {
        const std::string attempt = kind == Segment::Kind::MEMFD ? "memfd" : "posix";
        std::string trouble;
        Tuning tuning;
        std::vector<Group::Member> members;
        try {
            if (place == 0) {
                std::ostringstream text;
                try {
                    // What has a name in /dev/shm is reserved there at once, so it holds no arenas.
                    tuning = Tuning::fit(wished_tuning(), size, setting("PNEUMO_COMM_BYTES", 64 << 20),
                                         kind == Segment::Kind::MEMFD);
                    segment = Segment::create(kind, Layout(tuning, size).total);
                    text << "\n"
                         << segment.handle() << "\n"
                         << tuning.one_shot_bytes << " " << tuning.chunk_bytes << " " << tuning.channel_bytes << " "
                         << tuning.arena_bytes << " " << static_cast<int>(tuning.stores);
                } catch (const Error& error) {
                    board.write(attempt, error.what());
                    throw;
                }
                board.write(attempt, text.str());
            } else {
                const auto text = lines(board.read(attempt, mine[0]));
                if (!text[0].empty()) throw Error(Error::Kind::SYSTEM, text[0]);
                std::istringstream numbers(text[2]);
                int stores = 0;
                numbers >> tuning.one_shot_bytes >> tuning.chunk_bytes >> tuning.channel_bytes >> tuning.arena_bytes >>
                    stores;
                tuning.stores = static_cast<Stores>(stores);
                segment = Segment::open(text[1]);
            }
            for (const int member : mine) {
                members.push_back(
                    {open_doorbell(all[static_cast<size_t>(member)].doorbell), names[static_cast<size_t>(member)]});
            }
        } catch (const Error& error) {
            if (error.kind() == Error::Kind::TIMEOUT) throw;
            trouble = error.what();
        }
        for (const auto& text : board.exchange(attempt + "-done", trouble, mine)) {
            if (trouble.empty()) trouble = text;
        }
        if (trouble.empty()) {
            segment.hide();
            return std::make_shared<Group>(engine, segment.data(), place, std::move(members), tuning, patience);
        }
        segment = Segment();
        for (const int member : mine) {
            if (!has_ended(all[static_cast<size_t>(member)].pid)) continue;
            throw Error(Error::Kind::PEER_LOST, "rank " + std::to_string(names[static_cast<size_t>(member)]) +
                                                    " died at the start of the process group");
        }
        if (kind == Segment::Kind::POSIX) throw Error(Error::Kind::SYSTEM, trouble);
    }
}

}  // namespace

std::shared_ptr<Node> bootstrap(c10d::Store& store, int rank, int size, const std::vector<int>& names,
                                milliseconds timeout) {
    Board board(store, rank, names, timeout);
    const Process process = Process::get(wished_kind());
    const Introduction me{node_identity(), process.doorbell_handle, usable_cores(),
                          core_quota(),    wire_maker.world_rank,   getpid()};
    std::vector<int> everybody(static_cast<size_t>(size));
    std::iota(everybody.begin(), everybody.end(), 0);
    std::vector<Introduction> all;
    for (const auto& text : board.exchange("who", me.text(), everybody)) all.push_back(Introduction::parse(text));

    std::vector<std::vector<int>> nodes;
    std::vector<int> mine, world_ranks;
    for (const int member : everybody) {
        const auto& other = all[static_cast<size_t>(member)];
        const auto same = [&](const auto& node) { return all[static_cast<size_t>(node[0])].node == other.node; };
        const auto found = std::find_if(nodes.begin(), nodes.end(), same);
        if (found == nodes.end()) {
            nodes.push_back({member});
        } else {
            found->push_back(member);
        }
        if (other.node == me.node) mine.push_back(member);
        world_ranks.push_back(other.world_rank);
    }
    if (nodes.size() > 1 && std::count(world_ranks.begin(), world_ranks.end(), -1) > 0) {
        throw Error(Error::Kind::SYSTEM, "ranks " + std::to_string(names[static_cast<size_t>(nodes[0][0])]) + " and " +
                                             std::to_string(names[static_cast<size_t>(nodes[1][0])]) +
                                             " are on different nodes, which needs MPI: " + wire_maker.missing);
    }
    auto node = std::make_shared<Node>();
    auto group = share_memory(board, process.engine, node->segment, all, mine, rank, names);
    node->communicator = group;
    if (nodes.size() > 1) {
        node->communicator =
            std::make_shared<Cluster>(group, wire_maker.make(world_ranks), rank, std::move(nodes), names);
    }
    return node;
}

}  // namespace pneumo
