"""Weights of any layout in, and back out."""

from hf_vit.checkpoints.conversion import convert_jax_checkpoint
from hf_vit.checkpoints.from_jax import local_checkpoint, open_jax_checkpoint, write_jax_checkpoint
from hf_vit.checkpoints.layouts import DIALECTS
from hf_vit.checkpoints.loading import load_pretrained
from hf_vit.checkpoints.processors import processor_of
from hf_vit.files.errors import CheckpointError


__all__ = [
    "DIALECTS",
    "CheckpointError",
    "convert_jax_checkpoint",
    "load_pretrained",
    "local_checkpoint",
    "open_jax_checkpoint",
    "processor_of",
    "write_jax_checkpoint",
]
