"""Mutational fuzzing of what `from_pretrained` reads: safetensors, shard indexes, configurations, state dicts.

    python tests/support/fuzz/fuzz_loader.py --inputs 40000 --seed 0

Each input is one file of a sound folder, mutated: bytes, cuts, copies, tokens; in JSON also values. A file of weights
goes through the reader of such files, one input in four through the whole of `from_pretrained`. Two outcomes are
allowed: a `CheckpointError`, or finite weights that are written and read again bit for bit. The exit status is 1 if
anything else happens (such an input is kept) or one takes over a second.
"""

import copy
import json
import random
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import ViTConfig, ViTForImageClassification
from transformers.utils import logging

from hf_vit import HfViTConfig, HfViTForImageClassification
from hf_vit.files.errors import CheckpointError
from hf_vit.files.torch_files import open_tensors


sys.path.insert(0, str(Path(__file__).parents[1]))
from fuzz.fuzz_containers import Findings, main, mutate, same_bits


TINY: dict[str, Any] = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "image_size": 8,
    "patch_size": 4,
    "num_labels": 2,
}
VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    3,
    2**31,
    10**30,
    0.5,
    -1e300,
    float("nan"),
    float("inf"),
    "",
    "x",
    "../x",
    "gelu",
    [],
]
VALUES += [{}, [1], [4, 4], {"a": 1}, "a" * 3000, [[]], {"0": None}, {"0": "a", "1": "b"}, [-5]]
VALUES += [{"dtype": float("nan")}, {"": "eager"}, {"quant_method": "x"}, {"AutoModel": "x--y.Z"}, {"__float__": "x"}]
VALUES += [
    "eager",
    "float16",
    "int8",
    "float8_e4m3fn",
    "owner/kernels:attention",
    "regression",
    {"model_type": "bert"},
]
# What transformers reads in any configuration, and what is an attribute of one.
FIELDS = (
    "_attn_implementation", "_auto_class", "_name_or_path", "_out_features", "_output_attentions", "_post_init_done",
    "architectures", "attn_implementation", "attribute_map", "auto_map", "base_model_tp_plan", "checkpoint_layout",
    "chunk_size_feed_forward", "dtype", "experts_implementation", "id2label", "is_encoder_decoder", "kwargs",
    "label2id", "layer_types", "mlp_layer_types", "name_or_path", "num_labels", "out_indices", "output_attentions",
    "output_hidden_states", "per_layer_config", "problem_type", "pruned_heads", "quantization_config", "return_dict",
    "rope_parameters", "rope_scaling", "stage_names", "sub_configs", "text_config", "tie_word_embeddings", "to_dict",
    "torch_dtype", "transformers_version", "use_return_dict", "vocab_size",
)  # fmt: skip


def make_folders(root: Path) -> list[Path]:
    """Sound folders: our layout in one file, in shards, transformers' layout, and a pickled state dict."""
    torch.manual_seed(0)
    model, stock = HfViTForImageClassification(HfViTConfig(**TINY)), ViTForImageClassification(ViTConfig(**TINY))
    for single in (model, stock):
        for parameter in single.parameters():
            torch.nn.init.normal_(parameter)
    model.save_pretrained(root / "own")
    model.save_pretrained(root / "shards", max_shard_size="1KB")
    stock.save_pretrained(root / "stock")
    (root / "pickled").mkdir()
    stock.config.save_pretrained(root / "pickled")
    torch.save(stock.state_dict(), root / "pickled" / "pytorch_model.bin")
    return sorted(root.iterdir())


def mutate_json(content: bytes, rng: random.Random) -> bytes:
    """Replace, remove or add values in a JSON object, at any depth."""
    tree = json.loads(content)
    for _ in range(rng.choice([1, 1, 2, 4])):
        place = tree
        while True:
            key = rng.choice(list(place))
            if not (isinstance(place[key], dict) and place[key] and rng.random() < 0.7):
                break
            place = place[key]
        change = rng.randrange(5)
        if change == 0 and len(place) > 1:
            del place[key]
        elif change == 1:
            place[str(rng.choice(VALUES))[:50]] = place[key]
        elif change == 2:
            place[rng.choice(FIELDS)] = copy.deepcopy(rng.choice(VALUES))
        else:
            place[key] = copy.deepcopy(rng.choice(VALUES))
    return json.dumps(tree).encode()


def read_file(path: Path, again: Path) -> None:
    """Read a file of weights tensor by tensor; raises AssertionError if what is accepted does not round-trip."""
    with open_tensors([path]) as tensors:
        found = {name: tensors.read(name).contiguous().clone() for name in tensors.shapes}
    save_file(found, again)
    with open_tensors([again]) as tensors:
        assert found.keys() == tensors.shapes.keys(), "other names come back"
        assert all(same_bits(tensors.read(name), tensor) for name, tensor in found.items()), "does not round-trip"


def load_folder(folder: Path, again: Path) -> None:
    """Load a model; raises AssertionError if one that is accepted is not finite or does not round-trip."""
    model = HfViTForImageClassification.from_pretrained(folder)
    state = model.state_dict()
    assert all(tensor.isfinite().all() for tensor in state.values()), "is accepted and not finite"
    model.save_pretrained(again)
    other = HfViTForImageClassification.from_pretrained(again).state_dict()
    assert state.keys() == other.keys(), "other names come back"
    assert all(same_bits(state[name], tensor) for name, tensor in other.items()), "does not round-trip"


def check(content: bytes, action: Callable[[], None], findings: Findings) -> None:
    start = time.process_time()
    try:
        action()
        findings.outcomes["accepted"] += 1
    except CheckpointError:
        findings.outcomes["refused"] += 1
    except Exception as error:
        findings.failures.append((f"{type(error).__name__}: {error}", content))
    findings.slowest = max(findings.slowest, time.process_time() - start)


def run(inputs: int, seed: int) -> Findings:
    """Check `inputs` mutated files; the same seed gives the same files."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    rng, findings = random.Random(seed), Findings()
    with tempfile.TemporaryDirectory() as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of what it is about to refuse
        root = Path(temporary)
        folders = make_folders(root / "sound")
        weights = [path for folder in folders for path in sorted(folder.iterdir()) if path.suffix != ".json"]
        for folder in folders:
            load_folder(folder, root / "again")  # the first pays for imports
        for number in range(inputs):
            if number % 4:
                path = rng.choice(weights)
                mutated = root / f"file{path.suffix}"
                content = mutate(path.read_bytes(), rng.choice(weights).read_bytes(), rng)
                mutated.write_bytes(content)
                check(content, lambda path=mutated: read_file(path, root / "again.safetensors"), findings)
                continue
            folder = rng.choice(folders)
            shutil.rmtree(root / "folder", ignore_errors=True)
            shutil.copytree(folder, root / "folder")
            path = rng.choice(sorted((root / "folder").iterdir()))
            is_json = path.suffix == ".json" and rng.random() < 0.7
            content = path.read_bytes()
            content = mutate_json(content, rng) if is_json else mutate(content, content, rng)
            path.write_bytes(content)
            check(content, lambda: load_folder(root / "folder", root / "again"), findings)
    return findings


if __name__ == "__main__":
    sys.exit(main(run, "fuzz_loader", __doc__, inputs=40_000))
