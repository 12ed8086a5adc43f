// Counter-based random numbers and the augmentation decisions that are made of them.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace lape {

using Words4 = std::array<uint32_t, 4>;

// Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
Words4 philox4x32(Words4 counter, std::array<uint32_t, 2> key);

// Numbers for one place of a run: the key is the seed; the counter is the position (64 bits), the epoch, and
// the draw, whose upper half says what the numbers are for.
enum class Stream : uint32_t { crop = 0, flip = 1 };
Words4 draw(uint64_t seed, uint32_t epoch, uint64_t position, Stream stream, uint32_t index);

struct CropRange {
  double min_scale, max_scale;  // share of the image's area
  double min_ratio, max_ratio;  // width over height
};

// torchvision's RandomResizedCrop.get_params: x, y, width, height of a width x height image, both above 0.
std::array<int32_t, 4> random_resized_crop(uint64_t seed, uint32_t epoch, uint64_t position, uint32_t width,
                                           uint32_t height, const CropRange& range);

bool random_flip(uint64_t seed, uint32_t epoch, uint64_t position, double probability);

}  // namespace lape
