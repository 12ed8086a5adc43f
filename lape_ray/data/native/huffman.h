// Huffman decoding of baseline JPEG data (ITU-T T.81, annex F.2.2), for random access by restart interval.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <vector>

#include <jpeglib.h>

namespace lape {

// Bits of one entropy-coded segment, most significant first. Past its end (a marker, or the end of the data)
// it delivers zeros and counts them in `beyond`, so that the hot loop needs no checks.
struct BitReader {
  uint64_t bits = 0;
  int count = 0;
  int beyond = 0;
  const uint8_t* next = nullptr;
  const uint8_t* end = nullptr;

  // At least 56 bits afterwards: a code (16) and its magnitude bits (15) fit, with room for another code.
  void refill();
  void consume(int n) {
    bits <<= n & 63;
    count -= n;
  }
  // The next `size` >= 1 bits as the coefficient that they code.
  int32_t magnitude(int size);
  bool overran() const { return count < beyond; }
  // Real bits that are left, as far as it matters whether fewer than 8 (padding) are left before a marker.
  bool only_padding_left() const;

 private:
  // By value: a reader whose address is passed around would not stay in registers.
  [[gnu::noinline]] static BitReader refilled_slowly(BitReader reader);
};

// One Huffman table as a direct lookup on the next kLookupBits bits. Where code and magnitude bits fit into
// them, which is nearly always, an entry holds the coefficient itself.
class HuffmanTable {
 public:
  static constexpr int kLookupBits = 10;

  // What the next bits say.
  struct Entry {
    uint8_t length;    // bits to consume; 0: the code is longer than kLookupBits, or is none
    uint8_t run : 4;   // zeros before the coefficient
    uint8_t size : 4;  // magnitude bits that follow and make the coefficient; 0: `value` is all there is
    int16_t value;
  };

  // Does nothing if the table is the one that was built last.
  void build(const JHUFF_TBL& table);
  const Entry& find_short(uint64_t bits) const { return lookup_[bits >> (64 - kLookupBits)]; }
  Entry find_long(uint64_t bits) const;

 private:
  Entry lookup_[1 << kLookupBits];
  int32_t max_code_[17];   // largest code of each length, -1 for none
  int32_t offset_[17];     // index of a code's symbol minus the code
  JHUFF_TBL source_ = {};  // what the table was built from; many encoders always use the same
  bool built_ = false;
};

// The MCUs [first, last) in both directions, counted in MCUs.
struct McuRegion {
  uint32_t first_row, last_row, first_column, last_column;
};

// Decodes the MCUs of a region out of a single-scan baseline file. libjpeg asks for every MCU of the image in
// raster order; only those of the region cost anything. Where the file has restart markers, segments outside
// the region are not even entered.
class ScanDecoder {
 public:
  // `data` is the entropy-coded segment up to the end of the file. False: the segments that the region needs
  // are not there, or are not numbered as they must be.
  bool start(const jpeg_decompress_struct& jpeg, const uint8_t* data, const uint8_t* end,
             const McuRegion& region);

  // The next MCU in raster order into zeroed blocks; null blocks (libjpeg skips) and MCUs outside the region
  // are passed over. False: damaged data.
  bool next_mcu(JBLOCKROW* blocks);

 private:
  struct Block {
    int component;
    const HuffmanTable* dc;
    const HuffmanTable* ac;
  };

  bool index_segments(const uint8_t* data, const uint8_t* end, uint32_t first, uint32_t last);
  void enter_segment(uint32_t segment);
  template <bool kStore>
  bool decode_mcu(JBLOCKROW* blocks);

  HuffmanTable dc_tables_[NUM_HUFF_TBLS];
  HuffmanTable ac_tables_[NUM_HUFF_TBLS];
  Block blocks_[D_MAX_BLOCKS_IN_MCU];
  int blocks_in_mcu_ = 0;
  McuRegion region_ = {};
  uint32_t columns_ = 0;   // MCUs of a row
  uint32_t total_ = 0;     // MCUs of the image
  uint32_t interval_ = 0;  // MCUs of a segment
  uint32_t row_ = 0;       // of the MCU that is asked for next
  uint32_t column_ = 0;
  uint32_t position_ = 0;     // of the MCU that the reader decodes next
  uint32_t segment_end_ = 0;  // the first MCU after the segment that the reader is in
  uint32_t first_segment_ = 0;
  std::vector<const uint8_t*> segments_;  // where segment first_segment_ + i starts
  BitReader reader_;
  uint32_t predictions_[MAX_COMPS_IN_SCAN];
};

}  // namespace lape
