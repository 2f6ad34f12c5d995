// Products of int8 rows of x and int4 weights in groups: the codes of a group are multiplied as they
// are, and its sum is scaled.
//
// VNNI multiplies unsigned by signed bytes, so x is shifted by 128, and what that adds to a group's sum is
// where the sum begins, below zero: all of it is exact, in int32.

#pragma once

#include "tiles.h"

namespace ptq {

constexpr int kGroupRows = 6;  // rows of W in a tile: it has sums of integers and of floats

// Rows of W, unpacked: codes minus zero point as units, and of each group the scale and minus 128 times
// the sum of those.
struct GroupedRows {
  Scratch<uint32_t> codes;
  Scratch<float> scales;
  Scratch<int32_t> starts;
  int64_t stride, groups;

  GroupedRows(int64_t rows, int64_t units, int64_t groups)
      : codes(rows * (units + kLanes)),  // not a power of two: rows would share a cache's sets
        scales(rows * groups),
        starts(rows * groups),
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

inline int64_t sum_of_lanes(__m256i sums) {
  const __m128i half = _mm_add_epi64(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
  return _mm_cvtsi128_si64(_mm_add_epi64(half, _mm_unpackhi_epi64(half, half)));
}

// `count` codes of a group minus `zero` to `to`. Returns their sum.
inline int64_t unpack_group(const uint8_t* from, int64_t count, int zero, __m256i* to) {
  __m256i sums = _mm256_setzero_si256();
  for (int64_t k = 0; k < count; k += 32, from += 16, ++to) {
    const __m256i codes = unsigned_codes(from);
    sums = _mm256_add_epi64(sums, _mm256_sad_epu8(codes, _mm256_setzero_si256()));
    _mm256_storeu_si256(to, _mm256_sub_epi8(codes, _mm256_set1_epi8(zero)));
  }
  return sum_of_lanes(sums) - count * zero;
}

// kGroupRows rows of W from `first` of those unpacked times `Panels` panels of x, into y. Meanwhile
// `lines` cache lines are fetched for each group, from `next` on.
template <int Panels>
void grouped_tile(const uint32_t* x, const GroupedRows& w, int64_t first, int64_t units, int64_t row,
                  int64_t column, const Output& out, const char* next, int64_t lines) {
  const int64_t wide = units / w.groups;
  const uint32_t* codes = w.codes.data() + first * w.stride;
  __m512 sums[kGroupRows][Panels] = {};
  for (int64_t g = 0; g < w.groups; ++g) {
    for (int64_t line = 0; line < lines; ++line, next += 64) _mm_prefetch(next, _MM_HINT_T1);
    __m512i parts[kGroupRows][Panels];
    for (int i = 0; i < kGroupRows; ++i)
      for (auto& part : parts[i]) part = _mm512_set1_epi32(w.starts[(first + i) * w.groups + g]);
    for (int64_t unit = g * wide; unit < (g + 1) * wide; ++unit) {
      __m512i lanes[Panels];
      for (int p = 0; p < Panels; ++p) lanes[p] = _mm512_loadu_si512(x + (p * units + unit) * kLanes);
#pragma GCC unroll 6
      for (int i = 0; i < kGroupRows; ++i) {
        const __m512i one = _mm512_set1_epi32(codes[i * w.stride + unit]);
        for (int p = 0; p < Panels; ++p) parts[i][p] = Int8Sum::add(parts[i][p], lanes[p], one);
      }
    }
#pragma GCC unroll 6
    for (int i = 0; i < kGroupRows; ++i) {
      const __m512 scale = _mm512_set1_ps(w.scales[(first + i) * w.groups + g]);
      for (int p = 0; p < Panels; ++p)
        sums[i][p] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(parts[i][p]), scale, sums[i][p]);
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
void grouped_product(const uint32_t* x, int64_t units, int64_t groups, const Source& source,
                     const Output& out, const Unpack& unpack) {
  const int64_t count = ceil_div(out.m, kLanes);
  const Scratch<uint32_t> panels = packed_panels(x, out.m, units, shifted);
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
        const int64_t lines = panel ? 0 : ceil_div(kGroupRows * source.bytes, groups * 64);
        for (int64_t n = first; n < last; n += kGroupRows) {
          const char* next = source.row(n + batch);
          if (panel + 1 < count)
            grouped_tile<2>(from, rows, n - first, units, panel * kLanes, n, out, next, lines);
          else
            grouped_tile<1>(from, rows, n - first, units, panel * kLanes, n, out, next, lines);
        }
      }
    }
  });
}

}  // namespace ptq
