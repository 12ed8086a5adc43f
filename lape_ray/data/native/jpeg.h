// Decoding a part of a JPEG with libjpeg-turbo: no more entropy decoding, IDCT, upsampling and colour
// conversion than the part needs, and the same pixels as a whole decode (accurate DCT, "fancy" upsampling).
#pragma once

#include <csetjmp>
#include <cstddef>
#include <cstdint>
#include <cstdio>

#include <jpeglib.h>

#include "huffman.h"
#include "status.h"

namespace lape {

struct Rect {
  uint32_t x, y, width, height;
};

// libjpeg's error handler. Warnings that mean wrong pixels end the decoding as errors do, and so do more
// scans than any encoder writes.
struct JpegErrors {
  jpeg_error_mgr manager;      // first: libjpeg's pointer to it is a pointer to this
  jpeg_progress_mgr progress;  // for jpeg_decompress_struct::progress
  std::jmp_buf jump;
  Status status;    // after a jump
  Status on_error;  // what an error means in the present phase
  JpegErrors();
};

// One per thread; reused from image to image.
class JpegDecoder {
 public:
  JpegDecoder();
  ~JpegDecoder();
  JpegDecoder(const JpegDecoder&) = delete;
  JpegDecoder& operator=(const JpegDecoder&) = delete;

  // Reads the header and prepares the rows of `part`, which must lie inside width x height, the size that the
  // header must state. `reference` uses libjpeg's own entropy decoder from the start of the data.
  Status start(const uint8_t* data, size_t length, uint32_t width, uint32_t height, const Rect& part,
               bool reference);

  // Pixels of a row that read_rows delivers, and how many of them come before the part.
  uint32_t row_pixels() const { return jpeg_.output_width; }
  uint32_t left_margin() const { return left_margin_; }

  // The next `count` rows of the part, RGB, row_pixels() each.
  Status read_rows(uint8_t* const* rows, uint32_t count);

  // Forgets the image, also in the middle of it.
  void finish();

 private:
  void select_part(const Rect& part, const uint8_t* end, bool reference);
  static boolean decode_mcu(j_decompress_ptr jpeg, JBLOCKROW* blocks);

  JpegErrors errors_;
  jpeg_decompress_struct jpeg_;
  uint32_t left_margin_ = 0;
  ScanDecoder scan_;
};

}  // namespace lape
