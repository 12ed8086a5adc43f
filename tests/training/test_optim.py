"""Schedule, parameter groups, moving average, counts and losses."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import timm.loss
import torch
import torch.nn.functional as F

from lape_ray.config import ModelConfig, OptimConfig, replace_fields
from lape_ray.data.mixup import Mix, mix_labels
from lape_ray.model import build_model
from lape_ray.recipes import recipe
from lape_ray.training.loss import check_loss, load_teacher, training_loss
from lape_ray.training.metrics import EvalCounts, duration
from lape_ray.training.optim import Ema, build_optimizer, lr_at, parameter_groups

TINY = ModelConfig(
    image_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=5, join="lape"
)


def test_schedule_of_deit() -> None:
    config = OptimConfig(
        lr=1e-3, min_lr=1e-5, warmup_lr=1e-6, epochs=300, warmup_epochs=5, cooldown_epochs=10
    )

    def at(epoch: float) -> float:
        return lr_at(round(epoch * 100), config=config, steps_per_epoch=100)

    assert at(0) == 1e-6
    assert at(2.5) == pytest.approx((1e-3 + 1e-6) / 2)
    assert at(5) == pytest.approx(1e-5 + 0.5 * (1e-3 - 1e-5) * (1 + math.cos(math.pi * 5 / 300)))
    assert at(150) == pytest.approx((1e-3 + 1e-5) / 2)
    assert at(300) == at(309.99) == pytest.approx(1e-5)
    values = [at(epoch / 10) for epoch in range(3100)]
    assert all(a < b for a, b in pairwise(values[:50]))
    assert all(a >= b for a, b in pairwise(values[50:]))


def test_groups_decay_matrices_only() -> None:
    model = build_model(TINY)
    names = {id(p): n for n, p in model.named_parameters()}
    decayed, kept = parameter_groups(
        model, OptimConfig(weight_decay=0.05), exempt=model.position_parameters()
    )
    assert decayed["weight_decay"] == 0.05
    assert kept["weight_decay"] == 0
    kept_names = {names[id(p)] for p in kept["params"]}  # type: ignore[union-attr]
    assert {"pos_embed", "cls_token", "join.norms.0.weight", "blocks.1.mlp.fc1.bias"} <= kept_names
    assert all("weight" in names[id(p)] and p.ndim > 1 for p in decayed["params"])  # type: ignore[union-attr]
    assert len(names) == len(decayed["params"]) + len(kept["params"])  # type: ignore[arg-type]


def test_compact_transformers_decay_position_too() -> None:
    model = build_model(TINY)
    config = OptimConfig(decay_position=True)
    decayed = build_optimizer(model, config, exempt=model.position_parameters()).param_groups[0]["params"]
    assert any(p is model.pos_embed for p in decayed)


def test_ema_is_the_running_mean() -> None:
    model = torch.nn.Linear(2, 2)
    ema = Ema(model, 0.9)
    expected = model.weight.detach().clone()
    for _ in range(3):
        with torch.no_grad():
            model.weight.add_(1)
        ema.update()
        expected = 0.9 * expected + 0.1 * model.weight.detach()
    torch.testing.assert_close(ema.model.weight, expected)
    assert not ema.model.weight.requires_grad


def test_counts_are_exact() -> None:
    counts = EvalCounts(torch.device("cpu"))
    torch.manual_seed(0)
    logits, labels = torch.randn(23, 7), torch.randint(7, (23,))
    for part in (slice(0, 10), slice(10, 20), slice(20, 23)):
        counts.add(logits[part], labels[part])
    result = counts.result()
    assert result["images"] == 23
    assert result["acc1"] == pytest.approx(100 * (logits.argmax(1) == labels).sum().item() / 23)
    top5 = (logits.topk(5).indices == labels[:, None]).any(1).sum().item()
    assert result["acc5"] == pytest.approx(100 * top5 / 23)
    assert result["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)


def test_counts_of_fewer_than_five_classes() -> None:
    counts = EvalCounts(torch.device("cpu"))
    counts.add(torch.eye(3), torch.arange(3))
    assert counts.result()["acc5"] == 100
    with pytest.raises(ValueError, match="no image"):
        EvalCounts(torch.device("cpu")).result()


def test_losses() -> None:
    targets = F.one_hot(torch.tensor([0, 2]), 3).float()
    logits = torch.randn(2, 3)
    torch.testing.assert_close(training_loss(logits, targets), F.cross_entropy(logits, torch.tensor([0, 2])))
    heads = torch.randn(2, 2, 3)
    first, second = F.cross_entropy(heads[:, 0], targets), F.cross_entropy(heads[:, 1], targets)
    torch.testing.assert_close(training_loss(heads, targets), (first + second) / 2)
    teacher = torch.tensor([[0.0, 5, 0], [0, 0, 5]])
    hard = F.cross_entropy(heads[:, 1], torch.tensor([1, 2]))
    torch.testing.assert_close(training_loss(heads, targets, teacher), (first + hard) / 2)


def test_binary_cross_entropy_asks_of_each_class_by_itself() -> None:
    """Both classes of a mixed image are a yes, whatever their shares; the mean is over images and classes."""
    targets = mix_labels(torch.tensor([0, 2, 1]), 4, Mix(0.9), 0.0)
    yes = torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 0], [1, 1, 0, 0]])
    logits = torch.randn(3, 4)
    by_hand = -(yes * logits.sigmoid().log() + (1 - yes) * (-logits).sigmoid().log()).sum() / 12
    torch.testing.assert_close(training_loss(logits, targets, None, "bce"), by_hand)
    timms = timm.loss.BinaryCrossEntropy(smoothing=0.0, target_threshold=0.0)
    torch.testing.assert_close(
        training_loss(logits.bfloat16(), targets, None, "bce"), timms(logits.bfloat16().float(), targets)
    )
    torch.testing.assert_close(  # and of labels that are not mixed
        training_loss(logits, mix_labels(torch.tensor([0, 2, 1]), 4, Mix(1.0), 0.0), None, "bce"),
        F.binary_cross_entropy_with_logits(logits, F.one_hot(torch.tensor([0, 2, 1]), 4).float()),
    )


def test_binary_cross_entropy_is_refused_where_it_means_nothing() -> None:
    for changes in ({"label_smoothing": 0.1}, {"teacher": "runs/teacher"}):
        with pytest.raises(ValueError, match=r"loss=bce takes no label_smoothing=.* and no teacher="):
            OptimConfig(loss="bce", **changes)  # type: ignore[arg-type]
    distilled = replace_fields(recipe("deit3_small_basic"), {"model.variant": "deit_small_distilled"})
    with pytest.raises(
        ValueError, match="loss=bce is not defined for a distillation token, which deit_small_distilled"
    ):
        check_loss(distilled)
    check_loss(recipe("deit3_small_basic"))


def test_torchvision_teacher(tmp_path) -> None:  # type: ignore[no-untyped-def]
    import torchvision

    file = tmp_path / "teacher.pth"
    torch.save(torchvision.models.get_model("regnet_y_400mf", num_classes=5).state_dict(), file)
    teacher = load_teacher(f"torchvision:regnet_y_400mf:{file}", num_classes=5, image_sizes=(32,))
    assert teacher(torch.zeros(2, 3, 32, 32)).shape == (2, 5)
    assert not any(p.requires_grad for p in teacher.parameters())
    with pytest.raises(ValueError, match="torchvision has no model 'regnet'"):
        load_teacher(f"torchvision:regnet:{file}", num_classes=5, image_sizes=(32,))
    with pytest.raises(ValueError, match="weights are not those of"):
        load_teacher(f"torchvision:regnet_y_400mf:{file}", num_classes=6, image_sizes=(32,))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth does not exist"):
        load_teacher("torchvision:regnet_y_400mf:/nowhere.pth", num_classes=5, image_sizes=(32,))


def test_durations_read_well() -> None:
    assert [duration(s) for s in (0, 59.6, 3661)] == ["0:00:00", "0:01:00", "1:01:01"]
