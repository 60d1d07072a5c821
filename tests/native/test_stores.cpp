// How slots are written: the copy past the caches at every alignment, and when the choice between the ways changes.

#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../../src/native/core/stores.hpp"
#include "check.hpp"

using namespace pneumo;

namespace {

void copies() {
    constexpr size_t kMost = 300, kMargin = 64;
    std::vector<unsigned char> from(kMost + 2 * kMargin), to(from.size()), expected(from.size());
    for (size_t i = 0; i < from.size(); ++i) from[i] = static_cast<unsigned char>(i * 7 + 1);
    for (size_t offset = 0; offset < kMargin; ++offset) {
        for (const size_t bytes : {0UL, 1UL, 15UL, 16UL, 17UL, 63UL, 64UL, 65UL, 128UL, 200UL, kMost}) {
            const size_t source = (offset * 5) % kMargin;
            std::memset(to.data(), 0, to.size());
            std::memset(expected.data(), 0, expected.size());
            std::memcpy(expected.data() + offset, from.data() + source, bytes);
            stream(to.data() + offset, from.data() + source, bytes);
            CHECK(to == expected);
        }
    }
}

/// A choice of two ranks, of which this is the first, and the costs that both tell in each period.
struct Told {
    explicit Told(Stores wished) : choice(wished) {}

    /// Whether slots are streamed after the next decision, before which each rank tells these picoseconds a byte.
    bool after(uint32_t cached, uint32_t streamed) {
        const auto enter = [&] {
            choice.enter(round, 1 << 16, 0, 2, [&](int k) -> auto& { return costs[static_cast<size_t>(k)]; });
        };
        for (; StoreChoice::place(round) != StoreChoice::kDecide; ++round) enter();
        for (auto& cost : costs) cost[0] = cached, cost[1] = streamed;
        enter();
        return choice.streamed(round++);
    }

    StoreChoice choice;
    std::array<StoreChoice::Costs, 2> costs{};
    uint64_t round = 0;
};

void decides() {
    if (!kCanStream) return;
    Told told(Stores::MEASURED);
    CHECK(!told.after(100, 95));  // not by a tenth
    CHECK(!told.after(100, 50));  // once may be a disturbance
    CHECK(!told.after(100, 120));
    CHECK(!told.after(100, 50));
    CHECK(told.after(100, 50));
    CHECK(told.after(100, 95));
    CHECK(told.after(0, 95));  // unknown
    CHECK(told.after(50, 100));
    CHECK(!told.after(50, 100));
    CHECK(told.round == 7 * StoreChoice::kPeriod + StoreChoice::kDecide + 1);  // the first two periods are short
    Told cached(Stores::CACHED), streamed(Stores::STREAMED);
    for (int i = 0; i < 3; ++i) {
        CHECK(!cached.after(100, 50));
        CHECK(streamed.after(50, 100));
    }
}

/// The trial: which rounds go which way, and that a rank tells what its own work took.
void tries() {
    if (!kCanStream) return;
    StoreChoice choice(Stores::MEASURED);
    StoreChoice::Costs mine{};
    for (uint64_t round = 0; round < StoreChoice::kTell; ++round) {
        CHECK(choice.streamed(round) == (round >= StoreChoice::kTrial && round < 2 * StoreChoice::kTrial));
        choice.enter(round, 1 << 16, 0, 1, [&](int) -> StoreChoice::Costs& { return mine; });
        const StoreChoice::Watch watch(choice, round);
        const auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(round < 8 ? 100 : 300);
        while (std::chrono::steady_clock::now() < until) {
        }
    }
    CHECK(mine[0] == 0 && mine[1] == 0);
    choice.enter(StoreChoice::kTell, 1 << 16, 0, 1, [&](int) -> StoreChoice::Costs& { return mine; });
    CHECK(mine[0] >= 100'000'000 / (1 << 16));  // at least; a disturbed machine takes longer
    CHECK(mine[1] >= 300'000'000 / (1 << 16));
}

}  // namespace

int main() {
    copies();
    decides();
    tries();
    std::printf("test_stores: %d checks\n", checks.load());
}
