#include <stdexcept>
#include <type_traits>

#include "../common/cuda_compat.cuh"
#include "chain.cuh"
#include "hvp_cuda.h"
#include "product.cuh"

namespace hessreg::hvp::cuda {
namespace {

constexpr int64_t kMaxBlocks = 0x7fffffff;
constexpr int64_t kMultiprocessors = 132;  // of a large GPU
constexpr int64_t kTargetBlocks = 2 * kMultiprocessors;
constexpr int64_t kLeastDepth = 256;  // of a part, if a product is split
constexpr int64_t kLargeTile = 64, kSmallTile = 32;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t size_of(Element element) { return element == Element::kFloat64 ? 8 : 4; }

unsigned grid_size(int64_t blocks) {
  if (blocks > kMaxBlocks) throw std::invalid_argument("hvp: too many rows");
  return static_cast<unsigned>(blocks);
}

template <typename Body>
void dispatch(Element element, Body body) {
  return element == Element::kFloat64 ? body(double{}) : body(float{});
}

// ---- Launching products

int64_t tiles_of(const Product& p) { return p.row_tiles * p.column_tiles; }

int64_t blocks_of(const Group& group, const Product& p) {
  return group.directions * tiles_of(p) * p.splits;
}

// The sums over rows need a tile even where there are no columns.
void cut_tiles(Group& group, int64_t tile) {
  for (int64_t i = 0; i < group.count; ++i) {
    Product& p = group.products[i];
    p.row_tiles = ceil_div(p.rows, tile);
    p.column_tiles = p.columns == 0 && p.row_sums ? 1 : ceil_div(p.columns, tile);
    p.splits = 1;
    p.depth_of_split = p.depth;
  }
}

int64_t total_blocks(const Group& group) {
  int64_t blocks = 0;
  for (int64_t i = 0; i < group.count; ++i) blocks += blocks_of(group, group.products[i]);
  return blocks;
}

// Cuts the products into tiles, large ones if there is one for each multiprocessor; returns their
// size.
int64_t cut(Group& group) {
  cut_tiles(group, kLargeTile);
  if (total_blocks(group) >= kMultiprocessors) return kLargeTile;
  cut_tiles(group, kSmallTile);
  return kSmallTile;
}

// Splits the depth of products that have few tiles.
void split(Group& group) {
  for (int64_t i = 0; i < group.count; ++i) {
    Product& p = group.products[i];
    const int64_t blocks = blocks_of(group, p);
    if (blocks == 0) continue;
    const int64_t room = kTargetBlocks / blocks, most = p.depth / kLeastDepth;
    const int64_t splits = room < most ? room : most;
    if (splits < 2) continue;
    p.depth_of_split = ceil_div(ceil_div(p.depth, splits), kDepth) * kDepth;
    p.splits = ceil_div(p.depth, p.depth_of_split);
  }
}

int64_t partial_elements(const Group& group, const Product& p) {
  return p.splits > 1 ? p.splits * group.directions * p.partial_size() : 0;
}

int64_t partial_elements(const Group& group) {
  int64_t elements = 0;
  for (int64_t i = 0; i < group.count; ++i) elements += partial_elements(group, group.products[i]);
  return elements;
}

template <typename C>
void place_partials(Group& group, C* scratch) {
  for (int64_t i = 0; i < group.count; ++i) {
    group.products[i].partials = scratch;
    scratch += partial_elements(group, group.products[i]);
  }
}

// Gives each product as many of the blocks as it needs; returns how many there are.
template <typename Need>
int64_t place_blocks(Group& group, Need need) {
  int64_t blocks = 0;
  for (int64_t i = 0; i < group.count; ++i) {
    group.products[i].first_block = blocks;
    blocks += need(group.products[i]);
  }
  return blocks;
}

template <typename C, bool kSymmetric>
void launch_tiles(Group& group, int64_t tile, cuda_stream stream) {
  const int64_t blocks = place_blocks(group, [&](const Product& p) { return blocks_of(group, p); });
  if (blocks == 0) return;
  const dim3 grid(grid_size(blocks)), block(kThreads);
  if (tile == kLargeTile) {
    HESSREG_LAUNCH((product_kernel<C, kLargeTile, kSymmetric>), grid, block, 0, stream, group);
  } else {
    HESSREG_LAUNCH((product_kernel<C, kSmallTile, kSymmetric>), grid, block, 0, stream, group);
  }
}

template <typename C>
void combine(Group& group, cuda_stream stream) {
  const int64_t blocks = place_blocks(group, [&](const Product& p) {
    return p.splits > 1 ? ceil_div(group.directions * p.partial_size(), kCombined) : 0;
  });
  if (blocks == 0) return;
  HESSREG_LAUNCH((combine_kernel<C>), dim3(grid_size(blocks)), dim3(kThreads), 0, stream, group);
}

// Products that are stored as they are: partial sums are possible.
template <typename C, bool kSymmetric>
void launch_sums(Group& group, C* scratch, cuda_stream stream) {
  const int64_t tile = cut(group);
  split(group);
  place_partials(group, scratch);
  launch_tiles<C, kSymmetric>(group, tile, stream);
  combine<C>(group, stream);
}

// ---- Layers

// Pointers into arrays of one element type.
struct At {
  int64_t bytes;
  explicit At(Element element) : bytes(size_of(element)) {}
  const void* operator()(const void* p, int64_t index) const {
    return static_cast<const char*>(p) + index * bytes;
  }
  void* operator()(void* p, int64_t index) const { return static_cast<char*>(p) + index * bytes; }
};

// W, or V of each direction, from its rows or from its columns.
Operand by_rows(const void* weight, const Layer& layer, int64_t direction_stride) {
  return {weight, nullptr, layer.in, 1, direction_stride};
}
Operand by_columns(const void* weight, const Layer& layer, int64_t direction_stride) {
  return {weight, nullptr, 1, layer.in, direction_stride};
}

// Samples of an array [directions, batch, width], or [directions, width, batch] if it is hidden.
Operand given_samples(const void* data, int64_t width, int64_t direction_stride) {
  return {data, nullptr, width, 1, direction_stride};
}
Operand hidden_samples(const void* data, int64_t batch, int64_t direction_stride) {
  return {data, nullptr, 1, batch, direction_stride};
}

Operand transposed(const Operand& x) {
  return {x.data, x.scale, x.depth_stride, x.row_stride, x.direction_stride};
}

Operand direction_weight(const Layer& layer, const void* v, int64_t length, At at) {
  if (layer.weight_offset < 0) return {};
  return by_rows(at(v, layer.weight_offset), layer, length);
}

// What the samples were before a layer.
template <typename Problem>
Operand samples_before(const Problem& p, int64_t l) {
  return l == 0 ? given_samples(p.x, p.network.inputs(), 0)
                : hidden_samples(p.a[l - 1], p.network.batch, 0);
}

template <typename Problem>
bool moves(const Problem& p, int64_t l) {
  return p.u || l >= p.network.first_moving();
}

// Their derivatives, if they have any.
template <typename Problem>
Operand moved_before(const Problem& p, int64_t l) {
  const Network& network = p.network;
  if (!moves(p, l)) return {};
  const int64_t stride = network.layers[l].in * network.batch;
  if (l == 0) return given_samples(p.u, network.inputs(), stride);
  Operand moved = hidden_samples(p.rz[l - 1], network.batch, stride);
  moved.scale = p.first[l - 1];
  return moved;
}

// A term without one of its factors is no term.
Term term_of(const Operand& left, const Operand& right) {
  return left.data && right.data ? Term{left, right} : Term{};
}

Product product_of(int64_t rows, int64_t columns, int64_t depth) {
  Product product{};
  product.rows = rows;
  product.columns = columns;
  product.depth = depth;
  return product;
}

// An output [directions, width, batch] that is kept for other passes, or one [directions, batch,
// width] for the caller.
void write_hidden(Product& product, Finish finish) {
  product.epilogue.finish = finish;
  product.epilogue.row_stride = product.columns;
  product.epilogue.column_stride = 1;
  product.epilogue.direction_stride = product.rows * product.columns;
}
void write_given(Product& product, void* out) {
  product.epilogue.out[0] = out;
  product.epilogue.row_stride = 1;
  product.epilogue.column_stride = product.rows;
  product.epilogue.direction_stride = product.rows * product.columns;
}

int64_t num_steps(const Forward& p) { return p.network.depth; }
int64_t num_steps(const Backward& p) { return p.network.depth - 1; }
int64_t num_steps(const Tangent& p) { return p.network.depth; }
int64_t num_steps(const Adjoint& p) {
  const int64_t steps = p.network.depth - (p.r_input ? 0 : p.network.first_moving());
  return steps < 0 ? 0 : steps;
}

Product step_of(const Forward& p, int64_t l, void*) {
  const Network& network = p.network;
  const Layer& layer = network.layers[l];
  Product step = product_of(layer.out, network.batch, layer.in);
  step.terms[0] = {by_rows(layer.weight, layer, 0), samples_before(p, l)};
  step.epilogue.bias = layer.bias;
  if (l + 1 == network.depth) {
    write_given(step, p.y);
    return step;
  }
  write_hidden(step, Finish::kActivate);
  step.epilogue.activation = p.activations[l];
  step.epilogue.parameter = p.parameters[l];
  step.epilogue.out[0] = p.a[l];
  step.epilogue.out[1] = p.first[l];
  step.epilogue.out[2] = p.second[l];
  step.epilogue.out[3] = p.third ? p.third[l] : nullptr;
  return step;
}

Product step_of(const Backward& p, int64_t i, void*) {
  const Network& network = p.network;
  const int64_t l = network.depth - 1 - i;
  const Layer& layer = network.layers[l];
  Product step = product_of(layer.in, network.batch, layer.out);
  step.terms[0] = {by_columns(layer.weight, layer, 0),
                   i == 0 ? given_samples(p.delta_out, layer.out, 0)
                          : hidden_samples(p.delta[l], network.batch, 0)};
  write_hidden(step, Finish::kBackward);
  step.epilogue.first = p.first[l - 1];
  step.epilogue.second = p.second[l - 1];
  step.epilogue.out[0] = p.delta[l - 1];
  step.epilogue.out[1] = p.s[l - 1];
  if (p.third) {
    step.epilogue.third = p.third[l - 1];
    step.epilogue.out[2] = p.t[l - 1];
  }
  return step;
}

Product step_of(const Tangent& p, int64_t l, void*) {
  const Network& network = p.network;
  const Layer& layer = network.layers[l];
  const At at(network.element);
  Product step = product_of(layer.out, network.batch, layer.in);
  step.terms[0] = term_of(by_rows(layer.weight, layer, 0), moved_before(p, l));
  step.terms[1] = term_of(direction_weight(layer, p.v, p.length, at), samples_before(p, l));
  step.epilogue.bias = layer.bias_offset < 0 ? nullptr : at(p.v, layer.bias_offset);
  step.epilogue.bias_stride = p.length;
  if (l + 1 == network.depth) {
    write_given(step, p.ry);
    return step;
  }
  write_hidden(step, Finish::kTangent);
  step.epilogue.first = p.first[l];
  step.epilogue.out[0] = p.rz[l];
  return step;
}

// R delta of hidden layer l in the scratch memory.
void* r_delta(const Adjoint& p, int64_t l, void* scratch) {
  int64_t before = 0;
  for (int64_t i = 0; i < l; ++i) before += p.network.layers[i].out;
  return At(p.network.element)(scratch, p.directions * p.network.batch * before);
}

Operand r_delta_after(const Adjoint& p, int64_t l, void* scratch) {
  const Network& network = p.network;
  const int64_t width = network.layers[l].out, stride = width * network.batch;
  return l + 1 == network.depth ? given_samples(p.r_delta_out, width, stride)
                                : hidden_samples(r_delta(p, l, scratch), network.batch, stride);
}

Product step_of(const Adjoint& p, int64_t i, void* scratch) {
  const Network& network = p.network;
  const int64_t l = network.depth - 1 - i;
  const Layer& layer = network.layers[l];
  Product step = product_of(layer.in, network.batch, layer.out);
  step.terms[0] = {by_columns(layer.weight, layer, 0), r_delta_after(p, l, scratch)};
  if (!p.gauss_newton) {
    const Operand v = direction_weight(layer, p.v, p.length, At(network.element));
    step.terms[1] = term_of(transposed(v), hidden_samples(p.delta[l], network.batch, 0));
  }
  if (l == 0) {
    write_given(step, p.r_input);
    return step;
  }
  write_hidden(step, Finish::kAdjoint);
  step.epilogue.first = p.first[l - 1];
  if (!p.gauss_newton && moves(p, l)) {
    step.epilogue.s = p.s[l - 1];
    step.epilogue.rz = p.rz[l - 1];
  }
  step.epilogue.out[0] = r_delta(p, l - 1, scratch);
  return step;
}

// ---- Two directions at once, and the second derivative along both

Tangent first_order(const SecondTangent& p) {
  return {p.network, p.x, p.a, p.first, nullptr, p.v, 2, p.length, p.ry, p.rz};
}

Adjoint first_order(const SecondAdjoint& p) {
  return {p.network, p.x, p.a,      p.first,       p.delta, p.s,     p.rz,   nullptr,
          p.v,       2,   p.length, p.r_delta_out, false,   nullptr, nullptr};
}

// What belongs to one direction of an operand.
Operand of_direction(const Operand& x, int64_t j, At at) {
  return {at(x.data, j * x.direction_stride), x.scale, x.row_stride, x.depth_stride, 0};
}

// Whether both directions meet in a layer.
template <typename Problem>
bool meets(const Problem& p, int64_t l) {
  return p.network.layers[l].weight_offset >= 0 && moves(first_order(p), l);
}

// The elements of one direction of what belongs to layers before the l-th.
int64_t elements_before(const Network& network, int64_t l) {
  int64_t widths = 0;
  for (int64_t i = 0; i < l; ++i) widths += network.layers[i].out;
  return network.batch * widths;
}

// R a before a layer that is not the first.
template <typename Problem>
Operand second_before(const Problem& p, int64_t l, int64_t j) {
  const int64_t batch = p.network.batch, size = p.network.layers[l].in * batch;
  return of_direction(hidden_samples(p.ra[l - 1], batch, size), j, At(p.network.element));
}

// V_1 R_2 a + V_2 R_1 a.
Product crossed_step(const SecondTangent& p, int64_t l) {
  const Layer& layer = p.network.layers[l];
  const At at(p.network.element);
  const Operand v = direction_weight(layer, p.v, p.length, at);
  Product step = product_of(layer.out, p.network.batch, layer.in);
  for (int64_t j = 0; j < 2; ++j)
    step.terms[j] = {of_direction(v, j, at), second_before(p, l, 1 - j)};
  return step;
}

Product second_step(const SecondTangent& p, int64_t l) {
  const Layer& layer = p.network.layers[l];
  Product step = product_of(layer.out, p.network.batch, layer.in);
  if (moves(first_order(p), l))
    step.terms[0] = {by_rows(layer.weight, layer, 0), second_before(p, l, 2)};
  if (l + 1 == p.network.depth) return step;
  step.epilogue.finish = Finish::kSecondTangent;
  step.epilogue.first = p.first[l];
  step.epilogue.second = p.second[l];
  step.epilogue.rz = p.rz[l];
  step.epilogue.out[1] = p.ra[l];
  return step;
}

// Where R_12 of a layer goes: it is the last of three.
void write_second(const SecondTangent& p, int64_t l, Product& step) {
  const At at(p.network.element);
  const int64_t place = 2 * step.rows * step.columns;
  if (l + 1 == p.network.depth) {
    write_given(step, at(p.ry, place));
  } else {
    write_hidden(step, step.epilogue.finish);
    step.epilogue.out[0] = at(p.rz[l], place);
  }
}

// In the scratch memory: R_j delta and R_j g of all hidden layers, then R_12 delta.
void* r_g(const SecondAdjoint& p, int64_t l, void* scratch) {
  const int64_t all = 2 * elements_before(p.network, p.network.depth - 1);
  return At(p.network.element)(scratch, all + 2 * elements_before(p.network, l));
}
void* r_12_delta(const SecondAdjoint& p, int64_t l, void* scratch) {
  const int64_t all = 4 * elements_before(p.network, p.network.depth - 1);
  return At(p.network.element)(scratch, all + elements_before(p.network, l));
}

Operand second_after(const SecondAdjoint& p, int64_t l, int64_t j, void* scratch) {
  const At at(p.network.element);
  if (j < 2) return of_direction(r_delta_after(first_order(p), l, scratch), j, at);
  const int64_t width = p.network.layers[l].out, batch = p.network.batch;
  return l + 1 == p.network.depth ? given_samples(at(p.r_delta_out, 2 * width * batch), width, 0)
                                  : hidden_samples(r_12_delta(p, l, scratch), batch, 0);
}

int64_t num_steps(const SecondAdjoint& p) { return num_steps(first_order(p)); }

// Those of the first order, which leave R_j g too.
Product step_of(const SecondAdjoint& p, int64_t i, void* scratch) {
  Product step = step_of(first_order(p), i, scratch);
  step.epilogue.out[1] = r_g(p, p.network.depth - 2 - i, scratch);
  return step;
}

// V_1' R_2 delta + V_2' R_1 delta.
Product crossed_step(const SecondAdjoint& p, int64_t l, void* scratch) {
  const Layer& layer = p.network.layers[l];
  const At at(p.network.element);
  const Operand v = transposed(direction_weight(layer, p.v, p.length, at));
  Product step = product_of(layer.in, p.network.batch, layer.out);
  for (int64_t j = 0; j < 2; ++j)
    step.terms[j] = {of_direction(v, j, at), second_after(p, l, 1 - j, scratch)};
  write_hidden(step, Finish::kStore);
  step.epilogue.out[0] = r_12_delta(p, l - 1, scratch);
  return step;
}

Product second_step(const SecondAdjoint& p, int64_t l, void* scratch) {
  const Layer& layer = p.network.layers[l];
  Product step = product_of(layer.in, p.network.batch, layer.out);
  step.terms[0] = {by_columns(layer.weight, layer, 0), second_after(p, l, 2, scratch)};
  write_hidden(step, Finish::kSecondAdjoint);
  Epilogue& e = step.epilogue;
  e.out[0] = r_12_delta(p, l - 1, scratch);
  if (layer.weight_offset >= 0) e.added = e.out[0];
  e.first = p.first[l - 1];
  e.second = p.second[l - 1];
  e.s = p.s[l - 1];
  e.t = p.t[l - 1];
  e.rz = p.rz[l - 1];
  e.rg = r_g(p, l - 1, scratch);
  return step;
}

int64_t directions_of(const SecondAdjoint&) { return 2; }
int64_t directions_of(const Forward&) { return 1; }
int64_t directions_of(const Backward&) { return 1; }
int64_t directions_of(const Tangent& p) { return p.directions; }
int64_t directions_of(const Adjoint& p) { return p.directions; }

// ---- All layers at once

int take(int64_t elements, int64_t& used) {
  const int64_t before = used;
  used += elements;
  return static_cast<int>(before);
}

// Where the arrays of a step lie in shared memory, from `used` on.
template <typename C>
void place_step(Chain& chain, int64_t i, int64_t& used) {
  const Product& step = chain.steps[i];
  for (int t = 0; t < 2; ++t)
    if (step.terms[t].left.data)
      chain.left[i][t] = take(step.depth * left_stride<C>(step.rows), used);
  if (step.terms[1].left.data) chain.right[i] = take(step.depth * kSamples, used);
}

// What shared memory a chain takes, in bytes.
template <typename C>
int64_t place(Chain& chain) {
  int64_t used = 0, widest = chain.input_rows;
  for (int64_t i = 0; i < chain.count; ++i) {
    place_step<C>(chain, i, used);
    widest = chain.steps[i].rows > widest ? chain.steps[i].rows : widest;
  }
  for (int& passed : chain.passed) passed = take(padded_rows(widest) * kSamples, used);
  return used * int64_t{sizeof(C)};
}

template <typename Problem>
bool is_small(const Problem& p) {
  const int64_t steps = num_steps(p);
  bool small = steps > 1 && steps <= kMaxSteps && p.network.inputs() <= kMaxWidth;
  for (int64_t l = 0; small && l < p.network.depth; ++l)
    small = p.network.layers[l].out <= kMaxWidth;
  return small;
}

template <typename Problem>
Chain chain_of(const Problem& p, void* scratch) {
  Chain chain{};
  chain.count = num_steps(p);
  chain.directions = directions_of(p);
  chain.samples = p.network.batch;
  for (int64_t i = 0; i < chain.count; ++i) chain.steps[i] = step_of(p, i, scratch);
  chain.input = chain.steps[0].terms[0].right;
  chain.input_rows = chain.steps[0].depth;
  const int64_t tiles = ceil_div(chain.samples, kSamples);
  const int64_t room = ceil_div(kTargetBlocks, chain.directions < 1 ? 1 : chain.directions);
  chain.blocks_of_direction = tiles < room ? tiles : room;
  return chain;
}

// ---- Passes

template <typename C>
void launch_step(Product step, int64_t directions, cuda_stream stream) {
  // The next launch takes the factor from where it is.
  if (step.epilogue.finish == Finish::kTangent) step.epilogue.finish = Finish::kStore;
  Group group{};
  group.products[0] = step;
  group.count = 1;
  group.directions = directions;
  const int64_t tile = cut(group);
  launch_tiles<C, false>(group, tile, stream);
}

template <typename C>
void launch_transposition(const void* in, void* out, int64_t rows, int64_t columns,
                          cuda_stream stream) {
  const int64_t blocks = ceil_div(rows, 32) * ceil_div(columns, 32);
  if (blocks == 0) return;
  HESSREG_LAUNCH((transpose_kernel<C>), dim3(grid_size(blocks)), dim3(kThreads), 0, stream,
                 static_cast<const C*>(in), static_cast<C*>(out), rows, columns);
}

// Where a pass leaves its input once more, if it does.
template <typename Problem>
void* copy_of(const Problem&) {
  return nullptr;
}
void* copy_of(const Backward& p) { return p.delta[p.network.depth - 1]; }

// The layers of a pass; whether in one launch.
template <typename C, typename Problem>
bool launch_chain(const Problem& p, void* scratch, cuda_stream stream) {
  if (!is_small(p)) return false;
  Chain chain = chain_of(p, scratch);
  chain.copy = copy_of(p);
  const int64_t bytes = place<C>(chain);
  if (bytes > max_shared_bytes()) return false;
  const int64_t blocks = chain.directions * chain.blocks_of_direction;
  if (blocks == 0) return true;
  HESSREG_LAUNCH((chain_kernel<C>), dim3(grid_size(blocks)), dim3(kThreads), bytes, stream, chain);
  return true;
}

template <typename C, typename Problem>
void launch_layers(const Problem& p, void* scratch, cuda_stream stream) {
  if (launch_chain<C>(p, scratch, stream)) return;
  for (int64_t i = 0; i < num_steps(p); ++i)
    launch_step<C>(step_of(p, i, scratch), directions_of(p), stream);
  if constexpr (std::is_same_v<Problem, Backward>)
    launch_transposition<C>(p.delta_out, copy_of(p), p.network.batch, p.network.outputs(), stream);
}

template <typename Problem>
void launch_pass(const Problem& p, void* scratch, void* stream) {
  dispatch(p.network.element, [&](auto zero) {
    launch_layers<decltype(zero)>(p, scratch, static_cast<cuda_stream>(stream));
  });
}

// ---- Derivatives in the weights

void write_weight(const Layer& layer, void* result, int64_t length, At at, Product& product) {
  product.epilogue.out[0] = at(result, layer.weight_offset);
  product.epilogue.row_stride = layer.in;
  product.epilogue.column_stride = 1;
  product.epilogue.direction_stride = length;
}

Product gradient_of(const Adjoint& p, int64_t l, void* scratch) {
  const Network& network = p.network;
  const Layer& layer = network.layers[l];
  const At at(network.element);
  const bool has_weight = layer.weight_offset >= 0;
  Product product = product_of(layer.out, has_weight ? layer.in : 0, network.batch);
  product.terms[0] = {transposed(r_delta_after(p, l, scratch)), transposed(samples_before(p, l))};
  if (!p.gauss_newton && has_weight)
    product.terms[1] = term_of(transposed(hidden_samples(p.delta[l], network.batch, 0)),
                               transposed(moved_before(p, l)));
  if (has_weight) write_weight(layer, p.result, p.length, at, product);
  if (layer.bias_offset >= 0) product.row_sums = at(p.result, layer.bias_offset);
  product.epilogue.direction_stride = p.length;  // of the sums too
  return product;
}

// R_2 delta R_1 a' + R_1 delta R_2 a'.
Product crossed_gradient(const SecondAdjoint& p, int64_t l, void* scratch) {
  const Layer& layer = p.network.layers[l];
  Product product = product_of(layer.out, layer.in, p.network.batch);
  for (int64_t j = 0; j < 2; ++j)
    product.terms[j] = {transposed(second_after(p, l, 1 - j, scratch)),
                        transposed(second_before(p, l, j))};
  write_weight(layer, p.result, p.length, At(p.network.element), product);
  return product;
}

// R_12 delta a' + delta R_12 a', and what is there already.
Product second_gradient(const SecondAdjoint& p, int64_t l, void* scratch) {
  const Layer& layer = p.network.layers[l];
  const At at(p.network.element);
  const bool has_weight = layer.weight_offset >= 0;
  Product product = product_of(layer.out, has_weight ? layer.in : 0, p.network.batch);
  product.terms[0] = {transposed(second_after(p, l, 2, scratch)), transposed(samples_before(p, l))};
  if (meets(p, l))
    product.terms[1] = {transposed(hidden_samples(p.delta[l], p.network.batch, 0)),
                        transposed(second_before(p, l, 2))};
  if (has_weight) write_weight(layer, p.result, p.length, at, product);
  if (meets(p, l)) product.epilogue.added = product.epilogue.out[0];
  if (layer.bias_offset >= 0) product.row_sums = at(p.result, layer.bias_offset);
  return product;
}

// The products of the layers from `next` on that fit in one launch, of those layers that have one;
// next becomes the first of the others.
template <typename Has, typename Make>
Group group_from(const Network& network, int64_t directions, int64_t& next, Has has, Make make) {
  Group group{};
  group.directions = directions;
  for (; next < network.depth && group.count < kMaxProducts; ++next)
    if (has(next)) group.products[group.count++] = make(next);
  return group;
}

template <typename Problem>
bool has_gradient(const Problem& p, int64_t l) {
  return p.network.layers[l].weight_offset >= 0 || p.network.layers[l].bias_offset >= 0;
}

// Calls use(group) for the products that give a result, launch by launch.
template <typename Use>
void each_group(const Adjoint& p, void* scratch, Use use) {
  for (int64_t next = 0; next < p.network.depth;)
    use(group_from(
        p.network, p.directions, next, [&](int64_t l) { return has_gradient(p, l); },
        [&](int64_t l) { return gradient_of(p, l, scratch); }));
}

template <typename Use>
void each_group(const SecondAdjoint& p, void* scratch, Use use) {
  for (int64_t next = 0; next < p.network.depth;)
    use(group_from(
        p.network, 1, next, [&](int64_t l) { return meets(p, l); },
        [&](int64_t l) { return crossed_gradient(p, l, scratch); }));
  for (int64_t next = 0; next < p.network.depth;)
    use(group_from(
        p.network, 1, next, [&](int64_t l) { return has_gradient(p, l); },
        [&](int64_t l) { return second_gradient(p, l, scratch); }));
}

// What a pass leaves of hidden layers in the scratch memory.
int64_t hidden_elements(const Adjoint& p) {
  return p.directions * elements_before(p.network, p.network.depth - 1);
}
int64_t hidden_elements(const SecondAdjoint& p) {
  return 5 * elements_before(p.network, p.network.depth - 1);
}

Group group_of(const SymmetricProduct& p) {
  Group group{};
  group.count = 1;
  group.directions = p.batch;
  Product& product = group.products[0];
  product = product_of(p.n, p.columns, p.n);
  product.terms[0] = {{p.a, nullptr, p.n, 1, p.n * p.n},
                      {p.v, nullptr, 1, p.columns, p.n * p.columns}};
  product.epilogue.out[0] = p.out;
  product.epilogue.row_stride = p.columns;
  product.epilogue.column_stride = 1;
  product.epilogue.direction_stride = p.n * p.columns;
  return group;
}

int64_t elements_of_sums(Group group) {
  cut(group);
  split(group);
  return partial_elements(group);
}

template <typename Problem>
int64_t bytes_with_partials(const Problem& p) {
  int64_t partials = 0;
  each_group(p, nullptr, [&](const Group& group) {
    const int64_t elements = elements_of_sums(group);
    partials = elements > partials ? elements : partials;
  });
  return (hidden_elements(p) + partials) * size_of(p.network.element);
}

template <typename C, typename Problem>
void launch_gradients(const Problem& p, void* scratch, void* stream) {
  C* partials = static_cast<C*>(scratch) + hidden_elements(p);
  each_group(p, scratch, [&](Group group) {
    launch_sums<C, false>(group, partials, static_cast<cuda_stream>(stream));
  });
}

}  // namespace

int64_t scratch_bytes(const Forward&) { return 0; }
int64_t scratch_bytes(const Backward&) { return 0; }
int64_t scratch_bytes(const Tangent&) { return 0; }

int64_t scratch_bytes(const Adjoint& p) { return bytes_with_partials(p); }
int64_t scratch_bytes(const SecondTangent&) { return 0; }
int64_t scratch_bytes(const SecondAdjoint& p) { return bytes_with_partials(p); }

int64_t scratch_bytes(const SymmetricProduct& p) {
  return elements_of_sums(group_of(p)) * size_of(p.element);
}

void forward(const Forward& problem, void* scratch, void* stream) {
  launch_pass(problem, scratch, stream);
}

void backward(const Backward& problem, void* scratch, void* stream) {
  launch_pass(problem, scratch, stream);
}

void tangent(const Tangent& problem, void* scratch, void* stream) {
  launch_pass(problem, scratch, stream);
}

void adjoint(const Adjoint& problem, void* scratch, void* stream) {
  launch_pass(problem, scratch, stream);
  dispatch(problem.network.element,
           [&](auto zero) { launch_gradients<decltype(zero)>(problem, scratch, stream); });
}

void second_tangent(const SecondTangent& problem, void* scratch, void* stream) {
  launch_pass(first_order(problem), scratch, stream);
  dispatch(problem.network.element, [&](auto zero) {
    for (int64_t l = 0; l < problem.network.depth; ++l) {
      Product last = second_step(problem, l);
      write_second(problem, l, last);
      if (meets(problem, l)) {
        Product crossed = crossed_step(problem, l);
        write_second(problem, l, crossed);
        launch_step<decltype(zero)>(crossed, 1, static_cast<cuda_stream>(stream));
        last.epilogue.added = last.epilogue.out[0];
      }
      launch_step<decltype(zero)>(last, 1, static_cast<cuda_stream>(stream));
    }
  });
}

void second_adjoint(const SecondAdjoint& problem, void* scratch, void* stream) {
  launch_pass(problem, scratch, stream);
  dispatch(problem.network.element, [&](auto zero) {
    using C = decltype(zero);
    const auto on = static_cast<cuda_stream>(stream);
    for (int64_t i = 0; i < num_steps(problem); ++i) {
      const int64_t l = problem.network.depth - 1 - i;
      if (problem.network.layers[l].weight_offset >= 0)
        launch_step<C>(crossed_step(problem, l, scratch), 1, on);
      launch_step<C>(second_step(problem, l, scratch), 1, on);
    }
    launch_gradients<C>(problem, scratch, stream);
  });
}

void symmetric_product(const SymmetricProduct& problem, void* scratch, void* stream) {
  dispatch(problem.element, [&](auto zero) {
    using C = decltype(zero);
    Group group = group_of(problem);
    launch_sums<C, true>(group, static_cast<C*>(scratch), static_cast<cuda_stream>(stream));
  });
}

}  // namespace hessreg::hvp::cuda
