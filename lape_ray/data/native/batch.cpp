#include "batch.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <exception>

namespace lape {
namespace {

// Where a row is aligned to this, libjpeg-turbo writes its pixels past the cache, to memory. The rows are
// read again at once, so they are placed between such addresses (SSE2 code has them at multiples of 16).
constexpr size_t kCacheBypass = 32;

size_t round_up(size_t value, size_t multiple) { return (value + multiple - 1) / multiple * multiple; }

}  // namespace

Status ImageDecoder::decode(const Image& image, const Crop& crop, const Output& output, uint8_t* out) {
  Status status;
  try {
    status = decode_into(image, crop, output, out);
  } catch (const std::exception&) {  // an allocation failed
    status = Status::no_memory;
  }
  jpeg_.finish();
  if (status != Status::ok) std::memset(out, 0, size_t{3} * output.width * output.height);
  return status;
}

Status ImageDecoder::decode_into(const Image& image, const Crop& crop, const Output& output, uint8_t* out) {
  const Box& box = crop.box;
  if (image.mode != kModeJpeg && image.mode != kModeRaw) return Status::bad_mode;
  const uint64_t pixels = uint64_t{image.width} * image.height;
  if (pixels > kMaxPixels) return Status::too_large;
  if (image.mode == kModeRaw && image.bytes.length != 3 * pixels) return Status::out_of_range;
  constexpr double kRounding = 1e-6;  // of sums of fractions; filters stop at the image's edge anyway
  const bool inside = box.x >= 0 && box.y >= 0 && box.width > 0 && box.height > 0 &&
                      box.x + box.width <= image.width + kRounding &&
                      box.y + box.height <= image.height + kRounding;
  if (!inside) return Status::bad_box;  // not-a-number compares false

  Rect part;
  if (output.crop_first) {
    part = {uint32_t(box.x), uint32_t(box.y), uint32_t(box.width), uint32_t(box.height)};
    if (part.x != box.x || part.y != box.y || part.width != box.width || part.height != box.height) {
      return Status::bad_box;
    }
    resizer_.plan(crop.filter, part.width, part.height, {0, 0, box.width, box.height}, output.width,
                  output.height, crop.flip);
  } else {
    part = {0, 0, image.width, image.height};
    resizer_.plan(crop.filter, image.width, image.height, box, output.width, output.height, crop.flip);
  }
  const Taps &across = resizer_.horizontal(), &down = resizer_.vertical();
  part = {part.x + across.low(), part.y + down.low(), across.high() - across.low(), down.high() - down.low()};
  if (image.mode == kModeJpeg) return resize_jpeg(image, part, output.reference, out);
  resize_raw(image, part, out);
  return Status::ok;
}

Status ImageDecoder::resize_jpeg(const Image& image, const Rect& part, bool reference, uint8_t* out) {
  Status status = jpeg_.start(image.bytes.data, image.bytes.length, image.width, image.height, part, reference);
  if (status != Status::ok) return status;
  const size_t stride = round_up(size_t{3} * jpeg_.row_pixels() + ResizeKernels::kOverread, kCacheBypass);
  rows_.resize(stride * ResizeKernels::kRows + 2 * kCacheBypass);
  uint8_t* first = rows_.data() + kCacheBypass / 4 +
                   (kCacheBypass - reinterpret_cast<uintptr_t>(rows_.data()) % kCacheBypass);
  uint8_t* rows[ResizeKernels::kRows];
  const uint8_t* parts[ResizeKernels::kRows];
  for (uint32_t i = 0; i < ResizeKernels::kRows; ++i) {
    rows[i] = first + stride * i;
    parts[i] = rows[i] + size_t{3} * jpeg_.left_margin();
  }
  for (uint32_t y = 0; y < part.height; y += ResizeKernels::kRows) {
    const uint32_t count = std::min(ResizeKernels::kRows, part.height - y);
    status = jpeg_.read_rows(rows, count);
    if (status != Status::ok) return status;
    resizer_.push(parts, count, out);
  }
  return Status::ok;
}

void ImageDecoder::resize_raw(const Image& image, const Rect& part, uint8_t* out) {
  const size_t bytes = size_t{3} * part.width, stride = bytes + ResizeKernels::kOverread;
  rows_.resize(stride * ResizeKernels::kRows);
  const uint8_t* rows[ResizeKernels::kRows];
  for (uint32_t y = 0; y < part.height; y += ResizeKernels::kRows) {
    const uint32_t count = std::min(ResizeKernels::kRows, part.height - y);
    for (uint32_t i = 0; i < count; ++i) {
      const size_t at = size_t{3} * (size_t{image.width} * (part.y + y + i) + part.x);
      rows[i] = image.bytes.data + at;
      if (at + stride > image.bytes.readable) {  // the file ends too soon after this row
        rows[i] = static_cast<uint8_t*>(std::memcpy(rows_.data() + stride * i, rows[i], bytes));
      }
    }
    resizer_.push(rows, count, out);
  }
}

BatchDecoder::BatchDecoder(int threads, bool simd) : pool_(threads) {
  const ResizeKernels& kernels = simd ? ResizeKernels::best() : ResizeKernels::portable();
  for (int i = 0; i < threads; ++i) decoders_.push_back(std::make_unique<ImageDecoder>(kernels));
}

void BatchDecoder::decode(const Batch& batch, const Output& output) {
  std::lock_guard<std::mutex> lock(mutex_);
  const size_t bytes = size_t{3} * output.width * output.height;
  pool_.run(batch.images, [&](size_t i, int worker) {
    uint8_t* out = batch.out + bytes * i;
    Status status;
    try {
      status = decode_image(*decoders_[worker], batch, output, i, out);
    } catch (const std::exception&) {  // an allocation failed
      status = Status::no_memory;
    }
    if (status != Status::ok) std::memset(out, 0, bytes);
    batch.statuses[i] = static_cast<int32_t>(status);
  });
}

Status BatchDecoder::decode_image(ImageDecoder& decoder, const Batch& batch, const Output& output, size_t i,
                                  uint8_t* out) {
  Image image = {{}, batch.modes[i], batch.widths[i], batch.heights[i]};
  const uint64_t offset = batch.offsets[i], length = batch.lengths[i];
  const Status status =
      batch.descriptors
          ? decoder.reader.from_file(batch.descriptors[i], offset, length, batch.checksums, image.bytes)
          : ByteReader::from_memory(batch.file, batch.file_length, offset, length, image.bytes);
  if (status != Status::ok) return status;
  const double* box = batch.boxes + 4 * i;
  const Crop crop = {{box[0], box[1], box[2], box[3]},
                     batch.flips[i] != 0,
                     batch.filters[i] ? Filter::bicubic : Filter::bilinear};
  return decoder.decode(image, crop, output, out);
}

}  // namespace lape
