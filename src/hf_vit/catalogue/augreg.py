"""The names of AugReg files, which say how each model was trained and fine-tuned.

Source: vision_transformer, README and vit_jax_augreg.ipynb (c6de1e5); "How to train your ViT?", arXiv:2106.10270.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


# the reference's rule for AugReg's model names: the preset without "ViT-", "+" written "_"
_AUGREG_PRESETS = {
    "Ti_16": "ViT-Ti_16",
    "S_16": "ViT-S_16",
    "S_32": "ViT-S_32",
    "B_8": "ViT-B_8",
    "B_16": "ViT-B_16",
    "B_32": "ViT-B_32",
    "L_16": "ViT-L_16",
    "R_Ti_16": "R+ViT-Ti_16",
    "R26_B_32": "R26+ViT-B_32",
    "R26_S_32": "R26+ViT-S_32",
    "R50_L_32": "R50+ViT-L_32",
}
_AUGREG_STEPS = {"0k": 500, "2k": 2500, "10k": 10000, "20k": 20000}
_AUGREG_GRAMMAR = (
    "MODEL-{i1k|i21k}-{E}ep-lr_{LR}-aug_{none|light0|light1|medium1|medium2|strong1|strong2}-wd_{WD}-do_{DO}-sd_{SD}"
    "[--{DATASET}-steps_{0k|2k|10k|20k}-lr_{LR}-res_{RES}][.npz]"
)
_AUGREG_PATTERN = re.compile(
    rf"(?P<model>{'|'.join(_AUGREG_PRESETS)})-(?P<dataset>i1k|i21k|i21k_30)-(?P<epochs>[1-9][0-9]*)ep"
    r"-lr_(?P<learning_rate>[0-9.e-]+?)-aug_(?P<augmentation>none|light0|light1|medium1|medium2|strong1|strong2)"
    r"-wd_(?P<weight_decay>[0-9.e-]+?)-do_(?P<dropout>[0-9.e-]+?)-sd_(?P<stochastic_depth>[0-9.e-]+?)"
    r"(?:--(?P<to_dataset>cifar100|imagenet2012|kitti|oxford_iiit_pet|resisc45)-steps_(?P<steps>0k|2k|10k|20k)"
    r"-lr_(?P<to_learning_rate>[0-9.e-]+?)-res_(?P<resolution>[1-9][0-9]*))?(?:\.npz)?",
    re.ASCII,
)


@dataclass(frozen=True)
class Adaptation:
    """The second half of an AugReg name: how the pre-trained model was fine-tuned.

    `steps` counts optimizer steps: the names' `0k` is 500 and `2k` is 2,500. `resolution` is in pixels.
    """

    dataset: str
    steps: int
    learning_rate: float
    resolution: int

    def __str__(self) -> str:
        steps = next(text for text, steps in _AUGREG_STEPS.items() if steps == self.steps)
        return f"{self.dataset}-steps_{steps}-lr_{self.learning_rate}-res_{self.resolution}"


@dataclass(frozen=True)
class AugRegName:
    """What the name of an AugReg file says; `str()` gives the name back, character by character.

    Source: vision_transformer, README and vit_jax_augreg.ipynb; "How to train your ViT?", arXiv:2106.10270.
    """

    model: str
    dataset: str
    epochs: int
    learning_rate: float
    augmentation: str
    weight_decay: float
    dropout: float
    stochastic_depth: float
    adaptation: Adaptation | None = None

    @classmethod
    def parse(cls, name: str) -> AugRegName:
        """Read a file name, with or without `.npz`, of a pre-trained or of a fine-tuned model.

        Raises:
            ValueError: if the name is not of this grammar, or writes a number as no published file does (`0.10`).
        """
        match = _AUGREG_PATTERN.fullmatch(name)
        if match is None:
            raise ValueError(f"not the name of an AugReg file: expected {_AUGREG_GRAMMAR}, got {name!r}")
        part = match.groupdict()
        numbers = {key: _read_number(part[key], name) for key in ("learning_rate", "weight_decay", "dropout")}
        adaptation = None
        if part["to_dataset"]:
            to_learning_rate = _read_number(part["to_learning_rate"], name)
            adaptation = Adaptation(
                part["to_dataset"], _AUGREG_STEPS[part["steps"]], to_learning_rate, int(part["resolution"])
            )
        return cls(
            model=part["model"],
            dataset=part["dataset"],
            epochs=int(part["epochs"]),
            augmentation=part["augmentation"],
            stochastic_depth=_read_number(part["stochastic_depth"], name),
            adaptation=adaptation,
            **numbers,
        )

    @property
    def filename(self) -> str:
        return f"{self}.npz"

    @property
    def preset(self) -> str:
        """The key of PRESETS: `R26_S_32` is `R26+ViT-S_32`."""
        return _AUGREG_PRESETS[self.model]

    def __str__(self) -> str:
        upstream = (
            f"{self.model}-{self.dataset}-{self.epochs}ep-lr_{self.learning_rate}-aug_{self.augmentation}"
            f"-wd_{self.weight_decay}-do_{self.dropout}-sd_{self.stochastic_depth}"
        )
        return f"{upstream}--{self.adaptation}" if self.adaptation else upstream


def _read_number(text: str, name: str) -> float:
    number = float(text) if re.fullmatch(r"[0-9.]+(e-?[0-9]+)?", text) and text.count(".") < 2 else None
    if number is None or str(number) != text:
        raise ValueError(f"not the name of an AugReg file: expected a number such as 0.03, got {text!r} in {name!r}")
    return number
