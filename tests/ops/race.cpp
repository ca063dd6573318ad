// The kernels of sums over rows and of the gather, called by several threads at once on the tasks that the
// bindings would give them; for ThreadSanitizer. With an argument, two threads get the same rows: a race that
// it must report.
#define MEGAGNN_SIMD baseline
#include <cstdio>
#include <thread>
#include <vector>

#include "cpu/maximum.cpp"
#include "cpu/segment.cpp"
#include "cpu/weighted.cpp"

using namespace megagnn::cpu;

int main(int argc, char**) {
  const int64_t num_rows = 200, degree = 7, width = 67, num_entries = num_rows * degree, num_threads = 4;
  std::vector<float> values(size_t(num_entries * width), 1.0f), weight(size_t(num_entries), 2.0f);
  std::vector<float> sums(size_t(num_rows * width)), maxima(sums), weighted_sums(sums),
      gathered(values.size());
  std::vector<float> dots(static_cast<size_t>(num_entries));
  std::vector<int64_t> ptr, perm, index, arg(sums.size());
  for (int64_t row = 0; row <= num_rows; ++row) ptr.push_back(row * degree);
  for (int64_t e = 0; e < num_entries; ++e) {
    perm.push_back((e * 3) % num_entries);  // 3 and the number of entries have no common divisor
    index.push_back((e * 11) % num_rows);
  }
  const RowSumInput in{values.data(), ptr.data(), perm.data(), num_entries, width};
  RowSumInput weighted_in = in;
  weighted_in.index = index.data();
  weighted_in.weight = weight.data();
  weighted_in.num_values = num_rows;
  const GatherInput gather_in{values.data(), index.data(), num_rows, width, false};
  const DotInput dot_in{values.data(), values.data(), index.data(), perm.data(),
                        num_rows,      num_entries,   width};
  std::vector<std::thread> threads;
  for (int64_t t = 0; t < num_threads; ++t) {
    threads.emplace_back([&, task = argc > 1 ? 0 : t] {
      const int64_t row = num_rows / num_threads, first = task * row, last = first + row;
      baseline::segment[kFloat32].sum.sum_rows(in, sums.data(), first, last);
      baseline::maximum[kFloat32].max_rows(in, maxima.data(), arg.data(), first, last);
      baseline::weighted[kFloat32].sum.sum_rows(weighted_in, weighted_sums.data(), first, last);
      baseline::segment[kFloat32].gather(gather_in, gathered.data(), first * degree, last * degree);
      baseline::weighted[kFloat32].dot(dot_in, dots.data(), first * degree, last * degree);
    });
  }
  for (std::thread& thread : threads) thread.join();
  bool right = argc > 1;
  if (argc == 1) {
    right = true;
    for (float sum : sums) right &= sum == float(degree);
    for (float sum : weighted_sums) right &= sum == 2 * float(degree);
    for (float dot : dots) right &= dot == float(width);
  }
  std::puts(right ? "right" : "wrong");
  return 0;
}
