"""One door for every layout: from a checkpoint of any kind to a model, strictly, or to a folder of our own.

`jax_checkpoints` and `torch_checkpoints` understand foreign files; here they become models and folders. Nothing is
left at random: what is missing, left over, mis-shaped, not finite or no floating point is refused, with both lists.
"""

import contextlib
import copy
import functools
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from logging import Filter, LogRecord
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig
from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig
from transformers.utils import logging

from hf_vit.checkpoints.conversion import CONFIG_FIELDS, describe_head, own_fields, own_name, plan_conversion
from hf_vit.checkpoints.foreign import UNFIT, Checkpoint, is_finite, listing, two_lists, updated
from hf_vit.checkpoints.from_jax import local_checkpoint, open_jax_checkpoint
from hf_vit.checkpoints.from_torch import open_torch_checkpoint
from hf_vit.checkpoints.layouts import own_shapes
from hf_vit.configuration_hf_vit import HfViTConfig
from hf_vit.files.atomic import steady_folder
from hf_vit.files.errors import CheckpointError
from hf_vit.files.torch_files import SUFFIXES, find_weights, open_tensors
from hf_vit.hub.verification import verify_download, verify_snapshot
from hf_vit.modeling_hf_vit import (
    HfViTBackbone,
    HfViTForImageClassification,
    HfViTForMaskedImageModeling,
    HfViTModel,
    HfViTPreTrainedModel,
)


logger = logging.get_logger(__name__)

_LABELS = ("num_labels", "id2label", "label2id")
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def load_pretrained(cls: type[HfViTPreTrainedModel], source: str | Path | None, *model_args: Any, **kwargs: Any):
    """What `from_pretrained` of every model does. See `HfViTPreTrainedModel.from_pretrained`."""
    if source is None:  # weights given as state_dict=
        return super(HfViTPreTrainedModel, cls).from_pretrained(None, *model_args, **kwargs)
    if not Path(source).is_dir():
        return _load(cls, source, str(source), *model_args, **kwargs)
    with steady_folder(source) as steady:  # one state of it, even if it is replaced meanwhile
        try:
            loaded: Any = _load(cls, steady, str(source), *model_args, **kwargs)
        except Exception as error:
            steady_name, name = str(steady), str(source)
            error.args = tuple(arg.replace(steady_name, name) if isinstance(arg, str) else arg for arg in error.args)
            raise
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.name_or_path = model.config._name_or_path = str(source)
        return loaded


def _load(cls: type[HfViTPreTrainedModel], source: str | Path, label: str, *model_args: Any, **kwargs: Any):
    try:
        opener = _foreign(cls, source, kwargs)
        if opener is None:
            return _load_own(cls, source, label, *model_args, **kwargs)
        return _load_foreign(cls, opener, label, **kwargs)
    except StrictDataclassError as error:  # of a field that the caller gave; those of files are named below
        raise CheckpointError(f"{label}: {error}") from error


# -- what a source is


Opener = Callable[..., AbstractContextManager[Checkpoint]]


def _foreign(cls: type[HfViTPreTrainedModel], source: str | Path, kwargs: dict[str, Any]) -> Opener | None:
    """What opens a foreign checkpoint; None for our own layout. Takes from `kwargs` what it needs of them."""
    path, preset = Path(source), kwargs.pop("preset", None)
    if path.is_file() and path.suffix in SUFFIXES:
        return functools.partial(_open_torch, cls, [path], None, preset=preset)
    hub = _hub_arguments(kwargs)
    jax = local_checkpoint(source, hub)
    if jax is not None:
        return functools.partial(open_jax_checkpoint, jax)
    stored = _stored_config(source, hub)
    if stored is None:
        weights = find_weights(source, hub)
        if not weights or (path / "adapter_config.json").is_file():
            return None  # transformers follows an adapter to its base, or says what is missing
        return functools.partial(_open_torch, cls, weights, None, preset=preset)
    if preset is not None:
        raise ValueError(f"{source}: has a config.json, so preset={preset!r} has nothing to tell; leave it out")
    kind = stored.get("model_type")
    if kind == "hf_vit":
        return None
    if kind not in ("vit", "deit") and "architecture" not in stored:
        raise CheckpointError(f"{source}: model_type is {kind!r}; expected hf_vit, vit, deit, or timm's config.json")
    weights = find_weights(source, hub)
    if not weights:
        raise CheckpointError(f"{source}: has a config.json but no weights (model.safetensors)")
    if not path.is_dir():
        verify_snapshot(weights[0].parent)
    given = kwargs.get("config")
    if isinstance(given, PreTrainedConfig) and given.model_type == kind:
        stored = {**stored, **kwargs.pop("config").to_dict()}
    return functools.partial(_open_torch, cls, weights, stored)


def _open_torch(
    cls: type[HfViTPreTrainedModel], paths: list[Path], stored: dict[str, Any] | None, **overrides: Any
) -> AbstractContextManager[Checkpoint]:
    if not issubclass(cls, HfViTModel):  # in transformers no head sees what the pooler makes
        overrides.setdefault("representation_size", None)
    return open_torch_checkpoint(paths, stored, **overrides)


def _hub_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: kwargs[name] for name in _HUB_ARGUMENTS if kwargs.get(name) is not None}


def _stored_config(source: str | Path, hub: dict[str, Any]) -> dict[str, Any] | None:
    """The `config.json` of a folder or of a repository on the Hub; None where there is none."""
    local = Path(source) / hub.get("subfolder", "") / "config.json"
    if Path(source).is_dir() and not local.is_file():
        return None
    try:
        stored, _ = PreTrainedConfig.get_config_dict(str(source), **hub)
    except (OSError, RecursionError, ValueError, TypeError, AttributeError) as error:
        if isinstance(error, OSError) and not local.is_file():  # a Hub id
            raise
        raise CheckpointError(f"{source}: config.json is no object of JSON: {error!r}") from error
    if not isinstance(stored, dict):
        raise CheckpointError(f"{source}: config.json is no object of JSON, but a {type(stored).__name__}")
    return stored if stored or local.is_file() else None


# -- foreign layouts


def _load_foreign(cls: type[HfViTPreTrainedModel], opener: Opener, label: str, **kwargs: Any):
    image_size, given = kwargs.pop("image_size", None), kwargs.pop("config", None)
    fields = {name: kwargs.pop(name) for name in list(kwargs) if name in CONFIG_FIELDS}
    for name in (*_HUB_ARGUMENTS, "ignore_mismatched_sizes", "_commit_hash", "use_safetensors", "weights_only"):
        kwargs.pop(name, None)
    if given is not None:
        image_size = given.image_size if image_size is None else image_size
        fields = {**own_fields(given), **fields}
    labels = {name: fields.pop(name) for name in _LABELS if name in fields}
    num_labels = labels.get("num_labels", len(labels["id2label"]) if labels.get("id2label") else None)
    dtype = kwargs.pop("torch_dtype", None) or kwargs.pop("dtype", None) or "auto"
    with opener(**updated(fields, image_size=image_size)) as checkpoint:
        config, plan = plan_conversion(checkpoint, image_size=image_size, num_labels=num_labels)
        if issubclass(cls, HfViTForImageClassification):
            describe_head(config, plan, checkpoint)
        for name in ("id2label", "label2id"):
            if labels.get(name):
                setattr(config, name, labels[name])
        is_wrapped = not issubclass(cls, (HfViTModel, HfViTBackbone))
        used = [entry for entry in plan if _has_place_for(cls, entry.name)]
        unused = [entry.name for entry in plan if not _has_place_for(cls, entry.name)]
        for reason, names in ((f"{cls.__name__} has no place for", unused), ("not read", checkpoint.left_out)):
            if names:
                logger.warning(listing(f"{label}: {reason}", names, "-"))
        state = {own_name(entry.name, wrapped=is_wrapped): entry.read().to(checkpoint.dtype) for entry in used}
        kwargs["dtype"] = checkpoint.dtype if dtype == "auto" else dtype
    model = _load_strictly(cls, None, label, allow_new_head=True, config=config, state_dict=state, **kwargs)
    loaded = model[0] if isinstance(model, tuple) else model
    loaded.name_or_path = loaded.config.name_or_path = label
    return model


# -- our own layout


def _load_own(cls: type[HfViTPreTrainedModel], source: str | Path, label: str, *model_args: Any, **kwargs: Any):
    """A folder or a Hub id in our own layout."""
    hub, wanted, config = _hub_arguments(kwargs), kwargs.pop("image_size", None), kwargs.get("config")
    asked = config is not None or any(name in kwargs for name in ("num_labels", "id2label"))
    asked = asked or kwargs.get("ignore_mismatched_sizes", False)
    left_out: tuple[str, ...] = ()
    stored = _stored_config(source, hub)
    if stored is not None:
        if asked and config is None and _has_other_classes(stored, kwargs):
            kwargs.setdefault("problem_type", None)  # it was said of the head that goes
        if stored.get("representation_size") is not None and kwargs.get("representation_size", 0) is None:
            asked, left_out = True, ("pre_logits.",)  # the head was for what this layer gives
        own = _checked_config(
            source, stored, config, {name: kwargs[name] for name in kwargs if name in CONFIG_FIELDS - {*_LABELS}}
        )
        unchecked = ("gguf_file", "variant", "output_loading_info")
        if not (stored.get("quantization_config") or any(kwargs.get(name) for name in unchecked)):
            _check_headers(cls, source, own, hub, allow_new_head=asked, left_out=left_out)
        if isinstance(config, HfViTConfig) and wanted is None and config.image_size != own.image_size:
            wanted, kwargs["config"] = config.image_size, own
    result = _load_strictly(cls, source, label, *model_args, allow_new_head=asked, left_out=left_out, **kwargs)
    if not Path(source).is_dir():
        verify_download(source, **{name: hub[name] for name in ("cache_dir", "revision", "subfolder") if name in hub})
    if wanted is not None:
        (result[0] if isinstance(result, tuple) else result).resize_position_embeddings(wanted)
    return result


def _has_other_classes(stored: dict[str, Any], kwargs: dict[str, Any]) -> bool:
    count = len(stored.get("id2label") or ()) or stored.get("num_labels")
    return kwargs.get("num_labels", len(kwargs.get("id2label") or ())) not in (0, count)


def _checked_config(
    source: str | Path, stored: dict[str, Any], given: PreTrainedConfig | None, fields: dict[str, Any]
) -> HfViTConfig:
    """The configuration of the weights in a folder of ours, other fields put over it; refused if it is no model's."""
    label = f"{source}: config.json"
    _check_quantization(label, stored.get("quantization_config"))
    try:
        config = HfViTConfig.from_dict(stored)
        origin = (config.checkpoint_layout or {}).get("num_attention_heads") or config.num_attention_heads
    except UNFIT as error:
        raise CheckpointError(f"{label} describes no model: {error}") from error
    if isinstance(given, HfViTConfig):
        image_size, config = config.image_size, copy.deepcopy(given)
        config.image_size = image_size
    elif fields:
        config = HfViTConfig.from_dict(stored, **fields)
        config.validate_architecture()
    if config.num_attention_heads != origin:
        raise CheckpointError(
            f"{label} has {config.num_attention_heads} heads; the weights were read from a checkpoint with {origin}"
        )
    return config


def _check_quantization(label: str, told: Any) -> None:
    """Refuse settings of a quantiser that transformers does not know, or that the quantiser does not take."""
    if told is None:
        return
    try:
        if not isinstance(told, dict) or not AutoHfQuantizer.supports_quant_method(told):
            raise ValueError(f"expected the settings of a quantiser of transformers, got {told!r:.200}")
        AutoQuantizationConfig.from_dict(dict(told))
    except UNFIT as error:
        raise CheckpointError(f"{label} has a quantization_config that is none: {error}") from error


def _check_headers(
    cls: type[HfViTPreTrainedModel],
    source: str | Path,
    config: HfViTConfig,
    hub: dict[str, Any],
    *,
    allow_new_head: bool,
    left_out: tuple[str, ...],
) -> None:
    """Compare the names, shapes and dtypes in the files with those of the model before anything is allocated."""
    paths = find_weights(source, hub)
    if not paths or paths[0].suffix != ".safetensors":
        return  # transformers says what is missing; pickled weights are compared after loading
    with open_tensors(paths) as tensors:
        found = {name.removeprefix("vit."): shape for name, shape in tensors.shapes.items()}
    expected = own_shapes(config, config.num_labels or 0, has_mask_token=True, has_decoder=True)
    needed = {name for name in expected if _has_place_for(cls, name) and not _is_new(name)}
    missing = sorted(needed - set(found))
    extra = sorted(name for name in set(found) - set(expected) if not name.startswith(left_out))
    if not config.num_labels:
        extra = [name for name in extra if not name.startswith("classifier.")]
    bad = [
        f"{name}: file {shape}, model {expected[name]}"
        for name, shape in found.items()
        if name in expected
        and shape != expected[name]
        and _has_place_for(cls, name)
        and not (allow_new_head and _is_new(name))
    ]
    if missing or extra or bad:
        problems = two_lists("its tensors are not those of the model", missing, extra)
        raise CheckpointError(f"{source}: {problems}" + (listing("; mis-shaped", bad, "!") if bad else ""))


# -- transformers' loading, made strict


def _load_strictly(
    cls: type[HfViTPreTrainedModel],
    source,
    label: str,
    *model_args: Any,
    allow_new_head: bool,
    left_out: tuple[str, ...] = (),
    **kwargs: Any,
):
    """transformers' own loading, then a check that nothing is missing, left over, mis-shaped or not finite.

    What begins with one of `left_out` is not wanted from the file.

    Who asks for the lists (`output_loading_info=True`) gets them, and nothing is raised.
    """
    wants_info = kwargs.pop("output_loading_info", False)
    # what follows says what the library's report does, and raises; who lets sizes differ wants to see the report
    reported = contextlib.nullcontext() if kwargs.get("ignore_mismatched_sizes") else _without_load_report()
    kwargs["ignore_mismatched_sizes"] = True  # the head may differ; everything else is refused below
    with reported:
        loaded: Any = super(HfViTPreTrainedModel, cls).from_pretrained(
            source, *model_args, output_loading_info=True, **kwargs
        )
    model, info = loaded
    if wants_info:
        return model, info
    mismatched = [name for name, *_ in info["mismatched_keys"]]
    lost = [name for name in mismatched if not (allow_new_head and _is_new(name))]
    missing = sorted(name for name in info["missing_keys"] if name not in mismatched and not _is_new(name))
    bare = {name: name.removeprefix("vit.") for name in info["unexpected_keys"]}
    extra = sorted(name for name in bare if _has_place_for(cls, bare[name]) and not bare[name].startswith(left_out))
    if missing or extra or lost:
        shapes = [
            f"{name}: file {tuple(theirs)}, model {tuple(ours)}" for name, theirs, ours in info["mismatched_keys"]
        ]
        problems = two_lists("its tensors are not those of the model", missing, extra)
        raise CheckpointError(f"{label}: {problems}" + (listing("; mis-shaped", shapes, "!") if lost else ""))
    _refuse_non_finite(label, model.state_dict())
    unread = sorted(name for name in bare if bare[name].startswith(left_out))
    if unread:
        logger.warning(listing(f"{label}: not read", unread, "-"))
    new = sorted({name for name in [*info["missing_keys"], *mismatched] if _is_new(name)})
    if new:
        logger.warning(listing(f"{label}: made new, because the checkpoint has none that fits", new, "+"))
    return model


def _refuse_non_finite(label: str, tensors: dict[str, torch.Tensor]) -> None:
    bad = [name for name, value in tensors.items() if value.is_floating_point() and not is_finite(value)]
    if bad:
        raise CheckpointError(f"{label}: {listing('tensors with NaN or Inf', bad, '!')}")


@contextlib.contextmanager
def _without_load_report() -> Generator[None]:
    library = logging.get_logger("transformers.modeling_utils")
    report = _LoadReportFilter()
    library.addFilter(report)
    try:
        yield
    finally:
        library.removeFilter(report)


class _LoadReportFilter(Filter):
    def filter(self, record: LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()


def _is_new(name: str) -> bool:
    """Whether a checkpoint may lack this parameter: it belongs to a task, not to the encoder."""
    return name.removeprefix("vit.").startswith(("classifier.", "decoder.", "embeddings.mask_token"))


def _has_place_for(cls: type[HfViTPreTrainedModel], name: str) -> bool:
    masked = HfViTForMaskedImageModeling
    parts = {"classifier.": HfViTForImageClassification, "decoder.": masked, "embeddings.mask_token": masked}
    for part, owner in parts.items():
        if name.startswith(part):
            return issubclass(cls, owner)
    return not (issubclass(cls, HfViTBackbone) and name.startswith(("pooler.", "pre_logits.")))


__all__ = ["load_pretrained"]
