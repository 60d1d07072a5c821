// The reductions against naive ones, bit for bit, at every SIMD level that this machine can do.
//
// The oracles share nothing with the kernels: integers are computed in 128 bits and cut, 16-bit floats go through
// double and the C library's rounding, one element at a time.

#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../src/native/reduce/reduce.hpp"

namespace {

using pneumo::DType;
using pneumo::Op;
using pneumo::Scale;
__extension__ using Wide = __int128;
__extension__ using UnsignedWide = unsigned __int128;

constexpr DType DTYPES[] = {DType::F64, DType::F32, DType::F16, DType::BF16, DType::I8,  DType::I16, DType::I32,
                            DType::I64, DType::U8,  DType::U16, DType::U32,  DType::U64, DType::BOOL};
constexpr Op OPS[] = {Op::SUM, Op::PRODUCT, Op::MIN, Op::MAX, Op::BAND, Op::BOR, Op::BXOR};
constexpr int MAX_SRCS = 9;

int num_failures = 0;

void check(bool is_true, const std::string& what) {
    if (is_true) return;
    if (++num_failures <= 20) std::fprintf(stderr, "FAILED: %s\n", what.c_str());
}

template <class Call>
bool is_refused(Call call) {
    try {
        call();
    } catch (const std::invalid_argument&) {
        return true;
    }
    return false;
}

bool is_float(DType dtype) { return dtype <= DType::BF16; }
bool is_signed(DType dtype) { return dtype >= DType::I8 && dtype <= DType::I64; }
bool is_bitwise(Op op) { return op >= Op::BAND; }

// --- Oracles, on the bits of elements ---

/// The format of a float: the places of its fraction, and the exponents of its least and greatest normal number.
struct Format {
    int fraction_bits;
    int min_exponent;
    int max_exponent;
};

Format format_of(DType dtype) {
    switch (dtype) {
        case DType::F64: return {52, -1022, 1023};
        case DType::F32: return {23, -126, 127};
        case DType::F16: return {10, -14, 15};
        default: return {7, -126, 127};
    }
}

double decode(DType dtype, uint64_t bits) {
    const auto [fraction_bits, min_exponent, max_exponent] = format_of(dtype);
    const int total_bits = 8 * static_cast<int>(pneumo::size_of(dtype));
    const uint64_t fraction = bits & ((uint64_t{1} << fraction_bits) - 1);
    const int exponent = static_cast<int>((bits & ((uint64_t{1} << (total_bits - 1)) - 1)) >> fraction_bits);
    double value = 0;
    if (exponent == max_exponent - min_exponent + 2) {
        value = fraction == 0 ? INFINITY : NAN;
    } else if (exponent == 0) {
        value = std::ldexp(static_cast<double>(fraction), min_exponent - fraction_bits);
    } else {
        const auto digits = static_cast<double>(fraction + (uint64_t{1} << fraction_bits));
        value = std::ldexp(digits, exponent - 1 + min_exponent - fraction_bits);
    }
    return bits >> (total_bits - 1) ? -value : value;
}

uint64_t encode(DType dtype, double value) {
    const auto [fraction_bits, min_exponent, max_exponent] = format_of(dtype);
    const int total_bits = 8 * static_cast<int>(pneumo::size_of(dtype));
    const uint64_t infinity = static_cast<uint64_t>(max_exponent - min_exponent + 2) << fraction_bits;
    if (std::isnan(value)) return infinity | uint64_t{1} << (fraction_bits - 1);
    const uint64_t sign = static_cast<uint64_t>(std::signbit(value)) << (total_bits - 1);
    if (value == 0) return sign;
    if (std::isinf(value)) return sign | infinity;
    const int exponent = std::max(std::ilogb(value), min_exponent);
    const double steps = std::nearbyint(std::ldexp(std::fabs(value), fraction_bits - exponent));  // ties to even
    const auto biased = static_cast<uint64_t>(exponent - min_exponent) << fraction_bits;
    return sign | std::min(biased + static_cast<uint64_t>(steps), infinity);  // carries into the exponent as it should
}

/// In T, where the reduction takes place. Volatile keeps the compiler from fusing or extending anything.
template <class T>
double reduce_floats(const std::vector<double>& inputs, Op op, Scale scale) {
    volatile T result = 0;
    for (size_t k = 0; k < inputs.size(); ++k) {
        volatile T input = static_cast<T>(inputs[k]);
        if (scale.before != 1) input = input * static_cast<T>(scale.before);
        const T a = result, b = input;
        if (k == 0) {
            result = b;
        } else if (op == Op::SUM) {
            result = a + b;
        } else if (op == Op::PRODUCT) {
            result = a * b;
        } else if (std::isnan(a) || std::isnan(b)) {
            result = NAN;
        } else {
            const bool is_first_less = a < b || (a == b && std::signbit(a));
            result = is_first_less == (op == Op::MIN) ? a : b;
        }
    }
    if (scale.after != 1) result = result * static_cast<T>(scale.after);
    return result;
}

/// The value of a dtype that has these bits in its place: sign or zeros before them.
Wide as_integer(DType dtype, uint64_t bits) {
    const int total_bits = 8 * static_cast<int>(pneumo::size_of(dtype));
    Wide value = bits & (~uint64_t{0} >> (64 - total_bits));
    if (is_signed(dtype) && value >> (total_bits - 1)) value -= Wide{1} << total_bits;
    return value;
}

Wide scale_integer(DType dtype, Wide value, double factor) {
    if (factor == 1) return value;
    const long long divisor = std::llround(1 / factor);
    if (divisor > 1 && 1.0 / static_cast<double>(divisor) == factor) return value / divisor;
    const double product = static_cast<double>(value) * factor;
    const int magnitude_bits = 8 * static_cast<int>(pneumo::size_of(dtype)) - (is_signed(dtype) ? 1 : 0);
    const Wide greatest = (Wide{1} << magnitude_bits) - 1;
    const Wide least = is_signed(dtype) ? -greatest - 1 : 0;
    if (std::isnan(product)) return 0;
    if (std::fabs(product) > 1e30) return product > 0 ? greatest : least;
    return std::min(greatest, std::max(least, static_cast<Wide>(product)));
}

uint64_t reduce_integers(DType dtype, const std::vector<uint64_t>& inputs, Op op, Scale scale) {
    Wide result = 0;
    for (size_t k = 0; k < inputs.size(); ++k) {
        const Wide input = scale_integer(dtype, as_integer(dtype, inputs[k]), scale.before);
        if (k == 0) {
            result = input;
            continue;
        }
        switch (op) {
            case Op::SUM: result += input; break;
            case Op::PRODUCT: result = static_cast<Wide>(static_cast<UnsignedWide>(result) * input); break;
            case Op::MIN: result = std::min(result, input); break;
            case Op::MAX: result = std::max(result, input); break;
            case Op::BAND: result &= input; break;
            case Op::BOR: result |= input; break;
            case Op::BXOR: result ^= input; break;
        }
        result = as_integer(dtype, static_cast<uint64_t>(result));
    }
    return static_cast<uint64_t>(as_integer(dtype, static_cast<uint64_t>(scale_integer(dtype, result, scale.after))));
}

uint64_t reduce_bools(const std::vector<uint64_t>& inputs, Op op) {
    size_t num_true = 0;
    for (const uint64_t input : inputs) num_true += input != 0;
    switch (op) {
        case Op::SUM:
        case Op::MAX:
        case Op::BOR: return num_true > 0;
        case Op::BXOR: return num_true % 2;
        default: return num_true == inputs.size();
    }
}

uint64_t expected(DType dtype, Op op, const std::vector<uint64_t>& inputs, Scale scale) {
    if (dtype == DType::BOOL) return reduce_bools(inputs, op);
    if (inputs.size() == 1 && scale.before == 1 && scale.after == 1) return inputs[0];
    if (!is_float(dtype)) return reduce_integers(dtype, inputs, op, scale);
    std::vector<double> values;
    for (const uint64_t input : inputs) values.push_back(decode(dtype, input));
    if (dtype == DType::F64) return encode(dtype, reduce_floats<double>(values, op, scale));
    return encode(dtype, reduce_floats<float>(values, op, scale));
}

// --- Inputs ---

std::mt19937_64 random_bits(20240229);

uint64_t random_below(uint64_t end) { return random_bits() % end; }

/// Of floats, a third is of numbers near 1, a third any bits, and a third what is special.
uint64_t random_element(DType dtype) {
    const uint64_t any = random_bits();
    const uint64_t kind = random_below(3);
    if (!is_float(dtype)) {
        constexpr int64_t SPECIAL[] = {0,         1,         -1,       2,         3,         INT8_MIN, INT16_MIN,
                                       INT32_MIN, INT64_MIN, INT8_MAX, INT16_MAX, INT32_MAX, INT64_MAX};
        if (kind == 0) return any;
        return kind == 1 ? any % 7 - 3 : static_cast<uint64_t>(SPECIAL[any % std::size(SPECIAL)]);
    }
    if (kind == 1) return any;
    const auto [fraction_bits, min_exponent, max_exponent] = format_of(dtype);
    const int total_bits = 8 * static_cast<int>(pneumo::size_of(dtype));
    const uint64_t sign = (any & 1) << (total_bits - 1);
    const uint64_t fraction = (any >> 1) & ((uint64_t{1} << fraction_bits) - 1);
    if (kind == 0) return sign | (-min_exponent + random_below(3)) << fraction_bits | fraction;
    const uint64_t infinity = static_cast<uint64_t>(max_exponent - min_exponent + 2) << fraction_bits;
    const uint64_t least_normal = uint64_t{1} << fraction_bits;
    const uint64_t special[] = {0,
                                1,
                                fraction,
                                least_normal - 1,
                                least_normal,
                                infinity - least_normal,
                                infinity - 1,
                                infinity,
                                infinity,
                                infinity | 1,
                                infinity | fraction,
                                infinity | least_normal >> 1};
    return sign | special[random_below(std::size(special))];
}

/// The low bytes, those of an element.
uint64_t cut(uint64_t bits, size_t size) { return bits & (~uint64_t{0} >> (64 - 8 * size)); }

uint64_t get(const unsigned char* from, size_t size) {
    uint64_t bits = 0;
    std::memcpy(&bits, from, size);  // little-endian
    return bits;
}

// --- Cases ---

struct Case {
    DType dtype;
    Op op;
    int num_srcs;
    size_t count;
    Scale scale;
    int aliased;  // the source that is also the destination, -1 for none

    std::string text() const {
        char line[160];
        std::snprintf(line, sizeof line, "%s %s of %d x %zu, scale %g %g, dst is source %d", name_of(dtype),
                      name_of(op), num_srcs, count, scale.before, scale.after, aliased);
        return line;
    }
};

std::vector<std::string> levels_of_this_machine() {
    std::vector<std::string> levels;
    for (const char* level : {"scalar", "neon", "avx2", "avx512"}) {
        if (!is_refused([&] { pneumo::set_simd_level(level); })) levels.emplace_back(level);
    }
    return levels;
}

const std::vector<std::string>& levels() {
    static const std::vector<std::string> all = levels_of_this_machine();
    return all;
}

/// Elements after a start that is aligned to the element only, with bytes around them that nobody may touch.
class Buffer {
   public:
    Buffer(size_t size, size_t count)
        : start_(64 + random_below(64 / size) * size),
          memory_(start_ + count * size + 64, static_cast<unsigned char>(random_bits())) {
        while (reinterpret_cast<uintptr_t>(data()) % size != 0) ++start_;
    }
    unsigned char* data() { return memory_.data() + start_; }
    std::vector<unsigned char>& memory() { return memory_; }

   private:
    size_t start_;
    std::vector<unsigned char> memory_;
};

/// Runs the case at each level on these inputs ([source][index]) and compares all bytes there are.
void run(const Case& c, const std::vector<std::vector<uint64_t>>& inputs) {
    const size_t size = pneumo::size_of(c.dtype);
    std::vector<uint64_t> outputs(c.count);
    std::vector<uint64_t> column(c.num_srcs);
    for (size_t i = 0; i < c.count; ++i) {
        for (int k = 0; k < c.num_srcs; ++k) column[k] = cut(inputs[k][i], size);
        outputs[i] = expected(c.dtype, c.op, column, c.scale);
    }
    for (const std::string& level : levels()) {
        pneumo::set_simd_level(level);
        std::vector<Buffer> buffers;
        for (int k = 0; k <= c.num_srcs; ++k) buffers.emplace_back(size, c.count);
        std::vector<const void*> srcs;
        for (int k = 0; k < c.num_srcs; ++k) {
            for (size_t i = 0; i < c.count; ++i) std::memcpy(buffers[k].data() + i * size, &inputs[k][i], size);
            srcs.push_back(buffers[k].data());
        }
        const int target = c.aliased < 0 ? c.num_srcs : c.aliased;
        auto after = std::vector<std::vector<unsigned char>>{};
        for (auto& buffer : buffers) after.push_back(buffer.memory());
        const size_t start = buffers[target].data() - buffers[target].memory().data();
        for (size_t i = 0; i < c.count; ++i) std::memcpy(after[target].data() + start + i * size, &outputs[i], size);

        find_reduce(c.dtype, c.op)(buffers[target].data(), srcs.data(), c.num_srcs, c.count, c.scale);
        for (int k = 0; k <= c.num_srcs; ++k) {
            if (buffers[k].memory() == after[k]) continue;
            std::string what = level + ": " + c.text();
            if (k != target) what += ": touched source " + std::to_string(k);
            for (size_t i = 0; k == target && i < c.count; ++i) {
                const uint64_t got = get(buffers[k].data() + i * size, size);
                const uint64_t wanted = get(after[k].data() + start + i * size, size);
                if (got == wanted) continue;
                char line[96];
                std::snprintf(line, sizeof line, ": [%zu] is %" PRIx64 ", not %" PRIx64 ", from", i, got, wanted);
                what += line;
                for (int source = 0; source < c.num_srcs; ++source) {
                    std::snprintf(line, sizeof line, " %" PRIx64, cut(inputs[source][i], size));
                    what += line;
                }
                break;
            }
            check(false, what);
        }
    }
}

void run_random(Case c) {
    std::vector<std::vector<uint64_t>> inputs(c.num_srcs, std::vector<uint64_t>(c.count));
    for (auto& source : inputs) {
        for (auto& element : source) element = random_element(c.dtype);
    }
    run(c, inputs);
}

long test_everything() {
    long num_cases = 0;
    std::vector<size_t> counts;
    for (size_t count = 0; count <= 70; ++count) counts.push_back(count);
    for (const size_t count : {513, 1031, 4096 + 77}) counts.push_back(count);
    for (const DType dtype : DTYPES) {
        for (const Op op : OPS) {
            if (find_reduce(dtype, op) == nullptr) continue;
            for (int num_srcs = 1; num_srcs <= MAX_SRCS; ++num_srcs) {
                const double inverse = 1.0 / num_srcs;
                const Scale scales[] = {{1, 1}, {1, inverse}, {2.5, 1}, {-0.75, 1.0 / 3}, {1, 1.7}, {1.0 / 7, 1}};
                for (const size_t count : counts) {
                    const Scale scale = scales[random_below(std::size(scales))];
                    // Every other time into a buffer of its own.
                    const int aliased = static_cast<int>(random_below(num_srcs * 2)) - num_srcs;
                    run_random({dtype, op, num_srcs, count, scale, std::max(aliased, -1)});
                    ++num_cases;
                    if (count > 70) continue;
                    run_random({dtype, op, num_srcs, count, {}, std::max(-1 - aliased, -1)});
                    ++num_cases;
                }
            }
        }
    }
    return num_cases;
}

/// Every 16-bit float with a few others, so that all of them are read, and products are rounded in every way.
void test_all_halves() {
    for (const DType dtype : {DType::F16, DType::BF16}) {
        for (int round = 0; round < 8; ++round) {
            std::vector<std::vector<uint64_t>> inputs(2, std::vector<uint64_t>(65536));
            const uint64_t other = round == 0 ? 0 : random_element(dtype);
            for (uint64_t bits = 0; bits < 65536; ++bits) {
                inputs[0][bits] = bits;
                inputs[1][bits] = other;
            }
            run({dtype, Op::SUM, 2, 65536, {}, -1}, inputs);
            run({dtype, Op::PRODUCT, 2, 65536, {}, -1}, inputs);
            run({dtype, Op::SUM, 1, 65536, {1, std::ldexp(1.0, -round)}, -1}, inputs);
        }
    }
}

/// The order of the sources must not show, in zeros of either sign and NaN of any kind neither.
void test_order_of_extremes() {
    for (const DType dtype : {DType::F64, DType::F32, DType::F16, DType::BF16}) {
        for (const Op op : {Op::MIN, Op::MAX}) {
            std::vector<std::vector<uint64_t>> inputs(5, std::vector<uint64_t>(1000));
            for (auto& source : inputs) {
                for (auto& element : source) element = random_element(dtype);
            }
            for (int rotation = 0; rotation < 5; ++rotation) {
                run({dtype, op, 5, 1000, {}, -1}, inputs);
                std::rotate(inputs.begin(), inputs.begin() + 1, inputs.end());
            }
        }
    }
}

/// Sums of 64 bits, whose quotients a double could not hold, and factors that lead out of the range or nowhere.
void test_integer_scales() {
    const double infinity = INFINITY;
    const Scale scales[] = {{1, 1.0 / 3}, {1, 1.0 / 7},    {1, 1.0 / 49}, {1, 1.0 / 1000003}, {1, 0x1p-52},
                            {1, 0x1p-60}, {1, -0.5},       {1, 1e300},    {1, infinity},      {1, NAN},
                            {NAN, 1},     {infinity, 0.5}, {0, 1},        {1.0 / 49, 1},      {1, 1.0 / 300},
                            {1, 0.7},     {0x1p63, 1},     {-0x1p63, 1},  {1, 0x1p31}};
    for (const DType dtype : DTYPES) {
        if (is_float(dtype)) continue;
        for (const Scale scale : scales) {
            for (const int num_srcs : {1, 2, 5}) run_random({dtype, Op::SUM, num_srcs, 997, scale, 0});
        }
    }
}

void test_interface() {
    setenv("PNEUMO_SIMD", "abacus", 1);
    check(is_refused([] { pneumo::simd_level(); }), "PNEUMO_SIMD=abacus is accepted");
    unsetenv("PNEUMO_SIMD");
    const std::string best = pneumo::simd_level();
    setenv("PNEUMO_SIMD", "abacus", 1);
    check(pneumo::simd_level() == best, "PNEUMO_SIMD is read more than once");
    check(is_refused([] { pneumo::set_simd_level("abacus"); }), "set_simd_level(abacus) is accepted");
    check(pneumo::simd_level() == best, "a refused level changes the level");
    check(!levels().empty() && levels().back() == best, "the level at start is not the best");
    for (const DType dtype : DTYPES) {
        for (const Op op : OPS) {
            const bool exists = find_reduce(dtype, op) != nullptr;
            check(exists != (is_float(dtype) && is_bitwise(op)), std::string(name_of(op)) + " of " + name_of(dtype));
        }
    }
    check(pneumo::size_of(DType::BF16) == 2 && pneumo::size_of(DType::F64) == 8 && pneumo::size_of(DType::BOOL) == 1,
          "size_of");
    check(is_refused([] { pneumo::size_of(static_cast<DType>(99)); }), "size_of takes any number");
}

}  // namespace

int main() {
    test_interface();
    const long num_cases = test_everything();
    test_all_halves();
    test_order_of_extremes();
    test_integer_scales();
    std::string names;
    for (const auto& level : levels()) names += " " + level;
    std::printf("test_reduce: %ld random cases at%s, %d failures\n", num_cases, names.c_str(), num_failures);
    return num_failures == 0 ? 0 : 1;
}
