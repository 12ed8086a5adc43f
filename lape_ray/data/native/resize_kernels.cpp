#include "resize.h"

#include <algorithm>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace lape {
namespace {

// Added before the shift that drops the weights' fraction: round half up.
constexpr int32_t kHalf = 1 << (kWeightBits - 1);

inline uint8_t clip(int32_t value) { return static_cast<uint8_t>(std::clamp(value >> kWeightBits, 0, 255)); }

void horizontal_portable(const Taps& taps, const PackedTaps&, const uint8_t* const* rows,
                         uint8_t* const* out) {
  const uint32_t low = taps.low();
  for (uint32_t row = 0; row < ResizeKernels::kRows; ++row) {
    uint8_t* to = out[row];
    for (size_t i = 0; i < taps.first.size(); ++i, to += 3) {
      const int32_t* weight = &taps.weights[size_t{taps.stride} * i];
      const uint8_t* from = rows[row] + 3 * (taps.first[i] - low);
      int32_t red = kHalf, green = kHalf, blue = kHalf;
      for (uint32_t t = 0; t < taps.count[i]; ++t, from += 3) {
        red += from[0] * weight[t];
        green += from[1] * weight[t];
        blue += from[2] * weight[t];
      }
      to[0] = clip(red);
      to[1] = clip(green);
      to[2] = clip(blue);
    }
  }
}

void vertical_portable(const uint8_t* const* rows, const int32_t* weights, uint32_t count, uint8_t* out,
                       size_t bytes) {
  constexpr size_t kChunk = 64;  // sums that stay in registers or the nearest cache
  for (size_t begin = 0; begin < bytes; begin += kChunk) {
    const size_t chunk = std::min(kChunk, bytes - begin);
    int32_t sums[kChunk];
    std::fill_n(sums, kChunk, kHalf);
    for (uint32_t t = 0; t < count; ++t) {
      for (size_t i = 0; i < chunk; ++i) sums[i] += rows[t][begin + i] * weights[t];
    }
    for (size_t i = 0; i < chunk; ++i) out[begin + i] = clip(sums[i]);
  }
}

constexpr ResizeKernels kPortable = {false, horizontal_portable, vertical_portable};

#if defined(__x86_64__)

#define LAPE_AVX2 __attribute__((target("avx2")))

// Two 16-bit values as one 32-bit lane of a multiply-add.
inline int32_t pair(int32_t first, int32_t second) {
  return static_cast<int32_t>((static_cast<uint32_t>(first) & 0xFFFF) | static_cast<uint32_t>(second) << 16);
}

LAPE_AVX2 inline __m256i broadcast_pair(const int16_t* weights) {
  int32_t both;
  std::memcpy(&both, weights, sizeof both);
  return _mm256_set1_epi32(both);
}

LAPE_AVX2 inline __m256i load_two(const uint8_t* low, const uint8_t* high) {
  const __m128i first = _mm_loadu_si128(reinterpret_cast<const __m128i*>(low));
  const __m128i second = _mm_loadu_si128(reinterpret_cast<const __m128i*>(high));
  return _mm256_inserti128_si256(_mm256_castsi128_si256(first), second, 1);
}

LAPE_AVX2 inline __m256i round_off(__m256i high, __m256i low) {
  return _mm256_srai_epi32(_mm256_add_epi32(_mm256_slli_epi32(high, PackedTaps::kLowBits), low), kWeightBits);
}

// Sums of four rows at one output pixel. A 128-bit half holds red, green, blue and a sum that nobody reads.
struct FourSums {
  __m256i high_a, low_a;  // rows 0 and 1
  __m256i high_b, low_b;  // rows 2 and 3
};

// Two taps of each row; sums wrap modulo 2^32, as in plain integers.
LAPE_AVX2 inline void add_two_taps(FourSums& sums, __m256i a, __m256i b, const int16_t* weights) {
  const __m256i high = broadcast_pair(weights), low = broadcast_pair(weights + 4);
  sums.high_a = _mm256_add_epi32(sums.high_a, _mm256_madd_epi16(a, high));
  sums.high_b = _mm256_add_epi32(sums.high_b, _mm256_madd_epi16(b, high));
  sums.low_a = _mm256_add_epi32(sums.low_a, _mm256_madd_epi16(a, low));
  sums.low_b = _mm256_add_epi32(sums.low_b, _mm256_madd_epi16(b, low));
}

// One output pixel of four rows, as 16-bit values: rows 0 and 2, then rows 1 and 3.
LAPE_AVX2 inline __m256i horizontal_pixel(const PackedTaps& packed, size_t output,
                                          const uint8_t* const* rows) {
  const __m256i first_two =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1));
  const __m256i last_two =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(6, -1, 9, -1, 7, -1, 10, -1, 8, -1, 11, -1, -1, -1, -1, -1));
  const int16_t* weights = packed.weights.data() + size_t{8} * packed.blocks * output;
  size_t at = size_t{3} * packed.first[output];
  FourSums sums = {_mm256_setzero_si256(), _mm256_set1_epi32(kHalf), _mm256_setzero_si256(),
                   _mm256_set1_epi32(kHalf)};
  for (uint32_t pairs = packed.pairs;;) {
    const __m256i a = load_two(rows[0] + at, rows[1] + at), b = load_two(rows[2] + at, rows[3] + at);
    add_two_taps(sums, _mm256_shuffle_epi8(a, first_two), _mm256_shuffle_epi8(b, first_two), weights);
    if (pairs == 1) break;
    add_two_taps(sums, _mm256_shuffle_epi8(a, last_two), _mm256_shuffle_epi8(b, last_two), weights + 2);
    if (pairs == 2) break;
    pairs -= 2;
    weights += 8;
    at += 12;
  }
  return _mm256_packs_epi32(round_off(sums.high_a, sums.low_a), round_off(sums.high_b, sums.low_b));
}

LAPE_AVX2 void horizontal_avx2(const Taps&, const PackedTaps& packed, const uint8_t* const* rows,
                               uint8_t* const* out) {
  // From red, green, blue, x of two rows, for two pixels, to both pixels of each row.
  const __m256i by_rows =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 2, 8, 9, 10, -1, -1, 4, 5, 6, 12, 13, 14, -1, -1));
  const size_t outputs = packed.first.size();
  for (size_t i = 0; i < outputs; i += 2) {
    const __m256i first = horizontal_pixel(packed, i, rows);
    const __m256i second = horizontal_pixel(packed, std::min(i + 1, outputs - 1), rows);
    const __m256i pixels = _mm256_shuffle_epi8(_mm256_packus_epi16(first, second), by_rows);
    const __m128i rows_0_2 = _mm256_castsi256_si128(pixels), rows_1_3 = _mm256_extracti128_si256(pixels, 1);
    const size_t at = 3 * i;
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out[0] + at), rows_0_2);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out[1] + at), rows_1_3);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out[2] + at), _mm_unpackhi_epi64(rows_0_2, rows_0_2));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out[3] + at), _mm_unpackhi_epi64(rows_1_3, rows_1_3));
  }
}

// Two rows' weights as 32-bit lanes for a multiply-add.
struct RowPair {
  const uint8_t* first;
  const uint8_t* second;
  int32_t high, low;
};

LAPE_AVX2 inline void vertical_32(const RowPair* pairs, uint32_t count, size_t at, uint8_t* out) {
  const __m256i zero = _mm256_setzero_si256();
  const __m256i half = _mm256_set1_epi32(kHalf);
  __m256i high[4] = {zero, zero, zero, zero}, low[4] = {half, half, half, half};
  for (uint32_t t = 0; t < count; ++t) {
    const __m256i weight_high = _mm256_set1_epi32(pairs[t].high);
    const __m256i weight_low = _mm256_set1_epi32(pairs[t].low);
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(pairs[t].first + at));
    const __m256i y = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(pairs[t].second + at));
    const __m256i left = _mm256_unpacklo_epi8(x, y), right = _mm256_unpackhi_epi8(x, y);
    const __m256i pixels[4] = {_mm256_unpacklo_epi8(left, zero), _mm256_unpackhi_epi8(left, zero),
                               _mm256_unpacklo_epi8(right, zero), _mm256_unpackhi_epi8(right, zero)};
    for (int i = 0; i < 4; ++i) {
      high[i] = _mm256_add_epi32(high[i], _mm256_madd_epi16(pixels[i], weight_high));
      low[i] = _mm256_add_epi32(low[i], _mm256_madd_epi16(pixels[i], weight_low));
    }
  }
  const __m256i left = _mm256_packs_epi32(round_off(high[0], low[0]), round_off(high[1], low[1]));
  const __m256i right = _mm256_packs_epi32(round_off(high[2], low[2]), round_off(high[3], low[3]));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + at), _mm256_packus_epi16(left, right));
}

LAPE_AVX2 void vertical_avx2(const uint8_t* const* rows, const int32_t* weights, uint32_t count, uint8_t* out,
                             size_t bytes) {
  constexpr uint32_t kMostPairs = 64;
  constexpr int kBits = PackedTaps::kLowBits, kMask = (1 << kBits) - 1;
  const uint32_t pairs = (count + 1) / 2;
  if (bytes < 32 || pairs > kMostPairs) return vertical_portable(rows, weights, count, out, bytes);
  RowPair plan[kMostPairs];
  for (uint32_t i = 0; i < pairs; ++i) {
    const bool both = 2 * i + 1 < count;
    const int32_t first = weights[2 * i], second = both ? weights[2 * i + 1] : 0;
    plan[i] = {rows[2 * i], rows[2 * i + both], pair(first >> kBits, second >> kBits),
               pair(first & kMask, second & kMask)};
  }
  for (size_t at = 0; at + 32 <= bytes; at += 32) vertical_32(plan, pairs, at, out);
  if (bytes % 32) vertical_32(plan, pairs, bytes - 32, out);
}

constexpr ResizeKernels kAvx2 = {true, horizontal_avx2, vertical_avx2};

#elif defined(__aarch64__)

// Four sums without their fraction, within 0 and 65535.
inline uint16x4_t round_off(int32x4_t sums) { return vqmovun_s32(vshrq_n_s32(sums, kWeightBits)); }

// Four pixels of RGB bytes, each as red, green, blue and 0 in 32 bits, times their weights.
inline int32x4_t add_taps(int32x4_t sums, uint8x16_t bytes, const int32_t* weights, uint32_t count) {
  static const uint8_t kSpread[4][16] = {
      {0, 255, 255, 255, 1, 255, 255, 255, 2, 255, 255, 255, 255, 255, 255, 255},
      {3, 255, 255, 255, 4, 255, 255, 255, 5, 255, 255, 255, 255, 255, 255, 255},
      {6, 255, 255, 255, 7, 255, 255, 255, 8, 255, 255, 255, 255, 255, 255, 255},
      {9, 255, 255, 255, 10, 255, 255, 255, 11, 255, 255, 255, 255, 255, 255, 255},
  };
  for (uint32_t t = 0; t < count; ++t) {
    const uint8x16_t pixel = vqtbl1q_u8(bytes, vld1q_u8(kSpread[t]));
    sums = vmlaq_n_s32(sums, vreinterpretq_s32_u8(pixel), weights[t]);
  }
  return sums;
}

void horizontal_neon(const Taps& taps, const PackedTaps&, const uint8_t* const* rows, uint8_t* const* out) {
  const uint32_t low = taps.low();
  for (size_t i = 0; i < taps.first.size(); ++i) {
    const int32_t* weights = &taps.weights[size_t{taps.stride} * i];
    const size_t first = size_t{3} * (taps.first[i] - low);
    const uint32_t count = taps.count[i], blocks = count / 4, rest = count % 4;
    int32x4_t sums[ResizeKernels::kRows];
    for (uint32_t row = 0; row < ResizeKernels::kRows; ++row) {
      const uint8_t* from = rows[row] + first;
      sums[row] = vdupq_n_s32(kHalf);
      for (uint32_t block = 0; block < blocks; ++block, from += 12) {
        sums[row] = add_taps(sums[row], vld1q_u8(from), weights + 4 * block, 4);
      }
      if (rest) sums[row] = add_taps(sums[row], vld1q_u8(from), weights + 4 * blocks, rest);
    }
    for (uint32_t row = 0; row < ResizeKernels::kRows; ++row) {
      const uint16x4_t pixel = round_off(sums[row]);
      const uint8x8_t bytes = vqmovn_u16(vcombine_u16(pixel, pixel));
      vst1_lane_u32(reinterpret_cast<uint32_t*>(out[row] + 3 * i), vreinterpret_u32_u8(bytes), 0);
    }
  }
}

inline void vertical_16(const uint8_t* const* rows, const int32_t* weights, uint32_t count, size_t at,
                        uint8_t* out) {
  int32x4_t sums[4] = {vdupq_n_s32(kHalf), vdupq_n_s32(kHalf), vdupq_n_s32(kHalf), vdupq_n_s32(kHalf)};
  for (uint32_t t = 0; t < count; ++t) {
    const uint8x16_t bytes = vld1q_u8(rows[t] + at);
    const uint16x8_t left = vmovl_u8(vget_low_u8(bytes)), right = vmovl_high_u8(bytes);
    const uint32x4_t pixels[4] = {vmovl_u16(vget_low_u16(left)), vmovl_high_u16(left),
                                  vmovl_u16(vget_low_u16(right)), vmovl_high_u16(right)};
    for (int i = 0; i < 4; ++i) {
      sums[i] = vmlaq_n_s32(sums[i], vreinterpretq_s32_u32(pixels[i]), weights[t]);
    }
  }
  const uint16x8_t left = vcombine_u16(round_off(sums[0]), round_off(sums[1]));
  const uint16x8_t right = vcombine_u16(round_off(sums[2]), round_off(sums[3]));
  vst1q_u8(out + at, vcombine_u8(vqmovn_u16(left), vqmovn_u16(right)));
}

void vertical_neon(const uint8_t* const* rows, const int32_t* weights, uint32_t count, uint8_t* out,
                   size_t bytes) {
  if (bytes < 16) return vertical_portable(rows, weights, count, out, bytes);
  for (size_t at = 0; at + 16 <= bytes; at += 16) vertical_16(rows, weights, count, at, out);
  if (bytes % 16) vertical_16(rows, weights, count, bytes - 16, out);
}

constexpr ResizeKernels kNeon = {false, horizontal_neon, vertical_neon};

#endif

}  // namespace

const ResizeKernels& ResizeKernels::portable() { return kPortable; }

const ResizeKernels& ResizeKernels::best() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2") ? kAvx2 : kPortable;
#elif defined(__aarch64__)
  return kNeon;
#else
  return kPortable;
#endif
}

}  // namespace lape
