// Lossless rewriting of JPEGs for random access.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "status.h"

namespace lape {

// The same DCT coefficients as a baseline JPEG with a restart marker every `interval` MCUs, optimal Huffman
// tables and no metadata but what decoding needs.
Status add_restart_markers(const uint8_t* data, size_t length, uint32_t interval, std::vector<uint8_t>& out);

}  // namespace lape
