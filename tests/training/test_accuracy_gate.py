"""Training on our input pipeline ends where training on Pillow, torchvision and timm ends.

Short runs of the real loop on CIFAR-10 photographs, three seeds an arm, which differ in nothing but where the
images come from and what is done to them:

    ours     .beton, our decoder, our RandAugment, erasing, mixup and CutMix
    oracle   Pillow and torchvision, then timm's RandAugment, RandomErasing and Mixup, on the same images in each step
    broken   ours without flips and with red and blue exchanged in training, which the gate must see

Shapes: B images, H x W pixels, K classes.
"""

from __future__ import annotations

import dataclasses
import pickle
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from seeds import Recorder
from timm.data import Mixup
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from lape_ray.config import DataConfig, TrainConfig, replace_fields
from lape_ray.data.augment import build_augment
from lape_ray.data.beton import Manifest, write_beton
from lape_ray.data.loader import Loader
from lape_ray.data.processes import processes
from lape_ray.data.readers.reader import ReaderOptions, build_crop
from lape_ray.data.readers.torchvision import TorchvisionReader
from lape_ray.data.sources import Source, open_source, select
from lape_ray.recipes import recipe
from lape_ray.training import loop as train_module
from lape_ray.training import state as state_module

TRAIN, VAL = 10_000, 2_000
EPOCHS = 12
SEEDS = (1, 2, 3)
CHANCE = 10.0  # percent
# Chosen before any run: two standard errors of the difference, and a floor in percent for three seeds' poor estimate
# of them (one standard error of an accuracy of 40 % on 2,000 images is 1.1).
ERRORS, FLOOR = 2.0, 1.0


@dataclasses.dataclass(frozen=True, eq=False)
class InMemory(Source):
    """Encoded images in memory; a parquet shard is slow to read out of order."""

    def name(self, index: int) -> str:
        return f"{self.origin} image {index}"

    def encoded(self, index: int) -> bytes:
        data: bytes = self.items_N[index]
        return data

    @classmethod
    def of(cls, source: Source) -> InMemory:
        items = np.empty(len(source), object)
        items[:] = [source.encoded(i) for i in range(len(source))]
        return cls(source.origin, source.classes, source.labels_N, items)


class TimmAugment:
    """RandAugment on Pillow images, then normalisation and random erasing, as timm's loader does them."""

    def __init__(self, data: DataConfig, *, image_size: int, seed: int, fused: bool) -> None:
        assert data.rand_augment and not fused
        fill = tuple(round(255 * m) for m in data.mean)
        self.rand_augment = rand_augment_transform(
            data.rand_augment, {"translate_const": int(0.45 * image_size), "img_mean": fill}
        )  # without an interpolation, each warp takes one of the two at random, as the recipe's
        self.erase = RandomErasing(data.erase_prob, mode="pixel", device="cpu")
        self.mean_C11, self.std_C11 = (torch.tensor(x).view(3, 1, 1) for x in (data.mean, data.std))
        random.seed(seed)
        np.random.seed(seed)

    def __call__(self, images_BCHW: Tensor, *, epoch: int, epoch_index: np.ndarray) -> Tensor:
        pictures = [Image.fromarray(image) for image in images_BCHW.permute(0, 2, 3, 1).numpy()]
        augmented = np.stack([np.asarray(self.rand_augment(picture)) for picture in pictures])
        floats = torch.from_numpy(augmented).permute(0, 3, 1, 2).float() / 255
        normalised: Tensor = self.erase((floats - self.mean_C11) / self.std_C11)
        return normalised


class TimmMixer:
    def __init__(self, data: DataConfig, num_classes: int, label_smoothing: float) -> None:
        self.mixup = Mixup(data.mixup, data.cutmix, prob=data.mix_prob, switch_prob=data.mix_switch_prob,
                           label_smoothing=label_smoothing, num_classes=num_classes)  # fmt: skip
        self.mixup.device = "cpu"

    def __call__(self, images: Tensor, labels: Tensor, *, generator_key: Any) -> tuple[Tensor, Tensor]:
        mixed: tuple[Tensor, Tensor] = self.mixup(images, labels)
        return mixed


def photographs(folder: Path) -> dict[str, Source]:
    training = open_source(str(folder), "train")
    rest = select(training, f"rest:{VAL}")
    parts = {"train": select(rest, f"holdout:{TRAIN}"), "val": select(training, f"holdout:{VAL}")}
    return {split: InMemory.of(part) for split, part in parts.items()}


def small_run(folder: Path, sources: dict[str, Source]) -> TrainConfig:
    """The recipe of a small network, its data written to `folder`."""
    paths = {split: str(folder / f"{split}.beton") for split in sources}
    for split, source in sources.items():
        write_beton(source, paths[split], workers=1)
    values = {"model.patch_size": 8, "model.embed_dim": 64, "model.depth": 2, "model.num_heads": 2,
              "model.drop_path": 0.0, "model.attention_dropout": 0.0,
              "data.train": paths["train"], "data.val": paths["val"], "data.threads": 1,
              "data.erase_prob": 0.25,
              "optim.lr": 2e-3, "optim.epochs": EPOCHS, "optim.warmup_epochs": 1, "optim.cooldown_epochs": 0,
              "run.eval_epochs": EPOCHS}  # fmt: skip
    return replace_fields(recipe("vit_lite_7_4_lape"), values)


def with_oracle(patch: pytest.MonkeyPatch, sources: dict[str, Source]) -> None:
    def loader(data: DataConfig, split: Literal["train", "val"], *, image_size: int, batch_size: int,
               threads: int, seed: int, **place: Any) -> Loader:  # fmt: skip
        path = {"train": data.train, "val": data.val}[split]
        options = ReaderOptions(crop=build_crop(data, split), image_size=image_size,
                                batch_size=batch_size, threads=threads, seed=seed,
                                device=torch.device("cpu"))  # fmt: skip
        reader = TorchvisionReader(sources[split], options)
        return Loader(reader, Manifest.load(path), split=split, seed=seed, **place)  # type: ignore[arg-type]

    patch.setattr(state_module, "build_loader", loader)
    patch.setattr(state_module, "build_augment", TimmAugment)
    patch.setattr(state_module, "Mixer", TimmMixer)


def with_exchanged_colours(patch: pytest.MonkeyPatch, sources: dict[str, Source]) -> None:
    def build(data: DataConfig, **kwargs: Any) -> Any:
        augment = build_augment(data, **kwargs)
        return lambda images_BCHW, **where: augment(images_BCHW[:, [2, 1, 0]], **where)

    patch.setattr(state_module, "build_augment", build)


ARMS: dict[str, Callable[[pytest.MonkeyPatch, dict[str, Source]], None] | None] = {
    "ours": None,
    "oracle": with_oracle,
    "broken": with_exchanged_colours,
}


class Run(NamedTuple):
    """One training; it pickles, so that runs can be processes."""

    arm: str
    config: TrainConfig
    sources: Path


def train_arm(run: Run) -> tuple[float, float]:
    """Percent of the held-out images at the end of a run, and its seconds."""
    torch.set_num_threads(1)  # the tensors are small; a process for each CPU uses them better
    start = time.perf_counter()
    with pytest.MonkeyPatch.context() as patch:
        if apply := ARMS[run.arm]:
            apply(patch, pickle.loads(run.sources.read_bytes()))
        metrics = train_module.train(run.config, device=torch.device("cpu"), reporter=Recorder())
    return metrics["val/acc1"], time.perf_counter() - start


@pytest.fixture(scope="module")
def accuracies(shared_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """Percent of the held-out images, by arm and seed; prints the table."""
    folder = tmp_path_factory.mktemp("gate")
    sources = photographs(shared_dir / "data" / "cifar10")
    (folder / "sources").write_bytes(pickle.dumps(sources))
    config = small_run(folder, sources)
    runs = []
    for seed in SEEDS:
        for arm in ARMS:
            changes = {"training.seed": seed, **({"data.flip": 0.0} if arm == "broken" else {})}
            runs.append(Run(arm, replace_fields(config, changes), folder / "sources"))
    table: dict[str, list[float]] = {arm: [] for arm in ARMS}
    seconds = dict.fromkeys(ARMS, 0.0)
    with processes() as mapper:
        for run, (accuracy, taken) in zip(runs, mapper(train_arm, runs), strict=True):
            table[run.arm].append(accuracy)
            seconds[run.arm] += taken
            print(
                f"\n{run.arm} seed {run.config.training.seed}: {accuracy:.2f} in {taken:.0f} s",
                end="",
                flush=True,
            )
    print(f"\n\n{'arm':8} {'top-1 by seed':20} {'mean':>6} {'sd':>5} {'s a run':>8}")
    for arm, values in table.items():
        shown = " ".join(f"{value:6.2f}" for value in values)
        mean, deviation = np.mean(values), np.std(values, ddof=1)
        print(f"{arm:8} {shown:20} {mean:6.2f} {deviation:5.2f} {seconds[arm] / len(SEEDS):8.0f}")
    return {arm: np.array(values) for arm, values in table.items()}


def agree(first_S: np.ndarray, second_S: np.ndarray) -> bool:
    """Whether two arms end within noise of each other."""
    error = np.sqrt(first_S.var(ddof=1) / len(first_S) + second_S.var(ddof=1) / len(second_S))
    return bool(abs(first_S.mean() - second_S.mean()) <= ERRORS * error + FLOOR)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_our_pipeline_trains_as_well_as_the_oracle(accuracies: dict[str, np.ndarray]) -> None:
    assert min(accuracies["ours"].min(), accuracies["oracle"].min()) > 2.5 * CHANCE
    assert agree(accuracies["ours"], accuracies["oracle"])


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_gate_sees_a_fault(accuracies: dict[str, np.ndarray]) -> None:
    assert not agree(accuracies["broken"], accuracies["oracle"])
