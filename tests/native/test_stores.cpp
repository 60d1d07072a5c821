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

    /// Whether slots are streamed after the next decision, before which this rank has told these picoseconds a byte,
    /// and the other those.
    bool after(uint32_t cached, uint32_t streamed, uint32_t other_cached = 100, uint32_t other_streamed = 100) {
        const auto enter = [&] {
            choice.enter(round, {0, 1 << 16}, 0, 2, [&](int k) -> auto& { return costs[static_cast<size_t>(k)]; });
        };
        for (; StoreChoice::place(round) != StoreChoice::kDecide; ++round) enter();
        costs[0][0] = cached, costs[0][1] = streamed, costs[1][0] = other_cached, costs[1][1] = other_streamed;
        enter();
        enter();  // as an operation does that then goes in place: it counts once
        return choice.streamed(round++);
    }

    StoreChoice choice;
    std::array<StoreChoice::Costs, 2> costs{};
    uint64_t round = 0;
};

void decides() {
    if (!kCanStream) return;
    Told told(Stores::MEASURED);
    CHECK(!told.after(100, 90));  // of all together, not by a tenth
    CHECK(!told.after(100, 20));  // once may be a disturbance
    CHECK(!told.after(100, 120));
    CHECK(!told.after(100, 20));
    CHECK(told.after(100, 20));
    CHECK(told.after(100, 20));
    CHECK(told.after(0, 95));  // unknown
    CHECK(told.after(100, 100, 50, 50));
    CHECK(told.after(50, 100, 100, 60));  // against, for this rank alone
    CHECK(told.after(50, 100));
    CHECK(!told.after(100, 120, 50, 100));                                     // against, for both together
    CHECK(told.round == 9 * StoreChoice::kPeriod + StoreChoice::kDecide + 1);  // the first two periods are short
    Told cached(Stores::CACHED), streamed(Stores::STREAMED);
    for (int i = 0; i < 3; ++i) {
        CHECK(!cached.after(100, 50));
        CHECK(streamed.after(50, 100));
    }
}

/// What a rank tells after a trial whose rounds have these loads and take `us` of its work, beginning with `settling`.
std::array<uint32_t, 2> told_after(std::array<StoreChoice::Load, 2> loads, std::array<int, 2> us, int settling) {
    StoreChoice choice(Stores::MEASURED);
    StoreChoice::Costs mine{};
    for (uint64_t round = 0; round <= StoreChoice::kTell; ++round) {
        const size_t way = round < StoreChoice::kTrial ? 0 : 1;
        CHECK(choice.streamed(round) == (way == 1 && round < 2 * StoreChoice::kTrial));
        CHECK(mine[0] == 0 && mine[1] == 0);
        choice.enter(round, loads[way], 0, 1, [&](int) -> auto& { return mine; });
        const StoreChoice::Watch watch(choice, round);
        const bool settles = round % StoreChoice::kTrial < StoreChoice::kSettled;
        const auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(settles ? settling : us[way]);
        while (std::chrono::steady_clock::now() < until) {
        }
    }
    return {mine[0], mine[1]};
}

void tries() {
    if (!kCanStream) return;
    constexpr StoreChoice::Load kLoad{0, 1 << 16}, kOther{1, 1 << 16}, kLarge{0, 1 << 18}, kTiny{0, 100};
    const auto [cached, streamed] = told_after({kLoad, kLoad}, {100, 300}, 10);
    CHECK(cached >= 100'000'000 / (1 << 16));  // at least; a disturbed machine takes longer
    CHECK(streamed >= 300'000'000 / (1 << 16));
    for (const auto& loads : {std::array{kLoad, kOther}, {kLoad, kLarge}, {kTiny, kTiny}}) {
        CHECK((told_after(loads, {10, 10}, 10) == std::array<uint32_t, 2>{0, 0}));
    }
}

}  // namespace

int main() {
    copies();
    decides();
    tries();
    std::printf("test_stores: %d checks\n", checks.load());
}
