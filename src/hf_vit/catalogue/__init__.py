"""The published checkpoints: names, addresses, checksums, downloads and class names."""

from hf_vit.catalogue.augreg import AugRegName
from hf_vit.catalogue.download import DownloadError, fetch
from hf_vit.catalogue.entries import CatalogueEntry, find, format_catalogue, is_published, read_catalogue, suggest
from hf_vit.catalogue.labels import id2label, wordnet_ids


__all__ = [
    "AugRegName",
    "CatalogueEntry",
    "DownloadError",
    "fetch",
    "find",
    "format_catalogue",
    "id2label",
    "is_published",
    "read_catalogue",
    "suggest",
    "wordnet_ids",
]
