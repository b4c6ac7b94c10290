"""Compare a model with its original checkpoint: both run on the same images, and every step is compared.

The oracle (`reference_numpy.py`) reads the checkpoint itself and shares nothing with the package. The certificate
names the checkpoint by its sha256 and gives the largest difference of every step.

    python conversion/verify_parity.py MODEL --against CHECKPOINT.npz [--json FILE]
"""

import hashlib
import json
import platform
import sys
import zipfile
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import reference_numpy as reference
import torch
from transformers import HfArgumentParser, ViTForImageClassification

from hf_vit import HfViTConfig, HfViTForImageClassification
from hf_vit.cli import run
from hf_vit.files import atomic_file, check_outputs


# How far two float32 computations of one step may lie apart, as a share of its largest value (of 1 where that is
# smaller). Plain models of full size reach 1.3e-6; a wrong GELU or epsilon is at 1e-4 and more.
RATE = 1e-5
RATE_OF_POSITIONS = 1e-6
RATE_BEHIND_A_STEM = 2e-5  # logits and features
# Deep stems magnify rounding: a random R50+L/32 in float32 is 2e-4 from itself in float64 after its last stage. Where
# a step is out of bounds, that distance is measured, and so many times of it are allowed.
NOISE_FACTOR = 4


@dataclass(frozen=True)
class Certificate:
    """What was compared, how far apart it is, and whether that is within bounds.

    Args:
        source: The checkpoint's file name, or the address that it was fetched from.
        tensors: Parameters of the model.
        head: `"checkpoint"`, `"new"` (not compared: the file has none like it) or `"none"`.
        image_size: (height, width) of the images in pixels.
        differences: The largest absolute difference of each step.
        relative_differences: The same, divided by the largest value of the step in the reference.
        bounds: What each absolute difference may be; `bound` is that of the last step.
        float32_noise: The distance of the model in float32 from itself in float64, where that widened a bound.
        passed: Whether each is within its bound.
    """

    source: str
    sha256: str
    tensors: int
    dtype: str
    head: str
    image_size: tuple[int, int]
    pictures: int
    versions: dict[str, str]
    differences: dict[str, float]
    relative_differences: dict[str, float]
    bounds: dict[str, float]
    bound: float
    float32_noise: dict[str, float]
    passed: bool

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"


class ParityError(ValueError):
    """The model does not compute what its checkpoint does."""


def verify_parity(model_path: str | Path, checkpoint: str | Path, *, source: str | None = None) -> Certificate:
    """Compare a model with the checkpoint that it was made from, in float32 on the CPU.

    Args:
        model_path: Anything that `from_pretrained` opens.
        checkpoint: `.npz`, or a fine-tuning `checkpoint_<step>`.
        source: What the certificate calls the checkpoint; its file name by default.

    Raises:
        ValueError: if the two are not to be compared: other shapes, or positions resampled in another way.
    """
    model, is_head_new = _load(model_path)
    config, tensors = model.config, len(model.state_dict())
    height, width = (config.image_size,) * 2 if isinstance(config.image_size, int) else config.image_size
    images = fixed_images(height, width, config.num_channels)
    ours = record_steps(model, images)
    del model  # before the oracle loads the checkpoint
    theirs, head = _run_oracle(checkpoint, config, images, is_head_new=is_head_new)
    differences = _distances(theirs, ours)
    bounds = {name: bound_of(name, theirs[name], is_hybrid=config.resnet_layers is not None) for name in differences}
    noise = {}
    if excesses(differences, bounds):
        exact = record_steps(_load(model_path)[0].double(), images.astype(np.float64))
        noise = {
            name: gap for name, gap in _distances(ours, exact).items() if NOISE_FACTOR * gap > bounds.get(name, np.inf)
        }
        bounds |= {name: NOISE_FACTOR * gap for name, gap in noise.items()}
    return _certify(
        checkpoint, source, differences, theirs, bounds, tensors=tensors, head=head, images=images, noise=noise
    )


def verify_stock(folder: Path, checkpoint: Path, config: HfViTConfig, *, source: str) -> Certificate:
    """Compare the logits of transformers' own ViT in `folder` with the checkpoint's, computed by the oracle.

    Args:
        config: The configuration of the model in hf-vit's terms.
    """
    height, width = (config.image_size,) * 2 if isinstance(config.image_size, int) else config.image_size
    images = fixed_images(height, width, config.num_channels)
    model = ViTForImageClassification.from_pretrained(folder).eval()
    tensors = len(model.state_dict())
    with torch.no_grad():
        logits = model(torch.from_numpy(images).permute(0, 3, 1, 2)).logits.numpy()
    theirs, head = _run_oracle(checkpoint, config, images, is_head_new=False)
    if "logits" not in theirs:
        raise ValueError(f"{source}: has no head of {config.num_labels} classes to compare: pass --verify false")
    differences = _distances({"logits": theirs["logits"]}, {"logits": logits})
    bound = bound_of("logits", theirs["logits"], is_hybrid=False)
    return _certify(
        checkpoint,
        source,
        differences,
        theirs,
        {"logits": bound},
        tensors=tensors,
        head=head,
        images=images,
        noise={},
    )


def _certify(
    checkpoint: str | Path,
    source: str | None,
    differences: dict[str, float],
    theirs: dict[str, np.ndarray],
    bounds: dict[str, float],
    *,
    tensors: int,
    head: str,
    images: np.ndarray,
    noise: dict[str, float],
) -> Certificate:
    with Path(checkpoint).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Certificate(
        source=source or Path(checkpoint).name,
        sha256=digest,
        tensors=tensors,
        dtype="float32",
        head=head,
        image_size=images.shape[1:3],
        pictures=len(images),
        versions={"python": platform.python_version()}
        | {name: version(name) for name in ("hf-vit", "torch", "transformers", "numpy")},
        differences=differences,
        relative_differences={name: gap / (_largest(theirs[name]) or 1.0) for name, gap in differences.items()},
        bounds=bounds,
        bound=bounds["logits" if "logits" in bounds else "features"],
        float32_noise=noise,
        passed=not excesses(differences, bounds),
    )


def excesses(differences: dict[str, float], bounds: dict[str, float]) -> list[str]:
    """Return the steps out of bounds in the order of computation: the cause lies before the first."""
    return [name for name, bound in bounds.items() if not differences[name] <= bound]  # also for NaN


def fixed_images(height: int, width: int, channels: int) -> np.ndarray:
    """(2, H, W, C) float32 in -1..1: noise, and slow waves as in a photograph; the same each time."""
    noise = np.random.default_rng(0).uniform(-1, 1, (height, width, channels))
    y, x, c = np.ogrid[:height, :width, :channels]
    return np.stack([noise, np.sin(y / 17 + x / 29 + 2 * c)]).astype(np.float32)


def record_steps(model: HfViTForImageClassification, images: np.ndarray) -> dict[str, np.ndarray]:
    """Run the model on (B, H, W, C) and return every step under the oracle's name for it, in its axis order."""
    vit, steps, hooks = model.vit, {}, []
    tokens = vit.config.num_prefix_tokens + int(np.prod(vit.config.grid_of(images.shape[1:3])))

    def keep(name: str, module: torch.nn.Module) -> None:
        hooks.append(module.register_forward_hook(lambda _, __, output: steps.update({name: output})))

    keep("embed", vit.embeddings.patch_embeddings)
    keep("base", vit)
    if (stem := vit.embeddings.hybrid_model) is not None:
        keep("root", stem.root)
        for i, stage in enumerate(stem.body, start=1):
            keep(f"stage_{i}", stage)
    try:
        with torch.no_grad():
            outputs = model(
                torch.from_numpy(images).permute(0, 3, 1, 2),
                output_hidden_states=True,
                output_attentions=tokens <= reference.MAX_RECORDED_TOKENS,
            )
    finally:
        for hook in hooks:
            hook.remove()
    base = steps.pop("base")
    steps = {name: value.permute(0, 2, 3, 1) for name, value in steps.items()}  # (B, h, w, C)
    if vit.embeddings.position_embeddings is not None:
        steps["posemb"] = vit.embeddings.position_embeddings.detach()
    steps["tokens"], *blocks = outputs.hidden_states
    steps |= {f"block_{i:02d}": value for i, value in enumerate(blocks)}
    steps |= {f"attn_{i:02d}": value for i, value in enumerate(outputs.attentions or ())}
    steps |= {"encoded": base.last_hidden_state, "features": base.pooler_output, "logits": outputs.logits}
    return {name: value.numpy() for name, value in steps.items()}


def bound_of(name: str, expected: np.ndarray, *, is_hybrid: bool) -> float:
    """The largest absolute difference that a step may have."""
    if name == "root" or name.startswith("stage_"):
        return RATE * _largest(expected)
    rate = RATE_OF_POSITIONS if name == "posemb" else RATE
    if is_hybrid and name in ("logits", "features"):
        rate = RATE_BEHIND_A_STEM
    return rate * max(1.0, _largest(expected))


def _load(model_path: str | Path) -> tuple[HfViTForImageClassification, bool]:
    """The model, eager, and whether its head was made new on loading."""
    model, info = HfViTForImageClassification.from_pretrained(
        str(model_path), dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    return model.eval(), any(name.startswith("classifier.") for name in info["missing_keys"])


def _run_oracle(
    checkpoint: str | Path, config: HfViTConfig, images: np.ndarray, *, is_head_new: bool
) -> tuple[reference.Arrays, str]:
    """What the checkpoint computes, and where the model's head comes from."""
    try:
        params = reference.read_checkpoint(checkpoint)
        head = _choose_head(params, config, is_new=is_head_new)
        return reference.forward(params, images, _settings(params, config)), head
    except (KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{checkpoint}: the oracle cannot read it: {error}") from error


def _choose_head(params: reference.Arrays, config: HfViTConfig, *, is_new: bool) -> str:
    """Where the model's head comes from; takes the checkpoint's out of `params` unless it is to be compared."""
    own = (config.representation_size or config.hidden_size, config.num_labels)
    has_layer_dropped = "pre_logits/kernel" in params and config.representation_size is None
    if "head/kernel" in params and params["head/kernel"].shape == own and not is_new and not has_layer_dropped:
        return "checkpoint"
    params.pop("head/kernel", None)
    return "new" if config.num_labels else "none"


def _settings(params: reference.Arrays, config: HfViTConfig) -> reference.Settings:
    """What the oracle infers, but for what no file can tell: pooling, a dropped layer, a grid that is not square."""
    overrides: dict[str, Any] = {"pooling": config.pooling}
    if config.representation_size is None:
        overrides["representation_size"] = None
    table = next((name for name in params if name.endswith("pos_embedding")), None)
    if table is not None:
        h, w = config.grid_size
        rows = params[table].shape[1] - reference.class_rows(table, params[table].shape[1], h * w, "cls" in params)
        if rows == h * w:
            overrides["grid"] = (h, w)
        elif config.position_resampling not in ("jax", "big_vision"):
            raise ValueError(
                f"the positions were resampled with {config.position_resampling!r}, which the reference does not do: "
                "verify the model at the checkpoint's own image_size"
            )
    return reference.infer_settings(params, **overrides)


def _distances(expected: dict[str, np.ndarray], got: dict[str, np.ndarray]) -> dict[str, float]:
    """The largest absolute difference by name, in the order of the computation.

    Not compared: `pooled` and fixed positions, which are no output of ours; `features` and `tokens` show them.
    """
    distances = {}
    for name, theirs in expected.items():
        if name in got:
            ours = got[name][:, -theirs.shape[1] :] if name == "posemb" else got[name]  # big_vision has no class row
            if ours.shape != theirs.shape:
                raise ValueError(f"{name}: the model gives {ours.shape}, the checkpoint {theirs.shape}: not one model")
            distances[name] = _largest(ours - theirs)
    return distances


def _largest(x: np.ndarray) -> float:
    return float(np.abs(x).max())


@dataclass
class Options:
    against: str = field(metadata={"help": "Original checkpoint: .npz or checkpoint_<step>."})
    json: str | None = field(default=None, metadata={"help": "File to write the certificate to."})


def main(arguments: list[str] | None = None) -> Certificate:
    parser = HfArgumentParser(cast(Any, Options), description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="Folder, Hub id or checkpoint that from_pretrained opens.")
    options = parser.parse_args(arguments)
    check_outputs([options.json])
    certificate = verify_parity(options.model, options.against)
    if options.json:
        with atomic_file(options.json) as temporary:
            temporary.write_text(certificate.to_json(), encoding="utf-8")
    print(report(certificate))
    if not certificate.passed:
        raise ParityError(failure(certificate))
    return certificate


def report(certificate: Certificate) -> str:
    """Return a table of the differences; of the blocks and their attention only the first out of bounds."""
    height, width = certificate.image_size
    lines = [
        f"{certificate.source} (sha256 {certificate.sha256[:16]}...), {certificate.pictures} images of "
        f"{height}x{width} pixels, head: {certificate.head}",
        f"{'step':<10}{'difference':>12}{'relative':>12}{'bound':>12}",
    ]
    first = excesses(certificate.differences, certificate.bounds)[:1]
    for name, difference in certificate.differences.items():
        if not name.startswith(("attn", "block")) or name in first:
            relative, bound = certificate.relative_differences[name], certificate.bounds[name]
            lines.append(f"{name:<10}{difference:>12.1e}{relative:>12.1e}{bound:>12.1e}")
    return "\n".join(lines)


def failure(certificate: Certificate) -> str:
    """Return one line that names the first step out of bounds."""
    name = excesses(certificate.differences, certificate.bounds)[0]
    return (
        f"{certificate.source}: the model does not compute what the checkpoint does: {name} is "
        f"{certificate.differences[name]:.1e} off, expected at most {certificate.bounds[name]:.1e}"
    )


if __name__ == "__main__":
    sys.exit(run(main))
