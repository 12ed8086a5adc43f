"""Augmentation of batches of images on the training device, after the random resized crop and the flip.

pipeline       `build_augment`: what a recipe does to a batch, from uint8 pixels to normalised floats
randaugment    RandAugment in timm's notation
three_augment  3-Augment of DeiT III
jitter         colour jitter
erasing        random erasing
layers         the way of a batch, in which each image has its own operation, through few kernels
fused          the same on a GPU, with our kernels
color, hue, filters, geometry    the operations, equal to Pillow's
draws          random numbers keyed by (seed, epoch, epoch index, stream)
transfer       many small arrays to a device in one copy
crop           crops of small images of one size, resized and flipped on their device
"""

from lape_ray.data.augment.pipeline import Augment, build_augment

__all__ = ["Augment", "build_augment"]
