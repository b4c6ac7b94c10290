"""hf-vit: the original Vision Transformer as an ordinary Hugging Face model."""

from importlib.metadata import PackageNotFoundError, version

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForMaskedImageModeling,
)

from .configuration_hf_vit import PRESETS, HfViTConfig
from .image_processing_hf_vit import HfViTImageProcessor, HfViTImageProcessorPil
from .modeling_hf_vit import (
    HfViTBackbone,
    HfViTForImageClassification,
    HfViTForMaskedImageModeling,
    HfViTModel,
    HfViTPreTrainedModel,
)


try:
    __version__ = version("hf-vit")
except PackageNotFoundError:  # a copy of the sources that is not installed
    __version__ = "0+unknown"

# Each class knows its Auto class, so that every saved folder carries the code that opens it.
HfViTConfig.register_for_auto_class()
HfViTModel.register_for_auto_class("AutoModel")
HfViTForImageClassification.register_for_auto_class("AutoModelForImageClassification")
HfViTForMaskedImageModeling.register_for_auto_class("AutoModelForMaskedImageModeling")
HfViTBackbone.register_for_auto_class("AutoBackbone")
HfViTImageProcessor.register_for_auto_class()
HfViTImageProcessorPil.register_for_auto_class()
AutoConfig.register("hf_vit", HfViTConfig, exist_ok=True)
AutoModel.register(HfViTConfig, HfViTModel, exist_ok=True)
AutoModelForImageClassification.register(HfViTConfig, HfViTForImageClassification, exist_ok=True)
AutoModelForMaskedImageModeling.register(HfViTConfig, HfViTForMaskedImageModeling, exist_ok=True)
AutoBackbone.register(HfViTConfig, HfViTBackbone, exist_ok=True)
AutoImageProcessor.register(
    HfViTConfig,
    image_processor_classes={"torchvision": HfViTImageProcessor, "pil": HfViTImageProcessorPil},
    exist_ok=True,
)

__all__ = [
    "PRESETS",
    "HfViTBackbone",
    "HfViTConfig",
    "HfViTForImageClassification",
    "HfViTForMaskedImageModeling",
    "HfViTImageProcessor",
    "HfViTImageProcessorPil",
    "HfViTModel",
    "HfViTPreTrainedModel",
    "__version__",
]
