"""Bytes on disk: safe reading and atomic writing of files. Knows no model; the commands write through it."""

from hf_vit.files.atomic import atomic_file, atomic_folder
from hf_vit.files.errors import CheckpointError
from hf_vit.files.npz import open_arrays
from hf_vit.files.output import (
    CODE_FILES,
    check_output,
    check_output_file,
    check_outputs,
    is_generated,
    mark,
    owned_files,
)
from hf_vit.files.torch_files import find_weights, open_tensors


__all__ = [
    "CODE_FILES",
    "CheckpointError",
    "atomic_file",
    "atomic_folder",
    "check_output",
    "check_output_file",
    "check_outputs",
    "find_weights",
    "is_generated",
    "mark",
    "open_arrays",
    "open_tensors",
    "owned_files",
]
