// Compiled once per instruction set, with HESSREG_ISA naming the namespace.
#include "gaussian_cpu_tiles.h"

namespace hessreg::gaussian::HESSREG_ISA {
namespace {

// ---- matrix ------------------------------------------------------------------------------------

template <typename C>
struct MatrixSpace {
  Arena arena;
  Components<C> mixture;
  Rows<C> x, y;
  Panels<C> panels;  // of y: a vector holds neighbours in a row of the matrix
  Centre<C> centre;
  C* partial;

  HESSREG_HD MatrixSpace(const Matrix& problem, void* workspace)
      : arena(workspace),
        mixture(problem.mixture, arena),
        x(problem.d, arena),
        y(problem.d, arena),
        panels(problem.d, arena),
        centre(problem.d, arena),
        partial(arena.take<C>(kBlock * kBlock)) {}
};

template <typename T>
void matrix_block(const Matrix& problem, MatrixSpace<Compute<T>>& space, T* out, int64_t columns) {
  using C = Compute<T>;
  const Distances<C> distances{space.y, space.panels, space.x, space.partial};
  distances.sweep([&](int64_t p, int64_t g, Tile<C, kGroup>& tile) {
    weigh<false, false, C, kGroup, 2>(space.mixture, tile, tile);
    for (int r = 0; r < kGroup && g * kGroup + r < space.x.count; ++r)
      for (int h = 0; h < 2; ++h) {
        const int64_t j = p * kPanel<C> + h * kLanes<C>;
        store_some<T>(out + (g * kGroup + r) * problem.m + j, tile[r][h], columns - j);
      }
  });
}

template <typename T>
void matrix_rows(const Matrix& problem, void* workspace, int64_t begin, int64_t end) {
  using C = Compute<T>;
  MatrixSpace<C> space(problem, workspace);
  const Blocks rows(problem.n), columns(problem.m);
  const int64_t d = problem.d;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t batch = task / rows.count, i = rows.begin(task % rows.count);
    const T* x = static_cast<const T*>(problem.x) + (batch * problem.n + i) * d;
    space.mixture.load(problem.mixture, batch);
    space.x.count = rows.end(task % rows.count) - i;
    space.centre.find(x, space.x.count);
    space.x.load(x, space.x.count, space.centre.data);
    for (int64_t block = 0; block < columns.count; ++block) {
      const int64_t j = columns.begin(block), width = columns.end(block) - j;
      space.y.load(static_cast<const T*>(problem.y) + (batch * problem.m + j) * d, width,
                   space.centre.data);
      space.panels.load(space.y.data, space.y.stride, width);
      T* out = static_cast<T*>(problem.out) + (batch * problem.n + i) * problem.m + j;
      matrix_block(problem, space, out, width);
    }
  }
}

// ---- sum ---------------------------------------------------------------------------------------

// One factor over a pair of blocks. Rows of the right side that fill up the block are zero.
template <typename C>
struct FactorBlocks {
  Panels<C> left;
  C* right;
};

template <typename C>
struct SumSpace {
  Arena arena;
  Components<C> mixture;
  Rows<C> x, y;
  Panels<C> panels;  // of x: a vector holds the same column of neighbouring results
  Centre<C> centre;
  C* weights;
  double* totals;  // [panel, e, kPanel]
  Arena factors;

  HESSREG_HD SumSpace(const Sum& problem, void* workspace)
      : arena(workspace),
        mixture(problem.mixture, arena),
        x(problem.d, arena),
        y(problem.d, arena),
        panels(problem.d, arena),
        centre(problem.d, arena),
        weights(arena.take<C>(kBlock * kBlock)),
        totals(arena.take<double>(smaller(kBlock, round_up(problem.n, kPanel<C>)) * problem.e)),
        factors(arena) {}

  // The blocks of factor l: always the same memory.
  HESSREG_HD FactorBlocks<C> factor(const Sum& problem, int64_t l) const {
    Arena here = factors;
    for (int64_t before = 0; before < l; ++before) {
      here.take<C>(kBlock * problem.factors[before].rank);
      here.take<C>(kBlock * problem.factors[before].rank);
    }
    Panels<C> left(problem.factors[l].rank, here);
    left.count = panels.count;
    return {left, here.take<C>(kBlock * problem.factors[l].rank)};
  }
};

// tile *= <left, right>
template <typename C>
HESSREG_HD void apply(const FactorBlocks<C>& factor, int64_t p, int64_t g, Tile<C, kGroup>& tile) {
  const int64_t rank = factor.left.width;
  Tile<C, kGroup> q;
  clear<C, kGroup, 2>(q);
  multiply<false, C, kGroup, 2>(factor.left.panel(p), kPanel<C>, factor.right + g * kGroup * rank,
                                1, rank, rank, q);
#pragma GCC unroll 12
  for (int r = 0; r < kGroup; ++r)
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) tile[r][h] *= q[r][h];
}

// Columns [0, R) of the results of a panel grow by its weights times v.
template <int R, typename C>
HESSREG_HD void add_columns(const C* weights, const C* v, int64_t e, int64_t count,
                            double* totals) {
  for (int64_t j = 0; j < count; j += kTerms) {
    Tile<C, R> tile;
    clear<C, R, 2>(tile);
    multiply<false, C, R, 2>(weights + j * kPanel<C>, kPanel<C>, v + j * e, e, 1,
                             smaller(kTerms, count - j), tile);
    for (int r = 0; r < R; ++r) {
      C row[kPanel<C>];
      for (int h = 0; h < 2; ++h) store(row + h * kLanes<C>, tile[r][h]);
      for (int i = 0; i < kPanel<C>; ++i) totals[r * kPanel<C> + i] += row[i];
    }
  }
}

template <typename C>
void multiply_weights(const C* weights, const C* v, int64_t e, int64_t count, double* totals) {
  int64_t c = 0;
  const auto here = [&](int64_t column) { return totals + column * kPanel<C>; };
  for (; c + kGroup <= e; c += kGroup) add_columns<kGroup>(weights, v + c, e, count, here(c));
  for (; c + 4 <= e; c += 4) add_columns<4>(weights, v + c, e, count, here(c));
  for (; c < e; ++c) add_columns<1>(weights, v + c, e, count, here(c));
}

template <typename C>
void sum_block(const Sum& problem, SumSpace<C>& space, const C* v) {
  const Distances<C> distances{space.x, space.panels, space.y, space.weights};
  distances.sweep([&](int64_t p, int64_t g, Tile<C, kGroup>& tile) {
    weigh<false, false, C, kGroup, 2>(space.mixture, tile, tile);
    for (int64_t l = 0; l < problem.num_factors; ++l) apply(space.factor(problem, l), p, g, tile);
    C* to = space.weights + (p * kBlock + g * kGroup) * kPanel<C>;
    for (int r = 0; r < kGroup; ++r)
      for (int h = 0; h < 2; ++h) store(to + r * kPanel<C> + h * kLanes<C>, tile[r][h]);
  });
  for (int64_t p = 0; p < space.panels.count; ++p)
    multiply_weights(space.weights + p * kBlock * kPanel<C>, v, problem.e, space.y.count,
                     space.totals + p * kPanel<C> * problem.e);
}

// Zeros on the right of rows that fill up the block, or what lies there could be infinite.
template <typename C>
HESSREG_HD void load_right(const Factor& factor, int64_t row, int64_t count, C* to) {
  const C* from = static_cast<const C*>(factor.right) + row * factor.rank;
  for (int64_t k = 0; k < kBlock * factor.rank; ++k)
    to[k] = k < count * factor.rank ? from[k] : C(0);
}

template <typename C>
HESSREG_HD void store_totals(const SumSpace<C>& space, int64_t e, C* out) {
  for (int64_t i = 0; i < space.x.count; ++i) {
    const double* panel = space.totals + i / kPanel<C> * kPanel<C> * e + i % kPanel<C>;
    for (int64_t c = 0; c < e; ++c) out[i * e + c] = static_cast<C>(panel[c * kPanel<C>]);
  }
}

template <typename C>
void sum_rows(const Sum& problem, void* workspace, int64_t begin, int64_t end) {
  SumSpace<C> space(problem, workspace);
  const Blocks rows(problem.n), columns(problem.m);
  const int64_t n = problem.n, m = problem.m, d = problem.d, e = problem.e;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t batch = task / rows.count, i = batch * n + rows.begin(task % rows.count);
    const C* x = static_cast<const C*>(problem.x) + i * d;
    const int64_t count = batch * n + rows.end(task % rows.count) - i;
    space.mixture.load(problem.mixture, batch);
    space.centre.find(x, count);
    space.x.load(x, count, space.centre.data);
    space.panels.load(space.x.data, space.x.stride, count);
    for (int64_t l = 0; l < problem.num_factors; ++l) {
      const Factor& factor = problem.factors[l];
      space.factor(problem, l)
          .left.load(static_cast<const C*>(factor.left) + i * factor.rank, factor.rank, count);
    }
    for (int64_t k = 0; k < space.panels.count * kPanel<C> * e; ++k) space.totals[k] = 0;
    for (int64_t block = 0; block < columns.count; ++block) {
      const int64_t j = batch * m + columns.begin(block);
      const int64_t width = batch * m + columns.end(block) - j;
      space.y.load(static_cast<const C*>(problem.y) + j * d, width, space.centre.data);
      for (int64_t l = 0; l < problem.num_factors; ++l)
        load_right(problem.factors[l], j, width, space.factor(problem, l).right);
      sum_block(problem, space, static_cast<const C*>(problem.v) + j * e);
    }
    store_totals(space, e, static_cast<C*>(problem.out) + i * e);
  }
}

// ---- energy ------------------------------------------------------------------------------------

template <typename C>
struct EnergySpace {
  Arena arena;
  Components<C> mixture;
  Rows<C> all_i, all_j, i, j;    // of two spans, and of a block of each
  Panels<C> all_panels, panels;  // of i
  Centre<C> centre;
  C *slopes, *row_sums, *column_sums;

  HESSREG_HD EnergySpace(const Energy& problem, void* workspace)
      : arena(workspace),
        mixture(problem.mixture, arena),
        all_i(problem.d, arena, span_for(problem.count)),
        all_j(problem.d, arena, span_for(problem.count)),
        i(all_i),
        j(all_j),
        all_panels(problem.d, arena, span_for(problem.count)),
        panels(all_panels),
        centre(problem.d, arena),
        slopes(arena.take<C>(kBlock * kBlock)),
        row_sums(arena.take<C>(kBlock)),
        column_sums(arena.take<C>(kBlock * kLanes<C> * kDirect)) {}
};

// A pair of blocks and what its sums grow.
struct EnergyPair {
  bool same_span;
  bool same;       // both blocks are one: its pairs come in both orders
  double weight;   // of a component at a pair of points, in either order
  double* grad_i;  // null: the value only
  double* grad_j;
};

// The points of the two blocks, and where these begin in their spans.
template <typename C>
struct Points {
  const C* i;
  int64_t from_i, count_i;
  const C* j;
  int64_t from_j, count_j;
};

// A point is no pair with itself: its distance becomes infinite.
template <typename C, int R>
HESSREG_HD void leave_out_diagonal(int64_t p, int64_t first, Tile<C, R>& s) {
  for (int r = 0; r < R; ++r) {
    const int64_t lane = first + r - p * kPanel<C>;
    if (lane < 0 || lane >= kPanel<C>) continue;
    C row[kPanel<C>];
    for (int h = 0; h < 2; ++h) store(row + h * kLanes<C>, s[r][h]);
    row[lane] = std::numeric_limits<C>::infinity();
    for (int h = 0; h < 2; ++h) s[r][h] = load<C, kLanes<C>>(row + h * kLanes<C>);
  }
}

// A sum in float64, one for each place of a vector.
template <typename C>
struct WideSum {
  Vector<double> parts[sizeof(double) / sizeof(C)] = {};

  HESSREG_HD void add(const Vector<C>& v) {
    C lanes[kLanes<C>];
    store(lanes, v);
    for (size_t part = 0; part < sizeof(double) / sizeof(C); ++part)
      parts[part] += load_double(lanes + part * kLanes<double>);
  }
  HESSREG_HD double total() const {
    double result = 0;
    for (const Vector<double>& part : parts) result += hessreg::sum(part);
    return result;
  }
};

// grad[0:N] += factor (tile - sum row) for one point.
template <typename C, int N>
HESSREG_HD void add_pull(const Vector<C> (&tile)[N], C sum, const C* row, C factor, double* grad) {
  C pull[N * kLanes<C>];
  for (int h = 0; h < N; ++h) {
    const Vector<C> here = load<C, kLanes<C>>(row + h * kLanes<C>);
    store(pull + h * kLanes<C>, (tile[h] - here * sum) * factor);
  }
  for (int k = 0; k < N * kLanes<C>; ++k) grad[k] += pull[k];
}

constexpr int kSide = kVectorBytes == 64 ? 8 : 4;  // points of a panel whose sums are in registers
static_assert(kPanel<float> % kSide == 0 && kPanel<double> % kSide == 0);

// Columns [c, c + N vectors) of the gradient of the points i.
template <int N, typename C>
void pull_rows(const EnergySpace<C>& space, const EnergyPair& pair, int64_t c) {
  const auto factor = static_cast<C>(4 * pair.weight);
  const int64_t width = gradient_width(space.i.d);
  for (int64_t i = 0; i < space.i.count; i += kSide) {
    const int64_t p = i / kPanel<C>, lane = i % kPanel<C>;
    Tile<C, kSide, N> sum;
    clear<C, kSide, N>(sum);
    for (int64_t j = 0; j < space.j.count; j += kTerms) {
      Tile<C, kSide, N> tile;
      clear<C, kSide, N>(tile);
      multiply<false, C, kSide, N>(space.j.data + j * space.j.stride + c, space.j.stride,
                                   space.slopes + (p * kBlock + j) * kPanel<C> + lane, kPanel<C>, 1,
                                   smaller(kTerms, space.j.count - j), tile);
      add<C, kSide, N>(tile, sum);
    }
    for (int r = 0; r < kSide && i + r < space.i.count; ++r)
      add_pull<C, N>(sum[r], space.row_sums[i + r], space.i.data + (i + r) * space.i.stride + c,
                     factor, pair.grad_i + (i + r) * width + c);
  }
}

// The same for the points j.
template <int N, typename C>
void pull_columns(const EnergySpace<C>& space, const EnergyPair& pair, int64_t c) {
  const auto factor = static_cast<C>(4 * pair.weight);
  const int64_t width = gradient_width(space.i.d);
  for (int64_t j = 0; j < space.j.count; j += kGroup) {
    Tile<C, kGroup, N> sum;
    clear<C, kGroup, N>(sum);
    for (int64_t p = 0; p < space.panels.count; ++p) {
      Tile<C, kGroup, N> tile;
      clear<C, kGroup, N>(tile);
      multiply<false, C, kGroup, N>(space.i.data + p * kPanel<C> * space.i.stride + c,
                                    space.i.stride, space.slopes + (p * kBlock + j) * kPanel<C>, 1,
                                    kPanel<C>, smaller(kPanel<C>, space.i.count - p * kPanel<C>),
                                    tile);
      add<C, kGroup, N>(tile, sum);
    }
    for (int r = 0; r < kGroup && j + r < space.j.count; ++r) {
      const Vector<C> sums = load<C, kLanes<C>>(space.column_sums + (j + r) * kLanes<C>);
      add_pull<C, N>(sum[r], sum_lanes<C>(sums), space.j.data + (j + r) * space.j.stride + c,
                     factor, pair.grad_j + (j + r) * width + c);
    }
  }
}

template <typename C>
void pull(const EnergySpace<C>& space, const EnergyPair& pair) {
  const int64_t width = round_up(space.i.d, kLanes<C>);
  for (int64_t c = 0; c < width; c += 2 * kLanes<C>) {
    const bool both = c + kLanes<C> < width;
    both ? pull_rows<2>(space, pair, c) : pull_rows<1>(space, pair, c);
    if (pair.same) continue;
    both ? pull_columns<2>(space, pair, c) : pull_columns<1>(space, pair, c);
  }
}

// Keeps the slopes of a tile with their sums over both points.
template <typename C>
HESSREG_HD void keep_slopes(EnergySpace<C>& space, int64_t p, int64_t g,
                            const Tile<C, kGroup>& slope) {
  C* to = space.slopes + (p * kBlock + g * kGroup) * kPanel<C>;
  Vector<C> rows[2] = {};
#pragma GCC unroll 12
  for (int r = 0; r < kGroup; ++r) {
    C* sums = space.column_sums + (g * kGroup + r) * kLanes<C>;
    store(sums, load<C, kLanes<C>>(sums) + slope[r][0] + slope[r][1]);
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      store(to + r * kPanel<C> + h * kLanes<C>, slope[r][h]);
      rows[h] += slope[r][h];
    }
  }
  for (int h = 0; h < 2; ++h) {
    C* sums = space.row_sums + p * kPanel<C> + h * kLanes<C>;
    store(sums, load<C, kLanes<C>>(sums) + rows[h]);
  }
}

template <bool kGradient, typename C>
double energy_of_blocks(EnergySpace<C>& space, const EnergyPair& pair, const Points<C>& points) {
  space.i = space.all_i.view(points.from_i, points.count_i);
  space.panels = space.all_panels.view(points.from_i, points.count_i);
  space.j = (pair.same_span ? space.all_i : space.all_j).view(points.from_j, points.count_j);
  const Distances<C> distances{space.i, space.panels, space.j, space.slopes};
  WideSum<C> value;
  for (int64_t k = 0; kGradient && k < kBlock; ++k) space.row_sums[k] = 0;
  for (int64_t k = 0; kGradient && k < kBlock * kLanes<C>; ++k) space.column_sums[k] = 0;
  distances.sweep([&](int64_t p, int64_t g, Tile<C, kGroup>& tile) {
    if (pair.same) leave_out_diagonal<C, kGroup>(p, g * kGroup, tile);
    Tile<C, kGroup> slope;
    weigh<kGradient, true, C, kGroup, 2>(space.mixture, tile, slope);
    Vector<C> sum = {};
#pragma GCC unroll 12
    for (int r = 0; r < kGroup; ++r) sum += tile[r][0] + tile[r][1];
    value.add(sum);
    if constexpr (kGradient) keep_slopes(space, p, g, slope);
  });
  if constexpr (kGradient) pull(space, pair);
  return value.total();
}

// Few dimensions: differences, sums and gradients stay in registers. What a point j is pulled by
// is kept as one vector for each dimension, summed up over its lanes at the end.
template <typename C, int D>
struct DirectPanel {
  Vector<C> x[D][2], padding[2], pulls[D][2] = {}, sum = {};
  double* grad;
  int64_t p, count;
  WideSum<C> value;

  HESSREG_HD DirectPanel(const Points<C>& points, int64_t p, double* grad)
      : grad(grad + p * kPanel<C> * D),
        p(p),
        count(smaller(kPanel<C>, points.count_i - p * kPanel<C>)) {
    const C* first = points.i + p * kPanel<C> * D;
    C columns[D + 1][kPanel<C>] = {};
    for (int64_t lane = 0; lane < kPanel<C>; ++lane) {
      if (lane >= count) columns[D][lane] = std::numeric_limits<C>::infinity();
      for (int k = 0; lane < count && k < D; ++k) columns[k][lane] = first[lane * D + k];
    }
    for (int h = 0; h < 2; ++h) {
      padding[h] = load<C, kLanes<C>>(columns[D] + h * kLanes<C>);
      for (int k = 0; k < D; ++k) x[k][h] = load<C, kLanes<C>>(columns[k] + h * kLanes<C>);
    }
  }

  // The pairs with point j; column: what it is pulled by, [D, lanes], or null.
  template <bool kGradient, bool kSame>
  HESSREG_HD void add(const Components<C>& mixture, const C* y, int64_t self, C* column) {
    Vector<C> difference[D][2];
    Tile<C, 1> s, slope;
    for (int h = 0; h < 2; ++h) {
      s[0][h] = padding[h];
      for (int k = 0; k < D; ++k) {
        difference[k][h] = y[k] - x[k][h];
        s[0][h] += difference[k][h] * difference[k][h];
      }
    }
    if constexpr (kSame) leave_out_diagonal<C, 1>(p, self, s);
    weigh<kGradient, true, C, 1, 2>(mixture, s, slope);
    sum += s[0][0] + s[0][1];
    for (int k = 0; kGradient && k < D; ++k) {
      Vector<C> both = {};
      for (int h = 0; h < 2; ++h) {
        const Vector<C> pull = slope[0][h] * difference[k][h];
        pulls[k][h] += pull;
        both += pull;
      }
      if constexpr (!kSame)
        store(column + k * kLanes<C>, load<C, kLanes<C>>(column + k * kLanes<C>) + both);
    }
  }

  // Float32 for few terms only.
  template <bool kGradient>
  HESSREG_HD void flush(C factor) {
    value.add(sum);
    sum = Vector<C>{};
    for (int k = 0; kGradient && k < D; ++k) {
      C row[kPanel<C>];
      for (int h = 0; h < 2; ++h) {
        store(row + h * kLanes<C>, pulls[k][h] * factor);
        pulls[k][h] = Vector<C>{};
      }
      for (int64_t lane = 0; lane < count; ++lane) grad[lane * D + k] += row[lane];
    }
  }
};

template <bool kGradient, bool kSame, int D, typename C>
double energy_direct(EnergySpace<C>& space, const EnergyPair& pair, const Points<C>& points) {
  const auto factor = static_cast<C>(4 * pair.weight);
  const bool both_sides = kGradient && !kSame;
  double value = 0;
  for (int64_t k = 0; both_sides && k < points.count_j * kLanes<C> * D; ++k)
    space.column_sums[k] = 0;
  for (int64_t p = 0; p * kPanel<C> < points.count_i; ++p) {
    DirectPanel<C, D> panel(points, p, pair.grad_i);
    for (int64_t start = 0; start < points.count_j; start += kTerms) {
      const int64_t end = smaller(start + kTerms, points.count_j);
#pragma GCC unroll 2
      for (int64_t j = start; j < end; ++j)
        panel.template add<kGradient, kSame>(space.mixture, points.j + j * D, j,
                                             space.column_sums + j * D * kLanes<C>);
      panel.template flush<kGradient>(factor);
    }
    value += panel.value.total();
  }
  for (int64_t k = 0; both_sides && k < points.count_j * D; ++k) {
    const Vector<C> sums = load<C, kLanes<C>>(space.column_sums + k * kLanes<C>);
    pair.grad_j[k] -= sum_lanes<C>(sums) * factor;
  }
  return value;
}

template <bool kGradient, int D, typename C>
double energy_direct(EnergySpace<C>& space, const EnergyPair& pair, const Points<C>& points) {
  return pair.same ? energy_direct<kGradient, true, D>(space, pair, points)
                   : energy_direct<kGradient, false, D>(space, pair, points);
}

template <bool kGradient, typename C>
double energy_any(EnergySpace<C>& space, const EnergyPair& pair, const Points<C>& points) {
  switch (space.i.d) {
    case 1: return energy_direct<kGradient, 1>(space, pair, points);
    case 2: return energy_direct<kGradient, 2>(space, pair, points);
    case 3: return energy_direct<kGradient, 3>(space, pair, points);
    case kDirect: return energy_direct<kGradient, kDirect>(space, pair, points);
    default: return energy_of_blocks<kGradient>(space, pair, points);
  }
}

// What one pair of spans adds to the value.
template <typename C>
double energy_of_spans(const Energy& problem, EnergySpace<C>& space, const SpanPair& spans,
                       double* gradient) {
  const int64_t d = problem.d, width = gradient_width(d);
  const bool same = spans.i.begin == spans.j.begin;
  const C* z = static_cast<const C*>(problem.z) + spans.batch * problem.count * d;
  const C *first = z + spans.i.begin * d, *second = z + spans.j.begin * d;
  const auto grad = [&](const Range& span, int64_t from) {
    return gradient ? gradient + (spans.batch * problem.count + span.begin + from) * width
                    : nullptr;
  };
  const double weight =
      problem.weight(spans.i.begin, spans.j.begin) / static_cast<double>(space.mixture.count);
  double value = 0;
  for (int64_t i = 0; i < spans.i.size(); i += kBlock) {
    for (int64_t j = same ? i : 0; j < spans.j.size(); j += kBlock) {
      const Points<C> points{first + i * d,  i, smaller(kBlock, spans.i.size() - i),
                             second + j * d, j, smaller(kBlock, spans.j.size() - j)};
      const bool one = same && i == j;
      const EnergyPair pair{same, one, weight, grad(spans.i, i), grad(spans.j, j)};
      value += (one ? 1 : 2) * (gradient ? energy_any<true>(space, pair, points)
                                         : energy_any<false>(space, pair, points));
    }
  }
  return weight * value;
}

template <typename C>
void lay_out(const Energy& problem, EnergySpace<C>& space, const SpanPair& spans) {
  if (problem.d > 0 && problem.d <= kDirect) return;  // these read the points themselves
  const C* z = static_cast<const C*>(problem.z) + spans.batch * problem.count * problem.d;
  const C *first = z + spans.i.begin * problem.d, *second = z + spans.j.begin * problem.d;
  space.centre.find(first, spans.i.size());
  space.all_i.load(first, spans.i.size(), space.centre.data);
  space.all_panels.load(space.all_i.data, space.all_i.stride, spans.i.size());
  if (spans.i.begin != spans.j.begin) space.all_j.load(second, spans.j.size(), space.centre.data);
}

template <typename C>
void energy_pairs(const Energy& problem, const SpanPair* pairs, double* values, double* gradient,
                  void* workspace, int64_t begin, int64_t end) {
  EnergySpace<C> space(problem, workspace);
  for (int64_t task = begin; task < end; ++task) {
    space.mixture.load(problem.mixture, pairs[task].batch);
    lay_out(problem, space, pairs[task]);
    values[task] = energy_of_spans(problem, space, pairs[task], gradient);
  }
}

// ---- dispatch ----------------------------------------------------------------------------------

template <typename Body>
auto dispatch(Element element, Body body) {
  switch (element) {
    case Element::kFloat64: return body(double{});
    case Element::kFloat16: return body(Float16{});
    case Element::kBFloat16: return body(BFloat16{});
    default: return body(float{});
  }
}

template <typename Body>
auto dispatch_wide(Element element, Body body) {
  return element == Element::kFloat64 ? body(double{}) : body(float{});
}

void matrix(const Matrix& problem, void* workspace, int64_t begin, int64_t end) {
  dispatch(problem.element,
           [&](auto zero) { matrix_rows<decltype(zero)>(problem, workspace, begin, end); });
}

void sum(const Sum& problem, void* workspace, int64_t begin, int64_t end) {
  dispatch_wide(problem.element,
                [&](auto zero) { sum_rows<decltype(zero)>(problem, workspace, begin, end); });
}

void energy(const Energy& problem, const SpanPair* pairs, double* values, double* gradient,
            void* workspace, int64_t begin, int64_t end) {
  dispatch_wide(problem.element, [&](auto zero) {
    energy_pairs<decltype(zero)>(problem, pairs, values, gradient, workspace, begin, end);
  });
}

int64_t matrix_workspace(const Matrix& problem) {
  return dispatch(problem.element, [&](auto zero) {
    return MatrixSpace<Compute<decltype(zero)>>(problem, nullptr).arena.used();
  });
}

int64_t sum_workspace(const Sum& problem) {
  return dispatch_wide(problem.element, [&](auto zero) {
    using C = decltype(zero);
    SumSpace<C> space(problem, nullptr);
    for (int64_t l = 0; l < problem.num_factors; ++l) {
      space.factors.template take<C>(kBlock * problem.factors[l].rank);
      space.factors.template take<C>(kBlock * problem.factors[l].rank);
    }
    return space.factors.used();
  });
}

int64_t energy_workspace(const Energy& problem) {
  return dispatch_wide(problem.element, [&](auto zero) {
    return EnergySpace<decltype(zero)>(problem, nullptr).arena.used();
  });
}

}  // namespace

const CpuKernels kernels = {matrix, sum, energy, matrix_workspace, sum_workspace, energy_workspace};

}  // namespace hessreg::gaussian::HESSREG_ISA
