// Collectives between threads that stand for ranks: each has its own engine and doorbell, all share one piece of
// memory. So the sanitizers see what would pass between processes.

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <thread>
#include <vector>

#include "../../src/native/core/group.hpp"
#include "check.hpp"

using namespace pneumo;
using std::chrono::milliseconds;

namespace {

struct Rank {
    Engine engine;
    std::shared_ptr<Group> group;
    explicit Rank(Doorbell& doorbell) : engine(doorbell) {}

    std::shared_ptr<Operation> start(Operation::Body body, bool awaited, milliseconds timeout = milliseconds(20000)) {
        auto operation = group->operation(std::move(body), timeout, group->lane());
        engine.submit(operation, awaited);
        return operation;
    }
    void run(Operation::Body body) {
        auto operation = start(std::move(body), true);
        engine.wait(*operation);
        if (operation->error()) std::rethrow_exception(operation->error());
    }
};

/// The memory and the ranks of one group of threads.
struct World {
    explicit World(int size, Tuning wished, Patience patience) {
        const Tuning tuning = Tuning::fit(wished, size, 8 << 20, true);
        const Layout layout(tuning, size);
        memory = static_cast<std::byte*>(std::aligned_alloc(4096, layout.total));
        std::memset(memory, 0, layout.total);
        std::vector<Group::Member> members;
        for (int k = 0; k < size; ++k) {
            doorbells.push_back(std::make_shared<Doorbell>());
            members.push_back({doorbells.back(), k});
        }
        for (int k = 0; k < size; ++k) {
            ranks.push_back(std::make_unique<Rank>(*doorbells[static_cast<size_t>(k)]));
            ranks.back()->group = std::make_shared<Group>(ranks.back()->engine, memory, k, members, tuning, patience);
        }
    }
    ~World() {
        ranks.clear();
        std::free(memory);
    }
    void each(const std::function<void(Rank&, int)>& work) {
        std::vector<std::thread> threads;
        for (size_t k = 0; k < ranks.size(); ++k)
            threads.emplace_back([&, k] { work(*ranks[k], static_cast<int>(k)); });
        for (auto& thread : threads) thread.join();
    }

    std::byte* memory;
    std::vector<std::shared_ptr<Doorbell>> doorbells;
    std::vector<std::unique_ptr<Rank>> ranks;
};

Call make(Kind kind, size_t count, int root = -1) {
    Call call;
    call.kind = kind;
    call.count = count;
    call.root = root;
    std::strcpy(call.type.data(), "float32");
    return call;
}

/// What rank k gives for element i of the n-th collective: small integers, so that sums are exact in any order.
float value(int n, int rank, size_t i) {
    return static_cast<float>((i * 7 + static_cast<size_t>(rank) * 13 + static_cast<size_t>(n)) % 101);
}

std::vector<float> input(int n, int rank, size_t count) {
    std::vector<float> data(count);
    for (size_t i = 0; i < count; ++i) data[i] = value(n, rank, i);
    return data;
}

/// A copy of data in a rank's arena, or of none; what is in it at the end goes back to the data.
struct Placed {
    Placed(Rank& rank, bool placed, std::vector<float>& data)
        : arena(*rank.group->arena()),
          data(data),
          block(placed ? arena.allocate(data.size() * sizeof(float)) : nullptr) {
        CHECK(!placed || block != nullptr);
        if (block != nullptr) std::copy(data.begin(), data.end(), get());
    }
    ~Placed() {
        if (block == nullptr) return;
        std::copy(get(), get() + data.size(), data.begin());
        arena.free(block);
    }
    float* get() const { return block != nullptr ? reinterpret_cast<float*>(block) : data.data(); }

    Arena& arena;
    std::vector<float>& data;
    std::byte* block;
};

void one(Rank& rank, int me, int size, int n, Kind kind, size_t count, int root, bool placed) {
    const auto ranks = static_cast<size_t>(size);
    auto in = input(n, me, count);
    Call call = make(kind, count, root);
    const size_t bytes = count * sizeof(float);
    std::vector<std::vector<float>> many(ranks, std::vector<float>(count));
    std::vector<void*> places;
    for (auto& part : many) places.push_back(part.data());
    std::vector<const void*> sources(places.begin(), places.end());
    const auto sum = [&](size_t i) {
        float total = 0;
        for (int k = 0; k < size; ++k) total += value(n, k, i);
        return total;
    };
    switch (kind) {
        case Kind::ALLREDUCE: {
            const Placed at(rank, placed, in);
            rank.run([&](Operation& o) { return rank.group->allreduce(o, call, at.get(), at.get(), DType::F32, {}); });
        }
            for (size_t i = 0; i < count; ++i) CHECK(in[i] == sum(i));
            break;
        case Kind::REDUCE:
            rank.run([&](Operation& o) { return rank.group->reduce(o, call, in.data(), in.data(), DType::F32, {}); });
            for (size_t i = 0; i < count; ++i) CHECK(in[i] == (me == root ? sum(i) : value(n, me, i)));
            break;
        case Kind::BROADCAST:
            rank.run([&](Operation& o) { return rank.group->broadcast(o, call, in.data(), bytes); });
            for (size_t i = 0; i < count; ++i) CHECK(in[i] == value(n, root, i));
            break;
        case Kind::ALLGATHER: {
            const Placed at(rank, placed, in);
            rank.run([&](Operation& o) { return rank.group->allgather(o, call, at.get(), places, bytes); });
        }
            for (int k = 0; k < size; ++k) CHECK(many[static_cast<size_t>(k)] == input(n, k, count));
            break;
        case Kind::GATHER:
            if (me != root) places.clear();
            rank.run([&](Operation& o) { return rank.group->gather(o, call, in.data(), places, bytes); });
            for (int k = 0; k < size && me == root; ++k) CHECK(many[static_cast<size_t>(k)] == input(n, k, count));
            break;
        case Kind::SCATTER:
            for (int k = 0; k < size; ++k) many[static_cast<size_t>(k)] = input(n + k, root, count);
            for (size_t k = 0; k < ranks; ++k) sources[k] = many[k].data();
            if (me != root) sources.clear();
            rank.run([&](Operation& o) { return rank.group->scatter(o, call, sources, in.data(), bytes); });
            CHECK(in == input(n + me, root, count));
            break;
        case Kind::REDUCE_SCATTER: {
            std::vector<float> whole;
            for (int k = 0; k < size; ++k) {
                const auto part = input(n + k, me, count);
                whole.insert(whole.end(), part.begin(), part.end());
            }
            const Placed at(rank, placed, whole);
            for (size_t k = 0; k < ranks; ++k) sources[k] = at.get() + k * count;
            rank.run(
                [&](Operation& o) { return rank.group->reduce_scatter(o, call, sources, in.data(), DType::F32, {}); });
        }
            for (size_t i = 0; i < count; ++i) {
                float total = 0;
                for (int k = 0; k < size; ++k) total += value(n + me, k, i);
                CHECK(in[i] == total);
            }
            break;
        case Kind::ALLTOALL: {
            std::vector<std::vector<float>> gives;
            std::vector<size_t> in_bytes, out_bytes;
            for (int k = 0; k < size; ++k) {
                gives.push_back(input(n + k, me, count * static_cast<size_t>((me + k) % 3)));
                many[static_cast<size_t>(k)].resize(count * static_cast<size_t>((me + k) % 3));
                in_bytes.push_back(gives.back().size() * sizeof(float));
            }
            out_bytes = in_bytes;
            for (size_t k = 0; k < ranks; ++k) sources[k] = gives[k].data(), places[k] = many[k].data();
            call.count = 0;
            rank.run([&](Operation& o) { return rank.group->alltoall(o, call, sources, in_bytes, places, out_bytes); });
            for (int k = 0; k < size; ++k) {
                CHECK(many[static_cast<size_t>(k)] == input(n + me, k, count * static_cast<size_t>((me + k) % 3)));
            }
            break;
        }
        case Kind::BARRIER: rank.run([&](Operation& o) { return rank.group->barrier(o, call); }); break;
    }
}

void random_collectives(int size, int rounds, Patience patience, Stores stores = Stores::MEASURED) {
    World world(size, {.one_shot_bytes = 256, .chunk_bytes = 4096, .channel_bytes = 256, .stores = stores}, patience);
    world.each([&](Rank& rank, int me) {
        std::mt19937 random(7);  // the same on every rank
        for (int n = 0; n < rounds; ++n) {
            const auto kind = static_cast<Kind>(random() % 9);
            const size_t counts[] = {0, 1, 63, 64, 65, 1000, 1024, 1025, 5000};
            const size_t count = counts[random() % 9];
            const int root = static_cast<int>(random() % static_cast<unsigned>(size));
            const auto placing = random() % 3;  // of data in arenas: nobody, everybody, some
            const bool placed = placing == 1 || (placing == 2 && (me + n) % 2 == 0);
            if (random() % 8 == 0 && static_cast<int>(random() % static_cast<unsigned>(size)) == me) {
                std::this_thread::sleep_for(milliseconds(1));
            }
            const bool rooted =
                kind == Kind::REDUCE || kind == Kind::BROADCAST || kind == Kind::GATHER || kind == Kind::SCATTER;
            one(rank, me, size, n, kind, kind == Kind::BARRIER ? 0 : count, rooted ? root : -1, placed);
        }
    });
}

void in_flight(int size) {
    World world(size, {.one_shot_bytes = 256, .chunk_bytes = 4096, .channel_bytes = 256}, {});
    world.each([&](Rank& rank, int me) {
        std::vector<std::vector<float>> data;
        std::vector<std::shared_ptr<Operation>> operations;
        for (int n = 0; n < 40; ++n) data.push_back(input(n, me, static_cast<size_t>(n * 50)));
        for (auto& part : data) {
            const Call call = make(Kind::ALLREDUCE, part.size());
            operations.push_back(rank.start(
                [&rank, &part, call](Operation& o) {
                    return rank.group->allreduce(o, call, part.data(), part.data(), DType::F32, {});
                },
                false));
        }
        for (auto it = operations.rbegin(); it != operations.rend(); ++it)
            CHECK(rank.engine.wait(**it) && !(*it)->error());
        for (int n = 0; n < 40; ++n) {
            for (size_t i = 0; i < data[static_cast<size_t>(n)].size(); ++i) {
                float total = 0;
                for (int k = 0; k < size; ++k) total += value(n, k, i);
                CHECK(data[static_cast<size_t>(n)][i] == total);
            }
        }
    });
}

void messages(int size) {
    World world(size, {.one_shot_bytes = 256, .chunk_bytes = 4096, .channel_bytes = 256}, {});
    world.each([&](Rank& rank, int me) {
        // Everybody sends to everybody with several tags, and receives in the opposite order.
        std::vector<std::vector<float>> out, in;
        std::vector<std::shared_ptr<Operation>> operations;
        std::vector<int> source(1000, -1);
        const auto submit = [&](Operation::Body body) {
            operations.push_back(rank.group->operation(std::move(body), milliseconds(20000), nullptr));
            rank.engine.submit(operations.back(), false);
        };
        out.reserve(1000), in.reserve(1000);
        for (int to = 0; to < size; ++to) {
            for (int tag = 0; tag < 5 && to != me; ++tag) {
                out.push_back(input(tag, me * 10 + to, 300));
                submit([&rank, data = &out.back(), to, tag](Operation& o) {
                    return rank.group->send(o, data->data(), data->size() * 4, to, tag);
                });
            }
        }
        std::vector<std::pair<int, int>> wanted;
        for (int from = size - 1; from >= 0; --from) {
            for (int tag = 4; tag >= 0 && from != me; --tag) {
                in.emplace_back(300);
                wanted.emplace_back(from, tag);
                submit([&rank, data = &in.back(), from, tag, s = &source[in.size()]](Operation& o) {
                    return rank.group->receive(o, data->data(), data->size() * 4, from, tag, s);
                });
            }
        }
        for (auto& operation : operations) CHECK(rank.engine.wait(*operation) && !operation->error());
        for (size_t i = 0; i < in.size(); ++i) {
            CHECK(in[i] == input(wanted[i].second, wanted[i].first * 10 + me, 300));
            CHECK(source[i + 1] == wanted[i].first);
        }
    });
}

/// More empty messages with one tag than a mailbox holds.
void empty_messages() {
    World world(2, {.one_shot_bytes = 256, .chunk_bytes = 4096, .channel_bytes = 256}, {});
    world.each([&](Rank& rank, int me) {
        std::vector<std::shared_ptr<Operation>> operations;
        std::vector<int> source(200);
        for (int n = 0; n < 200; ++n) {
            const auto body = [&, n](Operation& o) {
                if (me == 0) return rank.group->send(o, nullptr, 0, 1, 0);
                return rank.group->receive(o, nullptr, 0, 0, 0, &source[static_cast<size_t>(n)]);
            };
            operations.push_back(rank.group->operation(body, milliseconds(20000), nullptr));
            rank.engine.submit(operations.back(), false);
        }
        for (auto& operation : operations) CHECK(rank.engine.wait(*operation) && !operation->error());
    });
}

std::string message_of(const std::shared_ptr<Operation>& operation) {
    try {
        if (operation->error()) std::rethrow_exception(operation->error());
    } catch (const Error& error) {
        return error.what();
    }
    return "";
}

void arena() {
    alignas(4096) static std::byte memory[4 * 4096];
    Arena arena(memory, sizeof(memory));
    CHECK(arena.allocate(5 * 4096) == nullptr);
    std::byte* blocks[4];
    for (int i = 0; i < 4; ++i) {
        blocks[i] = arena.allocate(i == 0 ? 0 : 4000);
        CHECK(blocks[i] == memory + i * 4096);
    }
    CHECK(arena.allocate(1) == nullptr);
    for (const int i : {1, 3, 2}) arena.free(blocks[i]);  // holes grow together whatever the order
    CHECK(arena.allocate(3 * 4096) == blocks[1]);
    arena.free(blocks[0]);
    CHECK(arena.allocate(4096) == blocks[0]);
    CHECK(arena.holds(memory, sizeof(memory)) && !arena.holds(memory + 1, sizeof(memory)));
    CHECK(!arena.holds(memory - 1, 1) && !arena.holds(memory + sizeof(memory), 1));
    CHECK(!Arena(memory, 0).holds(memory, 1));
}

void mismatch() {
    World world(3, {}, {});
    world.each([&](Rank& rank, int me) {
        std::vector<float> data(100);
        const Call call = make(Kind::ALLREDUCE, me == 1 ? 99 : 100);
        auto operation = rank.start(
            [&](Operation& o) { return rank.group->allreduce(o, call, data.data(), data.data(), DType::F32, {}); },
            true);
        CHECK(rank.engine.wait(*operation));
        const auto text = message_of(operation);
        CHECK(text.find("ranks 0, 2 call all_reduce(sum, 100 x float32)") != std::string::npos);
        CHECK(text.find("rank 1 calls all_reduce(sum, 99 x float32)") != std::string::npos);
        auto next = rank.start([&](Operation& o) { return rank.group->barrier(o, {}); }, true);
        CHECK(rank.engine.wait(*next) && !message_of(next).empty());
    });
}

void missing() {
    World world(3, {}, {});
    world.each([&](Rank& rank, int me) {
        if (me == 2) std::this_thread::sleep_for(milliseconds(1500));
        auto operation =
            rank.start([&](Operation& o) { return rank.group->barrier(o, {}); }, me == 0, milliseconds(500));
        CHECK(rank.engine.wait(*operation));
        const auto text = message_of(operation);
        if (me < 2)
            CHECK(text.find("timed out: rank 2 has not come") != std::string::npos ||
                  text.find("gave up") != std::string::npos);
        if (me == 2) CHECK(text.find("gave up") != std::string::npos);
    });
}

void leaving() {
    World world(2, {}, {});
    world.each([&](Rank& rank, int me) {
        if (me == 1) {
            rank.group->leave();
            return;
        }
        auto operation = rank.start([&](Operation& o) { return rank.group->barrier(o, {}); }, false);
        CHECK(rank.engine.wait(*operation));
        CHECK(message_of(operation).find("rank 1 left the group") != std::string::npos);
    });
}

}  // namespace

int main() {
    const Patience spinning{std::chrono::microseconds(200), std::chrono::microseconds(50)};
    for (const int size : {1, 2, 3, 4, 7}) {
        random_collectives(size, 300, {});
        random_collectives(size, 100, spinning);
        random_collectives(size, 100, spinning, Stores::STREAMED);
        in_flight(size);
        messages(size);
    }
    arena();
    empty_messages();
    mismatch();
    missing();
    leaving();
    std::printf("test_group: %d checks\n", checks.load());
}
