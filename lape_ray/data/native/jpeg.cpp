#include "jpeg.h"

#include <algorithm>
#include <new>

#include <jerror.h>

#ifndef LIBJPEG_TURBO_VERSION
#error "the crop decoder needs the headers of libjpeg-turbo (Debian: libjpeg62-turbo-dev)"
#endif

// The head of libjpeg's interface to an entropy decoder, which jpeglib.h leaves incomplete; it has been the
// same in every libjpeg-turbo (1.0 to 3.2). Replacing decode_mcu is what lets a crop start at a restart
// marker: libjpeg's own decoder must read every bit before it, and takes its slow path where a file has
// markers.
struct jpeg_entropy_decoder {
  void (*start_pass)(j_decompress_ptr);
  boolean (*decode_mcu)(j_decompress_ptr, JBLOCKROW*);
};

namespace lape {
namespace {

// Fancy upsampling mixes a chroma sample with its neighbours, so a pixel depends on pixels up to 2 away.
constexpr uint32_t kUpsamplingReach = 2;
constexpr int kMaxScans = 100;  // encoders write about 10; a hostile file can hold thousands

[[noreturn]] void fail(j_common_ptr jpeg, Status status) {
  auto* errors = reinterpret_cast<JpegErrors*>(jpeg->err);
  errors->status = status;
  std::longjmp(errors->jump, 1);
}

void on_error(j_common_ptr jpeg) {
  switch (jpeg->err->msg_code) {
    case JERR_OUT_OF_MEMORY:
      fail(jpeg, Status::no_memory);
    case JERR_BAD_PRECISION:
    case JERR_BAD_J_COLORSPACE:
    case JERR_COMPONENT_COUNT:
    case JERR_CONVERSION_NOTIMPL:
    case JERR_NOTIMPL:
    case JERR_NOT_COMPILED:
    case JERR_SOF_UNSUPPORTED:
      fail(jpeg, Status::unsupported);
    default:
      fail(jpeg, reinterpret_cast<JpegErrors*>(jpeg->err)->on_error);
  }
}

void on_message(j_common_ptr jpeg, int level) {
  if (level >= 0) return;  // a trace message
  const int code = jpeg->err->msg_code;
  const bool harmless = code == JWRN_ADOBE_XFORM || code == JWRN_JFIF_MAJOR || code == JWRN_BOGUS_ICC;
  if (!harmless) fail(jpeg, Status::damaged);
}

void print_nothing(j_common_ptr) {}

void check_scans(j_common_ptr jpeg) {
  if (reinterpret_cast<j_decompress_ptr>(jpeg)->input_scan_number > kMaxScans) fail(jpeg, Status::too_large);
}

}  // namespace

JpegErrors::JpegErrors() : progress(), status(Status::ok), on_error(Status::damaged) {
  jpeg_std_error(&manager);
  manager.error_exit = lape::on_error;
  manager.emit_message = on_message;
  manager.output_message = print_nothing;
  progress.progress_monitor = check_scans;
}

JpegDecoder::JpegDecoder() {
  jpeg_.err = &errors_.manager;
  if (setjmp(errors_.jump)) throw std::bad_alloc();  // creation can fail in no other way
  jpeg_create_decompress(&jpeg_);
  jpeg_.progress = &errors_.progress;
  jpeg_.client_data = &scan_;
}

JpegDecoder::~JpegDecoder() { jpeg_destroy_decompress(&jpeg_); }

boolean JpegDecoder::decode_mcu(j_decompress_ptr jpeg, JBLOCKROW* blocks) {
  if (!static_cast<ScanDecoder*>(jpeg->client_data)->next_mcu(blocks)) {
    fail(reinterpret_cast<j_common_ptr>(jpeg), Status::damaged);
  }
  return TRUE;
}

Status JpegDecoder::start(const uint8_t* data, size_t length, uint32_t width, uint32_t height,
                          const Rect& part, bool reference) {
  if (setjmp(errors_.jump)) return errors_.status;
  errors_.on_error = Status::bad_header;
  jpeg_mem_src(&jpeg_, data, length);
  jpeg_read_header(&jpeg_, TRUE);
  if (jpeg_.image_width != width || jpeg_.image_height != height) return Status::size_mismatch;
  if (jpeg_.jpeg_color_space != JCS_YCbCr && jpeg_.jpeg_color_space != JCS_RGB &&
      jpeg_.jpeg_color_space != JCS_GRAYSCALE) {
    return Status::unsupported;
  }
  errors_.on_error = Status::damaged;
  jpeg_.out_color_space = JCS_RGB;
  jpeg_.dct_method = JDCT_ISLOW;
  jpeg_.do_fancy_upsampling = TRUE;
  jpeg_start_decompress(&jpeg_);
  select_part(part, data + length, reference);
  return Status::ok;
}

void JpegDecoder::select_part(const Rect& part, const uint8_t* end, bool reference) {
  JDIMENSION x = part.x - std::min(part.x, kUpsamplingReach);
  JDIMENSION pixels = std::min(part.x + part.width + kUpsamplingReach, jpeg_.image_width) - x;
  jpeg_crop_scanline(&jpeg_, &x, &pixels);  // moves x to the left, to a multiple of the MCU's width
  left_margin_ = part.x - x;

  const bool whole_scan = !jpeg_.progressive_mode && jpeg_.comps_in_scan == jpeg_.num_components;
  if (whole_scan && !jpeg_.arith_code && !reference) {
    // A scan of one component has MCUs of one block, whatever its sampling factors.
    const bool single = jpeg_.comps_in_scan == 1;
    const uint32_t mcu_width = single ? DCTSIZE : DCTSIZE * jpeg_.max_h_samp_factor;
    const uint32_t mcu_height = single ? DCTSIZE : DCTSIZE * jpeg_.max_v_samp_factor;
    McuRegion region;
    region.first_column = x / mcu_width;
    region.last_column = (x + pixels - 1) / mcu_width + 1;
    region.first_row = (part.y - std::min(part.y, kUpsamplingReach)) / mcu_height;
    region.last_row =
        (std::min(part.y + part.height + kUpsamplingReach, jpeg_.image_height) - 1) / mcu_height + 1;
    if (!scan_.start(jpeg_, jpeg_.src->next_input_byte, end, region)) {
      fail(reinterpret_cast<j_common_ptr>(&jpeg_), Status::damaged);
    }
    jpeg_.entropy->decode_mcu = decode_mcu;
  }
  jpeg_skip_scanlines(&jpeg_, part.y);
}

Status JpegDecoder::read_rows(uint8_t* const* rows, uint32_t count) {
  if (setjmp(errors_.jump)) return errors_.status;
  for (uint32_t done = 0; done < count;) {
    const JDIMENSION read = jpeg_read_scanlines(&jpeg_, const_cast<uint8_t**>(rows) + done, count - done);
    if (read == 0) return Status::damaged;
    done += read;
  }
  return Status::ok;
}

void JpegDecoder::finish() { jpeg_abort_decompress(&jpeg_); }

}  // namespace lape
