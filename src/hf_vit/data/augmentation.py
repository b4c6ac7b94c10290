"""Augmentation as a function of (seed, epoch, index): the same whatever the workers, the ranks and the restarts.

Letters: B samples, C channels, H x W pixels of the image, h x w pixels that the model sees, K classes.
"""

import itertools
import logging
import math
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, Sampler
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as vision

from hf_vit.data.decoding import column_cells


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Augment:
    """What happens to a training image, as data; the defaults are the reference's fine-tuning.

    Args:
        crop_area, crop_ratio: smallest and largest share of the image, and width over height, of a random crop that
            is resized to the model's size; `crop_area=None` resizes the whole image. torchvision draws the area
            evenly and the logarithm of the ratio; TensorFlow's distorted box draws the ratio, then the height, evenly.
        flip: probability of a horizontal flip; 0 for digits and text.
        randaugment_ops, randaugment_magnitude: RandAugment's number of operations (0 = none) and strength of 0...30,
            so three times that of papers which count to 10.
        erasing: probability that a random rectangle is replaced by the mean colour.
    Source: vit_jax/input_pipeline.py, get_data: area 0.05...1, ratio 3/4...4/3, flip 0.5, no antialiasing.
    """

    crop_area: tuple[float, float] | None = (0.05, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    randaugment_ops: int = 0
    randaugment_magnitude: int = 9
    erasing: float = 0.0

    def transform(self, processor: Any) -> v2.Compose:
        """The random part and the normalisation of `processor`: uint8 (C, H, W) to float32 (C, h, w)."""
        size = _output_size(processor)
        antialias = bool(getattr(processor, "antialias", True))
        steps: list[torch.nn.Module] = [_Resize(size, antialias=antialias)]
        if self.crop_area is not None:
            steps = [_Crop(self.crop_area, self.crop_ratio, size=size, antialias=antialias)]
        if self.flip:
            steps.append(v2.RandomHorizontalFlip(self.flip))
        if self.randaugment_ops:
            # grey where an image is moved away, as in the papers' implementation
            steps.append(v2.RandAugment(self.randaugment_ops, self.randaugment_magnitude, fill=[0.5]))
        steps.append(_normalization(processor))
        if self.erasing:
            steps.append(v2.RandomErasing(self.erasing))
        return v2.Compose(steps)


class AugmentedImages(Dataset):
    """Rows of a dataset as {"pixel_values": (C, h, w), "labels", "index", "epoch"}, ready for `collate_images`.

    The epoch lies in shared memory, so that workers which live on from epoch to epoch see it change.

    Args:
        dataset: rows with a PIL `image` and, for supervised training, a `label`; as from `load_splits`.
        processor: an image processor; without `augment` the pixels are exactly what it returns.
        augment: the random transforms, whose output depends on (seed, epoch, index) alone.
    """

    def __init__(self, dataset: Any, processor: Any, *, augment: Augment | None = None, seed: int = 0):
        self.dataset = dataset
        self._prepare = _Preparation(processor, augment, seed)
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Call before an epoch's iterator is made; `EpochSampler` does."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._prepare(self.dataset[int(index)], int(index), self.epoch)


class AugmentedStream(IterableDataset):
    """A stream of `load_splits` as `AugmentedImages` gives rows; a sample's `index` is a hash of its image.

    Args:
        stream: already the rank's own part, see `shard_by_rank`; workers divide its shards among themselves.
        repeat: begin the next epoch at the end, for ever, so that ranks of unequal parts never wait for each other.
    """

    def __init__(
        self,
        stream: datasets.IterableDataset,
        processor: Any,
        *,
        augment: Augment | None = None,
        seed: int = 0,
        repeat: bool = False,
    ):
        self.stream = stream
        self.repeat = repeat
        self._prepare = _Preparation(processor, augment, seed)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for epoch in itertools.count():
            self.stream.set_epoch(epoch)
            is_empty = True
            for sample in self.stream:
                is_empty = False
                yield self._prepare(sample, sample["index"], epoch)
            if is_empty or not self.repeat:
                return


class EpochSampler(Sampler[int]):
    """Indices of an epoch in an order drawn from (seed, epoch) alone; the same on all ranks.

    The epoch is the dataset's: order and augmentation cannot disagree, whichever of the two a loop tells the epoch.
    """

    def __init__(self, dataset: AugmentedImages, *, seed: int = 0):
        self.dataset = dataset
        self.seed = seed

    def set_epoch(self, epoch: int) -> None:
        self.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(_derived_seed(self.seed, self.dataset.epoch))
        return iter(torch.randperm(len(self.dataset), generator=generator).tolist())


class BalancedSampler(EpochSampler):
    """Indices of an epoch in which every class comes equally often; drawn from (seed, epoch) alone.

    An epoch is as long as the dataset. Each class gets its share of it, up to one image, and goes through all its
    images before one of them is repeated.

    Args:
        labels: (N,) class indices; those of the dataset if None.
    Raises:
        ValueError: if labels are not single classes.
    """

    def __init__(self, dataset: AugmentedImages, labels: Sequence[int] | None = None, *, seed: int = 0):
        super().__init__(dataset, seed=seed)
        found = np.asarray(column_cells(dataset.dataset, "label") if labels is None else labels, dtype=object)
        if not all(isinstance(label, (int, np.integer)) for label in found.tolist()):
            raise ValueError(
                "balanced sampling needs one class per image: leave it out for multi-label and regression"
            )
        classes = found.astype(np.int64)
        self._rows = [np.flatnonzero(classes == label) for label in np.unique(classes)]

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng(_derived_seed(self.seed, self.dataset.epoch))
        extra = set(generator.permutation(len(self._rows))[: len(self) % len(self._rows)].tolist())
        drawn = []
        for number, rows in enumerate(self._rows):
            count = len(self) // len(self._rows) + (number in extra)
            rounds = [generator.permutation(rows) for _ in range(-(-count // len(rows)))]
            drawn.append(np.concatenate(rounds or [rows])[:count])
        return iter(generator.permutation(np.concatenate(drawn)).tolist())


def collate_images(samples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Stack samples: `pixel_values` (B, C, h, w), `labels` (B,) or (B, K) where there are any, `index` (B,)."""
    batch = {"pixel_values": torch.stack([sample["pixel_values"] for sample in samples])}
    if "labels" in samples[0]:
        batch["labels"] = torch.stack([torch.as_tensor(sample["labels"]) for sample in samples])
    batch["index"] = torch.tensor([sample["index"] for sample in samples])
    return batch


@dataclass(frozen=True)
class MixingCollator:
    """`collate_images` with mixup or cutmix: `labels` become soft, (B, K); drawn by the batch's own samples.

    Args:
        mixup_alpha, cutmix_alpha: of the beta distribution; 0 switches one off, with both on a batch takes either.
        probability: that a batch is mixed at all; labels are soft in any case.
    """

    num_classes: int
    mixup_alpha: float = 0.2
    cutmix_alpha: float = 0.0
    probability: float = 1.0
    seed: int = 0

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = collate_images(samples)
        kinds = [
            kind(alpha=alpha, num_classes=self.num_classes)
            for kind, alpha in ((v2.MixUp, self.mixup_alpha), (v2.CutMix, self.cutmix_alpha))
            if alpha > 0
        ]
        with _seeded(self.seed, *(number for sample in samples for number in (sample["epoch"], sample["index"]))):
            if batch["labels"].ndim == 1:
                batch["labels"] = self._one_hot(batch["labels"])
            if kinds and torch.rand(()) < self.probability:
                mix = kinds[int(torch.randint(len(kinds), ()))]
                batch["pixel_values"], batch["labels"] = mix(batch["pixel_values"], batch["labels"])
        return batch

    def _one_hot(self, labels: torch.Tensor) -> torch.Tensor:
        if labels.is_floating_point():
            raise ValueError("mixup and cutmix mix classes; leave them out for regression")
        return torch.nn.functional.one_hot(labels, self.num_classes).float()


@dataclass(frozen=True)
class MaskingCollator:
    """Images with patches to hide: `pixel_values`, `bool_masked_pos` (B, h*w) true where hidden, `index`.

    An image's mask depends on (seed, epoch, index) alone. Patches are hidden in square blocks.

    Args:
        grid: (h, w) in patches; `block` is how many of them a block is high and wide.
        ratio: share of the blocks that is hidden, rounded up.
    Source: SimMIM, https://arxiv.org/abs/2111.09886, section 3.2: 0.6 of blocks of 32 pixels.
    """

    grid: tuple[int, int]
    block: int = 1
    ratio: float = 0.6
    seed: int = 0

    def __post_init__(self) -> None:
        if self.grid[0] % self.block or self.grid[1] % self.block:
            raise ValueError(f"a grid of {self.grid[0]}x{self.grid[1]} patches has no blocks of {self.block}")
        if not 0 < self.ratio < 1:
            raise ValueError(f"mask ratio is {self.ratio}, expected a number in (0, 1)")

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = collate_images(samples)
        batch.pop("labels", None)
        batch["bool_masked_pos"] = torch.stack([self._mask(sample["epoch"], sample["index"]) for sample in samples])
        return batch

    def _mask(self, epoch: int, index: int) -> torch.Tensor:
        height, width = self.grid[0] // self.block, self.grid[1] // self.block
        with _seeded(self.seed, epoch, index, 1):  # another draw than the image's augmentation
            order = torch.randperm(height * width)
        hidden = (order < math.ceil(self.ratio * height * width)).view(height, width)
        return hidden.repeat_interleave(self.block, 0).repeat_interleave(self.block, 1).flatten()


class _Preparation:
    """One row of a dataset to one sample; what `AugmentedImages` and `AugmentedStream` share."""

    def __init__(self, processor: Any, augment: Augment | None, seed: int):
        self.processor = processor
        self.transform = augment.transform(processor) if augment is not None else None
        self.seed = seed

    def __call__(self, row: dict[str, Any], index: int, epoch: int) -> dict[str, Any]:
        if self.transform is None:
            pixels = self.processor(row["image"], return_tensors="pt")["pixel_values"][0]
        else:
            mode = "L" if getattr(self.processor, "num_channels", 3) == 1 else "RGB"
            with _seeded(self.seed, epoch, index):
                pixels = self.transform(vision.pil_to_tensor(row["image"].convert(mode)))
        sample = {"pixel_values": pixels, "index": index, "epoch": epoch}
        return sample | ({"labels": row["label"]} if "label" in row else {})


class _Resize(torch.nn.Module):
    """The whole image at the model's size, in float32 as `_Crop` does it."""

    def __init__(self, size: tuple[int, int], *, antialias: bool):
        super().__init__()
        self.size, self.antialias = list(size), antialias

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return vision.resize(vision.to_dtype(image, torch.float32, scale=True), self.size, antialias=self.antialias)


class _Crop(v2.RandomResizedCrop):
    """A random crop, resized in float32 as the reference does: rounding to 8 bits would cost up to 4e-3 of -1...1."""

    def __init__(
        self, area: tuple[float, float], ratio: tuple[float, float], *, size: tuple[int, int], antialias: bool
    ):
        super().__init__(size, scale=area, ratio=ratio, antialias=antialias)
        self._resize = _Resize(size, antialias=antialias)

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self._resize(vision.crop(inpt, **params))


def _normalization(processor: Any) -> v2.Normalize:
    """0...1 to what `processor` returns; its rescaling of 0...255 is folded into mean and standard deviation."""
    channels = 1 if getattr(processor, "num_channels", 3) == 1 else 3
    scale = 255 * processor.rescale_factor if processor.do_rescale else 255
    mean = processor.image_mean if processor.do_normalize else [0.0] * channels
    std = processor.image_std if processor.do_normalize else [1.0] * channels
    return v2.Normalize([value / scale for value in mean], [value / scale for value in std])


def _output_size(processor: Any) -> tuple[int, int]:
    """(h, w) that the model sees."""
    size = processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size
    if not size.get("height") or not size.get("width"):
        raise ValueError(f"the processor's size is {dict(size)}, expected height and width: give it a size of both")
    return size["height"], size["width"]


def _derived_seed(*numbers: int) -> int:
    """A seed that differs in all bits when any of the numbers differs."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


@contextmanager
def _seeded(*numbers: int) -> Generator[None]:
    """torch's CPU generator, which torchvision draws from, seeded inside and restored after."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(_derived_seed(*numbers))
    try:
        yield
    finally:
        torch.set_rng_state(state)
