#pragma once
// Squared distances of blocks of points as tiles of registers, and what becomes of them: for
// gaussian_cpu.cpp, once per instruction set.
//
// One block stands in panels, so many points side by side that they fill two vectors; points of the
// other are broadcast, a group at a time. The distances of a panel and a group stay in registers
// until they have become weights.
#include "../common/cpu_tiles.h"
#include "gaussian_cpu.h"

namespace hessreg::gaussian::HESSREG_ISA {
namespace {

constexpr int64_t kDepth = 256;      // terms of a product at a time: its operands stay in cache
constexpr int64_t kDifferences = 8;  // dimensions up to which differences cost no more
static_assert(kBlock % kGroup == 0 && kBlock % kPanel<float> == 0);

// Rows apart by whole vectors and never by a power of two, which would share cache sets.
HESSREG_HD int64_t row_stride(int64_t d) { return round_up(d, 16) + 16; }

// ---- mixtures ----------------------------------------------------------------------------------

// Without coefficients they are 1 here: a common factor can wait for the sums.
template <typename C>
struct Components {
  C *scale, *coefficient, *slope;
  int64_t count;

  HESSREG_HD Components(const Mixture& mixture, Arena& arena)
      : scale(arena.take<C>(mixture.count)),
        coefficient(arena.take<C>(mixture.count)),
        slope(arena.take<C>(mixture.count)),
        count(mixture.count) {}

  HESSREG_HD void load(const Mixture& mixture, int64_t batch) {
    for (int64_t c = 0; c < count; ++c) {
      const double gamma = mixture.gamma[batch * count + c];
      const double weight = mixture.coefficient ? mixture.coefficient[batch * count + c] : 1;
      scale[c] = -scale_of<C>(gamma);
      coefficient[c] = finite<C>(weight);
      slope[c] = finite<C>(weight * gamma);
    }
  }
};

template <bool kSlope, typename C, int R, int N>
HESSREG_HD void weigh_many(const Components<C>& mixture, Tile<C, R, N>& s, Tile<C, R, N>& slope) {
  for (int r = 0; r < R; ++r) {
    for (int h = 0; h < N; ++h) {
      Vector<C> phi = {}, dphi = {};
      for (int64_t c = 0; c < mixture.count; ++c) {
        const Vector<C> e = exp2_of_product(s[r][h], mixture.scale[c]);
        phi += e * mixture.coefficient[c];
        if constexpr (kSlope) dphi += e * mixture.slope[c];
      }
      s[r][h] = phi;
      if constexpr (kSlope) slope[r][h] = dphi;
    }
  }
}

// phi(s) in place of s, and with kSlope also -phi'(s); with kEqual all coefficients are 1.
template <bool kSlope, bool kEqual, typename C, int R, int N>
HESSREG_HD void weigh(const Components<C>& mixture, Tile<C, R, N>& s, Tile<C, R, N>& slope) {
  if (mixture.count > 1) return weigh_many<kSlope, C, R, N>(mixture, s, slope);
#pragma GCC unroll 2
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int h = 0; h < N; ++h) {
      const Vector<C> e = exp2_of_product(s[r][h], mixture.scale[0]);
      s[r][h] = kEqual ? e : e * mixture.coefficient[0];
      if constexpr (kSlope) slope[r][h] = e * mixture.slope[0];
    }
  }
}

// ---- products ----------------------------------------------------------------------------------

// Terms summed up in one go in the type of the elements; beyond that, sums of sums.
constexpr int64_t kTerms = 48;

template <typename C, int R, int N>
HESSREG_HD void add(const Tile<C, R, N>& tile, Tile<C, R, N>& sum) {
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int h = 0; h < N; ++h) sum[r][h] += tile[r][h];
}

// ---- blocks ------------------------------------------------------------------------------------

// A block of points in rows, from a centre, with their squared lengths. Rows that only fill up the
// block have a padding of infinity, others of zero: it is part of each squared distance.
template <typename C>
struct Rows {
  C *data, *norms, *padding;
  int64_t stride, count, d;

  HESSREG_HD Rows(int64_t d, Arena& arena, int64_t capacity = kBlock)
      : data(arena.take<C>(capacity * row_stride(d))),
        norms(arena.take<C>(capacity)),
        padding(arena.take<C>(capacity)),
        stride(row_stride(d)),
        count(0),
        d(d) {}

  // Rows from a multiple of kBlock on.
  HESSREG_HD Rows view(int64_t begin, int64_t number) const {
    Rows rows = *this;
    rows.data += begin * stride;
    rows.norms += begin;
    rows.padding += begin;
    rows.count = number;
    return rows;
  }

  template <typename T>
  HESSREG_HD void load(const T* points, int64_t number, const C* centre) {
    count = number;
    for (int64_t i = 0; i < number; ++i) {
      C* row = data + i * stride;
      for (int64_t k = 0; k < d; ++k) row[k] = to_compute(points[i * d + k]) - centre[k];
      for (int64_t k = d; k < stride; ++k) row[k] = 0;
      norms[i] = squared_length(row);
      padding[i] = 0;
    }
    for (int64_t i = number; i < round_up(number, kBlock); ++i) {
      for (int64_t k = 0; k < stride; ++k) data[i * stride + k] = 0;
      norms[i] = 0;
      padding[i] = std::numeric_limits<C>::infinity();
    }
  }

  HESSREG_HD int64_t groups() const { return (count + kGroup - 1) / kGroup; }

 private:
  HESSREG_HD C squared_length(const C* row) const {
    Vector<C> total = {};
    for (int64_t k = 0; k < d; k += kLanes<C>) {
      const Vector<C> v = hessreg::load<C, kLanes<C>>(row + k);
      total += v * v;
    }
    return sum_lanes<C>(total);
  }
};

// Rows side by side: [panel, column, kPanel], with zeros beyond the last row.
template <typename C>
struct Panels {
  C* data;
  int64_t count = 0, width;

  HESSREG_HD Panels(int64_t width, Arena& arena, int64_t capacity = kBlock)
      : data(arena.take<C>(capacity * width)), width(width) {}

  // Those of the rows from a multiple of kBlock on.
  HESSREG_HD Panels view(int64_t begin, int64_t number) const {
    Panels panels = *this;
    panels.data += begin * width;
    panels.count = (number + kPanel<C> - 1) / kPanel<C>;
    return panels;
  }

  HESSREG_HD void load(const C* rows, int64_t stride, int64_t number) {
    count = (number + kPanel<C> - 1) / kPanel<C>;
    for (int64_t p = 0; p < count; ++p) {
      const int64_t i = p * kPanel<C>;
      load_panel(rows + i * stride, stride, number - i, width, data + i * width);
    }
  }

  HESSREG_HD const C* panel(int64_t p) const { return data + p * kPanel<C> * width; }
};

// Where coordinates are taken from: in each dimension the mean of a block, if all its points are
// within a factor of two of it, so that the subtraction is exact; else zero, for then they are not
// far from the origin as their spread goes.
template <typename C>
struct Centre {
  C *data, *low, *high;
  int64_t d;

  HESSREG_HD Centre(int64_t d, Arena& arena)
      : data(arena.take<C>(d)), low(arena.take<C>(d)), high(arena.take<C>(d)), d(d) {}

  template <typename T>
  HESSREG_HD void find(const T* points, int64_t count) {
    constexpr C kInfinity = std::numeric_limits<C>::infinity();
    for (int64_t k = 0; k < d; ++k) data[k] = 0, low[k] = kInfinity, high[k] = -kInfinity;
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t k = 0; k < d; ++k) {
        const C x = to_compute(points[i * d + k]);
        data[k] += x;
        low[k] = x < low[k] ? x : low[k];
        high[k] = x > high[k] ? x : high[k];
      }
    }
    for (int64_t k = 0; k < d; ++k) {
      const C mean = data[k] / static_cast<C>(count);
      const bool above = mean > 0 && low[k] >= mean / 2 && high[k] <= 2 * mean;
      const bool below = mean < 0 && high[k] <= mean / 2 && low[k] >= 2 * mean;
      data[k] = above || below ? mean : C(0);
    }
  }
};

// ---- distances ---------------------------------------------------------------------------------

// The squared distances of every panel of x from every group of y.
template <typename C>
struct Distances {
  const Rows<C>& x_rows;
  const Panels<C>& x;  // the same points
  const Rows<C>& y;
  C* partial;  // [panel, kBlock, kPanel], for what is summed up over the depth

  // Calls use(panel, group, tile) for each.
  template <typename Use>
  HESSREG_HD void sweep(const Use& use) const {
    if (y.d <= kDifferences) return shallow(use);
    for (int64_t start = 0; start < y.d; start += kDepth)
      for (int64_t p = 0; p < x.count; ++p)
        for (int64_t g = 0; g < y.groups(); ++g) deep(p, g, start, use);
  }

 private:
  template <typename Use>
  HESSREG_HD void shallow(const Use& use) const {
    for (int64_t p = 0; p < x.count; ++p) {
      for (int64_t g = 0; g < y.groups(); ++g) {
        Tile<C, kGroup> s;
        differences(p, g, s);
        use(p, g, s);
      }
    }
  }

  template <typename Use>
  HESSREG_HD void deep(int64_t p, int64_t g, int64_t start, const Use& use) const {
    const int64_t depth = smaller(kDepth, y.d - start);
    C* kept = partial + (p * kBlock + g * kGroup) * kPanel<C>;
    Tile<C, kGroup> tile;
    clear<C, kGroup, 2>(tile);
    multiply<false, C, kGroup, 2>(x.panel(p) + start * kPanel<C>, kPanel<C>,
                                  y.data + g * kGroup * y.stride + start, 1, y.stride, depth, tile);
    if (start > 0) add_kept(kept, tile);
    if (start + depth < y.d) return keep(tile, kept);
    from_products(p, g, tile);
    use(p, g, tile);
  }

  HESSREG_HD static void add_kept(const C* kept, Tile<C, kGroup>& tile) {
#pragma GCC unroll 12
    for (int r = 0; r < kGroup; ++r)
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h)
        tile[r][h] += load<C, kLanes<C>>(kept + r * kPanel<C> + h * kLanes<C>);
  }
  HESSREG_HD static void keep(const Tile<C, kGroup>& tile, C* kept) {
#pragma GCC unroll 12
    for (int r = 0; r < kGroup; ++r)
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) store(kept + r * kPanel<C> + h * kLanes<C>, tile[r][h]);
  }

  // s = |x|^2 + |y|^2 - 2 <x, y>; where that has lost its digits (or is not a number) in any pair,
  // all of the tile once more from the differences.
  HESSREG_HD void from_products(int64_t p, int64_t g, Tile<C, kGroup>& tile) const {
    Vector<C> own[2];
    Signs<C> lost = {};
    for (int h = 0; h < 2; ++h)
      own[h] = load<C, kLanes<C>>(x_rows.norms + p * kPanel<C> + h * kLanes<C>);
#pragma GCC unroll 2
    for (int r = 0; r < kGroup; ++r) {
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        const Vector<C> both = own[h] + y.norms[g * kGroup + r];
        tile[r][h] = both - 2 * tile[r][h];
        lost |= (Signs<C>)(tile[r][h] - both * C(kCancelled));  // infinity - infinity is negative
      }
    }
    if (any_negative<C>(lost)) return differences(p, g, tile);
    if (p + 1 == x.count || g + 1 == y.groups()) add_padding(p, g, tile);
  }

  HESSREG_HD void add_padding(int64_t p, int64_t g, Tile<C, kGroup>& tile) const {
    for (int h = 0; h < 2; ++h) {
      const Vector<C> own = load<C, kLanes<C>>(x_rows.padding + p * kPanel<C> + h * kLanes<C>);
      for (int r = 0; r < kGroup; ++r) tile[r][h] += own + y.padding[g * kGroup + r];
    }
  }

  HESSREG_HD void differences(int64_t p, int64_t g, Tile<C, kGroup>& tile) const {
    clear<C, kGroup, 2>(tile);
    multiply<true, C, kGroup, 2>(x.panel(p), kPanel<C>, y.data + g * kGroup * y.stride, 1, y.stride,
                                 y.d, tile);
    if (p + 1 == x.count || g + 1 == y.groups()) add_padding(p, g, tile);
  }
};

}  // namespace
}  // namespace hessreg::gaussian::HESSREG_ISA
