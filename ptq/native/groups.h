// Products of int8 rows of x and int4 weights in groups: the codes of a group are multiplied as they
// are, and its sum is scaled.
//
// VNNI multiplies unsigned by signed bytes, so codes of W are left shifted to 0 .. 15, and what that
// adds, like a zero point, is taken off by the sum of the group's codes of x: exactly, in int32.

#pragma once

#include "tiles.h"

namespace ptq {

constexpr int kGroupRows = 6;  // rows of W in a tile: it has sums of integers and of floats

// Rows of W, unpacked: codes as units, and of each group the scale and the code that stands for 0.
struct GroupedRows {
  Scratch<uint32_t> codes;
  Scratch<float> scales;
  Scratch<int32_t> zeros;
  int64_t stride, groups;

  GroupedRows(int64_t rows, int64_t units, int64_t groups)
      : codes(rows * (units + kLanes)),  // not a power of two: rows would share a cache's sets
        scales(rows * groups),
        zeros(rows * groups),
        stride(units + kLanes),
        groups(groups) {}
};

// 32 codes of 4 bits, which are kept with 8 added, to bytes from 0 to 15.
inline __m256i unsigned_codes(const uint8_t* from) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  const __m128i mask = _mm_set1_epi8(15);
  const __m128i low = _mm_and_si128(bytes, mask), high = _mm_and_si128(_mm_srli_epi16(bytes, 4), mask);
  return _mm256_set_m128i(_mm_unpackhi_epi8(low, high), _mm_unpacklo_epi8(low, high));
}

// Of x in panels [M / 16, units, 16] the sums of each group [M / 16, groups, 16].
inline Scratch<int32_t> sums_of_groups(const Scratch<uint32_t>& panels, int64_t count, int64_t units,
                                       int64_t groups) {
  const int64_t wide = units / groups;
  count *= groups;
  Scratch<int32_t> sums(count * kLanes);
  const __m512i ones = _mm512_set1_epi8(1);
  for (int64_t i = 0; i < count; ++i) {
    __m512i sum = _mm512_setzero_si512();
    for (int64_t u = 0; u < wide; ++u)
      sum = Int8Sum::add(sum, ones, _mm512_loadu_si512(panels.data() + (i * wide + u) * kLanes));
    _mm512_storeu_si512(sums.data() + i * kLanes, sum);
  }
  return sums;
}

// kGroupRows rows of W from `first` of those unpacked times `Panels` panels of x, into y.
template <int Panels>
void grouped_tile(const uint32_t* x, const int32_t* sums_of_x, const GroupedRows& w, int64_t first,
                  int64_t units, int64_t row, int64_t column, const Output& out) {
  const int64_t wide = units / w.groups;
  __m512 sums[kGroupRows][Panels] = {};
  for (int64_t g = 0; g < w.groups; ++g) {
    __m512i parts[kGroupRows][Panels] = {};
    for (int64_t unit = g * wide; unit < (g + 1) * wide; ++unit) {
      __m512i lanes[Panels];
      for (int p = 0; p < Panels; ++p) lanes[p] = _mm512_loadu_si512(x + (p * units + unit) * kLanes);
#pragma GCC unroll 6
      for (int i = 0; i < kGroupRows; ++i) {
        const __m512i one = _mm512_set1_epi32(w.codes[(first + i) * w.stride + unit]);
        for (int p = 0; p < Panels; ++p) parts[i][p] = Int8Sum::add(parts[i][p], one, lanes[p]);
      }
    }
#pragma GCC unroll 6
    for (int i = 0; i < kGroupRows; ++i) {
      const __m512 scale = _mm512_set1_ps(w.scales[(first + i) * w.groups + g]);
      const __m512i zero = _mm512_set1_epi32(w.zeros[(first + i) * w.groups + g]);
      for (int p = 0; p < Panels; ++p) {
        const __m512i of_x = _mm512_loadu_si512(sums_of_x + (p * w.groups + g) * kLanes);
        const __m512i exact = _mm512_sub_epi32(parts[i][p], _mm512_mullo_epi32(of_x, zero));
        sums[i][p] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(exact), scale, sums[i][p]);
      }
    }
  }
  for (int p = 0; p < Panels; ++p) {
    __m512i values[16];
    for (int i = 0; i < 16; ++i)
      values[i] = i < kGroupRows ? _mm512_castps_si512(sums[i][p]) : _mm512_setzero_si512();
    store_panel<BFloat16Sum>(values, kGroupRows, row + p * kLanes, column, out);
  }
}

// y = x W^T. `unpack(n, rows, at)` puts row n of W into those, at a place.
template <class Unpack>
void grouped_product(const uint32_t* x, int64_t units, int64_t groups, const Output& out,
                     const Unpack& unpack) {
  const int64_t count = ceil_div(out.m, kLanes);
  const Scratch<uint32_t> panels = packed_panels(x, out.m, units, 0);
  const Scratch<int32_t> sums = sums_of_groups(panels, count, units, groups);
  const int64_t fitting = kBatchBytes / (kGroupRows * units * 4);
  const int64_t batch = kGroupRows * std::clamp<int64_t>(out.m <= 2 * kLanes ? 1 : fitting, 1, 8);
  torch::stable::parallel_for(0, ceil_div(out.n, kGroupRows), 1, [&](int64_t begin, int64_t end) {
    GroupedRows rows(batch, units, groups);
    const int64_t stop = std::min(end * kGroupRows, out.n);
    for (int64_t first = begin * kGroupRows; first < stop; first += batch) {
      const int64_t last = std::min(first + batch, stop);
      for (int64_t n = first; n < last; ++n) unpack(n, rows, n - first);
      for (int64_t panel = 0; panel < count; panel += 2) {
        const uint32_t* from = panels.data() + panel * units * kLanes;
        const int32_t* of_x = sums.data() + panel * groups * kLanes;
        for (int64_t n = first; n < last; n += kGroupRows) {
          if (panel + 1 < count)
            grouped_tile<2>(from, of_x, rows, n - first, units, panel * kLanes, n, out);
          else
            grouped_tile<1>(from, of_x, rows, n - first, units, panel * kLanes, n, out);
        }
      }
    }
  });
}

}  // namespace ptq
