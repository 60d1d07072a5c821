// CHECK(condition): counts, and ends the program with the place and the condition where it does not hold.
#pragma once

#include <atomic>
#include <cstdio>
#include <cstdlib>

inline std::atomic<int> checks{0};

inline void check(bool good, const char* what, const char* file, int line) {
    ++checks;
    if (good) return;
    std::printf("%s:%d: %s\n", file, line, what);
    std::exit(1);
}
#define CHECK(condition) check(condition, #condition, __FILE__, __LINE__)
