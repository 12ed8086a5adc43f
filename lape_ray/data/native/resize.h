// Antialiased resizing of 8-bit RGB, bit for bit as Pillow's Image.resize: separable, horizontal first,
// rounded to 8 bits between the passes, fixed-point coefficients. Rows stream through, so that the working
// set stays in the first-level cache.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace lape {

enum class Filter : int32_t { bilinear, bicubic };

// One axis of a resize: output i is the sum of weights[i * stride + t] * input[first[i] + t] over t <
// count[i].
struct Taps {
  uint32_t stride = 0;
  std::vector<uint32_t> first;
  std::vector<uint32_t> count;
  std::vector<int32_t> weights;  // times 2^kWeightBits
  bool identity = false;         // output i is input first[0] + i

  // From [begin, end) of an axis of `input` pixels to `output` pixels.
  void plan(Filter filter, uint32_t input, double begin, double end, uint32_t output);
  void mirror();
  // The inputs [low, high) that any output needs.
  uint32_t low() const;
  uint32_t high() const;

 private:
  std::vector<double> raw_;
};

constexpr int kWeightBits = 22;

// The same taps for 16-bit multiplication, in blocks of four: a weight is (high << kLowBits) + low.
struct PackedTaps {
  static constexpr int kLowBits = 11;
  uint32_t pairs = 0;            // of taps, for the output that has the most
  uint32_t blocks = 0;           // of an output
  std::vector<uint32_t> first;   // input of an output's first pair; no pair is past the input's end
  std::vector<int16_t> weights;  // a block: high 0-3, low 0-3

  void pack(const Taps& taps);
};

// The inner loops, for one kind of processor. Every implementation gives the same bytes.
struct ResizeKernels {
  // How many rows `horizontal` takes at once, and how many bytes it may read and write past a row's last
  // pixel.
  static constexpr uint32_t kRows = 4;
  static constexpr size_t kOverread = 16;
  static constexpr size_t kOverwrite = 5;

  bool packed;  // `horizontal` reads the packed taps
  // Each of kRows RGB rows, which start with input taps.low().
  void (*horizontal)(const Taps& taps, const PackedTaps& packed, const uint8_t* const* rows,
                     uint8_t* const* out);
  // `count` rows, weighted, to one of `bytes` bytes.
  void (*vertical)(const uint8_t* const* rows, const int32_t* weights, uint32_t count, uint8_t* out,
                   size_t bytes);

  static const ResizeKernels& portable();
  // The fastest that this processor runs.
  static const ResizeKernels& best();
};

// A rectangle with real coordinates, in pixels.
struct Box {
  double x, y, width, height;
};

// Resizes one image at a time; reused from image to image.
class Resizer {
 public:
  explicit Resizer(const ResizeKernels& kernels) : kernels_(kernels) {}

  // From `box` of a width x height image; filters reach past the box, to the image's edges. With `flip` the
  // result is mirrored horizontally.
  void plan(Filter filter, uint32_t width, uint32_t height, const Box& box, uint32_t out_width,
            uint32_t out_height, bool flip);
  // The input rows and columns that count.
  const Taps& horizontal() const { return across_; }
  const Taps& vertical() const { return down_; }

  // Takes the next `count` <= kRows input rows, beginning with vertical().low(); each starts with column
  // horizontal().low() and has kOverread readable bytes past its last column. Writes what output rows it can.
  void push(const uint8_t* const* rows, uint32_t count, uint8_t* out);

 private:
  const ResizeKernels& kernels_;
  Taps across_, down_;
  PackedTaps packed_;
  std::vector<uint8_t> ring_;  // the last rows, resized horizontally
  std::vector<const uint8_t*> window_;
  bool copies_rows_ = false;  // the horizontal pass has nothing to do
  size_t row_bytes_ = 0;
  size_t ring_stride_ = 0;
  uint32_t slots_ = 0;
  uint32_t pushed_ = 0;
  uint32_t written_ = 0;
};

}  // namespace lape
