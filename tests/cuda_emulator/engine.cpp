// Configuration, and the run of a launch: blocks come and go, threads take turns.
#include "engine.hpp"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <numeric>
#include <stdexcept>
#include <utility>

#include "checker.hpp"

namespace hessreg::emulator {

constinit ThreadContext* current_thread = nullptr;
Engine engine;

namespace {

long environment_number(const char* name, long otherwise) {
  const char* text = std::getenv(name);
  return text ? std::strtol(text, nullptr, 10) : otherwise;
}

constexpr std::pair<Order, const char*> kOrderNames[] = {{Order::kAscending, "ascending"},
                                                         {Order::kDescending, "descending"},
                                                         {Order::kRandom, "random"},
                                                         {Order::kStickyWarp, "sticky"}};

Config environment_config() {
  Config config;
  if (const char* name = std::getenv("HESSREG_EMU_ORDER")) config.order = order_from_name(name);
  config.seed = static_cast<uint64_t>(environment_number("HESSREG_EMU_SEED", 1));
  config.resident_blocks = static_cast<int>(environment_number("HESSREG_EMU_RESIDENT", 1));
  config.preempt_period = static_cast<int>(environment_number("HESSREG_EMU_PREEMPT", 0));
  config.profile = environment_number("HESSREG_EMU_PROFILE", 0) != 0;
  if (const char* file = std::getenv("HESSREG_EMU_SKIP_FILE")) config.skipped_barrier_file = file;
  config.skipped_barrier_line = static_cast<int>(environment_number("HESSREG_EMU_SKIP_LINE", 0));
  config.shared_limit = static_cast<size_t>(
      environment_number("HESSREG_EMU_SHARED", static_cast<long>(config.shared_limit)));
  return config;
}

}  // namespace

const char* name_of(Order order) {
  return std::ranges::find(kOrderNames, order, &std::pair<Order, const char*>::first)->second;
}

Order order_from_name(const std::string& name) {
  for (const auto& [order, its_name] : kOrderNames) {
    if (name == its_name) return order;
  }
  throw std::invalid_argument("order must be ascending, descending, random or sticky, got '" +
                              name + "'");
}

Config& config() {
  static Config config = environment_config();
  return config;
}

Statistics& statistics() { return engine.statistics; }

// ---- Errors

std::string describe(const ThreadContext& thread) {
  const auto triple = [](Index3 i) {
    return "(" + std::to_string(i.x) + "," + std::to_string(i.y) + "," + std::to_string(i.z) + ")";
  };
  return "block " + triple(thread.block_index) + " thread " + triple(thread.thread_index);
}

std::string describe(Location location) {
  const char* path = location.file_name();
  const char* slash = std::strrchr(path, '/');
  return std::string(slash ? slash + 1 : path) + ":" + std::to_string(location.line());
}

void fail(const std::string& what, Location location) {
  throw std::runtime_error(what + " at " + describe(location) + " by " + describe(*current_thread));
}

void abandon_launch() {
  engine.ended = true;
  current_fiber().state = State::kFinished;
  suspend(current_fiber());
  std::abort();  // a finished fiber is not resumed
}

// ---- Threads and blocks

namespace {

void fiber_main() {
  try {
    engine.launch.body(engine.launch.arguments);
  } catch (const std::exception& exception) {
    engine.error = exception.what();
    engine.ended = true;
  }
  current_fiber().state = State::kFinished;
  suspend(current_fiber());
  std::abort();  // a finished fiber is not resumed
}

Index3 unravel(unsigned index, Index3 shape) {
  return {index % shape.x, index / shape.x % shape.y, index / shape.x / shape.y};
}

void begin_thread(Fiber& fiber, Block& block, int index, Index3 block_index) {
  const Launch& launch = engine.launch;
  fiber.thread_index = unravel(static_cast<unsigned>(index), launch.block);
  fiber.block_index = block_index;
  fiber.block_dim = launch.block;
  fiber.grid_dim = launch.grid;
  fiber.index_in_block = index;
  fiber.lane = index % kWarpSize;
  fiber.warp = index / kWarpSize;
  fiber.block = &block;
  fiber.state = State::kNew;
  fiber.stack = nullptr;
  fiber.copies.clear();
  fiber.copy_groups.clear();
  fiber.uncommitted_copies = 0;
  if (!checker_enabled()) return;
  fiber.clock.fill(0);
  fiber.clock[static_cast<size_t>(fiber.lane)] = 1;
  fiber.fenced = false;
}

void begin_block(Block& block, unsigned index) {
  static uint32_t last_serial = 0;
  const int size = static_cast<int>(engine.launch.block.volume());
  block.serial = ++last_serial;
  block.epoch = 0;
  block.finished = block.at_barrier = block.votes = 0;
  block.acquired.clear();
  block.shared.reset(engine.launch.shared_bytes);
  for (int warp = 0; warp < kMaxWarps; ++warp) {
    const int lanes = std::clamp(size - warp * kWarpSize, 0, kWarpSize);
    const auto present = static_cast<uint32_t>((uint64_t{1} << lanes) - 1);
    block.in_collective[static_cast<size_t>(warp)] = 0;
    block.absent[static_cast<size_t>(warp)] = ~present;
  }
  block.fibers.resize(static_cast<size_t>(size));
  const Index3 block_index = unravel(index, engine.launch.grid);
  for (int i = 0; i < size; ++i) {
    const int thread = engine.scheduler.descending() ? size - 1 - i : i;
    Fiber& fiber = block.fibers[static_cast<size_t>(thread)];
    begin_thread(fiber, block, thread, block_index);
    engine.scheduler.push(&fiber);
  }
  ++engine.statistics.blocks;
  engine.statistics.threads += static_cast<uint64_t>(size);
}

void resume(Fiber& fiber) {
  if (fiber.state == State::kNew) {
    fiber.stack = engine.stacks.take();
    fiber.context = make_context(fiber.stack, fiber_main);
  }
  fiber.state = State::kRunning;
  current_thread = &fiber;
  hessreg_emu_switch(&engine.scheduler_context, fiber.context);
  if (fiber.state != State::kFinished) return;
  engine.stacks.give_back(fiber.stack);
  fiber.stack = nullptr;
}

// The others of the block may have been waiting for this thread.
void retire(Fiber& fiber) {
  Block& block = *fiber.block;
  if (block.at_barrier > 0) {
    fail("thread returned while " + std::to_string(block.at_barrier) +
             " thread(s) of its block wait in __syncthreads",
         block.barrier);
  }
  ++block.finished;
  block.absent[static_cast<size_t>(fiber.warp)] |= 1u << fiber.lane;
  const int first = fiber.warp * kWarpSize, end = std::min(first + kWarpSize, block.size());
  for (int i = first; i < end; ++i) {
    const Fiber& lane = block.fibers[static_cast<size_t>(i)];
    if (lane.state == State::kInCollective) complete_collective(block, lane, nullptr);
  }
}

// ---- Launches

void require_launchable(const Launch& launch) {
  const auto refuse = [&](const char* reason) {
    throw std::runtime_error("CUDA launch of " + std::string(launch.kernel_name) +
                             " failed: " + reason + " (emulated)");
  };
  const uint64_t threads = launch.block.volume(), blocks = launch.grid.volume();
  constexpr uint64_t kMultiprocessors = 132, kThreadsOfMultiprocessor = 2048;  // sm_90
  if (current_thread) refuse("launch from inside a kernel");
  if (threads == 0 || threads > kMaxThreads || launch.block.z > 64) refuse("invalid block size");
  if (blocks == 0 || launch.grid.x > 0x7fffffffu || launch.grid.y > 65535 ||
      launch.grid.z > 65535) {
    refuse("invalid grid size");
  }
  if (launch.shared_bytes > config().shared_limit) refuse("too much dynamic shared memory");
  const uint64_t warps = (threads + kWarpSize - 1) / kWarpSize;
  const uint64_t resident = kMultiprocessors * (kThreadsOfMultiprocessor / (warps * kWarpSize));
  if (launch.cooperative && blocks > resident) {
    refuse("too many blocks for a cooperative launch");
  }
}

std::vector<unsigned> block_order() {
  std::vector<unsigned> order(engine.launch.grid.volume());
  std::iota(order.begin(), order.end(), 0u);
  Scheduler& scheduler = engine.scheduler;
  if (scheduler.descending()) std::reverse(order.begin(), order.end());
  if (scheduler.randomised()) {
    for (size_t i = order.size(); i > 1; --i) {
      std::swap(order[i - 1], order[scheduler.random() % i]);
    }
  }
  return order;
}

std::string describe_wait(const Fiber& fiber) {
  const std::string place = " at " + describe(fiber.waits_at);
  if (fiber.state == State::kAtBlockBarrier) return "__syncthreads" + place;
  if (fiber.state == State::kAtGridBarrier) return "grid_sync" + place;
  char mask[32];
  std::snprintf(mask, sizeof mask, " mask 0x%08x", fiber.mask);
  return name_of(fiber.collective) + place + mask;
}

std::string describe_deadlock() {
  std::map<std::string, int> waits;
  for (const auto& block : engine.blocks) {
    for (const Fiber& fiber : block->fibers) {
      if (fiber.state != State::kFinished) ++waits[describe_wait(fiber)];
    }
  }
  std::string text = "deadlock, no thread can go on:";
  for (const auto& [wait, threads] : waits) {
    text += "\n    " + std::to_string(threads) + " thread(s) wait in " + wait;
  }
  return text;
}

void run_blocks() {
  const std::vector<unsigned> order = block_order();
  size_t begun = 0, finished = 0;
  for (auto& block : engine.blocks) begin_block(*block, order[begun++]);
  while (finished < order.size() && !engine.ended) {
    Fiber* fiber = engine.scheduler.pop();
    if (!fiber) throw std::runtime_error(describe_deadlock());
    resume(*fiber);
    if (fiber->state != State::kFinished || engine.ended) continue;
    retire(*fiber);
    Block& block = *fiber->block;
    if (block.finished < block.size()) continue;
    finish_profiled_block(block);
    ++finished;
    if (begun < order.size()) begin_block(block, order[begun++]);
  }
}

void prepare_engine(const Launch& launch) {
  engine.launch = launch;
  engine.skipped_barrier_line = config().skipped_barrier_line;
  engine.error.clear();
  engine.ended = false;
  engine.threads_at_grid_barrier = 0;
  ++engine.grid_epoch;
  engine.scheduler.reset(config().order, config().seed);
  const uint64_t blocks = launch.grid.volume();
  const auto resident = static_cast<uint64_t>(std::max(1, config().resident_blocks));
  const auto alive = static_cast<size_t>(launch.cooperative ? blocks : std::min(blocks, resident));
  while (engine.blocks.size() < alive) engine.blocks.push_back(std::make_unique<Block>());
  engine.blocks.resize(alive);
  if (checker_enabled()) begin_checked_launch();
}

// After an error threads are left where they stand.
void drop_threads() {
  for (auto& block : engine.blocks) {
    for (Fiber& fiber : block->fibers) {
      if (fiber.stack) engine.stacks.give_back(fiber.stack);
      fiber.stack = nullptr;
    }
  }
  current_thread = nullptr;
}

}  // namespace

void run(const Launch& launch) {
  require_launchable(launch);
  prepare_engine(launch);
  try {
    run_blocks();
  } catch (const std::exception& exception) {
    engine.error = exception.what();
  }
  drop_threads();
  const std::string reports = checker_enabled() ? take_reports() : "";
  if (engine.error.empty() && reports.empty()) return;
  const std::string error = engine.error.empty() ? "" : " " + engine.error;
  throw std::runtime_error("kernel " + std::string(launch.kernel_name) + ":" + error + reports);
}

}  // namespace hessreg::emulator
