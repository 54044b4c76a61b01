// What a kernel compiled for the emulator calls, in terms of plain types: configuration, launching,
// barriers, collectives of a warp, shared memory and the memory checker. CUDA's own names for these
// are in cuda_emulator.hpp.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <source_location>
#include <string>
#include <vector>

// A function that takes the place of an instruction: its own memory accesses are not the kernel's,
// so the compiler must not report them to the memory checker.
#define HESSREG_EMU_INSTRUCTION inline __attribute__((no_sanitize("thread")))

namespace hessreg::emulator {

using Location = std::source_location;

// Which of the threads that can go on does so.
enum class Order {
  kAscending,
  kDescending,
  kRandom,
  kStickyWarp,  // one warp, drawn at random, runs as far as it can: finds the most races
};

const char* name_of(Order order);  // ascending, descending, random, sticky
Order order_from_name(const std::string& name);

struct Config {
  Order order = Order::kAscending;
  uint64_t seed = 1;
  int resident_blocks = 1;  // blocks alive at once (a cooperative launch: all of them)
  int preempt_period = 0;   // check builds: yield after one in so many accesses; 0 is never
  bool profile = false;     // check builds: count wavefronts and sectors
  std::string skipped_barrier_file;  // a suffix; the barrier at this place does nothing
  int skipped_barrier_line = 0;
  size_t shared_limit = 227 << 10;  // bytes of dynamic shared memory of a block: sm_90
};

// Defaults come from the environment: HESSREG_EMU_ORDER, _SEED, _RESIDENT, _PREEMPT, _PROFILE,
// _SKIP_FILE, _SKIP_LINE and _SHARED.
Config& config();

struct Statistics {
  uint64_t blocks, threads, switches, barriers, skipped_barriers, collectives, accesses;
};
Statistics& statistics();

// ---- Launching

struct Index3 {
  unsigned x, y, z;
  uint64_t volume() const { return uint64_t{x} * y * z; }
};

struct ThreadContext {
  Index3 thread_index, block_index, block_dim, grid_dim;
  int index_in_block, lane, warp;
};

// The thread that runs; null outside a kernel.
extern ThreadContext* current_thread;

HESSREG_EMU_INSTRUCTION Index3 thread_index() { return current_thread->thread_index; }
HESSREG_EMU_INSTRUCTION Index3 block_index() { return current_thread->block_index; }
HESSREG_EMU_INSTRUCTION Index3 block_dim() { return current_thread->block_dim; }
HESSREG_EMU_INSTRUCTION Index3 grid_dim() { return current_thread->grid_dim; }

struct Launch {
  const char* kernel_name;
  Index3 grid, block;
  size_t shared_bytes;
  bool cooperative;
  void (*body)(void* arguments);
  void* arguments;
  size_t argument_bytes;
};

// Runs body(arguments) once for every thread of the grid. Throws std::runtime_error for a launch
// that CUDA would refuse, an error in the kernel, or a finding of the memory checker.
void run(const Launch& launch);

// ---- Barriers

void block_barrier(Location location);
void grid_barrier(Location location);

// A barrier that returns, in every thread, how many threads of the block gave true.
int block_count(bool predicate, Location location);

void thread_fence();

// ---- Collectives of a warp

enum class Collective : uint8_t {
  kSync,
  kShuffle,
  kShuffleUp,
  kShuffleDown,
  kShuffleXor,
  kBallot,
  kReduceAdd,
  kReduceMin,
  kReduceMax,
  kReduceAnd,
  kReduceOr,
  kReduceXor,
  kMmaTf32,
  kMmaBf16,
};

struct ShuffleArgument {
  uint64_t value, received;
  int source;  // lane, distance or lane mask
  int width;
};

struct BallotArgument {
  bool predicate;
  uint32_t votes, voters;
};

struct ReduceArgument {
  int64_t value;  // the lane's own, replaced by the result
};

struct MmaArgument {
  const uint32_t *a, *b;
  const float* c;
  float* d;
};

// Waits for the lanes in `mask`, then exchanges their arguments, of the type that goes with `kind`.
void warp_collective(Collective kind, uint32_t mask, void* argument, Location location);

// ---- Shared memory

struct SharedArray {
  const void* tag;  // tells the arrays of one kernel apart
  size_t bytes, alignment;
  const char* name;
};

void* static_shared(const SharedArray& array, Location location);
void* dynamic_shared(Location location);

void async_copy(void* shared, const void* global, size_t bytes, Location location);
void async_commit();
void async_wait(size_t pending_groups, Location location);

// ---- Memory checker: active when a kernel file has been compiled with -fsanitize=thread

#if defined(__SANITIZE_THREAD__)
constexpr bool kChecked = true;
#else
constexpr bool kChecked = false;
#endif

enum class Access : uint8_t { kRead, kWrite, kAtomic };

// Where an access comes from: a place in the source or a return address.
class Site {
 public:
  Site() = default;
  explicit Site(const void* return_address) : bits_(reinterpret_cast<uintptr_t>(return_address)) {}
  explicit Site(Location location) : bits_(std::bit_cast<uint64_t>(location) | kLocationFlag) {}

  bool is_location() const { return bits_ & kLocationFlag; }
  Location location() const { return std::bit_cast<Location>(bits_ & ~kLocationFlag); }
  const void* return_address() const { return reinterpret_cast<const void*>(bits_); }
  auto operator<=>(const Site&) const = default;

 private:
  static constexpr uint64_t kLocationFlag = uint64_t{1} << 63;  // no user-space address has it
  uint64_t bits_ = 0;
};

void note_access(const void* address, size_t bytes, Access access, Site site);

void enable_checker();
bool checker_enabled();

// Names the memory that a launch may touch; everything else is an error.
void register_memory(const void* address, size_t bytes, std::string name);
void unregister_memory(const void* address);

// One line of the source: how its accesses map to shared-memory wavefronts or global sectors.
struct ProfileEntry {
  std::string where;  // file:line
  bool shared;
  Access access;
  size_t bytes;       // of one thread
  uint64_t requests;  // of a warp
  uint64_t transactions, fewest_possible;
};
std::vector<ProfileEntry> take_profile();

namespace {
[[maybe_unused]] const bool checker_enabled_here = kChecked && (enable_checker(), true);
}

}  // namespace hessreg::emulator
