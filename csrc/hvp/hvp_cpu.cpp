// Compiled once per instruction set, with HESSREG_ISA naming the namespace.
#include "hvp_cpu_tiles.h"

namespace hessreg::hvp::HESSREG_ISA {
namespace {

// A buffer for the products of a chunk with a panel.
template <typename C>
struct alignas(64) Block {
  C data[kRows * kPanel<C>];
  HESSREG_HD C* row(int64_t r) { return data + r * kPanel<C>; }
};

// What all passes through a network know of it.
template <typename C>
class Pass {
 protected:
  HESSREG_HD Pass(const Network& network, void* workspace)
      : network_(network),
        batch_(network.batch),
        first_moving_(network.first_moving()),
        arena_(workspace) {}

  HESSREG_HD int64_t width(int64_t l) const {
    return l == 0 ? network_.inputs() : network_.layers[l - 1].out;
  }
  HESSREG_HD const Layer& layer(int64_t l) const { return network_.layers[l - 1]; }
  HESSREG_HD const C* weight(int64_t l) const { return static_cast<const C*>(layer(l).weight); }
  HESSREG_HD int64_t chunks(int64_t l) const { return ceil_div(width(l), kRows); }
  HESSREG_HD int64_t multiplications(int64_t l) const { return batch_ * width(l) * width(l - 1); }

  // The units of layers 0 ... l - 1.
  HESSREG_HD int64_t units(int64_t l) const {
    int64_t total = 0;
    for (int64_t i = 0; i < l; ++i) total += width(i);
    return total;
  }
  HESSREG_HD int64_t padded_units(int64_t l) const {
    int64_t total = 0;
    for (int64_t i = 0; i < l; ++i) total += round_up(width(i), kPanel<C>);
    return total;
  }
  // The elements of panels of samples, or of units, of layers 0 ... l - 1.
  HESSREG_HD int64_t sample_panels_size(int64_t l) const {
    return round_up(batch_, kPanel<C>) * units(l);
  }
  HESSREG_HD int64_t unit_panels_size(int64_t l) const { return batch_ * padded_units(l); }
  // Panels of layer l, where those of the layers before stand before it.
  HESSREG_HD Panels<C> samples(C* region, int64_t l) const {
    return {region + sample_panels_size(l), width(l)};
  }
  HESSREG_HD Panels<C> unit_panels(C* region, int64_t l) const {
    return {region + unit_panels_size(l), batch_};
  }

  // a_l, with x for a_0, in its panels of samples.
  HESSREG_HD void load_samples(C* region, int64_t l, const void* x, const void* const* a) const {
    const Panels<C> panels = samples(region, l);
    if (l == 0) return panels.load_columns(static_cast<const C*>(x), batch_);
    panels.load_rows(static_cast<const C*>(a[l - 1]), batch_);
  }
  // Likewise in panels of units.
  HESSREG_HD void load_units(C* region, int64_t l, const void* x, const void* const* a) const {
    const Panels<C> panels = unit_panels(region, l);
    if (l == 0) return panels.load_rows(static_cast<const C*>(x), width(0));
    panels.load_columns(static_cast<const C*>(a[l - 1]), width(l));
  }

  // Calls use(start, columns) for each panel of samples.
  template <typename Use>
  HESSREG_HD void each_panel(const Use& use) const {
    for (int64_t start = 0; start < batch_; start += kPanel<C>)
      use(start, smaller(kPanel<C>, batch_ - start));
  }

  // Calls use(row, column, count) for each vector of a chunk of layer l, a block of a panel.
  template <typename Use>
  HESSREG_HD static void each_vector(int64_t rows, int64_t columns, const Use& use) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t h = 0; h < columns; h += kLanes<C>) use(r, h, columns - h);
  }

  // The sums of rows of panels over all samples.
  HESSREG_HD void sum_samples(const Panels<C>& panels, int64_t first, int64_t rows, C* to) const {
    for (int64_t r = 0; r < rows; ++r) {
      Vector<C> total = {};
      each_panel([&](int64_t start, int64_t columns) {
        const C* from = panels.data + start * panels.rows + (first + r) * kPanel<C>;
        for (int64_t h = 0; h < columns; h += kLanes<C>) total += load_some(from + h, columns - h);
      });
      to[r] = sum_lanes<C>(total);
    }
  }

  // The sum of the terms in a part of a matrix, at most a panel wide, whose rows are `stride`
  // apart.
  HESSREG_HD void store_products(const Term<C>* terms, int count, int64_t rows, int64_t columns,
                                 C* to, int64_t stride) const {
    if (columns >= kPanel<C>) return sum_products(terms, count, rows, kPanel<C>, to, stride);
    Block<C> block;
    sum_products(terms, count, rows, columns, block.data, kPanel<C>);
    each_vector(rows, columns, [&](int64_t i, int64_t h, int64_t some) {
      store_some<C>(to + i * stride + h, load<C, kLanes<C>>(block.row(i) + h), some);
    });
  }

  // Adds a number to each row of a block.
  HESSREG_HD static void add_to_rows(const C* numbers, int64_t rows, Block<C>& block) {
    each_vector(rows, kPanel<C>, [&](int64_t r, int64_t h, int64_t) {
      C* here = block.row(r) + h;
      store(here, load<C, kLanes<C>>(here) + numbers[r]);
    });
  }

  const Network& network_;
  int64_t batch_, first_moving_;
  Arena arena_;
};

template <typename C>
HESSREG_HD C* at(void* const* list, int64_t l) {
  return static_cast<C*>(list[l - 1]);
}
template <typename C>
HESSREG_HD const C* at(const void* const* list, int64_t l) {
  return static_cast<const C*>(list[l - 1]);
}

// ---- forward -----------------------------------------------------------------------------------

template <typename C>
class ForwardPass : Pass<C> {
  using Base = Pass<C>;

 public:
  HESSREG_HD ForwardPass(const Forward& problem, void* workspace)
      : Base(problem.network, workspace),
        p_(problem),
        a_(this->arena_.template take<C>(this->sample_panels_size(depth()))) {}

  HESSREG_HD int64_t bytes() const { return this->arena_.used(); }
  HESSREG_HD int64_t stages() const { return depth() + 1; }
  HESSREG_HD Stage stage(int64_t l) const {
    if (l == 0) return {1, 0};
    return {this->chunks(l), 2 * this->multiplications(l)};
  }

  void run(int64_t l, int64_t begin, int64_t end) const {
    if (l == 0) return this->samples(a_, 0).load_columns(static_cast<const C*>(p_.x), this->batch_);
    for (int64_t chunk = begin; chunk < end; ++chunk) run_chunk(l, chunk * kRows);
  }

 private:
  HESSREG_HD int64_t depth() const { return p_.network.depth; }

  void run_chunk(int64_t l, int64_t first) const {
    const int64_t rows = smaller(kRows, this->width(l) - first), in = this->width(l - 1);
    Block<C> block;
    this->each_panel([&](int64_t start, int64_t columns) {
      const C* before = this->samples(a_, l - 1).data + start * in;
      const Term<C> term = rows_of(this->weight(l) + first * in, in, before);
      sum_products(&term, 1, rows, columns, block.data, kPanel<C>);
      const C* bias = static_cast<const C*>(this->layer(l).bias);
      if (bias) this->add_to_rows(bias + first, rows, block);
      if (l == depth())
        transpose_matrix(block.data, kPanel<C>, rows, columns,
                         static_cast<C*>(p_.y) + start * this->width(l) + first, this->width(l));
      else
        finish(l, first, rows, start, columns, block);
    });
  }

  HESSREG_HD void finish(int64_t l, int64_t first, int64_t rows, int64_t start, int64_t columns,
                         Block<C>& block) const {
    C* panel = this->samples(a_, l).data + start * this->width(l) + first * kPanel<C>;
    const C parameter = static_cast<C>(p_.parameters[l - 1]);
    this->each_vector(rows, columns, [&](int64_t r, int64_t h, int64_t count) {
      const Jet<Vector<C>> jet = activate<VectorMath<C>>(p_.activations[l - 1], parameter,
                                                         load<C, kLanes<C>>(block.row(r) + h));
      const int64_t place = (first + r) * this->batch_ + start + h;
      store(panel + r * kPanel<C> + h, jet.value);
      store_some<C>(at<C>(p_.a, l) + place, jet.value, count);
      store_some<C>(at<C>(p_.first, l) + place, jet.first, count);
      store_some<C>(at<C>(p_.second, l) + place, jet.second, count);
      if (p_.third) store_some<C>(at<C>(p_.third, l) + place, jet.third, count);
    });
  }

  const Forward& p_;
  C* a_;  // panels of samples, layers 0 ... L - 1
};

// ---- backward ----------------------------------------------------------------------------------

// Stage by stage from layer L to layer 1.
template <typename C>
class BackwardPass : Pass<C> {
  using Base = Pass<C>;

 public:
  HESSREG_HD BackwardPass(const Backward& problem, void* workspace)
      : Base(problem.network, workspace),
        p_(problem),
        delta_(this->arena_.template take<C>(this->sample_panels_size(depth() + 1))) {}

  HESSREG_HD int64_t bytes() const { return this->arena_.used(); }
  HESSREG_HD int64_t stages() const { return depth(); }
  HESSREG_HD Stage stage(int64_t index) const {
    if (index == 0) return {1, 0};
    return {this->chunks(depth() - index), 2 * this->multiplications(depth() - index + 1)};
  }

  void run(int64_t index, int64_t begin, int64_t end) const {
    if (index == 0) return start_from_outputs();
    for (int64_t chunk = begin; chunk < end; ++chunk) run_chunk(depth() - index, chunk * kRows);
  }

 private:
  HESSREG_HD int64_t depth() const { return p_.network.depth; }

  void start_from_outputs() const {
    const Panels<C> panels = this->samples(delta_, depth());
    panels.load_columns(static_cast<const C*>(p_.delta_out), this->batch_);
    this->each_panel([&](int64_t start, int64_t columns) {
      const C* panel = panels.data + start * panels.rows;
      this->each_vector(panels.rows, columns, [&](int64_t r, int64_t h, int64_t count) {
        store_some<C>(at<C>(p_.delta, depth()) + r * this->batch_ + start + h,
                      load<C, kLanes<C>>(panel + r * kPanel<C> + h), count);
      });
    });
  }

  void run_chunk(int64_t l, int64_t first) const {
    const int64_t in = this->width(l), out = this->width(l + 1), batch = this->batch_;
    const int64_t rows = smaller(kRows, in - first);
    Block<C> block;
    this->each_panel([&](int64_t start, int64_t columns) {
      const C* after = this->samples(delta_, l + 1).data + start * out;
      C* panel = this->samples(delta_, l).data + start * in + first * kPanel<C>;
      const Term<C> term = columns_of(this->weight(l + 1) + first, in, out, after);
      sum_products(&term, 1, rows, columns, block.data, kPanel<C>);
      this->each_vector(rows, columns, [&](int64_t r, int64_t h, int64_t count) {
        const int64_t place = (first + r) * batch + start + h;
        const Vector<C> g = load<C, kLanes<C>>(block.row(r) + h);
        const Vector<C> delta = g * load_some(at<C>(p_.first, l) + place, count);
        store(panel + r * kPanel<C> + h, delta);
        store_some<C>(at<C>(p_.delta, l) + place, delta, count);
        store_some<C>(at<C>(p_.s, l) + place, g * load_some(at<C>(p_.second, l) + place, count),
                      count);
        if (p_.third)
          store_some<C>(at<C>(p_.t, l) + place, g * load_some(at<C>(p_.third, l) + place, count),
                        count);
      });
    });
  }

  const Backward& p_;
  C* delta_;  // panels of samples, layers 0 ... L
};

// ---- several directions ------------------------------------------------------------------------

// Directions go through all layers in groups of so many that what they leave stays in cache.
constexpr int64_t kGroupBytes = 1 << 19;

HESSREG_HD int64_t group_size(int64_t directions, int64_t bytes_of_one) {
  const int64_t size = kGroupBytes / (bytes_of_one + 1);
  return size < 1 ? 1 : smaller(size, directions);
}

// Stage 0 prepares what all directions share; then `each` stages for every group.
struct Groups {
  int64_t directions, size, each;

  HESSREG_HD int64_t stages() const {
    return 1 + (directions ? ceil_div(directions, size) : 0) * each;
  }
  HESSREG_HD int64_t first(int64_t stage) const { return (stage - 1) / each * size; }
  HESSREG_HD int64_t count(int64_t stage) const { return smaller(size, directions - first(stage)); }
  HESSREG_HD int64_t step(int64_t stage) const { return (stage - 1) % each; }
};

// ---- tangent -----------------------------------------------------------------------------------

template <typename C>
class TangentPass : Pass<C> {
  using Base = Pass<C>;

 public:
  HESSREG_HD TangentPass(const Tangent& problem, void* workspace)
      : Base(problem.network, workspace),
        p_(problem),
        ra_size_(this->sample_panels_size(depth())),
        groups_{p_.directions, group_size(p_.directions, ra_size_ * sizeof(C)), depth() + 1},
        a_(this->arena_.template take<C>(ra_size_)),
        ra_(this->arena_.template take<C>(groups_.size * ra_size_)) {}

  HESSREG_HD int64_t bytes() const { return this->arena_.used(); }
  HESSREG_HD int64_t stages() const { return groups_.stages(); }
  HESSREG_HD Stage stage(int64_t index) const {
    if (index == 0) return {depth(), this->batch_ * this->units(depth())};
    const int64_t l = groups_.step(index), count = groups_.count(index);
    if (l == 0) return {p_.u ? count : 0, count * this->batch_ * this->width(0)};
    return {count * this->chunks(l), 4 * count * this->multiplications(l)};
  }

  void run(int64_t index, int64_t begin, int64_t end) const {
    if (index == 0) {
      for (int64_t l = begin; l < end; ++l) prepare(l);
      return;
    }
    const int64_t l = groups_.step(index), first = groups_.first(index);
    if (l == 0) {
      for (int64_t j = begin; j < end; ++j) start_from_inputs(first + j, ra(j));
      return;
    }
    const int64_t chunks = this->chunks(l);
    for (int64_t task = begin; task < end; ++task)
      run_chunk(l, first + task / chunks, ra(task / chunks), task % chunks * kRows);
  }

 private:
  HESSREG_HD int64_t depth() const { return p_.network.depth; }
  HESSREG_HD C* ra(int64_t place) const { return ra_ + place * ra_size_; }
  HESSREG_HD bool moves(int64_t l) const { return p_.u || l >= this->first_moving_; }

  // a_l where a direction in W_{l+1} meets it.
  void prepare(int64_t l) const {
    if (this->layer(l + 1).weight_offset >= 0) this->load_samples(a_, l, p_.x, p_.a);
  }

  void start_from_inputs(int64_t j, C* ra) const {
    const C* u = static_cast<const C*>(p_.u) + j * this->batch_ * this->width(0);
    this->samples(ra, 0).load_columns(u, this->batch_);
  }

  void run_chunk(int64_t l, int64_t j, C* ra, int64_t first) const {
    const Layer& layer = this->layer(l);
    const int64_t rows = smaller(kRows, layer.out - first), in = layer.in;
    const C* v = static_cast<const C*>(p_.v) + j * p_.length;
    Block<C> block;
    this->each_panel([&](int64_t start, int64_t columns) {
      Term<C> terms[2];
      int count = 0;
      if (moves(l - 1))
        terms[count++] = rows_of<C>(this->weight(l) + first * in, in,
                                    this->samples(ra, l - 1).data + start * in);
      if (layer.weight_offset >= 0)
        terms[count++] = rows_of<C>(v + layer.weight_offset + first * in, in,
                                    this->samples(a_, l - 1).data + start * in);
      sum_products(terms, count, rows, columns, block.data, kPanel<C>);
      const C* c = layer.bias_offset >= 0 ? v + layer.bias_offset + first : nullptr;
      l == depth() ? finish_outputs(j, first, rows, start, columns, c, block)
                   : finish(l, j, ra, first, rows, start, columns, c, block);
    });
  }

  HESSREG_HD void finish(int64_t l, int64_t j, C* ra, int64_t first, int64_t rows, int64_t start,
                         int64_t columns, const C* c, Block<C>& block) const {
    C* panel = this->samples(ra, l).data + start * this->width(l) + first * kPanel<C>;
    C* rz = at<C>(p_.rz, l) + j * this->width(l) * this->batch_;
    this->each_vector(rows, columns, [&](int64_t r, int64_t h, int64_t count) {
      const int64_t place = (first + r) * this->batch_ + start + h;
      const Vector<C> z = load<C, kLanes<C>>(block.row(r) + h) + (c ? c[r] : C(0));
      store_some<C>(rz + place, z, count);
      store(panel + r * kPanel<C> + h, z * load_some(at<C>(p_.first, l) + place, count));
    });
  }

  HESSREG_HD void finish_outputs(int64_t j, int64_t first, int64_t rows, int64_t start,
                                 int64_t columns, const C* c, Block<C>& block) const {
    if (c) this->add_to_rows(c, rows, block);
    const int64_t out = this->width(depth());
    transpose_matrix(block.data, kPanel<C>, rows, columns,
                     static_cast<C*>(p_.ry) + (j * this->batch_ + start) * out + first, out);
  }

  const Tangent& p_;
  int64_t ra_size_;
  Groups groups_;
  C *a_, *ra_;  // panels of samples, layers 0 ... L - 1; of each direction of a group
};

// ---- adjoint -----------------------------------------------------------------------------------

template <typename C>
class AdjointPass : Pass<C> {
  using Base = Pass<C>;

 public:
  HESSREG_HD AdjointPass(const Adjoint& problem, void* workspace)
      : Base(problem.network, workspace),
        p_(problem),
        r_size_(this->sample_panels_size(depth() + 1)),
        units_size_(this->unit_panels_size(depth())),
        groups_{p_.directions, group_size(p_.directions, (r_size_ + units_size_) * sizeof(C)),
                depth() + 1},
        delta_(this->arena_.template take<C>(r_size_)),
        a_(this->arena_.template take<C>(units_size_)),
        first_(this->arena_.template take<C>(units_size_)),
        r_(this->arena_.template take<C>(groups_.size * r_size_)),
        ra_(this->arena_.template take<C>(groups_.size * units_size_)) {}

  HESSREG_HD int64_t bytes() const { return this->arena_.used(); }
  HESSREG_HD int64_t stages() const { return groups_.stages(); }
  HESSREG_HD Stage stage(int64_t index) const {
    const int64_t elements = this->batch_ * this->units(depth());
    if (index == 0) return {depth(), 3 * elements};
    const int64_t step = groups_.step(index), count = groups_.count(index);
    if (step == 0) return {count * depth(), count * elements};
    const int64_t l = depth() + 1 - step;
    return {count * tasks(l), 8 * count * this->multiplications(l)};
  }

  void run(int64_t index, int64_t begin, int64_t end) const {
    if (index == 0) {
      for (int64_t l = begin; l < end; ++l) prepare(l);
      return;
    }
    const int64_t step = groups_.step(index), first = groups_.first(index);
    const int64_t l = depth() + 1 - step, each = step == 0 ? depth() : tasks(l);
    for (int64_t task = begin; task < end; ++task) {
      const Direction direction = this->direction(first, task / each);
      step == 0 ? start(direction, task % each) : run_task(l, direction, task % each);
    }
  }

 private:
  // One of a group, and its part of the workspace.
  struct Direction {
    int64_t index;
    C *r, *ra;
    const C* v;
  };

  HESSREG_HD int64_t depth() const { return p_.network.depth; }
  HESSREG_HD bool second() const { return !p_.gauss_newton; }
  HESSREG_HD bool moves(int64_t l) const { return p_.u || l >= this->first_moving_; }
  // Whether R delta_l is of use.
  HESSREG_HD bool wanted(int64_t l) const { return p_.r_input || l >= this->first_moving_; }
  HESSREG_HD Direction direction(int64_t first, int64_t place) const {
    const int64_t index = first + place;
    return {index, r_ + place * r_size_, ra_ + place * units_size_,
            static_cast<const C*>(p_.v) + index * p_.length};
  }

  // Chunks of rows of the result for W_l and b_l, then chunks of layer l - 1.
  HESSREG_HD int64_t result_tasks(int64_t l) const {
    const Layer& layer = this->layer(l);
    return layer.weight_offset >= 0 || layer.bias_offset >= 0 ? this->chunks(l) : 0;
  }
  HESSREG_HD int64_t tasks(int64_t l) const {
    return result_tasks(l) + (wanted(l - 1) ? this->chunks(l - 1) : 0);
  }
  HESSREG_HD void run_task(int64_t l, const Direction& direction, int64_t task) const {
    const int64_t results = result_tasks(l);
    task < results ? result_chunk(l, direction, task * kRows)
                   : adjoint_chunk(l, direction, (task - results) * kRows);
  }

  // What all directions share of layer l and of delta_{l+1}.
  void prepare(int64_t l) const {
    if (this->layer(l + 1).weight_offset < 0) return;
    if (second()) this->samples(delta_, l + 1).load_rows(at<C>(p_.delta, l + 1), this->batch_);
    this->load_units(a_, l, p_.x, p_.a);
    if (second() && l > 0)
      this->unit_panels(first_, l).load_columns(at<C>(p_.first, l), this->width(l));
  }

  // R delta_L, and Ra_l where delta_{l+1} meets it.
  void start(const Direction& direction, int64_t l) const {
    const int64_t j = direction.index, width = this->width(l);
    if (l == 0)
      this->samples(direction.r, depth())
          .load_columns(
              static_cast<const C*>(p_.r_delta_out) + j * this->batch_ * this->width(depth()),
              this->batch_);
    if (!second() || this->layer(l + 1).weight_offset < 0 || !moves(l)) return;
    const Panels<C> panels = this->unit_panels(direction.ra, l);
    if (l > 0) {
      panels.load_columns(at<C>(p_.rz, l) + j * width * this->batch_, width);
      const C* first = this->unit_panels(first_, l).data;
      for (int64_t i = 0; i < round_up(width, kPanel<C>) * this->batch_; i += kLanes<C>)
        store(panels.data + i, load<C, kLanes<C>>(panels.data + i) * load<C, kLanes<C>>(first + i));
    } else {
      panels.load_rows(static_cast<const C*>(p_.u) + j * this->batch_ * width, width);
    }
  }

  void result_chunk(int64_t l, const Direction& direction, int64_t first) const {
    const Layer& layer = this->layer(l);
    const int64_t rows = smaller(kRows, layer.out - first);
    C* result = static_cast<C*>(p_.result) + direction.index * p_.length;
    if (layer.bias_offset >= 0)
      this->sum_samples(this->samples(direction.r, l), first, rows,
                        result + layer.bias_offset + first);
    if (layer.weight_offset >= 0)
      weight_chunk(l, direction, first, rows, result + layer.weight_offset + first * layer.in);
  }

  void weight_chunk(int64_t l, const Direction& direction, int64_t first, int64_t rows,
                    C* to) const {
    const int64_t out = this->width(l), in = this->width(l - 1), batch = this->batch_;
    const C* r = this->samples(direction.r, l).data + first * kPanel<C>;
    const C* delta = this->samples(delta_, l).data + first * kPanel<C>;
    for (int64_t start = 0; start < in; start += kPanel<C>) {
      Term<C> terms[2];
      int count = 0;
      terms[count++] =
          samples_of<C>(r, out, batch, this->unit_panels(a_, l - 1).data + start * batch);
      if (second() && moves(l - 1))
        terms[count++] = samples_of<C>(delta, out, batch,
                                       this->unit_panels(direction.ra, l - 1).data + start * batch);
      this->store_products(terms, count, rows, in - start, to + start, in);
    }
  }

  // Rg_{l-1} and R delta_{l-1}.
  void adjoint_chunk(int64_t l, const Direction& direction, int64_t first) const {
    const Layer& layer = this->layer(l);
    const int64_t rows = smaller(kRows, layer.in - first), in = layer.in, out = layer.out;
    Block<C> block;
    this->each_panel([&](int64_t start, int64_t columns) {
      Term<C> terms[2];
      int count = 0;
      terms[count++] = columns_of<C>(this->weight(l) + first, in, out,
                                     this->samples(direction.r, l).data + start * out);
      if (second() && layer.weight_offset >= 0)
        terms[count++] = columns_of<C>(direction.v + layer.weight_offset + first, in, out,
                                       this->samples(delta_, l).data + start * out);
      sum_products(terms, count, rows, columns, block.data, kPanel<C>);
      if (l == 1) {
        C* to = static_cast<C*>(p_.r_input) + (direction.index * this->batch_ + start) * in;
        transpose_matrix(block.data, kPanel<C>, rows, columns, to + first, in);
      } else {
        finish(l - 1, direction, first, rows, start, columns, block);
      }
    });
  }

  HESSREG_HD void finish(int64_t l, const Direction& direction, int64_t first, int64_t rows,
                         int64_t start, int64_t columns, Block<C>& block) const {
    const int64_t width = this->width(l);
    C* panel = this->samples(direction.r, l).data + start * width + first * kPanel<C>;
    const C* rz =
        second() && moves(l) ? at<C>(p_.rz, l) + direction.index * width * this->batch_ : nullptr;
    this->each_vector(rows, columns, [&](int64_t r, int64_t h, int64_t count) {
      const int64_t place = (first + r) * this->batch_ + start + h;
      Vector<C> moved =
          load<C, kLanes<C>>(block.row(r) + h) * load_some(at<C>(p_.first, l) + place, count);
      if (rz) moved += load_some(at<C>(p_.s, l) + place, count) * load_some(rz + place, count);
      store(panel + r * kPanel<C> + h, moved);
    });
  }

  const Adjoint& p_;
  int64_t r_size_, units_size_;
  Groups groups_;
  C* delta_;       // panels of samples, layers 0 ... L
  C *a_, *first_;  // panels of units, layers 0 ... L - 1
  C *r_, *ra_;     // likewise of each direction of a group
};

// ---- tangent of second order -------------------------------------------------------------------

// What there is of R_12: half of it where both directions are one.
template <int kBoth>
constexpr float kShare = kBoth == 2 ? 1.f : 0.5f;

// R_1, R_2 and R_12 stand side by side everywhere, numbered 0, 1, 2; of one direction R_1 and
// R_11 / 2, numbered 0, 1.
template <typename C>
class SecondTangentPass : Pass<C> {
  using Base = Pass<C>;

 public:
  HESSREG_HD SecondTangentPass(const SecondTangent& problem, void* workspace)
      : Base(problem.network, workspace),
        p_(problem),
        size_(this->sample_panels_size(depth())),
        a_(this->arena_.template take<C>(size_)),
        ra_(this->arena_.template take<C>((both() + 1) * size_)) {}

  HESSREG_HD int64_t bytes() const { return this->arena_.used(); }
  HESSREG_HD int64_t stages() const { return depth() + 1; }
  HESSREG_HD Stage stage(int64_t l) const {
    if (l == 0) return {depth(), this->batch_ * this->units(depth())};
    return {this->chunks(l), (both() == 2 ? 14 : 8) * this->multiplications(l)};
  }

  void run(int64_t l, int64_t begin, int64_t end) const {
    for (int64_t task = begin; task < end; ++task) {
      if (l > 0)
        run_chunk(l, task * kRows);
      else if (this->layer(task + 1).weight_offset >= 0)
        this->load_samples(a_, task, p_.x, p_.a);
    }
  }

 private:
  HESSREG_HD int64_t depth() const { return p_.network.depth; }
  // The number of the derivative along all directions.
  HESSREG_HD int64_t both() const { return p_.directions; }
  HESSREG_HD bool moves(int64_t l) const { return l >= this->first_moving_; }
  HESSREG_HD const C* v(int64_t j) const { return static_cast<const C*>(p_.v) + j * p_.length; }
  HESSREG_HD C* panel(C* region, int64_t l, int64_t start) const {
    return this->samples(region, l).data + start * this->width(l);
  }
  HESSREG_HD C* ra(int64_t j, int64_t l, int64_t start) const {
    return panel(ra_ + j * size_, l, start);
  }

  void run_chunk(int64_t l, int64_t first) const {
    const Layer& layer = this->layer(l);
    const int64_t rows = smaller(kRows, layer.out - first);
    Block<C> blocks[3];
    this->each_panel([&](int64_t start, int64_t columns) {
      for (int64_t j = 0; j <= both(); ++j) {
        Term<C> terms[3];
        const int count = find_terms(l, j, first, start, terms);
        sum_products(terms, count, rows, columns, blocks[j].data, kPanel<C>);
        if (j < both() && layer.bias_offset >= 0)
          this->add_to_rows(v(j) + layer.bias_offset + first, rows, blocks[j]);
      }
      l == depth()  ? finish_outputs(first, rows, start, columns, blocks)
      : both() == 2 ? finish<2>(l, first, rows, start, columns, blocks)
                    : finish<1>(l, first, rows, start, columns, blocks);
    });
  }

  // What R_j z_l consists of, but for the bias.
  HESSREG_HD int find_terms(int64_t l, int64_t j, int64_t first, int64_t start,
                            Term<C>* terms) const {
    const Layer& layer = this->layer(l);
    const int64_t in = layer.in, place = layer.weight_offset + first * in;
    int count = 0;
    if (moves(l - 1))
      terms[count++] = rows_of<C>(this->weight(l) + first * in, in, ra(j, l - 1, start));
    if (layer.weight_offset < 0) return count;
    if (j < both()) {
      terms[count++] = rows_of<C>(v(j) + place, in, panel(a_, l - 1, start));
    } else if (moves(l - 1)) {
      for (int64_t i = 0; i < both(); ++i)
        terms[count++] = rows_of<C>(v(i) + place, in, ra(both() - 1 - i, l - 1, start));
    }
    return count;
  }

  template <int kBoth>
  HESSREG_HD void finish(int64_t l, int64_t first, int64_t rows, int64_t start, int64_t columns,
                         Block<C>* blocks) const {
    const C *slopes = at<C>(p_.first, l), *bends = at<C>(p_.second, l);
    C *rz = at<C>(p_.rz, l), *ra = at<C>(p_.ra, l), *panels[kBoth + 1];
    for (int j = 0; j <= kBoth; ++j) panels[j] = this->ra(j, l, start) + first * kPanel<C>;
    const int64_t size = this->width(l) * this->batch_, batch = this->batch_;
    this->each_vector(rows, columns, [&](int64_t r, int64_t h, int64_t count) {
      const int64_t place = (first + r) * batch + start + h;
      const Vector<C> slope = load_some(slopes + place, count);
      Vector<C> z[kBoth + 1], a[kBoth + 1];
      for (int j = 0; j <= kBoth; ++j) {
        z[j] = load<C, kLanes<C>>(blocks[j].row(r) + h);
        a[j] = slope * z[j];
      }
      a[kBoth] += kShare<kBoth> * load_some(bends + place, count) * z[0] * z[kBoth - 1];
      for (int j = 0; j <= kBoth; ++j) {
        store(panels[j] + r * kPanel<C> + h, a[j]);
        store_some<C>(rz + j * size + place, z[j], count);
        store_some<C>(ra + j * size + place, a[j], count);
      }
    });
  }

  HESSREG_HD void finish_outputs(int64_t first, int64_t rows, int64_t start, int64_t columns,
                                 Block<C>* blocks) const {
    const int64_t out = this->width(depth());
    for (int64_t j = 0; j <= both(); ++j)
      transpose_matrix(blocks[j].data, kPanel<C>, rows, columns,
                       static_cast<C*>(p_.ry) + (j * this->batch_ + start) * out + first, out);
  }

  const SecondTangent& p_;
  int64_t size_;
  C *a_, *ra_;  // panels of samples, layers 0 ... L - 1
};

// ---- adjoint of second order -------------------------------------------------------------------

template <typename C>
class SecondAdjointPass : Pass<C> {
  using Base = Pass<C>;

 public:
  HESSREG_HD SecondAdjointPass(const SecondAdjoint& problem, void* workspace)
      : Base(problem.network, workspace),
        p_(problem),
        r_size_(this->sample_panels_size(depth() + 1)),
        units_size_(this->unit_panels_size(depth())),
        delta_(this->arena_.template take<C>(r_size_)),
        r_(this->arena_.template take<C>((both() + 1) * r_size_)),
        a_(this->arena_.template take<C>(units_size_)),
        ra_(this->arena_.template take<C>((both() + 1) * units_size_)) {}

  HESSREG_HD int64_t bytes() const { return this->arena_.used(); }
  HESSREG_HD int64_t stages() const { return depth() + 1; }
  HESSREG_HD Stage stage(int64_t index) const {
    if (index == 0) return {depth(), 5 * this->batch_ * this->units(depth() + 1)};
    const int64_t l = depth() + 1 - index;
    return {tasks(l), (both() == 2 ? 22 : 14) * this->multiplications(l)};
  }

  void run(int64_t index, int64_t begin, int64_t end) const {
    const int64_t l = depth() + 1 - index;
    for (int64_t task = begin; task < end; ++task) index == 0 ? prepare(task) : run_task(l, task);
  }

 private:
  HESSREG_HD int64_t depth() const { return p_.network.depth; }
  // The number of the derivative along all directions.
  HESSREG_HD int64_t both() const { return p_.directions; }
  HESSREG_HD bool moves(int64_t l) const { return l >= this->first_moving_; }
  HESSREG_HD const C* v(int64_t j) const { return static_cast<const C*>(p_.v) + j * p_.length; }
  HESSREG_HD Panels<C> r(int64_t j, int64_t l) const { return this->samples(r_ + j * r_size_, l); }
  HESSREG_HD Panels<C> ra(int64_t j, int64_t l) const {
    return this->unit_panels(ra_ + j * units_size_, l);
  }

  // Chunks of rows of the result for W_l and b_l, then chunks of layer l - 1.
  HESSREG_HD int64_t result_tasks(int64_t l) const {
    const Layer& layer = this->layer(l);
    return layer.weight_offset >= 0 || layer.bias_offset >= 0 ? this->chunks(l) : 0;
  }
  HESSREG_HD int64_t tasks(int64_t l) const {
    return result_tasks(l) + (moves(l - 1) ? this->chunks(l - 1) : 0);
  }
  HESSREG_HD void run_task(int64_t l, int64_t task) const {
    const int64_t results = result_tasks(l);
    task < results ? result_chunk(l, task * kRows) : adjoint_chunk(l, (task - results) * kRows);
  }

  // What layer l and delta_{l+1} are multiplied as, and R delta_L.
  void prepare(int64_t l) const {
    if (l == 0)
      for (int64_t j = 0; j <= both(); ++j)
        r(j, depth())
            .load_columns(
                static_cast<const C*>(p_.r_delta_out) + j * this->batch_ * this->width(depth()),
                this->batch_);
    if (this->layer(l + 1).weight_offset < 0) return;
    this->load_units(a_, l, p_.x, p_.a);
    this->samples(delta_, l + 1).load_rows(at<C>(p_.delta, l + 1), this->batch_);
    for (int64_t j = 0; moves(l) && j <= both(); ++j)
      ra(j, l).load_columns(at<C>(p_.ra, l) + j * this->width(l) * this->batch_, this->width(l));
  }

  void result_chunk(int64_t l, int64_t first) const {
    const Layer& layer = this->layer(l);
    const int64_t rows = smaller(kRows, layer.out - first);
    C* result = static_cast<C*>(p_.result);
    if (layer.bias_offset >= 0)
      this->sum_samples(r(both(), l), first, rows, result + layer.bias_offset + first);
    if (layer.weight_offset >= 0)
      weight_chunk(l, first, rows, result + layer.weight_offset + first * layer.in);
  }

  void weight_chunk(int64_t l, int64_t first, int64_t rows, C* to) const {
    const int64_t in = this->width(l - 1), batch = this->batch_;
    for (int64_t start = 0; start < in; start += kPanel<C>) {
      Term<C> terms[4];
      int count = 0;
      const auto add = [&](const Panels<C>& left, const Panels<C>& right) {
        terms[count++] = samples_of<C>(left.data + first * kPanel<C>, this->width(l), batch,
                                       right.data + start * batch);
      };
      add(r(both(), l), this->unit_panels(a_, l - 1));
      for (int64_t j = 0; moves(l - 1) && j < both(); ++j) add(r(both() - 1 - j, l), ra(j, l - 1));
      if (moves(l - 1)) add(this->samples(delta_, l), ra(both(), l - 1));
      this->store_products(terms, count, rows, in - start, to + start, in);
    }
  }

  // R g_{l-1} and R delta_{l-1}.
  void adjoint_chunk(int64_t l, int64_t first) const {
    const int64_t rows = smaller(kRows, this->layer(l).in - first);
    Block<C> blocks[3];
    this->each_panel([&](int64_t start, int64_t columns) {
      for (int64_t j = 0; j <= both(); ++j) {
        Term<C> terms[3];
        const int count = find_terms(l, j, first, start, terms);
        sum_products(terms, count, rows, columns, blocks[j].data, kPanel<C>);
      }
      both() == 2 ? finish<2>(l - 1, first, rows, start, columns, blocks)
                  : finish<1>(l - 1, first, rows, start, columns, blocks);
    });
  }

  HESSREG_HD int find_terms(int64_t l, int64_t j, int64_t first, int64_t start,
                            Term<C>* terms) const {
    const int64_t in = this->layer(l).in, out = this->layer(l).out, place = start * out;
    const int64_t offset = this->layer(l).weight_offset;
    int count = 0;
    terms[count++] = columns_of<C>(this->weight(l) + first, in, out, r(j, l).data + place);
    if (offset < 0) return count;
    if (j < both()) {
      const C* delta = this->samples(delta_, l).data + place;
      terms[count++] = columns_of<C>(v(j) + offset + first, in, out, delta);
    } else {
      for (int64_t i = 0; i < both(); ++i)
        terms[count++] =
            columns_of<C>(v(i) + offset + first, in, out, r(both() - 1 - i, l).data + place);
    }
    return count;
  }

  template <int kBoth>
  HESSREG_HD void finish(int64_t l, int64_t first, int64_t rows, int64_t start, int64_t columns,
                         Block<C>* blocks) const {
    const int64_t width = this->width(l), size = width * this->batch_, batch = this->batch_;
    const C *slopes = at<C>(p_.first, l), *bends = at<C>(p_.second, l), *rz = at<C>(p_.rz, l);
    const C *s = at<C>(p_.s, l), *t = at<C>(p_.t, l);
    C* panels[kBoth + 1];
    for (int j = 0; j <= kBoth; ++j) panels[j] = r(j, l).data + start * width + first * kPanel<C>;
    this->each_vector(rows, columns, [&](int64_t i, int64_t h, int64_t count) {
      const int64_t place = (first + i) * batch + start + h;
      const Vector<C> slope = load_some(slopes + place, count), bent = load_some(s + place, count);
      Vector<C> z[kBoth + 1], g[kBoth + 1], moved[kBoth + 1];
      for (int j = 0; j <= kBoth; ++j) {
        z[j] = load_some(rz + j * size + place, count);
        g[j] = load<C, kLanes<C>>(blocks[j].row(i) + h);
        moved[j] = slope * g[j] + bent * z[j];
      }
      const Vector<C> z2 = z[kBoth - 1], crossed = z[0] * g[kBoth - 1] + z2 * g[0];
      moved[kBoth] += kShare<kBoth> * (load_some(bends + place, count) * crossed +
                                       load_some(t + place, count) * z[0] * z2);
      for (int j = 0; j <= kBoth; ++j) store(panels[j] + i * kPanel<C> + h, moved[j]);
    });
  }

  const SecondAdjoint& p_;
  int64_t r_size_, units_size_;
  C *delta_, *r_;  // panels of samples, layers 0 ... L
  C *a_, *ra_;     // panels of units, layers 0 ... L - 1
};

// ---- symmetric product -------------------------------------------------------------------------

// Square blocks with the lanes of a vector for side, those on and below the diagonal. Of one vector
// the rows of a block enter their own sums and those of their columns as they are; for several, the
// block is transposed once.
template <typename C>
class SymmetricPass {
 public:
  HESSREG_HD SymmetricPass(const SymmetricProduct& problem, void* workspace)
      : p_(problem),
        padded_(round_up(p_.n, kLanes<C>)),
        parts_(p_.batch >= kEnough ? 1 : smaller(kEnough, 1 + p_.n / kRowsOfPart)),
        arena_(workspace),
        v_(arena_.take<C>(p_.batch * size())),
        sums_(arena_.take<C>(p_.batch * parts_ * size())) {}

  HESSREG_HD int64_t bytes() const { return arena_.used(); }
  HESSREG_HD int64_t stages() const { return 3; }
  HESSREG_HD Stage stage(int64_t index) const {
    const int64_t work = p_.batch * p_.columns * p_.n;
    if (index == 1) return {p_.batch * parts_, 2 * work * p_.n};
    return {p_.batch, work};
  }

  void run(int64_t stage, int64_t begin, int64_t end) const {
    for (int64_t task = begin; task < end; ++task) {
      if (stage == 0) prepare(task);
      if (stage == 1) run_part(task / parts_, task % parts_);
      if (stage == 2) add_parts(task);
    }
  }

 private:
  static constexpr int64_t kEnough = 8;  // tasks for the threads there may be
  static constexpr int64_t kRowsOfPart = 512;

  HESSREG_HD int64_t size() const { return p_.columns * padded_; }
  HESSREG_HD C* v(int64_t batch) const { return v_ + batch * size(); }
  HESSREG_HD C* sums(int64_t batch, int64_t part) const {
    return sums_ + (batch * parts_ + part) * size();
  }

  // v as [columns, padded n].
  void prepare(int64_t batch) const {
    const C* from = static_cast<const C*>(p_.v) + batch * p_.n * p_.columns;
    transposed(from, p_.n, p_.columns, p_.columns, v(batch), padded_);
    for (int64_t c = 0; c < size(); c += padded_)
      for (int64_t i = p_.n; i < padded_; ++i) v(batch)[c + i] = 0;
  }

  void add_parts(int64_t batch) const {
    C* total = sums(batch, 0);
    for (int64_t part = 1; part < parts_; ++part)
      for (int64_t i = 0; i < size(); i += kLanes<C>)
        store(total + i, load<C, kLanes<C>>(total + i) + load<C, kLanes<C>>(sums(batch, part) + i));
    transposed(total, p_.columns, p_.n, padded_,
               static_cast<C*>(p_.out) + batch * p_.n * p_.columns, p_.columns);
  }

  HESSREG_HD void transposed(const C* from, int64_t rows, int64_t columns, int64_t stride, C* to,
                             int64_t to_stride) const {
    if (p_.columns != 1) return transpose_matrix(from, stride, rows, columns, to, to_stride);
    for (int64_t i = 0; i < p_.n; i += kLanes<C>)
      store_some<C>(to + i, load_some(from + i, p_.n - i), p_.n - i);
  }

  // Every parts_-th block of rows, so that all parts have as much to do.
  void run_part(int64_t batch, int64_t part) const {
    C* sum = sums(batch, part);
    for (int64_t i = 0; i < size(); ++i) sum[i] = 0;
    const C* a = static_cast<const C*>(p_.a) + batch * p_.n * p_.n;
    for (int64_t row = part * kLanes<C>; row < p_.n; row += parts_ * kLanes<C>) {
      if (p_.columns == 1) {
        rows_before(a, row, v(batch), sum);
      } else {
        for (int64_t column = 0; column < row; column += kLanes<C>)
          square(a, row, column, v(batch), sum);
      }
      on_diagonal(a, row, v(batch), sum);
    }
  }

  // The rows [row, row + lanes) of columns before `row`.
  void rows_before(const C* a, int64_t row, const C* v, C* sum) const {
    if (row == 0) return;
    Vector<C> own[kLanes<C>] = {};
    const int64_t rows = smaller(kLanes<C>, p_.n - row);
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4)
      some_rows<4>(a + (row + r) * p_.n, row, v, v + row + r, sum, own + r);
    for (; r < rows; ++r) some_rows<1>(a + (row + r) * p_.n, row, v, v + row + r, sum, own + r);
    transpose<C>(own);
    Vector<C> total = load<C, kLanes<C>>(sum + row);
    for (int k = 0; k < kLanes<C>; ++k) total += own[k];
    store(sum + row, total);
  }

  template <int R>
  HESSREG_HD void some_rows(const C* rows, int64_t columns, const C* v, const C* v_rows, C* sum,
                            Vector<C>* own) const {
    Vector<C> mine[R] = {};
    for (int64_t j = 0; j < columns; j += kLanes<C>) {
      const Vector<C> across = load<C, kLanes<C>>(v + j);
      Vector<C> column = load<C, kLanes<C>>(sum + j);
#pragma GCC unroll 4
      for (int i = 0; i < R; ++i) {
        const Vector<C> entries = load<C, kLanes<C>>(rows + i * p_.n + j);
        mine[i] += entries * across;
        column += entries * v_rows[i];
      }
      store(sum + j, column);
    }
    for (int i = 0; i < R; ++i) own[i] = mine[i];
  }

  // The rows of a square, its own or zero, from `column` on, of which `count` are there.
  HESSREG_HD void load_square(const C* a, int64_t row, int64_t column, int64_t count,
                              Vector<C> (&square)[kLanes<C>]) const {
    for (int i = 0; i < kLanes<C>; ++i)
      square[i] = row + i < p_.n ? load_some(a + (row + i) * p_.n + column, count) : Vector<C>{};
  }

  void square(const C* a, int64_t row, int64_t column, const C* v, C* sum) const {
    Vector<C> entries[kLanes<C>], transposed[kLanes<C>];
    load_square(a, row, column, kLanes<C>, entries);
    for (int i = 0; i < kLanes<C>; ++i) transposed[i] = entries[i];
    transpose<C>(transposed);
    for (int64_t c = 0; c < size(); c += padded_) {
      multiply_square(entries, v + c + row, sum + c + column);
      multiply_square(transposed, v + c + column, sum + c + row);
    }
  }

  // sum += the rows weighed by v. In four chains, to hide how long an addition takes.
  HESSREG_HD static void multiply_square(const Vector<C> (&rows)[kLanes<C>], const C* v, C* sum) {
    constexpr int kChains = kLanes<C> < 4 ? kLanes<C> : 4;
    Vector<C> chains[kChains] = {load<C, kLanes<C>>(sum)};
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<C>; ++i) chains[i % kChains] += rows[i] * v[i];
    for (int i = 1; i < kChains; ++i) chains[0] += chains[i];
    store(sum, chains[0]);
  }

  // Its upper part may be anything: it is replaced by the lower one.
  void on_diagonal(const C* a, int64_t row, const C* v, C* sum) const {
    Vector<C> lower[kLanes<C>], mirrored[kLanes<C>];
    load_square(a, row, row, p_.n - row, lower);
    Signs<C> lanes;
    for (int lane = 0; lane < kLanes<C>; ++lane) lanes[lane] = lane;
    const Vector<C> zero = {};
    for (int i = 0; i < kLanes<C>; ++i) {
      const auto place = static_cast<decltype(lanes[0] + 0)>(i);
      mirrored[i] = lanes < place ? lower[i] : zero;
      lower[i] = lanes <= place ? lower[i] : zero;
    }
    transpose<C>(mirrored);
    for (int i = 0; i < kLanes<C>; ++i) lower[i] += mirrored[i];
    for (int64_t c = 0; c < size(); c += padded_)
      multiply_square(lower, v + c + row, sum + c + row);
  }

  const SymmetricProduct& p_;
  int64_t padded_, parts_;
  Arena arena_;
  C *v_, *sums_;  // [batch, columns, padded n], [batch, part, columns, padded n]
};

// ---- by dtype ----------------------------------------------------------------------------------

HESSREG_HD Element element_of(const SymmetricProduct& problem) { return problem.element; }
template <typename Problem>
HESSREG_HD Element element_of(const Problem& problem) {
  return problem.network.element;
}

template <template <typename> class Solver, typename Problem, typename Body>
HESSREG_HD auto with_solver(const Problem& problem, void* workspace, const Body& body) {
  if (element_of(problem) == Element::kFloat64) return body(Solver<double>(problem, workspace));
  return body(Solver<float>(problem, workspace));
}

template <template <typename> class Solver, typename Problem>
constexpr Staged<Problem> staged() {
  return {
      [](const Problem& problem) {
        return with_solver<Solver>(problem, nullptr, [](const auto& s) { return s.bytes(); });
      },
      [](const Problem& problem) {
        return with_solver<Solver>(problem, nullptr, [](const auto& s) { return s.stages(); });
      },
      [](const Problem& problem, int64_t index) {
        return with_solver<Solver>(problem, nullptr, [=](const auto& s) { return s.stage(index); });
      },
      [](const Problem& problem, void* workspace, int64_t index, int64_t begin, int64_t end) {
        with_solver<Solver>(problem, workspace, [=](const auto& s) { s.run(index, begin, end); });
      },
  };
}

}  // namespace

const CpuKernels kernels = {
    staged<ForwardPass, Forward>(),
    staged<BackwardPass, Backward>(),
    staged<TangentPass, Tangent>(),
    staged<AdjointPass, Adjoint>(),
    staged<SecondTangentPass, SecondTangent>(),
    staged<SecondAdjointPass, SecondAdjoint>(),
    staged<SymmetricPass, SymmetricProduct>(),
};

}  // namespace hessreg::hvp::HESSREG_ISA
