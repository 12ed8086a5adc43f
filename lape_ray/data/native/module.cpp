// The Python module _lape_ray_native. Arguments are checked for what C++ must rely on (buffer sizes); what a
// caller may get wrong is checked, with better words, in __init__.py.
#include <Python.h>

#include <algorithm>
#include <memory>
#include <new>
#include <system_error>

#include <unistd.h>

#include "batch.h"
#include "crc32c.h"
#include "random.h"
#include "transcode.h"

namespace {

using namespace lape;

// Raised with every change of what Python relies on, together with ABI in __init__.py.
constexpr long kAbi = 3;

constexpr const char* kCapsule = "_lape_ray_native.decoder";

// A contiguous buffer of an argument, released when the call ends.
struct Buffer {
  Py_buffer view = {};
  ~Buffer() {
    if (view.obj) PyBuffer_Release(&view);
  }
  template <typename T>
  T* as() const {
    return static_cast<T*>(view.buf);
  }
  bool holds(size_t count, size_t item) const { return static_cast<size_t>(view.len) == count * item; }
};

PyObject* wrong_size(const char* what) {
  return PyErr_Format(PyExc_ValueError, "_lape_ray_native: %s has the wrong number of bytes", what);
}

// A decoder and the process that its threads live in: they do not survive a fork.
struct Handle {
  BatchDecoder decoder;
  pid_t process = getpid();
  Handle(int threads, bool simd) : decoder(threads, simd) {}
};

void destroy_decoder(PyObject* capsule) {
  auto* handle = static_cast<Handle*>(PyCapsule_GetPointer(capsule, kCapsule));
  if (handle->process == getpid()) delete handle;  // in a forked child there is nobody to join
}

// decoder(threads, simd) -> capsule
PyObject* decoder(PyObject*, PyObject* args) {
  int threads, simd;
  if (!PyArg_ParseTuple(args, "ip", &threads, &simd)) return nullptr;
  try {
    auto made = std::make_unique<Handle>(threads, simd != 0);
    PyObject* capsule = PyCapsule_New(made.get(), kCapsule, destroy_decoder);
    if (capsule) made.release();
    return capsule;
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  } catch (const std::system_error& error) {  // no more threads
    return PyErr_Format(PyExc_OSError, "cannot start %d decoder threads: %s", threads, error.what());
  }
}

// decode(decoder, file, descriptors, offsets, lengths, modes, widths, heights, boxes, flips, filters, out,
//        statuses, out_width, out_height, crop_first, reference, checksums)
// Without descriptors (an empty buffer) the images are in `file`.
PyObject* decode(PyObject*, PyObject* args) {
  PyObject* capsule;
  Buffer file, descriptors, offsets, lengths, modes, widths, heights, boxes, flips, filters, out, statuses;
  unsigned int out_width, out_height;
  int crop_first, reference, checksums;
  if (!PyArg_ParseTuple(args, "Oy*y*y*y*y*y*y*y*y*y*w*w*IIppp", &capsule, &file.view, &descriptors.view, &offsets.view,
                        &lengths.view, &modes.view, &widths.view, &heights.view, &boxes.view, &flips.view,
                        &filters.view, &out.view, &statuses.view, &out_width, &out_height, &crop_first,
                        &reference, &checksums)) {
    return nullptr;
  }
  auto* handle = static_cast<Handle*>(PyCapsule_GetPointer(capsule, kCapsule));
  if (handle == nullptr) return nullptr;
  if (handle->process != getpid()) {
    PyErr_SetString(
        PyExc_RuntimeError,
        "this decoder's threads stayed behind in the process that forked this one; make a new decoder");
    return nullptr;
  }
  const size_t images = modes.view.len;
  const bool open_files = descriptors.view.len > 0;
  if (open_files && !descriptors.holds(images, sizeof(int32_t))) return wrong_size("descriptors");
  if (!offsets.holds(images, sizeof(uint64_t))) return wrong_size("offsets");
  if (!lengths.holds(images, sizeof(uint64_t))) return wrong_size("lengths");
  if (!widths.holds(images, sizeof(uint32_t))) return wrong_size("widths");
  if (!heights.holds(images, sizeof(uint32_t))) return wrong_size("heights");
  if (!boxes.holds(images, 4 * sizeof(double))) return wrong_size("boxes");
  if (!flips.holds(images, 1)) return wrong_size("flips");
  if (!filters.holds(images, 1)) return wrong_size("filters");
  if (!statuses.holds(images, sizeof(int32_t))) return wrong_size("statuses");
  if (out_width == 0 || out_height == 0 || out_width > 65535 || out_height > 65535 ||
      !out.holds(images, size_t{3} * out_width * out_height)) {
    return wrong_size("out");
  }
  const Batch batch = {file.as<uint8_t>(),
                       static_cast<size_t>(file.view.len),
                       open_files ? descriptors.as<int32_t>() : nullptr,
                       checksums != 0,
                       images,
                       offsets.as<uint64_t>(),
                       lengths.as<uint64_t>(),
                       modes.as<uint8_t>(),
                       widths.as<uint32_t>(),
                       heights.as<uint32_t>(),
                       boxes.as<double>(),
                       flips.as<uint8_t>(),
                       filters.as<uint8_t>(),
                       out.as<uint8_t>(),
                       statuses.as<int32_t>()};
  const Output output = {out_width, out_height, crop_first != 0, reference != 0};
  Py_BEGIN_ALLOW_THREADS;
  handle->decoder.decode(batch, output);
  Py_END_ALLOW_THREADS;
  Py_RETURN_NONE;
}

// add_restart_markers(data, interval) -> (status, bytes)
PyObject* add_markers(PyObject*, PyObject* args) {
  Buffer data;
  unsigned int interval;
  if (!PyArg_ParseTuple(args, "y*I", &data.view, &interval)) return nullptr;
  std::vector<uint8_t> out;
  Status status;
  Py_BEGIN_ALLOW_THREADS;
  try {
    status = add_restart_markers(data.as<uint8_t>(), data.view.len, interval, out);
  } catch (const std::bad_alloc&) {
    status = Status::no_memory;
  }
  Py_END_ALLOW_THREADS;
  // No "y#": built with the headers of Python 3.13, it is refused by 3.12 and 3.11.
  return Py_BuildValue("iN", static_cast<int>(status),
                       PyBytes_FromStringAndSize(reinterpret_cast<const char*>(out.data()),
                                                 static_cast<Py_ssize_t>(out.size())));
}

// crc32c(data, portable) -> int
PyObject* crc(PyObject*, PyObject* args) {
  Buffer data;
  int portable;
  if (!PyArg_ParseTuple(args, "y*p", &data.view, &portable)) return nullptr;
  uint32_t value;
  Py_BEGIN_ALLOW_THREADS;
  value = crc32c(data.as<uint8_t>(), data.view.len, portable != 0);
  Py_END_ALLOW_THREADS;
  return PyLong_FromUnsignedLong(value);
}

// random_resized_crops(seed, epoch, positions, widths, heights, range, boxes)
PyObject* random_resized_crops(PyObject*, PyObject* args) {
  unsigned long long seed;
  unsigned int epoch;
  Buffer positions, widths, heights, boxes;
  CropRange range;
  if (!PyArg_ParseTuple(args, "KIy*y*y*(dddd)w*", &seed, &epoch, &positions.view, &widths.view, &heights.view,
                        &range.min_scale, &range.max_scale, &range.min_ratio, &range.max_ratio,
                        &boxes.view)) {
    return nullptr;
  }
  const size_t images = positions.view.len / sizeof(uint64_t);
  if (!widths.holds(images, sizeof(uint32_t))) return wrong_size("widths");
  if (!heights.holds(images, sizeof(uint32_t))) return wrong_size("heights");
  if (!boxes.holds(images, 4 * sizeof(int32_t))) return wrong_size("boxes");
  for (size_t i = 0; i < images; ++i) {
    const auto box = random_resized_crop(seed, epoch, positions.as<uint64_t>()[i], widths.as<uint32_t>()[i],
                                         heights.as<uint32_t>()[i], range);
    std::copy(box.begin(), box.end(), boxes.as<int32_t>() + 4 * i);
  }
  Py_RETURN_NONE;
}

// flips(seed, epoch, positions, probability, flips)
PyObject* flips(PyObject*, PyObject* args) {
  unsigned long long seed;
  unsigned int epoch;
  Buffer positions, out;
  double probability;
  if (!PyArg_ParseTuple(args, "KIy*dw*", &seed, &epoch, &positions.view, &probability, &out.view))
    return nullptr;
  const size_t images = positions.view.len / sizeof(uint64_t);
  if (!out.holds(images, 1)) return wrong_size("flips");
  for (size_t i = 0; i < images; ++i) {
    out.as<uint8_t>()[i] = random_flip(seed, epoch, positions.as<uint64_t>()[i], probability);
  }
  Py_RETURN_NONE;
}

// philox4x32(counters, key, words): `counters` and `words` of four 32-bit words each
PyObject* philox(PyObject*, PyObject* args) {
  Buffer counters, words;
  unsigned int key0, key1;
  if (!PyArg_ParseTuple(args, "y*(II)w*", &counters.view, &key0, &key1, &words.view)) return nullptr;
  const size_t count = counters.view.len / sizeof(Words4);
  if (!words.holds(count, sizeof(Words4))) return wrong_size("words");
  for (size_t i = 0; i < count; ++i) {
    words.as<Words4>()[i] = philox4x32(counters.as<Words4>()[i], {key0, key1});
  }
  Py_RETURN_NONE;
}

PyMethodDef kMethods[] = {
    {"decoder", decoder, METH_VARARGS, nullptr},
    {"decode", decode, METH_VARARGS, nullptr},
    {"add_restart_markers", add_markers, METH_VARARGS, nullptr},
    {"crc32c", crc, METH_VARARGS, nullptr},
    {"random_resized_crops", random_resized_crops, METH_VARARGS, nullptr},
    {"flips", flips, METH_VARARGS, nullptr},
    {"philox4x32", philox, METH_VARARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef kModule = {
    PyModuleDef_HEAD_INIT, "_lape_ray_native", nullptr, -1, kMethods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__lape_ray_native() {
  PyObject* module = PyModule_Create(&kModule);
  if (module == nullptr) return nullptr;
  PyObject* texts = PyTuple_New(std::size(kStatusTexts));
  for (size_t i = 0; texts && i < std::size(kStatusTexts); ++i) {
    PyTuple_SetItem(texts, i, PyUnicode_FromString(kStatusTexts[i]));
  }
  if (PyModule_AddObject(module, "STATUS_TEXTS", texts) < 0 ||
      PyModule_AddIntConstant(module, "ABI", kAbi) < 0) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
