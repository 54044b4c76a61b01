#pragma once
// The weights with which lists are combined, from their inner products: projections off the span of
// other lists, and PCGrad. One source for CPU and CUDA. No torch, no CUDA runtime.
#include "projection.h"

namespace hessreg::projection {

enum class Kind : int32_t { kProject, kPcgrad };
enum class Reduction : int64_t { kNone, kSum, kMean };

struct Rule {
  Kind kind;
  // kProject: list 0 off the span of the others.
  double strength = 1;
  double tolerance = 0;        // a residual below tolerance * |g| is rounding error: exactly zero
  double pivot_tolerance = 0;  // a direction so near the span of others adds nothing to it
  bool conflict_only = false;  // only off directions with which g conflicts
  bool rescale = false;        // to the norm that g had
  // kPcgrad: each list off those it conflicts with, in an order of its own.
  const int64_t* order = nullptr;  // [num_lists, num_lists]
  Reduction reduction = Reduction::kNone;

  HESSREG_HD int64_t num_outputs(int64_t num_lists) const {
    return kind == Kind::kPcgrad && reduction == Reduction::kNone ? num_lists : 1;
  }
};

// eps: the rounding error of what vectors are computed in. A pivot must also be larger than what
// inner products in float64 can tell from zero.
HESSREG_HD Rule projection_rule(double eps, double strength, bool conflict_only, bool rescale) {
  const double smallest = 8 * 0x1p-26;  // 8 sqrt(epsilon)
  Rule rule{Kind::kProject};
  rule.strength = strength;
  rule.tolerance = 16 * eps;
  rule.pivot_tolerance = 16 * eps > smallest ? 16 * eps : smallest;
  rule.conflict_only = conflict_only;
  rule.rescale = rescale;
  return rule;
}

HESSREG_HD Rule pcgrad_rule(const int64_t* order, Reduction reduction) {
  Rule rule{Kind::kPcgrad};
  rule.order = order;
  rule.reduction = reduction;
  return rule;
}

// Scratch for one segment.
HESSREG_HD int64_t work_size(int64_t num_lists) { return num_lists * (num_lists + 4); }

// The threads that work on one segment: on the CPU a single one.
struct Alone {
  int64_t rank = 0, size = 1;
  HESSREG_HD void sync() const {}
};

HESSREG_HD bool has_direction(double square) { return square > 0 && !std::isinf(square); }

// Projects list 0 by a pivoted Cholesky factorisation of the cosines between the others. Every
// threshold is relative: an absolute one would switch projection off for small gradients.
template <typename Team>
class Elimination {
 public:
  HESSREG_HD Elimination(const double* gram, int64_t m, const Rule& rule, double* work, Team team)
      : gram_(gram),
        rule_(rule),
        team_(team),
        m_(m),
        rest_(work),
        overlap_(work + m),
        pivots_(work + 2 * m),
        alpha_(work + 3 * m),
        factor_(work + 4 * m) {}

  HESSREG_HD void factorise() {
    for (int64_t j = team_.rank; j < m_; j += team_.size) {
      const bool usable = j > 0 && has_direction(square(j));
      rest_[j] = usable ? 1 : 0;
      overlap_[j] = usable ? gram_[j] / norm(j) : 0;
    }
    team_.sync();
    while (rank_ < m_ - 1 && rule_.strength != 0) {
      const int64_t pivot = best();
      if (pivot == 0) return;
      eliminate(pivot);
    }
  }

  // weights[0] g + sum_j weights[j] v_j is the projected g. One thread's work.
  HESSREG_HD void solve(double* weights) const {
    const double gg = gram_[0], within = rule_.strength * (2 - rule_.strength);
    double square_of_result = gg;
    for (int64_t t = 0; t < rank_; ++t) square_of_result -= within * factor_[t] * factor_[t];
    const bool vanishes = rank_ > 0 && !std::isinf(gg) && vanishing(square_of_result, gg);
    const double scale = vanishes                     ? 0
                         : rule_.rescale && rank_ > 0 ? std::sqrt(gg / square_of_result)
                                                      : 1;
    for (int64_t j = 1; j < m_; ++j) weights[j] = 0;
    weights[0] = scale;
    for (int64_t t = rank_ - 1; t >= 0 && !vanishes; --t) {
      double rest = factor_[t];
      for (int64_t s = t + 1; s < rank_; ++s) rest -= alpha_[s] * factor(pivot(s), t);
      alpha_[t] = rest / factor(pivot(t), t);
      weights[pivot(t)] = -scale * rule_.strength * alpha_[t] / norm(pivot(t));
    }
  }

 private:
  HESSREG_HD double square(int64_t j) const { return gram_[j * m_ + j]; }
  HESSREG_HD double norm(int64_t j) const { return std::sqrt(square(j)); }
  HESSREG_HD int64_t pivot(int64_t t) const { return static_cast<int64_t>(pivots_[t]); }
  HESSREG_HD double& factor(int64_t j, int64_t t) const { return factor_[j * m_ + t]; }

  // Whether what is left is rounding error. To be rescaled, it must be more than what inner
  // products in float64 leave of nothing.
  HESSREG_HD bool vanishing(double square_of_result, double gg) const {
    if (rule_.rescale) {
      const double smallest = rule_.pivot_tolerance * rule_.pivot_tolerance;
      const double rounding = 64 * 0x1p-52 / least_;
      return square_of_result <= (rounding > smallest ? rounding : smallest) * gg;
    }
    return rule_.strength == 1 && square_of_result <= rule_.tolerance * rule_.tolerance * gg;
  }

  // The direction to project off next, 0 for none: where only conflicts count the worst of them,
  // else the one farthest from the span of those before.
  HESSREG_HD int64_t best() const {
    const double smallest = rule_.pivot_tolerance * rule_.pivot_tolerance;
    int64_t best = 0;
    for (int64_t j = 1; j < m_; ++j) {
      if (!(rest_[j] > smallest) || (rule_.conflict_only && !(overlap_[j] < 0))) continue;
      if (best == 0 ||
          (rule_.conflict_only ? overlap_[j] < overlap_[best] : rest_[j] > rest_[best]))
        best = j;
    }
    return best;
  }

  HESSREG_HD void eliminate(int64_t p) {
    const double root = std::sqrt(rest_[p]), component = overlap_[p] / root;
    const int64_t t = rank_++;
    if (rest_[p] < least_) least_ = rest_[p];
    for (int64_t j = team_.rank; j < m_; j += team_.size)
      factor(j, t) = j == 0         ? component
                     : j == p       ? root
                     : rest_[j] > 0 ? coordinate(j, p, t) / root
                                    : 0;
    if (team_.rank == 0) pivots_[t] = static_cast<double>(p);
    team_.sync();
    for (int64_t j = 1 + team_.rank; j < m_; j += team_.size) {
      rest_[j] = j == p ? 0 : rest_[j] - factor(j, t) * factor(j, t);
      overlap_[j] -= component * factor(j, t);
    }
    team_.sync();
  }

  // <v_j, v_p> / |v_j| |v_p| without what lies in the span of the pivots before.
  HESSREG_HD double coordinate(int64_t j, int64_t p, int64_t t) const {
    double result = gram_[j * m_ + p] / (norm(j) * norm(p));
    for (int64_t s = 0; s < t; ++s) result -= factor(j, s) * factor(p, s);
    return result;
  }

  const double* gram_;
  const Rule& rule_;
  const Team team_;
  const int64_t m_;
  int64_t rank_ = 0;  // of the span so far
  double least_ = 1;  // squared sine of a pivot and the span of those before
  // rest[j]: squared distance of v_j / |v_j| from the span; overlap[j]: <g, v_j> / |v_j| of what is
  // left of g; factor: [num_lists, rank], row 0 for g.
  double *rest_, *overlap_, *pivots_, *alpha_, *factor_;
};

template <typename Team>
HESSREG_HD void project_weights(const double* gram, int64_t m, const Rule& rule, double* work,
                                double* weights, Team team) {
  Elimination<Team> elimination(gram, m, rule, work, team);
  elimination.factorise();
  if (team.rank == 0) elimination.solve(weights);
}

// Row i: list i without its components along those it conflicts with, one after another.
HESSREG_HD void pcgrad_row(const double* gram, int64_t m, const int64_t* order, int64_t i,
                           double* row) {
  for (int64_t a = 0; a < m; ++a) row[a] = a == i;
  for (int64_t t = 0; t < m; ++t) {
    const int64_t j = order[t];
    if (j == i || j < 0 || j >= m || !has_direction(gram[j * m + j])) continue;
    double product = 0;
    for (int64_t a = 0; a < m; ++a)
      if (row[a] != 0) product += row[a] * gram[a * m + j];
    if (product < 0) row[j] -= product / gram[j * m + j];
  }
}

template <typename Team>
HESSREG_HD void pcgrad_weights(const double* gram, int64_t m, const Rule& rule, double* work,
                               double* weights, Team team) {
  const bool reduce = rule.reduction != Reduction::kNone;
  double* rows = reduce ? work : weights;
  for (int64_t i = team.rank; i < m; i += team.size)
    pcgrad_row(gram, m, rule.order + i * m, i, rows + i * m);
  team.sync();
  for (int64_t a = team.rank; reduce && a < m; a += team.size) {
    double total = 0;
    for (int64_t i = 0; i < m; ++i) total += rows[i * m + a];
    weights[a] = rule.reduction == Reduction::kMean ? total / static_cast<double>(m) : total;
  }
}

// weights: [num_outputs, num_lists].
template <typename Team>
HESSREG_HD void weights_of(const double* gram, int64_t m, const Rule& rule, double* work,
                           double* weights, Team team) {
  if (rule.kind == Kind::kPcgrad) return pcgrad_weights(gram, m, rule, work, weights, team);
  project_weights(gram, m, rule, work, weights, team);
}

// cosines[j - 1] between list 0 and list j; zero where one of them has no direction.
template <typename Team>
HESSREG_HD void cosines_of(const double* gram, int64_t m, double* cosines, Team team) {
  for (int64_t j = 1 + team.rank; j < m; j += team.size) {
    const double gg = gram[0], vv = gram[j * m + j];
    const bool defined = has_direction(gg) && has_direction(vv);
    const double cosine = defined ? gram[j] / std::sqrt(gg) / std::sqrt(vv) : 0;
    cosines[j - 1] = cosine > 1 ? 1 : cosine < -1 ? -1 : cosine;
  }
}

// What a rule makes of the inner products; null pointers for what is not asked for.
struct Outcome {
  Rule rule;
  double* work;     // CUDA: [segments, work_size]; CPU: [work_size]
  double* weights;  // [segments, num_outputs, num_lists]
  double* cosines;  // [segments, num_lists - 1]

  template <typename Team>
  HESSREG_HD void find(const double* gram, int64_t m, int64_t segment, double* scratch,
                       Team team) const {
    weights_of(gram, m, rule, scratch, weights + segment * rule.num_outputs(m) * m, team);
    if (cosines) cosines_of(gram, m, cosines + segment * (m - 1), team);
  }
};

}  // namespace hessreg::projection
