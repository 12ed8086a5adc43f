#include "crc32c.h"

#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <nmmintrin.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <arm_acle.h>
#include <sys/auxv.h>
#endif

namespace lape {
namespace {

constexpr uint32_t kPolynomial = 0x82F63B78;  // 0x1EDC6F41, reflected

// What each byte value adds when 0 to 7 bytes follow it.
using Tables = std::array<std::array<uint32_t, 256>, 8>;

constexpr Tables make_tables() {
  Tables tables{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ (crc & 1 ? kPolynomial : 0);
    tables[0][byte] = crc;
  }
  for (size_t n = 1; n < 8; ++n) {
    for (uint32_t byte = 0; byte < 256; ++byte) {
      const uint32_t before = tables[n - 1][byte];
      tables[n][byte] = (before >> 8) ^ tables[0][before & 0xFF];
    }
  }
  return tables;
}

constexpr Tables kTables = make_tables();

uint32_t add_byte(uint32_t crc, uint8_t byte) { return (crc >> 8) ^ kTables[0][(crc ^ byte) & 0xFF]; }

uint32_t add_portable(uint32_t crc, const uint8_t* data, size_t length) {
  for (; length >= 8; data += 8, length -= 8) {
    for (size_t i = 0; i < 4; ++i) crc ^= uint32_t{data[i]} << (8 * i);
    uint32_t next = 0;
    for (size_t i = 0; i < 4; ++i) {
      next ^= kTables[7 - i][(crc >> (8 * i)) & 0xFF] ^ kTables[3 - i][data[4 + i]];
    }
    crc = next;
  }
  for (; length; --length) crc = add_byte(crc, *data++);
  return crc;
}

#if defined(__x86_64__)
__attribute__((target("sse4.2"))) uint32_t add_words(uint32_t crc, const uint8_t* data, size_t words) {
  uint64_t wide = crc;
  for (; words; --words, data += 8) {
    uint64_t word;
    std::memcpy(&word, data, 8);
    wide = _mm_crc32_u64(wide, word);
  }
  return static_cast<uint32_t>(wide);
}
bool has_instruction() { return __builtin_cpu_supports("sse4.2"); }
#elif defined(__aarch64__) && defined(__linux__)
__attribute__((target("+crc"))) uint32_t add_words(uint32_t crc, const uint8_t* data, size_t words) {
  for (; words; --words, data += 8) {
    uint64_t word;
    std::memcpy(&word, data, 8);
    crc = __crc32cd(crc, word);
  }
  return crc;
}
bool has_instruction() { return getauxval(AT_HWCAP) & HWCAP_CRC32; }
#else
uint32_t add_words(uint32_t crc, const uint8_t*, size_t) { return crc; }
bool has_instruction() { return false; }
#endif

}  // namespace

uint32_t crc32c(const uint8_t* data, size_t length, bool portable) {
  uint32_t crc = 0xFFFFFFFF;
  if (!portable && has_instruction()) {
    const size_t words = length / 8;
    crc = add_words(crc, data, words);
    data += 8 * words;
    length %= 8;
  }
  return ~add_portable(crc, data, length);
}

}  // namespace lape
