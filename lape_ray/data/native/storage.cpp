#include "storage.h"

#include <algorithm>
#include <cerrno>
#include <limits>

#include <unistd.h>

#include "crc32c.h"

namespace lape {

Status ByteReader::from_memory(const uint8_t* file, size_t file_length, uint64_t offset, uint64_t length,
                               Bytes& bytes) {
  if (offset > file_length || length > file_length - offset) return Status::out_of_range;
  bytes = {file + offset, static_cast<size_t>(length), static_cast<size_t>(file_length - offset)};
  return Status::ok;
}

Status ByteReader::from_file(int descriptor, uint64_t offset, uint64_t length, bool checksum, Bytes& bytes) {
  // The format bounds an image by its page, a 32-bit number; a hostile length must not become an allocation.
  if (length > std::numeric_limits<uint32_t>::max() ||
      offset > static_cast<uint64_t>(std::numeric_limits<off_t>::max()) - length - kChecksumBytes) {
    return Status::out_of_range;
  }
  const size_t wanted = length + (checksum ? kChecksumBytes : 0);
  if (capacity_ < wanted + overread_) {
    const size_t capacity = std::max(wanted + overread_, 2 * capacity_);
    buffer_.reset();
    capacity_ = 0;
    buffer_.reset(new uint8_t[capacity]);
    capacity_ = capacity;
  }
  for (size_t done = 0; done < wanted;) {
    const ssize_t count = pread(descriptor, buffer_.get() + done, wanted - done, offset + done);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return Status::read_failed;
    if (count == 0) return Status::cut_short;
    done += count;
  }
  if (checksum) {
    const uint8_t* stored = buffer_.get() + length;
    const uint32_t value = stored[0] | stored[1] << 8 | stored[2] << 16 | uint32_t{stored[3]} << 24;
    if (crc32c(buffer_.get(), length) != value) return Status::wrong_checksum;
  }
  bytes = {buffer_.get(), static_cast<size_t>(length), capacity_};
  return Status::ok;
}

}  // namespace lape
