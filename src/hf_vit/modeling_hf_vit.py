"""The Vision Transformer of "An Image is Worth 16x16 Words" (arXiv:2010.11929), as its JAX reference computes it.

Shapes: B pictures, C channels, H and W pixels, h and w patches in a column and a row, N tokens (h*w patches, after the
class token if there is one), D `hidden_size`, K heads of d = D / K, R `representation_size`.

Source: vit_jax/models_vit.py (c6de1e5); big_vision/models/vit.py (0127fb6).
"""

import copy
import math
import os
import re
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutputWithPooling,
    ImageClassifierOutput,
    MaskedImageModelingOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_hf_vit import HfViTConfig, installed_module
from .position_embeddings import resample_position_embeddings, sincos2d_position_embeddings
from .resnetv2 import ResNetV2


logger = logging.get_logger(__name__)


class Embeddings(nn.Module):
    """Pictures to tokens: [stem], patches, [class token], positions.

    The patches come from a convolution whose stride is its kernel; what does not fill a patch is dropped.
    """

    def __init__(self, config: HfViTConfig, *, use_mask_token: bool = False):
        super().__init__()
        self.config = config
        width, channels = config.hidden_size, config.num_channels
        self.hybrid_model = None
        if config.resnet_layers is not None:
            self.hybrid_model = ResNetV2(
                channels,
                config.resnet_layers,
                int(64 * config.resnet_width_factor),
                norm_eps=config.resnet_norm_eps,
                eps=config.resnet_conv_eps,
                eps_in_root=config.resnet_conv_eps_in_root,
            )
            channels = self.hybrid_model.out_channels
        patch = config.patch_height_width
        self.patch_embeddings = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if config.use_cls_token else None
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width)) if use_mask_token else None
        self.position_embeddings = None
        if config.position_embedding_type == "learned":
            rows = config.num_prefix_tokens + math.prod(config.grid_size)
            self.position_embeddings = nn.Parameter(torch.zeros(1, rows, width))
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        pixel_values: torch.Tensor,
        bool_masked_pos: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
    ) -> torch.Tensor:
        self._check(pixel_values)
        x = self._patches(pixel_values)  # (B, D, h, w)
        grid = (x.shape[2], x.shape[3])
        x = x.flatten(2).transpose(1, 2)  # (B, h*w, D)
        if bool_masked_pos is not None:
            if self.mask_token is None:
                raise ValueError("bool_masked_pos needs a model with a mask token (use_mask_token=True)")
            x = torch.where(bool_masked_pos.bool().unsqueeze(-1), self.mask_token.to(x.dtype), x)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)  # (B, N, D)
        return self.dropout(x + self._positions(grid, x, interpolate_pos_encoding))

    def _patches(self, pixel_values: torch.Tensor) -> torch.Tensor:
        if not pixel_values.is_floating_point():
            raise ValueError(
                f"pixel_values are {pixel_values.dtype}: expected normalised floats, see the image processor"
            )
        x = pixel_values.to(self.patch_embeddings.weight.dtype)
        return self.patch_embeddings(x if self.hybrid_model is None else self.hybrid_model(x))

    def _positions(self, grid: tuple[int, int], x: torch.Tensor, interpolate: bool) -> torch.Tensor:
        """(1, N, D): the table as it is, or for another grid where that is asked for."""
        config = self.config
        if self.position_embeddings is None:
            table = sincos2d_position_embeddings(grid, config.hidden_size, device=x.device).to(x.dtype)
            return F.pad(table, (0, 0, config.num_prefix_tokens, 0))  # the class token has no position
        if grid == config.grid_size:
            return self.position_embeddings
        if not interpolate:
            raise ValueError(
                f"the picture gives a grid of {grid[0]}x{grid[1]} patches, but the position embeddings are for "
                f"{config.grid_size[0]}x{config.grid_size[1]} (image_size {config.image_size}): pass "
                f"interpolate_pos_encoding=True, or load the model with image_size=(height, width)"
            )
        return resample_position_embeddings(
            self.position_embeddings,
            config.grid_size,
            grid,
            num_prefix_tokens=config.num_prefix_tokens,
            method=config.position_resampling,
        )

    def _check(self, pixel_values: torch.Tensor) -> None:
        channels = self.config.num_channels
        if pixel_values.ndim != 4 or pixel_values.shape[1] != channels:
            raise ValueError(
                f"pixel_values must be (pictures, {channels}, height, width), got {tuple(pixel_values.shape)}"
            )
        if min(self.config.grid_of((pixel_values.shape[2], pixel_values.shape[3]))) < 1:
            raise ValueError(
                f"a picture of {pixel_values.shape[2]}x{pixel_values.shape[3]} pixels is smaller than one patch "
                f"(patch_size {self.config.patch_size}, stride of the stem {self.config.stem_stride})"
            )


class Attention(nn.Module):
    """Multi-head attention: every token gathers the values of the tokens whose keys fit its query (K heads).

    Source: flax.linen.MultiHeadDotProductAttention as models_vit.py uses it; scores are divided by sqrt(d).
    """

    def __init__(self, config: HfViTConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_probs_dropout_prob
        self.is_causal = False
        self.query = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.key = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.value = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        context: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return what each token of `hidden_states` gathers from `context` (itself by default), and the probabilities.

        The probabilities (B, K, N, N) come on request, whatever the backend; asking does not change the output.
        """
        context = hidden_states if context is None else context
        query = self._split_heads(self.query(hidden_states))  # (B, K, N, d)
        key, value = self._split_heads(self.key(context)), self._split_heads(self.value(context))
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.attention_dropout if self.training else 0.0
        gathered, probabilities = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )  # (B, N, K, d)
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if probabilities is None and output_attentions:
            probabilities = attention_probabilities(query, key, attention_mask, self.scaling)
        gathered = gathered.reshape(*hidden_states.shape[:-1], -1)  # (B, N, D)
        return self.dropout(self.out(gathered)), probabilities

    def _split_heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(*x.shape[:-1], -1, self.head_dim).transpose(1, 2)  # (B, K, N, d), K of this rank


def attention_probabilities(
    query: torch.Tensor, key: torch.Tensor, attention_mask: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """Return softmax(q k^T * scaling) (B, K, N, N), computed in float32: float16 ends at 65,504, as no kernel does."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    scores = torch.matmul(query.to(dtype), key.to(dtype).transpose(2, 3)) * scaling  # (B, K, N, N)
    if isinstance(attention_mask, torch.Tensor):
        if attention_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
        else:
            scores = scores + attention_mask
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out, as transformers' attention interface wants it: output (B, N, K, d), probabilities."""
    probabilities = attention_probabilities(query, key, attention_mask, scaling)
    probabilities = F.dropout(probabilities, p=dropout, training=module.training)
    return torch.matmul(probabilities, value).transpose(1, 2), probabilities


class Mlp(nn.Module):
    """Two linear layers with the tanh GELU between them.

    Source: models_vit.py, MlpBlock.
    """

    def __init__(self, config: HfViTConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.activation(self.fc1(x))  # (B, N, intermediate_size)
        return self.dropout(self.fc2(self.dropout(x)))  # (B, N, D)


class DropPath(nn.Module):
    """Drop a whole branch of a picture with probability `rate` while training (stochastic depth)."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.rate == 0:
            return x
        if self.rate == 1:
            return torch.zeros_like(x)
        kept = torch.rand(x.shape[0], 1, 1, device=x.device) >= self.rate  # (B, 1, 1)
        return x * kept.to(x.dtype) / (1 - self.rate)


class Block(GradientCheckpointingLayer):
    """One layer of the encoder: attention, then the MLP, each on normalised tokens and added back.

    Source: models_vit.py, Encoder1DBlock.
    """

    def __init__(self, config: HfViTConfig, *, drop_path_rate: float = 0.0):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = Attention(config)
        self.ffn_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.ffn = Mlp(config)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        x = x + self.drop_path(self.attn(self.attention_norm(x), attention_mask, **kwargs)[0])
        return x + self.drop_path(self.ffn(self.ffn_norm(x)))  # (B, N, D)


class Encoder(nn.Module):
    """The blocks, and the norm after the last one (L blocks)."""

    def __init__(self, config: HfViTConfig):
        super().__init__()
        last = max(config.num_hidden_layers - 1, 1)
        rates = [config.drop_path_rate * i / last for i in range(config.num_hidden_layers)]
        self.layer = nn.ModuleList(Block(config, drop_path_rate=rate) for rate in rates)
        self.encoder_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        for block in self.layer:
            x = block(x, attention_mask, **kwargs)
        return self.encoder_norm(x)  # (B, N, D)


class AttentionPooling(nn.Module):
    """One learned query looks at all tokens; its answer is the picture's representation.

    Source: big_vision/models/vit.py, MAPHead.
    """

    def __init__(self, config: HfViTConfig):
        super().__init__()
        self.probe = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.attn = Attention(config)
        self.ffn_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.ffn = Mlp(config)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x, _ = self.attn(self.probe.expand(tokens.shape[0], -1, -1), context=tokens)  # (B, 1, D)
        return (x + self.ffn(self.ffn_norm(x)))[:, 0]  # (B, D)


def _uniform_probe(parameter: torch.Tensor) -> None:
    """flax's xavier_uniform on (1, 1, D), which takes 1 row in and D out."""
    limit = math.sqrt(6 / (1 + parameter.shape[-1]))
    init.uniform_(parameter, -limit, limit)


def _lecun_normal(parameter: torch.Tensor) -> None:
    """flax's lecun_normal: variance 1 / fan_in, cut at two deviations (transformers' own is not cut there)."""
    std = parameter[0].numel() ** -0.5 / 0.87962566103423978
    init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std)


# How each parameter starts, by the end of its name; the first match counts. A function of (parameter, config).
# Source: the initialisers of models_vit.py, models_resnet.py and big_vision/models/vit.py.
INITIALIZATION: tuple[tuple[str, Callable[[torch.Tensor, HfViTConfig], Any]], ...] = (
    (r"\b(query|key|value|out|fc1|fc2)\.weight", lambda p, config: init.xavier_uniform_(p)),
    (r"\b(fc1|fc2)\.bias", lambda p, config: init.normal_(p, std=1e-6)),
    (r"\bposition_embeddings", lambda p, config: init.normal_(p, std=config.initializer_range)),
    (r"\bprobe", lambda p, config: _uniform_probe(p)),
    (r"\bgn3\.weight", lambda p, config: init.zeros_(p)),
    (r"(norm|\bgn\w*)\.weight", lambda p, config: init.ones_(p)),
    (
        r"\bclassifier\.weight",
        lambda p, config: init.zeros_(p) if config.zero_init_head else init.trunc_normal_(p, std=0.02),
    ),
    (r"\.weight", lambda p, config: _lecun_normal(p)),  # patches, the stem's convolutions, pre_logits, decoder
    (r"\b(bias|cls_token|mask_token)", lambda p, config: init.zeros_(p)),
)


class HfViTPreTrainedModel(PreTrainedModel):
    """What every model here shares: initialisation, strict loading, and one door for every layout."""

    config: HfViTConfig
    base_model_prefix = "vit"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    supports_gradient_checkpointing = True
    _no_split_modules = ["Embeddings", "Block"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": Block,
        "attentions": OutputRecorder(Attention, index=1, layer_name="encoder.layer"),
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        prefix = next(name for name, candidate in self.named_modules() if candidate is module)
        for name, parameter in module.named_parameters(recurse=False):
            full_name = f"{prefix}.{name}"
            initialize = next((rule for end, rule in INITIALIZATION if re.search(end + "$", full_name)), None)
            if initialize is None:
                return super()._init_weights(module)
            initialize(parameter, self.config)
        return None

    @classmethod
    def _from_config(cls, config: HfViTConfig, **kwargs: Any):
        # transformers writes dtype and attention backend into the config; another model may hold the same one
        return super()._from_config(copy.deepcopy(config), **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """Open a checkpoint of any layout: ours, transformers', timm's, the seed's, or an original `.npz` file.

        Args:
            pretrained_model_name_or_path: A Hub id, a folder, or an `.npz` file or fine-tuning `checkpoint_<step>` of
                the JAX code, as a path, `https://` or `gs://`, or a name of the catalogue such as `ViT-B_16`.
            image_size: Pixels, one number or (height, width): resamples the position embeddings if the grid differs.
            num_labels: Asks for a new head if the checkpoint's has another width.
            preset: A name in `PRESETS`, for weights of PyTorch code without a `config.json` (`.safetensors`, `.bin`,
                `.pth`), which do not tell the number of heads.
            kwargs: Any field of `HfViTConfig`, over what the file says; anything that transformers takes. With
                `output_loading_info=True` the lists of what did not fit come back instead of an error.

        Raises:
            ValueError: if a tensor is missing, left over, mis-shaped or not finite.
        """
        checkpoints = installed_module("checkpoints.loading")
        if checkpoints is not None:
            return checkpoints.load_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs)
        if re.search(r"\.(npz|bin|pth|pt)$|^(gs|https?)://", str(pretrained_model_name_or_path)):
            raise ImportError(f"reading {pretrained_model_name_or_path} needs the package: pip install hf-vit")
        return super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)

    def save_pretrained(  # ty: ignore[incompatible-method-override]
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        **kwargs: Any,
    ) -> None:
        """Save as transformers does; with the package installed, the folder is replaced whole or left as it was."""
        saving, write = installed_module("checkpoints.saving"), super().save_pretrained
        is_shared = kwargs.get("distributed_checkpoint") or not self.should_save_on_this_rank(is_main_process)
        if saving is None or is_shared:
            return write(save_directory, is_main_process=is_main_process, **kwargs)
        return saving.save_whole(self, write, save_directory, **kwargs)

    @property
    def _embeddings(self) -> Embeddings:
        embeddings = self.base_model.embeddings
        assert isinstance(embeddings, Embeddings)
        return embeddings

    def push_to_hub(self, repo_id: str, **kwargs: Any):
        """Push with image processor, code and card in one commit; without the package, as transformers does."""
        hub = installed_module("hub.push")
        return super().push_to_hub(repo_id, **kwargs) if hub is None else hub.push(self, repo_id, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        return self._embeddings.patch_embeddings

    def resize_position_embeddings(self, image_size: int | tuple[int, int]) -> None:  # ty: ignore[lost-keyword-for-regular-parameter]
        """Resample the position embeddings, in place, to the grid of pictures of `image_size` pixels.

        Args:
            image_size: One number or (height, width).

        Raises:
            ValueError: if `image_size` holds no patch.
        """
        config = self.config
        resized = copy.deepcopy(config)
        resized.image_size = image_size
        resized.validate_architecture()
        embeddings = self._embeddings
        if embeddings.position_embeddings is not None and resized.grid_size != config.grid_size:
            table = resample_position_embeddings(
                embeddings.position_embeddings.data,
                config.grid_size,
                resized.grid_size,
                num_prefix_tokens=config.num_prefix_tokens,
                method=config.position_resampling,
            )
            embeddings.position_embeddings = nn.Parameter(table, embeddings.position_embeddings.requires_grad)
        config.image_size = image_size


class HfViTModel(HfViTPreTrainedModel):
    """The Vision Transformer without a head: tokens and their pooled representation.

    Args:
        use_mask_token: Whether a learned token may stand for masked patches.
    """

    def __init__(self, config: HfViTConfig, use_mask_token: bool = False):
        super().__init__(config)
        self.embeddings = Embeddings(config, use_mask_token=use_mask_token)
        self.encoder = Encoder(config)
        self.pooler = AttentionPooling(config) if config.pooling == "map" else None
        self.pre_logits = None
        if config.representation_size is not None:
            self.pre_logits = nn.Linear(config.hidden_size, config.representation_size)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor,
        bool_masked_pos: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Encode pictures.

        Args:
            pixel_values: (B, C, H, W), normalised as the image processor does.
            bool_masked_pos: (B, h*w), true where the mask token stands for a patch.
            interpolate_pos_encoding: Resample the positions if the pictures have another grid than the table.
            attention_mask: (B, N), zero for tokens that nobody looks at.

        Returns:
            `last_hidden_state` (B, N, D) after the last norm, `pooler_output` (B, R or D; (B, N, R or D) with
            `pooling="none"`), and on request `hidden_states` and `attentions` (B, K, N, N) of every block.

        Raises:
            ValueError: if the pictures do not fit the model.
        """
        x = self.embeddings(pixel_values, bool_masked_pos, bool(interpolate_pos_encoding))
        if attention_mask is not None:
            attention_mask = create_bidirectional_mask(self.config, inputs_embeds=x, attention_mask=attention_mask)
        x = self.encoder(x, attention_mask, **kwargs)
        return BaseModelOutputWithPooling(last_hidden_state=x, pooler_output=self._pool(x))

    def _pool(self, x: torch.Tensor) -> torch.Tensor:
        if self.config.pooling == "token":
            x = x[:, 0]  # (B, D)
        elif self.config.pooling == "gap":
            x = x[:, self.config.num_prefix_tokens :].mean(dim=1)  # (B, D)
        elif self.pooler is not None:
            x = self.pooler(x)  # (B, D)
        return x if self.pre_logits is None else torch.tanh(self.pre_logits(x))


class HfViTForImageClassification(HfViTPreTrainedModel):
    """The Vision Transformer with a linear classifier on its pooled representation."""

    def __init__(self, config: HfViTConfig):
        super().__init__(config)
        self.num_labels = config.num_labels or 0
        self.vit = HfViTModel(config)
        features = config.representation_size or config.hidden_size
        self.classifier = nn.Linear(features, self.num_labels) if self.num_labels > 0 else nn.Identity()
        self.post_init()

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the classifier, by which transformers' quantisers know that it keeps its precision."""
        return self.classifier if self.num_labels > 0 else None

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.classifier = new_embeddings

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> ImageClassifierOutput:
        """Classify pictures.

        Args:
            pixel_values: (B, C, H, W), normalised as the image processor does.
            labels: Class indices (B,), or soft labels (B, classes) that sum to one, as mixup makes.
            interpolate_pos_encoding: Resample the positions if the pictures have another grid than the table.
            attention_mask: (B, N), zero for tokens that nobody looks at.

        Returns:
            `logits` (B, classes), or (B, N, classes) with `pooling="none"`; `loss` when labels are given.
        """
        outputs = self.vit(
            pixel_values,
            interpolate_pos_encoding=interpolate_pos_encoding,
            attention_mask=attention_mask,
            **kwargs,
        )
        logits = self.classifier(outputs.pooler_output)
        loss = None if labels is None else self._loss(labels, logits, **kwargs)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    def _loss(self, labels: torch.Tensor, logits: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        is_soft = labels.is_floating_point() and labels.shape == logits.shape
        if is_soft and self.config.problem_type in (None, "single_label_classification"):
            # transformers' own loss would take float labels for a multi-label problem, from then on
            loss = F.cross_entropy(logits, labels.to(logits.device, logits.dtype), reduction="sum")
            return loss / kwargs.get("num_items_in_batch", labels.shape[0])
        return self.loss_function(labels, logits, self.config, **kwargs)


class HfViTForMaskedImageModeling(HfViTPreTrainedModel):
    """The Vision Transformer with a one-layer decoder to pixels, for masked image modelling (SimMIM, 2111.09886)."""

    def __init__(self, config: HfViTConfig):
        super().__init__(config)
        self.vit = HfViTModel(config, use_mask_token=True)
        height, width = config.patch_height_width
        self.patch_pixels = (height * config.stem_stride, width * config.stem_stride)  # of the picture
        self.decoder = nn.Sequential(
            nn.Conv2d(config.hidden_size, math.prod(self.patch_pixels) * config.num_channels, kernel_size=1)
        )
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        bool_masked_pos: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> MaskedImageModelingOutput:
        """Reconstruct pictures from their visible patches.

        Args:
            pixel_values: (B, C, H, W).
            bool_masked_pos: (B, h*w), true for the patches to hide and to reconstruct.

        Returns:
            `reconstruction` (B, C, h*ph, w*pw), without what does not fill a patch; `loss`, the mean absolute
            difference on hidden patches, when `bool_masked_pos` is given.
        """
        outputs = self.vit(
            pixel_values,
            bool_masked_pos=bool_masked_pos,
            interpolate_pos_encoding=interpolate_pos_encoding,
            attention_mask=attention_mask,
            **kwargs,
        )
        h, w = self.config.grid_of((pixel_values.shape[2], pixel_values.shape[3]))
        ph, pw = self.patch_pixels
        patches = outputs.last_hidden_state[:, self.config.num_prefix_tokens :].transpose(1, 2)  # (B, D, h*w)
        pixels = self.decoder(patches.unflatten(2, (h, w)))  # (B, C*ph*pw, h, w)
        pixels = pixels.unflatten(1, (-1, ph, pw)).permute(0, 1, 4, 2, 5, 3)  # (B, C, h, ph, w, pw)
        reconstruction = pixels.flatten(2, 3).flatten(3, 4)  # (B, C, h*ph, w*pw)
        loss = None
        if bool_masked_pos is not None:
            mask = bool_masked_pos.reshape(-1, 1, h, w).repeat_interleave(ph, 2).repeat_interleave(pw, 3)
            target = F.pad(pixel_values, (0, w * pw - pixel_values.shape[3], 0, h * ph - pixel_values.shape[2]))
            loss = ((target - reconstruction).abs() * mask).sum() / (mask.sum() + 1e-5) / self.config.num_channels
        return MaskedImageModelingOutput(
            loss=loss,
            reconstruction=reconstruction,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class HfViTBackbone(BackboneMixin, HfViTPreTrainedModel):
    """The Vision Transformer as a backbone: feature maps of chosen stages (`stem`, `stage1`, ... one a block).

    Pictures of any size are taken; the positions are resampled where the grid differs.
    """

    def __init__(self, config: HfViTConfig):
        super().__init__(config)
        self.num_features = [config.hidden_size] * (config.num_hidden_layers + 1)
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.post_init()

    @can_return_tuple
    @filter_output_hidden_states
    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> BackboneOutput:
        """Return `feature_maps` of the stages in `out_features`: (B, D, h, w), or (B, N, D) if not reshaped."""
        x = self.embeddings(pixel_values, interpolate_pos_encoding=True)
        hidden_states = [x]
        for block in self.encoder.layer:
            x = block(x, **kwargs)
            hidden_states.append(x)
        grid = self.config.grid_of((pixel_values.shape[2], pixel_values.shape[3]))
        maps = [
            self._feature_map(tokens, grid)
            for stage, tokens in zip(self.stage_names, hidden_states, strict=True)
            if stage in self.out_features
        ]
        return BackboneOutput(feature_maps=tuple(maps))  # ty: ignore[invalid-argument-type]

    def _feature_map(self, tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        if self.config.apply_layernorm:
            tokens = self.encoder.encoder_norm(tokens)
        if not self.config.reshape_hidden_states:
            return tokens
        return tokens[:, self.config.num_prefix_tokens :].transpose(1, 2).unflatten(2, grid)  # (B, D, h, w)


__all__ = [
    "HfViTBackbone",
    "HfViTForImageClassification",
    "HfViTForMaskedImageModeling",
    "HfViTModel",
    "HfViTPreTrainedModel",
]
