#include "resize.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

namespace lape {
namespace {

// The filters of Pillow's BILINEAR and BICUBIC: a triangle, and Keys' cubic convolution (1981) with a = -0.5.
// The order of operations is Pillow's, because the last bit of a weight depends on it.
inline double triangle(double x) {
  x = std::fabs(x);
  return x < 1.0 ? 1.0 - x : 0.0;
}

inline double cubic(double x) {
  constexpr double a = -0.5;
  x = std::fabs(x);
  const double near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
  const double far = (((x - 5) * x + 8) * x - 4) * a;
  return x < 1.0 ? near : x < 2.0 ? far : 0.0;
}

}  // namespace

void Taps::plan(Filter filter, uint32_t input, double begin, double end, uint32_t output) {
  const double scale = (end - begin) / output, filter_scale = std::max(scale, 1.0);
  const double support = (filter == Filter::bicubic ? 2.0 : 1.0) * filter_scale, inverse = 1.0 / filter_scale;
  stride = static_cast<uint32_t>(std::ceil(support)) * 2 + 1;
  identity = scale == 1.0 && begin == std::floor(begin);
  if (identity) {
    stride = 1;
    first.resize(output);
    std::iota(first.begin(), first.end(), static_cast<uint32_t>(begin));
    count.assign(output, 1);
    weights.assign(output, 1 << kWeightBits);
    return;
  }
  first.resize(output);
  count.resize(output);
  weights.assign(size_t{stride} * output, 0);
  raw_.resize(stride);
  double* raw = raw_.data();
  for (uint32_t i = 0; i < output; ++i) {
    const double center = begin + (i + 0.5) * scale;
    const int low = std::max(static_cast<int>(center - support + 0.5), 0);
    const int high = std::min(static_cast<int>(center + support + 0.5), static_cast<int>(input));
    const int taps = std::min(high - low, static_cast<int>(stride));
    if (filter == Filter::bicubic) {
      for (int t = 0; t < taps; ++t) raw[t] = cubic((t + low - center + 0.5) * inverse);
    } else {
      for (int t = 0; t < taps; ++t) raw[t] = triangle((t + low - center + 0.5) * inverse);
    }
    double sum = 0.0;
    for (int t = 0; t < taps; ++t) sum += raw[t];
    int32_t* weight = &weights[size_t{stride} * i];
    for (int t = 0; t < taps; ++t) {
      const double scaled = (sum != 0.0 ? raw[t] / sum : raw[t]) * (1 << kWeightBits);
      weight[t] = static_cast<int32_t>(scaled < 0 ? scaled - 0.5 : scaled + 0.5);
    }
    first[i] = low;
    count[i] = taps;
  }
}

void Taps::mirror() {
  std::reverse(first.begin(), first.end());
  std::reverse(count.begin(), count.end());
  const uint32_t output = static_cast<uint32_t>(first.size());
  for (uint32_t i = 0; i < output / 2; ++i) {
    int32_t* weight = &weights[size_t{stride} * i];
    std::swap_ranges(weight, weight + stride, &weights[size_t{stride} * (output - 1 - i)]);
  }
}

uint32_t Taps::low() const { return std::min(first.front(), first.back()); }

uint32_t Taps::high() const { return std::max(first.front() + count.front(), first.back() + count.back()); }

void PackedTaps::pack(const Taps& taps) {
  const uint32_t low = taps.low(), input = taps.high() - low;
  const uint32_t most = *std::max_element(taps.count.begin(), taps.count.end());
  pairs = (most + 1) / 2;
  blocks = (most + 3) / 4;
  first.resize(taps.first.size());
  weights.assign(size_t{blocks} * 8 * first.size(), 0);
  for (size_t i = 0; i < first.size(); ++i) {
    const uint32_t begin = taps.first[i] - low;
    first[i] = std::min(begin, input - std::min(input, pairs * 2));
    int16_t* packed = &weights[size_t{blocks} * 8 * i];
    const int32_t* weight = &taps.weights[size_t{taps.stride} * i];
    for (uint32_t t = 0, at = begin - first[i]; t < taps.count[i]; ++t, ++at) {
      packed[at / 4 * 8 + at % 4] = static_cast<int16_t>(weight[t] >> kLowBits);
      packed[at / 4 * 8 + at % 4 + 4] = static_cast<int16_t>(weight[t] & ((1 << kLowBits) - 1));
    }
  }
}

void Resizer::plan(Filter filter, uint32_t width, uint32_t height, const Box& box, uint32_t out_width,
                   uint32_t out_height, bool flip) {
  across_.plan(filter, width, box.x, box.x + box.width, out_width);
  down_.plan(filter, height, box.y, box.y + box.height, out_height);
  copies_rows_ = across_.identity && !flip;
  if (flip) across_.mirror();
  if (kernels_.packed && !copies_rows_) packed_.pack(across_);
  row_bytes_ = size_t{3} * out_width;
  ring_stride_ = row_bytes_ + ResizeKernels::kOverwrite;
  slots_ = *std::max_element(down_.count.begin(), down_.count.end()) + ResizeKernels::kRows - 1;
  ring_.resize(slots_ * ring_stride_);
  window_.resize(slots_);
  pushed_ = written_ = 0;
}

void Resizer::push(const uint8_t* const* rows, uint32_t count, uint8_t* out) {
  const uint8_t* from[ResizeKernels::kRows];
  uint8_t* to[ResizeKernels::kRows];
  for (uint32_t i = 0; i < ResizeKernels::kRows; ++i) {
    const uint32_t row = std::min(i, count - 1);  // the last rows of an image may be fewer: repeat one
    from[i] = rows[row];
    to[i] = &ring_[(pushed_ + row) % slots_ * ring_stride_];
  }
  if (copies_rows_) {
    for (uint32_t i = 0; i < count; ++i) std::memcpy(to[i], from[i], row_bytes_);
  } else {
    kernels_.horizontal(across_, packed_, from, to);
  }
  pushed_ += count;
  const uint32_t low = down_.low();
  for (; written_ < down_.first.size(); ++written_) {
    const uint32_t first = down_.first[written_] - low, taps = down_.count[written_];
    if (first + taps > pushed_) return;
    for (uint32_t t = 0; t < taps; ++t) window_[t] = &ring_[(first + t) % slots_ * ring_stride_];
    const int32_t* weights = &down_.weights[size_t{down_.stride} * written_];
    uint8_t* to_row = out + written_ * row_bytes_;
    if (taps == 1) {  // its weight is 1
      std::memcpy(to_row, window_[0], row_bytes_);
    } else {
      kernels_.vertical(window_.data(), weights, taps, to_row, row_bytes_);
    }
  }
}

}  // namespace lape
