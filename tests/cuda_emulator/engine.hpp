// The state of a launch, shared by the files of the emulator.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "fibers.hpp"
#include "runtime.hpp"

namespace hessreg::emulator {

constexpr int kWarpSize = 32;
constexpr int kMaxWarps = 32;  // of a block
constexpr int kMaxThreads = kWarpSize * kMaxWarps;

struct Block;

enum class State : uint8_t {
  kNew,
  kReady,
  kRunning,
  kAtBlockBarrier,
  kAtGridBarrier,
  kInCollective,
  kFinished,
};

struct AsyncCopy {
  void* shared;
  const void* global;
  size_t bytes;
};

// When a lane of the same warp last met this one in a __syncwarp, by lane.
using WarpClock = std::array<uint32_t, kWarpSize>;

struct Fiber : ThreadContext {
  Block* block;
  State state;
  Context context;  // while another one runs
  char* stack;

  // What the thread waits in, by its state.
  Location waits_at;
  Collective collective;
  uint32_t mask;
  void* argument;

  std::vector<AsyncCopy> copies;    // not landed yet, in order
  std::vector<size_t> copy_groups;  // sizes of the committed groups, in order
  size_t uncommitted_copies;

  // For the checker.
  WarpClock clock;
  bool fenced;  // since its last write to global memory
};

// A moment in a block, up to which another block has seen its writes.
struct Publication {
  uint32_t block_serial, epoch;
  int warp;
  WarpClock clock;
};

struct Cell;
struct FreeDeleter {
  void operator()(void* memory) const;
};

// The shared memory of a resident block: its static arrays, with red zones between, then the
// dynamic part.
class SharedMemory {
 public:
  static constexpr size_t kDynamicOffset = 256 << 10;
  static constexpr size_t kBytes = 512 << 10;

  SharedMemory();
  ~SharedMemory();
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  void reset(size_t dynamic_bytes);
  void* static_array(const SharedArray& array, Location location);
  void* dynamic_part() const { return base_ + kDynamicOffset; }

  bool contains(const void* address) const;

  // Where bytes lie: in an array, at an offset from its start. The name is null if no array holds
  // them all.
  struct Piece {
    const char* array;
    size_t offset;
  };
  Piece find(const void* address, size_t bytes) const;
  size_t offset(const void* address) const {
    return static_cast<size_t>(static_cast<const char*>(address) - base_);
  }

  std::unique_ptr<Cell[], FreeDeleter> cells;  // the checker's, made at first use

 private:
  struct Placed {
    SharedArray array;
    size_t offset;
  };

  char* base_;
  size_t used_ = 0, static_bytes_ = 0, dynamic_bytes_ = 0;
  std::vector<Placed> arrays_;
};

// A resident block. The object is used for one block of the grid after another.
struct Block {
  std::vector<Fiber> fibers;
  int finished = 0;
  int at_barrier = 0;
  Location barrier;
  int votes = 0;
  // Per warp: the lanes inside a collective, and those that returned or never existed.
  std::array<uint32_t, kMaxWarps> in_collective{}, absent{};
  SharedMemory shared;

  uint32_t serial = 0;                                 // unique since the start of the process
  uint32_t epoch = 0;                                  // block barriers passed
  std::unordered_map<uint32_t, Publication> acquired;  // by serial of the block that published

  int size() const { return static_cast<int>(fibers.size()); }
};

// The threads that can go on.
class Scheduler {
 public:
  void reset(Order order, uint64_t seed);
  void push(Fiber* fiber) { ready_.push_back(fiber); }
  Fiber* pop();  // null if there is none
  uint64_t random();
  bool randomised() const { return order_ == Order::kRandom || order_ == Order::kStickyWarp; }
  bool descending() const { return order_ == Order::kDescending; }

 private:
  size_t pick();
  size_t find_last_warp(size_t begin, size_t end) const;

  Order order_ = Order::kAscending;
  uint64_t state_ = 1;
  std::vector<Fiber*> ready_;  // from head_ on
  size_t head_ = 0;
  const Block* last_block_ = nullptr;
  int last_warp_ = 0;
};

struct Engine {
  Launch launch{};
  int skipped_barrier_line = 0;  // config()'s
  std::string error;             // which ended the launch
  bool ended = false;            // before all threads have returned
  std::vector<std::unique_ptr<Block>> blocks;
  uint64_t threads_at_grid_barrier = 0;
  uint32_t grid_epoch = 0;  // launches begun and grid barriers passed
  Scheduler scheduler;
  StackPool stacks;
  Context scheduler_context = nullptr;
  Statistics statistics{};
};

extern Engine engine;

inline Fiber& current_fiber() { return *static_cast<Fiber*>(current_thread); }

inline void make_ready(Fiber& fiber) {
  fiber.state = State::kReady;
  engine.scheduler.push(&fiber);
}

// Returns when the fiber is resumed.
inline void suspend(Fiber& fiber) {
  ++engine.statistics.switches;
  hessreg_emu_switch(&fiber.context, engine.scheduler_context);
}

// Ends the launch at once, from wherever the running thread is, without unwinding its stack.
[[noreturn]] void abandon_launch();

// Throws an error that names the place and the running thread.
[[noreturn]] void fail(const std::string& what, Location location);

std::string describe(const ThreadContext& thread);
std::string describe(Location location);

// Lets the lanes of the collective that `example` waits in go on if all have arrived, but does not
// wake `self`. Returns whether they do.
bool complete_collective(Block& block, const Fiber& example, const Fiber* self);

const char* name_of(Collective kind);

bool is_skipped_barrier(Location location);

// Whether the configuration has this barrier do nothing.
inline bool barrier_skipped(Location location) {
  return static_cast<int>(location.line()) == engine.skipped_barrier_line &&
         is_skipped_barrier(location);
}

}  // namespace hessreg::emulator
