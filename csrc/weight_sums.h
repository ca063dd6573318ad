// Gradients of weights that several workers add up.
#pragma once

#include <vector>

#include "binding.h"

namespace megagnn {

// The first worker's go into the results; the others have memory of their own, added at the end in the
// workers' order, so that bits depend on the number of workers and on nothing else.
template <class T>
class WeightSums {
 public:
  // Results are of the type and device of `like`; `none` where a weight is absent, or nothing is wanted.
  WeightSums(const Tensor& like, const Tensors& weights, bool wanted, const Tensor& none, int64_t num_workers)
      : own_(size_t(std::max<int64_t>(num_workers, 1))) {
    for (const Tensor& weight : weights) {
      const bool there = wanted && !absent(weight);
      results_.push_back(
          there ? zeros(like, std::vector<int64_t>(weight.sizes().begin(), weight.sizes().end())) : none);
      sizes_.push_back(there ? weight.numel() : 0);
    }
  }

  // To be called by worker w itself, so that its memory is near it.
  void prepare(int64_t w) {
    std::vector<std::vector<T>>& own = own_[size_t(w)];
    own.resize(results_.size());
    for (size_t k = 0; k < results_.size() && w > 0; ++k) own[k].assign(size_t(sizes_[k]), T(0));
  }

  // Where worker w adds to weight k; null where that is not wanted.
  T* of(int64_t w, size_t k) {
    if (!sizes_[k]) return nullptr;
    return w == 0 ? out_data<T>(results_[k]) : own_[size_t(w)][k].data();
  }

  // Part `part` of `num_parts` of the final sum.
  void add(int64_t part, int64_t num_parts) {
    for (size_t k = 0; k < results_.size(); ++k) {
      const int64_t each = (sizes_[k] + num_parts - 1) / num_parts;
      const int64_t begin = std::min(part * each, sizes_[k]), end = std::min(begin + each, sizes_[k]);
      T* const to = of(0, k);
      for (size_t w = 1; w < own_.size(); ++w) {
        const T* const from = own_[w][k].data();
        for (int64_t i = begin; i < end; ++i) to[i] += from[i];
      }
    }
  }

  const Tensors& results() const { return results_; }

 private:
  Tensors results_;
  std::vector<int64_t> sizes_;
  std::vector<std::vector<std::vector<T>>> own_;
};

}  // namespace megagnn
