"""The way back: a model of ours in, a checkpoint of the JAX code out.

    python conversion/safetensors_to_jax.py MODEL OUT.npz [--dialect linen|prelinen|big_vision]

A folder in our layout is read tensor by tensor. A model that came from a checkpoint is written in that one's dialect,
names, stacking and dtype unless another dialect is asked for.
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
from hf_vit.checkpoints import write_jax_checkpoint
from hf_vit.checkpoints.layouts import DIALECTS
from hf_vit.files.torch_files import find_weights, open_tensors


class SavedTensors(Mapping[str, torch.Tensor]):
    """The tensors of a saved folder, one file or several, each read when it is asked for and not kept."""

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
    """The parameters of a model by name, read lazily where it is a folder in our layout, and its configuration."""
    description = Path(model) / "config.json"
    if description.is_file() and json.loads(description.read_text()).get("model_type") == HfViTConfig.model_type:
        return SavedTensors(model), HfViTConfig.from_pretrained(model)
    loaded, info = HfViTForImageClassification.from_pretrained(model, output_loading_info=True)
    new = set(info["missing_keys"])  # a head that the model does not have
    return {name: value for name, value in loaded.state_dict().items() if name not in new}, loaded.config


@dataclass
class Options:
    dialect: str | None = field(
        default=None, metadata={"choices": list(DIALECTS), "help": "by default the one that the model came from"}
    )


def main(arguments: list[str] | None = None) -> None:
    parser = HfArgumentParser(cast(Any, Options), description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="a folder, a Hub id, or a checkpoint: whatever from_pretrained opens")
    parser.add_argument("out", type=Path, help="the .npz file to write")
    options = parser.parse_args(arguments)
    state, config = open_state(options.model)
    layout = write_jax_checkpoint(state, config, options.out, dialect=options.dialect)
    print(f"{options.out}: {layout.dialect} dialect, {layout.dtype}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted: nothing was written")
    except (OSError, ValueError) as error:
        sys.exit("error: " + " ".join(str(error).split()))
