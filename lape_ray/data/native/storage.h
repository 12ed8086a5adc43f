// Where the bytes of stored images come from: memory, or open files.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "status.h"

namespace lape {

// Bytes of one image. `readable` counts those that may be read from `data` on, at least `length`.
struct Bytes {
  const uint8_t* data = nullptr;
  size_t length = 0;
  size_t readable = 0;
};

constexpr size_t kChecksumBytes = 4;

// One thread's way to images' bytes.
//
// Files are read, not mapped: a mapped file that is cut short kills the process, and a page of it that cannot
// be read does as well; read() says so. The copy costs a hundredth of the decoding.
class ByteReader {
 public:
  explicit ByteReader(size_t overread) : overread_(overread) {}

  // Bytes of `file`, of `file_length` bytes, which stay where they are.
  static Status from_memory(const uint8_t* file, size_t file_length, uint64_t offset, uint64_t length,
                            Bytes& bytes);

  // Bytes of an open file, which are valid until the next call, followed by `overread` bytes of any value.
  // With `checksum` the CRC-32C of the bytes lies behind them in the file, little endian, and must agree.
  Status from_file(int descriptor, uint64_t offset, uint64_t length, bool checksum, Bytes& bytes);

 private:
  size_t overread_;
  size_t capacity_ = 0;
  std::unique_ptr<uint8_t[]> buffer_;
};

}  // namespace lape
