// Barriers of a block and of the grid.
#include <string_view>

#include "engine.hpp"

namespace hessreg::emulator {

namespace {

void release_block(Block& block) {
  ++block.epoch;
  ++engine.statistics.barriers;
  block.at_barrier = 0;
  const int size = block.size();
  for (int i = 0; i < size; ++i) {
    make_ready(block.fibers[static_cast<size_t>(engine.scheduler.descending() ? size - 1 - i : i)]);
  }
}

void release_grid() {
  ++engine.grid_epoch;
  ++engine.statistics.barriers;
  engine.threads_at_grid_barrier = 0;
  for (auto& block : engine.blocks) {
    ++block->epoch;
    for (Fiber& fiber : block->fibers) make_ready(fiber);
  }
}

bool same_place(Location a, Location b) {
  if (a.line() != b.line()) return false;
  return a.file_name() == b.file_name() || std::string_view(a.file_name()) == b.file_name();
}

void require_convergence(Block& block, Location location) {
  if (block.at_barrier == 0) {
    block.barrier = location;
  } else if (!same_place(block.barrier, location)) {
    fail("divergent __syncthreads: " + std::to_string(block.at_barrier) +
             " thread(s) of the block wait at " + describe(block.barrier) + ", this one is",
         location);
  }
  if (block.finished > 0) {
    fail("__syncthreads after " + std::to_string(block.finished) +
             " thread(s) of the block already returned,",
         location);
  }
}

}  // namespace

bool is_skipped_barrier(Location location) {
  if (!std::string_view(location.file_name()).ends_with(config().skipped_barrier_file)) {
    return false;
  }
  ++engine.statistics.skipped_barriers;
  return true;
}

void block_barrier(Location location) {
  if (barrier_skipped(location)) return;
  Fiber& fiber = current_fiber();
  Block& block = *fiber.block;
  require_convergence(block, location);
  fiber.waits_at = location;
  fiber.state = State::kAtBlockBarrier;
  if (++block.at_barrier == block.size()) release_block(block);
  suspend(fiber);
}

int block_count(bool predicate, Location location) {
  Block& block = *current_fiber().block;
  if (block.at_barrier == 0) block.votes = 0;
  block.votes += predicate;
  block_barrier(location);
  const int votes = block.votes;
  block_barrier(location);  // nobody starts the next vote before all have read this one
  return votes;
}

void grid_barrier(Location location) {
  if (barrier_skipped(location)) return;
  Fiber& fiber = current_fiber();
  if (!engine.launch.cooperative) fail("grid_sync in a launch that is not cooperative", location);
  if (fiber.block->finished > 0) {
    fail("grid_sync after threads of the block already returned,", location);
  }
  fiber.waits_at = location;
  fiber.state = State::kAtGridBarrier;
  const uint64_t threads = engine.launch.grid.volume() * engine.launch.block.volume();
  if (++engine.threads_at_grid_barrier == threads) release_grid();
  suspend(fiber);
}

void thread_fence() { current_fiber().fenced = true; }

}  // namespace hessreg::emulator
