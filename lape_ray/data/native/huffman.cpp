#include "huffman.h"

#include <algorithm>
#include <cstring>

namespace lape {
namespace {

// Zigzag index -> index in the block (T.81, figure 5), and room for a run that leads past the end.
constexpr uint8_t kNaturalOrder[DCTSIZE2 + 15] = {
    0,  1,  8,  16, 9,  2,  3,  10, 17, 24, 32, 25, 18, 11, 4,  5,  12, 19, 26, 33,
    40, 48, 41, 34, 27, 20, 13, 6,  7,  14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36,
    29, 22, 15, 23, 30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54,
    47, 55, 62, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63,
};

inline uint64_t load_big_endian(const uint8_t* bytes) {
  uint64_t word;
  std::memcpy(&word, bytes, sizeof word);
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
  word = __builtin_bswap64(word);
#endif
  return word;
}

inline bool has_ff(uint64_t word) {
  constexpr uint64_t kOnes = 0x0101010101010101, kHighs = 0x8080808080808080;
  return ((~word - kOnes) & word & kHighs) != 0;
}

// `size` magnitude bits as a signed value (T.81, table F.1): a leading 0 means a negative one.
inline int32_t extend(uint32_t magnitude, int size) {
  return static_cast<int32_t>(magnitude) - ((magnitude >> (size - 1)) ? 0 : (1 << size) - 1);
}

}  // namespace

inline void BitReader::refill() {
  if (end - next >= 8) {
    const uint64_t word = load_big_endian(next);
    if (!has_ff(word)) {
      // The bits below the whole bytes that are counted stay set; the next refill ORs the same bits there.
      bits |= word >> count;
      const int bytes = (63 - count) >> 3;
      next += bytes;
      count += 8 * bytes;
      return;
    }
  }
  *this = refilled_slowly(*this);
}

inline int32_t BitReader::magnitude(int size) {
  const int32_t value = extend(static_cast<uint32_t>(bits >> (64 - size)), size);
  consume(size);
  return value;
}

BitReader BitReader::refilled_slowly(BitReader reader) {
  while (reader.count <= 56) {
    uint64_t byte = 0;
    if (reader.next < reader.end && *reader.next != 0xFF) {
      byte = *reader.next++;
    } else if (reader.end - reader.next >= 2 && reader.next[1] == 0) {  // a stuffed 0xFF
      byte = 0xFF;
      reader.next += 2;
    } else {
      reader.beyond += 8;
    }
    reader.bits |= byte << (56 - reader.count);
    reader.count += 8;
  }
  return reader;
}

bool BitReader::only_padding_left() const {
  return count - beyond < 8 && (beyond > 0 || end - next < 2 || (next[0] == 0xFF && next[1] != 0));
}

void HuffmanTable::build(const JHUFF_TBL& table) {
  if (built_ && std::memcmp(table.bits, source_.bits, sizeof table.bits) == 0 &&
      std::memcmp(table.huffval, source_.huffval, sizeof table.huffval) == 0) {
    return;
  }
  source_ = table;
  built_ = true;
  std::fill(std::begin(lookup_), std::end(lookup_), Entry{});
  std::fill(std::begin(max_code_), std::end(max_code_), -1);
  int32_t code = 0, index = 0;
  for (int length = 1; length <= 16; ++length, code <<= 1) {
    const int codes = std::min({int(table.bits[length]), 256 - index, (1 << length) - code});
    if (codes <= 0) continue;
    offset_[length] = index - code;
    for (int i = 0; i < codes; ++i, ++code, ++index) {
      if (length > kLookupBits) continue;
      const uint8_t run = table.huffval[index] >> 4, size = table.huffval[index] & 15;
      const int rest = kLookupBits - length;
      Entry* entries = lookup_ + (code << rest);
      if (size == 0 || size > rest) {
        std::fill_n(entries, 1 << rest, Entry{uint8_t(length), run, size, 0});
        continue;
      }
      for (uint32_t magnitude = 0; magnitude < (1u << size); ++magnitude) {
        const auto value = static_cast<int16_t>(extend(magnitude, size));
        std::fill_n(entries + (magnitude << (rest - size)), 1 << (rest - size),
                    Entry{uint8_t(length + size), run, 0, value});
      }
    }
    max_code_[length] = code - 1;
  }
}

HuffmanTable::Entry HuffmanTable::find_long(uint64_t bits) const {
  for (int length = kLookupBits + 1; length <= 16; ++length) {
    const auto code = static_cast<int32_t>(bits >> (64 - length));
    if (code <= max_code_[length]) {
      const uint8_t symbol = source_.huffval[(code + offset_[length]) & 0xFF];
      return {uint8_t(length), uint8_t(symbol >> 4), uint8_t(symbol & 15), 0};
    }
  }
  return {};
}

bool ScanDecoder::start(const jpeg_decompress_struct& jpeg, const uint8_t* data, const uint8_t* end,
                        const McuRegion& region) {
  columns_ = jpeg.MCUs_per_row;
  total_ = jpeg.MCUs_per_row * jpeg.MCU_rows_in_scan;
  interval_ = jpeg.restart_interval ? jpeg.restart_interval : total_;
  region_ = region;
  row_ = column_ = segment_end_ = 0;
  blocks_in_mcu_ = jpeg.blocks_in_MCU;
  for (int block = 0; block < blocks_in_mcu_; ++block) {
    const int component = jpeg.MCU_membership[block];
    const int dc = jpeg.cur_comp_info[component]->dc_tbl_no, ac = jpeg.cur_comp_info[component]->ac_tbl_no;
    dc_tables_[dc].build(*jpeg.dc_huff_tbl_ptrs[dc]);
    ac_tables_[ac].build(*jpeg.ac_huff_tbl_ptrs[ac]);
    blocks_[block] = {component, &dc_tables_[dc], &ac_tables_[ac]};
  }
  const uint32_t first = region.first_row * columns_ + region.first_column;
  const uint32_t last = (region.last_row - 1) * columns_ + region.last_column - 1;
  return index_segments(data, end, first / interval_, last / interval_);
}

bool ScanDecoder::index_segments(const uint8_t* data, const uint8_t* end, uint32_t first, uint32_t last) {
  first_segment_ = first;
  segments_.clear();
  if (first == 0) segments_.push_back(data);
  const uint8_t* p = data;
  for (uint32_t segment = 0; segment < last;) {
    p = static_cast<const uint8_t*>(std::memchr(p, 0xFF, end - p));
    if (p == nullptr || end - p < 2) return false;
    const uint8_t marker = p[1];
    if (marker == 0xFF) {  // a fill byte before a marker
      p += 1;
      continue;
    }
    p += 2;
    if (marker == 0) continue;
    if (marker != JPEG_RST0 + segment % 8) return false;
    if (++segment >= first) segments_.push_back(p);
  }
  reader_.end = end;
  return true;
}

void ScanDecoder::enter_segment(uint32_t segment) {
  const uint8_t* end = reader_.end;
  reader_ = BitReader();
  reader_.next = segments_[segment - first_segment_];
  reader_.end = end;
  position_ = segment * interval_;
  segment_end_ = std::min(position_ + interval_, total_);
  std::fill(std::begin(predictions_), std::end(predictions_), 0);
}

bool ScanDecoder::next_mcu(JBLOCKROW* blocks) {
  const uint32_t row = row_, column = column_;
  if (++column_ == columns_) {
    column_ = 0;
    ++row_;
  }
  if (blocks == nullptr || row < region_.first_row || row >= region_.last_row ||
      column < region_.first_column || column >= region_.last_column) {
    return true;
  }
  const uint32_t wanted = row * columns_ + column;
  if (wanted >= segment_end_) enter_segment(wanted / interval_);
  for (; position_ < wanted; ++position_) {
    if (!decode_mcu<false>(nullptr)) return false;
  }
  if (!decode_mcu<true>(blocks)) return false;
  ++position_;
  // Whatever is left before a restart marker was not coded by this image's encoder.
  return position_ < segment_end_ || position_ == total_ || reader_.only_padding_left();
}

template <bool kStore>
bool ScanDecoder::decode_mcu(JBLOCKROW* blocks) {
  BitReader reader = reader_;  // in registers
  for (int i = 0; i < blocks_in_mcu_; ++i) {
    const Block& plan = blocks_[i];
    JCOEF* block = kStore ? *blocks[i] : nullptr;

    if (reader.count < 32) reader.refill();
    HuffmanTable::Entry entry = plan.dc->find_short(reader.bits);
    if (entry.length == 0) entry = plan.dc->find_long(reader.bits);
    if (entry.length == 0) return false;
    reader.consume(entry.length);
    const int32_t difference = entry.size ? reader.magnitude(entry.size) : entry.value;
    predictions_[plan.component] += static_cast<uint32_t>(difference);
    if (kStore) block[0] = static_cast<JCOEF>(predictions_[plan.component]);

    int k = 1;
    do {
      if (reader.count < 32) reader.refill();
      const HuffmanTable::Entry& known = plan.ac->find_short(reader.bits);
      if (known.value != 0) {
        reader.consume(known.length);
        k += known.run;
        if (kStore) block[kNaturalOrder[k]] = known.value;
        ++k;
        continue;
      }
      entry = known.length ? known : plan.ac->find_long(reader.bits);
      if (entry.length == 0) return false;
      reader.consume(entry.length);
      if (entry.size == 0) {
        if (entry.run != 15) break;  // end of block
        k += 16;
        continue;
      }
      k += entry.run;
      const int32_t value = reader.magnitude(entry.size);
      if (kStore) block[kNaturalOrder[k]] = static_cast<JCOEF>(value);
      ++k;
    } while (k < DCTSIZE2);
    if (k > DCTSIZE2) return false;
  }
  reader_ = reader;
  return !reader.overran();
}

}  // namespace lape
