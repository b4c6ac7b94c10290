"""The arguments of `from_pretrained`, read once: what is for the Hub, the configuration, the weights, transformers."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from hf_vit.checkpoints.conversion import CONFIG_FIELDS
from hf_vit.configuration_hf_vit import HUB_ARGUMENTS, HfViTConfig


SIZES = ("image_size", "patch_size", "num_channels")
LABELS = ("num_labels", "id2label", "label2id")
# Arguments of transformers that are also attributes of a configuration, and are not for it.
_NOT_FIELDS = ("dtype", "torch_dtype", "attn_implementation", "experts_implementation", "name_or_path")


@dataclass(frozen=True)
class Request:
    """The arguments of `from_pretrained`, each in one place.

    Attributes:
        label: The source as the caller named it, for messages.
        config: The caller's configuration.
        fields: Fields of the configuration over what the source says, without sizes and labels.
        sizes: `image_size`, `patch_size` and `num_channels`, where given.
        labels: `num_labels` alone, or `id2label` and `label2id`; empty where no classes are requested.
        weights: `use_safetensors` and `variant`, where given.
        reading: `preset` and `weights`, for checkpoints of PyTorch code.
        others: Everything else, for transformers.
    """

    label: str
    hub: dict[str, Any]
    config: PreTrainedConfig | None
    fields: dict[str, Any]
    sizes: dict[str, Any]
    labels: dict[str, Any]
    weights: dict[str, Any]
    reading: dict[str, Any]
    others: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, label: str, kwargs: dict[str, Any]) -> "Request":
        kwargs, config = dict(kwargs), kwargs.get("config")
        if isinstance(config, (str, Path)):
            config = HfViTConfig.from_pretrained(config)
        kwargs.pop("config", None)

        def take(names: Any) -> dict[str, Any]:
            found = {name: kwargs.pop(name) for name in list(kwargs) if name in names}
            return {name: value for name, value in found.items() if value is not None}

        labels = _parse_labels(kwargs)
        fields = {name: kwargs.pop(name) for name in list(kwargs) if _is_field(name) and name not in SIZES}
        return cls(
            label=label,
            hub=take(HUB_ARGUMENTS),
            config=config,
            fields=fields,
            sizes=take(SIZES),
            labels=labels,
            weights=take(("use_safetensors", "variant")),
            reading=take(("preset", "weights")),
            others=kwargs,
        )

    @property
    def num_labels(self) -> int | None:
        """The requested number of classes; None where the checkpoint's are kept."""
        return len(self.labels["id2label"]) if "id2label" in self.labels else self.labels.get("num_labels")

    @property
    def allows_other_sizes(self) -> bool:
        return bool(self.others.get("ignore_mismatched_sizes"))

    def apply_labels(self, config: HfViTConfig) -> None:
        """Give `config` the requested classes; the problem type of a head that goes does not stay."""
        count, old = self.num_labels, config.num_labels or 0
        if count is None:
            return
        if count != old:
            config.num_labels = count
            config.problem_type = self.fields.get("problem_type")
        for name, value in self.labels.items():
            if name != "num_labels":
                setattr(config, name, value)


def _is_field(name: str) -> bool:
    if name in _NOT_FIELDS or name in LABELS:
        return False
    return name in CONFIG_FIELDS or (hasattr(HfViTConfig, name) and not callable(getattr(HfViTConfig, name)))


def _parse_labels(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Take the classes that are requested out of `kwargs`: one rule for every layout.

    Raises:
        ValueError: if the number is negative, or is not that of the names.
    """
    count, names, indices = (kwargs.pop(name, None) for name in LABELS)
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 0):
        raise ValueError(f"num_labels is {count!r}: expected a positive integer, or 0 for a model without a head")
    if names:
        names = {int(index): name for index, name in dict(names).items()}
    elif indices:
        names = {int(index): name for name, index in dict(indices).items()}
    if not names:
        return {} if count is None else {"num_labels": count}
    if sorted(names) != list(range(len(names))) or count not in (None, len(names)):
        raise ValueError(
            f"num_labels is {count} and id2label names the classes {sorted(names)[:5]}...: expected names for the "
            f"classes 0 to {len(names) - 1}, and num_labels={len(names)} or none"
        )
    return {"id2label": names, "label2id": indices or {name: index for index, name in names.items()}}
