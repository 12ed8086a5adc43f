"""The networks: vision transformers whose position embedding is chosen by name. `build_model(ModelConfig)`.

    block      the equation: attention, MLP and the block of ViT, DeiT and LaPE
    network    the interface of every network
    vit        patch embedding and the network around the blocks
    compact    the parts of Compact Transformers: convolutional tokens, their block, sequence pooling
    t2t        tokens of T2T-ViT
    ceit       CeiT: its stem, its block, attention over layers
    swin       Swin: attention in shifted windows, merging, the network of its stages
    position/  every position embedding and join
    plugin     position embeddings and joins from a user's file: run, entered, checked
    variants   families and sizes by name, and a config's overrides
    build      from a config to a network
    convert    checkpoints of other code and other sizes

Everything here is the plain definition, as a paper writes it. `lape_ray.training` puts around it what makes it fast.
"""

from lape_ray.model.build import build_model
from lape_ray.model.network import Network
from lape_ray.model.variants import resolve
from lape_ray.model.vit import VisionTransformer

__all__ = ["Network", "VisionTransformer", "build_model", "resolve"]
