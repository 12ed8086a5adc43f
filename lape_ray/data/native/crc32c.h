// CRC-32C (Castagnoli; RFC 3720, appendix B.4), which processors compute: 8 bytes every 3 cycles.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lape {

// Of `length` bytes; `portable` leaves the processor's instruction unused.
uint32_t crc32c(const uint8_t* data, size_t length, bool portable = false);

}  // namespace lape
