#pragma once
// What every kernel for Hessian-vector products shares: the passes through a multilayer perceptron
// and their arguments, and the mathematics of one unit. No torch, no CUDA runtime.
//
// Layers l = 1 ... L: z_l = W_l a_{l-1} + b_l, a_l = f(z_l), a_0 = x, and the output y = z_L. With
// delta_L the gradient of the loss in y: g_l = W_{l+1}' delta_{l+1}, delta_l = f'(z_l) o g_l,
// s_l = f''(z_l) o g_l. R is the derivative along a direction: V_l in W_l, c_l in b_l, u in x.
//
// Arrays are contiguous. What a caller gives or gets of a network is [batch, width]; what one pass
// keeps for another is [width, batch], so that a product with W_l needs no transposed operand.
#include "../common/element.h"

namespace hessreg::hvp {

enum class Activation : int64_t {
  kIdentity,
  kTanh,
  kSigmoid,
  kSoftplus,  // parameter: beta
  kSilu,
  kGelu,
  kGeluTanh,
  kRelu,
  kLeakyRelu,  // parameter: slope
  kElu,        // parameter: alpha
};
constexpr int64_t kNumActivations = 10;

struct Layer {
  const void* weight;  // [out, in]
  const void* bias;    // [out], or null
  int64_t in, out;
  int64_t weight_offset;  // where V_l lies in a flat vector, row after row; -1: there is none
  int64_t bias_offset;    // where c_l lies; -1: there is none
};

struct Network {
  const Layer* layers;
  int64_t depth;  // L
  int64_t batch;
  Element element;  // float32 or float64

  HESSREG_HD int64_t inputs() const { return layers[0].in; }
  HESSREG_HD int64_t outputs() const { return layers[depth - 1].out; }

  // The first layer that directions move; depth + 1: none. What is before it has no derivatives.
  HESSREG_HD int64_t first_moving() const {
    int64_t l = 1;
    while (l <= depth && layers[l - 1].weight_offset < 0 && layers[l - 1].bias_offset < 0) ++l;
    return l;
  }
};

// y and what the other passes need of each hidden layer. The lists hold layers 1 ... L - 1.
struct Forward {
  Network network;
  const void* x;                  // [batch, n_0]
  const Activation* activations;  // on the host
  const double* parameters;
  void* y;              // [batch, n_L]
  void* const* a;       // [n_l, batch]: f(z_l)
  void* const* first;   // [n_l, batch]: f'(z_l)
  void* const* second;  // [n_l, batch]: f''(z_l)
  void* const* third;   // [n_l, batch]: f'''(z_l); or null: not wanted
};

// delta_l for layers 1 ... L; s_l, and t_l = f'''(z_l) o g_l if f''' is there, for 1 ... L - 1.
struct Backward {
  Network network;
  const void* const* first;
  const void* const* second;
  const void* const* third;  // or null
  const void* delta_out;     // [batch, n_L]
  void* const* delta;        // [n_l, batch]
  void* const* s;            // [n_l, batch]
  void* const* t;            // [n_l, batch]
};

// Rz_l = W_l Ra_{l-1} + V_l a_{l-1} + c_l with Ra_l = f'(z_l) o Rz_l, for several directions.
struct Tangent {
  Network network;
  const void* x;
  const void* const* a;
  const void* const* first;
  const void* u;  // [directions, batch, n_0], or null: x stays
  const void* v;  // [directions, length]
  int64_t directions, length;
  void* ry;         // [directions, batch, n_L]
  void* const* rz;  // [directions, n_l, batch], layers 1 ... L - 1
};

// Rg_l = W_{l+1}' R delta_{l+1} + V_{l+1}' delta_{l+1}, R delta_l = f'(z_l) o Rg_l + s_l o Rz_l,
// and the results R delta_l a_{l-1}' + delta_l Ra_{l-1}' for W_l, the sum of R delta_l over the
// batch for b_l, and Rg_0 for x. A Gauss-Newton product has only the first term of each: delta, s,
// rz, u and v are not read.
struct Adjoint {
  Network network;
  const void* x;
  const void* const* a;
  const void* const* first;
  const void* const* delta;  // layers 1 ... L
  const void* const* s;
  const void* const* rz;
  const void* u;
  const void* v;
  int64_t directions, length;
  const void* r_delta_out;  // [directions, batch, n_L]
  bool gauss_newton;
  void* result;   // [directions, length]; written where an offset points, and only there
  void* r_input;  // [directions, batch, n_0], or null: not wanted
};

// For two directions, R_1 and R_2 and both of them, R_12 = R_1 R_2, of z_l and a_l:
// R_12 z_l = W_l R_12 a_{l-1} + V_1l R_2 a_{l-1} + V_2l R_1 a_{l-1},
// R_12 a_l = f''(z_l) o R_1 z_l o R_2 z_l + f'(z_l) o R_12 z_l. x stays.
// On the CPU there may be one direction only. Then R_2 is left out, and R_11 / 2 stands for R_12: a
// Taylor coefficient, R_11 z_l / 2 = W_l R_11 a_{l-1} / 2 + V_1l R_1 a_{l-1}, in as many products
// as R_1 takes.
struct SecondTangent {
  Network network;
  const void* x;
  const void* const* a;
  const void* const* first;
  const void* const* second;
  const void* v;  // [directions, length]
  int64_t directions, length;
  void* ry;         // [directions + 1, batch, n_L]: R_1, R_2, R_12
  void* const* rz;  // [directions + 1, n_l, batch], layers 1 ... L - 1
  void* const* ra;  // likewise
};

// R_j g_l and R_j delta_l as for a product, j = 1, 2, and
// R_12 g_l = W_{l+1}' R_12 delta_{l+1} + V_1' R_2 delta_{l+1} + V_2' R_1 delta_{l+1},
// R_12 delta_l = f'(z_l) o R_12 g_l + f''(z_l) o (R_1 z_l o R_2 g_l + R_2 z_l o R_1 g_l)
//                + s_l o R_12 z_l + t_l o R_1 z_l o R_2 z_l.
// The results are R_12 of the gradient: R_12 delta_l a_{l-1}' + R_1 delta_l R_2 a_{l-1}'
// + R_2 delta_l R_1 a_{l-1}' + delta_l R_12 a_{l-1}' for W_l, and the sum of R_12 delta_l over the
// batch for b_l.
struct SecondAdjoint {
  Network network;
  const void* x;
  const void* const* a;
  const void* const* first;
  const void* const* second;
  const void* const* delta;  // layers 1 ... L
  const void* const* s;
  const void* const* t;
  const void* const* rz;
  const void* const* ra;
  const void* v;
  int64_t directions, length;
  const void* r_delta_out;  // [directions + 1, batch, n_L]
  void* result;             // [length]; written where an offset points, and only there
};

// out = A v for symmetric A, of which the lower triangle is read.
struct SymmetricProduct {
  const void* a;  // [batch, n, n]
  const void* v;  // [batch, n, columns]
  void* out;      // [batch, n, columns]
  int64_t batch, n, columns;
  Element element;
};

// ---- one unit ----------------------------------------------------------------------------------

template <typename V>
struct Jet {
  V value, first, second, third;
};

// The functions that activations are made of, of one number.
template <typename T>
struct ScalarMath {
  using Scalar = T;
  HESSREG_HD static T exp(T z) { return std::exp(z); }
  HESSREG_HD static T expm1(T z) { return std::expm1(z); }
  HESSREG_HD static T log1p(T z) { return std::log1p(z); }
  HESSREG_HD static T tanh(T z) { return std::tanh(z); }
  HESSREG_HD static T erf(T z) { return std::erf(z); }
};

template <typename Math, typename V>
HESSREG_HD V magnitude(V z) {
  return z < 0 ? -z : z;
}

template <typename Math, typename V>
HESSREG_HD Jet<V> tanh_jet(V z) {
  const V t = Math::tanh(z), first = 1 - t * t;
  return {t, first, -2 * t * first, first * (4 - 6 * first)};
}

// From exp(-|z|), so that the derivatives keep their digits where the value is next to 1.
template <typename Math, typename V>
HESSREG_HD Jet<V> sigmoid_jet(V z) {
  const V e = Math::exp(-magnitude<Math>(z)), q = 1 / (1 + e);
  const V first = e * q * q, fall = (1 - e) * q;
  return {z < 0 ? e * q : q, first, first * (z < 0 ? fall : -fall), first * (1 - 6 * first)};
}

template <typename Math, typename V>
HESSREG_HD Jet<V> softplus_jet(V z, typename Math::Scalar beta) {
  const V t = z * beta, zero = t - t;
  const Jet<V> slope = sigmoid_jet<Math>(t);
  const V value = (t < 0 ? zero : t) + Math::log1p(Math::exp(-magnitude<Math>(t)));
  return {value / beta, slope.value, slope.first * beta, slope.second * (beta * beta)};
}

template <typename Math, typename V>
HESSREG_HD Jet<V> silu_jet(V z) {
  const Jet<V> gate = sigmoid_jet<Math>(z);
  return {z * gate.value, gate.value + z * gate.first, 2 * gate.first + z * gate.second,
          3 * gate.second + z * gate.third};
}

template <typename Math, typename V>
HESSREG_HD Jet<V> gelu_jet(V z) {
  using T = typename Math::Scalar;
  const V share = T(0.5) * (1 + Math::erf(z * T(0.70710678118654752)));
  const V density = T(0.39894228040143268) * Math::exp(T(-0.5) * z * z);
  return {z * share, share + z * density, (2 - z * z) * density, z * density * (z * z - 4)};
}

// z times the sigmoid of an odd cubic: half of 1 + tanh, without cancellation where z is negative.
template <typename Math, typename V>
HESSREG_HD Jet<V> gelu_tanh_jet(V z) {
  using T = typename Math::Scalar;
  constexpr T kScale = T(1.5957691216057308), kCube = T(0.044715);
  const V slope = kScale * (1 + 3 * kCube * z * z), bend = 6 * kScale * kCube * z;
  const Jet<V> gate = sigmoid_jet<Math>(kScale * (z + kCube * z * z * z));
  const V first = gate.first * slope, second = gate.second * slope * slope + gate.first * bend;
  const V third = gate.third * slope * slope * slope + 3 * gate.second * slope * bend +
                  6 * kScale * kCube * gate.first;
  return {z * gate.value, gate.value + z * first, 2 * first + z * second, 3 * second + z * third};
}

template <typename Math, typename V>
HESSREG_HD Jet<V> elu_jet(V z, typename Math::Scalar alpha) {
  const V zero = z - z, below = z < 0 ? z : zero, e = alpha * Math::exp(below);
  const V higher = z < 0 ? e : zero;
  return {z > 0 ? z : alpha * Math::expm1(below), z > 0 ? zero + 1 : e, higher, higher};
}

// f, f', f'' and f''' at z; on a kink the derivative that torch takes, with zero for the others.
template <typename Math, typename V>
HESSREG_HD Jet<V> activate(Activation activation, typename Math::Scalar parameter, V z) {
  const V zero = z - z;
  switch (activation) {
    case Activation::kTanh: return tanh_jet<Math>(z);
    case Activation::kSigmoid: return sigmoid_jet<Math>(z);
    case Activation::kSoftplus: return softplus_jet<Math>(z, parameter);
    case Activation::kSilu: return silu_jet<Math>(z);
    case Activation::kGelu: return gelu_jet<Math>(z);
    case Activation::kGeluTanh: return gelu_tanh_jet<Math>(z);
    case Activation::kRelu: return {z > 0 ? z : zero, z > 0 ? zero + 1 : zero, zero, zero};
    case Activation::kLeakyRelu:
      return {z > 0 ? z : parameter * z, z > 0 ? zero + 1 : zero + parameter, zero, zero};
    case Activation::kElu: return elu_jet<Math>(z, parameter);
    default: return {z, zero + 1, zero, zero};
  }
}

}  // namespace hessreg::hvp
