#include "reduce.hpp"

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace pneumo {

// One of these in each kernels_*.cpp, compiled for what the level can do.
namespace scalar {
ReduceFn find(DType dtype, Op op);
}
#if defined(__x86_64__)
namespace avx2 {
ReduceFn find(DType dtype, Op op);
}
namespace avx512 {
ReduceFn find(DType dtype, Op op);
}
#endif

namespace {

struct Level {
    const char* name;
    bool (*is_supported)();
    ReduceFn (*find)(DType dtype, Op op);
};

// The best first.
#if defined(__x86_64__)
constexpr Level LEVELS[] = {
    {"avx512",
     [] {
         return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                __builtin_cpu_supports("f16c");
     },
     avx512::find},
    {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c"); }, avx2::find},
    {"scalar", [] { return true; }, scalar::find},
};
#elif defined(__aarch64__)
constexpr Level LEVELS[] = {{"neon", [] { return true; }, scalar::find}};
#else
constexpr Level LEVELS[] = {{"scalar", [] { return true; }, scalar::find}};
#endif

const Level* level_of(std::string_view name) {
    std::string supported;
    for (const Level& level : LEVELS) {
        if (!level.is_supported()) continue;
        if (level.name == name) return &level;
        supported += (supported.empty() ? "" : ", ") + std::string(level.name);
    }
    throw std::invalid_argument("SIMD level '" + std::string(name) + "' is none of this machine's: " + supported);
}

const Level* initial_level() {
    if (const char* name = std::getenv("PNEUMO_SIMD")) return level_of(name);
    const Level* level = LEVELS;
    while (!level->is_supported()) ++level;  // the last one always is
    return level;
}

/// Atomic since threads may look for functions while a test sets the level; which of the two they see is all the same.
std::atomic<const Level*>& current_level() {
    static std::atomic<const Level*> level = initial_level();
    return level;
}

}  // namespace

ReduceFn find_reduce(DType dtype, Op op) { return current_level().load()->find(dtype, op); }

const char* simd_level() { return current_level().load()->name; }

void set_simd_level(std::string_view level) { current_level() = level_of(level); }

size_t size_of(DType dtype) {
    switch (dtype) {
        case DType::F64:
        case DType::I64:
        case DType::U64: return 8;
        case DType::F32:
        case DType::I32:
        case DType::U32: return 4;
        case DType::F16:
        case DType::BF16:
        case DType::I16:
        case DType::U16: return 2;
        case DType::I8:
        case DType::U8:
        case DType::BOOL: return 1;
    }
    throw std::invalid_argument("no dtype has the number " + std::to_string(static_cast<int>(dtype)));
}

const char* name_of(DType dtype) {
    switch (dtype) {
        case DType::F64: return "f64";
        case DType::F32: return "f32";
        case DType::F16: return "f16";
        case DType::BF16: return "bf16";
        case DType::I8: return "i8";
        case DType::I16: return "i16";
        case DType::I32: return "i32";
        case DType::I64: return "i64";
        case DType::U8: return "u8";
        case DType::U16: return "u16";
        case DType::U32: return "u32";
        case DType::U64: return "u64";
        case DType::BOOL: return "bool";
    }
    throw std::invalid_argument("no dtype has the number " + std::to_string(static_cast<int>(dtype)));
}

const char* name_of(Op op) {
    switch (op) {
        case Op::SUM: return "sum";
        case Op::PRODUCT: return "product";
        case Op::MIN: return "min";
        case Op::MAX: return "max";
        case Op::BAND: return "band";
        case Op::BOR: return "bor";
        case Op::BXOR: return "bxor";
    }
    throw std::invalid_argument("no operation has the number " + std::to_string(static_cast<int>(op)));
}

}  // namespace pneumo
