#include <algorithm>

#include "../common/binding.h"
#include "projection_rules.h"
#ifdef HESSREG_CUDA
#include "projection_cuda.h"
#else
#include "../common/cpu_isa.h"
#include "projection_cpu.h"
#endif

namespace hessreg::projection {
namespace {

// Which elements share one inner product: all of a list, each tensor, each row of each tensor.
enum class Scope : int64_t { kGlobal, kTensor, kRow };

// The lists as the kernels take them, with what keeps their memory alive.
class Arguments {
 public:
  Arguments(const std::vector<Tensor>& tensors, int64_t num_lists, int64_t scope, bool batched,
            int64_t piece_length)
      : tensors_(contiguous(tensors)) {
    STD_TORCH_CHECK(!tensors.empty() && num_lists > 0 && tensors.size() % num_lists == 0,
                    "projection: ", tensors.size(), " tensors do not make ", num_lists, " lists");
    STD_TORCH_CHECK(scope >= 0 && scope <= 2, "projection: scope must be 0, 1 or 2, got ", scope);
    const auto positions = static_cast<int64_t>(tensors.size()) / num_lists;
    check_alike(positions);
    if (batched) check_batch();
    lay_out(positions, static_cast<Scope>(scope), batched, piece_length);
    for (const Tensor& tensor : tensors_) data_.push_back(tensor.const_data_ptr());
    const int64_t batch = batched ? tensors_[0].size(0) : 1;
    lists_ = {data_.data(), positions_.data(), num_lists,    positions,
              batch,        segments_,         piece_length, element_of(tensors_[0], "projection")};
  }

  const Lists& lists() const { return lists_; }
  const Tensor& first() const { return tensors_[0]; }
  int64_t num_pieces() const { return num_pieces_; }
  int64_t num_elements() const { return num_elements_; }  // of one list
  int64_t num_segments() const { return lists_.batch * segments_; }
  int64_t bytes_of_list() const { return num_elements_ * tensors_[0].element_size(); }

  // The shape of a result with one [rows, columns] matrix per segment.
  std::vector<int64_t> sizes(int64_t rows, int64_t columns, bool batched) const {
    if (batched) return {lists_.batch, segments_, rows, columns};
    return {segments_, rows, columns};
  }

  // Tensors like those of `count` lists.
  std::vector<Tensor> new_lists(int64_t count) const {
    std::vector<Tensor> result;
    for (int64_t c = 0; c < count; ++c)
      for (int64_t t = 0; t < lists_.num_positions; ++t)
        result.push_back(new_like(tensors_[t], tensors_[t].sizes()));
    return result;
  }

 private:
  void check_alike(int64_t positions) const {
    for (size_t i = 0; i < tensors_.size(); ++i) {
      const Tensor &tensor = tensors_[i], &model = tensors_[i % positions];
      STD_TORCH_CHECK(tensor.sizes().equals(model.sizes()), "projection: tensor ", i,
                      " differs in shape from its counterpart in the first list");
      STD_TORCH_CHECK(are_alike(tensor, tensors_[0]), "projection: tensor ", i,
                      " differs in dtype or device from the first");
    }
  }

  void check_batch() const {
    for (size_t i = 0; i < tensors_.size(); ++i)
      STD_TORCH_CHECK(tensors_[i].dim() > 0 && tensors_[i].size(0) == tensors_[0].size(0),
                      "projection: tensor ", i, " differs from the first in its batch size");
  }

  void lay_out(int64_t positions, Scope scope, bool batched, int64_t piece_length) {
    int64_t segment = 0;
    for (int64_t t = 0; t < positions; ++t) {
      const Tensor& tensor = tensors_[t];
      const int64_t batch = batched ? tensor.size(0) : 1;
      const bool by_row = scope == Scope::kRow && tensor.dim() - batched >= 2;
      const int64_t rows = by_row ? tensor.size(batched) : 1;
      const int64_t length = batch * rows > 0 ? tensor.numel() / (batch * rows) : 0;
      positions_.push_back({rows, length, scope == Scope::kGlobal ? 0 : segment, num_pieces_});
      num_pieces_ += batch * rows * pieces_per_row(length, piece_length);
      num_elements_ += tensor.numel();
      segment += rows;
    }
    segments_ = scope == Scope::kGlobal ? 1 : segment;
  }

  std::vector<Tensor> tensors_;
  std::vector<Position> positions_;
  std::vector<const void*> data_;
  Lists lists_{};
  int64_t num_pieces_ = 0, num_elements_ = 0, segments_ = 1;
};

// Where results go: as lists like the arguments, or into the first of these.
struct Output {
  Output(std::vector<Tensor>& tensors, int64_t count, bool overwrite = false)
      : num_lists(count), in_place(overwrite) {
    for (Tensor& tensor : tensors) pointers_.push_back(tensor.mutable_data_ptr());
  }

  void* const* data() const { return pointers_.data(); }

  int64_t num_lists;
  bool in_place;

 private:
  std::vector<void*> pointers_;
};

double eps_of(Element element) {
  return element == Element::kFloat64 ? std::numeric_limits<double>::epsilon()
                                      : std::numeric_limits<float>::epsilon();
}

#ifdef HESSREG_CUDA

constexpr int64_t kPieceLength = cuda::kPieceLength;

int64_t work_for(const Arguments& x) { return x.num_segments() * work_size(x.lists().num_lists); }

void run_gram(const Arguments& x, double* gram, const Outcome* outcome = nullptr) {
  const Executor executor(x.first());
  Tensor partials = new_float64(x.first(), {x.num_pieces() * num_pairs(x.lists().num_lists)});
  cuda::gram(x.lists(), partials.mutable_data_ptr<double>(), gram, outcome, executor.stream());
}

void run_combination(const Arguments& x, const double* weights, const Output& out) {
  const Executor executor(x.first());
  cuda::linear_combination(x.lists(), weights, out.data(), out.num_lists, executor.stream());
}

void run_rule(const Arguments& x, double* gram, const Outcome& outcome, const Output& out) {
  run_gram(x, gram, &outcome);
  run_combination(x, outcome.weights, out);
}

#else

constexpr int64_t kPieceLength = 16384;

int64_t work_for(const Arguments& x) { return work_size(x.lists().num_lists); }

const CpuKernels& kernels() {
#if defined(__x86_64__)
  if (active_isa() == Isa::kAvx512) return avx512::kernels;
  if (active_isa() == Isa::kAvx2) return avx2::kernels;
#endif
  return baseline::kernels;
}

// Consecutive pieces that hold whole segments.
struct Run {
  int64_t begin, end, first_segment, last_segment;
};

Run everything(const Arguments& x) { return {0, x.num_pieces(), 0, x.num_segments()}; }

// Run after run is summed and then combined: of segments that fit in the caches the second pass
// finds there what the first one read.
std::vector<Run> runs_of(const Arguments& x) {
  constexpr int64_t kBytes = 1 << 20;
  if (x.lists().batch > 1 || x.num_pieces() == 0) return {everything(x)};
  std::vector<Run> runs{{0, 0, 0, 0}};
  const int64_t size = x.lists().num_lists * x.first().element_size();
  int64_t bytes = 0, segment = 0;
  Walker walker(x.lists(), 0);
  for (int64_t i = 0; i < x.num_pieces(); ++i, walker.advance()) {
    const Piece piece = walker.piece();
    if (piece.segment != segment && bytes >= kBytes) {
      runs.back().end = i;
      runs.back().last_segment = piece.segment;
      runs.push_back({i, i, piece.segment, piece.segment});
      bytes = 0;
    }
    segment = piece.segment;
    bytes += piece.length * size;
  }
  runs.back().end = x.num_pieces();
  runs.back().last_segment = x.num_segments();
  return runs;
}

// Calls body(begin, end) for all pieces of a run, in torch's threads where there is work enough.
template <typename Body>
void parallel_over_pieces(const Arguments& x, const Run& run, const Body& body) {
  if (run.begin == run.end) return;
  const int64_t grain = std::max<int64_t>(1, 2 * kPieceLength * x.num_pieces() / x.num_elements());
  torch::stable::parallel_for(run.begin, run.end, grain, body);
}

// Sums the pieces of each segment in their order, so that the result is the same for any number of
// threads.
void sum_pieces(const Arguments& x, const Run& run, const double* partials, double* gram) {
  const int64_t m = x.lists().num_lists, pairs = num_pairs(m);
  std::fill(gram + run.first_segment * m * m, gram + run.last_segment * m * m, 0.0);
  if (run.begin == run.end) return;
  Walker walker(x.lists(), run.begin);
  for (int64_t piece = run.begin; piece < run.end; ++piece, walker.advance()) {
    double* sums = gram + walker.piece().segment * m * m;
    for (int64_t a = 0; a < m; ++a)
      for (int64_t b = a; b < m; ++b)
        sums[a * m + b] += partials[piece * pairs + pair_index(a, b, m)];
  }
  for (int64_t s = run.first_segment; s < run.last_segment; ++s)
    for (int64_t a = 0; a < m; ++a)
      for (int64_t b = 0; b < a; ++b) gram[(s * m + a) * m + b] = gram[(s * m + b) * m + a];
}

using Partials = std::vector<double>;

void sum_run(const Arguments& x, const Run& run, Partials& partials, double* gram) {
  partials.resize(x.num_pieces() * num_pairs(x.lists().num_lists));
  parallel_over_pieces(x, run, [&](int64_t begin, int64_t end) {
    kernels().gram(x.lists(), partials.data(), begin, end);
  });
  sum_pieces(x, run, partials.data(), gram);
}

// What is read and written from here up does not fit in the caches beside the rest: results then
// go to memory directly, which saves reading their lines first (16 % of a projection).
constexpr int64_t kStreamingBytes = 32 << 20;

void combine_run(const Arguments& x, const Run& run, const double* weights, const Output& out) {
  Lists lists = x.lists();
  lists.streaming =
      !out.in_place && x.bytes_of_list() * (lists.num_lists + out.num_lists) >= kStreamingBytes;
  parallel_over_pieces(x, run, [&](int64_t begin, int64_t end) {
    kernels().linear_combination(lists, weights, out.data(), out.num_lists, begin, end);
  });
}

void run_gram(const Arguments& x, double* gram) {
  Partials partials;
  sum_run(x, everything(x), partials, gram);
}

void run_combination(const Arguments& x, const double* weights, const Output& out) {
  combine_run(x, everything(x), weights, out);
}

void run_rule(const Arguments& x, double* gram, const Outcome& outcome, const Output& out) {
  const int64_t m = x.lists().num_lists;
  Partials partials;
  for (const Run& run : runs_of(x)) {
    sum_run(x, run, partials, gram);
    for (int64_t s = run.first_segment; s < run.last_segment; ++s)
      outcome.find(gram + s * m * m, m, s, outcome.work, Alone{});
    combine_run(x, run, outcome.weights, out);
  }
}

#endif

// Combines lists as a rule says; the cosines if they are asked for.
void combine(const Arguments& x, const Rule& rule, const Output& out, double* cosines = nullptr) {
  const int64_t m = x.lists().num_lists;
  Tensor gram = new_float64(x.first(), {x.num_segments(), m, m});
  Tensor work = new_float64(x.first(), {work_for(x)});
  Tensor weights = new_float64(x.first(), {x.num_segments(), rule.num_outputs(m), m});
  const Outcome outcome{rule, work.mutable_data_ptr<double>(), weights.mutable_data_ptr<double>(),
                        cosines};
  run_rule(x, gram.mutable_data_ptr<double>(), outcome, out);
}

std::vector<Tensor> combined(const Arguments& x, const Rule& rule) {
  const int64_t num_outputs = rule.num_outputs(x.lists().num_lists);
  std::vector<Tensor> result = x.new_lists(num_outputs);
  combine(x, rule, Output(result, num_outputs));
  return result;
}

Tensor gram_op(std::vector<Tensor> tensors, int64_t num_lists, int64_t scope, bool batched) {
  const Arguments x(tensors, num_lists, scope, batched, kPieceLength);
  Tensor gram = new_float64(x.first(), x.sizes(num_lists, num_lists, batched));
  run_gram(x, gram.mutable_data_ptr<double>());
  return gram;
}

std::vector<Tensor> linear_combination_op(std::vector<Tensor> tensors, Tensor weights,
                                          int64_t scope, bool batched) {
  STD_TORCH_CHECK(weights.scalar_type() == ScalarType::Double && weights.dim() == 3 + batched,
                  "projection: weights must be float64 with ", 3 + batched, " dimensions");
  const int64_t num_outputs = weights.size(weights.dim() - 2);
  const int64_t num_lists = weights.size(weights.dim() - 1);
  const Arguments x(tensors, num_lists, scope, batched, kPieceLength);
  STD_TORCH_CHECK(weights.sizes().equals(x.sizes(num_outputs, num_lists, batched)),
                  "projection: weights must hold one matrix for each of ", x.num_segments(),
                  " segments");
  STD_TORCH_CHECK(weights.device() == x.first().device(),
                  "projection: weights must be on the device of the tensors");
  const Tensor dense = torch::stable::contiguous(weights);
  std::vector<Tensor> out = x.new_lists(num_outputs);
  run_combination(x, dense.const_data_ptr<double>(), Output(out, num_outputs));
  return out;
}

std::vector<Tensor> project_op(std::vector<Tensor> tensors, int64_t num_directions, double strength,
                               bool conflict_only, bool rescale, int64_t scope, bool batched) {
  const Arguments x(tensors, 1 + num_directions, scope, batched, kPieceLength);
  const Rule rule = projection_rule(eps_of(x.lists().element), strength, conflict_only, rescale);
  return combined(x, rule);
}

// Where a tensor lies, and which of all it is.
struct Range {
  uintptr_t begin, end;
  size_t index;
};

std::vector<Range> ranges_of(const std::vector<Tensor>& tensors) {
  std::vector<Range> ranges;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const auto begin = reinterpret_cast<uintptr_t>(tensors[i].const_data_ptr());
    if (tensors[i].numel() > 0 && tensors[i].is_contiguous())  // others are copied first
      ranges.push_back({begin, begin + tensors[i].numel() * tensors[i].element_size(), i});
  }
  std::sort(ranges.begin(), ranges.end(),
            [](const Range& a, const Range& b) { return a.begin < b.begin; });
  return ranges;
}

// What is overwritten must not be read later on: only a direction may be g itself, position by
// position.
void check_overlap(const std::vector<Tensor>& g, const std::vector<Tensor>& directions) {
  const std::vector<Range> own = ranges_of(g), others = ranges_of(directions);
  for (size_t i = 1; i < own.size(); ++i)
    STD_TORCH_CHECK(own[i - 1].end <= own[i].begin, "projection: tensors ", own[i - 1].index,
                    " and ", own[i].index, " of g share memory");
  auto it = own.begin();
  for (const Range& other : others) {
    while (it != own.end() && it->end <= other.begin) ++it;
    for (auto hit = it; hit != own.end() && hit->begin < other.end; ++hit)
      STD_TORCH_CHECK(hit->index == other.index % g.size() && hit->begin == other.begin,
                      "projection: tensor ", hit->index,
                      " of g shares memory with a direction at another place");
  }
}

Tensor project_inplace_op(std::vector<Tensor> g, std::vector<Tensor> directions,
                          int64_t num_directions, double strength, bool conflict_only, bool rescale,
                          int64_t scope) {
  for (size_t i = 0; i < g.size(); ++i)
    STD_TORCH_CHECK(g[i].is_contiguous(), "projection: tensor ", i, " of g must be contiguous");
  check_overlap(g, directions);
  std::vector<Tensor> tensors = g;
  tensors.insert(tensors.end(), directions.begin(), directions.end());
  const Arguments x(tensors, 1 + num_directions, scope, false, kPieceLength);
  const Rule rule = projection_rule(eps_of(x.lists().element), strength, conflict_only, rescale);
  Tensor cosines = new_float64(x.first(), {x.num_segments(), num_directions});
  combine(x, rule, Output(g, 1, true), cosines.mutable_data_ptr<double>());
  return cosines;
}

std::vector<Tensor> pcgrad_op(std::vector<Tensor> tensors, int64_t num_tasks, Tensor order,
                              int64_t reduction, int64_t scope, bool batched) {
  const Arguments x(tensors, num_tasks, scope, batched, kPieceLength);
  STD_TORCH_CHECK(order.scalar_type() == ScalarType::Long && order.is_contiguous() &&
                      order.numel() == num_tasks * num_tasks &&
                      order.device() == x.first().device(),
                  "projection: order must hold ", num_tasks, " x ", num_tasks,
                  " integers on the device of the tensors");
  STD_TORCH_CHECK(reduction >= 0 && reduction <= 2, "projection: reduction must be 0, 1 or 2, got ",
                  reduction);
  const Rule rule = pcgrad_rule(order.const_data_ptr<int64_t>(), static_cast<Reduction>(reduction));
  return combined(x, rule);
}

}  // namespace

#ifndef HESSREG_CUDA
STABLE_TORCH_LIBRARY_FRAGMENT(hessreg, m) {
  m.def("gram(Tensor[] tensors, int num_lists, int scope, bool batched) -> Tensor");
  m.def(
      "linear_combination(Tensor[] tensors, Tensor weights, int scope, bool batched)"
      " -> Tensor[]");
  m.def(
      "project(Tensor[] tensors, int num_directions, float strength, bool conflict_only,"
      " bool rescale, int scope, bool batched) -> Tensor[]");
  m.def(
      "project_(Tensor(a!)[] g, Tensor[] directions, int num_directions, float strength,"
      " bool conflict_only, bool rescale, int scope) -> Tensor");
  m.def(
      "pcgrad(Tensor[] tensors, int num_tasks, Tensor order, int reduction, int scope,"
      " bool batched) -> Tensor[]");
}
#endif

STABLE_TORCH_LIBRARY_IMPL(hessreg, HESSREG_DISPATCH_KEY, m) {
  m.impl("gram", TORCH_BOX(&gram_op));
  m.impl("linear_combination", TORCH_BOX(&linear_combination_op));
  m.impl("project", TORCH_BOX(&project_op));
  m.impl("project_", TORCH_BOX(&project_inplace_op));
  m.impl("pcgrad", TORCH_BOX(&pcgrad_op));
}

}  // namespace hessreg::projection
