"""Mutational fuzzing of the reader of .npz and Flax msgpack files.

    python tests/support/fuzz/fuzz_containers.py --inputs 100000 --seed 0

Each input is a small valid file, mutated: bytes, cuts, copies, joins, tokens that headers are made of; for .npz also
inside a member, under a correct checksum. Two outcomes are allowed: a `CheckpointError`, or arrays that are written
and read again bit for bit. The exit status is 1 if anything else happens (such an input is kept) or one takes over
a second.
"""

import argparse
import io
import random
import struct
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_vit.files.errors import CheckpointError
from hf_vit.files.npz import open_arrays, write_npz


TOKENS = [
    *(
        b"'descr'",
        b"'shape'",
        b"'fortran_order'",
        b"True",
        b"(",
        b")",
        b"{",
        b"}",
        b",",
        b"-1",
        b"99999999999999999999",
    ),
    *(
        b"<f4",
        b">f8",
        b"|V2",
        b"|O",
        b"<c8",
        b"|b1",
        b"<U1",
        b"1.0",
        b"None",
        b"\\",
        b"\x00",
        b"\n",
        b"//",
        b"..",
        b"/",
    ),
    *(
        b"PK\x03\x04",
        b"PK\x01\x02",
        b"PK\x05\x06",
        b"PK\x06\x06",
        b"PK\x06\x07",
        b"\x93NUMPY\x01\x00",
        b"\x93NUMPY\x03\x00",
    ),
    *(
        bytes([byte])
        for byte in (0x80, 0x90, 0xA0, 0xC0, 0xC1, 0xC3, 0xC7, 0xC9, 0xCF, 0xD3, 0xD6, 0xDB, 0xDD, 0xDF, 0xFF)
    ),
    *(struct.pack(layout, number) for layout in ("<I", ">I", "<Q", ">Q") for number in (0, 1, 0x7FFFFFFF, 0xFFFFFFFF)),
    *(b"__msgpack_chunked_array__", b"shape", b"chunks", b"float32", b"bfloat16", b"complex64", b"object"),
]


def pack(value) -> bytes:
    """Encode as msgpack what Flax checkpoints are made of; arrays as (shape, dtype name, bytes) in extension 1."""
    if value is None or isinstance(value, bool):
        return {None: b"\xc0", False: b"\xc2", True: b"\xc3"}[value]
    if isinstance(value, int):
        return b"\xd3" + struct.pack(">q", value)
    if isinstance(value, float):
        return b"\xcb" + struct.pack(">d", value)
    if isinstance(value, str):
        return b"\xd9" + struct.pack(">B", len(value.encode())) + value.encode()
    if isinstance(value, bytes):
        return b"\xc6" + struct.pack(">I", len(value)) + value
    if isinstance(value, tuple):
        return b"\xdc" + struct.pack(">H", len(value)) + b"".join(map(pack, value))
    if isinstance(value, dict):
        entries = (pack(key) + pack(entry) for key, entry in value.items())
        return b"\xdf" + struct.pack(">I", len(value)) + b"".join(entries)
    if isinstance(value, np.generic):
        return pack_extension(3, pack(((), value.dtype.name, value.tobytes())))
    return pack_extension(1, pack((value.shape, value.dtype.name, value.tobytes("C"))))


def pack_extension(code: int, payload: bytes) -> bytes:
    return b"\xc9" + struct.pack(">Ib", len(payload), code) + payload


def make_seeds() -> list[bytes]:
    """Return small valid files of every kind that the reader knows."""
    kernel = np.arange(12, dtype=np.float32).reshape(3, 4)
    groups: list[dict[str, Any]] = [
        {"Transformer/encoderblock_0/kernel": kernel, "cls": kernel[:1]},
        {"half": kernel.astype("<f2"), "double": kernel.astype(">f8"), "fortran": np.asfortranarray(kernel)},
        {"bfloat16": kernel.astype("<f2").view("V2"), "step": np.int64(7), "none": np.zeros((0, 3), np.float32)},
    ]
    seeds = []
    for arrays in groups:
        for save in (np.savez, np.savez_compressed):
            buffer = io.BytesIO()
            save(buffer, **arrays)
            seeds.append(buffer.getvalue())
    chunks = {"0": kernel.reshape(-1)[:5], "1": kernel.reshape(-1)[5:]}
    chunked = {"__msgpack_chunked_array__": True, "shape": {"0": 3, "1": 4}, "chunks": chunks}
    seeds.append(
        pack({"0": {"head": {"kernel": kernel, "bias": kernel[0].astype(np.float16)}}, "1": {"mu": None}, "2": 3})
    )
    seeds.append(pack({"0": {"embedding": chunked}, "1": {"count": np.int32(3), "lr": 0.5}, "2": 3}))
    return seeds


def mutate(content: bytes, other: bytes, rng: random.Random) -> bytes:
    """Return `content` with one to four changes."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 4])):
        at = rng.randrange(len(data) + 1)
        stop = min(len(data), at + rng.choice([1, 2, 4, 8, 64, len(data)]))
        change = rng.choice([0, 0, 0, 1, 1, 2, 3, 4, 5, 6])
        if change == 0 and data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        elif change == 1 and data:
            data[at % len(data)] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
        elif change == 2:
            token = rng.choice(TOKENS)
            data[at : at + len(token)] = token
        elif change == 3:
            data[at:at] = rng.choice(TOKENS)
        elif change == 4:
            del data[at:stop]
        elif change == 5:
            data[at:at] = data[at:stop]
        else:
            data[at:] = other[rng.randrange(len(other)) :]
    return bytes(data)


def mutate_members(content: bytes, rng: random.Random) -> bytes:
    """Return the .npz `content` with one member mutated, its directory and checksums right again."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [(info.filename, archive.read(info), info.compress_type) for info in archive.infolist()]
    chosen = rng.randrange(len(members))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for index, (name, data, compression) in enumerate(members):
            changed = mutate(data, data, rng) if index == chosen else data
            archive.writestr(name, changed, compression)
    return buffer.getvalue()


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return one.numel() == 0 or torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def read_all(path: Path) -> dict[str, torch.Tensor]:
    with open_arrays(path) as file:
        return {name: file.read(name) for name in file.shapes}


@dataclass
class Findings:
    """What happened: outcomes counted, the slowest input in CPU seconds, and the inputs that broke the promise."""

    outcomes: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0
    failures: list[tuple[str, bytes]] = field(default_factory=list)


def check_input(content: bytes, folder: Path, findings: Findings) -> None:
    path = folder / "input"
    path.write_bytes(content)
    start = time.process_time()
    try:
        tensors = read_all(path)
    except CheckpointError:
        findings.outcomes["refused"] += 1
        tensors = None
    except Exception as error:
        findings.failures.append((f"{type(error).__name__}: {error}", content))
        return
    findings.slowest = max(findings.slowest, time.process_time() - start)
    if tensors is None:
        return
    findings.outcomes["accepted"] += 1
    write_npz(folder / "again.npz", tensors.items())
    again = read_all(folder / "again.npz")
    if list(again) != list(tensors) or not all(same_bits(again[name], tensors[name]) for name in tensors):
        findings.failures.append(("does not round-trip", content))


def run(inputs: int, seed: int) -> Findings:
    """Check `inputs` mutated files; the same seed gives the same files."""
    rng, seeds, findings = random.Random(seed), make_seeds(), Findings()
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(inputs):
            content = rng.choice(seeds)
            if content[:2] == b"PK" and rng.random() < 0.5:
                content = mutate_members(content, rng)
            else:
                content = mutate(content, rng.choice(seeds), rng)
            check_input(content, Path(folder), findings)
    return findings


def main(
    run: Callable[[int, int], Findings], name: str, description: str | None, *, inputs: int, slowest: float = 1.0
) -> int:
    """Fuzz as the command line says; return 1 if a promise was broken or an input took over `slowest` seconds."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=inputs)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    findings = run(arguments.inputs, arguments.seed)
    print(f"{arguments.inputs} inputs: {dict(findings.outcomes)}, slowest {findings.slowest * 1000:.0f} ms")
    for index, (what, content) in enumerate(findings.failures):
        kept = Path(tempfile.gettempdir()) / f"{name}_{arguments.seed}_{index}"
        kept.write_bytes(content)
        print(f"{kept}: {what}")
    return int(bool(findings.failures) or findings.slowest > slowest)


if __name__ == "__main__":
    sys.exit(main(run, "fuzz_containers", __doc__, inputs=100_000))
