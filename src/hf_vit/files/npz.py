"""Files of named arrays: reading foreign ones safely, writing them atomically.

`open_arrays` takes a NumPy `.npz` (a zip of `.npy` members) or a Flax msgpack checkpoint (`checkpoint_<step>`).
Everything that the file announces - zip directory, array headers, sizes - is read and checked first; only then, one
array at a time and on request, data. Nothing is unpickled, nothing larger than what the file can honestly hold is
allocated, and whatever is wrong in a file is a `CheckpointError` that names the file, the array, what was expected,
what was found and what to do.
"""

import ast
import math
import mmap
import os
import re
import stat
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from hf_vit.files import dtypes
from hf_vit.files.atomic import atomic_file
from hf_vit.files.errors import CheckpointError
from hf_vit.files.flax_msgpack import MAX_DIMENSIONS, MAX_NAME, scan_arrays


MAX_MEMBERS = 10_000  # ViT-G with Adam moments, one member per array, has about 2,500
MAX_HEADER = 10_000  # bytes of one .npy header
MAX_INFLATION = 20  # deflated weights gain about 8%; a file may also hold all-zero heads and fresh optimizer moments
FREE_INFLATION = 32 << 20  # bytes that any file may unpack to, however small it is
_AGAIN = "the file is damaged: download or export it again"
_REWRITE = "rewrite the file with numpy.savez"


@dataclass(frozen=True)
class _Stored:
    """An array and where its bytes are: `pieces` are (offset, bytes) in the file, in order."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[tuple[int, int], ...]
    value: int | float | None = None  # of a plain number, which has no pieces
    fortran_order: bool = False
    big_endian: bool = False
    header: int = 0  # bytes before the data
    crc: int | None = None  # of header and data
    deflated: bool = False

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class ArrayFile:
    """The arrays of one file: names, shapes and dtypes known from the headers, data read on request.

    Closing (or leaving the `with` block) ends reading; tensors already read stay valid. A file that another process
    truncates in place while it is open kills the reader (SIGBUS), as with any memory map; one that is replaced
    atomically does not.
    """

    def __init__(self, path: Path, kind: str, stored: dict[str, _Stored], data: mmap.mmap):
        self.path = path
        self.kind = kind
        self.shapes = {name: array.shape for name, array in stored.items()}
        self.dtypes = {name: array.dtype for name, array in stored.items()}
        self._stored = stored
        self._checked: set[str] = set()
        self._unpacked: tuple[str, torch.Tensor] = ("", torch.empty(0))  # the last array whose parts were asked for
        self._data: mmap.mmap | None = data

    def __enter__(self) -> "ArrayFile":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        self._data = None  # the map itself goes with the last tensor that looks into it

    def read(self, name: str) -> torch.Tensor:
        """Return one array in native byte order, contiguous in C order.

        An uncompressed, aligned, C-order, little-endian array is a private memory map of the file (no copy; writing to
        it never reaches the file); any other is a copy. The checksum is verified on the first read.

        Raises:
            KeyError: no array of this name.
            CheckpointError: the data do not match their checksum, or do not unpack to the size that the header
                announces.
        """
        if self._data is None:
            raise ValueError(f"{self.path} is closed: read inside the `with` block")
        array = self._stored[name]
        try:
            tensor = _read_tensor(self._data, array, verify=name not in self._checked)
        except ValueError as error:
            raise CheckpointError(f"{self.path}: {name}: {error}") from error
        self._checked.add(name)
        return tensor

    def copy(self, name: str, part: tuple[int, int] = (0, 1)) -> torch.Tensor:
        """Return an array, or part `index` of `count` equal ones along its first axis, flat, in memory of its own.

        The file takes up no memory beside it: its pages are given back as they are read, and with them whatever was
        written to a tensor of `read`.

        Raises:
            KeyError, CheckpointError: as `read`.
        """
        index, count = part
        array = self._stored[name]
        is_swapped = array.fortran_order or array.big_endian != (sys.byteorder == "big")
        if self._data is None or is_swapped or array.deflated or len(array.pieces) != 1:
            if self._unpacked[0] != name:
                self._unpacked = (name, self.read(name))
            return self._unpacked[1].reshape(count, -1)[index].clone()
        begin, size = array.pieces[0][0] + array.header, array.nbytes // count
        if array.crc is not None and name not in self._checked:
            checksum = 0
            for chunk in _chunks(self._data, begin - array.header, array.header + array.nbytes):
                checksum = zlib.crc32(chunk, checksum)
            if checksum != array.crc:
                raise CheckpointError(f"{self.path}: {name}: {_wrong_checksum(array.crc, checksum)}")
            self._checked.add(name)
        value, filled = torch.empty(size, dtype=torch.uint8), 0
        for chunk in _chunks(self._data, begin + index * size, size):
            value.numpy()[filled : filled + len(chunk)] = chunk
            filled += len(chunk)
        return value.view(array.dtype)


def open_arrays(path: str | Path, *, max_bytes: int | None = None) -> ArrayFile:
    """Open a file of named arrays, recognised by its content, and check everything but the data.

    Args:
        max_bytes: refuse a file whose arrays take more than this in memory, all together.
    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is no such file, or it is defective or hostile.
    """
    path = Path(path)
    if not stat.S_ISREG(path.stat().st_mode):
        raise CheckpointError(f"{path}: expected a file, got a folder or a device; name the checkpoint file itself")
    try:
        with path.open("rb") as file:
            if not os.fstat(file.fileno()).st_size:
                raise ValueError(f"expected an .npz or Flax msgpack file, got an empty one; {_AGAIN}")
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        kind = _recognise(data)
        stored = _scan_npz(data) if kind == "npz" else _scan_msgpack(data)
        total = sum(array.nbytes for array in stored.values())
        if not stored or (max_bytes is not None and total > max_bytes):
            expected = "at least one array" if not stored else f"at most {max_bytes} bytes of arrays"
            raise ValueError(f"expected {expected}, got {total} bytes; is this the right file?")
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return ArrayFile(path, kind, stored, data)


def _recognise(data: mmap.mmap) -> str:
    """Return "npz" or "msgpack" from the first bytes."""
    if data[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        return "npz"
    if data[0] == 0x80:  # also an empty msgpack map: no checkpoint either
        raise ValueError(
            "expected an .npz or Flax msgpack file, got a pickle; it is not opened, because a pickle can run code"
        )
    if 0x81 <= data[0] <= 0x8F or data[0] in (0xDE, 0xDF):
        return "msgpack"
    found = "a single .npy array" if data[:6] == b"\x93NUMPY" else f"one that begins with {data[:8]!r}"
    raise ValueError(f"expected an .npz or Flax msgpack file, got {found}; is this the right file?")


def _check_array(name: str, shape: tuple[int, ...], dtype: torch.dtype, nbytes: int) -> None:
    """Raise ValueError unless name and shape are sane and the array takes exactly the `nbytes` that the file has."""
    parts = name.split("/")
    is_path_trick = not {"", ".", ".."}.isdisjoint(parts) or "\\" in name or ":" in parts[0]
    if is_path_trick or not name.isprintable() or len(name) > MAX_NAME:
        raise ValueError(f"expected an array name like a/b/c, got {name!r:.200}; {_REWRITE}")
    if len(shape) > MAX_DIMENSIONS or any(type(size) is not int or not 0 <= size < 2**63 for size in shape):
        raise ValueError(
            f"{name}: expected at most {MAX_DIMENSIONS} sizes from 0 to 2**63, got {shape!r:.200}; {_AGAIN}"
        )
    if math.prod(max(size, 1) for size in shape) * dtype.itemsize >= 2**63:
        raise ValueError(f"{name}: expected an array that fits in memory, got shape {shape}; {_AGAIN}")
    if math.prod(shape) * dtype.itemsize != nbytes:
        expected = f"{math.prod(shape) * dtype.itemsize} bytes for shape {shape} of {dtype}"
        raise ValueError(f"{name}: expected {expected}, got {nbytes}; {_AGAIN}")


def _scan_msgpack(data: mmap.mmap) -> dict[str, _Stored]:
    stored = {}
    for name, array in scan_arrays(data).items():
        if array.dtype not in dtypes.FLAX:
            raise ValueError(
                f"{name}: expected real values, got dtype {array.dtype!r}; leave it out of the checkpoint"
            )
        dtype = dtypes.FLAX[array.dtype]
        nbytes = dtype.itemsize if array.value is not None else sum(size for _, size in array.pieces)
        _check_array(name, array.shape, dtype, nbytes)
        stored[name] = _Stored(dtype, array.shape, array.pieces, array.value)
    return stored


# -- the zip directory ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Member:
    name: str
    deflated: bool
    crc: int
    packed: int  # bytes in the file
    size: int  # bytes unpacked
    start: int  # offset of its local header
    offset: int  # offset of its data


def _scan_npz(data: mmap.mmap) -> dict[str, _Stored]:
    members = _read_directory(data)
    total = sum(member.size for member in members)
    if total > FREE_INFLATION + MAX_INFLATION * len(data):
        raise ValueError(
            f"expected at most {MAX_INFLATION} times the file's {len(data)} bytes, got {total}: a zip bomb"
        )
    stored: dict[str, _Stored] = {}
    for member in members:
        name = member.name.removesuffix(".npy")
        if name == member.name:
            raise ValueError(f"expected members that end in .npy, got {name!r}; {_REWRITE}")
        if name in stored:
            raise ValueError(f"{name}: expected one member of this name, got two; {_REWRITE}")
        stored[name] = _read_npy_header(data, member, name)
    return stored


def _read_directory(data: mmap.mmap) -> list[_Member]:
    """Return the members in the directory's order, each checked to lie in the file and in no other member."""
    begin, end, count = _find_directory(data)
    if count > MAX_MEMBERS or count * 46 > end - begin:
        raise ValueError(
            f"expected at most {MAX_MEMBERS} members in {end - begin} bytes of directory, got {count}; {_AGAIN}"
        )
    members, position = [], begin
    for _ in range(count):
        if position + 46 > end:
            raise ValueError(f"expected {count} members, got {len(members)}; {_AGAIN}")
        member, position = _read_directory_entry(data, position, begin)
        members.append(member)
    if position != end:
        raise ValueError(f"expected the directory to end at byte {end}, got {position}; {_AGAIN}")
    free = 0
    for member in sorted(members, key=lambda member: member.start):
        if member.start < free:
            raise ValueError(
                f"{member.name}: expected its data after byte {free}, got {member.start}: members overlap; {_AGAIN}"
            )
        free = member.offset + member.packed
    return members


def _find_directory(data: mmap.mmap) -> tuple[int, int, int]:
    """Return begin, end and number of entries of the directory, from the record that ends the file."""
    tail = data[max(0, len(data) - 22 - 0xFFFF) :]
    at = tail.rfind(b"PK\x05\x06")
    while at >= 0 and (
        len(tail) - at < 22 or int.from_bytes(tail[at + 20 : at + 22], "little") != len(tail) - at - 22
    ):
        at = tail.rfind(b"PK\x05\x06", 0, at)
    if at < 0:
        raise ValueError(
            f"expected a zip directory at the end, got none: truncated, or something follows it; {_AGAIN}"
        )
    disk, first_disk, here, count, size, begin = struct.unpack_from("<4H2L", tail, at + 4)
    end = len(data) - len(tail) + at
    if end >= 76 and data[end - 20 : end - 16] == b"PK\x06\x07":
        record = struct.unpack("<Q", data[end - 12 : end - 4])[0]
        if record != end - 76 or data[record : record + 4] != b"PK\x06\x06":
            raise ValueError(f"expected the zip64 record at byte {end - 76}, got {record}; {_AGAIN}")
        end = record
        disk, first_disk, here, count, size, begin = struct.unpack("<2L4Q", data[record + 16 : record + 56])
    if disk or first_disk or here != count or begin + size != end:
        raise ValueError(
            f"expected one directory that ends at byte {end}, got {begin} + {size} on disk {disk}; {_AGAIN}"
        )
    return begin, end, count


def _read_directory_entry(data: mmap.mmap, position: int, limit: int) -> tuple[_Member, int]:
    """Return the member whose entry is at `position`, and the position after it; its data must end before `limit`."""
    fields = struct.unpack("<4s6H3L5H2L", data[position : position + 46])
    (
        magic,
        _,
        _,
        flags,
        method,
        _,
        _,
        crc,
        packed,
        size,
        name_length,
        extra_length,
        comment_length,
        disk,
        _,
        _,
        start,
    ) = fields
    stop = position + 46 + name_length
    raw = data[position + 46 : stop]
    name = raw.decode("utf-8" if flags & 0x800 else "cp437", "backslashreplace")
    if magic != b"PK\x01\x02" or disk:
        raise ValueError(f"expected a directory entry at byte {position}, got {magic!r}; {_AGAIN}")
    if flags & ~0x80E:  # only: deflate level, sizes after the data, UTF-8 name
        raise ValueError(f"{name}: expected a plain member, got an encrypted or patched one; {_REWRITE}")
    if method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name}: expected a stored or deflated member, got zip method {method}; {_REWRITE}")
    if 0xFFFFFFFF in (size, packed, start):
        extra = data[stop : stop + extra_length]
        size, packed, start = _read_zip64_extra(extra, (size, packed, start), name)
    if start + 30 > limit:
        raise ValueError(f"{name}: expected its header before byte {limit}, got {start}; {_AGAIN}")
    magic, local_flags, local_name, local_extra = struct.unpack("<4s2xH18x2H", data[start : start + 30])
    offset = start + 30 + local_name + local_extra
    same_name = data[start + 30 : start + 30 + local_name] == raw
    if magic != b"PK\x03\x04" or not same_name or local_flags & ~0x80E or offset + packed > limit:
        raise ValueError(
            f"{name}: expected its header and {packed} bytes at byte {start}, got something else; {_AGAIN}"
        )
    if method == zipfile.ZIP_STORED and packed != size:
        raise ValueError(f"{name}: expected {size} stored bytes, got {packed}; {_AGAIN}")
    member = _Member(name, method == zipfile.ZIP_DEFLATED, crc, packed, size, start, offset)
    return member, stop + extra_length + comment_length


def _read_zip64_extra(extra: bytes, values: tuple[int, int, int], name: str) -> list[int]:
    """Return size, packed size and offset, the saturated ones taken from the zip64 field among the `extra` fields."""
    while len(extra) >= 4:
        tag, length = struct.unpack_from("<2H", extra)
        field, extra = extra[4 : 4 + length], extra[4 + length :]
        if tag == 1 and len(field) == length and length >= 8 * values.count(0xFFFFFFFF):
            large = iter(struct.unpack(f"<{length // 8}Q", field[: length // 8 * 8]))
            return [next(large) if value == 0xFFFFFFFF else value for value in values]
    raise ValueError(f"{name}: expected a zip64 field with its sizes, got none; {_AGAIN}")


# -- one member -------------------------------------------------------------------------------------------------------


def _read_npy_header(data: mmap.mmap, member: _Member, name: str) -> _Stored:
    begin = _first_bytes(data, member, name)
    version = tuple(begin[6:8])
    if begin[:6] != b"\x93NUMPY" or version not in ((1, 0), (2, 0), (3, 0)):
        raise ValueError(f"{name}: expected a .npy array of version 1 to 3, got {begin[:8]!r}; {_REWRITE}")
    prefix = 10 if version == (1, 0) else 12
    header = prefix + int.from_bytes(begin[8:prefix], "little")
    text = begin[prefix:header].decode("utf-8" if version == (3, 0) else "latin-1", "backslashreplace")
    if header > len(begin):
        raise ValueError(f"{name}: expected a header of at most {len(begin)} bytes, got {header}; {_AGAIN}")
    descr, fortran_order, shape = _parse_npy_header(text, name)
    match = re.fullmatch(r"([<>=|])(f[248]|[iu][1248]|V2)", descr) if isinstance(descr, str) else None
    if match is None or match[0] == ">V2":
        raise ValueError(
            f"{name}: expected real values (V2: bfloat16), got dtype {descr!r:.200}; leave this array out of the file"
        )
    order, kind = match.groups()
    dtype = dtypes.NPY[kind]
    _check_array(name, shape, dtype, member.size - header)
    return _Stored(
        dtype,
        shape,
        ((member.offset, member.packed),),
        fortran_order=fortran_order and len(shape) > 1,
        big_endian=order == ">" and dtype.itemsize > 1,
        header=header,
        crc=member.crc,
        deflated=member.deflated,
    )


def _first_bytes(data: mmap.mmap, member: _Member, name: str) -> bytes:
    """Return the beginning of a member, long enough for any header that is accepted."""
    if not member.deflated:
        return data[member.offset : member.offset + min(member.packed, MAX_HEADER)]
    packed = data[member.offset : member.offset + min(member.packed, 2 * MAX_HEADER)]
    try:
        return zlib.decompressobj(-15).decompress(packed, MAX_HEADER)
    except zlib.error as error:
        raise ValueError(f"{name}: expected deflated data, got something else ({error}); {_AGAIN}") from error


def _parse_npy_header(text: str, name: str) -> tuple[object, bool, tuple[int, ...]]:
    """Return descr, fortran_order and shape of a .npy header: a Python dict literal with exactly these keys."""
    try:
        if "\\" in text:  # no header needs an escape
            raise ValueError("it holds a backslash")
        header = ast.literal_eval(text)
        descr, fortran_order, shape = header["descr"], header["fortran_order"], header["shape"]
        if len(header) != 3 or type(fortran_order) is not bool or type(shape) is not tuple:
            raise ValueError("it has other keys or types")
    except (ValueError, SyntaxError, TypeError, KeyError, MemoryError, RecursionError, Warning) as error:
        raise ValueError(
            f"{name}: expected a header with descr, fortran_order, shape, got {text!r:.200}; {_AGAIN}"
        ) from error
    return descr, fortran_order, shape


# -- the data ---------------------------------------------------------------------------------------------------------


def _read_tensor(data: mmap.mmap, array: _Stored, *, verify: bool) -> torch.Tensor:
    if array.value is not None:
        return torch.tensor(array.value, dtype=array.dtype)
    if array.deflated:
        buffer, offset = _inflate(data, array), array.header
    elif len(array.pieces) == 1:
        buffer, offset = data, array.pieces[0][0] + array.header
    else:
        buffer, offset = _join(data, array), 0
    if array.crc is not None and (verify or array.deflated):
        start = offset - array.header
        with memoryview(buffer) as whole, whole[start : offset + array.nbytes] as member:
            if zlib.crc32(member) != array.crc:
                raise ValueError(_wrong_checksum(array.crc, zlib.crc32(member)))
    if not array.nbytes:
        return torch.empty(array.shape, dtype=array.dtype)
    raw = torch.frombuffer(buffer, dtype=torch.uint8, offset=offset, count=array.nbytes)
    if array.big_endian != (sys.byteorder == "big"):
        raw = raw.view(-1, array.dtype.itemsize).flip(1).reshape(-1)
    elif raw.data_ptr() % array.dtype.itemsize:
        raw = raw.clone()  # vectorised kernels may assume alignment
    values = raw.view(array.dtype)
    if array.fortran_order:
        return values.view(array.shape[::-1]).permute(*reversed(range(len(array.shape)))).contiguous()
    return values.view(array.shape)


def _wrong_checksum(expected: int, got: int) -> str:
    return f"expected data with checksum {expected:08x}, got {got:08x}; {_AGAIN}"


def _chunks(data: mmap.mmap, start: int, size: int) -> Iterator[memoryview]:
    """Yield the bytes as views of a mebibyte; the pages of each are given back when the next is asked for."""
    with memoryview(data) as whole:
        for position in range(start, start + size, 1 << 20):
            stop = min(position + (1 << 20), start + size)
            with whole[position:stop] as chunk:
                yield chunk
            if hasattr(mmap, "MADV_DONTNEED"):
                page = position // mmap.PAGESIZE * mmap.PAGESIZE
                data.madvise(mmap.MADV_DONTNEED, page, stop - page)


def _inflate(data: mmap.mmap, array: _Stored) -> bytearray:
    """Return a deflated member unpacked: exactly the announced size, never more."""
    start, packed = array.pieces[0]
    size = array.header + array.nbytes
    buffer, filled = bytearray(size), 0
    inflater = zlib.decompressobj(-15)
    try:
        for position in range(start, start + packed, 1 << 14):
            chunk = inflater.decompress(data[position : min(position + (1 << 14), start + packed)], size - filled + 1)
            buffer[filled : filled + len(chunk)] = chunk  # grows by one byte if there is too much
            filled += len(chunk)
            if filled > size:
                break
    except zlib.error as error:
        raise ValueError(f"expected deflated data, got something else ({error}); {_AGAIN}") from error
    if filled != size or not inflater.eof or inflater.unused_data:
        raise ValueError(f"expected {size} bytes unpacked, got {'fewer' if filled < size else 'more'}; {_AGAIN}")
    return buffer


def _join(data: mmap.mmap, array: _Stored) -> bytearray:
    """Return the pieces of an array one after the other."""
    buffer, filled = bytearray(array.nbytes), 0
    for offset, size in array.pieces:
        buffer[filled : filled + size] = data[offset : offset + size]
        filled += size
    return buffer


# -- writing ----------------------------------------------------------------------------------------------------------


def write_npz(path: str | Path, arrays: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Write arrays to an .npz one by one, with the bytes of `numpy.savez`; `path` is replaced atomically.

    Args:
        arrays: (name, tensor) pairs; a tensor is needed only until the next is asked for. bfloat16 is written as
            NumPy's 2-byte void, as JAX programs do.
    Raises:
        ValueError: a name twice, a name that no reader here would take, or a dtype other than real values.
    """
    names: set[str] = set()
    with (
        atomic_file(path) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED, allowZip64=True) as archive,
    ):
        for name, tensor in arrays:
            if name in names:
                raise ValueError(f"{path}: expected every name once, got {name!r} twice")
            names.add(name)
            if tensor.dtype not in dtypes.FLAX.values():
                raise ValueError(f"{path}: {name}: expected real values, got {tensor.dtype}; convert it first")
            _check_array(name, tuple(tensor.shape), tensor.dtype, tensor.numel() * tensor.dtype.itemsize)
            values = tensor.detach().cpu().contiguous()
            is_bfloat16 = values.dtype == torch.bfloat16
            array = values.view(torch.int16).numpy() if is_bfloat16 else values.numpy()
            header = np.lib.format.header_data_from_array_1_0(array)
            if is_bfloat16:
                header["descr"] = "<V2"  # what numpy.savez writes of a JAX array
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                member.write(memoryview(values.reshape(-1).view(torch.uint8).numpy()))
            del tensor, values, array  # else they would live on while the next is made
