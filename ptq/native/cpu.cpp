// Quantized linear layers on x86-64 processors with AVX512-VNNI and AVX512-BF16, over the canonical
// codes: int8 [N, K], or int4 [N, K / 2] with even columns in the low nibbles. K is a multiple of 64.

#include <array>
#include <bit>
#include <optional>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "groups.h"
#include "rotate.h"
#include "rows.h"
#include "tiles.h"

namespace ptq {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
const T* data(const std::optional<Tensor>& tensor) {
  return tensor ? data<T>(*tensor) : nullptr;
}

inline __m512 widened(__m256i bfloat16) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bfloat16), 16));
}

// ---- activations to int8 ----

struct Values {  // a row of float32 or bfloat16
  const void* row;
  bool bfloat16;

  __m512 at(int64_t k, __mmask16 mask) const {
    if (bfloat16)
      return widened(_mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(row) + k));
    return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(row) + k);
  }
};

inline __mmask16 up_to(int64_t left) { return left >= kLanes ? 0xffff : (1u << left) - 1; }

float row_scale(const Values& x, int64_t k) {
  __m512 largest = _mm512_setzero_ps();
  __mmask16 unordered = 0;
  for (int64_t i = 0; i < k; i += kLanes) {
    const __m512 value = x.at(i, up_to(k - i));
    unordered |= _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    largest = _mm512_max_ps(largest, _mm512_abs_ps(value));
  }
  if (unordered) return __builtin_nanf("");
  return std::max(_mm512_reduce_max_ps(largest) / 127.0f, 1.17549435e-38f);
}

// x float32 or bfloat16 [M, K] to codes [M, K], int8 or in bfloat16, and float32 scales [M, 1].
std::tuple<Tensor, Tensor> quantize_rows(Tensor x, ScalarType dtype) {
  const int64_t m = x.size(0), k = x.size(1);
  Tensor codes = torch::stable::new_empty(x, {m, k}, dtype);
  Tensor scales = torch::stable::new_empty(x, {m, 1}, ScalarType::Float);
  const bool bfloat16 = x.scalar_type() == ScalarType::BFloat16;
  const char* from = data<char>(x);
  const bool wide = dtype == ScalarType::BFloat16;
  char* to = static_cast<char*>(codes.mutable_data_ptr());
  auto* scale = static_cast<float*>(scales.mutable_data_ptr());
  torch::stable::parallel_for(0, m, std::max<int64_t>(1, (1 << 14) / k), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const Values values{from + row * k * (bfloat16 ? 2 : 4), bfloat16};
      scale[row] = row_scale(values, k);
      const __m512 step = _mm512_set1_ps(scale[row]);
      for (int64_t i = 0; i < k; i += kLanes) {
        const __mmask16 mask = up_to(k - i);
        const __m512i code = _mm512_cvtps_epi32(_mm512_div_ps(values.at(i, mask), step));
        const int64_t at = row * k + i;
        if (wide)
          _mm256_mask_storeu_epi16(to + 2 * at, mask,
                                   reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_cvtepi32_ps(code))));
        else
          _mm_mask_storeu_epi8(to + at, mask, _mm512_cvtsepi32_epi8(code));
      }
    }
  });
  return {codes, scales};
}

// ---- rotated activations ----

// Of each piece of a row of x, float32 or bfloat16 [M, K], seen as [l, r]: left^T piece right, with left
// [l, l] and right [r, r] in float32; K is a multiple of l r. In the dtype of x, computed in float32.
Tensor rotate_rows(Tensor x, Tensor left, Tensor right) {
  const int64_t m = x.size(0), k = x.size(1), rows = left.size(0), columns = right.size(0);
  const int64_t size = rows * columns;
  STD_TORCH_CHECK(k % size == 0 && x.is_contiguous() && left.is_contiguous() && right.is_contiguous(),
                  "x [M, K] and both matrices must be contiguous, K a multiple of what is mixed");
  Tensor y = torch::stable::new_empty(x, {m, k}, x.scalar_type());
  const bool bfloat16 = x.scalar_type() == ScalarType::BFloat16;
  const int64_t bytes = bfloat16 ? 2 : 4, pieces = m * k / size;
  const char* from = data<char>(x);
  const Output out{y.mutable_data_ptr(), bfloat16, m, k, nullptr, nullptr, nullptr};
  const int64_t grain = std::max<int64_t>(1, (1 << 18) / (size * (rows + columns)));
  torch::stable::parallel_for(0, pieces, grain, [&](int64_t begin, int64_t end) {
    const Mixer mixer(data<float>(left), data<float>(right), rows, columns);
    for (int64_t piece = begin; piece < end; ++piece) {
      const Values values{from + piece * size * bytes, bfloat16};
      for (int64_t i = 0; i < size; i += kLanes)
        _mm512_storeu_ps(mixer.piece.data() + i, values.at(i, up_to(size - i)));
      mixer.run();
      for (int64_t row = 0; row < rows; ++row) {
        for (int64_t i = 0; i < columns; i += kLanes) {
          const __m512 value = _mm512_loadu_ps(mixer.whole.data() + row * mixer.stride + i);
          out.store(0, piece * size + row * columns + i, up_to(columns - i), value);
        }
      }
    }
  });
  return y;
}

// ---- int8 activations, int8 weights ----

struct Int8Rows {
  static constexpr int kFewRows = 16;
  static constexpr int kMostRows = 4;  // that are multiplied together: more would not leave x in a cache
  static constexpr int columns(int rows) { return rows == 1 ? 1 : 4; }  // that are read together
  const int8_t* w;
  int64_t k;
  const Output& out;

  template <int Columns, int M>
  void run(const Step* of_x, int64_t column, int64_t row) const {
    const int8_t* codes = w + column * k;
    const int64_t ahead = fetched_ahead<Columns>(Columns * k);
    __m512i sums[M][Columns] = {};
    for (int64_t i = 0; i < k; i += kStep, of_x += M) {
      __m512i of_w[Columns];
      for (int c = 0; c < Columns; ++c) {
        fetch<Columns>(codes + c * k + i + ahead);
        of_w[c] = _mm512_loadu_si512(codes + c * k + i);
      }
      for (int j = 0; j < M; ++j)
        for (int c = 0; c < Columns; ++c) sums[j][c] = Int8Sum::add(sums[j][c], of_x[j].bits, of_w[c]);
    }
    store_rows<Int8Sum, Columns, M>(sums, column, row, out);
  }
};

// x int8 [M, K] and its scale [M, 1]; W int8 [N, K], its scale [N] and 128 times the sums of its rows.
Tensor linear_int8(Tensor x, Tensor x_scale, Tensor w, Tensor w_scale, Tensor sums, ScalarType dtype) {
  const int64_t m = x.size(0), k = x.size(1), n = w.size(0);
  STD_TORCH_CHECK(k % 64 == 0 && w.size(1) == k && x.is_contiguous() && w.is_contiguous(),
                  "x [M, K] and W [N, K] must be contiguous, K a multiple of 64");
  Tensor y = torch::stable::new_empty(x, {m, n}, dtype);
  const Output out{y.mutable_data_ptr(), dtype == ScalarType::BFloat16, m, n, data<float>(x_scale),
                   data<float>(w_scale), data<int32_t>(sums)};
  const int8_t* codes = data<int8_t>(w);
  if (m <= Int8Rows::kFewRows) {
    by_rows(data<char>(x), k, shifted, k, out, Int8Rows{codes, k, out});
  } else {
    const Source source{data<char>(w), k};
    product<Int8Sum>(data<uint32_t>(x), k / 4, shifted, source, out, [&](int64_t row, uint32_t* to) {
      std::copy_n(codes + row * k, k, reinterpret_cast<int8_t*>(to));
    });
  }
  return y;
}

// ---- bfloat16 activations, int4 or int8 weights ----

// Scales of groups; weights with one scale a row are one group that is multiplied without, and the
// product is scaled.
struct HalfScales {
  const uint16_t* values;
  static constexpr bool kOfRows = false;
  float operator[](int64_t i) const { return _cvtsh_ss(values[i]); }
};

struct FloatScales {
  const float* values;
  static constexpr bool kOfRows = false;
  float operator[](int64_t i) const { return values[i]; }
};

struct NoScales {
  static constexpr bool kOfRows = true;
  float operator[](int64_t) const { return 1.0f; }
};

template <class Scales>
struct Weight {
  const uint8_t* codes;
  Scales scales;              // [N, groups]
  const int8_t* zero_point;   // [N, groups], or null
  int64_t k, groups;

  int64_t group() const { return k / groups; }
  int64_t index(int64_t row, int64_t g) const { return row * groups + g; }
  int zero(int64_t i) const { return zero_point ? zero_point[i] : 0; }
};

constexpr std::array<uint16_t, 32> kIntegers = [] {  // -15 to 15 in bfloat16
  std::array<uint16_t, 32> values{};
  for (int i = 0; i < 31; ++i) values[i] = std::bit_cast<uint32_t>(static_cast<float>(i - 15)) >> 16;
  return values;
}();

template <class Place>
constexpr std::array<uint16_t, 32> places(const Place& place) {
  std::array<uint16_t, 32> found{};
  for (int i = 0; i < 32; ++i) found[i] = place(i);
  return found;
}

constexpr auto kTurns = places([](int i) { return i % 8 * 4 + i / 8; });  // 0, 4, .. 28, 1, 5, .. 31
constexpr auto kUpper = places([](int i) { return 2 * i + 1; });  // of 32 bits the upper 16

constexpr auto kAsItIs = [](__m512i x) { return x; };

// 32 codes minus zero point as bfloat16, which is exact, or that times a scale; in the order 0, 4, .. 28,
// 1, 5, .. 31.
struct Nibbles {
  using Scaled = Nibbles;
  static constexpr int kBytes = 16;  // of 32 codes
  static constexpr int kOfOneRow = 4;
  __m512i table;

  Nibbles() = default;

  explicit Nibbles(int zero)
      : table(_mm512_broadcast_i64x4(
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kIntegers.data() + 7 - zero)))) {}

  Nibbles(int zero, float scale) {
    const __m512 steps = _mm512_set_ps(7, 6, 5, 4, 3, 2, 1, 0, -1, -2, -3, -4, -5, -6, -7, -8);
    const __m512 values = _mm512_mul_ps(_mm512_sub_ps(steps, _mm512_set1_ps(zero)), _mm512_set1_ps(scale));
    table = _mm512_broadcast_i64x4(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(values)));
  }

  // 32 values of x in the order of the codes.
  static constexpr auto ordered = [](__m512i x) {
    return _mm512_permutexvar_epi16(_mm512_loadu_si512(kTurns.data()), x);
  };

  __m512i operator()(const uint8_t* from) const {
    const __m512i words = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    const __m512i counts = _mm512_set_epi64(12 * kWords, 12 * kWords, 8 * kWords, 8 * kWords, 4 * kWords,
                                            4 * kWords, 0, 0);
    return _mm512_permutexvar_epi16(_mm512_srlv_epi16(words, counts), table);
  }

 private:
  static constexpr int64_t kWords = 0x0001000100010001;
};

inline __m512i widened_codes(const uint8_t* from) {
  return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

inline __m512 sixteen(const uint8_t* from, __m512i zero) {
  return _mm512_cvtepi32_ps(_mm512_sub_epi32(widened_codes(from), zero));
}

// 32 whole numbers, which bfloat16 has exactly if they have at most 8 bits, from as many float32.
inline __m512i upper_halves(__m512 first, __m512 second) {
  return _mm512_permutex2var_epi16(_mm512_castps_si512(first), _mm512_loadu_si512(kUpper.data()),
                                   _mm512_castps_si512(second));
}

struct ScaledBytes {
  static constexpr int kBytes = 32;
  __m512i zero;
  __m512 scale;

  ScaledBytes() = default;
  ScaledBytes(int zero_point, float step)
      : zero(_mm512_set1_epi32(zero_point)), scale(_mm512_set1_ps(step)) {}

  static constexpr auto ordered = kAsItIs;

  __m512i operator()(const uint8_t* from) const {
    return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(_mm512_mul_ps(sixteen(from + 16, zero), scale),
                                                         _mm512_mul_ps(sixteen(from, zero), scale)));
  }
};

struct PlainBytes {  // without zero points
  using Scaled = ScaledBytes;
  static constexpr int kBytes = 32;
  static constexpr int kOfOneRow = 1;

  PlainBytes() = default;
  explicit PlainBytes(int) {}

  static constexpr auto ordered = kAsItIs;

  __m512i operator()(const uint8_t* from) const {
    return upper_halves(_mm512_cvtepi32_ps(widened_codes(from)),
                        _mm512_cvtepi32_ps(widened_codes(from + 16)));
  }
};

struct Bytes {
  using Scaled = ScaledBytes;
  static constexpr int kBytes = 32;
  static constexpr int kOfOneRow = 1;
  __m512i zero;

  Bytes() = default;
  explicit Bytes(int zero_point) : zero(_mm512_set1_epi32(zero_point)) {}

  static constexpr auto ordered = kAsItIs;

  __m512i operator()(const uint8_t* from) const {
    return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(sixteen(from + 16, zero), sixteen(from, zero)));
  }
};

template <class Codes, class Scales>
void unpack_row(const Weight<Scales>& weight, int64_t row, uint32_t* to) {
  const uint8_t* from = weight.codes + row * weight.k / 32 * Codes::kBytes;
  for (int64_t g = 0; g < weight.groups; ++g) {
    const int64_t i = weight.index(row, g);
    const Codes codes(weight.zero(i), weight.scales[i]);
    for (int64_t k = 0; k < weight.group(); k += 32, to += 16, from += Codes::kBytes)
      _mm512_storeu_si512(to, codes(from));
  }
}

template <class Codes, class Scales>
struct FloatRows {
  static constexpr int kFewRows = 8;
  static constexpr int kMostRows = 8;  // that are multiplied together
  static constexpr int columns(int rows) { return rows == 1 ? Codes::kOfOneRow : 2; }
  const Weight<Scales>& weight;
  const Output& out;

  int64_t stride() const { return weight.k / 32 * Codes::kBytes; }

  // The products of a group, added to sums.
  template <int Columns, int M, class Unpacked>
  void add(const std::array<Unpacked, Columns>& values, const Step* of_x, const uint8_t* from,
           __m512 (&sums)[M][Columns]) const {
    const int64_t ahead = fetched_ahead<Columns>(Columns * stride());
    for (int64_t i = 0; i < weight.group(); i += 32, of_x += M, from += Codes::kBytes) {
      __m512i of_w[Columns];
      for (int c = 0; c < Columns; ++c) {
        fetch<Columns>(from + c * stride() + ahead);
        of_w[c] = values[c](from + c * stride());
      }
      for (int j = 0; j < M; ++j)
        for (int c = 0; c < Columns; ++c) sums[j][c] = BFloat16Sum::add(sums[j][c], of_x[j].bits, of_w[c]);
    }
  }

  template <int Columns, int M>
  void run(const Step* of_x, int64_t column, int64_t row) const {
    const uint8_t* from = weight.codes + column * stride();
    const int64_t steps = weight.group() / 32;
    __m512 sums[M][Columns] = {};
    for (int64_t g = 0; g < weight.groups; ++g, of_x += M * steps, from += Codes::kBytes * steps) {
      const auto place = [&](int c) { return weight.index(column + c, g); };
      if constexpr (M == 8 && !Scales::kOfRows) {  // registers do not hold the sums of a group too
        std::array<typename Codes::Scaled, Columns> values;
        for (int c = 0; c < Columns; ++c) values[c] = {weight.zero(place(c)), weight.scales[place(c)]};
        add<Columns, M>(values, of_x, from, sums);
      } else {
        std::array<Codes, Columns> values;
        for (int c = 0; c < Columns; ++c) values[c] = Codes(weight.zero(place(c)));
        __m512 parts[M][Columns] = {};
        add<Columns, M>(values, of_x, from, parts);
        for (int c = 0; c < Columns; ++c) {
          const __m512 scale = _mm512_set1_ps(weight.scales[place(c)]);
          for (int j = 0; j < M; ++j) sums[j][c] = _mm512_fmadd_ps(parts[j][c], scale, sums[j][c]);
        }
      }
    }
    store_rows<BFloat16Sum, Columns, M>(sums, column, row, out);
  }
};

template <class Codes, class Scales>
void multiply_rows(const uint16_t* x, const Weight<Scales>& weight, const Output& out) {
  using Rows = FloatRows<Codes, Scales>;
  using Scaled = typename Codes::Scaled;
  if (out.m <= Rows::kFewRows)
    return by_rows(x, 2 * weight.k, Codes::ordered, weight.k, out, Rows{weight, out});
  const Source source{reinterpret_cast<const char*>(weight.codes), weight.k / 32 * Scaled::kBytes};
  product<BFloat16Sum>(reinterpret_cast<const uint32_t*>(x), weight.k / 2, Scaled::ordered, source, out,
                       [&](int64_t row, uint32_t* to) { unpack_row<Scaled>(weight, row, to); });
}

template <class Scales>
void multiply(const Tensor& activations, const Tensor& codes, Scales scales,
              const std::optional<Tensor>& zero_point, int64_t groups, const Output& out) {
  const int64_t k = activations.size(1);
  const auto* x = data<uint16_t>(activations);
  const Weight<Scales> weight{data<uint8_t>(codes), scales, data<int8_t>(zero_point), k, groups};
  if (codes.size(1) != k)
    multiply_rows<Nibbles>(x, weight, out);
  else if (zero_point)
    multiply_rows<Bytes>(x, weight, out);
  else
    multiply_rows<PlainBytes>(x, weight, out);
}

// x bfloat16 [M, K] and the scale of its rows [M, 1]; codes of 4 or 8 bits; their scales [N, groups] in
// float16 or float32, or of rows [N, 1] in float32; zero points shaped like the scales.
Tensor linear_float(Tensor x, std::optional<Tensor> x_scale, Tensor codes, Tensor scale,
                    std::optional<Tensor> zero_point, ScalarType dtype) {
  const int64_t m = x.size(0), k = x.size(1), n = codes.size(0), groups = scale.size(1);
  STD_TORCH_CHECK(k % 64 == 0 && (codes.size(1) == k || codes.size(1) * 2 == k) && k % (32 * groups) == 0 &&
                      x.is_contiguous() && codes.is_contiguous() && scale.is_contiguous() &&
                      scale.size(0) == n,
                  "x [M, K], codes [N, K] or [N, K / 2] and scales must be contiguous, K a multiple of 64, "
                  "groups of 32");
  Tensor y = torch::stable::new_empty(x, {m, n}, dtype);
  const bool half = scale.scalar_type() == ScalarType::Half;
  const float* of_rows = groups == 1 && !half ? data<float>(scale) : nullptr;
  const Output out{y.mutable_data_ptr(), dtype == ScalarType::BFloat16, m, n, data<float>(x_scale),
                   of_rows, nullptr};
  if (of_rows)
    multiply(x, codes, NoScales{}, zero_point, 1, out);
  else if (half)
    multiply(x, codes, HalfScales{data<uint16_t>(scale)}, zero_point, groups, out);
  else
    multiply(x, codes, FloatScales{data<float>(scale)}, zero_point, groups, out);
  return y;
}

// ---- int8 activations, int4 weights in groups ----

template <class Scales>
void multiply_groups(const Tensor& x, const Weight<Scales>& weight, const Output& out) {
  const int64_t group = weight.group();
  const auto unpack = [&](int64_t row, GroupedRows& rows, int64_t at) {
    const uint8_t* from = weight.codes + row * weight.k / 2;
    auto* to = reinterpret_cast<char*>(rows.codes.data() + at * rows.stride);
    for (int64_t g = 0; g < weight.groups; ++g, from += group / 2, to += group) {
      const int64_t i = weight.index(row, g), place = at * weight.groups + g;
      const int64_t sum = unpack_group(from, group, 8 + weight.zero(i), reinterpret_cast<__m256i*>(to));
      rows.scales[place] = weight.scales[i];
      rows.starts[place] = static_cast<int32_t>(-128 * sum);
    }
  };
  const Source source{reinterpret_cast<const char*>(weight.codes), weight.k / 2};
  grouped_product(data<uint32_t>(x), weight.k / 4, weight.groups, source, out, unpack);
}

// x int8 [M, K] and the scale of its rows [M, 1]; codes of 4 bits [N, K / 2]; their scales [N, groups] in
// float16 or float32, and zero points shaped like them.
Tensor linear_groups(Tensor x, Tensor x_scale, Tensor codes, Tensor scale, std::optional<Tensor> zero_point,
                     ScalarType dtype) {
  const int64_t m = x.size(0), k = x.size(1), n = codes.size(0), groups = scale.size(1);
  STD_TORCH_CHECK(k % 64 == 0 && codes.size(1) * 2 == k && k % (32 * groups) == 0 && x.is_contiguous() &&
                      codes.is_contiguous() && scale.is_contiguous() && scale.size(0) == n,
                  "x [M, K], codes [N, K / 2] and scales must be contiguous, K a multiple of 64");
  Tensor y = torch::stable::new_empty(x, {m, n}, dtype);
  const Output out{y.mutable_data_ptr(), dtype == ScalarType::BFloat16, m, n, data<float>(x_scale),
                   nullptr, nullptr};
  const auto* packed = data<uint8_t>(codes);
  const auto* zeros = data<int8_t>(zero_point);
  if (scale.scalar_type() == ScalarType::Half)
    multiply_groups(x, Weight<HalfScales>{packed, {data<uint16_t>(scale)}, zeros, k, groups}, out);
  else
    multiply_groups(x, Weight<FloatScales>{packed, {data<float>(scale)}, zeros, k, groups}, out);
  return y;
}

}  // namespace ptq

STABLE_TORCH_LIBRARY(ptq, m) {
  m.def("quantize_rows(Tensor x, ScalarType dtype) -> (Tensor, Tensor)");
  m.def("rotate_rows(Tensor x, Tensor left, Tensor right) -> Tensor");
  m.def("linear_int8(Tensor x, Tensor x_scale, Tensor w, Tensor w_scale, Tensor sums, ScalarType dtype) -> Tensor");
  m.def(
      "linear_groups(Tensor x, Tensor x_scale, Tensor codes, Tensor scale, Tensor? zero_point, "
      "ScalarType dtype) -> Tensor");
  m.def(
      "linear_float(Tensor x, Tensor? x_scale, Tensor codes, Tensor scale, Tensor? zero_point, "
      "ScalarType dtype) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(ptq, CPU, m) {
  m.impl("quantize_rows", TORCH_BOX(&ptq::quantize_rows));
  m.impl("rotate_rows", TORCH_BOX(&ptq::rotate_rows));
  m.impl("linear_int8", TORCH_BOX(&ptq::linear_int8));
  m.impl("linear_groups", TORCH_BOX(&ptq::linear_groups));
  m.impl("linear_float", TORCH_BOX(&ptq::linear_float));
}
