// Products of a few rows of x: sums run along K, and W is read once, in the order of memory.

#pragma once

#include "tiles.h"

namespace ptq {

constexpr int kFewRows = 8;
constexpr int64_t kGrain = 1 << 16;  // weights that are worth a thread
constexpr int64_t kBlock = 1 << 14;  // weights that stay in the first-level cache from rows to rows

// How far ahead of columns that are read together, so many bytes in all, the next ones are fetched.
inline int64_t fetched_ahead(int64_t bytes) { return std::max<int64_t>(kAhead, bytes); }

// M rows of x from `row` on, times columns of y from `begin` to `end`: some columns at a time, which
// share what is read of x.
template <int Columns, int M, class Body>
void by_columns(int64_t begin, int64_t end, int64_t row, const Body& body) {
  int64_t column = begin;
  for (; column + Columns <= end; column += Columns) body.template run<Columns, M>(column, row);
  for (; column < end; ++column) body.template run<1, M>(column, row);
}

// `body.template run<Columns, M>(column, row)` for all of y.
template <class Body>
void by_rows(const Output& out, int64_t k, const Body& body) {
  const int64_t wide = std::max<int64_t>(4, kBlock / k / 4 * 4);
  torch::stable::parallel_for(0, out.n, std::max<int64_t>(1, kGrain / k), [&](int64_t begin, int64_t end) {
    for (int64_t from = begin; from < end; from += wide) {
      const int64_t to = std::min(from + wide, end);
      int64_t row = 0;
      for (; row + 4 <= out.m; row += 4) by_columns<Body::kOfRows, 4>(from, to, row, body);
      for (; row + 2 <= out.m; row += 2) by_columns<Body::kOfRows, 2>(from, to, row, body);
      if (row < out.m) by_columns<Body::kOfOneRow, 1>(from, to, row, body);
    }
  });
}

// The sums of the lanes of each vector, in the first lanes of one.
template <int Columns>
__m512 sums_of_lanes(const __m512* vectors) {
  __m512 found = _mm512_setzero_ps();
  for (int c = 0; c < Columns; ++c)
    found = _mm512_mask_broadcastss_ps(found, 1u << c, _mm_set_ss(_mm512_reduce_add_ps(vectors[c])));
  return found;
}

template <int Columns>
__m512i sums_of_lanes(const __m512i* vectors) {
  __m512i found = _mm512_setzero_si512();
  for (int c = 0; c < Columns; ++c)
    found = _mm512_mask_set1_epi32(found, 1u << c, _mm512_reduce_add_epi32(vectors[c]));
  return found;
}

template <>
inline __m512i sums_of_lanes<4>(const __m512i* v) {
  const __m512i a = _mm512_add_epi32(_mm512_unpacklo_epi32(v[0], v[1]), _mm512_unpackhi_epi32(v[0], v[1]));
  const __m512i b = _mm512_add_epi32(_mm512_unpacklo_epi32(v[2], v[3]), _mm512_unpackhi_epi32(v[2], v[3]));
  const __m512i c = _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
  const __m256i d = _mm256_add_epi32(_mm512_castsi512_si256(c), _mm512_extracti64x4_epi64(c, 1));
  return _mm512_zextsi128_si512(_mm_add_epi32(_mm256_castsi256_si128(d), _mm256_extracti128_si256(d, 1)));
}

template <>
inline __m512 sums_of_lanes<4>(const __m512* v) {
  const __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
  const __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
  const __m512 c = _mm512_add_ps(
      _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b))),
      _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b))));
  const __m256 d = _mm256_add_ps(_mm512_castps512_ps256(c), _mm512_extractf32x8_ps(c, 1));
  return _mm512_zextps128_ps512(_mm_add_ps(_mm256_castps256_ps128(d), _mm256_extractf128_ps(d, 1)));
}

}  // namespace ptq
