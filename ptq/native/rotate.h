// Rows times a Hadamard matrix: of each piece of a row, seen as a matrix, the rows are mixed and the
// columns are, by two small products that stay in the first-level cache.

#pragma once

#include "tiles.h"

namespace ptq {

// c = a b for `Rows` rows of a [.., inner] and `Vectors` vectors of the columns of b [inner, ..].
template <int Rows, int Vectors>
inline void mixed_tile(const float* a, int64_t a_stride, const float* b, int64_t stride, int64_t inner,
                       float* c) {
  __m512 sums[Rows][Vectors] = {};
  for (int64_t i = 0; i < inner; ++i) {
    __m512 lanes[Vectors];
    for (int v = 0; v < Vectors; ++v) lanes[v] = _mm512_loadu_ps(b + i * stride + v * kLanes);
    for (int r = 0; r < Rows; ++r) {
      const __m512 one = _mm512_set1_ps(a[r * a_stride + i]);
      for (int v = 0; v < Vectors; ++v) sums[r][v] = _mm512_fmadd_ps(one, lanes[v], sums[r][v]);
    }
  }
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < Vectors; ++v) _mm512_storeu_ps(c + r * stride + v * kLanes, sums[r][v]);
}

template <int Vectors>
inline void mixed_columns(const float* a, int64_t a_stride, const float* b, int64_t stride, int64_t rows,
                          int64_t inner, float* c) {
  int64_t row = 0;
  for (; row + 8 <= rows; row += 8)
    mixed_tile<8, Vectors>(a + row * a_stride, a_stride, b, stride, inner, c + row * stride);
  for (; row + 4 <= rows; row += 4)
    mixed_tile<4, Vectors>(a + row * a_stride, a_stride, b, stride, inner, c + row * stride);
  for (; row < rows; ++row)
    mixed_tile<1, Vectors>(a + row * a_stride, a_stride, b, stride, inner, c + row * stride);
}

// c [rows, stride] = a [rows, inner] b [inner, stride]; stride is a multiple of 16.
inline void mixed(const float* a, int64_t a_stride, const float* b, int64_t stride, int64_t rows, int64_t inner,
                  float* c) {
  int64_t column = 0;
  for (; stride - column == 3 * kLanes || stride - column > 4 * kLanes; column += 3 * kLanes)
    mixed_columns<3>(a, a_stride, b + column, stride, rows, inner, c + column);
  for (; stride - column >= 2 * kLanes; column += 2 * kLanes)
    mixed_columns<2>(a, a_stride, b + column, stride, rows, inner, c + column);
  if (column < stride) mixed_columns<1>(a, a_stride, b + column, stride, rows, inner, c + column);
}

// The two matrices of a rotation, and one thread's place for a piece on its way.
struct Mixer {
  int64_t rows, columns, stride;
  Scratch<float> left, right, piece, half, whole;

  Mixer(const float* of_rows, const float* of_columns, int64_t rows, int64_t columns)
      : rows(rows),
        columns(columns),
        stride(ceil_div(columns, kLanes) * kLanes),
        left(rows * rows),
        right(columns * stride),
        piece(rows * columns + kLanes),
        half(rows * stride),
        whole(rows * stride) {
    std::fill_n(right.data(), columns * stride, 0.0f);
    for (int64_t i = 0; i < columns; ++i)
      std::copy_n(of_columns + i * columns, columns, right.data() + i * stride);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < rows; ++j) left[i * rows + j] = of_rows[j * rows + i];
  }

  // `piece`, mixed, in `whole`, each of its rows at a multiple of `stride`.
  void run() const {
    mixed(piece.data(), columns, right.data(), stride, rows, columns, half.data());
    mixed(left.data(), rows, half.data(), stride, rows, rows, whole.data());
  }
};

}  // namespace ptq
