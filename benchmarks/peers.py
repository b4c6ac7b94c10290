"""The libraries that ours is measured beside, with the same weights, as functions from pixels to logits.

A library that is not installed is left out and said so.
"""

import importlib.util
import tempfile
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import torch
from transformers import AutoModelForImageClassification

from hf_vit import HfViTConfig, HfViTForImageClassification
from hf_vit.export import export_onnx, export_timm, export_transformers
from hf_vit.inference import prepare


Forward = Callable[[torch.Tensor], torch.Tensor]

# timm's stem computes with these; with them all libraries agree
TIMM_STEM = {"resnet_norm_eps": 1e-5, "resnet_conv_eps": 1e-8, "resnet_conv_eps_in_root": True}
OPTIONAL = ("timm", "onnxruntime", "openvino", "nncf")
CALIBRATION_PICTURES = 16


def missing() -> list[str]:
    """Return which of the optional libraries are not installed."""
    return [name for name in OPTIONAL if importlib.util.find_spec(name) is None]


def random_model(preset: str, image_size: int = 224) -> HfViTForImageClassification:
    """Return a model with random weights and a random head of 1,000 classes."""
    torch.manual_seed(0)
    fields = {"num_labels": 1000, "zero_init_head": False, "image_size": image_size}
    config = HfViTConfig.from_preset(preset, **fields, **(TIMM_STEM if preset.startswith("R") else {}))
    model = HfViTForImageClassification(config).eval()
    with torch.no_grad():  # a gain of zero, as the reference starts with, would leave the stem's branches out
        for name, parameter in model.named_parameters():
            if name.endswith("gn3.weight"):
                parameter.fill_(0.5)
    return model


def torch_models(model: HfViTForImageClassification) -> dict[str, torch.nn.Module]:
    """Return transformers' and timm's model of the same weights, where the library has the architecture."""
    found: dict[str, torch.nn.Module] = {}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), redirect_stderr(StringIO()):
        warnings.simplefilter("ignore")
        if model.config.resnet_layers is None:
            export_transformers(model, f"{folder}/transformers")
            found["transformers"] = AutoModelForImageClassification.from_pretrained(f"{folder}/transformers").eval()
        if "timm" not in missing():
            import timm

            export_timm(model, f"{folder}/timm")
            found["timm"] = timm.create_model(f"local-dir:{folder}/timm", pretrained=True).eval()
    return found


def logits_of(model: torch.nn.Module) -> Forward:
    """Return a function to logits, whatever the library wraps them in."""

    def forward(pixels: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            outputs = model(pixels)
            return getattr(outputs, "logits", outputs)

    return forward


def forward_passes(model: HfViTForImageClassification, precision: str, batch: int) -> dict[str, Forward]:
    """Return every library's forward pass in `precision` (`f32`, `bf16`, `int8`) for batches of `batch`."""
    peers: dict[str, Forward] = {}
    size, _ = model.config.image_height_width
    calibration = calibration_pixels(size)
    others = {} if precision == "int8" else torch_models(model)
    if precision == "f32":
        peers |= {"plain": logits_of(model), "prepared": logits_of(prepare(model, batch_size=batch))}
        peers |= {name: logits_of(other) for name, other in others.items()}
    elif precision == "bf16":
        peers["prepared"] = logits_of(prepare(model, dtype=torch.bfloat16, batch_size=batch))
        peers |= {name: in_bfloat16(other) for name, other in others.items()}
    else:
        peers["prepared"] = logits_of(prepare(model, dtype=torch.int8, batch_size=batch, calibration=[calibration]))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        if {"onnxruntime", "openvino"} - set(missing()):
            export_onnx(model, path)
        if precision == "f32" and "onnxruntime" not in missing():
            peers["onnxruntime"] = onnxruntime_session(path)
        if "openvino" not in missing() and not (precision == "int8" and "nncf" in missing()):
            peers["openvino"] = openvino_model(path, precision, (batch, 3, size, size), calibration)
    return peers


def calibration_pixels(image_size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(CALIBRATION_PICTURES, 3, image_size, image_size, generator=generator)


def in_bfloat16(model: torch.nn.Module) -> Forward:
    forward = logits_of(model.to(torch.bfloat16))
    return lambda pixels: forward(pixels.to(torch.bfloat16)).float()


def onnxruntime_session(path: Path) -> Forward:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda pixels: torch.from_numpy(session.run(None, {"pixel_values": pixels.numpy()})[0])


def openvino_model(path: Path, precision: str, shape: tuple[int, ...], calibration: torch.Tensor) -> Forward:
    import openvino

    core = openvino.Core()
    network = core.read_model(path)
    if precision == "int8":
        import nncf

        dataset = nncf.Dataset([image[None].numpy() for image in calibration])
        with redirect_stdout(StringIO()):  # its progress
            network = nncf.quantize(
                network, dataset, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(calibration)
            )
    network.reshape({0: openvino.PartialShape(list(shape))})
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
    }
    compiled = core.compile_model(network, "CPU", settings)
    return lambda pixels: torch.from_numpy(next(iter(compiled({0: pixels.numpy()}).values())))
