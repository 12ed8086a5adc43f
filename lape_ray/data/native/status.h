// What became of one image. The order is part of the interface: Python reads the texts by index.
#pragma once

#include <cstdint>

namespace lape {

enum class Status : int32_t {
  ok,
  damaged,
  bad_header,
  size_mismatch,
  unsupported,
  no_memory,
  bad_box,
  out_of_range,
  bad_mode,
  too_large,
  read_failed,
  cut_short,
  wrong_checksum,
};

constexpr const char* kStatusTexts[] = {
    "ok",
    "the compressed data is damaged or incomplete",
    "the data does not start with a readable JPEG header",
    "the image's own size differs from the size in the metadata",
    "the colour space or JPEG process is not supported (8-bit grey, YCbCr or RGB is)",
    "out of memory",
    "the crop box is empty, not finite or not inside the image",
    "the data's offset and length do not fit the file, or the length does not fit the image's size",
    "the storage mode is neither 0 (JPEG) nor 1 (raw RGB)",
    "the image has more pixels than the limit, or more scans than any encoder writes",
    "the disk or the network failed while the file was read",
    "the file ends before the image does: it was cut short after it was opened",
    "the bytes are not those that were written (CRC-32C): the file was damaged or changed",
};

// A guard against headers that promise far more than a photograph holds (progressive files are decoded
// whole).
constexpr uint64_t kMaxPixels = uint64_t{1} << 27;

}  // namespace lape
