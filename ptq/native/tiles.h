// What the products share: activations packed so that 16 rows of x lie side by side, and a tile of
// the product that stays in registers. AVX512 with VNNI and BF16.
//
// A unit is 32 bits of a row along K: two bfloat16 values or four int8 codes, which one instruction
// multiplies and adds to 16 sums. Rows of W are broadcast, rows of x are lanes, so W is read in the
// order in which it lies in memory.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace ptq {

constexpr int kLanes = 16;   // rows of x in a panel
constexpr int kHeight = 12;  // rows of W in a tile
constexpr int64_t kBatchBytes = 384 * 1024;  // of unpacked rows of W: they stay in the second-level cache

// Values that are not set to zero first, from a cache line's start on.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t size) : values_(static_cast<T*>(::operator new(size * sizeof(T), kLine))) {}

  T* data() const { return values_.get(); }
  T& operator[](int64_t i) const { return values_.get()[i]; }

 private:
  static constexpr std::align_val_t kLine{64};
  struct Free {
    void operator()(T* values) const { ::operator delete(values, kLine); }
  };
  std::unique_ptr<T[], Free> values_;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline void transpose(__m512i r[16]) {
  __m512i t[16];
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
    r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
    r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
  }
}

// Signed bytes as unsigned ones: 128 is added. An object, as a function would be called by its address.
constexpr auto shifted = [](__m512i bytes) { return _mm512_xor_si512(bytes, _mm512_set1_epi8(-128)); };

// x [M, units] to panels [M / 16, units, 16]; rows beyond M are zero. 16 units of a row are `changed`.
template <class Change>
Scratch<uint32_t> packed_panels(const uint32_t* x, int64_t m, int64_t units, const Change& changed) {
  const int64_t panels = ceil_div(m, kLanes), chunks = units / kLanes;
  Scratch<uint32_t> out(panels * units * kLanes);
  torch::stable::parallel_for(0, panels * chunks, 32, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t panel = item / chunks, unit = item % chunks * kLanes;
      __m512i rows[16];
      for (int i = 0; i < 16; ++i) {
        const int64_t row = panel * kLanes + i;
        rows[i] = row < m ? changed(_mm512_loadu_si512(x + row * units + unit)) : _mm512_setzero_si512();
      }
      transpose(rows);
      uint32_t* to = out.data() + (panel * units + unit) * kLanes;
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + i * kLanes, rows[i]);
    }
  });
  return out;
}

// Where a product goes: y [M, N], and what is done to a sum on its way.
struct Output {
  void* y;
  bool bfloat16;  // else float32
  int64_t m, n;
  const float* row_scale;      // of x [M], or null
  const float* column_scale;   // of W [N], or null
  const int32_t* correction;   // [N], which is subtracted from integer sums, or null

  void store(int64_t row, int64_t column, __mmask16 mask, __m512 value) const {
    if (bfloat16) {
      auto* to = static_cast<uint16_t*>(y) + row * n + column;
      _mm256_mask_storeu_epi16(to, mask, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value)));
    } else {
      _mm512_mask_storeu_ps(static_cast<float*>(y) + row * n + column, mask, value);
    }
  }

  __m512 scaled(__m512 value, int64_t row, __m512 columns) const {
    if (column_scale) value = _mm512_mul_ps(value, columns);
    return row_scale ? _mm512_mul_ps(value, _mm512_set1_ps(row_scale[row])) : value;
  }

  __m512 columns(int64_t column, __mmask16 mask) const {
    return column_scale ? _mm512_maskz_loadu_ps(mask, column_scale + column) : _mm512_setzero_ps();
  }

  __m512i corrections(int64_t column, __mmask16 mask) const {
    return correction ? _mm512_maskz_loadu_epi32(mask, correction + column) : _mm512_setzero_si512();
  }
};

struct BFloat16Sum {
  using Sum = __m512;
  static Sum zero() { return _mm512_setzero_ps(); }
  static Sum add(Sum sum, __m512i x, __m512i w) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(w));
  }
  static __m512 value(__m512i sum, __m512i) { return _mm512_castsi512_ps(sum); }
  static __m512i sum(__m512i a, __m512i b) {
    return _mm512_castps_si512(_mm512_add_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b)));
  }
  static __m512i bits(Sum sum) { return _mm512_castps_si512(sum); }
};

struct Int8Sum {  // x is unsigned, W signed
  using Sum = __m512i;
  static Sum zero() { return _mm512_setzero_si512(); }
  static Sum add(Sum sum, __m512i x, __m512i w) {
    // GCC 12 copies every sum at each use of the intrinsic.
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(w));
    return sum;
  }
  static __m512 value(__m512i sum, __m512i correction) {
    return _mm512_cvtepi32_ps(_mm512_sub_epi32(sum, correction));
  }
  static __m512i sum(__m512i a, __m512i b) { return _mm512_add_epi32(a, b); }
  static __m512i bits(Sum sum) { return sum; }
};

// Sums of `height` columns of y by 16 rows, to their places.
template <class Arithmetic>
void store_panel(__m512i values[16], int64_t height, int64_t row, int64_t column, const Output& out) {
  const __mmask16 mask = (1u << std::min(height, out.n - column)) - 1;
  const __m512 columns = out.columns(column, mask);
  const __m512i correction = out.corrections(column, mask);
  transpose(values);
  for (int i = 0; i < kLanes && row + i < out.m; ++i)
    out.store(row + i, column, mask, out.scaled(Arithmetic::value(values[i], correction), row + i, columns));
}

// Codes of W, so many bytes a row, which are fetched while those before are multiplied.
struct Source {
  const char* codes;
  int64_t bytes;

  const char* row(int64_t n) const { return codes + n * bytes; }
};

// kHeight rows of W times `Panels` panels of x, and the sums on their way into y. Meanwhile `lines` cache
// lines are fetched for every 16 units, from `next` on.
template <class Arithmetic, int Panels>
void tile(const uint32_t* x, const uint32_t* w, int64_t stride, int64_t units, int64_t row, int64_t column,
          const Output& out, const char* next, int64_t lines) {
  typename Arithmetic::Sum sums[kHeight][Panels];
  for (auto& of_row : sums)
    for (auto& sum : of_row) sum = Arithmetic::zero();
  const uint32_t* four[kHeight / 4] = {w, w + 4 * stride, w + 8 * stride};
  int64_t thrice = 3 * stride;
  for (int64_t first = 0; first < units; first += kLanes) {
    for (int64_t line = 0; line < lines; ++line, next += 64) _mm_prefetch(next, _MM_HINT_T1);
    for (int64_t unit = first; unit < first + kLanes; ++unit) {
      // Three pointers and their distances fit into registers; GCC would keep twelve pointers.
      asm("" : "+r"(four[0]), "+r"(four[1]), "+r"(four[2]), "+r"(stride), "+r"(thrice));
      __m512i lanes[Panels];
      for (int p = 0; p < Panels; ++p) lanes[p] = _mm512_loadu_si512(x + (p * units + unit) * kLanes);
#pragma GCC unroll 12
      for (int i = 0; i < kHeight; ++i) {
        const __m512i one = _mm512_set1_epi32(four[i / 4][i % 4 == 3 ? thrice : i % 4 * stride]);
        for (int p = 0; p < Panels; ++p) sums[i][p] = Arithmetic::add(sums[i][p], lanes[p], one);
      }
      for (auto& rows : four) ++rows;
    }
  }
  for (int p = 0; p < Panels; ++p) {
    __m512i values[16];
    for (int i = 0; i < 16; ++i)
      values[i] = i < kHeight ? Arithmetic::bits(sums[i][p]) : _mm512_setzero_si512();
    store_panel<Arithmetic>(values, kHeight, row + p * kLanes, column, out);
  }
}

// y = x W^T by tiles, x as it is `changed`. `unpack(n, to)` puts row n of W, `units` long, where it is
// told to.
template <class Arithmetic, class Change, class Unpack>
void product(const uint32_t* x, int64_t units, const Change& changed, const Source& source, const Output& out,
             const Unpack& unpack) {
  const Scratch<uint32_t> panels = packed_panels(x, out.m, units, changed);
  const int64_t count = ceil_div(out.m, kLanes);
  const int64_t stride = units + kLanes;  // not a power of two: rows would share a cache's sets
  const int64_t fitting = kBatchBytes / (kHeight * stride * 4);
  const int64_t batch = kHeight * std::clamp<int64_t>(out.m <= 2 * kLanes ? 1 : fitting, 1, 4);
  torch::stable::parallel_for(0, ceil_div(out.n, kHeight), 1, [&](int64_t begin, int64_t end) {
    const Scratch<uint32_t> rows(batch * stride);
    const int64_t stop = std::min(end * kHeight, out.n);
    for (int64_t first = begin * kHeight; first < stop; first += batch) {
      const int64_t last = std::min(first + batch, stop);
      for (int64_t n = first; n < last; ++n) unpack(n, rows.data() + (n - first) * stride);
      for (int64_t panel = 0; panel < count; panel += 2) {
        const uint32_t* from = panels.data() + panel * units * kLanes;
        const int64_t lines = panel ? 0 : kHeight * source.bytes / units / 4;
        for (int64_t n = first; n < last; n += kHeight) {
          const uint32_t* w = rows.data() + (n - first) * stride;
          const char* next = source.row(n + batch);
          if (panel + 1 < count)
            tile<Arithmetic, 2>(from, w, stride, units, panel * kLanes, n, out, next, lines);
          else
            tile<Arithmetic, 1>(from, w, stride, units, panel * kLanes, n, out, next, lines);
        }
      }
    }
  });
}

}  // namespace ptq
