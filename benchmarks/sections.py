"""What is measured: each section yields cells, each cell compares ours with the others on one task."""

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from measure import Timing, in_turn, of_process, ratio
from peers import forward_passes, logits_of, missing, random_model, torch_models
from PIL import Image
from transformers import ViTForImageClassification, ViTImageProcessor

from hf_vit import HfViTForImageClassification, HfViTImageProcessor
from hf_vit.checkpoints import convert_jax_checkpoint, write_jax_checkpoint
from hf_vit.data import read_pixels
from hf_vit.export import export_transformers


TOLERANCE = 1e-4  # of the largest logit, in float32


@dataclass
class Cell:
    """One task, done by ours and by others.

    Attributes:
        task: What, with its settings.
        times: By contender; the first is ours.
        errors: Largest difference of the outputs from the plain float32 model's, over their largest value.
        memory: Peak in MB, where measured.
    """

    section: str
    task: str
    times: dict[str, Timing]
    errors: dict[str, float] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)

    def gain(self, other: str, ours: str | None = None) -> float:
        """How many times faster ours is."""
        return ratio(self.times[other], self.times[ours or next(iter(self.times))])

    def line(self) -> str:
        parts = []
        for name, timing in self.times.items():
            error = f" err {self.errors[name]:.0e}" if name in self.errors else ""
            memory = f" {self.memory[name]:.0f} MB" if name in self.memory else ""
            parts.append(f"{name} {1e3 * timing.median:.1f} ms +-{timing.spread:.0%}{error}{memory}")
        return f"{self.section} | {self.task} | " + " | ".join(parts)

    def as_dict(self) -> dict[str, Any]:
        times = {name: timing.seconds for name, timing in self.times.items()}
        return {**vars(self), "times": times}


# -- inference


def inference(rounds: int, *, full: bool) -> Iterator[Cell]:
    cores = torch.get_num_threads()
    presets = ["ViT-Ti_16", "ViT-S_16", "ViT-B_16", "R50+ViT-B_16"] if full else ["ViT-S_16"]
    for preset in presets:
        model = random_model(preset)
        for threads in sorted({1, cores}) if full else [cores]:
            for precision in ("f32", "bf16", "int8"):
                for batch in (1, 8, 32) if full and preset == "ViT-S_16" else (1, 8):
                    yield forward_cell(model, preset, precision, batch, threads, rounds)
    for size in (384, 512, 768, 1024) if full else (384,):
        yield forward_cell(random_model("ViT-S_16", size), f"ViT-S_16 at {size}", "f32", 1, cores, rounds)


def forward_cell(
    model: HfViTForImageClassification, name: str, precision: str, batch: int, threads: int, rounds: int
) -> Cell:
    """Compare the outputs, then time forward passes; on one thread by CPU time, which other programs don't disturb."""
    cores = torch.get_num_threads()
    torch.set_num_threads(threads)
    size, _ = model.config.image_height_width
    pixels = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(2))
    peers = forward_passes(model, precision, batch)
    expected = logits_of(model)(pixels)
    errors = {peer: float((run(pixels) - expected).abs().max() / expected.abs().max()) for peer, run in peers.items()}
    wrong = [peer for peer, error in errors.items() if precision == "f32" and error > TOLERANCE]
    if wrong:
        raise RuntimeError(f"{name}: the logits of {', '.join(wrong)} are not those of the model: {errors}")
    runs = {peer: lambda run=run: run(pixels) for peer, run in peers.items()}
    times = in_turn(runs, rounds, clock=time.process_time if threads == 1 else time.perf_counter)
    torch.set_num_threads(cores)
    task = f"{name} {precision} batch {batch} threads {threads}"
    return Cell("inference", task, times, errors)


# -- training


def training(rounds: int, *, full: bool) -> Iterator[Cell]:
    cores = torch.get_num_threads()
    for preset in ("ViT-Ti_16", "ViT-S_16", "ViT-B_16") if full else ("ViT-S_16",):
        for precision in ("f32", "bf16 autocast"):
            if precision != "f32" and not (full or torch.cpu._is_avx512_bf16_supported()):
                continue  # takes minutes a step on a processor without bfloat16
            yield train_cell(preset, precision, 16 if full else 8, cores, rounds)


def train_cell(preset: str, precision: str, batch: int, threads: int, rounds: int) -> Cell:
    """Time forward, backward and a step of AdamW; the losses and the gradients of the first step must agree."""
    model = random_model(preset)
    models = {"hf-vit": model, **torch_models(model)}
    pixels = torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(2))
    labels = torch.arange(batch) % 1000
    norms = {}
    steps = {}
    for name, each in models.items():
        each.train()
        optimizer = torch.optim.AdamW(each.parameters(), lr=1e-5, fused=True)
        steps[name] = lambda each=each, optimizer=optimizer: train_step(each, optimizer, pixels, labels, precision)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision != "f32"):
            loss_of(each, pixels, labels).backward()
        norms[name] = float(torch.nn.utils.get_total_norm([p.grad for p in each.parameters() if p.grad is not None]))
        optimizer.zero_grad()
    expected = norms["hf-vit"]
    errors = {name: abs(norm - expected) / expected for name, norm in norms.items()}
    times = in_turn(steps, rounds)
    memory = {name: train_memory(name, preset, precision, batch) for name in models}
    return Cell("training", f"{preset} {precision} batch {batch} threads {threads}", times, errors, memory)


def loss_of(model: torch.nn.Module, pixels: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    outputs = model(pixels)
    return torch.nn.functional.cross_entropy(getattr(outputs, "logits", outputs).float(), labels)


def train_step(model: torch.nn.Module, optimizer: Any, pixels: Any, labels: Any, precision: str) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=precision != "f32"):
        loss = loss_of(model, pixels, labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def train_memory(name: str, preset: str, precision: str, batch: int) -> float:
    """Peak memory in MB of a process that makes two steps with one library, its model alone."""
    code = f"""
import resource, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
from peers import random_model, torch_models
from sections import train_step
model = random_model({preset!r})
if {name!r} != "hf-vit":
    model = torch_models(model)[{name!r}]
optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-5, fused=True)
pixels, labels = torch.randn({batch}, 3, 224, 224), torch.arange({batch})
open("/proc/self/clear_refs", "w").write("5")  # the peak so far is forgotten
for _ in range(2):
    train_step(model, optimizer, pixels, labels, {precision!r})
print("peak", [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")][0])
"""
    return of_process(code).figures["peak"] / 1024


# -- pictures


def pictures(rounds: int, *, full: bool) -> Iterator[Cell]:
    """A folder of JPEGs of 500 x 375 pixels to model inputs, on one core."""
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{i}.jpg" for i in range(16)]
        for path in paths:
            noise = torch.randint(0, 256, (47, 63, 3), dtype=torch.uint8, generator=generator)
            Image.fromarray(noise.numpy()).resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=90)
        stock = ViTImageProcessor(size={"height": 224, "width": 224})

        def by_transformers() -> torch.Tensor:
            opened = [Image.open(path).convert("RGB") for path in paths]
            return stock(opened, return_tensors="pt")["pixel_values"]

        for protocol in ("vit_jax", "transformers", "big_vision", "timm"):
            processor = HfViTImageProcessor(protocol=protocol, size=224)
            called = processor([Image.open(path) for path in paths], return_tensors="pt")["pixel_values"]
            same = by_transformers() if protocol == "transformers" else called
            error = float((ours_of(processor, paths) - same).abs().max())
            runs: dict[str, Callable[[], Any]] = {
                "hf-vit": lambda processor=processor: ours_of(processor, paths),
                "transformers": by_transformers,
                "decoding alone": lambda: [read_pixels(path) for path in paths],
            }
            if protocol == "timm" and "timm" not in missing():
                runs["timm"] = timm_transform(paths, processor)
            times = on_one_thread(runs, 2 * rounds)
            yield Cell("pictures", f"16 JPEGs, protocol {protocol}", times, {"hf-vit": error})


def ours_of(processor: HfViTImageProcessor, paths: list[Path]) -> torch.Tensor:
    return torch.stack([processor.to_pixels(read_pixels(path)) for path in paths])


def timm_transform(paths: list[Path], processor: HfViTImageProcessor) -> Callable[[], torch.Tensor]:
    """Return timm's own way from the files to the numbers of the protocol `timm`."""
    from timm.data import create_transform

    fields: Any = {"crop_pct": processor.crop_pct, "mean": processor.image_mean, "std": processor.image_std}
    transform = create_transform(input_size=(3, 224, 224), interpolation="bicubic", **fields)
    return lambda: torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])


def on_one_thread(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Timing]:
    cores = torch.get_num_threads()
    torch.set_num_threads(1)
    times = in_turn(runs, rounds, clock=time.process_time)
    torch.set_num_threads(cores)
    return times


# -- files


def loading(rounds: int, *, full: bool) -> Iterator[Cell]:
    """A warm file to a model; and to one whose weights have all been read, as the first forward pass reads them."""
    for preset in ("ViT-B_16", "ViT-L_16"):
        with tempfile.TemporaryDirectory() as folder:
            model = random_model(preset)
            with redirect_stderr(StringIO()):  # the progress of writing
                model.save_pretrained(f"{folder}/ours")
                export_transformers(model, f"{folder}/transformers")
            del model
            runs: dict[str, Callable[[], Any]] = {
                "hf-vit": lambda folder=folder: HfViTForImageClassification.from_pretrained(f"{folder}/ours"),
                "transformers": lambda folder=folder: ViTForImageClassification.from_pretrained(
                    f"{folder}/transformers"
                ),
            }
            yield Cell("loading", f"{preset} from a local folder", in_turn(runs, 2 * rounds))
            runs = {name: lambda run=run: read_weights(run()) for name, run in runs.items()}
            yield Cell("loading", f"{preset}, every weight read once", in_turn(runs, 2 * rounds))


def read_weights(model: torch.nn.Module) -> None:
    with torch.inference_mode():
        for parameter in model.parameters():
            parameter.sum()


def conversion(rounds: int, *, full: bool) -> Iterator[Cell]:
    preset = "ViT-L_16" if full else "ViT-B_16"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "model.npz"
        model = random_model(preset)
        write_jax_checkpoint(model.state_dict(), model.config, source)
        del model
        runs: dict[str, Callable[[], Any]] = {
            "hf-vit": lambda: converted(source, Path(folder) / "out"),
            "copy of the file": lambda: shutil.copyfile(source, f"{folder}/copy"),
        }
        times = in_turn(runs, max(3, rounds // 2))
        code = """
import sys, torch, hf_vit.checkpoints
def high(): return int([line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")][0])
before = high()
hf_vit.checkpoints.convert_jax_checkpoint(sys.argv[1], sys.argv[2])
print("peak", high() - before)
"""
        memory = {"hf-vit": of_process(code, str(source), f"{folder}/again").figures["peak"] / 1024}
        yield Cell("conversion", f"{preset} .npz to safetensors", times, memory=memory)


def converted(source: Path, folder: Path) -> None:
    with redirect_stderr(StringIO()):
        convert_jax_checkpoint(source, folder)


def imports(rounds: int, *, full: bool) -> Iterator[Cell]:
    """CPU time of a process that imports the package, or what transformers' ViT needs, or one after the other.

    Whole processes differ by a collection of garbage more or less (0.2 s), wherever it happens to fall.
    """
    stock = "from transformers import ViTForImageClassification, ViTImageProcessor"
    after = f"""
{stock}
import time
before = time.process_time()
import hf_vit
print("seconds", time.process_time() - before)
"""
    times: dict[str, list[float]] = {"hf-vit": [], "transformers": [], "hf-vit after transformers": []}
    for _ in range(rounds):
        times["hf-vit after transformers"].append(of_process(after).figures["seconds"])
        times["hf-vit"].append(of_process("import hf_vit").seconds)
        times["transformers"].append(of_process(stock).seconds)
    yield Cell("import", "a new process", {name: Timing(seconds) for name, seconds in times.items()})


SECTIONS: dict[str, Callable[..., Iterator[Cell]]] = {
    "inference": inference,
    "training": training,
    "pictures": pictures,
    "loading": loading,
    "conversion": conversion,
    "import": imports,
}
