"""hf-vit: the original Vision Transformer as a first-class Hugging Face model."""

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
]
