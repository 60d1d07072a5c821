// How fast the reductions are, as a share of what memcpy moves: in the L2 cache for each SIMD level, and in memory.
//
// GB/s count what is read and written: (sources + 1) * bytes, of memcpy 2 * bytes. Samples of all rows take turns, so
// that a disturbance of the machine meets all, and the best one counts.

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../src/native/reduce/reduce.hpp"

namespace {

using pneumo::DType;
using pneumo::Op;

struct Row {
    std::string name;
    size_t num_elements;
    size_t num_bytes;  // read and written
    std::function<void()> call;
    double best_s = 1e9;
};

/// Buffers for the greatest number of sources and the destination, a page and a line apart so as not to share sets of
/// the L1 cache.
class Buffers {
   public:
    Buffers(size_t num_buffers, size_t bytes) : stride_(bytes + 4096 + 64), memory_(num_buffers * stride_ + 64, 0) {}
    void* operator[](size_t k) {
        const auto start = (reinterpret_cast<uintptr_t>(memory_.data()) + 63) / 64 * 64;
        return reinterpret_cast<void*>(start + k * stride_);
    }

   private:
    size_t stride_;
    std::vector<unsigned char> memory_;
};

Row reduction(Buffers& buffers, DType dtype, int num_srcs, size_t count, pneumo::Scale scale = {}) {
    const pneumo::ReduceFn reduce = pneumo::find_reduce(dtype, Op::SUM);
    std::vector<const void*> srcs;
    for (int k = 0; k < num_srcs; ++k) srcs.push_back(buffers[k + 1]);
    std::string name = std::string(pneumo::simd_level()) + " " + pneumo::name_of(dtype) + " " +
                       (scale.after == 1.0 ? "sum" : "avg") + " of " + std::to_string(num_srcs);
    const size_t bytes = count * pneumo::size_of(dtype);
    const auto call = [=, dst = buffers[0]] { reduce(dst, srcs.data(), num_srcs, count, scale); };
    return {name, count, bytes * (num_srcs + 1), call};
}

Row copy(Buffers& buffers, size_t bytes) {
    return {"memcpy", 0, bytes * 2, [=, to = buffers[0], from = buffers[1]] { std::memcpy(to, from, bytes); }};
}

void measure(std::vector<Row>& rows, int num_samples, int num_calls) {
    for (int sample = 0; sample < num_samples; ++sample) {
        for (Row& row : rows) {
            row.call();  // brings the buffers into the cache
            const auto start = std::chrono::steady_clock::now();
            for (int i = 0; i < num_calls; ++i) row.call();
            const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
            row.best_s = std::min(row.best_s, took.count() / num_calls);
        }
    }
}

/// The first row is memcpy's.
void print(const char* title, const std::vector<Row>& rows) {
    std::printf("%s\n%-26s %8s %10s %12s\n", title, "", "GB/s", "of memcpy", "elements/ns");
    const double copied_per_s = rows[0].num_bytes / rows[0].best_s;
    for (const Row& row : rows) {
        const double per_s = row.num_bytes / row.best_s;
        std::printf("%-26s %8.1f %10.2f", row.name.c_str(), per_s * 1e-9, per_s / copied_per_s);
        std::printf(row.num_elements ? " %12.2f\n" : "\n", row.num_elements / row.best_s * 1e-9);
    }
}

}  // namespace

int main() {
    constexpr DType FLOATS[] = {DType::F32, DType::BF16, DType::F16, DType::F64};

    constexpr size_t L2_BYTES = 192 << 10;  // of all buffers of a call together: beyond L1, within any L2 of today
    Buffers small(9, L2_BYTES);
    std::vector<Row> rows{copy(small, L2_BYTES / 2)};
    const std::string best_level = pneumo::simd_level();
    for (const char* level : {"avx512", "avx2", "neon", "scalar"}) {
        try {
            pneumo::set_simd_level(level);
        } catch (const std::invalid_argument&) {
            continue;
        }
        for (const DType dtype : FLOATS) {
            for (const int num_srcs : {2, 4, 8}) {
                rows.push_back(reduction(small, dtype, num_srcs, L2_BYTES / (num_srcs + 1) / pneumo::size_of(dtype)));
            }
            rows.push_back(reduction(small, dtype, 2, L2_BYTES / 3 / pneumo::size_of(dtype), {1.0, 0.5}));
        }
        rows.push_back(reduction(small, DType::I32, 2, L2_BYTES / 3 / 4, {1.0, 0.5}));
        rows.push_back(reduction(small, DType::I64, 2, L2_BYTES / 3 / 8, {1.0, 0.5}));
    }
    measure(rows, 400, 4);
    print("In L2", rows);

    constexpr size_t MEMORY_BYTES = 128 << 20;  // of each buffer of f64, so that no cache holds even that of halves
    Buffers large(5, MEMORY_BYTES);
    pneumo::set_simd_level(best_level);
    std::vector<Row> far_rows{copy(large, MEMORY_BYTES)};
    for (const DType dtype : FLOATS) {
        for (const int num_srcs : {2, 4}) {
            far_rows.push_back(reduction(large, dtype, num_srcs, MEMORY_BYTES / 8));
        }
    }
    measure(far_rows, 12, 1);
    print("In memory", far_rows);
}
