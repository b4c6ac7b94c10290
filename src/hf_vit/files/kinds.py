"""What a weight file is, decided by its content and not by its name."""

import zipfile
from pathlib import Path

from hf_vit.files.errors import CheckpointError


# First bytes of what is often found in the place of weights -> what it is and what to do.
_OTHERS = (
    (
        b"version https://git-lfs",
        "a Git LFS pointer, not the weights: run `git lfs pull`, or download the file itself",
    ),
    (
        b"<!doctype",
        "a web page (HTML), not weights: download the file itself ('resolve' in place of 'blob' in a link)",
    ),
    (b"<html", "a web page (HTML), not weights: download the file itself ('resolve' in place of 'blob' in a link)"),
    (b"<?xml", "an XML message of a server, not weights: download the file again"),
    (b"\x1f\x8b", "compressed with gzip: unpack it first (gunzip)"),
    (b"bzh", "compressed with bzip2: unpack it first (bunzip2)"),
    (b"\xfd7zxz", "compressed with xz: unpack it first (unxz)"),
    (b"7z\xbc\xaf", "a 7-Zip archive: unpack it first"),
)
_BY_SUFFIX = {".safetensors": "safetensors", ".bin": "torch", ".pth": "torch", ".pt": "torch", ".ckpt": "torch"}


def kind_of(path: Path) -> str:
    """Return `"safetensors"`, `"torch"` (a state dict), `"npz"` or `"msgpack"` (Flax).

    Where the first bytes fit none of these, the suffix says whose reader explains what is wrong.

    Raises:
        CheckpointError: if the file is known to be something else; names it and what to do.
    """
    with path.open("rb") as file:
        head = file.read(512)
        size = file.seek(0, 2)
    start = head.lstrip().lower()
    for signature, meaning in _OTHERS:
        if start.startswith(signature):
            raise CheckpointError(f"{path}: is {meaning}")
    if head[257:262] == b"ustar":
        raise CheckpointError(f"{path}: is a tar archive: unpack it first (tar -xf)")
    if head[:2] == b"PK":
        return _kind_of_zip(path, head)
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "torch"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8:
        return "safetensors"
    if head and (0x81 <= head[0] <= 0x8F or head[0] in (0xDE, 0xDF)):
        return "msgpack"
    return _BY_SUFFIX.get(path.suffix.lower(), "npz")


def is_torch_file(path: Path) -> bool:
    """Whether the file holds tensors of PyTorch code (safetensors or a state dict)."""
    return kind_of(path) in ("safetensors", "torch")


def _kind_of_zip(path: Path, head: bytes) -> str:
    first = head[30 : 30 + int.from_bytes(head[26:28], "little")]
    if first.endswith(b".npy") or head[:4] != b"PK\x03\x04":
        return "npz"
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):  # the last: a newer version of zip
        names = []
    if any(name.endswith("/data.pkl") for name in names):
        return "torch"
    if names and not any(name.endswith(".npy") for name in names):
        raise CheckpointError(f"{path}: is a zip archive that holds {', '.join(names[:3])}: unpack it first")
    return _BY_SUFFIX.get(path.suffix.lower(), "npz") if not names else "npz"
