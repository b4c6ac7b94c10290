"""`from_pretrained` of the models: decides what a source is, and loads it strictly, whatever its layout.

The arguments become a `Request` once; `from_jax` and `from_torch` read other layouts; transformers builds the model.
"""

import copy
import dataclasses
import functools
import json
import re
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig
from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig
from transformers.utils import is_peft_available, logging
from transformers.utils.peft_utils import find_adapter_config_file

from hf_vit.catalogue.download import DownloadError
from hf_vit.catalogue.entries import find
from hf_vit.checkpoints.conversion import CONFIG_FIELDS, describe_head, own_fields, own_name, plan_conversion
from hf_vit.checkpoints.foreign import UNFIT, Checkpoint, is_finite, listing, two_lists, updated
from hf_vit.checkpoints.from_jax import hub_checkpoint, local_checkpoint, open_jax_checkpoint, refuse_unknown
from hf_vit.checkpoints.from_torch import open_torch_checkpoint
from hf_vit.checkpoints.layouts import Rule, own_shapes
from hf_vit.checkpoints.request import LABELS, SIZES, Request
from hf_vit.configuration_hf_vit import HfViTConfig
from hf_vit.files.errors import CheckpointError
from hf_vit.files.kinds import is_torch_file
from hf_vit.files.torch_files import find_weights, folder_of, open_tensors
from hf_vit.modeling_hf_vit import (
    HfViTBackbone,
    HfViTForImageClassification,
    HfViTForMaskedImageModeling,
    HfViTModel,
    HfViTPreTrainedModel,
)


logger = logging.get_logger(__name__)

Opener = Callable[..., AbstractContextManager[Checkpoint]]

# What a copy of an original checkpoint in another layout computes differently.
_NUMERICS = (
    "hidden_act", "layer_norm_eps", "position_resampling", "resnet_norm_eps", "resnet_conv_eps",
    "resnet_conv_eps_in_root",
)  # fmt: skip
_ENCODER = ("embeddings.", "encoder.", "pooler.", "pre_logits.")
_TASKS = {
    "classifier.": HfViTForImageClassification,
    "decoder.": HfViTForMaskedImageModeling,
    "embeddings.mask_token": HfViTForMaskedImageModeling,
}
_ADAPTED_HEAD = re.compile(r"\bclassifier\.(?!lora_)(\w+\.)*weight$")  # a head that is saved with an adapter
_ATTEMPTS = 100  # to read a folder that another process keeps replacing


def load_pretrained(cls: type[HfViTPreTrainedModel], source: str | Path | None, *model_args: Any, **kwargs: Any):
    """Return a model with the weights of a checkpoint of any layout.

    Args:
        source: A Hub id or folder in hf-vit's layout, transformers' (ViT, DeiT) or timm's, or with a PEFT adapter over
            any of these; an original `.npz` or fine-tuning `checkpoint_<step>` of the JAX code, or a weight file of
            PyTorch code, as a path, `https://` or `gs://` address; a name of the catalogue such as `ViT-B_16`.
        image_size: Pixels, one number or (height, width): resamples the position embeddings if the grid differs.
        patch_size: Pixels: resizes the patch kernel. num_channels: Channels: adapts the first kernel.
        num_labels, id2label, label2id: Request a new head if the checkpoint's has another number of classes; 0 makes
            a classifier without a head.
        preset: A name in `PRESETS`, for weights of PyTorch code without a `config.json`.
        weights: `"model"` or `"ema"`, for training checkpoints that hold both.
        kwargs: Any field of `HfViTConfig`, over what the source says; any argument of transformers' `from_pretrained`,
            with its meaning. With `output_loading_info=True` the lists of keys are returned instead of an error.

    Raises:
        CheckpointError: if a tensor is missing, unexpected, mis-shaped or not finite, or the source is not a
            checkpoint of a Vision Transformer. Parameters of a head, and of layers that a subclass adds, may be
            missing: they are initialised, and transformers reports them.
        FileNotFoundError: if `source` is a path that does not exist.
    """
    if source is None:  # the weights are in state_dict=
        return _transformers(cls)(None, *model_args, **kwargs)
    request = Request.parse(str(source), kwargs)
    source = folder_of(source)
    path = Path(source)
    if path.is_dir() and request.hub.get("subfolder"):
        path = path / request.hub.pop("subfolder")
    if not path.is_dir():
        refuse_unknown(str(source))
        return _load(cls, source, request, *model_args)
    for _ in range(_ATTEMPTS):
        before = _identity(path)
        try:
            loaded = _load(cls, path, request, *model_args)
        except Exception:
            if _identity(path) == before:
                raise
        else:
            if _identity(path) == before:
                return loaded
        time.sleep(0.02)
    raise CheckpointError(f"{source}: was replaced {_ATTEMPTS} times while it was read; load it again")


def _load(cls: type[HfViTPreTrainedModel], source: str | Path, request: Request, *model_args: Any):
    try:
        adapter = _adapter_of(source, request)
        if adapter is not None:
            return _load_adapter(cls, source, adapter, request, *model_args)
        opener = _opener(cls, source, request)
        if opener is None:
            return _load_own(cls, source, request, *model_args)
        return _load_converted(cls, opener, request, *model_args)
    except DownloadError as error:
        return _load_mirror(cls, error, request, *model_args)
    except StrictDataclassError as error:  # of a field that the caller gave; those of files are named below
        raise CheckpointError(f"{request.label}: {error}") from error


def _load_mirror(cls: type[HfViTPreTrainedModel], error: DownloadError, request: Request, *model_args: Any):
    """Open the Hub's copy of a published file that its bucket does not give, with the numerics of the original.

    Copies that lack a part of the weights do not replace the file, nor do those of a FlexiViT, of one patch size.
    """
    entry = find(request.label) if error.mirrors and not constants.HF_HUB_OFFLINE else None
    if entry is None or entry.patch_sizes or request.hub.get("local_files_only"):
        raise error
    original = {name: getattr(HfViTConfig, name) for name in _NUMERICS}
    for mirror in entry.mirrors:
        if mirror.note is not None:
            continue
        copy_of = dataclasses.replace(request, label=mirror.repo, fields={**original, **request.fields})
        try:
            loaded = _load(cls, mirror.repo, copy_of, *model_args)
        except OSError:
            continue
        logger.warning(f"{error}; opened {mirror.repo} instead, with the numerics of the original")
        return loaded
    raise error


def _transformers(cls: type[HfViTPreTrainedModel]) -> Callable[..., Any]:
    return super(HfViTPreTrainedModel, cls).from_pretrained


def _identity(folder: Path) -> list[tuple[Any, ...]]:
    """Return what changes when a folder's files are replaced: their names, inodes, sizes and times."""
    try:
        parts = [(str(folder), folder.stat())] + [(path.name, path.stat()) for path in sorted(folder.iterdir())]
    except OSError:
        return []
    return [(name, stat.st_dev, stat.st_ino) for name, stat in parts[:1]] + [
        (name, stat.st_ino, stat.st_size, stat.st_mtime_ns)
        for name, stat in parts[1:]
        if Path(name).suffix in (".json", ".safetensors", ".bin", ".npz")
    ]


# -- what a source is


def _opener(cls: type[HfViTPreTrainedModel], source: str | Path, request: Request) -> Opener | None:
    """Return what opens a checkpoint that has to be converted; None for transformers' loading of hf-vit's layout."""
    file = local_checkpoint(source, request.hub)
    if file is not None:
        if not is_torch_file(file):
            return functools.partial(open_jax_checkpoint, file)
        return functools.partial(_open_torch, cls, [file], None, **request.reading)
    stored = _stored_config(source, request.hub)
    kind = (stored or {}).get("model_type")
    if stored is not None and kind not in ("hf_vit", "vit", "deit") and "architecture" not in stored:
        raise CheckpointError(f"{source}: model_type is {kind!r}; expected hf_vit, vit, deit, or timm's config.json")
    files = find_weights(source, request.hub, **request.weights)
    if stored is None and files:
        return functools.partial(_open_torch, cls, files, None, **request.reading)
    if stored is None:
        file = None if Path(source).is_dir() else hub_checkpoint(str(source), request.hub)
        return None if file is None else functools.partial(open_jax_checkpoint, file)
    if request.reading.get("preset") is not None:
        raise ValueError(
            f"{source}: has a config.json, which preset={request.reading['preset']!r} cannot change; leave it out"
        )
    if kind == "hf_vit":
        needs_conversion = {"patch_size", "num_channels"} & set(request.sizes) and not request.allows_other_sizes
        return functools.partial(_open_own, files, stored, source) if needs_conversion and files else None
    if not files:
        raise CheckpointError(
            f"{source}: has a config.json but no weights (model.safetensors); {_what_is_there(source)}"
        )
    given = request.config
    if isinstance(given, PreTrainedConfig) and given.model_type == kind:
        stored = {**stored, **given.to_dict()}
    return functools.partial(_open_torch, cls, files, stored, weights=request.reading.get("weights"))


def _what_is_there(source: str | Path) -> str:
    if not Path(source).is_dir():
        return "nothing else in the repository is a weight file"
    names = sorted(path.name for path in Path(source).iterdir() if path.name != "config.json")
    return f"beside it are {', '.join(names[:5])}" if names else "nothing is beside it"


def _open_torch(
    cls: type[HfViTPreTrainedModel], paths: list[Path], stored: dict[str, Any] | None, **overrides: Any
) -> AbstractContextManager[Checkpoint]:
    if not issubclass(cls, HfViTModel):  # in transformers the heads do not see the pooler's output
        overrides.setdefault("representation_size", None)
    return open_torch_checkpoint(paths, stored, **overrides)


@contextmanager
def _open_own(
    paths: list[Path], stored: dict[str, Any], source: str | Path, **overrides: Any
) -> Generator[Checkpoint]:
    """Open hf-vit's own layout as a checkpoint to convert, for another patch size or number of channels."""
    config = _checked_config(source, stored, None, {})
    fields = {name: value for name, value in overrides.items() if name != "image_size"}
    with open_tensors(paths) as tensors:
        bare = {name.removeprefix("vit."): name for name in tensors.shapes}
        shapes = own_shapes(config, config.num_labels or 0)
        rules = [Rule(name, bare[name], "same", shape, shape) for name, shape in shapes.items() if name in bare]
        missing = sorted(name for name in shapes if name not in bare and not name.startswith(tuple(_TASKS)))
        wrong = [rule.ours for rule in rules if tensors.shapes[rule.theirs] != rule.ours_shape]
        if missing or wrong:
            raise CheckpointError(f"{source}: {_problems(missing, [], wrong)}")
        config = HfViTConfig(**(own_fields(config) | fields))
        dtype = next(iter(tensors.dtypes.values()))
        yield Checkpoint(tensors, config, None, rules, [], "classifier.weight" in bare, dtype)


def _stored_config(source: str | Path, hub: dict[str, Any]) -> dict[str, Any] | None:
    """Return the `config.json` of a folder or of a repository on the Hub; None where there is none."""
    local = Path(source) / "config.json"
    if Path(source).is_dir() and not local.is_file():
        return None
    try:
        stored, _ = PreTrainedConfig.get_config_dict(str(source), **hub)
    except (OSError, RecursionError, ValueError, TypeError, AttributeError) as error:
        if isinstance(error, OSError) and not local.is_file():  # a Hub id
            raise
        raise CheckpointError(f"{source}: config.json is not a JSON object: {error!r}") from error
    if not isinstance(stored, dict):
        raise CheckpointError(f"{source}: config.json is not a JSON object, but a {type(stored).__name__}")
    return stored if stored or local.is_file() else None


# -- layouts that have to be converted


def _load_converted(cls: type[HfViTPreTrainedModel], opener: Opener, request: Request, *model_args: Any):
    others, label = dict(request.others), request.label
    if others.get("state_dict") is not None:
        raise ValueError(f"{label}: state_dict= cannot be passed together with a source of weights; pass one of them")
    fields, sizes = dict(request.fields), dict(request.sizes)
    if isinstance(request.config, HfViTConfig):
        given = own_fields(request.config)
        sizes = {name: given.pop(name) for name in SIZES} | sizes
        fields = {name: value for name, value in given.items() if name not in LABELS} | fields
    dtype = others.pop("torch_dtype", None) or others.pop("dtype", None) or "auto"
    for name in ("ignore_mismatched_sizes", "weights_only", "_commit_hash"):
        others.pop(name, None)
    with opener(**updated(fields, image_size=sizes.get("image_size"))) as checkpoint:
        config, plan = plan_conversion(checkpoint, **sizes, num_labels=request.num_labels)
        for name in set(request.fields) - CONFIG_FIELDS:  # of every configuration, such as return_dict
            setattr(config, name, request.fields[name])
        if (config.num_labels or 0) != (checkpoint.config.num_labels or 0):
            config.problem_type = fields.get("problem_type")
        if issubclass(cls, HfViTForImageClassification):
            describe_head(config, plan, checkpoint)
            if not config.num_labels and request.num_labels is None:
                logger.warning(f"{label}: has no head, so the logits are features; pass num_labels= for a new head")
        for name, value in request.labels.items():
            if name != "num_labels":
                setattr(config, name, value)
        used = [entry for entry in plan if _has_place_for(cls, entry.name)]
        unused = [entry.name for entry in plan if not _has_place_for(cls, entry.name)]
        for reason, names in ((f"{cls.__name__} has no place for", unused), ("not read", checkpoint.left_out)):
            if names:
                logger.warning(listing(f"{label}: {reason}", names, "-"))
        is_wrapped = not issubclass(cls, (HfViTModel, HfViTBackbone))
        state = {own_name(entry.name, wrapped=is_wrapped): entry.read().to(checkpoint.dtype) for entry in used}
        others["dtype"] = checkpoint.dtype if dtype == "auto" else dtype
    request = dataclasses.replace(request, others=others)
    return _load_strictly(cls, None, request, *model_args, allows_new_head=True, config=config, state_dict=state)


# -- hf-vit's own layout


def _load_own(cls: type[HfViTPreTrainedModel], source: str | Path, request: Request, *model_args: Any):
    """Load a folder or a Hub id in hf-vit's own layout by transformers, strictly."""
    stored = _stored_config(source, request.hub)
    if stored is None:  # no weights either: transformers says what is missing
        return _transformers(cls)(source, *model_args, config=request.config, **request.hub, **request.others)
    config = _checked_config(source, stored, request.config, request.fields)
    image_size = request.sizes.get("image_size")
    if image_size is None and isinstance(request.config, HfViTConfig):
        image_size = request.config.image_size
    for name in ("patch_size", "num_channels"):  # with ignore_mismatched_sizes: made anew, as in transformers
        if name in request.sizes:
            setattr(config, name, request.sizes[name])
    has_new_head = request.num_labels is not None or isinstance(request.config, HfViTConfig)
    request.apply_labels(config)
    drops_pre_logits = stored.get("representation_size") is not None and config.representation_size is None
    left_out = ("pre_logits.",) if drops_pre_logits else ()
    allows_new_head = has_new_head or drops_pre_logits or request.allows_other_sizes
    is_quantized = stored.get("quantization_config") or request.others.get("gguf_file")
    is_checked = not (is_quantized or request.allows_other_sizes or request.others.get("output_loading_info"))
    if is_checked and request.others.get("state_dict") is None:
        _check_headers(cls, source, config, request, allows_new_head=allows_new_head, left_out=left_out)
    loaded = _load_strictly(
        cls, source, request, *model_args, config=config, allows_new_head=allows_new_head, left_out=left_out
    )
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    if image_size is not None:
        model.resize_position_embeddings(image_size)
    return loaded


def _checked_config(
    source: str | Path, stored: dict[str, Any], given: PreTrainedConfig | None, fields: dict[str, Any]
) -> HfViTConfig:
    """Return the configuration of the weights in a folder, with the caller's fields over it.

    Raises:
        CheckpointError: if `config.json` is not the configuration of a model.
    """
    label = f"{source}: config.json"
    _check_quantization(label, stored.get("quantization_config"))
    try:
        config = HfViTConfig.from_dict(stored)
        origin = (config.checkpoint_layout or {}).get("num_attention_heads") or config.num_attention_heads
    except UNFIT as error:
        raise CheckpointError(f"{label} describes no valid model: {error}") from error
    if isinstance(given, HfViTConfig):
        image_size, config = config.image_size, copy.deepcopy(given)
        config.image_size = image_size
    if fields:
        config = HfViTConfig.from_dict(config.to_dict(), **fields)
        config.validate_architecture()
    if config.num_attention_heads != origin:
        raise CheckpointError(
            f"{label} has {config.num_attention_heads} heads; the weights were read from a checkpoint with {origin}"
        )
    return config


def _check_quantization(label: str, settings: Any) -> None:
    """Refuse settings of a quantiser that transformers does not know, or that the quantiser does not take."""
    if settings is None:
        return
    try:
        if not isinstance(settings, dict) or not AutoHfQuantizer.supports_quant_method(settings):
            raise ValueError(f"expected the settings of a quantiser of transformers, got {settings!r:.200}")
        AutoQuantizationConfig.from_dict(dict(settings))
    except UNFIT as error:
        raise CheckpointError(f"{label} has an invalid quantization_config: {error}") from error


def _check_headers(
    cls: type[HfViTPreTrainedModel],
    source: str | Path,
    config: HfViTConfig,
    request: Request,
    *,
    allows_new_head: bool,
    left_out: tuple[str, ...],
) -> None:
    """Compare the names, shapes and dtypes in the files with those of the model before anything is allocated."""
    paths = find_weights(source, request.hub, **request.weights)
    if not paths or paths[0].suffix != ".safetensors":
        return  # transformers says what is missing; pickled weights are compared after loading
    with open_tensors(paths) as tensors:
        found = {name.removeprefix("vit."): shape for name, shape in tensors.shapes.items()}
        inside = {name.removeprefix("vit.") for name in tensors.shapes if name.startswith(("vit.", *_ENCODER))}
    expected = own_shapes(config, config.num_labels or 0, has_mask_token=True, has_decoder=True)
    missing = sorted(name for name in set(expected) - set(found) if _has_place_for(cls, name) and not _is_task(name))
    extra = sorted(
        name for name in inside - set(expected) if not name.startswith(left_out) and _has_place_for(cls, name)
    )
    wrong = [
        f"{name}: file {shape}, model {expected[name]}"
        for name, shape in found.items()
        if shape != expected.get(name, shape)
        and _has_place_for(cls, name)
        and not (allows_new_head and _is_task(name))
    ]
    if missing or extra or wrong:
        raise CheckpointError(f"{request.label}: {_problems(missing, extra, wrong)}")


# -- transformers' loading, made strict


def _load_strictly(
    cls: type[HfViTPreTrainedModel],
    source: str | Path | None,
    request: Request,
    *model_args: Any,
    allows_new_head: bool,
    left_out: tuple[str, ...] = (),
    **given: Any,
):
    """Load by transformers, then refuse what is missing, unexpected, mis-shaped or not finite in the encoder.

    Args:
        left_out: Prefixes of tensors in the file that are not wanted.
        given: `config`, and `state_dict` where the weights are in memory.
    """
    others, label = dict(request.others), request.label
    wants_info = others.pop("output_loading_info", False)
    others["ignore_mismatched_sizes"] = True  # the head may differ; other differences are refused below
    where = {} if source is None else {**request.hub, **request.weights}
    model, info = _transformers(cls)(source, *model_args, output_loading_info=True, **given, **where, **others)
    model.name_or_path = model.config.name_or_path = label
    if wants_info:
        return model, info
    prefix = f"{cls.base_model_prefix}."
    mismatched = {name.removeprefix(prefix): shapes for name, *shapes in info["mismatched_keys"]}
    missing = {name.removeprefix(prefix) for name in info["missing_keys"]} - set(mismatched)
    extra = {name.removeprefix(prefix) for name in info["unexpected_keys"]}
    missing = sorted(name for name in missing if _is_encoder(name))
    extra = sorted(name for name in extra if _is_encoder(name) and _has_place_for(cls, name))
    extra = [name for name in extra if not name.startswith(left_out)]
    wrong = [
        f"{name}: file {tuple(theirs)}, model {tuple(ours)}"
        for name, (theirs, ours) in mismatched.items()
        if not request.allows_other_sizes and (_is_encoder(name) or not allows_new_head)
    ]
    if missing or extra or wrong:
        raise CheckpointError(f"{label}: {_problems(missing, extra, wrong)}")
    _refuse_non_finite(label, model.state_dict())
    return model


def _problems(missing: list[str], extra: list[str], wrong: list[str]) -> str:
    if not (missing or extra):
        return listing("tensors that are mis-shaped", wrong, "!")
    problems = two_lists("its tensors are not those of the model", missing, extra)
    return problems + (f"; {listing('mis-shaped', wrong, '!')}" if wrong else "")


def _refuse_non_finite(label: str, tensors: dict[str, torch.Tensor]) -> None:
    bad = [name for name, value in tensors.items() if value.is_floating_point() and not is_finite(value)]
    if bad:
        raise CheckpointError(f"{label}: {listing('tensors with NaN or Inf', bad, '!')}")


def _is_task(name: str) -> bool:
    """Whether a parameter belongs to a task, so that a checkpoint may lack it."""
    return name.startswith(tuple(_TASKS))


def _is_encoder(name: str) -> bool:
    return name.startswith(_ENCODER) and not _is_task(name)


def _has_place_for(cls: type[HfViTPreTrainedModel], name: str) -> bool:
    for part, owner in _TASKS.items():
        if name.startswith(part):
            return issubclass(cls, owner)
    return not (issubclass(cls, HfViTBackbone) and name.startswith(("pooler.", "pre_logits.")))


# -- PEFT adapters


def _adapter_of(source: str | Path, request: Request) -> dict[str, Any] | None:
    """Return the `adapter_config.json` of a folder or repository that holds an adapter alone, without its base."""
    if not is_peft_available() or Path(source).is_file() or (Path(source) / "config.json").is_file():
        return None
    if not Path(source).is_dir() and not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        return None
    hub = {name: value for name, value in request.hub.items() if name != "proxies"}
    found = find_adapter_config_file(str(source), **hub)
    if found is None:
        return None
    try:
        config = json.loads(Path(found).read_text(encoding="utf-8"))
        if not isinstance(config["base_model_name_or_path"], str):
            raise TypeError("base_model_name_or_path is not a name")
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{source}: adapter_config.json names no base model: {error!r}") from error
    return {**config, "_folder": str(Path(found).parent)}


def _load_adapter(
    cls: type[HfViTPreTrainedModel], source: str | Path, adapter: dict[str, Any], request: Request, *model_args: Any
):
    """Load the base of an adapter by the same rules as without one, then the adapter.

    Raises:
        CheckpointError: if the base or the adapter lacks a tensor or has one too many.
    """
    from peft import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

    others = dict(request.others)
    wants_info = others.pop("output_loading_info", False)
    folder = Path(adapter["_folder"])
    paths = [folder / name for name in ("adapter_model.safetensors", "adapter_model.bin")]
    weights = next((path for path in paths if path.is_file()), None)
    if weights is None:
        raise CheckpointError(f"{source}: has an adapter_config.json but no adapter_model.safetensors")
    with open_tensors([weights]) as tensors:
        heads = [shape[0] for name, shape in tensors.shapes.items() if _ADAPTED_HEAD.search(name)]
        names = {name.removeprefix("base_model.model.") for name in tensors.shapes}
    arguments = {**request.fields, **request.sizes, **request.labels, **request.reading, **others}
    if heads and issubclass(cls, HfViTForImageClassification) and request.num_labels is None:
        arguments["num_labels"] = heads[0]
    model = load_pretrained(cls, adapter["base_model_name_or_path"], *model_args, **arguments)
    try:
        info = model.load_adapter(str(folder))
        weights = load_peft_weights(str(folder), device="cpu")
        weights = {name.removeprefix("base_model.model."): tensor for name, tensor in weights.items()}
        set_peft_model_state_dict(model, weights)  # transformers leaves out DoRA's magnitudes
    except (RuntimeError, ValueError, KeyError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{source}: the adapter does not fit its base model: {reason}") from error
    adapted = get_peft_model_state_dict(model, save_embedding_layers=False)
    lost = names ^ {name.removeprefix("base_model.model.") for name in adapted}
    if lost and not wants_info:
        raise CheckpointError(f"{source}: {listing('tensors of the adapter that do not fit', sorted(lost), '!')}")
    _refuse_non_finite(str(source), model.state_dict())
    return (model, info.to_dict()) if wants_info else model


__all__ = ["load_pretrained"]
