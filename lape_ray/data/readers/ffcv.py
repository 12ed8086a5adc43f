"""FFCV's loader, made to fail loudly and to repeat itself.

FFCV 1.0.2 reads, decodes and crops well; what is changed here, by subclassing, is what hurts a long run:

    SeededCrop     crops and flips depend on a key that comes with each sample, not on which thread draws them,
                   and scratch memory is one image for each thread instead of the largest image for each slot
    PageCache      the operating system's cache without the tables that only FFCV's own cache reads
    BatchIterator  an error in the loader thread reaches the caller, and closing it ends the thread

Shape suffixes: B samples of a batch, S the side of a crop in pixels.
"""

from __future__ import annotations

import queue
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from ffcv.fields.rgb_image import IMAGE_MODES, SimpleRGBImageDecoder, get_center_crop, get_random_crop
from ffcv.libffcv import imdecode, resize_crop
from ffcv.loader import Loader, OrderOption
from ffcv.loader import loader as loader_module
from ffcv.loader.epoch_iterator import EpochIterator
from ffcv.memory_managers import OSCacheManager
from ffcv.memory_managers.os_cache import OSCacheContext
from ffcv.pipeline.allocation_query import AllocationQuery
from ffcv.pipeline.compiler import Compiler
from ffcv.pipeline.state import State

from lape_ray.data.beton import set_files
from lape_ray.data.readers.reader import RandomCrop, ReaderOptions, SimpleCrop

SEED_BIT = 32  # a key is the sample's index in the low bits and the seed of its augmentation above


class SeededCrop(SimpleRGBImageDecoder):
    """Decode, crop, resize (area) and flip: uint8 (B, S, S, 3) for B keys.

    FFCV's decoders draw from a generator of each thread, so that pixels change from run to run. Here each
    sample seeds it first. Random crops and flips are distributed as FFCV's (and torchvision's) are.
    """

    def __init__(self, side: int, crop: Callable[..., Any], scale: Any, ratio: Any, flip: float) -> None:
        super().__init__()
        self.side, self.crop, self.scale, self.ratio, self.flip = side, crop, scale, ratio, flip

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery]:
        shape = (self.side, self.side, 3)
        state = State(jit_mode=True, device=previous_state.device, shape=shape, dtype=np.dtype("u1"))
        return state, AllocationQuery(shape, state.dtype)

    def generate_code(self) -> Callable[..., Any]:
        # Locals, because numba freezes what a compiled function closes over.
        each, read = Compiler.get_iterator(), self.memory_read
        decode_jpeg, resize = Compiler.compile(imdecode), Compiler.compile(resize_crop)
        draw_crop, scale, ratio, flip = Compiler.compile(self.crop), self.scale, self.ratio, self.flip
        jpg, seed_bit, index_mask = IMAGE_MODES["jpg"], SEED_BIT, (1 << SEED_BIT) - 1

        def decode(keys_B: Any, out_BSSC: Any, records: Any, storage: Any) -> Any:
            for slot in each(len(keys_B)):
                np.random.seed(keys_B[slot] >> seed_bit)
                record = records[keys_B[slot] & index_mask]
                data = read(record["data_ptr"], storage)
                height, width = np.int64(record["height"]), np.int64(record["width"])
                if record["mode"] == jpg:
                    image = np.empty((height, width, 3), np.uint8)
                    decode_jpeg(data, image, height, width, height, width, 0, 0, 1, 1, False, False)
                else:
                    image = data.reshape(height, width, 3)
                top, left, crop_height, crop_width = draw_crop(height, width, scale, ratio)
                resize(image, top, top + crop_height, left, left + crop_width, out_BSSC[slot])
                if np.random.random() < flip:
                    out_BSSC[slot] = out_BSSC[slot, :, ::-1].copy()
            return out_BSSC[: len(keys_B)]

        decode.is_parallel = True  # type: ignore[attr-defined]  # read by FFCV's compiler
        return decode


def random_crop(side: int, scale: tuple[float, float], ratio: tuple[float, float], flip: float) -> SeededCrop:
    """Make a random resized crop and a horizontal flip with probability `flip`."""
    return SeededCrop(side, get_random_crop, np.array(scale), np.array(ratio), flip)


def center_crop(side: int, share: float) -> SeededCrop:
    """Make the crop of the centre square that keeps `share` of the shorter side."""
    return SeededCrop(side, get_center_crop, None, share, 0.0)


class PageCache(OSCacheManager):
    """A map of the file; all processes of a machine share the pages.

    The base class builds dicts of sets from samples to pages for FFCV's own cache: 0.7 GB and seconds for
    ImageNet. Its `state_type` changes numba's type object of uint8 arrays in place, and with it the type's
    hash: KeyErrors are printed when an older loader is collected, so the read-only type is asked for instead.
    """

    def __init__(self, reader: Any) -> None:
        self.reader = reader
        order = np.argsort(reader.alloc_table["ptr"])  # looked up by bisection
        self.ptrs, self.sizes = reader.alloc_table["ptr"][order], reader.alloc_table["size"][order]
        self.context = OSCacheContext(self)

    @property
    def state_type(self) -> Any:
        bytes_type = numba.types.Array(numba.uint8, 1, "C", readonly=True)
        return numba.types.Tuple([bytes_type, numba.uint64[::1], numba.uint64[::1]])

    def compile_reader(self) -> Any:
        def read(address: Any, state: Any) -> Any:
            size = state[2][np.searchsorted(state[1], address)]
            return state[0][address : address + size]

        return Compiler.compile(read)


class BatchIterator(EpochIterator):
    """Batches of one pass: (B, S, S, 3) uint8 arrays that are overwritten once later batches are asked for.

    FFCV's thread dies of an error without a word while the caller waits for ever, and outlives a caller that
    stops early, with its buffers. The maker of one must `close` it.
    """

    def run(self) -> None:
        try:
            numba.set_num_threads(self.loader.num_workers)  # counts for the thread that calls it
            for number, keys_B in enumerate(self.iter_ixes):
                slot = number % (self.loader.batches_ahead + 2)
                if not self._hand_over(self.run_pipeline(number, keys_B, slot, None)):
                    return
            self._hand_over(None)
        except BaseException as error:
            self._hand_over(error)

    def _hand_over(self, item: Any) -> bool:
        """Wait for room in the queue; False if the caller has closed the iterator."""
        while not self.terminate_event.is_set():
            try:
                self.output_queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                pass
        return False

    def __next__(self) -> np.ndarray:
        item = self.output_queue.get()
        if item is None:
            raise StopIteration
        if isinstance(item, BaseException):
            raise item
        return item[0]

    def close(self) -> None:
        """End the thread; at most one batch later."""
        self.terminate_event.set()
        self.join()

    def __del__(self) -> None:
        """Do nothing: the base class closes here, but a running thread is never collected."""


class BatchLoader(Loader):
    """FFCV's Loader of one file's images, for passes in orders that the caller gives.

    Raises:
        ValueError: the path is that of a set of files, or numba has no threads.
    """

    reuses_buffers = True
    on_device = False

    def __init__(self, path: str, options: ReaderOptions) -> None:
        if len(files := set_files(path)) > 1:
            raise ValueError(
                f"{path} is a set of {len(files)} files; FFCV's loader reads one: set data.backend=native, or write "
                "a single file"
            )
        if options.threads > 1 and numba.threading_layer() == "workqueue":
            raise ValueError(
                "numba found neither TBB nor OpenMP for more than one loader thread; install libtbb"
            )
        side, crop = options.image_size, options.crop
        if isinstance(crop, RandomCrop):
            self._decoder = random_crop(side, crop.scale, crop.ratio, crop.flip)
        elif isinstance(crop, SimpleCrop):
            raise ValueError("data.backend=ffcv does not make crop=simple; set data.backend=native")
        else:
            self._decoder = center_crop(side, crop.share)
        torch_threads = torch.get_num_threads()
        super().__init__(
            path,
            batch_size=options.batch_size,
            num_workers=min(options.threads, numba.config.NUMBA_NUM_THREADS),
            os_cache=True,
            order=OrderOption.SEQUENTIAL,
            pipelines={"image": [self._decoder], "label": None},  # labels are in memory: reader.metadata
        )
        torch.set_num_threads(torch_threads)  # FFCV sets torch's threads to its own
        self.labels_N = np.ascontiguousarray(self.reader.metadata["f1"])

    @property
    def image_size(self) -> int:
        """Side of the delivered square in pixels; the next pass asks for it, without compiling again."""
        return self._decoder.side

    @image_size.setter
    def image_size(self, side: int) -> None:
        self._decoder.side = side

    def batches(self, keys_N: np.ndarray, epoch_index_N: np.ndarray, epoch: int) -> BatchIterator:
        """Make one pass; see `Reader.batches`. The keys hold the seeds of the draws, and the other arguments none."""
        return BatchIterator(self, np.ascontiguousarray(keys_N))  # numba compiles again for a strided array


loader_module.OSCacheManager = PageCache  # Loader makes it by this name
