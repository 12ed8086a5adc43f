"""Distributed training of vision transformers whose position embedding is the subject."""

__version__ = "0.1.0"
