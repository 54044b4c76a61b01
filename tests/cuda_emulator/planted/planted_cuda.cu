#include <type_traits>

#include "elementwise.cuh"
#include "gaussian_rows.cuh"
#include "matrix_product.cuh"
#include "planted.h"
#include "power_iteration.cuh"
#include "reductions.cuh"

namespace hessreg::planted {

namespace {

template <Bug kBug>
using Chosen = std::integral_constant<Bug, kBug>;

// Calls run(Chosen<bug>{}) if the bug is among kBugs, which are the ones of that kernel; without
// a bug otherwise. A GPU gets the kernels without bugs only.
template <Bug... kBugs, typename Run>
void with_bug(Bug bug, Run run) {
#if defined(__CUDACC__)
  const bool planted = false;
  static_cast<void>(bug);
#else
  const bool planted = ((bug == kBugs && (run(Chosen<kBugs>{}), true)) || ...);
#endif
  if (!planted) run(Chosen<Bug::kNone>{});
}

unsigned blocks_for(int n, int size) { return static_cast<unsigned>((n + size - 1) / size); }

}  // namespace

void project(const float* g, const float* v, float* sums, float* out, int n, int blocks, Bug bug) {
  with_bug<Bug::kPlainAddAcrossBlocks, Bug::kNoGridSync>(bug, [&](auto chosen) {
    HESSREG_LAUNCH_COOPERATIVE((project_kernel<chosen.value>), blocks, 256, 0, nullptr, g, v, sums,
                               out, n);
  });
}

void ratio(const float* g, const float* v, float* partials, uint32_t* ticket, float* out, int n,
           int blocks, Bug bug) {
  with_bug<Bug::kShuffleStartsAtEight, Bug::kMaskNamesHalfTheWarp, Bug::kScratchReusedTooEarly,
           Bug::kScratchReadTooEarly, Bug::kOneSlotTooMany, Bug::kNoFence, Bug::kFenceTooEarly,
           Bug::kSumOfAnotherWarp>(bug, [&](auto chosen) {
    HESSREG_LAUNCH((ratio_kernel<chosen.value>), blocks, 256, 0, nullptr, g, v, partials, ticket,
                   out, n);
  });
}

void gaussian_rows(const GaussianRows& arguments, Bug bug) {
  with_bug<Bug::kTileReplacedTooEarly, Bug::kTileUsedTooEarly, Bug::kOneColumnTooMany,
           Bug::kNoTailGuard, Bug::kEarlyReturn, Bug::kTailNotCleared, Bug::kMisalignedVector,
           Bug::kUnpaddedTile>(bug, [&](auto chosen) {
    HESSREG_LAUNCH((gaussian_rows_kernel<chosen.value>), blocks_for(arguments.n, kTile),
                   kTile * kWarpsOfTile, 0, nullptr, arguments);
  });
}

void matrix_product(const float* a, const float* b, float* c, int m, int n, int k, Bug bug) {
  with_bug<Bug::kWaitsForOneGroupLess, Bug::kCopyPastTheEnd, Bug::kFragmentSwapped,
           Bug::kStageReplacedTooEarly>(bug, [&](auto chosen) {
    const dim3 grid(blocks_for(n, kRowsOfB), blocks_for(m, kRowsOfA));
    HESSREG_LAUNCH((matrix_product_kernel<chosen.value>), grid, kProductThreads,
                   2 * kStage * sizeof(float), nullptr, Product{a, b, c, m, n, k});
  });
}

void power_iteration(const PowerIteration& arguments, Bug bug) {
  with_bug<Bug::kThreadsLeaveAlone, Bug::kFlagReadWithoutBarrier>(bug, [&](auto chosen) {
    HESSREG_LAUNCH((power_iteration_kernel<chosen.value>), arguments.batch, kMaxOrder, 0, nullptr,
                   arguments);
  });
}

void warp_scan(const float* x, float* out, int n, Bug bug) {
  with_bug<Bug::kNoWarpBarrier, Bug::kVoteAsBarrier>(bug, [&](auto chosen) {
    HESSREG_LAUNCH((warp_scan_kernel<chosen.value>), blocks_for(n, 256), 256, 0, nullptr, x, out,
                   n);
  });
}

void axpy(const float* g, const float* v, const float* c, float* out, int n, Bug bug) {
  with_bug<Bug::kOneElementTooMany>(bug, [&](auto chosen) {
    HESSREG_LAUNCH((axpy_kernel<chosen.value>), blocks_for(n + 1, 256), 256, 0, nullptr, g, v, c,
                   out, n);
  });
}

}  // namespace hessreg::planted
