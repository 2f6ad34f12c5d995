// Products of a few rows of x: sums run along K, and W is read once, in the order of memory.

#pragma once

#include <bit>

#include "tiles.h"

namespace ptq {

constexpr int64_t kAhead = 4096;      // bytes that W is fetched before it is read
constexpr int64_t kGrain = 1 << 16;  // weights that are worth a thread
constexpr int64_t kStep = 64;        // bytes of a row that are multiplied at a time
constexpr int64_t kBlock = 1 << 16;  // weights that stay in the second-level cache from rows to rows

struct alignas(kStep) Step {  // of a row of x
  __m512i bits;
};

// How many rows are multiplied together: 1, 2, 4 or at most 8.
inline int64_t rows_together(int64_t rows, int64_t most) {
  return std::min<int64_t>(most, std::bit_ceil(static_cast<uint64_t>(rows)));
}

// x, a few rows of `bytes` each, `M` rows after each other: in steps of 64 bytes, first those of all M
// rows, then the next ones of all. Rows beyond x are zero. Each step is `changed` on its way.
template <class Change>
Scratch<Step> packed_steps(const void* x, int64_t rows, int64_t bytes, int64_t M, const Change& changed) {
  const int64_t steps = bytes / kStep, padded = ceil_div(rows, M) * M;
  Scratch<Step> out(steps * padded);
  const auto* from = static_cast<const char*>(x);
  for (int64_t row = 0; row < padded; ++row) {
    Step* to = out.data() + row / M * steps * M + row % M;
    for (int64_t i = 0; i < steps; ++i) {
      const char* step = from + row * bytes + i * kStep;
      to[i * M].bits = row < rows ? changed(_mm512_loadu_si512(step)) : _mm512_setzero_si512();
    }
  }
  return out;
}

// How far ahead of columns that are read together, so many bytes in all, the next ones are fetched.
template <int Columns>
int64_t fetched_ahead(int64_t bytes) {
  return std::max<int64_t>(Columns == 1 ? kAhead : 2 * kAhead, bytes);
}

// One stream is best fetched into the first cache; several would push each other out of it.
template <int Columns>
void fetch(const void* from) {
  _mm_prefetch(from, Columns == 1 ? _MM_HINT_T0 : _MM_HINT_T1);
}

// All of y, some columns at a time, which share what is read of x, `steps` for each row:
// `body.run<Columns, M>(x from row on, column, row)`.
template <int Columns, int M, class Body>
void by_columns(const Step* x, int64_t steps, int64_t k, const Output& out, const Body& body) {
  const int64_t block = out.m <= M ? out.n : std::max<int64_t>(Columns, kBlock / k / Columns * Columns);
  const int64_t grain = std::max<int64_t>(1, kGrain / k);
  torch::stable::parallel_for(0, out.n, grain, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end; first += block) {
      const int64_t last = std::min(first + block, end);
      for (int64_t row = 0; row < out.m; row += M) {
        const Step* from = x + row * steps;
        int64_t column = first;
        for (; column + Columns <= last; column += Columns) body.template run<Columns, M>(from, column, row);
        for (; column < last; ++column) body.template run<1, M>(from, column, row);
      }
    }
  });
}

// y = x W^T by `body`, for a few rows of x of `bytes` each, which are `changed`.
template <class Body, class Change>
void by_rows(const void* x, int64_t bytes, const Change& changed, int64_t k, const Output& out,
             const Body& body) {
  const int64_t together = rows_together(out.m, Body::kMostRows), steps = bytes / kStep;
  const Scratch<Step> packed = packed_steps(x, out.m, bytes, together, changed);
  const Step* from = packed.data();
  switch (together) {
    case 1: return by_columns<Body::columns(1), 1>(from, steps, k, out, body);
    case 2: return by_columns<Body::columns(2), 2>(from, steps, k, out, body);
    case 4: return by_columns<Body::columns(4), 4>(from, steps, k, out, body);
    default: return by_columns<Body::columns(8), Body::kMostRows>(from, steps, k, out, body);
  }
}

// The sums of the lanes of each of `Count` vectors, a power of two up to 16, in the lanes of one.
template <class Arithmetic, int Count>
__m512i sums_of_lanes(const typename Arithmetic::Sum* vectors) {
  __m512i v[16];
  for (int i = 0; i < Count; ++i) v[i] = Arithmetic::bits(vectors[i]);
  constexpr auto half = [](int count) { return std::max(1, count / 2); };
  constexpr int pairs = half(Count), fours = half(pairs), eights = half(fours);
  constexpr auto other = [](int i, int count) { return count > 1 ? 2 * i + 1 : 2 * i; };
  for (int i = 0; i < pairs; ++i) {
    const __m512i a = v[2 * i], b = v[other(i, Count)];
    v[i] = Arithmetic::sum(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  }
  for (int i = 0; i < fours; ++i) {
    const __m512i a = v[2 * i], b = v[other(i, pairs)];
    v[i] = Arithmetic::sum(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
  }
  for (int i = 0; i < eights; ++i) {
    const __m512i a = v[2 * i], b = v[other(i, fours)];
    v[i] = Arithmetic::sum(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
  }
  const __m512i a = v[0], b = v[other(0, eights)];
  return Arithmetic::sum(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
}

// Sums of M rows, of `Columns` columns each from `column` on, to their places in y.
template <class Arithmetic, int Columns, int M>
void store_rows(const typename Arithmetic::Sum sums[M][Columns], int64_t column, int64_t row,
                const Output& out) {
  constexpr __mmask16 columns = (1u << Columns) - 1;
  const int64_t count = std::min<int64_t>(M, out.m - row);
  const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i of_column = _mm512_and_si512(lanes, _mm512_set1_epi32(Columns - 1));
  const __m512i of_row = _mm512_srli_epi32(lanes, std::countr_zero(unsigned{Columns}));
  const __m512i correction = out.corrections(column, columns);
  const __m512i all = sums_of_lanes<Arithmetic, M * Columns>(&sums[0][0]);
  __m512 value = Arithmetic::value(all, _mm512_permutexvar_epi32(of_column, correction));
  if (out.column_scale) {
    const __m512 scales = out.columns(column, columns);
    value = _mm512_mul_ps(value, _mm512_permutexvar_ps(of_column, scales));
  }
  if (out.row_scale) {
    const __m512 scales = _mm512_maskz_loadu_ps((1u << count) - 1, out.row_scale + row);
    value = _mm512_mul_ps(value, _mm512_permutexvar_ps(of_row, scales));
  }
  alignas(64) char values[64];
  const int64_t width = out.bfloat16 ? 2 : 4;
  if (out.bfloat16)
    _mm256_store_si256(reinterpret_cast<__m256i*>(values),
                       reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value)));
  else
    _mm512_store_ps(values, value);
  for (int64_t i = 0; i < count; ++i)
    std::copy_n(values + i * Columns * width, Columns * width,
                static_cast<char*>(out.y) + ((row + i) * out.n + column) * width);
}

}  // namespace ptq
