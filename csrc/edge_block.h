// CPU kernels of the blockwise edge operation (docs/kernels.md): everything around its matrix products, for
// one block of edges at a time, so that what they write stays in the cache. Plain pointers, no torch.
//
// Sizes: N atoms, E edges sorted by destination, H hidden channels, M message channels, K channels of the
// vector branch, R features of the distance. A block of `count` edges has buffers of (planes * count) rows:
// those of the values, and below them, where tangents are carried along ("pair"), those of the tangents, so
// that one product serves both. Names: a = pre-activation of the hidden layer, z = act(a), c = W2 z, m =
// act(c + b2) the message, g = W3 m; x_bar is the cotangent of x. Index [0] is the value's, [1] the
// tangent's.
#pragma once

#include <cstdint>

namespace megagnn {

enum Feature { kBessel = 0, kGaussian = 1, kDistance = 2, kSquared = 3 };
enum Direction { kUnit = 0, kVector = 1, kPlusOne = 2 };
enum Activation { kSiLU = 0, kReLU = 1 };

// What all blocks share. Absent inputs and results are null.
template <class T>
struct EdgeProblem {
  int64_t hidden, message, vector, radial;  // H, M, K (0: no vector branch), R
  int feature, direction, activation;
  bool bounded;                // tanh on the scalar of the vector branch
  T epsilon2, cutoff, spread;  // of the distance, the Bessel basis, the Gaussian basis
  const T* centres;            // (R): frequencies of the Bessel basis, centres of the Gaussian one
  const int64_t *destination, *source;
  const int64_t* ptr;    // (N + 1), edges of each row
  const T *p[2], *q[2];  // (N, H), gathered by destination and by source
  const T* r[2];         // (E, 3), x_j + shift - x_i
  const T* f[2];         // (E), the envelope; null: 1
  const T *b2, *b3, *w4, *b4;
  T *sum[2], *vec[2];                 // (N, M), (N, 3)
  const T *sum_bar[2], *vec_bar[2];   // their cotangents
  T *p_bar[2], *r_bar[2], *f_bar[2];  // results of the backward; q_bar is the worker's
  // CUDA alone: each block's edges sorted by source; run k of block b, k in [runs[b], runs[b + 1]), is the
  // edges order[run_begin[k]:run_begin[k + 1]] of one source.
  const int64_t *order, *runs, *run_begin;
  void* stream;
};

// What one worker (thread) sums for itself.
template <class T>
struct EdgeSums {
  T* q_bar[2];  // rows from first_source on
  int64_t first_source;
  T *b2_bar, *b3_bar, *w4_bar, *b4_bar;
};

template <class T>
struct EdgeBlock {
  int64_t index, begin, count;  // its number, its edges
  int64_t first_row, num_rows;  // destinations of its edges
  T *d[2], *d_bar[2];           // (count): the distance, and its cotangents
  T* rho;                       // (planes * count, R)
  const T* a;                   // W1c rho, of a
  T *z, *a_slope;               // slope: act'(a) and, below, act''(a) a'; null where no backward follows
  T* c;
  T *m, *c_slope;  // m null where nothing reads it
  T* g;
  T *w[2], *w_bar[2];                  // (count): w4 . act(g + b3), without b4, and the cotangents
  T* u;                                // act(g + b3), below, act'(g + b3) g'; null where no backward follows
  T *g_bar, *m_bar, *z_bar, *rho_bar;  // m_bar becomes c_bar, z_bar a_bar in place
};

// One set per type and SIMD level; PAIR carries tangents. Blocks must lie in one row each or hold whole rows
// only, and of two workers none may share a row.
template <class T>
struct EdgeKernels {
  // d and rho of the block from r.
  void (*radial)(const EdgeProblem<T>&, const EdgeBlock<T>&);
  // a = p_i + q_j + W1c rho; z = act(a).
  void (*before)(const EdgeProblem<T>&, const EdgeBlock<T>&);
  // m = act(c + b2); sum_i += f m.
  void (*message)(const EdgeProblem<T>&, const EdgeBlock<T>&);
  // w = w4 . act(g + b3), and where u is wanted, that and in g_bar act'(g + b3), below, act''(g + b3) g'. A
  // worker with a part of the channels makes a part of w, to be summed before the next stage.
  void (*scalar)(const EdgeProblem<T>&, const EdgeBlock<T>&);
  // vec_i += f tanh(w + b4) t(d) r.
  void (*vector)(const EdgeProblem<T>&, const EdgeBlock<T>&);
  // From vec_bar, w, u and the slopes: g_bar, r_bar, f_bar, d_bar, and the sums for b3, w4, b4; with vec,
  // that, too.
  void (*vector_backward)(const EdgeProblem<T>&, const EdgeBlock<T>&, const EdgeSums<T>&);
  // From sum_bar and m_bar = g_bar W3: c_bar in place of m_bar, f_bar, and the sum for b2.
  void (*message_backward)(const EdgeProblem<T>&, const EdgeBlock<T>&, const EdgeSums<T>&);
  // From z_bar = c_bar W2: a_bar in its place, p_bar, and the sums for q_bar.
  void (*before_backward)(const EdgeProblem<T>&, const EdgeBlock<T>&, const EdgeSums<T>&);
  // From rho_bar = a_bar W1c and d_bar: r_bar.
  void (*radial_backward)(const EdgeProblem<T>&, const EdgeBlock<T>&);
};

template <class T>
struct EdgeTable {
  EdgeKernels<T> kernels[2][2];  // [pair][activation]
};

}  // namespace megagnn
