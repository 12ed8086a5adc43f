"""LaPE in one file: a vision transformer whose position embedding has a LayerNorm in every block (ICCV 2023).

It trains on scikit-learn's handwritten digits in half a minute of a CPU: `python examples/lape_in_one_file.py`.
Shapes: B images, C channels, H x W pixels or H heads, P patches, N tokens = class token + patches, D width, E = D / H.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, h_BND: Tensor) -> Tensor:
        q_BHNE, k_BHNE, v_BHNE = self.qkv(h_BND).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q_BHNE, k_BHNE, v_BHNE).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """LaPE, eq. 8-11: attention reads tokens and position, each through its own norm; nothing else sees position."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim, eps=1e-6), Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.pe_norm = nn.LayerNorm(dim, eps=1e-6)  # all that LaPE adds to a block: 2 D weights

    def forward(self, x_BND: Tensor, w_1ND: Tensor) -> tuple[Tensor, Tensor]:
        w_1ND = self.pe_norm(w_1ND)  # progressive: the next block's norm reads what this one gives
        x_BND = x_BND + self.attn(self.norm1(x_BND) + w_1ND)
        x_BND = x_BND + self.mlp(self.norm2(x_BND))
        return x_BND, w_1ND


class LapeVit(nn.Module):
    """A ViT with a class token for grey images of 8 x 8 pixels."""

    def __init__(self, dim: int = 64, depth: int = 4, heads: int = 4, patch: int = 2) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(1, dim, patch, stride=patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (8 // patch) ** 2, dim))  # w_0, a row for each token
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, 10)
        for weight in self.parameters():
            if weight.ndim == 2 or weight is self.pos_embed:
                nn.init.trunc_normal_(weight, std=0.02)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        x_BPD = self.patch_embed(images_BCHW).flatten(2).transpose(1, 2)
        x_BND = torch.cat((self.cls_token.expand(len(x_BPD), -1, -1), x_BPD), dim=1)  # no position in here
        w_1ND = self.pos_embed
        for block in self.blocks:
            x_BND, w_1ND = block(x_BND, w_1ND)
        return self.head(self.norm(x_BND)[:, 0])


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Load images (B, 1, 8, 8) in [-1, 1] and labels, 1,437 to train and 360 to validate: digits that people wrote."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels = torch.tensor(data.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order[360:]], labels[order[360:]], images[order[:360]], labels[order[:360]]


def train(model: nn.Module, epochs: int) -> float:
    """Train with AdamW, a warm-up and a cosine; returns the accuracy on the validation images, from 0 to 1."""
    images, labels, val_images, val_labels = digits()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    steps = epochs * -(-len(images) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.inference_mode():
        return (model(val_images).argmax(1) == val_labels).float().mean().item()


if __name__ == "__main__":
    torch.manual_seed(0)
    print(f"top-1 on 360 digits that it has not seen: {100 * train(LapeVit(), epochs=20):.1f} %")
