"""Vision transformers whose position embedding is chosen by name: `build_model(ModelConfig)`."""

from lape_ray.model.variants import build_model, resolve
from lape_ray.model.vit import VisionTransformer

__all__ = ["VisionTransformer", "build_model", "resolve"]
