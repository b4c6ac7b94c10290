"""Build `how-vit-works.md` from its template: every value is computed here, every link finds its line in the code.

python docs/build.py            # the page
python docs/build.py --figures  # and its figures, by examples/explain.py on the embedded checkpoint

In the template `{{name}}` is a fact of `gather_facts`, and `{{code: module.Class.function > text of a line | label}}`
a link to that line (without `> ...` to the definition). A test renders the page anew and compares.
"""

import argparse
import ast
import functools
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

from hf_vit import PRESETS, HfViTConfig, HfViTForImageClassification
from hf_vit.catalogue import id2label
from hf_vit.checkpoints import processor_of
from hf_vit.data import read_image
from hf_vit.explain import explain
from hf_vit.modeling_hf_vit import Block
from hf_vit.training import RECIPES


DOCS = Path(__file__).parent
ROOT = DOCS.parent
TEMPLATE, PAGE = DOCS / "how-vit-works.template.md", DOCS / "how-vit-works.md"
CHECKPOINT = ROOT / "examples" / "checkpoints" / "vit-mnist.npz"
DIGIT = 3  # of scikit-learn's, a three
FIGURES = {
    "overview.png": "01-three-overview.png",
    "heads.png": "01-three-heads.png",
    "positions.png": "model-positions.png",
    "filters.png": "model-filters.png",
    "distances.png": "model-distances.png",
}
TIMES = "\N{MULTIPLICATION SIGN}"
NAMED = ("ViT-Ti_16", "ViT-S_16", "ViT-B_16", "ViT-L_16", "ViT-H_14", "R26+ViT-S_32", "R50+ViT-B_16", "R50+ViT-L_32")


def render(template: str) -> str:
    """Return the page.

    Raises:
        KeyError: if the template asks for a fact that is not there.
        ValueError: if a link finds no line, or several.
    """
    facts = gather_facts()

    def fill(match: re.Match) -> str:
        name = match[1].strip()
        return link(name.removeprefix("code:").strip()) if name.startswith("code:") else facts[name]

    return re.sub(r"\{\{(.+?)\}\}", fill, template)


def link(target: str) -> str:
    """Return a Markdown link to the line that `module.Class.function > text | label` names."""
    place, _, label = (part.strip() for part in target.partition("|"))
    symbol, _, text = (part.strip() for part in place.partition(" > "))
    module, *names = symbol.split(".")  # `explain/maps` is a module, too
    path = ROOT / "src" / "hf_vit" / f"{module}.py"
    source = path.read_text(encoding="utf-8")
    node: ast.AST = ast.parse(source)
    for name in names:
        found = [child for child in getattr(node, "body", []) if name_of(child) == name]
        if len(found) != 1:
            raise ValueError(f"{target}: expected one {name} in {path.name}, got {len(found)}")
        node = found[0]
    line = getattr(node, "lineno", 1)
    if text:
        lines = source.splitlines()[line - 1 : getattr(node, "end_lineno", None)]
        hits = [line + i for i, code in enumerate(lines) if text in code]
        if len(hits) != 1:
            raise ValueError(f"{target}: expected one line with {text!r} in {symbol}, got {len(hits)}")
        line = hits[0]
    return f"[{label or f'`{names[-1]}`'}](../src/hf_vit/{module}.py#L{line})"


def name_of(node: ast.AST) -> str | None:
    if isinstance(node, ast.Assign | ast.AnnAssign):
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        return getattr(target, "id", None)
    return getattr(node, "name", None)


# --- facts ---


@functools.cache
def gather_facts() -> dict[str, str]:
    """Return every number of the page, by name, as it is printed."""
    facts: dict[str, str] = {}
    for prefix, preset in (("", "ViT-B_16"), ("hybrid.", "R50+ViT-B_16")):
        config = HfViTConfig.from_preset(preset, num_labels=1000)
        facts |= {f"{prefix}{name}": value for name, value in config_facts(config).items()}
        facts |= {f"{prefix}{name}": value for name, value in shape_facts(config).items()}
    return facts | fine_tuning_facts() | gelu_facts() | example_facts() | {"presets": preset_table()}


def config_facts(config: HfViTConfig) -> dict[str, str]:
    """Sizes, parameters and multiplications of a preset."""
    height, width = config.grid_size
    model = meta_model(config)
    tokens = height * width + config.num_prefix_tokens
    embeddings, block = model.vit.embeddings, model.vit.encoder.layer[0]
    assert isinstance(block, Block)
    patch_numbers = config.num_channels * config.patch_height_width[0] * config.patch_height_width[1]
    work = multiplications(config, tokens)
    return {
        "image": str(config.image_size),
        "channels": str(config.num_channels),
        "patch": str(config.patch_height_width[0]),
        "grid": f"{height}{TIMES}{width}",
        "patches": str(height * width),
        "patch numbers": str(patch_numbers),
        "tokens": str(tokens),
        "width": f"{config.hidden_size:,}",
        "heads": str(config.num_attention_heads),
        "head width": str(config.hidden_size // config.num_attention_heads),
        "mlp": f"{config.intermediate_size:,}",
        "mlp factor": str(config.intermediate_size // config.hidden_size),
        "blocks": str(config.num_hidden_layers),
        "norm eps": f"{config.layer_norm_eps:.0e}".replace("e-0", "e-"),
        "classes": f"{config.num_labels:,}",
        "parameters": count(model),
        "parameters.patches": count(embeddings.patch_embeddings),
        "parameters.positions": f"{tokens * config.hidden_size:,}",
        "parameters.block": count(block),
        "parameters.attention": count(block.attn),
        "parameters.mlp": count(block.ffn),
        "parameters.head": count(model.classifier),
        "stem stride": str(config.stem_stride),
        "stem channels": f"{embeddings.patch_embeddings.in_channels:,}",
        "stem parameters": "0" if embeddings.hybrid_model is None else count(embeddings.hybrid_model),
        "work": f"{sum(work.values()) / 1e9:.1f}",
        "work.scores": f"{work['scores'] / sum(work.values()):.0%}",
    }


def shape_facts(config: HfViTConfig) -> dict[str, str]:
    """Return the shapes of an image's representations in the model, recorded by hooks."""
    model = meta_model(config)
    vit, shapes = model.vit, {}
    block = vit.encoder.layer[0]
    assert isinstance(block, Block)
    watched: dict[str, nn.Module] = {
        "patch map": vit.embeddings.patch_embeddings,
        "embedded": vit.embeddings,
        "query": block.attn.query,
        "attended": block.attn,
        "mlp inside": block.ffn.fc1,
        "block": block,
        "encoded": vit.encoder,
        "logits": model.classifier,
    }
    if vit.embeddings.hybrid_model is not None:
        stem = vit.embeddings.hybrid_model
        watched["root"] = stem.root
        watched |= {f"stage {i}": stage for i, stage in enumerate(stem.body.children(), start=1)}

    def see(name: str, output) -> None:
        shapes[name] = output[0] if isinstance(output, tuple) else output

    for name, module in watched.items():
        module.register_forward_hook(lambda module, args, output, name=name: see(name, output))
    assert isinstance(config.image_size, int)
    image = torch.zeros(1, config.num_channels, config.image_size, config.image_size, device="meta")
    shapes["attention"] = model(image, output_attentions=True).attentions[0]
    shapes["image"] = image
    return {f"shape.{name}": TIMES.join(map(str, tensor.shape[1:])) for name, tensor in shapes.items()}


@functools.cache
def preset_table() -> str:
    rows = ["| model | blocks | width | heads | MLP | tokens | parameters |", "|---|--:|--:|--:|--:|--:|--:|"]
    for name in NAMED:
        assert name in PRESETS
        config = HfViTConfig.from_preset(name, num_labels=1000)
        facts = config_facts(config)
        shown = [facts[key] for key in ("blocks", "width", "heads", "mlp", "tokens", "parameters")]
        rows.append(f"| {name.replace('_', '/')} | " + " | ".join(shown) + " |")
    return "\n".join(rows)


def fine_tuning_facts() -> dict[str, str]:
    recipe, config = RECIPES["paper"], HfViTConfig.from_preset("ViT-B_16")
    assert recipe.image_size is not None
    height, width = config.grid_of((recipe.image_size, recipe.image_size))
    tokens, old = height * width + 1, int(config_facts(config)["tokens"])
    names = id2label(21843)
    assert names is not None
    return {
        "tune.image": str(recipe.image_size),
        "tune.grid": f"{height}{TIMES}{width}",
        "tune.tokens": str(tokens),
        "tune.rate": str(recipe.learning_rate),
        "tune.batch": str(recipe.total_batch_size),
        "tune.steps": f"{recipe.max_steps:,}",
        "tune.warmup": str(int(recipe.warmup_steps)),
        "tune.work": f"{sum(multiplications(config, tokens).values()) / 1e9:.1f}",
        "tune.pairs": f"{tokens**2 / old**2:.1f}",
        "classes.21k": f"{len(names):,}",
    }


def gelu_facts() -> dict[str, str]:
    x = torch.linspace(-8, 8, 1_600_001, dtype=torch.float64)
    difference = (F.gelu(x) - F.gelu(x, approximate="tanh")).abs().max()
    return {"gelu difference": f"{difference:.0e}".replace("e-0", "e-")}


def example_facts() -> dict[str, str]:
    """What the embedded checkpoint makes of the digit in the figures."""
    model = HfViTForImageClassification.from_pretrained(CHECKPOINT)
    with tempfile.TemporaryDirectory() as folder:
        image = read_image(write_digit(Path(folder)))
    pixels = processor_of(CHECKPOINT, model.config)(image, return_tensors="pt")["pixel_values"]
    found = explain(model, pixels)
    first, second = found.classes[:2]
    return {
        "example.parameters": count(model),
        "example.blocks": str(model.config.num_hidden_layers),
        "example.heads": str(model.config.num_attention_heads),
        "example.grid": f"{found.tokens.size[0]}{TIMES}{found.tokens.size[1]}",
        "example.patch": f"{found.tokens.patch[0]}{TIMES}{found.tokens.patch[1]}",
        "example.image": f"{model.config.image_size}{TIMES}{model.config.image_size}",
        "example.class": first.label,
        "example.probability": f"{first.probability:.0%}",
        "example.second": second.label,
        "example.nearest": f"{float(found.distances.min()):.0f}",
        "example.farthest": f"{float(found.distances.max()):.0f}",
    }


def multiplications(config: HfViTConfig, tokens: int) -> dict[str, int]:
    """Multiply-adds of a plain ViT for one image, by what they are for."""
    width, patches = config.hidden_size, tokens - config.num_prefix_tokens
    height, across = config.patch_height_width
    return {
        "patches": patches * config.num_channels * height * across * width,
        "projections": config.num_hidden_layers * 4 * tokens * width**2,
        "scores": config.num_hidden_layers * 2 * tokens**2 * width,
        "mlp": config.num_hidden_layers * 2 * tokens * width * config.intermediate_size,
        "head": width * (config.num_labels or 0),
    }


def meta_model(config: HfViTConfig) -> HfViTForImageClassification:
    with torch.device("meta"):
        return HfViTForImageClassification(config).eval()


def count(module: nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in module.parameters()):,}"


# --- figures ---


def write_digit(folder: Path) -> Path:
    """Write the digit of the figures, enlarged, and return its path."""
    pixels = torch.from_numpy(load_digits().images[DIGIT] * 255 / 16).round().to(torch.uint8)
    path = folder / "three.png"
    Image.fromarray(pixels.numpy()).resize((320, 320), Image.Resampling.BILINEAR).save(path)
    return path


def draw_figures(folder: Path) -> None:
    """Run the explain command on the digit, and keep its figures in `folder`."""
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "out"
        command = ["--model_name_or_path", str(CHECKPOINT), "--output_dir", str(out), "--top_k", "3"]
        script = ROOT / "examples" / "explain.py"
        subprocess.run([sys.executable, str(script), str(write_digit(Path(place))), *command], check=True)
        for name, made in FIGURES.items():
            with Image.open(out / "figures" / made) as image:
                image.convert("RGB").save(folder / name, optimize=True)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--figures", action="store_true", help="Draw the figures anew, too.")
    if parser.parse_args(argv).figures:
        draw_figures(DOCS / "figures")
    PAGE.write_text(render(TEMPLATE.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
