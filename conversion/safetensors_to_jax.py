"""Convert a model to a checkpoint of the JAX code.

    python conversion/safetensors_to_jax.py MODEL OUT.npz [--dialect linen|prelinen|big_vision]

A folder in hf-vit's layout is read tensor by tensor. A model that came from a checkpoint is written in the dialect,
names, stacking and dtype of that checkpoint unless another dialect is requested.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from transformers import HfArgumentParser

from hf_vit import HfViTConfig, HfViTForImageClassification
from hf_vit.checkpoints import DIALECTS, write_jax_checkpoint
from hf_vit.cli import run
from hf_vit.files import check_output_file, find_weights, open_tensors


class SavedTensors(Mapping[str, torch.Tensor]):
    """The tensors of a saved folder, in one file or several, each read on access and not kept."""

    def __init__(self, folder: str):
        self._places: dict[str, Path] = {}
        for path in find_weights(folder, {}):
            with open_tensors([path]) as tensors:
                self._places |= dict.fromkeys(tensors.shapes, path)

    def __getitem__(self, name: str) -> torch.Tensor:
        with safe_open(self._places[name], framework="pt") as weights:  # its memory map goes with the tensor
            return weights.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def open_state(model: str) -> tuple[Mapping[str, torch.Tensor], HfViTConfig]:
    """Return the parameters by name, read lazily from a folder in hf-vit's layout, and the configuration."""
    description = Path(model) / "config.json"
    if description.is_file() and json.loads(description.read_text()).get("model_type") == HfViTConfig.model_type:
        return SavedTensors(model), HfViTConfig.from_pretrained(model)
    loaded, info = HfViTForImageClassification.from_pretrained(model, output_loading_info=True)
    new = set(info["missing_keys"])  # a head that the model does not have
    return {name: value for name, value in loaded.state_dict().items() if name not in new}, loaded.config


@dataclass
class Options:
    dialect: str | None = field(
        default=None,
        metadata={"choices": list(DIALECTS), "help": "Dialect to write, by default that of the source."},
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace an existing file."})


def main(arguments: list[str] | None = None) -> None:
    parser = HfArgumentParser(cast(Any, Options), description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="Folder, Hub id or checkpoint that from_pretrained opens.")
    parser.add_argument("out", type=Path, help="The .npz file to write.")
    options = parser.parse_args(arguments)
    check_output_file(options.out, overwrite=options.overwrite)
    state, config = open_state(options.model)
    layout = write_jax_checkpoint(state, config, options.out, dialect=options.dialect)
    print(f"{options.out}: {layout.dialect} dialect, {layout.dtype}")


if __name__ == "__main__":
    sys.exit(run(main))
