"""Training of the head alone, as a linear probe does it: `optim.train = head`.

The backbone computes features without a gradient and as in evaluation: batch norms use their running statistics, and
nothing is dropped. DINO's linear evaluation (eval_linear.py) does so; that of MAE leaves the backbone in training mode,
but its ViT has neither dropout nor batch norms there.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lape_ray.model import Network
from lape_ray.model.convert import HEADS


class HeadOnly(nn.Module):
    """A network of which the classifiers are trained and nothing else; freezes the rest of it.

    Compilation and data parallelism are put around this, so that they see no other trained parameter.
    """

    def __init__(self, network: Network) -> None:
        super().__init__()
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name in HEADS)
        self.network = network

    def train(self, mode: bool = True) -> HeadOnly:
        """Set the mode of the network itself, whose output depends on it, and leave its parts in evaluation mode."""
        super().train(False)
        self.training = self.network.training = mode
        return self

    def forward(self, images_BCHW: Tensor) -> Tensor:
        with torch.no_grad():
            features = self.network.features(images_BCHW)
        return self.network.classify(features)
