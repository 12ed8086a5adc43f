"""Conditional position embeddings: made of the tokens themselves, and added to them between two blocks.

Shapes: B images, N tokens = prefix tokens + patches in row-major order, D width, Y x X grid.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from lape_ray.model.position.layout import Layout


class Peg(nn.Module):
    """A depthwise 3 x 3 convolution of the patches, added to them after the first block (CPVT, arXiv 2102.10882).

    Its zeros around the grid tell where the border is; inside, a shifted image has a shifted embedding. It has no size
    of the grid, so that there is nothing to resize. Prefix tokens get nothing. It enters once, as in the paper's CPVT;
    in a network of several stages, which the paper does not have, after the first block of the first one. The
    convolution begins as PyTorch's do.

    Raises:
        ValueError: there is no block after the first one.
    """

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        if layout.depth < 2:
            raise ValueError(
                f"depth={layout.depth} leaves no block (in Swin, of the first stage) behind the first one, which "
                "position=peg needs; choose 2 or more, or position=none"
            )
        self.num_prefix, self.grid = layout.num_prefix, layout.grid
        self.proj = nn.Conv2d(layout.embed_dim, layout.embed_dim, 3, padding=1, groups=layout.embed_dim)

    def forward(self, x_BND: Tensor) -> Tensor:
        """Compute what is added to the tokens, (B, N, D)."""
        # Contiguous, so that the weight's gradient has the weight's layout, in which data parallelism sends it.
        image_BDYX = x_BND[:, self.num_prefix :].transpose(1, 2).unflatten(2, self.grid).contiguous()
        return F.pad(self.proj(image_BDYX).flatten(2).transpose(1, 2), (0, 0, self.num_prefix, 0))


CONDITIONALS: dict[str, Callable[[Layout], nn.Module]] = {"peg": Peg}
