// What a processor can do at most: multiply-adds, exponentials and memory traffic, of all threads
// together. Compiled and loaded by limits.py for the machine it runs on.
#include <chrono>
#include <cstdlib>
#include <thread>
#include <vector>

#include "simd.h"

namespace {

using hessreg::kLanes;
using hessreg::Vector;
using Clock = std::chrono::steady_clock;

constexpr int kAccumulators = 12;  // enough for two units with a latency of four or five cycles
constexpr int kTries = 20;

// Makes the compiler believe that x is another one now.
template <typename V>
void touch(V& x) {
#if defined(__x86_64__)
  asm volatile("" : "+v"(x));
#else
  asm volatile("" : "+w"(x));
#endif
}

// The best of some tries of amount / time, with as many threads at once.
template <typename Work>
double rate(int threads, double amount, const Work& work) {
  double best = 0;
  for (int attempt = 0; attempt < kTries; ++attempt) {
    const auto start = Clock::now();
    std::vector<std::thread> others;
    for (int t = 1; t < threads; ++t) others.emplace_back(work, t);
    work(0);
    for (auto& other : others) other.join();
    const std::chrono::duration<double> seconds = Clock::now() - start;
    const double found = amount * threads / seconds.count();
    best = found > best ? found : best;
  }
  return best;
}

template <typename T>
double multiply_adds(int threads) {
  constexpr int64_t kRounds = 4'000'000;
  return rate(threads, 2.0 * kRounds * kAccumulators * kLanes<T>, [](int) {
    Vector<T> x = Vector<T>{} + T(0.5), y = Vector<T>{} + T(0.25), sums[kAccumulators] = {};
    for (auto& sum : sums) touch(sum);  // or they are all the same, and computed once
    for (int64_t i = 0; i < kRounds; ++i) {
      touch(x);
      for (auto& sum : sums) sum = sum * x + y;
    }
    for (auto& sum : sums) touch(sum);
  });
}

template <typename T>
double exponentials(int threads) {
  constexpr int64_t kCount = 2048, kRounds = 8'000;
  return rate(threads, 1.0 * kRounds * kCount, [](int) {
    alignas(64) T values[kCount];
    for (int64_t i = 0; i < kCount; ++i) values[i] = static_cast<T>(i) / kCount;
    Vector<T> sums[4] = {};
    for (int64_t round = 0; round < kRounds; ++round) {
      for (int64_t i = 0; i < kCount; i += 4 * kLanes<T>)
        for (int u = 0; u < 4; ++u)
          sums[u] += hessreg::exp2_of_product(hessreg::load(values + i + u * kLanes<T>), T(-1));
      for (auto& sum : sums) touch(sum);
    }
  });
}

// Each thread has bytes / threads of its own.
double traffic(int threads, int64_t bytes, bool copies) {
  const int64_t own = bytes / threads / 4096 * 4096, half = own / 2;
  const int64_t rounds = 1 + (int64_t{1} << 28) / bytes;
  std::vector<char*> blocks;
  for (int t = 0; t < threads; ++t) {
    blocks.push_back(static_cast<char*>(std::aligned_alloc(4096, static_cast<size_t>(own))));
    std::memset(blocks.back(), 1, static_cast<size_t>(own));
  }
  const double found = rate(threads, static_cast<double>(rounds * own), [&](int t) {
    char* block = blocks[static_cast<size_t>(t)];
    Vector<float> sums[8] = {};
    for (int64_t round = 0; round < rounds; ++round) {
      if (copies) {
        std::memcpy(block, block + half, static_cast<size_t>(half));
        asm volatile("" ::: "memory");
        continue;
      }
      for (int64_t i = 0; i < own; i += 8 * hessreg::kVectorBytes)
        for (int u = 0; u < 8; ++u)
          sums[u] += hessreg::load(reinterpret_cast<float*>(block + i + u * hessreg::kVectorBytes));
      for (auto& sum : sums) touch(sum);
    }
  });
  for (char* block : blocks) std::free(block);
  return found;
}

}  // namespace

// Operations, exponentials and bytes a second.
extern "C" double multiply_adds_float(int threads) { return multiply_adds<float>(threads); }
extern "C" double multiply_adds_double(int threads) { return multiply_adds<double>(threads); }
extern "C" double exponentials_float(int threads) { return exponentials<float>(threads); }
extern "C" double exponentials_double(int threads) { return exponentials<double>(threads); }
extern "C" double read_bytes(int threads, int64_t bytes) { return traffic(threads, bytes, false); }
extern "C" double copied_bytes(int threads, int64_t bytes) { return traffic(threads, bytes, true); }
