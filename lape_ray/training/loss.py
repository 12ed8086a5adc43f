"""The training loss: soft targets, and hard distillation from a teacher (DeiT, arXiv 2012.12877, eq. 3).

Shapes: B images, K classes; a distilled student gives logits_B2K, class token first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lape_ray.config import DataConfig
from lape_ray.model import build_model
from lape_ray.model.convert import load_weights
from lape_ray.training.checkpoint import about, read_weights
from lape_ray.training.classes import checkpoint_classes, match_classes
from lape_ray.training.preprocessing import differs
from lape_ray.training.recompute import optimise_blocks


def training_loss(logits: Tensor, targets_BK: Tensor, teacher_logits_BK: Tensor | None = None) -> Tensor:
    """Compute the cross-entropy with soft targets; with two heads the mean of both heads' losses.

    With a teacher the second head's target is the teacher's best class; without one it is the label, as for
    the first.
    """
    logits = logits.float()
    if logits.ndim == 2:
        return F.cross_entropy(logits, targets_BK)
    labelled = F.cross_entropy(logits[:, 0], targets_BK)
    if teacher_logits_BK is None:
        return (labelled + F.cross_entropy(logits[:, 1], targets_BK)) / 2
    return (labelled + F.cross_entropy(logits[:, 1], teacher_logits_BK.argmax(dim=1))) / 2


def load_teacher(
    source: str,
    *,
    num_classes: int,
    image_size: int,
    classes: Sequence[str] | None = None,
    data: DataConfig | None = None,
) -> nn.Module:
    """Load a frozen teacher that reads the student's images and answers in the order of the student's classes.

    Args:
        source: `torchvision:NAME:WEIGHTS_FILE` (DeiT's own teacher is regnet_y_16gf) or a checkpoint folder of ours.
        classes: names of the student's (K); None: they have none.
        data: how the student's images are normalised; None: as the teacher's.

    Raises:
        FileNotFoundError, ValueError: says why a teacher does not fit.
    """
    foreign = source.startswith("torchvision:")
    teacher = _torchvision_teacher(source, num_classes) if foreign else _own_teacher(source, data)
    teacher = teacher.eval().requires_grad_(False)
    try:
        outputs = teacher(torch.zeros(1, 3, image_size, image_size)).shape[-1]
    except RuntimeError as error:
        raise ValueError(f"teacher {source!r} cannot read images of {image_size} px: {error}") from None
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

    _, name, file = [*source.split(":", 2), ""][:3]
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
    if config is None:
        raise ValueError(
            f"teacher {source!r} is no checkpoint folder of ours, so its network is not known; give a folder of ours, "
            f"or torchvision:NAME:{source}"
        )
    if data is not None and (notes := differs(config.data, data)):
        raise ValueError(f"teacher {source!r}: {notes[0]}")
    teacher = build_model(config.model)
    with about(source):
        load_weights(teacher, state)
    return optimise_blocks(teacher)
