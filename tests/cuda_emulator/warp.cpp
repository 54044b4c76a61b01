// Collectives of a warp: who takes part, and what the lanes receive.
#include <algorithm>
#include <array>
#include <bit>

#include "engine.hpp"

namespace hessreg::emulator {

namespace {

// The fibers that take part, by lane; null for the others.
using Lanes = std::array<Fiber*, kWarpSize>;

template <typename Argument>
Argument* argument_of(const Lanes& lanes, int lane) {
  const Fiber* fiber = lanes[static_cast<size_t>(lane)];
  return fiber ? static_cast<Argument*>(fiber->argument) : nullptr;
}

// Calls visit(lane, argument) for the lanes that take part.
template <typename Argument, typename Visit>
void for_each_argument(const Lanes& lanes, Visit visit) {
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (auto* argument = argument_of<Argument>(lanes, lane)) visit(lane, *argument);
  }
}

// ---- Shuffles

// CUDA's definition: a source outside the lane's segment of `width` lanes leaves the value alone,
// except that __shfl_sync wraps around and __shfl_xor_sync may read lower segments.
int shuffle_source(Collective kind, int lane, const ShuffleArgument& argument) {
  const int width = argument.width, segment = lane & ~(width - 1);
  int source = segment + (argument.source & (width - 1));
  if (kind == Collective::kShuffleUp) source = lane - argument.source;
  if (kind == Collective::kShuffleDown) source = lane + argument.source;
  if (kind == Collective::kShuffleXor) source = lane ^ argument.source;
  const bool below = kind == Collective::kShuffleUp && source < segment;
  return below || source >= segment + width ? lane : source;
}

void shuffle(Collective kind, const Lanes& lanes, Location location) {
  for_each_argument<ShuffleArgument>(lanes, [&](int lane, ShuffleArgument& argument) {
    if (argument.width > kWarpSize || !std::has_single_bit(static_cast<unsigned>(argument.width))) {
      fail("shuffle width must be a power of two up to 32", location);
    }
    const int source = shuffle_source(kind, lane, argument);
    const auto* sent = argument_of<ShuffleArgument>(lanes, source & (kWarpSize - 1));
    if (source < 0 || !sent) {
      fail("lane " + std::to_string(lane) + " shuffles from lane " + std::to_string(source) +
               ", which takes no part (undefined value)",
           location);
    }
    argument.received = sent->value;
  });
}

// ---- Votes and reductions

void ballot(const Lanes& lanes) {
  uint32_t votes = 0, voters = 0;
  for_each_argument<BallotArgument>(lanes, [&](int lane, const BallotArgument& argument) {
    voters |= 1u << lane;
    votes |= static_cast<uint32_t>(argument.predicate) << lane;
  });
  for_each_argument<BallotArgument>(lanes, [&](int, BallotArgument& argument) {
    argument.votes = votes;
    argument.voters = voters;
  });
}

int64_t reduce_pair(Collective kind, int64_t a, int64_t b) {
  switch (kind) {
    case Collective::kReduceAdd: return a + b;
    case Collective::kReduceMin: return std::min(a, b);
    case Collective::kReduceMax: return std::max(a, b);
    case Collective::kReduceAnd: return a & b;
    case Collective::kReduceOr: return a | b;
    default: return a ^ b;
  }
}

void reduce(Collective kind, const Lanes& lanes) {
  bool first = true;
  int64_t total = 0;
  for_each_argument<ReduceArgument>(lanes, [&](int, const ReduceArgument& argument) {
    total = first ? argument.value : reduce_pair(kind, total, argument.value);
    first = false;
  });
  for_each_argument<ReduceArgument>(lanes,
                                    [&](int, ReduceArgument& argument) { argument.value = total; });
}

// ---- Matrix products

constexpr int kMmaRows = 16, kMmaColumns = 8;

// The operands of d = a b + c as matrices, gathered from the lanes' registers.
template <int kDepth>
struct MmaOperands {
  double a[kMmaRows][kDepth];
  double b[kDepth][kMmaColumns];
};

double tf32_value(uint32_t bits) {
  return std::bit_cast<float>(bits & 0xffffe000u);  // the hardware ignores the 13 lowest bits
}

double bf16_value(uint32_t pair, int index) {
  return std::bit_cast<float>(pair >> (16 * index) << 16);
}

void gather_operands(int lane, const MmaArgument& from, MmaOperands<8>& to) {
  const int group = lane / 4, t = lane % 4;
  for (int i = 0; i < 4; ++i) to.a[group + i % 2 * 8][t + i / 2 * 4] = tf32_value(from.a[i]);
  for (int i = 0; i < 2; ++i) to.b[t + i * 4][group] = tf32_value(from.b[i]);
}

void gather_operands(int lane, const MmaArgument& from, MmaOperands<16>& to) {
  const int group = lane / 4, t = lane % 4;
  for (int i = 0; i < 8; ++i) {
    const int row = group + i / 2 % 2 * 8, column = 2 * t + i % 2 + i / 4 * 8;
    to.a[row][column] = bf16_value(from.a[i / 2], i % 2);
  }
  for (int i = 0; i < 4; ++i) {
    to.b[2 * t + i % 2 + i / 2 * 8][group] = bf16_value(from.b[i / 2], i % 2);
  }
}

template <int kDepth>
void multiply(const MmaOperands<kDepth>& operands, int lane, const MmaArgument& argument) {
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    double sum = argument.c[i];
    for (int k = 0; k < kDepth; ++k) sum += operands.a[row][k] * operands.b[k][column];
    argument.d[i] = static_cast<float>(sum);
  }
}

template <int kDepth>
void mma(const Lanes& lanes, Location location) {
  if (std::ranges::count(lanes, nullptr) > 0) fail("mma.sync needs all 32 lanes", location);
  MmaOperands<kDepth> operands;
  for_each_argument<MmaArgument>(lanes, [&](int lane, const MmaArgument& argument) {
    gather_operands(lane, argument, operands);
  });
  for_each_argument<MmaArgument>(
      lanes, [&](int lane, const MmaArgument& argument) { multiply(operands, lane, argument); });
}

// ---- All of them

void exchange(Collective kind, const Lanes& lanes, Location location) {
  switch (kind) {
    case Collective::kSync: break;
    case Collective::kShuffle:
    case Collective::kShuffleUp:
    case Collective::kShuffleDown:
    case Collective::kShuffleXor: shuffle(kind, lanes, location); break;
    case Collective::kBallot: ballot(lanes); break;
    case Collective::kMmaTf32: mma<8>(lanes, location); break;
    case Collective::kMmaBf16: mma<16>(lanes, location); break;
    default: reduce(kind, lanes);
  }
}

// __syncwarp orders memory accesses among its lanes; the other collectives do not.
void join_clocks(const Lanes& lanes) {
  WarpClock joined{};
  for (const Fiber* fiber : lanes) {
    if (!fiber) continue;
    std::ranges::transform(joined, fiber->clock, joined.begin(),
                           [](uint32_t a, uint32_t b) { return std::max(a, b); });
  }
  for (Fiber* fiber : lanes) {
    if (!fiber) continue;
    fiber->clock = joined;
    ++fiber->clock[static_cast<size_t>(fiber->lane)];
  }
}

bool all_arrived(const Block& block, const Fiber& example) {
  const auto warp = static_cast<size_t>(example.warp);
  return (example.mask & ~(block.in_collective[warp] | block.absent[warp])) == 0;
}

// Fills in the lanes that take part; false if one of them waits in another collective. Lanes that
// returned take no part, although a mask may name them.
bool gather_lanes(Block& block, const Fiber& example, Lanes& lanes) {
  const auto warp = static_cast<size_t>(example.warp);
  for (uint32_t left = example.mask & ~block.absent[warp]; left != 0; left &= left - 1) {
    const auto lane = static_cast<size_t>(std::countr_zero(left));
    Fiber& fiber = block.fibers[warp * kWarpSize + lane];
    if (fiber.mask != example.mask || fiber.collective != example.collective) return false;
    lanes[lane] = &fiber;
  }
  return true;
}

}  // namespace

const char* name_of(Collective kind) {
  switch (kind) {
    case Collective::kSync: return "__syncwarp";
    case Collective::kShuffle:
    case Collective::kShuffleUp:
    case Collective::kShuffleDown:
    case Collective::kShuffleXor: return "__shfl_sync";
    case Collective::kBallot: return "vote";
    case Collective::kMmaTf32:
    case Collective::kMmaBf16: return "mma.sync";
    default: return "__reduce_sync";
  }
}

bool complete_collective(Block& block, const Fiber& example, const Fiber* self) {
  if (!all_arrived(block, example)) return false;
  Lanes lanes{};
  if (!gather_lanes(block, example, lanes)) return false;
  block.in_collective[static_cast<size_t>(example.warp)] &= ~example.mask;
  exchange(example.collective, lanes, example.waits_at);
  if (example.collective == Collective::kSync && checker_enabled()) join_clocks(lanes);
  ++engine.statistics.collectives;
  if (engine.scheduler.descending()) std::ranges::reverse(lanes);
  for (Fiber* fiber : lanes) {
    if (fiber && fiber != self) make_ready(*fiber);
  }
  return true;
}

void warp_collective(Collective kind, uint32_t mask, void* argument, Location location) {
  if (kind == Collective::kSync && barrier_skipped(location)) return;
  Fiber& fiber = current_fiber();
  if ((mask >> fiber.lane & 1) == 0) {
    fail("warp collective called by a lane that its mask leaves out", location);
  }
  fiber.mask = mask;
  fiber.collective = kind;
  fiber.argument = argument;
  fiber.waits_at = location;
  fiber.state = State::kInCollective;
  fiber.block->in_collective[static_cast<size_t>(fiber.warp)] |= 1u << fiber.lane;
  if (!complete_collective(*fiber.block, fiber, &fiber)) {
    suspend(fiber);
  } else if (engine.scheduler.randomised()) {
    make_ready(fiber);
    suspend(fiber);
  } else {
    fiber.state = State::kRunning;
  }
}

}  // namespace hessreg::emulator
