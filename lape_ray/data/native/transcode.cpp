#include "transcode.h"

#include <algorithm>
#include <cstdlib>

#include <jerror.h>

#include "jpeg.h"

namespace lape {
namespace {

// Where libjpeg writes to. Its own jpeg_mem_dest loses track of the memory if an error comes in the middle.
struct Destination {
  jpeg_destination_mgr manager = {};  // first: libjpeg's pointer to it is a pointer to this
  uint8_t* bytes = nullptr;
  size_t capacity = 0;

  Destination() {
    manager.init_destination = [](j_compress_ptr) {};
    manager.empty_output_buffer = grow;
    manager.term_destination = [](j_compress_ptr) {};
  }
  ~Destination() { std::free(bytes); }
  size_t size() const { return capacity - manager.free_in_buffer; }

  static boolean grow(j_compress_ptr jpeg) {
    auto* self = reinterpret_cast<Destination*>(jpeg->dest);
    const size_t used = self->capacity, capacity = std::max<size_t>(2 * used, 1 << 16);
    void* bytes = std::realloc(self->bytes, capacity);
    if (bytes == nullptr) ERREXIT1(jpeg, JERR_OUT_OF_MEMORY, 0);
    self->bytes = static_cast<uint8_t*>(bytes);
    self->capacity = capacity;
    self->manager.next_output_byte = self->bytes + used;
    self->manager.free_in_buffer = capacity - used;
    return TRUE;
  }
};

// Both halves of a transcoding, freed however it ends.
struct Transcoder {
  JpegErrors errors;
  jpeg_decompress_struct source = {};
  jpeg_compress_struct target = {};
  Destination destination;

  ~Transcoder() {
    jpeg_destroy_compress(&target);
    jpeg_destroy_decompress(&source);
  }

  Status run(const uint8_t* data, size_t length, uint32_t interval) {
    source.err = target.err = &errors.manager;
    if (setjmp(errors.jump)) return errors.status;
    jpeg_create_decompress(&source);
    jpeg_create_compress(&target);
    source.progress = &errors.progress;
    errors.on_error = Status::bad_header;
    jpeg_mem_src(&source, data, length);
    jpeg_read_header(&source, TRUE);
    if (source.jpeg_color_space != JCS_YCbCr && source.jpeg_color_space != JCS_RGB &&
        source.jpeg_color_space != JCS_GRAYSCALE) {
      return Status::unsupported;
    }
    if (uint64_t{source.image_width} * source.image_height > kMaxPixels) return Status::too_large;
    errors.on_error = Status::damaged;
    jvirt_barray_ptr* coefficients = jpeg_read_coefficients(&source);
    jpeg_copy_critical_parameters(&source, &target);
    target.optimize_coding = TRUE;
    target.restart_interval = interval;
    target.dest = &destination.manager;
    Destination::grow(&target);
    jpeg_write_coefficients(&target, coefficients);
    jpeg_finish_compress(&target);
    return Status::ok;
  }
};

}  // namespace

Status add_restart_markers(const uint8_t* data, size_t length, uint32_t interval, std::vector<uint8_t>& out) {
  Transcoder transcoder;
  const Status status = transcoder.run(data, length, interval);
  const Destination& written = transcoder.destination;
  if (status == Status::ok) out.assign(written.bytes, written.bytes + written.size());
  return status;
}

}  // namespace lape
