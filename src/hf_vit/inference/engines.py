"""What runs an inference form: OpenVINO on a CPU, `torch.compile` with CUDA graphs on another device."""

import threading
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers.utils import logging

from hf_vit.inference.form import InferenceForm


logger = logging.get_logger(__name__)

SMOOTH_QUANT_ALPHA = 0.5  # cosine of the class token 0.9986 on a trained ViT-S/14; NNCF's default gives 0.977


def _library(name: str) -> ModuleType:
    try:
        return __import__(name)
    except ImportError as error:
        raise ImportError(f"prepare needs {name} on a CPU: pip install 'hf-vit[openvino]'") from error


class OpenVinoEngine:
    """A network compiled by OpenVINO for the processor, with as many threads as torch uses.

    Calls from several threads run one after the other. A copy is the same engine.

    Args:
        network: An `openvino.Model` of (pixels, positions).
        dtype: `torch.float32`; `torch.bfloat16`, where the processor has it, also for what int8 leaves.
    """

    device = torch.device("cpu")

    def __init__(self, network: Any, dtype: torch.dtype):
        core = _library("openvino").Core()
        self.network, self._lock = network, threading.Lock()
        settings = {
            "INFERENCE_PRECISION_HINT": "bf16" if dtype == torch.bfloat16 else "f32",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
            "ENABLE_CPU_PINNING": False,  # several processes would be pinned to the same cores
        }
        self._compiled = core.compile_model(network, "CPU", settings)

    def __call__(self, pixels: torch.Tensor, positions: torch.Tensor) -> list[torch.Tensor]:
        inputs = [x.contiguous().numpy() for x in (pixels, positions)]
        with self._lock:
            outputs = self._compiled(inputs, share_inputs=True)
        return [torch.from_numpy(outputs[i]) for i in range(len(outputs))]

    def __deepcopy__(self, memo: dict) -> "OpenVinoEngine":
        return self

    def save(self, path: Path) -> None:
        _library("openvino").save_model(self.network, path, compress_to_fp16=False)

    @classmethod
    def open(cls, path: Path, dtype: torch.dtype) -> "OpenVinoEngine":
        return cls(_library("openvino").Core().read_model(path), supported(dtype))


def supported(dtype: torch.dtype) -> torch.dtype:
    """Return `dtype`, or float32 where OpenVINO finds no bfloat16 instructions, with a warning."""
    capabilities = _library("openvino").Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if dtype == torch.bfloat16 and "BF16" not in capabilities:
        logger.warning("this processor has no bfloat16 instructions: computing in float32, which is faster on it")
        return torch.float32
    return dtype


def to_openvino(form: InferenceForm, pixels: torch.Tensor, positions: torch.Tensor, *, dynamic: bool) -> Any:
    """Return the form as an `openvino.Model` for any number of images, with `dynamic` of any size."""
    openvino, any_size = _library("openvino"), torch.export.Dim.AUTO
    shapes: tuple = ({0: any_size}, {})
    if dynamic:
        shapes = ({0: any_size, 2: any_size, 3: any_size}, {1: any_size})
    with torch.no_grad():
        program = torch.export.export(form, (pixels, positions), dynamic_shapes=shapes)
    network = openvino.convert_model(program)
    height, width = (-1, -1) if dynamic else pixels.shape[2:]
    num_tokens = -1 if dynamic else positions.shape[1]
    network.reshape(
        {
            0: openvino.PartialShape([-1, pixels.shape[1], height, width]),
            1: openvino.PartialShape([1, num_tokens, positions.shape[2]]),
        }
    )
    return network


def quantized(network: Any, calibration: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Any:
    """Return `network` in int8 by NNCF, calibrated on (pixels, positions)."""
    nncf = _library("nncf")
    samples = [{0: pixels.numpy(), 1: positions.numpy()} for pixels, positions in calibration]
    if not samples:
        raise ValueError("calibration is empty: expected batches of pixel_values (B, C, H, W), a few dozen images")
    alphas = nncf.AdvancedSmoothQuantParameters(matmul=SMOOTH_QUANT_ALPHA)
    return nncf.quantize(
        network,
        nncf.Dataset(samples),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(samples),
        advanced_parameters=nncf.AdvancedQuantizationParameters(smooth_quant_alphas=alphas),
    )


class CompiledEngine:
    """A form compiled with CUDA graphs; the next run would overwrite its outputs, so they are copied."""

    def __init__(self, form: InferenceForm):
        self.device, self._dtype = form.model.device, form.dtype
        self._run = torch.compile(form, mode="reduce-overhead")

    def __call__(self, pixels: torch.Tensor, positions: torch.Tensor) -> list[torch.Tensor]:
        torch.compiler.cudagraph_mark_step_begin()
        with torch.no_grad():
            outputs = self._run(pixels.to(self.device), positions.to(self.device, self._dtype))
        return [output.float() if output.dtype == torch.bfloat16 else output.clone() for output in outputs]


Engine = OpenVinoEngine | CompiledEngine


__all__ = ["CompiledEngine", "Engine", "OpenVinoEngine", "quantized", "supported", "to_openvino"]
