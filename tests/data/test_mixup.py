"""Mixup and CutMix against timm's, and what their draws may depend on."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import timm.data.mixup
import torch

from lape_ray.config import DataConfig
from lape_ray.data.mixup import MIX_STREAM, Mixer, draw_mix

K = 7
BOTH = DataConfig(mixup=0.8, cutmix=1.0)


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    images_BCHW = torch.randn(6, 3, 20, 14, generator=rng).to(memory_format=torch.channels_last)
    return images_BCHW, torch.randint(K, (6,), generator=rng)


class TimmDraws:
    """timm's calls of numpy's global generator, answered by the generator of our key."""

    def __init__(self, key: tuple[int, int, int]) -> None:
        rng = np.random.default_rng((MIX_STREAM, *key))
        self.rand, self.beta = rng.random, rng.beta
        self.randint = lambda low, high, size=None: rng.integers(low, high, size=size)


@pytest.mark.parametrize(
    "data",
    [BOTH, DataConfig(mixup=0.2), DataConfig(cutmix=1.0), DataConfig(mixup=0.8, cutmix=1.0, mix_prob=0.5)],
    ids=["both", "mixup", "cutmix", "sometimes"],
)
def test_equals_timm_given_the_same_draws(
    data: DataConfig, batch: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    images_BCHW, labels_B = batch
    ours = Mixer(data, K, label_smoothing=0.1)
    theirs = timm.data.mixup.Mixup(
        data.mixup, data.cutmix, prob=data.mix_prob, label_smoothing=0.1, num_classes=K
    )
    changed = 0
    for step in range(40):
        key = (3, 1, step)
        monkeypatch.setattr(
            timm.data.mixup, "np", SimpleNamespace(random=TimmDraws(key), sqrt=np.sqrt, clip=np.clip)
        )
        mixed_BCHW, targets_BK = ours(images_BCHW, labels_B, generator_key=key)
        expected_BCHW, expected_BK = theirs(images_BCHW.clone(), labels_B)
        torch.testing.assert_close(mixed_BCHW, expected_BCHW)
        torch.testing.assert_close(targets_BK, expected_BK)
        assert mixed_BCHW.is_contiguous(memory_format=torch.channels_last)
        changed += not torch.equal(mixed_BCHW, images_BCHW)
    assert (changed > 25) if data.mix_prob == 1 else (8 < changed < 32)


def test_both_kinds_are_drawn_as_often_as_asked() -> None:
    data = DataConfig(mixup=0.8, cutmix=1.0, mix_prob=0.6, mix_switch_prob=0.3)
    draws = [draw_mix(data, 224, 224, np.random.default_rng(i)) for i in range(4000)]
    # Standard deviations of these shares are below 0.008.
    assert np.mean([mix.lam < 1 for mix in draws]) == pytest.approx(0.6, abs=0.04)
    assert np.mean([mix.box is not None for mix in draws]) == pytest.approx(0.6 * 0.3, abs=0.04)


def test_nothing_mixed_gives_smoothed_labels(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    images_BCHW, labels_B = batch
    mixed_BCHW, targets_BK = Mixer(DataConfig(), K, label_smoothing=0.14)(
        images_BCHW, labels_B, generator_key=(0, 0, 0)
    )
    assert torch.equal(mixed_BCHW, images_BCHW)
    expected_BK = torch.nn.functional.one_hot(labels_B, K) * 0.86 + 0.02
    torch.testing.assert_close(targets_BK, expected_BK)


def test_mixing_ends_at_its_epoch(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    mixer = Mixer(DataConfig(mixup=0.8, mix_off_epoch=5), K)
    last, off = (mixer(*batch, generator_key=(0, epoch, 0))[0] for epoch in (4, 5))
    assert not torch.equal(last, batch[0])
    assert torch.equal(off, batch[0])


def test_draws_depend_on_the_key_alone(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    first = Mixer(BOTH, K)(*batch, generator_key=(1, 2, 3))
    np.random.seed(9)
    torch.manual_seed(9)
    again = Mixer(BOTH, K)(*batch, generator_key=(1, 2, 3))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    others = [(0, 2, 3), (1, 0, 3), (1, 2, 0)]
    assert all(not torch.equal(first[1], Mixer(BOTH, K)(*batch, generator_key=key)[1]) for key in others)


def test_input_is_left_as_it_is(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    before_BCHW = batch[0].clone()
    for step in range(10):
        Mixer(BOTH, K)(*batch, generator_key=(0, 0, step))
    assert torch.equal(batch[0], before_BCHW)


def test_needs_no_ffcv() -> None:
    code = "import sys, lape_ray.data.mixup, lape_ray.data.loader; print('ffcv' in sys.modules, 'numba' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
