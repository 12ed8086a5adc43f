"""Parts of the Compact Transformers (arXiv 2104.05704): convolutional tokens, their block, sequence pooling.

Shapes: B images, C channels, H x W pixels, N tokens, D width.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from lape_ray.model.block import Block
from lape_ray.model.position import LayerPosition


class ConvTokenizer(nn.Module):
    """Tokens of CCT: convolution 3x3, ReLU, max-pooling 3x3 with stride 2, once or more.

    Args:
        layers: number of convolutions; all but the last have `hidden` channels.
    """

    def __init__(self, *, image_size: int, layers: int, embed_dim: int, hidden: int = 64) -> None:
        super().__init__()
        widths = [3, *[hidden] * (layers - 1), embed_dim]
        convs = [nn.Conv2d(c_in, c_out, 3, padding=1, bias=False) for c_in, c_out in pairwise(widths)]
        self.convs = nn.ModuleList(convs)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        side = image_size
        for conv in convs:
            nn.init.kaiming_normal_(conv.weight)
            side = (side + 1) // 2
        self.grid = (side, side)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        for conv in self.convs:
            images_BCHW = self.pool(conv(images_BCHW).relu())
        return images_BCHW.flatten(2).transpose(1, 2)


class ResidualNormBlock(Block):
    """A block whose norm2 sits on the residual stream itself: x = x + MSA(LN(x) + w); x = LN(x); x = x + MLP(x)."""

    def forward(self, x_BND: Tensor, position: LayerPosition) -> Tensor:
        x_BND = position.enter(x_BND)
        h_BND = self.norm1(x_BND)
        if position.attention_1ND is not None:
            h_BND = h_BND + position.attention_1ND
        x_BND = self.norm2(x_BND + self.drop_path(self.ls1(self.attn(h_BND, position))))
        return x_BND + self.drop_path(self.ls2(self.mlp(x_BND)))


class SequencePool(nn.Module):
    """Weighted mean of the tokens; the weights are a softmax over one learnt score for each token."""

    def __init__(self, *, embed_dim: int) -> None:
        super().__init__()
        self.score = nn.Linear(embed_dim, 1)

    def forward(self, x_BND: Tensor) -> Tensor:
        weight_BN1 = self.score(x_BND).softmax(dim=1)
        return (weight_BN1.transpose(1, 2) @ x_BND).squeeze(1)
