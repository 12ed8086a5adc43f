// Whether the processor's own kernels and CRC give the bytes of the portable ones. test_arm.py compiles this for ARM and
// runs it in an emulator. Buffers have only the bytes that a kernel may touch, and canaries behind them.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>

#include "crc32c.h"
#include "resize.h"

using namespace lape;

namespace {

constexpr uint8_t kCanary = 0xA5;
std::mt19937 random_number(7);

uint32_t from_to(uint32_t low, uint32_t high) { return low + random_number() % (high - low + 1); }

std::vector<uint8_t> resized(const ResizeKernels& kernels, Filter filter, const std::vector<uint8_t>& image,
                             uint32_t width, uint32_t height, const Box& box, uint32_t side, bool flip) {
  Resizer resizer(kernels);
  resizer.plan(filter, width, height, box, side, side, flip);
  std::vector<uint8_t> out(size_t{3} * side * side + 8, kCanary);
  const Taps& across = resizer.horizontal();
  const Taps& down = resizer.vertical();
  const size_t bytes = size_t{3} * (across.high() - across.low());
  for (uint32_t y = down.low(); y < down.high(); y += ResizeKernels::kRows) {
    const uint32_t count = std::min(ResizeKernels::kRows, down.high() - y);
    std::vector<std::vector<uint8_t>> rows(count);
    const uint8_t* pointers[ResizeKernels::kRows];
    for (uint32_t i = 0; i < count; ++i) {
      const uint8_t* row = &image[size_t{3} * (size_t{y + i} * width + across.low())];
      rows[i].assign(row, row + bytes);
      for (size_t k = 0; k < ResizeKernels::kOverread; ++k) rows[i].push_back(from_to(0, 255));
      pointers[i] = rows[i].data();
    }
    resizer.push(pointers, count, out.data());
  }
  return out;
}

void check(bool right, const char* what, int round) {
  if (right) return;
  std::printf("%s differs in round %d\n", what, round);
  std::exit(1);
}

}  // namespace

int main() {
  const ResizeKernels& best = ResizeKernels::best();
  check(&best != &ResizeKernels::portable(), "nothing but the portable kernels", 0);
  for (int round = 0; round < 300; ++round) {
    const uint32_t width = from_to(1, 150), height = from_to(1, 150), side = from_to(1, 70);
    std::vector<uint8_t> image(size_t{3} * width * height);
    const bool extreme = round % 3 == 0;  // black and white, where sums leave 0 to 255
    for (auto& byte : image) byte = extreme ? 255 * from_to(0, 1) : from_to(0, 255);
    const uint32_t w = from_to(1, width), h = from_to(1, height);
    const Box box = {double(from_to(0, width - w)), double(from_to(0, height - h)), double(w), double(h)};
    const Filter filter = round % 2 ? Filter::bicubic : Filter::bilinear;
    const bool flip = from_to(0, 1);
    check(resized(best, filter, image, width, height, box, side, flip) ==
              resized(ResizeKernels::portable(), filter, image, width, height, box, side, flip),
          "a resize", round);
    const size_t length = from_to(0, image.size()), begin = from_to(0, image.size() - length);
    check(crc32c(&image[0] + begin, length) == crc32c(&image[0] + begin, length, true), "a CRC", round);
  }
  check(crc32c(reinterpret_cast<const uint8_t*>("123456789"), 9) == 0xE3069283, "the CRC of RFC 3720", 0);
  std::puts("300 rounds agree");
}
