"""Images, datasets and augmentation."""

from hf_vit.data.augmentation import (
    Augment,
    AugmentedImages,
    AugmentedStream,
    BalancedSampler,
    EpochSampler,
    MaskingCollator,
    MixingCollator,
    collate_images,
)
from hf_vit.data.datasets import Splits, load_splits, stratified_split
from hf_vit.data.decoding import default_num_workers, find_bad_images
from hf_vit.data.folders import IMAGE_SUFFIXES
from hf_vit.data.images import ImageError, read_image, read_pixels
from hf_vit.data.labels import class_weights, read_class_weights
from hf_vit.data.sources import list_images
from hf_vit.data.streams import shard_by_rank


__all__ = [
    "IMAGE_SUFFIXES",
    "Augment",
    "AugmentedImages",
    "AugmentedStream",
    "BalancedSampler",
    "EpochSampler",
    "ImageError",
    "MaskingCollator",
    "MixingCollator",
    "Splits",
    "class_weights",
    "collate_images",
    "default_num_workers",
    "find_bad_images",
    "list_images",
    "load_splits",
    "read_class_weights",
    "read_image",
    "read_pixels",
    "shard_by_rank",
    "stratified_split",
]
