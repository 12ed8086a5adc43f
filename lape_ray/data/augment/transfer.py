"""Many small arrays to a device in one copy."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

# Bytes. The largest item has 8; but Triton makes another kernel for an address that 16 does not divide, and which
# arrays that would be depends on the lengths of those before, which are drawn.
_ALIGNMENT = 16


def to_device(arrays: Mapping[str, np.ndarray], device: torch.device) -> dict[str, Tensor]:
    """Send host arrays to `device` as one buffer, without waiting for the device.

    Returns:
        Tensors of the same names, shapes and types, all views of one buffer; unsigned 32-bit words become int32
        with the same bits.
    """
    offsets, total = {}, 0
    for name, array in arrays.items():
        offsets[name] = total
        total += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
    buffer = torch.empty(total, dtype=torch.uint8, pin_memory=device.type == "cuda")
    flat = buffer.numpy()
    for name, array in arrays.items():
        flat[offsets[name] : offsets[name] + array.nbytes] = (
            np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        )
    sent = buffer.to(device, non_blocking=True)
    return {
        name: sent[offsets[name] : offsets[name] + array.nbytes]
        .view(_tensor_type(array.dtype))
        .view(array.shape)
        for name, array in arrays.items()
    }


def _tensor_type(dtype: np.dtype) -> torch.dtype:
    if dtype == np.uint32:
        return torch.int32
    return torch.from_numpy(np.empty(0, dtype)).dtype
