// Compiled once per instruction set, with HESSREG_ISA naming the namespace.
#include "lanczos_step_cpu.h"
#include "spectral_cpu_lanes.h"

namespace hessreg::spectral::HESSREG_ISA {
namespace {

// ---- one matrix, rows along the lanes ----------------------------------------------------------

constexpr int kMaxWidth = 8;  // vectors of columns whose sums are kept in registers

// Rows of whole vectors, filled up with zeros.
template <typename T>
struct Rows {
  T* data;
  int64_t stride;
  HESSREG_HD Rows(int64_t rows, int64_t columns, Arena& arena)
      : data(nullptr), stride(round_up(columns > 0 ? columns : 1, kLanes<T>)) {
    data = arena.take<T>(rows * stride);
  }
  HESSREG_HD T* row(int64_t i) const { return data + i * stride; }
  HESSREG_HD void clear(int64_t rows) const {
    for (int64_t k = 0; k < rows * stride; k += kLanes<T>) store(data + k, Vector<T>{});
  }
};

// sums[m] = x[m]' a[m] over W vectors of columns, for M matrices together. Independent sums hide
// the latency of the multiplications.
template <int W, int M, typename T>
struct Columns {
  static constexpr int kChains = W * M >= 8 ? 1 : W * M >= 4 ? 2 : W * M >= 2 ? 4 : 8;
  Vector<T> sums[M][W];

  HESSREG_HD void multiply(const T* const (&a)[M], int64_t stride, const T* const (&x)[M],
                           int64_t rows) {
    Vector<T> partial[kChains][M][W] = {};
    int64_t j = 0;
    for (; j + kChains <= rows; j += kChains)
#pragma GCC unroll 8
      for (int u = 0; u < kChains; ++u) add(a, stride, x, j + u, partial[u]);
    for (; j < rows; ++j) add(a, stride, x, j, partial[0]);
#pragma GCC unroll 8
    for (int u = kChains / 2; u > 0; u /= 2)
#pragma GCC unroll 8
      for (int v = 0; v < u; ++v) merge(partial[v], partial[u + v]);
    for (int m = 0; m < M; ++m)
      for (int w = 0; w < W; ++w) sums[m][w] = partial[0][m][w];
  }

  template <bool kSubtract>
  HESSREG_HD void store_to(T* const (&y)[M]) const {
    for (int m = 0; m < M; ++m)
      for (int w = 0; w < W; ++w) {
        T* here = y[m] + w * kLanes<T>;
        store(here, kSubtract ? load(here) - sums[m][w] : sums[m][w]);
      }
  }

 private:
  HESSREG_HD static void add(const T* const (&a)[M], int64_t stride, const T* const (&x)[M],
                             int64_t j, Vector<T> (&partial)[M][W]) {
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const T* row = a[m] + j * stride;
#pragma GCC unroll 8
      for (int w = 0; w < W; ++w) partial[m][w] += load(row + w * kLanes<T>) * x[m][j];
    }
  }
  HESSREG_HD static void merge(Vector<T> (&into)[M][W], const Vector<T> (&from)[M][W]) {
    for (int m = 0; m < M; ++m)
      for (int w = 0; w < W; ++w) into[m][w] += from[m][w];
  }
};

// Runs body(integral_constant<width>) for a width of 1 to kMaxWidth.
template <int W>
struct Width {
  static constexpr int value = W;
};
template <typename Body>
HESSREG_HD void with_width(int64_t width, Body body) {
  switch (width) {
    case 1: return body(Width<1>{});
    case 2: return body(Width<2>{});
    case 3: return body(Width<3>{});
    case 4: return body(Width<4>{});
    case 5: return body(Width<5>{});
    case 6: return body(Width<6>{});
    case 7: return body(Width<7>{});
    default: return body(Width<kMaxWidth>{});
  }
}

// y = x' a for one matrix of any width.
template <typename T>
void multiply(const Rows<T>& a, const T* x, int64_t rows, T* y) {
  const int64_t vectors = a.stride / kLanes<T>;
  for (int64_t first = 0; first < vectors; first += kMaxWidth) {
    const int64_t column = first * kLanes<T>;
    with_width(vectors - first < kMaxWidth ? vectors - first : kMaxWidth, [&](auto width) {
      Columns<decltype(width)::value, 1, T> product;
      product.multiply({a.data + column}, a.stride, {x}, rows);
      product.template store_to<false>({y + column});
    });
  }
}

// In all lanes. Several sums side by side hide each other's latency.
template <typename T>
HESSREG_HD Vector<T> dot(const T* x, const T* y, int64_t stride) {
  constexpr int kChains = 4;
  Vector<T> sums[kChains] = {};
  int64_t i = 0;
  for (; i + kChains * kLanes<T> <= stride; i += kChains * kLanes<T>)
#pragma GCC unroll 4
    for (int u = 0; u < kChains; ++u)
      sums[u] += load(x + i + u * kLanes<T>) * load(y + i + u * kLanes<T>);
  for (; i < stride; i += kLanes<T>) sums[0] += load(x + i) * load(y + i);
  return sum_everywhere<T>((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <typename T>
HESSREG_HD void multiply_by(T* x, Vector<T> factor, int64_t stride) {
  for (int64_t i = 0; i < stride; i += kLanes<T>) store(x + i, load(x + i) * factor);
}

// Several maxima side by side hide each other's latency.
template <typename T>
HESSREG_HD Scale<T> scale_of_all(const T* x, int64_t count) {
  constexpr int kChains = 8;
  Signs<T> largest[kChains] = {};
  int64_t i = 0;
  for (; i + kChains * kLanes<T> <= count; i += kChains * kLanes<T>)
#pragma GCC unroll 8
    for (int u = 0; u < kChains; ++u)
      largest[u] = larger<T>(largest[u], load(x + i + u * kLanes<T>));
  for (; i < count; i += kLanes<T>) largest[0] = larger<T>(largest[0], load_some(x + i, count - i));
#pragma GCC unroll 8
  for (int u = 1; u < kChains; ++u) largest[0] = larger<T>(largest[0], (Vector<T>)largest[u]);
  return scale_of(largest_lane<T>((Vector<T>)largest[0]));
}

template <typename T>
HESSREG_HD void load_row(const T* from, int64_t count, int64_t stride, T factor, T* to) {
  for (int64_t i = 0; i < stride; i += kLanes<T>)
    store(to + i, load_some(from + i, count - i) * factor);
}

// The matrices [first, first + count), as far as there are any, to be fetched in so many parts.
template <typename T, typename Problem>
HESSREG_HD Ahead matrices_ahead(const Problem& problem, int64_t first, int64_t count, int64_t end,
                                int64_t parts) {
  const T* a = static_cast<const T*>(problem.a);
  const int64_t size = problem.n * problem.n;
  return {a + smaller(first, end) * size, a + smaller(first + count, end) * size, parts};
}

// Loads and scales a matrix; returns how.
template <typename T>
HESSREG_HD Scale<T> load_matrix(const T* from, int64_t n, const Rows<T>& a) {
  const Scale<T> scale = scale_of_all(from, n * n);
  for (int64_t i = 0; i < n; ++i) load_row(from + i * n, n, a.stride, scale.factor, a.row(i));
  return scale;
}

// Loads a start vector and its inverse norm: e_0 where it is zero.
template <typename T>
HESSREG_HD Vector<T> load_start(const T* from, int64_t n, int64_t stride, T* x) {
  load_row(from, n, stride, scale_of_all(from, n).factor, x);
  const Vector<T> square = dot(x, x, stride);
  if (square[0] == 0) x[0] = 1;
  return square[0] == 0 ? Vector<T>{} + 1 : inverse_square_root<T>(square);
}

template <typename T>
HESSREG_HD void store_row(const T* from, int64_t count, T factor, T* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = from[i] * factor;
}

template <typename T>
HESSREG_HD void fill(T* to, int64_t count, T value) {
  for (int64_t i = 0; i < count; ++i) to[i] = value;
}

// ---- power iteration ---------------------------------------------------------------------------

template <typename T>
struct PowerSpace {
  Rows<T> a;
  T *x, *y;  // v / inverse_norm, and the next
  Scale<T> scale;
  Vector<T> inverse_norm;  // in all lanes
  PowerSpace(int64_t n, Arena& arena)
      : a(n, n, arena), x(arena.take<T>(a.stride)), y(arena.take<T>(a.stride)) {}
};

// Makes y the vector, unless it is zero.
template <typename T>
HESSREG_HD void advance(PowerSpace<T>& space, Vector<T> square) {
  if (square[0] < kSmallestSquare<T>) return;
  T* const old = space.x;
  space.x = space.y;
  space.y = old;
  space.inverse_norm = inverse_square_root<T>(square);
}

// One iteration of M matrices of at most kMaxWidth vectors a row. A x is divided by |x| when it is
// complete, so that the norm is found while the product runs.
template <int W, int M, typename T>
HESSREG_HD void iterate(PowerSpace<T>* const (&spaces)[M], int64_t n) {
  const T *a[M], *x[M];
  for (int m = 0; m < M; ++m) {
    a[m] = spaces[m]->a.data;
    x[m] = spaces[m]->x;
  }
  Columns<W, M, T> product;
  product.multiply(a, W * kLanes<T>, x, n);
  for (int m = 0; m < M; ++m) {
    Vector<T> squares = {};
    const Vector<T> inverse_norm = spaces[m]->inverse_norm;
    T* const to = spaces[m]->y;
    for (int w = 0; w < W; ++w) {
      const Vector<T> y = product.sums[m][w] * inverse_norm;
      squares += y * y;
      store(to + w * kLanes<T>, y);
    }
    advance(*spaces[m], sum_everywhere<T>(squares));
  }
}

template <typename T>
void iterate_wide(PowerSpace<T>& space, int64_t n) {
  multiply(space.a, space.x, n, space.y);
  multiply_by(space.y, space.inverse_norm, space.a.stride);
  advance(space, dot(space.y, space.y, space.a.stride));
}

template <typename T>
void begin_power(const PowerIteration& problem, int64_t b, PowerSpace<T>& space) {
  const int64_t n = problem.n;
  space.scale = load_matrix(static_cast<const T*>(problem.a) + b * n * n, n, space.a);
  space.inverse_norm =
      load_start(static_cast<const T*>(problem.v0) + b * n, n, space.a.stride, space.x);
}

template <typename T>
void finish_power(const PowerIteration& problem, int64_t b, PowerSpace<T>& space) {
  const int64_t n = problem.n, stride = space.a.stride;
  const T norm = scalar_root(dot(space.x, space.x, stride)[0]);
  for (int64_t i = 0; i < stride; i += kLanes<T>) store(space.x + i, load(space.x + i) / norm);
  multiply(space.a, space.x, n, space.y);
  const T value = dot(space.x, space.y, stride)[0];
  Vector<T> squares = {};
  for (int64_t i = 0; i < stride; i += kLanes<T>) {
    const Vector<T> rest = load(space.y + i) - load(space.x + i) * value;
    squares += rest * rest;
  }
  const T residual = scalar_root(sum_pairwise<T>(squares));
  // NaN in the inverse makes a result NaN whatever became of it.
  static_cast<T*>(problem.value)[b] = value * space.scale.inverse;
  static_cast<T*>(problem.residual)[b] = residual * space.scale.inverse;
  const T one = space.scale.factor * space.scale.inverse;
  store_row(space.x, n, one, static_cast<T*>(problem.vector) + b * n);
}

// Matrices of W vectors a row, M at a time; the last stands in for what is missing, so that every
// matrix is worked on by the same instructions.
template <int W, int M, typename T>
void power_narrow(const PowerIteration& problem, PowerSpace<T>* const (&spaces)[M], int64_t begin,
                  int64_t end) {
  for (int64_t first = begin; first < end; first += M) {
    for (int m = 0; m < M; ++m)
      begin_power(problem, first + m < end ? first + m : end - 1, *spaces[m]);
    Ahead next = matrices_ahead<T>(problem, first + M, M, end, problem.num_iterations);
    for (int64_t k = 0; k < problem.num_iterations; ++k) {
      next.fetch_part();
      iterate<W, M, T>(spaces, problem.n);
    }
    for (int m = 0; m < M && first + m < end; ++m) finish_power(problem, first + m, *spaces[m]);
  }
}

// What as many matrices need as are worked on together.
template <typename T>
struct PowerSpaces {
  PowerSpace<T> s0, s1, s2, s3;
  PowerSpaces(int64_t n, Arena& arena) : s0(n, arena), s1(n, arena), s2(n, arena), s3(n, arena) {}
};

template <typename T>
void power_wide(const PowerIteration& problem, PowerSpace<T>& space, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    begin_power(problem, b, space);
    for (int64_t k = 0; k < problem.num_iterations; ++k) iterate_wide(space, problem.n);
    finish_power(problem, b, space);
  }
}

template <typename T>
void power_range(const PowerIteration& problem, void* workspace, int64_t begin, int64_t end) {
  Arena arena(workspace);
  PowerSpaces<T> s(problem.n, arena);
  const int64_t width = s.s0.a.stride / kLanes<T>;
  if (width > kMaxWidth) return power_wide(problem, s.s0, begin, end);
  with_width(width, [&](auto w) {
    constexpr int W = decltype(w)::value;
    if constexpr (W <= kMaxWidth / 4)
      power_narrow<W, 4, T>(problem, {&s.s0, &s.s1, &s.s2, &s.s3}, begin, end);
    else if constexpr (W <= kMaxWidth / 2)
      power_narrow<W, 2, T>(problem, {&s.s0, &s.s1}, begin, end);
    else
      power_narrow<W, 1, T>(problem, {&s.s0}, begin, end);
  });
}

// ---- Lanczos -----------------------------------------------------------------------------------

template <typename T>
struct LanczosSpace {
  Rows<T> a, q, columns;  // the matrix, the basis by vectors, and by their entries
  T *w, *c;
  T *alpha, *beta;
  T threshold;
  Scale<T> scale;
  LanczosSpace(int64_t n, int64_t m, Arena& arena)
      : a(n, n, arena),
        q(m, n, arena),
        columns(n, m, arena),
        w(arena.take<T>(a.stride)),
        c(arena.take<T>(columns.stride)),
        alpha(arena.take<T>(m)),
        beta(arena.take<T>(m)) {}
};

// The spaces of M matrices that are worked on together, so that each hides the other's latency.
template <int M, typename T>
struct LanczosGroup {
  LanczosSpace<T>* spaces[M];
  int64_t n, m;

  // to(space) = x(space)' rows(space), or what is there less that, in columns [0, columns).
  template <bool kSubtract, typename Rows, typename X, typename To>
  HESSREG_HD void multiply(int64_t count, int64_t columns, Rows rows, X x, To to) const {
    const int64_t stride = rows(*spaces[0]).stride, vectors = (columns - 1) / kLanes<T> + 1;
    for (int64_t first = 0; first < vectors; first += kMaxWidth) {
      const T *from[M], *factors[M];
      T* into[M];
      for (int i = 0; i < M; ++i) {
        from[i] = rows(*spaces[i]).data + first * kLanes<T>;
        factors[i] = x(*spaces[i]);
        into[i] = to(*spaces[i]) + first * kLanes<T>;
      }
      const int64_t width = vectors - first < kMaxWidth ? vectors - first : kMaxWidth;
      with_width(width, [&](auto w) {
        Columns<decltype(w)::value, M, T> product;
        product.multiply(from, stride, factors, count);
        product.template store_to<kSubtract>(into);
      });
    }
  }

  HESSREG_HD void apply_matrix(int64_t k) const {
    multiply<false>(
        n, n, [](const auto& s) { return s.a; }, [=](const auto& s) { return s.q.row(k); },
        [](const auto& s) { return s.w; });
  }

  // Takes from w = A q_k what it has of q_k and of the vector before: of a symmetric matrix, all
  // that it has of the basis but for rounding errors.
  HESSREG_HD void recur(int64_t k) const {
    for (LanczosSpace<T>* s : spaces) {
      const T *own = s->q.row(k), *before = s->q.row(k > 0 ? k - 1 : 0);
      const T alpha = dot(own, s->w, s->q.stride)[0], beta = k > 0 ? s->beta[k - 1] : T(0);
      for (int64_t i = 0; i < s->q.stride; i += kLanes<T>)
        store(s->w + i, load(s->w + i) - load(own + i) * alpha - load(before + i) * beta);
      s->alpha[k] = alpha;
    }
  }

  // Takes from w what it has of the first `count` basis vectors; c: how much.
  HESSREG_HD void orthogonalise(int64_t count) const {
    multiply<false>(
        n, count, [](const auto& s) { return s.columns; }, [](const auto& s) { return s.w; },
        [](const auto& s) { return s.c; });
    multiply<true>(
        count, n, [](const auto& s) { return s.q; }, [](const auto& s) { return s.c; },
        [](const auto& s) { return s.w; });
  }
};

// Basis vector k from w.
template <typename T>
HESSREG_HD void append(const LanczosSpace<T>& s, int64_t n, int64_t k, Vector<T> factor) {
  T* q = s.q.row(k);
  for (int64_t i = 0; i < s.q.stride; i += kLanes<T>) store(q + i, load(s.w + i) * factor);
  for (int64_t i = 0; i < n; ++i) s.columns.row(i)[k] = q[i];
}

// The unit vector of which the first `count` basis vectors hold least, orthogonal to them.
template <typename T>
void append_new(LanczosSpace<T>& s, int64_t n, int64_t m, int64_t count) {
  T least = 2;
  int64_t which = 0;
  for (int64_t i = 0; i < n; ++i) {
    const T* row = s.columns.row(i);
    T held = 0;
    for (int64_t k = 0; k < count; ++k) held += row[k] * row[k];
    which = held < least ? i : which;
    least = held < least ? held : least;
  }
  for (int64_t i = 0; i < s.a.stride; ++i) s.w[i] = i == which;
  const LanczosGroup<1, T> alone{{&s}, n, m};
  for (int pass = 0; pass < 2; ++pass) alone.orthogonalise(count);
  append(s, n, count, inverse_square_root<T>(dot(s.w, s.w, s.a.stride)));
}

// The next basis vector from w, and its norm.
template <typename T>
HESSREG_HD T extend(LanczosSpace<T>& s, int64_t n, int64_t m, int64_t count) {
  const Vector<T> square = dot(s.w, s.w, s.a.stride);
  const T norm = count == n ? T(0) : scalar_root(square[0]);
  const bool breaks = norm <= s.threshold;
  if (count < m)
    breaks ? append_new(s, n, m, count) : append(s, n, count, inverse_square_root<T>(square));
  return breaks ? T(0) : norm;
}

template <int M, typename T>
void lanczos_steps(const LanczosGroup<M, T>& group, Ahead next) {
  for (int64_t k = 0; k < group.m; ++k) {
    next.fetch_part();
    group.apply_matrix(k);
    group.recur(k);
    group.orthogonalise(k + 1);
    for (LanczosSpace<T>* s : group.spaces) s->beta[k] = extend(*s, group.n, group.m, k + 1);
  }
}

template <typename T>
void begin_lanczos(const Lanczos& problem, int64_t b, LanczosSpace<T>& s) {
  const int64_t n = problem.n;
  s.scale = load_matrix(static_cast<const T*>(problem.a) + b * n * n, n, s.a);
  s.threshold = kBreakdown<T> * scalar_root(dot(s.a.data, s.a.data, n * s.a.stride)[0]);
  s.columns.clear(n);
  append(s, n, 0, load_start(static_cast<const T*>(problem.v0) + b * n, n, s.a.stride, s.w));
}

template <typename T>
void finish_lanczos(const Lanczos& problem, int64_t b, const LanczosSpace<T>& s) {
  const int64_t n = problem.n, m = problem.m;
  const T inverse = s.scale.inverse, one = s.scale.factor * inverse;  // or NaN
  store_row(s.alpha, m, inverse, static_cast<T*>(problem.alpha) + b * m);
  store_row(s.beta, m, inverse, static_cast<T*>(problem.beta) + b * m);
  for (int64_t i = 0; i < n; ++i)
    store_row(s.columns.row(i), m, one, static_cast<T*>(problem.q) + (b * n + i) * m);
}

template <int M, typename T>
void lanczos_groups(const Lanczos& problem, const LanczosGroup<M, T>& group, int64_t begin,
                    int64_t end) {
  for (int64_t first = begin; first < end; first += M) {
    for (int i = 0; i < M; ++i)
      begin_lanczos(problem, first + i < end ? first + i : end - 1, *group.spaces[i]);
    lanczos_steps(group, matrices_ahead<T>(problem, first + M, M, end, problem.m));
    for (int i = 0; i < M && first + i < end; ++i)
      finish_lanczos(problem, first + i, *group.spaces[i]);
  }
}

// What as many matrices need as are worked on together.
template <typename T>
struct LanczosSpaces {
  LanczosSpace<T> s0, s1, s2, s3;
  LanczosSpaces(const Lanczos& problem, Arena& arena)
      : s0(problem.n, problem.m, arena),
        s1(problem.n, problem.m, arena),
        s2(problem.n, problem.m, arena),
        s3(problem.n, problem.m, arena) {}
};

template <typename T>
void lanczos_range(const Lanczos& problem, void* workspace, int64_t begin, int64_t end) {
  Arena arena(workspace);
  const int64_t n = problem.n, m = problem.m;
  if (m == 0) return;
  LanczosSpaces<T> s(problem, arena);
  const int64_t width = s.s0.a.stride / kLanes<T>;
  if (width <= kMaxWidth / 4)
    lanczos_groups<4, T>(problem, {{&s.s0, &s.s1, &s.s2, &s.s3}, n, m}, begin, end);
  else if (width <= kMaxWidth / 2)
    lanczos_groups<2, T>(problem, {{&s.s0, &s.s1}, n, m}, begin, end);
  else
    lanczos_groups<1, T>(problem, {{&s.s0}, n, m}, begin, end);
}

// ---- the kernels -------------------------------------------------------------------------------

template <typename T>
void pairs_range(const SymmetricEigh& problem, void* workspace, int64_t begin, int64_t end) {
  PairsSpace<T> space(problem.n, workspace);
  Triangle<T> triangle(problem.n, space.arena);
  for (int64_t b = begin; b < end; b += kLanes<T>)
    pairs_of_group(problem, space, triangle, {b, end});
}

template <typename T>
void values_range(const SymmetricEigh& problem, void* workspace, int64_t begin, int64_t end) {
  ValuesSpace<T> space(problem.n, workspace);
  for (int64_t b = begin; b < end; b += kGroups * kLanes<T>)
    values_of_groups(problem, space, b, end);
}

template <typename T>
void tridiagonal_range(const TridiagonalEigh& problem, void* workspace, int64_t begin,
                       int64_t end) {
  PairsSpace<T> space(problem.m, workspace);
  for (int64_t b = begin; b < end; b += kLanes<T>) pairs_of_group(problem, space, {b, end});
}

template <typename Body>
HESSREG_HD auto dispatch(Element element, Body body) {
  return element == Element::kFloat64 ? body(double{}) : body(float{});
}

void power_iteration(const PowerIteration& problem, void* workspace, int64_t begin, int64_t end) {
  dispatch(problem.element,
           [&](auto zero) { power_range<decltype(zero)>(problem, workspace, begin, end); });
}

void lanczos(const Lanczos& problem, void* workspace, int64_t begin, int64_t end) {
  dispatch(problem.element,
           [&](auto zero) { lanczos_range<decltype(zero)>(problem, workspace, begin, end); });
}

void tridiagonal_eigh(const TridiagonalEigh& problem, void* workspace, int64_t begin, int64_t end) {
  dispatch(problem.element,
           [&](auto zero) { tridiagonal_range<decltype(zero)>(problem, workspace, begin, end); });
}

void symmetric_eigh(const SymmetricEigh& problem, void* workspace, int64_t begin, int64_t end) {
  dispatch(problem.element, [&](auto zero) {
    using T = decltype(zero);
    problem.vectors ? pairs_range<T>(problem, workspace, begin, end)
                    : values_range<T>(problem, workspace, begin, end);
  });
}

int64_t power_iteration_workspace(const PowerIteration& problem) {
  return dispatch(problem.element, [&](auto zero) {
    Arena arena(nullptr);
    PowerSpaces<decltype(zero)> spaces(problem.n, arena);
    return arena.used();
  });
}

int64_t lanczos_workspace(const Lanczos& problem) {
  return dispatch(problem.element, [&](auto zero) {
    Arena arena(nullptr);
    LanczosSpaces<decltype(zero)> spaces(problem, arena);
    return arena.used();
  });
}

int64_t tridiagonal_eigh_workspace(const TridiagonalEigh& problem) {
  return dispatch(problem.element, [&](auto zero) {
    return PairsSpace<decltype(zero)>(problem.m, nullptr).arena.used();
  });
}

int64_t symmetric_eigh_workspace(const SymmetricEigh& problem) {
  return dispatch(problem.element, [&](auto zero) {
    using T = decltype(zero);
    if (!problem.vectors) return ValuesSpace<T>(problem.n, nullptr).arena.used();
    PairsSpace<T> space(problem.n, nullptr);
    Triangle<T> triangle(problem.n, space.arena);
    return space.arena.used();
  });
}

}  // namespace

const CpuKernels kernels = {power_iteration,
                            lanczos,
                            tridiagonal_eigh,
                            symmetric_eigh,
                            power_iteration_workspace,
                            lanczos_workspace,
                            tridiagonal_eigh_workspace,
                            symmetric_eigh_workspace,
                            lanczos_dots,
                            lanczos_subtract,
                            lanczos_scale};

}  // namespace hessreg::spectral::HESSREG_ISA
