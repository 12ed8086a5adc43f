// A batch of stored images to a batch of resized crops.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "jpeg.h"
#include "pool.h"
#include "resize.h"
#include "status.h"
#include "storage.h"

namespace lape {

// Storage modes, as FFCV numbers them.
constexpr uint8_t kModeJpeg = 0, kModeRaw = 1;

struct Image {
  Bytes bytes;  // compressed, or RGB by rows
  uint8_t mode;
  uint32_t width, height;
};

// What is taken of an image.
struct Crop {
  Box box;
  bool flip;
  Filter filter;
};

// What all images of a batch have in common.
struct Output {
  uint32_t width, height;
  bool crop_first;  // pixels outside the box do not count; the box must then be whole pixels
  bool reference;   // decode with libjpeg's own entropy decoder
};

// What one thread needs to decode images; grows to what the largest of them takes.
class ImageDecoder {
 public:
  explicit ImageDecoder(const ResizeKernels& kernels)
      : reader(ResizeKernels::kOverread), resizer_(kernels) {}

  ByteReader reader;

  // Writes output.height x output.width x 3 bytes; zeros unless the status is ok.
  Status decode(const Image& image, const Crop& crop, const Output& output, uint8_t* out);

 private:
  Status decode_into(const Image& image, const Crop& crop, const Output& output, uint8_t* out);
  Status resize_jpeg(const Image& image, const Rect& part, bool reference, uint8_t* out);
  void resize_raw(const Image& image, const Rect& part, uint8_t* out);

  JpegDecoder jpeg_;
  Resizer resizer_;
  std::vector<uint8_t> rows_;
};

// Arrays of one entry for each image; `boxes` of x, y, width and height.
struct Batch {
  const uint8_t* file;  // in memory, unless there are descriptors
  size_t file_length;
  const int32_t* descriptors;  // of the open file that holds each image, or null
  bool checksums;              // behind each image in an open file
  size_t images;
  const uint64_t* offsets;
  const uint64_t* lengths;
  const uint8_t* modes;
  const uint32_t* widths;
  const uint32_t* heights;
  const double* boxes;
  const uint8_t* flips;
  const uint8_t* filters;
  uint8_t* out;
  int32_t* statuses;
};

class BatchDecoder {
 public:
  BatchDecoder(int threads, bool simd);
  // One batch at a time: a second caller waits.
  void decode(const Batch& batch, const Output& output);

 private:
  static Status decode_image(ImageDecoder& decoder, const Batch& batch, const Output& output, size_t i,
                             uint8_t* out);

  std::vector<std::unique_ptr<ImageDecoder>> decoders_;
  std::mutex mutex_;
  ThreadPool pool_;
};

}  // namespace lape
