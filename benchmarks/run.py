"""Ours beside transformers' ViT and timm, in one run: the same weights, the same pixels, one measurement in turn.

python benchmarks/run.py [--preset ViT-S_16] [--batch 1 8] [--rounds 7] [--json FILE]

The machine may be busy with other work, so only the ratios within a run mean anything; every figure is the median over
rounds in which each library ran once. Outputs are compared before anything is timed.
"""

import functools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import timm
import torch
from transformers import HfArgumentParser, ViTConfig, ViTForImageClassification

from hf_vit import HfViTConfig, HfViTForImageClassification


# hidden size, heads, MLP size of the presets that all three libraries have
TIMM_NAMES = {
    "ViT-Ti_16": "vit_tiny_patch16_224",
    "ViT-S_16": "vit_small_patch16_224",
    "ViT-B_16": "vit_base_patch16_224",
}


@dataclass
class BenchArguments:
    """What is measured."""

    preset: str = field(default="ViT-S_16", metadata={"help": "A plain preset.", "choices": list(TIMM_NAMES)})
    batch: list[int] = field(default_factory=lambda: [1, 8], metadata={"help": "Pictures at a time."})
    rounds: int = field(default=7, metadata={"help": "Measurements of each library."})
    json: str | None = field(default=None, metadata={"help": "Also write the figures here."})


def main(argv: list[str]) -> int:
    parser = HfArgumentParser(cast(Any, BenchArguments), description=(__doc__ or "").splitlines()[0])
    args: Any = parser.parse_args_into_dataclasses(argv)[0]
    models = build(args.preset)
    print(f"{args.preset}, float32, {torch.get_num_threads()} threads, {platform.processor() or platform.machine()}")
    print(f"{'step':10} {'batch':>5}  " + "  ".join(f"{name:>24}" for name in models))
    figures = []
    for batch in args.batch:
        pixels = torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0))
        agree(models, pixels)
        for step in (infer, train):
            steps = {name: functools.partial(step, model, pixels) for name, model in models.items()}
            times = measure(steps, args.rounds)
            figures.append({"step": step.__name__, "batch": batch, "seconds": times})
            print(f"{step.__name__:10} {batch:5}  " + "  ".join(describe(name, times) for name in models))
    if args.json is not None:
        report = {"preset": args.preset, "torch": torch.__version__, "machine": platform.machine(), "figures": figures}
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=2)
    return 0


def build(preset: str) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Return ours, transformers' and timm's model of one preset with the same weights, as functions to logits."""
    torch.manual_seed(0)
    config = HfViTConfig.from_preset(preset, num_labels=1000, zero_init_head=False)
    ours = HfViTForImageClassification(config).eval()
    state = ours.state_dict()
    stock = ViTForImageClassification(
        ViTConfig(
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_attention_heads,
            intermediate_size=config.intermediate_size,
            hidden_act=config.hidden_act,
            layer_norm_eps=config.layer_norm_eps,
            id2label={i: str(i) for i in range(1000)},
        )
    ).eval()
    other = timm.create_model(TIMM_NAMES[preset], act_layer="gelu_tanh").eval()
    renamed, fused = {}, {}
    for name, value in state.items():
        renamed[to_stock(name)] = value
        fused[to_timm(name)] = value
    for i in range(config.num_hidden_layers):
        for kind in ("weight", "bias"):
            parts = [fused.pop(f"blocks.{i}.attn.{part}.{kind}") for part in ("query", "key", "value")]
            fused[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(parts)
    stock.load_state_dict(renamed)
    other.load_state_dict(fused)
    return {
        "hf-vit": lambda x: ours(x).logits,
        "transformers": lambda x: stock(x).logits,
        "timm": other,
    }


def to_stock(name: str) -> str:
    """Our parameter's name in transformers' ViT (version 5)."""
    changes = {
        "vit.embeddings.patch_embeddings.": "vit.embeddings.patch_embeddings.projection.",
        "vit.encoder.encoder_norm": "vit.layernorm",
        "vit.encoder.layer": "vit.layers",
        "attention_norm": "layernorm_before",
        "ffn_norm": "layernorm_after",
        "attn.query": "attention.q_proj",
        "attn.key": "attention.k_proj",
        "attn.value": "attention.v_proj",
        "attn.out": "attention.o_proj",
        ".ffn.": ".mlp.",
    }
    for ours, theirs in changes.items():
        name = name.replace(ours, theirs)
    return name


def to_timm(name: str) -> str:
    """Our parameter's name in timm's ViT, query, key and value still apart."""
    changes = {
        "vit.embeddings.cls_token": "cls_token",
        "vit.embeddings.position_embeddings": "pos_embed",
        "vit.embeddings.patch_embeddings.": "patch_embed.proj.",
        "vit.encoder.encoder_norm": "norm",
        "vit.encoder.layer": "blocks",
        "attention_norm": "norm1",
        "ffn_norm": "norm2",
        "attn.out": "attn.proj",
        ".ffn.": ".mlp.",
        "classifier": "head",
    }
    for ours, theirs in changes.items():
        name = name.replace(ours, theirs)
    return name


def agree(models: dict[str, Callable[[torch.Tensor], torch.Tensor]], pixels: torch.Tensor) -> None:
    """Raise unless all models give the first one's logits to 1e-4."""
    with torch.no_grad():
        outputs = {name: model(pixels) for name, model in models.items()}
    reference = outputs.pop("hf-vit")
    for name, output in outputs.items():
        torch.testing.assert_close(output, reference, atol=1e-4, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


def infer(model: Callable[[torch.Tensor], torch.Tensor], pixels: torch.Tensor) -> None:
    """One forward pass without gradients."""
    with torch.no_grad():
        model(pixels)


def train(model: Callable[[torch.Tensor], torch.Tensor], pixels: torch.Tensor) -> None:
    """One forward and backward pass."""
    model(pixels).square().mean().backward()


def measure(steps: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Return seconds of every round, the steps taking turns; the first round is not counted."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(rounds + 1):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if i:
                times[name].append(time.perf_counter() - started)
    return times


def describe(name: str, times: dict[str, list[float]]) -> str:
    """Median milliseconds, the spread, and how much faster ours is."""
    median = statistics.median(times[name])
    ratio = "" if name == "hf-vit" else f" {median / statistics.median(times['hf-vit']):5.2f}x"
    spread = (max(times[name]) - min(times[name])) / median
    return f"{1000 * median:8.1f} ms +-{spread / 2:4.0%}{ratio:>7}".rjust(24)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
