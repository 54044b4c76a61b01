#pragma once
// Eigenpairs of many matrices side by side: a vector holds the same entry of kLanes matrices, so
// that nothing is ever summed across lanes and every lane does the same work. Included by
// spectral_cpu.cpp only.
#include "spectral_cpu_common.h"

namespace hessreg::spectral::HESSREG_ISA {
namespace {

constexpr int kRows = kVectorBytes == 64 ? 4 : 2;  // rows worked on at a time, by the registers
constexpr int kGroups = 2;    // vectors of matrices whose sweeps hide each other's latency
constexpr int kPolished = 4;  // eigenvalues polished at a time, for the same reason
constexpr int kMaxSweeps = 60;

// The matrices [first, end) of a batch, as many as there are lanes; the last stands in for more.
struct Members {
  int64_t first, end;
  HESSREG_HD int64_t of(int lane) const { return first + lane < end ? first + lane : end - 1; }
  HESSREG_HD int count(int lanes) const {
    return end - first < lanes ? static_cast<int>(end - first) : lanes;
  }
};

// Powers of two for the lanes; lanes with what is not finite are worked on as zeros.
template <typename T>
struct LaneScale {
  Vector<T> factor, inverse;
  HESSREG_HD explicit LaneScale(Signs<T> largest) {
    const Vector<T> magnitudes = (Vector<T>)largest;
    for (int lane = 0; lane < kLanes<T>; ++lane) {
      const Scale<T> scale = scale_of(magnitudes[lane]);
      factor[lane] = scale.factor;
      inverse[lane] = scale.inverse;
    }
  }
  HESSREG_HD Vector<T> apply(Vector<T> x) const {
    return factor == factor ? x * factor : Vector<T>{};
  }
};

// ---- tridiagonal matrices ----------------------------------------------------------------------

// The part of T - x = L D L' above or below a row, for kPolished values x: what it takes from the
// row's pivot, and |z|^2 of what solves the part for z_row = 1, with that one counted in.
template <typename T>
struct Part {
  Vector<T> taken[kPolished], square[kPolished];
  HESSREG_HD Part() {
    for (int u = 0; u < kPolished; ++u) {
      taken[u] = Vector<T>{};
      square[u] = Vector<T>{} + 1;
    }
  }
  // Goes on by the row with these differences d - x, coupled by e to the next.
  HESSREG_HD void pass(const Vector<T> (&difference)[kPolished], Vector<T> e) {
    constexpr T kSmallestPivot = kEpsilon<T> * kEpsilon<T>;
    for (int u = 0; u < kPolished; ++u) {
      Vector<T> pivot = difference[u] - taken[u];
      pivot = magnitude<T>(pivot) < kSmallestPivot ? Vector<T>{} - kSmallestPivot : pivot;
      const Vector<T> ratio = e / pivot;
      taken[u] = e * ratio;
      square[u] = 1 + ratio * ratio * square[u];
    }
  }
};

template <typename T>
struct Tridiagonal {
  Vector<T>*d, *e;    // [n]: diagonal, off-diagonal and a zero; become the eigenvalues
  Vector<T>*d0, *e0;  // [n]: as they were
  Part<T>* above;     // [n]
  int64_t n;

  HESSREG_HD Tridiagonal(int64_t n, Arena& arena)
      : d(arena.take<Vector<T>>(n + 1)),
        e(arena.take<Vector<T>>(n + 1)),
        d0(arena.take<Vector<T>>(n + 1)),
        e0(arena.take<Vector<T>>(n + 1)),
        above(arena.take<Part<T>>(n)),
        n(n) {}
  HESSREG_HD void keep() {
    if (n > 0) e[n - 1] = Vector<T>{};
    for (int64_t i = 0; i < n; ++i) {
      d0[i] = d[i];
      e0[i] = e[i];
    }
  }
};

// The rotations of a sweep: of columns i and i + 1.
template <typename T>
struct Rotations {
  Vector<T>*c, *s;  // [n]
  HESSREG_HD Rotations(int64_t n, Arena& arena)
      : c(arena.take<Vector<T>>(n + 1)), s(arena.take<Vector<T>>(n + 1)) {}
};

// Where the off-diagonal at l is more than rounding error of its neighbours or of the matrix.
template <typename T>
HESSREG_HD Signs<T> is_coupled(const Tridiagonal<T>& t, int64_t l) {
  constexpr T kSquare = kEpsilon<T> * kEpsilon<T>;
  const Vector<T> neighbours = magnitude<T>(t.d[l] * t.d[l + 1]);
  return t.e[l] * t.e[l] > neighbours * kSquare + kSquare / 4096;
}

// The eigenvalue of the leading two rows that is nearer to the first (Wilkinson's shift).
template <typename T>
HESSREG_HD Vector<T> shift_of(const Tridiagonal<T>& t, int64_t l, Signs<T> active) {
  const Vector<T> e = active ? t.e[l] : Vector<T>{} + 1;
  const Vector<T> g = (t.d[l + 1] - t.d[l]) / (e + e);
  const Vector<T> r = square_root<T>(g * g + 1);
  return t.d[l] - e / (g < 0 ? g - r : g + r);
}

// One implicit QL step on rows [l, n) of the active lanes, in the form of Pal, Walker and Kahan
// with the shift taken where it is used, which passes through zero off-diagonals unharmed.
template <typename T>
struct Sweep {
  Vector<T> sigma, p, gamma, c, s;
  Signs<T> active;

  HESSREG_HD void begin(const Tridiagonal<T>& t, int64_t l) {
    active = is_coupled(t, l);
    sigma = shift_of(t, l, active);
    p = gamma = t.d[t.n - 1] - sigma;
    c = Vector<T>{} + 1;
    s = Vector<T>{};
  }
  template <bool kKeep>
  HESSREG_HD void step(const Tridiagonal<T>& t, int64_t i, const Rotations<T>* rotations) {
    const Vector<T> e = t.e[i], alpha = t.d[i], one = Vector<T>{} + 1, zero = {};
    const Vector<T> square = p * p + e * e, next = p * (alpha - sigma) - e * (c * e);
    const Signs<T> turns = square >= kSmallestSquare<T>;
    const Vector<T> inverse = inverse_square_root<T>(square);  // discarded where the square is 0
    t.e[i + 1] = active ? s * (turns ? square * inverse : zero) : t.e[i + 1];
    c = turns ? p * inverse : one;
    s = turns ? e * inverse : zero;
    p = turns ? next * inverse : alpha - sigma;
    const Vector<T> old = gamma;
    gamma = c * p;
    t.d[i + 1] = active ? old + (alpha - gamma) : t.d[i + 1];
    if constexpr (kKeep) keep(rotations, i);
  }
  HESSREG_HD void finish(const Tridiagonal<T>& t, int64_t l) {
    t.e[l] = active ? s * p : t.e[l];
    t.d[l] = active ? sigma + gamma : t.d[l];
  }

 private:
  // Of length one to the last digit: vectors are multiplied by very many of these.
  HESSREG_HD void keep(const Rotations<T>* rotations, int64_t i) {
    const Vector<T> half = (1 - c * c - s * s) * T(0.5), one = Vector<T>{} + 1, zero = {};
    rotations->c[i] = active ? c + c * half : one;
    rotations->s[i] = active ? s + s * half : zero;
  }
};

template <int G, bool kKeep, typename T>
bool sweep(const Tridiagonal<T>* t, int64_t l, const Rotations<T>* rotations) {
  Sweep<T> sweeps[G];
  Signs<T> active = {};
  for (int g = 0; g < G; ++g) {
    sweeps[g].begin(t[g], l);
    active |= sweeps[g].active;
  }
  if (!any_negative<T>(active)) return false;
  for (int64_t i = t[0].n - 2; i >= l; --i)
    for (int g = 0; g < G; ++g) sweeps[g].template step<kKeep>(t[g], i, rotations);
  for (int g = 0; g < G; ++g) sweeps[g].finish(t[g], l);
  return true;
}

// Eigenvalues of G vectors of matrices, in no order.
template <int G, typename T>
void eigenvalues(const Tridiagonal<T>* t) {
  for (int64_t l = 0; l + 1 < t[0].n; ++l)
    for (int k = 0; k < kMaxSweeps && sweep<G, false, T>(t, l, nullptr); ++k) {
    }
}

// Replaces values x by the Rayleigh quotients of their vectors. These come from the two
// factorisations that meet at the row where least is left of its pivot; no sum of rounding errors
// enters, while in the sweeps these have added up. A step beyond what they may be is not taken: it
// is one between two close eigenvalues.
template <typename T>
void polish_some(const Tridiagonal<T>& t, Vector<T>* x) {
  constexpr T kMore = T(0x1p100);
  Vector<T> difference[kPolished], least[kPolished], step[kPolished] = {};
  for (Vector<T>& some : least) some = Vector<T>{} + kMore;
  const auto subtract = [&](int64_t i) {
    for (int u = 0; u < kPolished; ++u) difference[u] = t.d0[i] - x[u];
  };
  Part<T> above, below;
  for (int64_t i = 0; i < t.n; ++i) {
    t.above[i] = above;
    subtract(i);
    above.pass(difference, t.e0[i]);
  }
  for (int64_t i = t.n - 1; i >= 0; --i) {
    subtract(i);
    for (int u = 0; u < kPolished; ++u) {
      const Vector<T> left = difference[u] - t.above[i].taken[u] - below.taken[u];
      const Vector<T> square = t.above[i].square[u] + below.square[u] - 1;
      const Signs<T> is_least = magnitude<T>(left) < least[u];
      least[u] = is_least ? magnitude<T>(left) : least[u];
      step[u] = is_least ? left / square : step[u];
    }
    if (i > 0) below.pass(difference, t.e0[i - 1]);
  }
  for (int u = 0; u < kPolished; ++u) {
    const Vector<T> limit = 256 * kEpsilon<T> * (magnitude<T>(x[u]) + 1);
    x[u] = magnitude<T>(step[u]) <= limit ? x[u] + step[u] : x[u];
  }
}

template <typename T>
void polish(const Tridiagonal<T>& t) {
  for (int64_t first = 0; first < t.n; first += kPolished) {
    Vector<T> x[kPolished];
    for (int u = 0; u < kPolished; ++u) x[u] = t.d[first + u < t.n ? first + u : t.n - 1];
    polish_some(t, x);
    for (int u = 0; u < kPolished && first + u < t.n; ++u) t.d[first + u] = x[u];
  }
}

// Insertion with minimum and maximum, which needs no decision.
template <typename T>
void sort(Vector<T>* values, int64_t n) {
  for (int64_t i = 1; i < n; ++i) {
    Vector<T> carried = values[i];
    for (int64_t j = 0; j < i; ++j) {
      const Vector<T> here = values[j];
      const Signs<T> is_less = carried < here;
      values[j] = is_less ? carried : here;
      carried = is_less ? here : carried;
    }
    values[i] = carried;
  }
}

// ---- eigenvectors ------------------------------------------------------------------------------

// Row-major square matrices: [n, stride] vectors.
template <typename T>
struct Square {
  Vector<T>* data;
  int64_t n, stride;
  HESSREG_HD Square(int64_t n, Arena& arena)
      : data(arena.take<Vector<T>>(n * (n | 1))), n(n), stride(n | 1) {}
  HESSREG_HD Vector<T>* row(int64_t i) const { return data + i * stride; }
  HESSREG_HD void set_identity() const {
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < n; ++j) row(i)[j] = Vector<T>{} + T(i == j);
  }
};

template <int R, typename T>
HESSREG_HD void rotate_rows(const Rotations<T>& rotations, int64_t l, const Square<T>& z,
                            int64_t first) {
  Vector<T>*rows[R], carried[R];
  for (int r = 0; r < R; ++r) {
    rows[r] = z.row(first + r);
    carried[r] = rows[r][z.n - 1];
  }
  for (int64_t i = z.n - 2; i >= l; --i) {
    const Vector<T> c = rotations.c[i], s = rotations.s[i];
    for (int r = 0; r < R; ++r) {
      const Vector<T> here = rows[r][i];
      rows[r][i + 1] = s * here + c * carried[r];
      carried[r] = c * here - s * carried[r];
    }
  }
  for (int r = 0; r < R; ++r) rows[r][l] = carried[r];
}

// Eigenvalues, and z times the eigenvectors.
template <typename T>
void eigenpairs(const Tridiagonal<T>& t, const Rotations<T>& rotations, const Square<T>& z) {
  for (int64_t l = 0; l + 1 < t.n; ++l)
    for (int k = 0; k < kMaxSweeps && sweep<1, true, T>(&t, l, &rotations); ++k) {
      int64_t i = 0;
      for (; i + kRows <= z.n; i += kRows) rotate_rows<kRows>(rotations, l, z, i);
      for (; i < z.n; ++i) rotate_rows<1>(rotations, l, z, i);
    }
}

// ---- dense matrices ----------------------------------------------------------------------------

// The lower triangles, row after row, and what Householder's method keeps of each step.
template <typename T>
struct Triangle {
  Vector<T>* data;
  Vector<T>*v, *w, *next, *product;  // [n]
  Vector<T>* beta;                   // [n]
  int64_t n;
  HESSREG_HD Triangle(int64_t n, Arena& arena)
      : data(arena.take<Vector<T>>(n * (n + 1) / 2)),
        v(arena.take<Vector<T>>(n)),
        w(arena.take<Vector<T>>(n)),
        next(arena.take<Vector<T>>(n)),
        product(arena.take<Vector<T>>(n)),
        beta(arena.take<Vector<T>>(n)),
        n(n) {}
  HESSREG_HD Vector<T>* row(int64_t i) const { return data + i * (i + 1) / 2; }
};

// Row i of all members, columns [j, j + kLanes).
template <typename T>
HESSREG_HD void load_lanes(const SymmetricEigh& problem, const Members& members, int64_t i,
                           int64_t j, Vector<T> (&rows)[kLanes<T>]) {
  const int64_t n = problem.n;
  for (int lane = 0; lane < kLanes<T>; ++lane) {
    const T* from = static_cast<const T*>(problem.a) + (members.of(lane) * n + i) * n + j;
    if (j + kLanes<T> <= n) {
      rows[lane] = load(from);
    } else {
      rows[lane] = Vector<T>{};
      for (int k = 0; k < n - j; ++k) rows[lane][k] = from[k];
    }
  }
  transpose<T>(rows);
}

// Loads and scales the triangles of the members; returns how.
template <typename T>
LaneScale<T> load_triangles(const SymmetricEigh& problem, const Members& members,
                            const Triangle<T>& a) {
  Signs<T> largest = {};
  for (int64_t i = 0; i < a.n; ++i)
    for (int64_t j = 0; j <= i; j += kLanes<T>) {
      Vector<T> rows[kLanes<T>];
      load_lanes<T>(problem, members, i, j, rows);
      for (int k = 0; k < kLanes<T> && j + k <= i; ++k) {
        a.row(i)[j + k] = rows[k];
        largest = larger<T>(largest, rows[k]);
      }
    }
  const LaneScale<T> scale(largest);
  for (int64_t k = 0; k < a.n * (a.n + 1) / 2; ++k) a.data[k] = scale.apply(a.data[k]);
  return scale;
}

// Applies the pending update to column k.
template <typename T>
HESSREG_HD void update_column(const Triangle<T>& a, int64_t k) {
  for (int64_t i = k; i < a.n; ++i) a.row(i)[k] -= a.v[i] * a.w[k] + a.w[i] * a.v[k];
}

// The reflection that makes column k zero below its first entry; returns that entry.
template <typename T>
HESSREG_HD Vector<T> reflect_column(const Triangle<T>& a, int64_t k) {
  Vector<T> rest = {};
  for (int64_t i = k + 2; i < a.n; ++i) {
    a.next[i] = a.row(i)[k];
    rest += a.next[i] * a.next[i];
  }
  const Vector<T> x = a.row(k + 1)[k];
  const Signs<T> reflects = rest >= kSmallestSquare<T>;
  const Vector<T> norm = square_root<T>(x * x + rest);
  const Vector<T> v = x < 0 ? x - norm : x + norm, zero = {};
  a.beta[k] = reflects ? 2 / (reflects ? v * v + rest : zero + 1) : zero;
  a.next[k + 1] = a.row(k + 1)[k] = reflects ? v : zero;
  return reflects ? (x < 0 ? norm : -norm) : x;
}

// Of R rows from i on: applies the pending update left of column i, and multiplies what it leaves
// by the next vector, on both sides of the diagonal.
template <int R, typename T>
HESSREG_HD void update_and_multiply(const Triangle<T>& a, int64_t k, int64_t i) {
  Vector<T>*rows[R], v[R], w[R], next[R], product[R];
  for (int r = 0; r < R; ++r) {
    rows[r] = a.row(i + r);
    v[r] = a.v[i + r];
    w[r] = a.w[i + r];
    next[r] = a.next[i + r];
    product[r] = Vector<T>{};
  }
  for (int64_t j = k + 1; j < i; ++j) {
    const Vector<T> vj = a.v[j], wj = a.w[j], nextj = a.next[j];
    Vector<T> sum = a.product[j];
    for (int r = 0; r < R; ++r) {
      const Vector<T> x = rows[r][j] - v[r] * wj - w[r] * vj;
      rows[r][j] = x;
      product[r] += x * nextj;
      sum += x * next[r];
    }
    a.product[j] = sum;
  }
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c <= r; ++c) {
      const Vector<T> x = rows[r][i + c] - v[r] * w[c] - w[r] * v[c];
      rows[r][i + c] = x;
      product[r] += x * next[c];
      if (c < r) product[c] += x * next[r];
    }
  }
  for (int r = 0; r < R; ++r) a.product[i + r] = product[r];
}

// The next pending update: A - v w' - w v' with w = beta A v - (beta^2 v'A v / 2) v.
template <typename T>
HESSREG_HD void set_pending(Triangle<T>& a, int64_t k) {
  Vector<T> inner = {};
  for (int64_t i = k + 1; i < a.n; ++i) inner += a.next[i] * a.product[i];
  inner = inner * a.beta[k] * (a.beta[k] / 2);  // the square of beta may be too large
  for (int64_t i = k + 1; i < a.n; ++i) {
    a.v[i] = a.next[i];
    a.w[i] = a.beta[k] * a.product[i] - inner * a.next[i];
  }
}

// Householder's tridiagonalisation. The update of one step and the product of the next go over the
// triangle together. The vectors stay in its columns.
template <typename T>
void tridiagonalise(Triangle<T>& a, const Tridiagonal<T>& t) {
  for (int64_t i = 0; i < a.n; ++i) a.v[i] = a.w[i] = Vector<T>{};
  for (int64_t k = 0; k < a.n; ++k) {
    update_column(a, k);
    t.d[k] = a.row(k)[k];
    if (k + 2 == a.n) t.e[k] = a.row(k + 1)[k];
    if (k + 2 >= a.n) continue;
    t.e[k] = reflect_column(a, k);
    int64_t i = k + 1;
    for (; i + kRows <= a.n; i += kRows) update_and_multiply<kRows>(a, k, i);
    for (; i < a.n; ++i) update_and_multiply<1>(a, k, i);
    set_pending(a, k);
  }
}

// Columns [j, j + R) of z become those of (I - beta v v') z.
template <int R, typename T>
HESSREG_HD void reflect_columns(const Triangle<T>& a, int64_t k, const Square<T>& z, int64_t j) {
  Vector<T> inner[R] = {};
  for (int64_t i = k + 1; i < a.n; ++i) {
    const Vector<T> v = a.v[i];
    for (int r = 0; r < R; ++r) inner[r] += v * z.row(i)[j + r];
  }
  for (int r = 0; r < R; ++r) inner[r] *= a.beta[k];
  for (int64_t i = k + 1; i < a.n; ++i) {
    const Vector<T> v = a.v[i];
    for (int r = 0; r < R; ++r) z.row(i)[j + r] -= v * inner[r];
  }
}

// z: the product of all reflections.
template <typename T>
void form_reflections(const Triangle<T>& a, const Square<T>& z) {
  z.set_identity();
  for (int64_t k = a.n - 3; k >= 0; --k) {
    for (int64_t i = k + 1; i < a.n; ++i) a.v[i] = a.row(i)[k];
    int64_t j = k + 1;
    for (; j + kRows <= a.n; j += kRows) reflect_columns<kRows>(a, k, z, j);
    for (; j < a.n; ++j) reflect_columns<1>(a, k, z, j);
  }
}

// ---- results -----------------------------------------------------------------------------------

template <typename T>
void store_values(const Vector<T>* values, int64_t n, Vector<T> inverse, const Members& members,
                  T* out) {
  for (int64_t i = 0; i < n; ++i) {
    const Vector<T> value = values[i] * inverse;
    for (int lane = 0; lane < members.count(kLanes<T>); ++lane)
      out[members.of(lane) * n + i] = value[lane];
  }
}

// places[i]: where value i of a lane comes in ascending order.
template <typename T>
void rank(const Vector<T>* values, int lane, int64_t n, int64_t* places) {
  for (int64_t i = 0; i < n; ++i) {
    places[i] = 0;
    for (int64_t j = 0; j < i; ++j) values[j][lane] <= values[i][lane] ? ++places[i] : ++places[j];
  }
}

template <typename T>
void store_pairs(const Vector<T>* values, const Square<T>& z, const LaneScale<T>& scale,
                 const Members& members, int64_t* places, T* out_values, T* out_vectors) {
  const int64_t n = z.n;
  for (int lane = 0; lane < members.count(kLanes<T>); ++lane) {
    const int64_t member = members.of(lane);
    const T inverse = scale.inverse[lane], nothing = inverse == inverse ? T(0) : inverse;
    rank<T>(values, lane, n, places);
    for (int64_t i = 0; i < n; ++i) out_values[member * n + places[i]] = values[i][lane] * inverse;
    for (int64_t i = 0; i < n; ++i) {
      const T* row = reinterpret_cast<const T*>(z.row(i)) + lane;
      T* out = out_vectors + (member * n + i) * n;
      for (int64_t j = 0; j < n; ++j) out[places[j]] = row[j * kLanes<T>] + nothing;
    }
  }
}

// ---- the three problems ------------------------------------------------------------------------

template <typename T>
struct ValuesSpace {
  Arena arena;
  Triangle<T> triangle;
  Tridiagonal<T> t[kGroups];
  ValuesSpace(int64_t n, void* memory)
      : arena(memory), triangle(n, arena), t{{n, arena}, {n, arena}} {}
};

template <typename T>
void values_of_groups(const SymmetricEigh& problem, ValuesSpace<T>& space, int64_t first,
                      int64_t end) {
  const Members members[kGroups] = {{first, end}, {first + kLanes<T>, end}};
  Vector<T> inverses[kGroups];
  for (int g = 0; g < kGroups; ++g) {
    if (members[g].first < end) {
      inverses[g] = load_triangles<T>(problem, members[g], space.triangle).inverse;
      tridiagonalise(space.triangle, space.t[g]);
    } else {
      for (int64_t i = 0; i < problem.n; ++i) space.t[g].d[i] = space.t[g].e[i] = Vector<T>{};
    }
    space.t[g].keep();
  }
  eigenvalues<kGroups>(space.t);
  for (int g = 0; g < kGroups && members[g].first < end; ++g) {
    polish(space.t[g]);
    sort<T>(space.t[g].d, problem.n);
    store_values<T>(space.t[g].d, problem.n, inverses[g], members[g],
                    static_cast<T*>(problem.values));
  }
}

template <typename T>
struct PairsSpace {
  Arena arena;
  Tridiagonal<T> t;
  Rotations<T> rotations;
  Square<T> z;
  int64_t* places;
  PairsSpace(int64_t n, void* memory)
      : arena(memory),
        t(n, arena),
        rotations(n, arena),
        z(n, arena),
        places(arena.take<int64_t>(n)) {}
};

template <typename T>
void pairs_of_group(const SymmetricEigh& problem, PairsSpace<T>& space, Triangle<T>& triangle,
                    const Members& members) {
  const LaneScale<T> scale = load_triangles<T>(problem, members, triangle);
  tridiagonalise(triangle, space.t);
  space.t.keep();
  form_reflections(triangle, space.z);
  eigenpairs(space.t, space.rotations, space.z);
  polish(space.t);
  store_pairs<T>(space.t.d, space.z, scale, members, space.places, static_cast<T*>(problem.values),
                 static_cast<T*>(problem.vectors));
}

template <typename T>
LaneScale<T> load_tridiagonal(const TridiagonalEigh& problem, const Members& members,
                              const Tridiagonal<T>& t) {
  const int64_t m = problem.m;
  Signs<T> largest = {};
  for (int64_t i = 0; i < m; ++i) {
    t.e[i] = Vector<T>{};
    for (int lane = 0; lane < kLanes<T>; ++lane) {
      const int64_t member = members.of(lane);
      t.d[i][lane] = static_cast<const T*>(problem.alpha)[member * m + i];
      if (i + 1 < m) t.e[i][lane] = static_cast<const T*>(problem.beta)[member * (m - 1) + i];
    }
    largest = larger<T>(larger<T>(largest, t.d[i]), t.e[i]);
  }
  const LaneScale<T> scale(largest);
  for (int64_t i = 0; i < m; ++i) {
    t.d[i] = scale.apply(t.d[i]);
    t.e[i] = scale.apply(t.e[i]);
  }
  return scale;
}

template <typename T>
void pairs_of_group(const TridiagonalEigh& problem, PairsSpace<T>& space, const Members& members) {
  const LaneScale<T> scale = load_tridiagonal<T>(problem, members, space.t);
  space.t.keep();
  space.z.set_identity();
  eigenpairs(space.t, space.rotations, space.z);
  polish(space.t);
  store_pairs<T>(space.t.d, space.z, scale, members, space.places, static_cast<T*>(problem.values),
                 static_cast<T*>(problem.vectors));
}

}  // namespace
}  // namespace hessreg::spectral::HESSREG_ISA
