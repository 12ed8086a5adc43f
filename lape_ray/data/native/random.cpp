#include "random.h"

#include <algorithm>
#include <cmath>

namespace lape {
namespace {

constexpr int kRounds = 10;
constexpr uint32_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;
constexpr uint32_t kWeyl0 = 0x9E3779B9, kWeyl1 = 0xBB67AE85;  // golden ratio; sqrt(3) - 1

constexpr uint32_t kCropTries = 10;

double uniform(uint32_t word) { return word * 0x1p-32; }  // in [0, 1)

uint32_t below(uint32_t word, uint32_t bound) {
  return static_cast<uint32_t>((uint64_t{word} * bound) >> 32);
}

}  // namespace

Words4 philox4x32(Words4 counter, std::array<uint32_t, 2> key) {
  for (int round = 0; round < kRounds; ++round) {
    const uint64_t product0 = uint64_t{kMultiplier0} * counter[0],
                   product1 = uint64_t{kMultiplier1} * counter[2];
    counter = {static_cast<uint32_t>(product1 >> 32) ^ counter[1] ^ key[0], static_cast<uint32_t>(product1),
               static_cast<uint32_t>(product0 >> 32) ^ counter[3] ^ key[1], static_cast<uint32_t>(product0)};
    key[0] += kWeyl0;
    key[1] += kWeyl1;
  }
  return counter;
}

Words4 draw(uint64_t seed, uint32_t epoch, uint64_t position, Stream stream, uint32_t index) {
  const Words4 counter = {static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32), epoch,
                          static_cast<uint32_t>(stream) << 16 | index};
  return philox4x32(counter, {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)});
}

std::array<int32_t, 4> random_resized_crop(uint64_t seed, uint32_t epoch, uint64_t position, uint32_t width,
                                           uint32_t height, const CropRange& range) {
  const double area = static_cast<double>(width) * height;
  const double min_log = std::log(range.min_ratio), max_log = std::log(range.max_ratio);
  for (uint32_t attempt = 0; attempt < kCropTries; ++attempt) {
    const Words4 words = draw(seed, epoch, position, Stream::crop, attempt);
    const double target = area * (range.min_scale + (range.max_scale - range.min_scale) * uniform(words[0]));
    const double ratio = std::exp(min_log + (max_log - min_log) * uniform(words[1]));
    const double w = std::nearbyint(std::sqrt(target * ratio)), h = std::nearbyint(std::sqrt(target / ratio));
    if (w < 1 || w > width || h < 1 || h > height) continue;
    const auto crop_width = static_cast<uint32_t>(w), crop_height = static_cast<uint32_t>(h);
    const uint32_t x = below(words[2], width - crop_width + 1), y = below(words[3], height - crop_height + 1);
    return {int32_t(x), int32_t(y), int32_t(crop_width), int32_t(crop_height)};
  }
  // No try fitted: the largest centred crop of a permitted shape.
  double w = width, h = height;
  if (w / h < range.min_ratio) {
    h = std::max(1.0, std::nearbyint(w / range.min_ratio));
  } else if (w / h > range.max_ratio) {
    w = std::max(1.0, std::nearbyint(h * range.max_ratio));
  }
  return {int32_t(width - uint32_t(w)) / 2, int32_t(height - uint32_t(h)) / 2, int32_t(w), int32_t(h)};
}

bool random_flip(uint64_t seed, uint32_t epoch, uint64_t position, double probability) {
  return uniform(draw(seed, epoch, position, Stream::flip, 0)[0]) < probability;
}

}  // namespace lape
