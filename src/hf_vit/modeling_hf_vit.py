"""The Vision Transformer of "An Image is Worth 16x16 Words" (arXiv:2010.11929), as its JAX reference computes it.

Shapes: B images, C channels, H and W pixels, h and w patches in a column and a row, N tokens (h*w patches, after the
class token if there is one), D `hidden_size`, L blocks, K heads of d = D / K, R `representation_size`.

Source: vit_jax/models_vit.py (c6de1e5); big_vision/models/vit.py (0127fb6).
"""

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import StochasticDepth
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BackboneOutput, ImageClassifierOutput, MaskedImageModelingOutput
from transformers.modeling_outputs import BaseModelOutputWithPooling as EncoderOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_hf_vit import HfViTConfig, installed_module
from .patch_embeddings import JoinPatches, check_pixels, embed_patches, masked_difference
from .position_embeddings import positions_of_grid, resize_positions
from .resnetv2 import ResNetV2, initialize_stem, lecun_normal_


logger = logging.get_logger(__name__)


class Embeddings(nn.Module):
    """Images to tokens: [stem], patches (pixels that do not fill one are dropped), [class token], positions."""

    def __init__(self, config: HfViTConfig, *, use_mask_token: bool = False):
        super().__init__()
        self.config = config
        width, patch = config.hidden_size, config.patch_height_width
        self.hybrid_model = None if config.resnet_layers is None else ResNetV2.from_config(config)
        channels = config.num_channels if self.hybrid_model is None else self.hybrid_model.out_channels
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
        patch_size: int | tuple[int, int] | None = None,
    ) -> torch.Tensor:
        check_pixels(pixel_values, self.config, patch_size)
        x = pixel_values.to(self.patch_embeddings.weight.dtype)
        x = x if self.hybrid_model is None else self.hybrid_model(x)
        if patch_size is None:
            x = self.patch_embeddings(x)  # (B, D, h, w)
        else:
            x = embed_patches(x, self.patch_embeddings, self.config.flexible_patch(patch_size))
        grid, x = (x.shape[2], x.shape[3]), x.flatten(2).transpose(1, 2)  # (B, h*w, D)
        if bool_masked_pos is not None:
            if self.mask_token is None:
                raise ValueError("bool_masked_pos needs a model with a mask token (use_mask_token=True)")
            x = torch.where(bool_masked_pos.bool().unsqueeze(-1), self.mask_token.to(x.dtype), x)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)  # (B, N, D)
        positions = positions_of_grid(grid, self.position_embeddings, self.config, x, interpolate_pos_encoding)
        return self.dropout(x + positions)


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
        """Return what the tokens gather from `context` (themselves by default), and on request the probabilities."""
        context = hidden_states if context is None else context
        query = self._split_heads(self.query(hidden_states))  # (B, K, N, d)
        key, value = self._split_heads(self.key(context)), self._split_heads(self.value(context))
        backend, dropout = self.config._attn_implementation, self.attention_dropout if self.training else 0.0
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(backend, eager_attention_forward)
        gathered, probabilities = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )  # (B, N, K, d)
        if probabilities is None and (
            self.config.output_attentions if output_attentions is None else output_attentions
        ):
            _, probabilities = eager_attention_forward(self, query, key, value, attention_mask, self.scaling)
        return self.dropout(self.out(gathered.flatten(2))), probabilities  # (B, N, D)

    def _split_heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, K, N, d), K of this rank


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
    """Return the output (B, N, K, d) and probabilities (B, K, N, N) of attention, for transformers' interface.

    The scores are computed in float32: float16 overflows above 65,504.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    scores = torch.matmul(query.to(dtype), key.to(dtype).transpose(2, 3)) * scaling  # (B, K, N, N)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    probabilities = torch.softmax(scores, dim=-1).to(query.dtype)
    probabilities = F.dropout(probabilities, p=dropout, training=module.training)
    return torch.matmul(probabilities, value).transpose(1, 2), probabilities


class Mlp(nn.Module):
    """Two linear layers with the tanh GELU between them. Source: models_vit.py, MlpBlock."""

    def __init__(self, config: HfViTConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.dropout(self.activation(self.fc1(x)))  # (B, N, intermediate_size)
        return self.dropout(self.fc2(x))  # (B, N, D)


class Block(GradientCheckpointingLayer):
    """One layer: attention, then the MLP, each on normalised tokens and added back. Source: Encoder1DBlock."""

    def __init__(self, config: HfViTConfig, *, drop_path_rate: float = 0.0):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = Attention(config)
        self.ffn_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.ffn = Mlp(config)
        self.drop_path = StochasticDepth(drop_path_rate, mode="row")

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        x = x + self.drop_path(self.attn(self.attention_norm(x), attention_mask, **kwargs)[0])
        return x + self.drop_path(self.ffn(self.ffn_norm(x)))  # (B, N, D)


class Encoder(nn.Module):
    """The L blocks, and the norm after the last one."""

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
    """One learned query attends to all tokens; its output represents the image. Source: big_vision's MAPHead."""

    def __init__(self, config: HfViTConfig):
        super().__init__()
        self.probe = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.attn = Attention(config)
        self.ffn_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.ffn = Mlp(config)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x, _ = self.attn(self.probe.expand(tokens.shape[0], -1, -1), context=tokens)  # (B, 1, D)
        return (x + self.ffn(self.ffn_norm(x)))[:, 0]  # (B, D)


class HfViTPreTrainedModel(PreTrainedModel):
    """What the models share: initialisation, and loading of every layout."""

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
    _input_embed_layer = "patch_embeddings"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise a module after its children, as models_vit.py, models_resnet.py and big_vision's vit.py do."""
        super()._init_weights(module)
        if isinstance(module, Embeddings):
            lecun_normal_(module.patch_embeddings.weight)
            if module.hybrid_model is not None:
                initialize_stem(module.hybrid_model)
            if module.position_embeddings is not None:
                init.normal_(module.position_embeddings, std=self.config.initializer_range)
            for token in (module.cls_token, module.mask_token):
                if token is not None:
                    init.zeros_(token)
        elif isinstance(module, Attention):
            for linear in (module.query, module.key, module.value, module.out):
                init.xavier_uniform_(linear.weight)
        elif isinstance(module, Mlp):
            for linear in (module.fc1, module.fc2):
                init.xavier_uniform_(linear.weight)
                init.normal_(linear.bias, std=1e-6)
        elif isinstance(module, AttentionPooling):
            limit = math.sqrt(6 / (1 + self.config.hidden_size))  # xavier_uniform of one row in and D out
            init.uniform_(module.probe, -limit, limit)
        elif isinstance(module, HfViTModel) and isinstance(module.pre_logits, nn.Linear):
            lecun_normal_(module.pre_logits.weight)
        elif isinstance(module, HfViTForImageClassification) and isinstance(module.classifier, nn.Linear):
            initialize = init.zeros_ if self.config.zero_init_head else partial(init.trunc_normal_, std=0.02)
            initialize(module.classifier.weight)
        elif isinstance(module, HfViTForMaskedImageModeling):
            lecun_normal_(module.decoder[0].weight)  # ty: ignore[invalid-argument-type]

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # in code outside transformers the library skips modules without parameters of their own, such as Attention
        is_own = isinstance(module, (Embeddings, Attention, Mlp, AttentionPooling, HfViTPreTrainedModel))
        super()._initialize_weights(module, is_custom_code and not is_own)

    @classmethod
    def _from_config(cls, config: HfViTConfig, **kwargs: Any):
        # transformers writes a requested dtype and attention backend into the config, which another model may hold
        now = {"dtype": config.dtype, "attn_implementation": config._attn_implementation}
        if any(kwargs.get(name, value) != value for name, value in now.items()):
            config = copy.deepcopy(config)
        return super()._from_config(config, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """Load any layout, see `hf_vit.checkpoints.load_pretrained`; without the package, hf-vit's own layout."""
        loading = installed_module("checkpoints.loading")
        if loading is not None:
            return loading.load_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs)
        image_size = kwargs.pop("image_size", None)
        loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        if image_size is not None:
            (loaded[0] if isinstance(loaded, tuple) else loaded).resize_position_embeddings(image_size)
        return loaded

    def save_pretrained(self, save_directory, is_main_process=True, **kwargs):  # ty: ignore[incompatible-method-override]
        """Save as transformers does; with the package installed, a crash leaves the old model or the new one."""
        saving, write = installed_module("checkpoints.saving"), super().save_pretrained
        if saving is None:
            return write(save_directory, is_main_process=is_main_process, **kwargs)
        return saving.save_whole(self, write, save_directory, is_main_process=is_main_process, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: Any):
        """Push with image processor, code and card in one commit; without the package, as transformers does."""
        hub = installed_module("hub.push")
        return super().push_to_hub(repo_id, **kwargs) if hub is None else hub.push(self, repo_id, **kwargs)

    def resize_position_embeddings(self, image_size: int | tuple[int, int]) -> None:  # ty: ignore[lost-keyword-for-regular-parameter]
        """Resample the position embeddings, in place, to images of `image_size` pixels (at least one patch)."""
        resize_positions(self.base_model.embeddings, self.config.resized(image_size))
        self.config.image_size = image_size


class HfViTModel(HfViTPreTrainedModel):
    """The Vision Transformer without a head; with `use_mask_token`, a learned token may replace masked patches."""

    def __init__(self, config: HfViTConfig, use_mask_token: bool = False):
        super().__init__(config)
        self.embeddings = Embeddings(config, use_mask_token=use_mask_token)
        self.encoder = Encoder(config)
        self.pooler = AttentionPooling(config) if config.pooling == "map" else None
        features = config.representation_size
        self.pre_logits = None if features is None else nn.Linear(config.hidden_size, features)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor,
        bool_masked_pos: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        attention_mask: Any = None,
        patch_size: int | tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> EncoderOutput:
        """Encode images.

        Args:
            pixel_values: (B, C, H, W), normalised as the image processor does.
            bool_masked_pos: (B, h*w), true where the mask token replaces a patch.
            interpolate_pos_encoding: Resample the positions if the images have another grid than the table.
            attention_mask: (B, N), zero for tokens that are not attended to.
            patch_size: Pixels, one number or (height, width), of a model with `flexible_patch_size`.

        Returns:
            `last_hidden_state` (B, N, D) after the last norm, `pooler_output` (B, R or D; (B, N, R or D) with
            `pooling="none"`), and on request `hidden_states` and `attentions` (B, K, N, N) of every block.
        """
        x = self.embeddings(pixel_values, bool_masked_pos, bool(interpolate_pos_encoding), patch_size)
        if attention_mask is not None:
            attention_mask = create_bidirectional_mask(self.config, inputs_embeds=x, attention_mask=attention_mask)
        x = self.encoder(x, attention_mask, **kwargs)
        return EncoderOutput(last_hidden_state=x, pooler_output=self._pool(x))

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

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        attention_mask: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> ImageClassifierOutput:
        """Classify images.

        Args:
            labels: What `config.problem_type` needs, see `HfViTConfig.resolve_problem_type`.
            num_items_in_batch: Label elements in all accumulated batches, as Trainer counts them.
            pixel_values, interpolate_pos_encoding, attention_mask, kwargs: See `HfViTModel.forward`.

        Returns:
            `logits` (B, classes), or (B, N, classes) with `pooling="none"`; `loss` when labels are given.
        """
        outputs = self.vit(pixel_values, None, interpolate_pos_encoding, attention_mask, return_dict=True, **kwargs)
        if outputs.pooler_output.requires_grad:
            initialize_frozen_head(self.classifier)
        logits = self.classifier(outputs.pooler_output)  # (B, classes)
        loss = None if labels is None else classification_loss(labels, logits, self.config, num_items_in_batch)
        return ImageClassifierOutput(loss, logits, outputs.hidden_states, outputs.attentions)


def initialize_frozen_head(head: nn.Module) -> None:
    """Fill a head of zeros that is not trained, as under LoRA: no gradient would pass it. All processes fill alike."""
    is_plain = isinstance(head, nn.Linear) and type(head.weight) is nn.Parameter and not head.weight.is_meta
    if is_plain and type(head.weight.data) is torch.Tensor and not (head.weight.requires_grad or head.weight.any()):
        logger.warning_once("the classifier is all zeros and frozen: initialised with a standard deviation of 0.02")
        init.trunc_normal_(head.weight.data, std=0.02, generator=torch.Generator(head.weight.device).manual_seed(0))


def classification_loss(
    labels: torch.Tensor, logits: torch.Tensor, config: HfViTConfig, num_items: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Return the loss that `config.problem_type` names: the sum, over `num_items` label elements (or this batch's)."""
    problem = config.resolve_problem_type(labels, logits)
    labels, logits = labels.to(logits.device), logits.reshape(-1, logits.shape[-1])
    if problem == "single_label_classification" and labels.numel() == len(logits):  # indices, -100 for none
        labels = labels.long().flatten()
        num_items = labels.ne(-100).sum() if num_items is None else num_items
        return F.cross_entropy(logits, labels, reduction="sum") / num_items
    num_items = labels.numel() if num_items is None else num_items
    labels = labels.to(logits.dtype).view_as(logits)
    if problem == "single_label_classification":  # probabilities: `classes` elements an image
        return F.cross_entropy(logits, labels, reduction="sum") / num_items * logits.shape[-1]
    loss = F.mse_loss if problem == "regression" else F.binary_cross_entropy_with_logits
    return loss(logits, labels, reduction="sum") / num_items


class HfViTForMaskedImageModeling(HfViTPreTrainedModel):
    """The Vision Transformer with a one-layer decoder to pixels, for masked image modelling (SimMIM, 2111.09886)."""

    def __init__(self, config: HfViTConfig):
        super().__init__(config)
        self.vit = HfViTModel(config, use_mask_token=True)
        patch = config.decoder_patch_size
        pixels = nn.Conv2d(config.hidden_size, math.prod(patch) * config.num_channels, kernel_size=1)
        self.decoder = nn.Sequential(pixels, JoinPatches(patch))
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor, bool_masked_pos: torch.Tensor | None = None, **kwargs: Any
    ) -> MaskedImageModelingOutput:
        """Reconstruct images from their visible patches.

        Args:
            bool_masked_pos: (B, h*w), true for the patches to hide and to reconstruct.
            pixel_values, kwargs: See `HfViTModel.forward`.

        Returns:
            `reconstruction` (B, C, h*ph, w*pw); `loss` on the hidden patches, when `bool_masked_pos` is given.
        """
        outputs = self.vit(pixel_values, bool_masked_pos, return_dict=True, **kwargs)
        grid = self.config.grid_of((pixel_values.shape[2], pixel_values.shape[3]))
        patches = outputs.last_hidden_state[:, self.config.num_prefix_tokens :].transpose(1, 2)  # (B, D, h*w)
        reconstruction = self.decoder(patches.unflatten(2, grid))  # (B, C, h*ph, w*pw)
        loss = None
        if bool_masked_pos is not None:
            loss = masked_difference(pixel_values, reconstruction, bool_masked_pos.reshape(-1, 1, *grid))
        return MaskedImageModelingOutput(loss, reconstruction, outputs.hidden_states, outputs.attentions)


class HfViTBackbone(BackboneMixin, HfViTPreTrainedModel):
    """The Vision Transformer as a backbone for images of any size: feature maps of `stem`, `stage1`, ... ."""

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
        patch_size = kwargs.pop("patch_size", None)
        x = self.embeddings(pixel_values, interpolate_pos_encoding=True, patch_size=patch_size)
        grid = self.config.grid_of((pixel_values.shape[2], pixel_values.shape[3]), patch_size)
        maps = []
        for stage, block in zip(self.stage_names, [None, *self.encoder.layer], strict=True):
            x = x if block is None else block(x, **kwargs)
            if stage in self.out_features:
                tokens = self.encoder.encoder_norm(x) if self.config.apply_layernorm else x
                if self.config.reshape_hidden_states:
                    tokens = (
                        tokens[:, self.config.num_prefix_tokens :].transpose(1, 2).unflatten(2, grid)
                    )  # (B, D, h, w)
                maps.append(tokens)
        return BackboneOutput(feature_maps=tuple(maps))


__all__ = [
    "HfViTBackbone",
    "HfViTForImageClassification",
    "HfViTForMaskedImageModeling",
    "HfViTModel",
    "HfViTPreTrainedModel",
]
