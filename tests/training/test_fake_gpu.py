"""What runs on a GPU mixes no devices and reads nothing back, shown with tensors that have a device and no data.

Reading a value back from such a tensor is an error, as is an operator over two devices. Backward passes and compiled
code cannot be looked at in this way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from lape_ray.config import DataConfig, replace_fields
from lape_ray.data.augment import build_augment, pipeline
from lape_ray.data.augment.crop import crop_and_resize
from lape_ray.data.augment.transfer import _tensor_type
from lape_ray.data.mixup import Mixer
from lape_ray.data.normalize import Normalize
from lape_ray.model import build_model, resolve
from lape_ray.recipes import RECIPES, recipe
from lape_ray.training.loss import training_loss
from lape_ray.training.muon import orthogonalized
from lape_ray.training.recompute import optimise_blocks

GPU = torch.device("cuda", 0)
DEIT = DataConfig(rand_augment="rand-m9-mstd0.5-inc1", erase_prob=0.25)


def sent(arrays: Mapping[str, np.ndarray], device: torch.device) -> dict[str, Tensor]:
    """`to_device` without the bytes, for which tensors without data have no place."""
    return {
        name: torch.empty(array.shape, dtype=_tensor_type(array.dtype), device=device)
        for name, array in arrays.items()
    }


@pytest.fixture(autouse=True)
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(pipeline, "to_device", sent)
    # It reads a value of the weights, which a run does once, before its first step.
    monkeypatch.setattr(nn.init, "trunc_normal_", lambda tensor, std: tensor)
    with FakeTensorMode(), GPU:
        yield


def test_the_stand_in_tells_mistakes() -> None:
    with pytest.raises(DataDependentOutputException):
        torch.empty(()).item()
    with pytest.raises(RuntimeError, match=r"found two different devices|same device"):
        torch.empty(2) + torch.empty(2, device="cpu")


@pytest.mark.parametrize(
    "data",
    [
        DEIT,
        DataConfig(three_augment=True, color_jitter=0.3),
        DataConfig(erase_prob=1.0),
    ],
    ids=["deit", "deit3", "erase"],
)
@pytest.mark.parametrize("interpolation", ["bicubic", "random"])
def test_augmentation(data: DataConfig, interpolation: str) -> None:
    chosen = dataclasses.replace(data, interpolation=interpolation)  # type: ignore[arg-type]
    augment = build_augment(chosen, image_size=32, seed=0)
    images = torch.empty(256, 3, 32, 32, dtype=torch.uint8)
    floats = augment(images, epoch=0, epoch_index=np.arange(256))
    assert (floats.device, floats.dtype, floats.shape) == (GPU, torch.float32, images.shape)


def test_crops_of_images_on_the_device() -> None:
    images = torch.empty(16, 3, 32, 32, dtype=torch.uint8)
    boxes, flips = torch.empty(16, 4, dtype=torch.int32), torch.empty(16, dtype=torch.bool)
    cropped = crop_and_resize(images, boxes, flips, torch.empty(16, dtype=torch.bool), 32)
    assert (cropped.device, cropped.dtype, cropped.shape) == (GPU, torch.uint8, images.shape)


@pytest.mark.parametrize("name", [name for name in RECIPES if "base" not in name])
def test_a_recipes_network(name: str) -> None:
    stages = resolve(recipe(name).model).depths is not None
    config = replace_fields(recipe(name), {"model.depths": (1, 1, 1, 1)} if stages else {"model.depth": 2})
    size = resolve(config.model)
    network = optimise_blocks(build_model(config.model))
    images = Normalize(config.data)(torch.empty(8, 3, size.image_size, size.image_size, dtype=torch.uint8))
    labels = torch.empty(8, dtype=torch.int64)
    mixer = Mixer(config.data, num_classes=size.num_classes, label_smoothing=config.optim.label_smoothing)
    images, targets = mixer(images, labels, generator_key=(0, 0, 0))
    with torch.no_grad():  # else addresses are compared, which these tensors do not have
        loss = training_loss(network.train()(images), targets)
    assert loss.device == GPU


def test_muons_matrices() -> None:
    matrices = orthogonalized([torch.empty(64, 32), torch.empty(32, 64), torch.empty(32, 32)])
    assert [(tuple(m.shape), m.device, m.dtype) for m in matrices] == [
        (shape, GPU, torch.float32) for shape in ((64, 32), (32, 64), (32, 32))
    ]
