#include "planted.h"

#include "numpy_arguments.hpp"

namespace {

using namespace hessreg::planted;
using hessreg::emulator::NumpyArguments;
namespace py = pybind11;

int length(const py::array& array, int axis = 0) { return static_cast<int>(array.shape(axis)); }

void bind_bugs(py::module_& module) {
  py::enum_<Bug>(module, "Bug", py::module_local())
      .value("NONE", Bug::kNone)
      .value("SHUFFLE_STARTS_AT_EIGHT", Bug::kShuffleStartsAtEight)
      .value("MASK_NAMES_HALF_THE_WARP", Bug::kMaskNamesHalfTheWarp)
      .value("SCRATCH_REUSED_TOO_EARLY", Bug::kScratchReusedTooEarly)
      .value("SCRATCH_READ_TOO_EARLY", Bug::kScratchReadTooEarly)
      .value("ONE_SLOT_TOO_MANY", Bug::kOneSlotTooMany)
      .value("PLAIN_ADD_ACROSS_BLOCKS", Bug::kPlainAddAcrossBlocks)
      .value("NO_GRID_SYNC", Bug::kNoGridSync)
      .value("NO_FENCE", Bug::kNoFence)
      .value("FENCE_TOO_EARLY", Bug::kFenceTooEarly)
      .value("SUM_OF_ANOTHER_WARP", Bug::kSumOfAnotherWarp)
      .value("TILE_REPLACED_TOO_EARLY", Bug::kTileReplacedTooEarly)
      .value("TILE_USED_TOO_EARLY", Bug::kTileUsedTooEarly)
      .value("ONE_COLUMN_TOO_MANY", Bug::kOneColumnTooMany)
      .value("NO_TAIL_GUARD", Bug::kNoTailGuard)
      .value("EARLY_RETURN", Bug::kEarlyReturn)
      .value("TAIL_NOT_CLEARED", Bug::kTailNotCleared)
      .value("MISALIGNED_VECTOR", Bug::kMisalignedVector)
      .value("UNPADDED_TILE", Bug::kUnpaddedTile)
      .value("WAITS_FOR_ONE_GROUP_LESS", Bug::kWaitsForOneGroupLess)
      .value("COPY_PAST_THE_END", Bug::kCopyPastTheEnd)
      .value("FRAGMENT_SWAPPED", Bug::kFragmentSwapped)
      .value("STAGE_REPLACED_TOO_EARLY", Bug::kStageReplacedTooEarly)
      .value("THREADS_LEAVE_ALONE", Bug::kThreadsLeaveAlone)
      .value("FLAG_READ_WITHOUT_BARRIER", Bug::kFlagReadWithoutBarrier)
      .value("NO_WARP_BARRIER", Bug::kNoWarpBarrier)
      .value("VOTE_AS_BARRIER", Bug::kVoteAsBarrier)
      .value("ONE_ELEMENT_TOO_MANY", Bug::kOneElementTooMany);
}

void bind_reductions(py::module_& module) {
  module.def(
      "project", [](py::array g, py::array v, py::array sums, py::array out, int blocks, Bug bug) {
        NumpyArguments a;
        project(a.input<float>("g", g), a.input<float>("v", v), a.in_out<float>("sums", sums),
                a.output<float>("out", out), length(g), blocks, bug);
      });
  module.def("ratio",
             [](py::array g, py::array v, py::array ticket, py::array out, int blocks, Bug bug) {
               NumpyArguments a;
               ratio(a.input<float>("g", g), a.input<float>("v", v),
                     a.scratch<float>("partials", 2 * static_cast<size_t>(blocks)),
                     a.in_out<uint32_t>("ticket", ticket), a.output<float>("out", out), length(g),
                     blocks, bug);
             });
}

void bind_matrices(py::module_& module) {
  module.def(
      "gaussian_rows", [](py::array x, py::array y, py::array w, py::array out, float c, Bug bug) {
        NumpyArguments a;
        gaussian_rows({a.input<float>("x", x), a.input<float>("y", y), a.input<float>("w", w),
                       a.output<float>("out", out), length(x), length(y), length(x, 1), c},
                      bug);
      });
  module.def("matrix_product", [](py::array a, py::array b, py::array c, Bug bug) {
    NumpyArguments arguments;
    matrix_product(arguments.input<float>("a", a), arguments.input<float>("b", b),
                   arguments.output<float>("c", c), length(a), length(b), length(a, 1), bug);
  });
  module.def("power_iteration", [](py::array matrices, py::array value, py::array vector,
                                   int iterations, float tolerance, Bug bug) {
    NumpyArguments a;
    power_iteration({a.input<float>("a", matrices), a.output<float>("value", value),
                     a.output<float>("vector", vector), length(matrices), length(matrices, 1),
                     iterations, tolerance},
                    bug);
  });
}

void bind_elementwise(py::module_& module) {
  module.def("warp_scan", [](py::array x, py::array out, Bug bug) {
    NumpyArguments a;
    warp_scan(a.input<float>("x", x), a.output<float>("out", out), length(x), bug);
  });
  module.def("axpy", [](py::array g, py::array v, py::array c, py::array out, Bug bug) {
    NumpyArguments a;
    axpy(a.input<float>("g", g), a.input<float>("v", v), a.input<float>("c", c),
         a.output<float>("out", out), length(g), bug);
  });
}

}  // namespace

HESSREG_EMULATOR_MODULE(module) {
  bind_bugs(module);
  bind_reductions(module);
  bind_matrices(module);
  bind_elementwise(module);
}
