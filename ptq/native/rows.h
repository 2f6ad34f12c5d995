// Products of a few rows of x: sums run along K, and W is read once, in the order of memory.

#pragma once

#include "tiles.h"

namespace ptq {

constexpr int kFewRows = 8;
constexpr int64_t kGrain = 1 << 16;  // weights that are worth a thread

// `body.template run<M>(column, row)` for all of y: one column and M rows of it at a time.
template <class Body>
void by_rows(const Output& out, int64_t k, const Body& body) {
  torch::stable::parallel_for(0, out.n, std::max<int64_t>(1, kGrain / k), [&](int64_t begin, int64_t end) {
    for (int64_t column = begin; column < end; ++column) {
      int64_t row = 0;
      for (; row + 8 <= out.m; row += 8) body.template run<8>(column, row);
      for (; row + 4 <= out.m; row += 4) body.template run<4>(column, row);
      for (; row + 2 <= out.m; row += 2) body.template run<2>(column, row);
      if (row < out.m) body.template run<1>(column, row);
    }
  });
}

}  // namespace ptq
