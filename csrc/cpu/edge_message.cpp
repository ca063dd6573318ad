// Compiled once for each SIMD level, like cpu/segment.cpp. Derivations are in docs/kernels.md.
#include "cpu/edge_message.h"

#include "cpu/jet.h"

namespace megagnn::cpu::MEGAGNN_SIMD {
namespace {

// t(d), the factor of r in the vector branch, and its derivatives.
template <class T>
struct ScalarJet {
  T value, first, second;
};

template <class T>
inline ScalarJet<T> direction_factor(int direction, T d) {
  if (direction == kVector) return {T(1), T(0), T(0)};
  const T u = T(1) / (direction == kUnit ? d : d + T(1));
  return {u, -u * u, T(2) * u * u * u};
}

template <class T>
inline T square_root(T x) {
  if constexpr (sizeof(T) == 4) {
    return __builtin_sqrtf(x);
  } else {
    return __builtin_sqrt(x);
  }
}

template <class T>
inline T hyperbolic_tangent(T x) {
  if constexpr (sizeof(T) == 4) {
    return __builtin_tanhf(x);
  } else {
    return __builtin_tanh(x);
  }
}

template <class T>
inline T dot3(const T* a, const T* b) {
  return a[0] * b[0] + a[1] * b[1] + a[2] * b[2];
}

// Features of the distance d and their first two derivatives, a vector of features at a time.
template <class T>
inline __attribute__((always_inline)) Jet<T> features(const EdgeProblem<T>& in, T d, Vec<T> centres) {
  if (in.feature == kBessel) {
    const T inverse = T(1) / d;
    const SinCos<T> wave = sin_cos<T>(centres * d);
    const Vec<T> value = wave.sin * (in.cutoff * inverse);
    const Vec<T> first = (centres * wave.cos * in.cutoff - value) * inverse;
    return {value, first, -centres * centres * value - T(2) * inverse * first};
  }
  const Vec<T> offset = (d - centres) * (T(1) / in.spread);
  const Vec<T> value = exponential(T(-0.5) * offset * offset), first = -offset * value * (T(1) / in.spread);
  return {value, first, (offset * offset - T(1)) * value * (T(1) / (in.spread * in.spread))};
}

// The two features that are the distance itself, or |r|^2 = d^2 - epsilon^2.
template <class T>
inline ScalarJet<T> plain_feature(const EdgeProblem<T>& in, T d) {
  if (in.feature == kDistance) return {d, T(1), T(0)};
  return {d * d - in.epsilon2, T(2) * d, T(2)};
}

template <class T, bool PAIR>
void radial(const EdgeProblem<T>& in, const EdgeBlock<T>& block) {
  for (int64_t k = 0; k < block.count; ++k) {
    const T* r = in.r[0] + 3 * (block.begin + k);
    const T d = square_root(dot3(r, r) + in.epsilon2);
    const T d_t = PAIR ? dot3(r, in.r[1] + 3 * (block.begin + k)) / d : T(0);
    block.d[0][k] = d;
    if (PAIR) block.d[1][k] = d_t;
    T* rho = block.rho + k * in.radial;
    T* rho_t = rho + block.count * in.radial;
    if (in.feature == kDistance || in.feature == kSquared) {
      const ScalarJet<T> jet = plain_feature(in, d);
      rho[0] = in.feature == kSquared ? dot3(r, r) : jet.value;
      if (PAIR) rho_t[0] = jet.first * d_t;
      continue;
    }
    for_columns<T>(in.radial, [&](int64_t c, auto lanes) {
      const Jet<T> jet = features(in, d, load(in.centres + c, lanes));
      store(rho + c, jet.value, lanes);
      if (PAIR) store(rho_t + c, Vec<T>(jet.first * d_t), lanes);
    });
  }
}

template <class T, class Lanes>
inline __attribute__((always_inline)) void add_row(T* to, Vec<T> x, Lanes lanes) {
  store(to, load(to, lanes) + x, lanes);
}

constexpr int64_t kAhead = 4;  // edges whose source row is fetched before its turn: sources are in no order

template <class T, bool PAIR>
inline void prefetch_source(const EdgeProblem<T>& in, const EdgeBlock<T>& block, int64_t k) {
  if (k + kAhead >= block.count) return;
  const int64_t from = in.source[block.begin + k + kAhead] * in.hidden;
  for (int64_t c = 0; c < in.hidden; c += 64 / int64_t(sizeof(T))) {
    __builtin_prefetch(in.q[0] + from + c);
    if (PAIR) __builtin_prefetch(in.q[1] + from + c);
  }
}

// Pointers are taken out of the structs before a loop: its stores might, for all the compiler knows, change
// them, and it would read each again for every vector.
template <class T, bool PAIR, int ACTIVATION, bool SLOPE>
void before_rows(const EdgeProblem<T>& in, const EdgeBlock<T>& block) {
  const int64_t width = in.hidden, plane = block.count * width;
  T *const z = block.z, *const slope = block.a_slope;
  for (int64_t k = 0; k < block.count; ++k) {
    const int64_t e = block.begin + k, to = in.destination[e] * width, from = in.source[e] * width;
    const T *const a_row = block.a + k * width, *const p = in.p[0] + to, *const q = in.q[0] + from;
    const T *const p_t = PAIR ? in.p[1] + to : nullptr, *const q_t = PAIR ? in.q[1] + from : nullptr;
    prefetch_source<T, PAIR>(in, block, k);
    for_columns<T>(width, [=](int64_t c, auto lanes) {
      const int64_t at = k * width + c;
      const Vec<T> a = load(a_row + c, lanes) + (load(p + c, lanes) + load(q + c, lanes));
      const Jet<T> jet = activate<T, ACTIVATION>(a);
      store(z + at, jet.value, lanes);
      if (SLOPE) store(slope + at, jet.first, lanes);
      if constexpr (PAIR) {
        const Vec<T> a_t = load(a_row + plane + c, lanes) + (load(p_t + c, lanes) + load(q_t + c, lanes));
        store(z + plane + at, Vec<T>(jet.first * a_t), lanes);
        if (SLOPE) store(slope + plane + at, Vec<T>(jet.second * a_t), lanes);
      }
    });
  }
}

template <class T, bool PAIR, int ACTIVATION>
void before(const EdgeProblem<T>& in, const EdgeBlock<T>& block) {
  block.a_slope ? before_rows<T, PAIR, ACTIVATION, true>(in, block)
                : before_rows<T, PAIR, ACTIVATION, false>(in, block);
}

template <class T, bool PAIR, int ACTIVATION, bool SLOPE>
void message_rows(const EdgeProblem<T>& in, const EdgeBlock<T>& block) {
  const int64_t width = in.message, plane = block.count * width;
  const T *const pre = block.c, *const b2 = in.b2;
  T *const message = block.m, *const slope = block.c_slope;
  for (int64_t k = 0; k < block.count; ++k) {
    const int64_t e = block.begin + k, to = in.destination[e] * width;
    const T f = in.f[0] ? in.f[0][e] : T(1), f_t = PAIR && in.f[1] ? in.f[1][e] : T(0);
    T *const sum = in.sum[0] ? in.sum[0] + to : nullptr, *const sum_t = in.sum[1] ? in.sum[1] + to : nullptr;
    for_columns<T>(width, [=](int64_t c, auto lanes) {
      const int64_t at = k * width + c;
      const Jet<T> jet = activate<T, ACTIVATION>(load(pre + at, lanes) + load(b2 + c, lanes));
      if (message) store(message + at, jet.value, lanes);
      if (SLOPE) store(slope + at, jet.first, lanes);
      if (sum) add_row<T>(sum + c, f * jet.value, lanes);
      if constexpr (PAIR) {
        const Vec<T> c_t = load(pre + plane + at, lanes), m_t = jet.first * c_t;
        if (message) store(message + plane + at, m_t, lanes);
        if (SLOPE) store(slope + plane + at, Vec<T>(jet.second * c_t), lanes);
        if (sum_t) add_row<T>(sum_t + c, f * m_t + f_t * jet.value, lanes);
      }
    });
  }
}

template <class T, bool PAIR, int ACTIVATION>
void message(const EdgeProblem<T>& in, const EdgeBlock<T>& block) {
  block.c_slope ? message_rows<T, PAIR, ACTIVATION, true>(in, block)
                : message_rows<T, PAIR, ACTIVATION, false>(in, block);
}

template <class T, bool PAIR, int ACTIVATION, bool SLOPE>
void scalar_rows(const EdgeProblem<T>& in, const EdgeBlock<T>& block) {
  const int64_t width = in.vector, plane = block.count * width;
  const T *const g = block.g, *const b3 = in.b3, *const w4 = in.w4;
  T *const u = block.u, *const slope = block.g_bar;
  for (int64_t k = 0; k < block.count; ++k) {
    Vec<T> sum = {}, sum_t = {};
    for_columns<T>(width, [=, &sum, &sum_t](int64_t c, auto lanes) {
      const int64_t at = k * width + c;
      const Jet<T> jet = activate<T, ACTIVATION>(load(g + at, lanes) + load(b3 + c, lanes));
      const Vec<T> weight = load(w4 + c, lanes);
      sum += weight * jet.value;
      Vec<T> g_t = {}, u_t = {};
      if constexpr (PAIR) {
        g_t = load(g + plane + at, lanes), u_t = jet.first * g_t;
        sum_t += weight * u_t;
      }
      if constexpr (SLOPE) {  // at last: the slopes may take the place of g
        store(u + at, jet.value, lanes), store(slope + at, jet.first, lanes);
        if (PAIR) store(u + plane + at, u_t, lanes);
        if (PAIR) store(slope + plane + at, Vec<T>(jet.second * g_t), lanes);
      }
    });
    block.w[0][k] = sum_lanes<T>(sum);
    if (PAIR) block.w[1][k] = sum_lanes<T>(sum_t);
  }
}

template <class T, bool PAIR, int ACTIVATION>
void scalar(const EdgeProblem<T>& in, const EdgeBlock<T>& block) {
  block.u ? scalar_rows<T, PAIR, ACTIVATION, true>(in, block)
          : scalar_rows<T, PAIR, ACTIVATION, false>(in, block);
}

// tanh(w + b4) of edge k, or w + b4, and its tangent.
template <class T, bool PAIR>
inline void bounded_scalar(const EdgeProblem<T>& in, const EdgeBlock<T>& block, int64_t k, T w[2]) {
  w[0] = block.w[0][k] + (in.b4 ? in.b4[0] : T(0));
  w[1] = PAIR ? block.w[1][k] : T(0);
  if (!in.bounded) return;
  w[0] = hyperbolic_tangent(w[0]);
  w[1] *= T(1) - w[0] * w[0];
}

// vec_i += kappa r and, of pairs, its tangent, for edge k of the block.
template <class T, bool PAIR>
inline void add_vector(const EdgeProblem<T>& in, int64_t e, T kappa, T kappa_t) {
  const T* r = in.r[0] + 3 * e;
  T* vec = in.vec[0] + 3 * in.destination[e];
  for (int64_t axis = 0; axis < 3; ++axis) vec[axis] += kappa * r[axis];
  if constexpr (PAIR) {
    const T* r_t = in.r[1] + 3 * e;
    T* vec_t = in.vec[1] + 3 * in.destination[e];
    for (int64_t axis = 0; axis < 3; ++axis) vec_t[axis] += kappa_t * r[axis] + kappa * r_t[axis];
  }
}

template <class T, bool PAIR>
void vector(const EdgeProblem<T>& in, const EdgeBlock<T>& block) {
  for (int64_t k = 0; k < block.count; ++k) {
    const int64_t e = block.begin + k;
    T w[2];
    bounded_scalar<T, PAIR>(in, block, k, w);
    const ScalarJet<T> t = direction_factor(in.direction, block.d[0][k]);
    const T f = in.f[0] ? in.f[0][e] : T(1), f_t = PAIR && in.f[1] ? in.f[1][e] : T(0);
    const T t_t = PAIR ? t.first * block.d[1][k] : T(0);
    const T kappa = f * w[0] * t.value;
    add_vector<T, PAIR>(in, e, kappa, f_t * w[0] * t.value + f * (w[1] * t.value + w[0] * t_t));
  }
}

// Cotangents of w and its tangent for one edge, from those of vec = kappa r and its tangent
// kappa_t r + kappa r_t, kappa = f tanh(w) t(d); adds to r_bar, f_bar and d_bar.
template <class T, bool PAIR>
inline void scalar_backward(const EdgeProblem<T>& in, const EdgeBlock<T>& block, int64_t k, T w_bar[2]) {
  const int64_t e = block.begin + k, i = in.destination[e];
  T w[2];
  bounded_scalar<T, PAIR>(in, block, k, w);
  const T slope = in.bounded ? T(1) - w[0] * w[0] : T(1);
  const ScalarJet<T> t = direction_factor(in.direction, block.d[0][k]);
  const T f = in.f[0] ? in.f[0][e] : T(1), f_t = PAIR && in.f[1] ? in.f[1][e] : T(0);
  const T t_t = PAIR ? t.first * block.d[1][k] : T(0);
  const T* r = in.r[0] + 3 * e;
  const T* vec_bar = in.vec_bar[0] + 3 * i;
  const T* r_t = PAIR ? in.r[1] + 3 * e : nullptr;
  const T* vec_t_bar = PAIR ? in.vec_bar[1] + 3 * i : nullptr;
  const T kappa = f * w[0] * t.value, kappa_t = f_t * w[0] * t.value + f * (w[1] * t.value + w[0] * t_t);
  if (in.vec[0]) add_vector<T, PAIR>(in, e, kappa, kappa_t);
  const T kappa_bar = dot3(vec_bar, r) + (PAIR ? dot3(vec_t_bar, r_t) : T(0));
  const T kappa_t_bar = PAIR ? dot3(vec_t_bar, r) : T(0);
  const T t_bar = kappa_bar * f * w[0] + kappa_t_bar * (f_t * w[0] + f * w[1]),
          t_t_bar = kappa_t_bar * f * w[0];
  w_bar[0] = kappa_bar * f * t.value + kappa_t_bar * (f_t * t.value + f * t_t);
  w_bar[1] = kappa_t_bar * f * t.value;
  w_bar[0] = slope * w_bar[0];
  if (in.bounded) w_bar[0] -= T(2) * w[0] * w[1] * w_bar[1];
  w_bar[1] *= slope;
  if (in.f_bar[0]) in.f_bar[0][e] += kappa_bar * w[0] * t.value + kappa_t_bar * (w[1] * t.value + w[0] * t_t);
  if (PAIR && in.f_bar[1]) in.f_bar[1][e] += kappa_t_bar * w[0] * t.value;
  if (!in.r_bar[0]) return;
  block.d_bar[0][k] += t_bar * t.first;
  for (int64_t axis = 0; axis < 3; ++axis) in.r_bar[0][3 * e + axis] += kappa * vec_bar[axis];
  if constexpr (PAIR) {
    block.d_bar[0][k] += t_t_bar * t.second * block.d[1][k];
    block.d_bar[1][k] += t_t_bar * t.first;
    for (int64_t axis = 0; axis < 3; ++axis) {
      in.r_bar[0][3 * e + axis] += kappa_t * vec_t_bar[axis];
      in.r_bar[1][3 * e + axis] += kappa * vec_t_bar[axis];
    }
  }
}

template <class T, bool PAIR>
void vector_backward(const EdgeProblem<T>& in, const EdgeBlock<T>& block, const EdgeSums<T>& sums) {
  const int64_t width = in.vector, plane = block.count * width;
  for (int64_t k = 0; k < block.count; ++k) {
    T w_bar[2];
    scalar_backward<T, PAIR>(in, block, k, w_bar);
    const T *const u = block.u + k * width, *const w4 = in.w4;
    T *const slopes = block.g_bar + k * width, *const w4_sum = sums.w4_bar, *const b3_sum = sums.b3_bar;
    const T bar = w_bar[0], bar_t = w_bar[1];
    if (sums.b4_bar) sums.b4_bar[0] += bar;
    for_columns<T>(width, [=](int64_t c, auto lanes) {
      T* slope = slopes + c;
      const Vec<T> weight = load(w4 + c, lanes), first = load(slope, lanes);
      Vec<T> g_bar = bar * weight * first, w4_bar = bar * load(u + c, lanes);
      if constexpr (PAIR) {
        g_bar += bar_t * weight * load(slope + plane, lanes);
        w4_bar += bar_t * load(u + plane + c, lanes);
        store(slope + plane, Vec<T>(bar_t * weight * first), lanes);
      }
      store(slope, g_bar, lanes);
      if (w4_sum) add_row<T>(w4_sum + c, w4_bar, lanes), add_row<T>(b3_sum + c, g_bar, lanes);
    });
  }
}

template <class T, bool PAIR>
void message_backward(const EdgeProblem<T>& in, const EdgeBlock<T>& block, const EdgeSums<T>& sums) {
  const int64_t width = in.message, plane = block.count * width;
  const T *const message = block.m, *const slopes = block.c_slope;
  T *const bars = block.m_bar, *const b2_sum = sums.b2_bar;
  const bool branch = in.vector != 0;
  for (int64_t k = 0; k < block.count; ++k) {
    const int64_t e = block.begin + k, to = in.destination[e] * width;
    const T f = in.f[0] ? in.f[0][e] : T(1), f_t = PAIR && in.f[1] ? in.f[1][e] : T(0);
    const T *const sum_bars = in.sum_bar[0] + to, *const sum_t_bars = PAIR ? in.sum_bar[1] + to : nullptr;
    Vec<T> f_bar = {}, f_t_bar = {};
    for_columns<T>(width, [=, &f_bar, &f_t_bar](int64_t c, auto lanes) {
      const int64_t at = k * width + c;
      const Vec<T> sum_bar = load(sum_bars + c, lanes), slope = load(slopes + at, lanes);
      const Vec<T> m = load(message + at, lanes);
      Vec<T> m_bar = f * sum_bar;
      if (branch) m_bar += load(bars + at, lanes);
      f_bar += sum_bar * m;
      Vec<T> c_bar = m_bar * slope;
      if constexpr (PAIR) {
        const Vec<T> sum_t_bar = load(sum_t_bars + c, lanes);
        Vec<T> m_t_bar = f * sum_t_bar;
        if (branch) m_t_bar += load(bars + plane + at, lanes);
        c_bar += f_t * sum_t_bar * slope + m_t_bar * load(slopes + plane + at, lanes);
        f_bar += sum_t_bar * load(message + plane + at, lanes);
        f_t_bar += sum_t_bar * m;
        store(bars + plane + at, Vec<T>(m_t_bar * slope), lanes);
      }
      store(bars + at, c_bar, lanes);
      if (b2_sum) add_row<T>(b2_sum + c, c_bar, lanes);
    });
    if (in.f_bar[0]) in.f_bar[0][e] += sum_lanes<T>(f_bar);
    if (PAIR && in.f_bar[1]) in.f_bar[1][e] += sum_lanes<T>(f_t_bar);
  }
}

template <class T, bool PAIR>
void before_backward(const EdgeProblem<T>& in, const EdgeBlock<T>& block, const EdgeSums<T>& sums) {
  const int64_t width = in.hidden, plane = block.count * width;
  const T* const slopes = block.a_slope;
  T* const bars = block.z_bar;
  for (int64_t k = 0; k < block.count; ++k) {
    const int64_t e = block.begin + k, to = in.destination[e] * width;
    const int64_t from = (in.source[e] - sums.first_source) * width;
    T *const p_bar = in.p_bar[0] + to, *const q_bar = sums.q_bar[0] + from;
    T *const p_t_bar = PAIR ? in.p_bar[1] + to : nullptr, *const q_t_bar =
                                                              PAIR ? sums.q_bar[1] + from : nullptr;
    for_columns<T>(width, [=](int64_t c, auto lanes) {
      const int64_t at = k * width + c;
      const Vec<T> slope = load(slopes + at, lanes);
      Vec<T> a_bar = load(bars + at, lanes) * slope;
      if constexpr (PAIR) {
        const Vec<T> z_t_bar = load(bars + plane + at, lanes), a_t_bar = z_t_bar * slope;
        a_bar += z_t_bar * load(slopes + plane + at, lanes);
        store(bars + plane + at, a_t_bar, lanes);
        add_row<T>(p_t_bar + c, a_t_bar, lanes);
        add_row<T>(q_t_bar + c, a_t_bar, lanes);
      }
      store(bars + at, a_bar, lanes);
      add_row<T>(p_bar + c, a_bar, lanes);
      add_row<T>(q_bar + c, a_bar, lanes);
    });
  }
}

template <class T, bool PAIR>
void radial_backward(const EdgeProblem<T>& in, const EdgeBlock<T>& block) {
  for (int64_t k = 0; k < block.count; ++k) {
    const T d = block.d[0][k], d_t = PAIR ? block.d[1][k] : T(0);
    const T* rho_bar = block.rho_bar + k * in.radial;
    const T* rho_t_bar = rho_bar + block.count * in.radial;
    T d_bar = block.d_bar[0][k], d_t_bar = PAIR ? block.d_bar[1][k] : T(0);
    if (in.feature == kDistance || in.feature == kSquared) {
      const ScalarJet<T> jet = plain_feature(in, d);
      d_bar += rho_bar[0] * jet.first;
      if (PAIR) d_bar += rho_t_bar[0] * jet.second * d_t, d_t_bar += rho_t_bar[0] * jet.first;
    } else {
      Vec<T> sum = {}, sum_t = {};
      for_columns<T>(in.radial, [&](int64_t c, auto lanes) {
        const Jet<T> jet = features(in, d, load(in.centres + c, lanes));
        sum += load(rho_bar + c, lanes) * jet.first;
        if constexpr (PAIR) {
          const Vec<T> bar = load(rho_t_bar + c, lanes);
          sum += bar * jet.second * d_t;
          sum_t += bar * jet.first;
        }
      });
      d_bar += sum_lanes<T>(sum);
      if (PAIR) d_t_bar += sum_lanes<T>(sum_t);
    }
    const int64_t e = block.begin + k;
    const T inverse = T(1) / d;
    if (PAIR) d_bar -= d_t_bar * d_t * inverse;  // d_t = r . r_t / d
    for (int64_t axis = 0; axis < 3; ++axis) {
      const T r = in.r[0][3 * e + axis];
      in.r_bar[0][3 * e + axis] += d_bar * r * inverse;
      if (PAIR) {
        in.r_bar[0][3 * e + axis] += d_t_bar * in.r[1][3 * e + axis] * inverse;
        in.r_bar[1][3 * e + axis] += d_t_bar * r * inverse;
      }
    }
  }
}

}  // namespace

#define MEGAGNN_EDGE_KERNELS(T, PAIR, ACTIVATION) \
  {radial<T, PAIR>,                               \
   before<T, PAIR, ACTIVATION>,                   \
   message<T, PAIR, ACTIVATION>,                  \
   scalar<T, PAIR, ACTIVATION>,                   \
   vector<T, PAIR>,                               \
   vector_backward<T, PAIR>,                      \
   message_backward<T, PAIR>,                     \
   before_backward<T, PAIR>,                      \
   radial_backward<T, PAIR>}
#define MEGAGNN_EDGE_TABLE(T)                                                           \
  {                                                                                     \
    {                                                                                   \
      {MEGAGNN_EDGE_KERNELS(T, false, kSiLU), MEGAGNN_EDGE_KERNELS(T, false, kReLU)}, { \
        MEGAGNN_EDGE_KERNELS(T, true, kSiLU), MEGAGNN_EDGE_KERNELS(T, true, kReLU)      \
      }                                                                                 \
    }                                                                                   \
  }

extern const EdgeTable<float> edge_float32;
const EdgeTable<float> edge_float32 = MEGAGNN_EDGE_TABLE(float);
extern const EdgeTable<double> edge_float64;
const EdgeTable<double> edge_float64 = MEGAGNN_EDGE_TABLE(double);

}  // namespace megagnn::cpu::MEGAGNN_SIMD
