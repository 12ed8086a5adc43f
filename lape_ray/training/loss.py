"""The training losses: cross-entropy or binary cross-entropy of mixed targets, and hard distillation from a teacher.

Shapes: B images, K classes; a distilled student gives logits_B2K, class token first.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lape_ray.config import DataConfig, Loss, TrainConfig
from lape_ray.model import build_model, resolve
from lape_ray.model.convert import load_weights
from lape_ray.storage import local
from lape_ray.training.architecture import network_of
from lape_ray.training.checkpoint import about, read_weights
from lape_ray.training.classes import checkpoint_classes, match_classes
from lape_ray.training.preprocessing import differs, of_checkpoint
from lape_ray.training.recompute import optimise_blocks


def binary_cross_entropy(logits_BK: Tensor, targets_BK: Tensor) -> Tensor:
    """Compute DeiT III's loss: every class is a yes or no, and all that have a share in a mixed image are a yes.

    As in facebookresearch/deit, where engine.py trains with `targets.gt(0.0)` under --bce-loss and main.py takes
    `BCEWithLogitsLoss()`: the mean over images and classes. (timm's BinaryCrossEntropy keeps shares as they are unless
    it has a threshold.)
    """
    return F.binary_cross_entropy_with_logits(logits_BK, (targets_BK > 0).to(logits_BK.dtype))


LOSSES: dict[Loss, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": F.cross_entropy,
    "bce": binary_cross_entropy,
}


def check_loss(config: TrainConfig) -> None:
    """Refuse a loss that is not defined for the network; a ValueError says what to change."""
    if config.optim.loss != "cross_entropy" and resolve(config.model).num_prefix > 1:
        raise ValueError(
            f"optim.loss={config.optim.loss} is not defined for a distillation token, which {config.model.variant} has;"
            " choose cross_entropy, or the variant without it"
        )


def training_loss(
    logits: Tensor,
    targets_BK: Tensor,
    teacher_logits_BK: Tensor | None = None,
    loss: Loss = "cross_entropy",
) -> Tensor:
    """Compute the loss with soft targets; with two heads the mean of both heads' cross-entropies (DeiT, eq. 3).

    With a teacher the second head's target is the teacher's best class; without one it is the label, as for
    the first.
    """
    logits = logits.float()
    if logits.ndim == 2:
        return LOSSES[loss](logits, targets_BK)
    labelled = F.cross_entropy(logits[:, 0], targets_BK)
    if teacher_logits_BK is None:
        return (labelled + F.cross_entropy(logits[:, 1], targets_BK)) / 2
    return (labelled + F.cross_entropy(logits[:, 1], teacher_logits_BK.argmax(dim=1))) / 2


def split_teacher(source: str) -> tuple[str, str]:
    """Split `torchvision:NAME:FILE` into `torchvision:NAME:` and the address FILE; another is an address as a whole.

    Raises:
        ValueError: torchvision's names no file.
    """
    if not source.startswith("torchvision:"):
        return "", source
    if (match := re.fullmatch(r"(torchvision:[^:]*:)(.+)", source)) is None:
        raise ValueError(f"teacher {source!r} names no file of weights; write torchvision:NAME:WEIGHTS_FILE")
    return match[1], match[2]


def load_teacher(
    source: str,
    *,
    num_classes: int,
    image_sizes: Sequence[int],
    classes: Sequence[str] | None = None,
    data: DataConfig | None = None,
) -> nn.Module:
    """Load a frozen teacher that reads the student's images and answers in the order of the student's classes.

    Args:
        source: `torchvision:NAME:WEIGHTS_FILE` (DeiT's own teacher is regnet_y_16gf), a checkpoint folder of ours, or
            a file with timm's config.json next to it.
        image_sizes: sides of the student's images in pixels.
        classes: names of the student's (K); None: they have none.
        data: how the student's images are normalised; None: as the teacher's.

    Raises:
        FileNotFoundError, ValueError: says why a teacher does not fit.
    """
    foreign = source.startswith("torchvision:")
    teacher = _torchvision_teacher(source, num_classes) if foreign else _own_teacher(source, data)
    teacher = teacher.eval().requires_grad_(False)
    outputs = 0
    for side in dict.fromkeys(image_sizes):
        try:
            outputs = teacher(torch.zeros(1, 3, side, side)).shape[-1]
        except RuntimeError as error:
            raise ValueError(f"teacher {source!r} cannot read images of {side} px: {error}") from None
    if outputs != num_classes:
        raise ValueError(f"teacher {source!r} has {outputs} classes, the student {num_classes}")
    known = None if foreign or classes is None else checkpoint_classes(source)
    if classes is None or known is None:
        return teacher
    places_K, _ = match_classes(classes, known, of=f"the teacher {source}", path="the student's data")
    return teacher if places_K is None else _InOrder(teacher, places_K)


class _InOrder(nn.Module):
    """A teacher whose logits (B, K) come in the order of the student's classes."""

    def __init__(self, teacher: nn.Module, places_K: Sequence[int]) -> None:
        super().__init__()
        self.teacher = teacher
        self.register_buffer("places_K", torch.tensor(places_K))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.teacher(images_BCHW)[:, self.places_K]


def _torchvision_teacher(source: str, num_classes: int) -> nn.Module:
    import torchvision  # seconds to import, and few runs have such a teacher

    kind, file = split_teacher(source)
    name = kind.split(":")[1]
    if name not in torchvision.models.list_models(module=torchvision.models):
        raise ValueError(
            f"teacher {source!r}: torchvision has no model {name!r}; DeiT's teacher is regnet_y_16gf"
        )
    state, _ = read_weights(file)
    teacher: nn.Module = torchvision.models.get_model(name, num_classes=num_classes)
    try:
        teacher.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"teacher {source!r}: the weights are not those of {name}: {error}") from None
    return teacher


def _own_teacher(source: str, data: DataConfig | None) -> nn.Module:
    state, config = read_weights(source)
    there, model = (
        (config.data, config.model) if config else (of_checkpoint(local(source)), network_of(local(source)))
    )
    if model is None:
        raise ValueError(
            f"teacher {source!r} is no checkpoint folder of ours, so its network is not known; give a folder of ours, "
            f"a file with timm's config.json of a network that is ours next to it, or torchvision:NAME:{source}"
        )
    if data is not None and there is not None and (notes := differs(there, data)):
        raise ValueError(f"teacher {source!r}: {notes[0]}")
    with about(source):
        teacher = build_model(model)
        load_weights(teacher, state)
    return optimise_blocks(teacher)
