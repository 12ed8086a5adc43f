// Feeds damaged images to the crop decoder and to the restart marker transcoder, for a build with sanitizers.
//
//   fuzz_native COUNT SEED FILE...      COUNT inputs, made from the JPEGs in FILEs; prints how each kind
//   ended
//
// An input is a file that was truncated, had bits or bytes changed, a part moved or repeated, its header's
// size or its restart markers rewritten; or raw pixels whose size is a lie. It ends at a heap boundary, so
// that the sanitizer sees every read past it.

#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "batch.h"
#include "transcode.h"

namespace {

using namespace lape;
using Content = std::vector<uint8_t>;

std::mt19937_64 random_bits;

// Uniform in [low, high].
uint64_t between(uint64_t low, uint64_t high) {
  return std::uniform_int_distribution<uint64_t>(low, high)(random_bits);
}

// Where the frame header's height begins, or 0.
size_t find_size(const Content& data) {
  for (size_t at = 2; at + 9 < data.size() && data[at] == 0xFF;) {
    const uint8_t marker = data[at + 1];
    if (marker >= 0xC0 && marker <= 0xC2) return at + 5;
    at += 2 + (data[at + 2] << 8 | data[at + 3]);
  }
  return 0;
}

void mutate(Content& data) {
  if (data.empty()) return;
  const size_t at = between(0, data.size() - 1);
  switch (between(0, 9)) {
    case 0:
      data.resize(at);
      break;
    case 1:  // bits anywhere
      for (uint64_t n = between(1, 8); n; --n) data[between(0, data.size() - 1)] ^= 1 << between(0, 7);
      break;
    case 2:  // bits of the header
      for (uint64_t n = between(1, 4); n; --n) {
        data[between(0, std::min<size_t>(data.size(), 700) - 1)] ^= 1 << between(0, 7);
      }
      break;
    case 3:
      std::fill(data.begin() + at, data.begin() + between(at, data.size()), between(0, 1) ? 0xFF : 0x00);
      break;
    case 4:  // a part twice
      data.insert(data.begin() + at, data.begin() + between(0, at), data.begin() + at);
      if (data.size() > 400000) data.resize(400000);
      break;
    case 5:  // a part gone
      data.erase(data.begin() + at, data.begin() + between(at, data.size()));
      break;
    case 6: {  // another size
      if (const size_t size = find_size(data)) {
        const uint64_t kind = between(0, 2), limit = kind == 0 ? 64 : kind == 1 ? 2000 : 65535;
        for (size_t side = size; side < size + 4; side += 2) {
          const uint64_t pixels = between(0, limit);
          data[side] = pixels >> 8;
          data[side + 1] = pixels & 0xFF;
        }
      }
      break;
    }
    case 7:  // markers anywhere
      for (uint64_t n = between(1, 20); n; --n) {
        const size_t place = between(0, data.size() - 1);
        data[place] = 0xFF;
        if (place + 1 < data.size()) data[place + 1] = between(0xD0, 0xDF);
      }
      break;
    case 8:  // restart markers renumbered or overwritten
      for (size_t i = 0; i + 1 < data.size(); ++i) {
        if (data[i] == 0xFF && data[i + 1] >= 0xD0 && data[i + 1] <= 0xD7 && between(0, 20) == 0) {
          data[i + 1] = between(0xCF, 0xD8);
        }
      }
      break;
    default:  // another restart interval
      for (size_t i = 0; i + 5 < data.size(); ++i) {
        if (data[i] == 0xFF && data[i + 1] == 0xDD) {
          data[i + 4] = between(0, 1) ? 0 : between(0, 255);
          data[i + 5] = between(0, 255);
          break;
        }
      }
  }
}

Box random_box(uint32_t width, uint32_t height, bool whole) {
  if (between(0, 15) == 0) {
    const std::array<double, 6> odd = {-1, 0, 1e9, 1.5, std::nan(""), static_cast<double>(width)};
    auto pick = [&] { return odd[between(0, odd.size() - 1)]; };
    return {pick(), pick(), pick(), pick()};
  }
  if (width == 0 || height == 0) return {0, 0, 1, 1};
  const double x = between(0, width - 1), y = between(0, height - 1);
  Box box = {x, y, double(between(1, width - x)), double(between(1, height - y))};
  if (!whole) {
    box.width *= 0.77;
    box.height *= 0.77;
  }
  return box;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4) return 2;
  const uint64_t count = std::strtoull(argv[1], nullptr, 10);
  random_bits.seed(std::strtoull(argv[2], nullptr, 10));
  std::vector<Content> seeds;
  for (int i = 3; i < argc; ++i) {
    std::ifstream file(argv[i], std::ios::binary);
    seeds.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
    Content marked;
    if (add_restart_markers(seeds.back().data(), seeds.back().size(), 4, marked) == Status::ok) {
      seeds.push_back(marked);
    }
  }

  ImageDecoder fast(ResizeKernels::best()), portable(ResizeKernels::portable());
  std::array<uint64_t, std::size(kStatusTexts)> decoded = {}, transcoded = {};
  for (uint64_t input = 0; input < count; ++input) {
    Content data = seeds[between(0, seeds.size() - 1)];
    for (uint64_t n = between(0, 3); n; --n) mutate(data);
    Image image = {};
    image.mode = between(0, 9) == 0 ? kModeRaw : kModeJpeg;
    image.width = between(0, 600);
    image.height = between(0, 600);
    if (image.mode == kModeRaw) {
      if (between(0, 3)) data.resize(size_t{3} * image.width * image.height);
    } else if (const size_t size = find_size(data); size && between(0, 30)) {  // as the metadata would say
      image.height = data[size] << 8 | data[size + 1];
      image.width = data[size + 2] << 8 | data[size + 3];
    }
    if (uint64_t{image.width} * image.height > 8'000'000) continue;  // allowed, but slow under a sanitizer
    const std::unique_ptr<uint8_t[]> exact(new uint8_t[data.size()]);
    std::copy(data.begin(), data.end(), exact.get());
    image.bytes.data = exact.get();
    image.bytes.length = image.bytes.readable = data.size();

    const uint32_t out_width = between(1, 40), out_height = between(1, 40);
    const Output output = {out_width, out_height, between(0, 1) == 0, between(0, 7) == 0};
    const Crop crop = {random_box(image.width, image.height, output.crop_first), between(0, 1) == 0,
                       between(0, 1) ? Filter::bicubic : Filter::bilinear};
    Content first(size_t{3} * out_width * out_height), second(first.size());
    const Status status = fast.decode(image, crop, output, first.data());
    ++decoded[static_cast<size_t>(status)];
    if (portable.decode(image, crop, output, second.data()) != status || first != second) {
      std::printf("input %llu: the two kernels differ\n", static_cast<unsigned long long>(input));
      return 1;
    }
    if (image.mode == kModeJpeg) {
      Content out;
      ++transcoded[static_cast<size_t>(add_restart_markers(image.bytes.data, image.bytes.length, between(1, 9), out))];
    }
  }
  for (size_t i = 0; i < decoded.size(); ++i) {
    std::printf("%8llu decoded %8llu transcoded: %s\n", static_cast<unsigned long long>(decoded[i]),
                static_cast<unsigned long long>(transcoded[i]), kStatusTexts[i]);
  }
  return 0;
}
