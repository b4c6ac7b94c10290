"""The configuration of a Vision Transformer, its validation, and the named models of the papers as presets."""

import copy
import dataclasses
import importlib
import os
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneConfigMixin
from transformers.configuration_utils import PreTrainedConfig


# Each preset is what differs from ViT-B/16 at 224 pixels, the defaults of `HfViTConfig`.
# Source: vit_jax/configs/models.py (c6de1e5); `representation_size` is None in every one of them.
_TINY = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768}
_SMALL = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
_HUGE = {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16, "intermediate_size": 5120}
_DROPOUT = {"hidden_dropout_prob": 0.1}
_GAP = {"pooling": "gap", "use_cls_token": False}

# What opens a repository that carries these files, on a machine without the package.
AUTO_MAP = {
    "AutoConfig": "configuration_hf_vit.HfViTConfig",
    "AutoModel": "modeling_hf_vit.HfViTModel",
    "AutoModelForImageClassification": "modeling_hf_vit.HfViTForImageClassification",
    "AutoModelForMaskedImageModeling": "modeling_hf_vit.HfViTForMaskedImageModeling",
    "AutoBackbone": "modeling_hf_vit.HfViTBackbone",
}
_OWN_CLASSES = tuple(AUTO_MAP.values())

PRESETS: dict[str, dict[str, Any]] = {
    "ViT-Ti_16": {**_TINY},
    "ViT-S_16": {**_SMALL},
    "ViT-S_32": {**_SMALL, "patch_size": 32},
    "ViT-B_8": {"patch_size": 8},
    "ViT-B_16": {},
    "ViT-B_32": {"patch_size": 32},
    "ViT-L_16": {**_LARGE, **_DROPOUT},
    "ViT-L_32": {**_LARGE, "patch_size": 32},
    "ViT-H_14": {**_HUGE, **_DROPOUT, "patch_size": 14},
    "ViT-S_16-gap-norep": {**_SMALL, **_GAP},
    "ViT-S_32-gap-norep": {**_SMALL, **_GAP, "patch_size": 32},
    "ViT-B_16-gap-norep": {**_GAP},
    "ViT-B_32-gap-norep": {**_GAP, "patch_size": 32},
    # The hybrids: `patch_size` counts pixels of the stem's output. R+ViT-Ti_16 sees one token per 32 pixels.
    "R+ViT-Ti_16": {**_TINY, "patch_size": 8, "resnet_layers": []},
    "R26+ViT-S_32": {**_SMALL, "patch_size": 1, "resnet_layers": [2, 2, 2, 2]},
    "R26+ViT-B_32": {"patch_size": 1, "resnet_layers": [2, 2, 2, 2]},
    "R50+ViT-B_16": {**_DROPOUT, "patch_size": 1, "resnet_layers": [3, 4, 9]},
    "R50+ViT-L_32": {**_LARGE, **_DROPOUT, "patch_size": 1, "resnet_layers": [3, 4, 6, 3]},
}

POOLINGS = ("token", "gap", "map", "none")
POSITION_EMBEDDING_TYPES = ("learned", "sincos2d")
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")
POSITION_RESAMPLINGS = ("jax", "jax_corrected", "jax_image", "big_vision", "bicubic", "bicubic_antialias")

_MAX_LAYERS, _MAX_WIDTH, _MAX_TOKENS, _MAX_PARAMETERS = 1_000, 131_072, 2**20, 10**11
_MAX_LABELS = 1_000_000

# Keywords of `from_pretrained` that say where and how to find a file on the Hub.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")

# Keys of a `config.json` beside the fields, where transformers has a property or a method of that name.
_STORED_PROPERTIES = (
    "model_type", "name_or_path", "num_labels", "out_features", "out_indices", "output_attentions", "torch_dtype",
    "_attn_implementation",
)  # fmt: skip
_ATTENTIONS = (None, "eager", "sdpa")
_DTYPES = (None, "float16", "bfloat16", "float32", "float64")
_STORED_CHOICES: dict[str, tuple[Any, ...]] = {
    "dtype": _DTYPES,
    "torch_dtype": _DTYPES,
    "attn_implementation": _ATTENTIONS,
    "_attn_implementation": _ATTENTIONS,
    "experts_implementation": (None,),
    "output_attentions": (None, True, False),
}


@strict
class HfViTConfig(BackboneConfigMixin, PreTrainedConfig):
    """The configuration of a Vision Transformer: everything that determines its outputs beside the weights.

    The defaults are ViT-B/16 at 224 pixels. Letters in brackets are the paper's.

    Args:
        hidden_size: Width of every token (D).
        num_hidden_layers: Number of blocks (L).
        num_attention_heads: Number of heads (k); must divide `hidden_size`.
        intermediate_size: Width inside the MLP of a block.
        hidden_act: Activation of the MLP. The reference uses the tanh approximation of GELU; the exact one
            (`"gelu"`, as in transformers and timm) differs by up to 5e-4 an element.
        hidden_dropout_prob: Dropout after the position embeddings, the attention output, the activation and the MLP.
        attention_probs_dropout_prob: Dropout on the attention probabilities; 0 in every published model.
        drop_path_rate: Stochastic depth of the last block; earlier blocks get a linear share of it.
        layer_norm_eps: Epsilon of every LayerNorm.
        initializer_range: Standard deviation of the position embeddings at initialisation.
        image_size: Pixels, one number or (height, width). Determines the grid of the position embeddings.
        patch_size: Pixels (of the stem's output, if there is a stem), one number or (height, width) (P).
        num_channels: Channels of the images.
        qkv_bias: Whether query, key and value have a bias.
        pooling: What the head sees: `"token"` (the first token), `"gap"` (mean over tokens after the last norm),
            `"map"` (attention pooling of big_vision), `"none"` (every token).
        use_cls_token: Whether a class token is put first. `pooling="token"` without one takes the first patch,
            big_vision's pool type `0`.
        position_embedding_type: `"learned"` or the fixed `"sincos2d"`.
        position_resampling: How the learned table is resized to another grid: `"jax"` (as the reference, its
            edge case included), `"jax_corrected"` (without it), `"big_vision"`, `"bicubic"` (transformers) or
            `"bicubic_antialias"` (timm).
        representation_size: Width of the layer called `pre_logits` (a linear layer and tanh); None if there is none.
        resnet_layers: Units in each stage of the ResNet stem; None without a stem, `[]` for its root alone.
        resnet_width_factor: Width of the stem, in 64ths of the channels of its root.
        resnet_norm_eps: Epsilon of the stem's GroupNorm.
        resnet_conv_eps: Epsilon of the stem's weight standardisation.
        resnet_conv_eps_in_root: Whether that epsilon is added to the variance (timm) or to the deviation (reference).
        zero_init_head: Whether a new classifier starts at zero, as the reference's does.
        apply_layernorm: Whether a backbone puts its feature maps through the last norm.
        reshape_hidden_states: Whether a backbone gives maps (D, h, w) instead of tokens.
        flexible_patch_size: Whether the patch size is chosen at run time (FlexiViT): the forward pass then takes
            `patch_size=` and resizes the stored kernel and positions for each call.
        encoder_stride: Pixels that masked image modelling reconstructs for each token; None for those of a patch.
        checkpoint_layout: The layout of the original checkpoint (dialect, prefix, stacking, dtype), recorded when it
            is read, so that the conversion back gives the same file; None for a model made here.

    Raises:
        ValueError: if a field, or a combination of fields, is not valid.

    Source: vit_jax/models_vit.py, VisionTransformer (c6de1e5); big_vision/models/vit.py, _Model (0127fb6).
    """

    model_type: ClassVar[str] = "hf_vit"
    # Tensor parallelism shards heads and the MLP; the layers that pool and classify are replicated.
    base_model_tp_plan: ClassVar[dict[str, Any] | None] = {
        "encoder.layer.*.attn.query": "colwise",
        "encoder.layer.*.attn.key": "colwise",
        "encoder.layer.*.attn.value": "colwise",
        "encoder.layer.*.attn.out": "rowwise",
        "encoder.layer.*.ffn.fc1": "colwise",
        "encoder.layer.*.ffn.fc2": "rowwise",
    }
    base_model_fsdp_plan: ClassVar[dict[Any, str]] = {
        "embeddings": "free_full_weight",
        "encoder.layer.*": "free_full_weight",
        "encoder.encoder_norm": "keep_full_weight",
    }

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu_pytorch_tanh"
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    drop_path_rate: float | int = 0.0
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int | list[int] | tuple[int, int] = 16
    num_channels: int = 3
    qkv_bias: bool = True
    pooling: str = "token"
    use_cls_token: bool = True
    position_embedding_type: str = "learned"
    position_resampling: str = "jax"
    representation_size: int | None = None
    resnet_layers: list[int] | tuple[int, ...] | None = None
    resnet_width_factor: float | int = 1
    resnet_norm_eps: float = 1e-6
    resnet_conv_eps: float = 1e-5
    resnet_conv_eps_in_root: bool = False
    zero_init_head: bool = True
    apply_layernorm: bool = True
    reshape_hidden_states: bool = True
    flexible_patch_size: bool = False
    encoder_stride: int | None = None
    checkpoint_layout: dict[str, Any] | None = None
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs: Any):
        self.validate_architecture()  # before the stage names count the layers
        if isinstance(kwargs.get("num_labels"), int):  # before each class gets a name
            _in_range("num_labels", kwargs["num_labels"], 0, _MAX_LABELS)
        self.stage_names = ["stem"] + [f"stage{i}" for i in range(1, self.num_hidden_layers + 1)]
        self.set_output_features_output_indices(
            out_indices=kwargs.pop("out_indices", None), out_features=kwargs.pop("out_features", None)
        )
        super().__post_init__(**kwargs)

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "HfViTConfig":
        """Return the configuration of a model of the papers, such as `"ViT-B_16"` or `"R50+ViT-L_32"`.

        Raises:
            ValueError: if `name` is not in `PRESETS`.
        """
        if name not in PRESETS:
            raise ValueError(f"no preset is called {name!r}; expected one of {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **overrides})

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any):
        """Return the configuration that a `config.json` describes; `kwargs` go over what it says.

        Raises:
            ValueError: if it is not a valid configuration. A file cannot replace a method, select attention code
                from the Hub, or select a dtype that is not floating point; the caller's arguments can.
        """
        fields = {*(field.name for field in dataclasses.fields(cls)), *_STORED_PROPERTIES}
        shadows = [name for name in config_dict if name not in fields and hasattr(cls, name)]
        if shadows:
            raise ValueError(f"{shadows[0]} is an attribute of the class, not a field of the configuration: remove it")
        for name, choices in _STORED_CHOICES.items():
            found = config_dict.get(name)
            if isinstance(found, torch.dtype):
                found = str(found).removeprefix("torch.")
            if found not in choices:
                expected = ", ".join(str(choice) for choice in choices if choice is not None) or "nothing"
                raise ValueError(f"{name} is {found!r}: expected {expected}; change it or leave it out")
        return super().from_dict(config_dict, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any):
        """Save as transformers does, with the auto map of all of hf-vit's classes; those of a user stay in it."""
        if self._auto_class is not None:
            known = getattr(self, "auto_map", None) or {}
            others = {auto: name for auto, name in known.items() if not str(name).endswith(_OWN_CLASSES)}
            self.auto_map = AUTO_MAP | others
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    def to_json_file(self, json_file_path: str | os.PathLike[str], use_diff: bool = True) -> None:
        """Write the fields as JSON; with the package installed, atomically."""
        atomic = installed_module("files.atomic")
        if atomic is None:
            return super().to_json_file(json_file_path, use_diff)
        with atomic.atomic_file(json_file_path) as temporary:
            return super().to_json_file(temporary, use_diff)

    @property
    def stem_stride(self) -> int:
        """Image pixels per pixel of the stem's output: 1 without a stem, 4 for a root, doubled by later stages."""
        return stem_stride(self.resnet_layers)

    @property
    def patch_height_width(self) -> tuple[int, int]:
        """`patch_size` as (height, width)."""
        return pair(self.patch_size)

    @property
    def image_height_width(self) -> tuple[int, int]:
        """`image_size` as (height, width)."""
        return pair(self.image_size)

    @property
    def grid_size(self) -> tuple[int, int]:
        """(height, width) in patches of an image of `image_size`."""
        return self.grid_of(self.image_height_width)

    def grid_of(self, image_size: tuple[int, int], patch_size: int | tuple[int, int] | None = None) -> tuple[int, int]:
        """Return (height, width) in patches of an image of (height, width) pixels.

        The stem rounds up at each of its steps (SAME padding); the patches drop what remains (VALID).

        Args:
            patch_size: Of a model with `flexible_patch_size`; the configuration's own by default.
        """
        height, width = (-(-size // self.stem_stride) for size in image_size)
        patch = self.patch_height_width if patch_size is None else self.flexible_patch(patch_size)
        return height // patch[0], width // patch[1]

    def flexible_patch(self, patch_size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
        """Return a patch size chosen at run time as (height, width).

        Raises:
            ValueError: if it is not positive, or the model is not flexible and has another size.
        """
        patch = pair(patch_size)
        if not self.flexible_patch_size and patch != self.patch_height_width:
            raise ValueError(
                f"patch_size is {patch}, but the model has patches of {self.patch_height_width} pixels: load it with "
                f"flexible_patch_size=True, or with patch_size={patch_size}"
            )
        for size in patch:
            _in_range("patch_size", size, 1, _MAX_WIDTH)
        return patch

    @property
    def decoder_patch_size(self) -> tuple[int, int]:
        """(height, width) in pixels of the image that masked image modelling reconstructs for each token."""
        if self.encoder_stride is not None:
            return self.encoder_stride, self.encoder_stride
        height, width = self.patch_height_width
        return height * self.stem_stride, width * self.stem_stride

    def resized(self, image_size: int | tuple[int, int]) -> "HfViTConfig":
        """Return a validated copy for images of another size in pixels.

        Raises:
            ValueError: if `image_size` is smaller than one patch.
        """
        config = copy.deepcopy(self)
        config.image_size = image_size
        config.validate_architecture()
        return config

    def resolve_problem_type(self, labels: torch.Tensor, logits: torch.Tensor) -> str:
        """Return the problem type of a batch; where `problem_type` is None, infer it as transformers does and set it.

        Args:
            labels: Class indices (B,) of any integer dtype or probabilities (B, classes) for single-label
                classification; (B, classes) of any dtype for multi-label classification; values of the shape of the
                logits, or (B,) for one output, for regression.
            logits: (B, classes), or (B, N, classes).

        Raises:
            ValueError: if the labels are of another kind; nothing is set then.
        """
        classes, is_same = logits.shape[-1], labels.shape == logits.shape
        is_integer = not (labels.is_floating_point() or labels.dtype == torch.bool)
        is_index = is_integer and not is_same and labels.numel() * classes == logits.numel()
        problem = self.problem_type
        if problem is None:
            problem = "single_label_classification" if is_integer else "multi_label_classification"
            problem = "regression" if classes == 1 else problem
        fits = {
            "single_label_classification": is_index or (is_same and self.problem_type is not None),
            "multi_label_classification": is_same,
            "regression": is_same or (classes == 1 and labels.numel() == logits.numel()),
        }
        if not fits[problem]:
            indices = f"class indices of shape {tuple(logits.shape[:-1])} or " if problem.startswith("single") else ""
            raise ValueError(
                f"labels are {labels.dtype} of shape {tuple(labels.shape)}: expected for {problem} {indices}values of "
                f"shape {tuple(logits.shape)}; set config.problem_type if these labels mean something else"
            )
        self.problem_type = problem
        return problem

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches: 1 with a class token, else 0."""
        return int(self.use_cls_token)

    def validate_architecture(self) -> None:
        """Raise a ValueError for fields that describe no valid model, before anything is allocated."""
        self._validate_sizes()
        self._validate_rates()
        _one_of("pooling", self.pooling, POOLINGS)
        _one_of("position_embedding_type", self.position_embedding_type, POSITION_EMBEDDING_TYPES)
        _one_of("position_resampling", self.position_resampling, POSITION_RESAMPLINGS)
        if self.problem_type is not None:
            _one_of("problem_type", self.problem_type, PROBLEM_TYPES)
        if self.hidden_act not in ACT2FN:
            raise ValueError(
                f"unknown hidden_act {self.hidden_act!r}: expected a key of transformers' ACT2FN, such as 'gelu'"
            )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of num_attention_heads {self.num_attention_heads}"
            )
        if self.position_embedding_type == "sincos2d" and (self.hidden_size % 4 or self.hidden_size < 8):
            raise ValueError(
                f"sincos2d positions need a hidden_size that is a multiple of 4 and at least 8, got {self.hidden_size}"
            )
        grid = self.grid_size
        if min(grid) < 1:
            raise ValueError(
                f"image_size {pair(self.image_size)} is smaller than one patch of {pair(self.patch_size)} pixels"
                + (f" after a stem of stride {self.stem_stride}" if self.stem_stride > 1 else "")
            )
        if grid[0] * grid[1] > _MAX_TOKENS:
            raise ValueError(f"a grid of {grid[0]}x{grid[1]} patches is above the limit of {_MAX_TOKENS} tokens")
        per_layer = 4 * self.hidden_size**2 + 2 * self.hidden_size * self.intermediate_size
        if per_layer * self.num_hidden_layers > _MAX_PARAMETERS:
            raise ValueError(
                f"{self.num_hidden_layers} blocks of width {self.hidden_size} are about "
                f"{per_layer * self.num_hidden_layers:.1e} parameters, above the limit of {_MAX_PARAMETERS:.0e}"
            )

    def validate_output_attentions(self) -> None:
        """Accept attentions with every backend; in transformers only the eager one returns them."""

    def _validate_sizes(self) -> None:
        _in_range("num_hidden_layers", self.num_hidden_layers, 0, _MAX_LAYERS)
        for name in ("hidden_size", "num_attention_heads", "intermediate_size", "num_channels"):
            _in_range(name, getattr(self, name), 1, _MAX_WIDTH)
        if self.representation_size is not None:
            _in_range("representation_size", self.representation_size, 1, _MAX_WIDTH)
        for name in ("image_size", "patch_size"):
            sizes = getattr(self, name)
            if not isinstance(sizes, int) and len(sizes) != 2:
                raise ValueError(f"{name} must be one number or (height, width), got {sizes}")
            for size in pair(sizes):
                _in_range(name, size, 1, _MAX_WIDTH)
        if self.resnet_layers is not None:
            _in_range("the number of stages in resnet_layers", len(self.resnet_layers), 0, 6)
            for units in self.resnet_layers:
                _in_range("resnet_layers", units, 1, _MAX_LAYERS)
            width = 64 * self.resnet_width_factor
            if not 32 <= width <= _MAX_WIDTH or width % 32:
                raise ValueError(
                    f"resnet_width_factor {self.resnet_width_factor} gives {width:g} channels: expected a multiple of "
                    "the 32 groups of its GroupNorm"
                )

    def _validate_rates(self) -> None:
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"):
            _in_range(name, getattr(self, name), 0, 1)
        for name in ("layer_norm_eps", "resnet_norm_eps", "resnet_conv_eps"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be above 0 and at most 1, got {getattr(self, name)}")
        _in_range("initializer_range", self.initializer_range, 0, 10)


def installed_module(name: str) -> Any:
    """Return a module of the package that this file is a part of, or None in a copy of this file from the Hub.

    A copy never uses an installed package, which may be older or newer and serves its own classes only.
    """
    return importlib.import_module(f"hf_vit.{name}") if __name__ == "hf_vit.configuration_hf_vit" else None


def stem_stride(resnet_layers: list[int] | tuple[int, ...] | None) -> int:
    """Return the pixels of the image per pixel of the stem's output; see `HfViTConfig.stem_stride`."""
    return 1 if resnet_layers is None else 4 * 2 ** max(len(resnet_layers) - 1, 0)


def pair(size: int | list[int] | tuple[int, ...]) -> tuple[int, int]:
    """Return one number or (height, width) as (height, width)."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _in_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} must be from {low} to {high}, got {value}")


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


__all__ = ["PRESETS", "HfViTConfig"]
