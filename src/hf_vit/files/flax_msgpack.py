"""Where the arrays of a Flax msgpack checkpoint lie in the file, found without reading their data.

`flax.training.checkpoints` writes a tree of maps; its leaves are numbers and arrays. An array is a msgpack extension
(1, or 3 for a NumPy scalar) whose payload is itself msgpack: (shape, dtype name, bytes in C order, little-endian).
Arrays above 1 GiB are cut into one-dimensional chunks. `hf_vit.files.npz` reads the bytes; nothing else needs this
module.
Source: flax/serialization.py, msgpack_serialize and _chunk; the format:
    github.com/msgpack/msgpack/blob/master/spec.md.
"""

import math
import struct
from typing import NamedTuple


MAX_DEPTH = 64
MAX_ENTRIES = 20_000
MAX_NAME = 512
MAX_DIMENSIONS = 32
_CHUNKED = "__msgpack_chunked_array__"
_NDARRAY, _COMPLEX, _SCALAR = 1, 2, 3
_AGAIN = "the file is damaged or not a Flax checkpoint: export or download it again"


class FlaxArray(NamedTuple):
    """One leaf: `pieces` are (offset, bytes) in the file, in order; a plain number has a `value` and no pieces."""

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[tuple[int, int], ...]
    value: int | float | None = None


class _Token(NamedTuple):
    kind: str  # map, list, text, bytes, extension, integer, float, boolean, nil
    start: int  # first byte of the payload
    stop: int  # first byte after the token (for map and list: of its first entry)
    size: int = 0  # entries or bytes
    value: int | float | None = None  # of an integer or float
    code: int = 0  # of an extension


_SIZED = {  # first byte -> kind, struct format of the length
    0xC4: ("bytes", ">B"), 0xC5: ("bytes", ">H"), 0xC6: ("bytes", ">I"),
    0xC7: ("extension", ">B"), 0xC8: ("extension", ">H"), 0xC9: ("extension", ">I"),
    0xD9: ("text", ">B"), 0xDA: ("text", ">H"), 0xDB: ("text", ">I"),
    0xDC: ("list", ">H"), 0xDD: ("list", ">I"), 0xDE: ("map", ">H"), 0xDF: ("map", ">I"),
}  # fmt: skip
_NUMBERS = {
    0xCA: ("float", ">f"), 0xCB: ("float", ">d"),
    0xCC: ("integer", ">B"), 0xCD: ("integer", ">H"), 0xCE: ("integer", ">I"), 0xCF: ("integer", ">Q"),
    0xD0: ("integer", ">b"), 0xD1: ("integer", ">h"), 0xD2: ("integer", ">i"), 0xD3: ("integer", ">q"),
}  # fmt: skip
_CONSTANTS = {0xC0: "nil", 0xC2: "boolean", 0xC3: "boolean"}


def scan_arrays(data) -> dict[str, FlaxArray]:
    """Return every number and array of the tree in file order, names joined by "/"; `nil` entries are left out.

    Args:
        data: the whole file; anything that gives `bytes` when sliced (a memory map).
    Raises:
        ValueError: the bytes are not such a tree, or go beyond 64 levels or 20,000 entries.
    """
    scanner = _Scanner(data)
    end = scanner.scan_map("", scanner.token(0, len(data)), len(data), 0)
    if end != len(data):
        raise ValueError(f"expected the tree to end with the file at byte {len(data)}, got its end at {end}; {_AGAIN}")
    return scanner.arrays


class _Scanner:
    """Walks the tree once; the only state is what was found and how many entries were seen."""

    def __init__(self, data):
        self.data = data
        self.arrays: dict[str, FlaxArray] = {}
        self.entries = 0

    def unpack(self, layout: str, position: int, end: int) -> int | float:
        stop = position + struct.calcsize(layout)
        if stop > end:
            raise ValueError(f"expected more after byte {end}, got the end; {_AGAIN}")
        return struct.unpack(layout, self.data[position:stop])[0]

    def token(self, position: int, end: int) -> _Token:
        """Return the token at `position`; what it announces lies before `end`."""
        first = int(self.unpack(">B", position, end))
        start, code = position + 1, 0
        if first <= 0x7F or first >= 0xE0:
            return _Token("integer", start, start, value=first if first <= 0x7F else first - 256)
        if first in _CONSTANTS:
            return _Token(_CONSTANTS[first], start, start)
        if first in _NUMBERS:
            kind, layout = _NUMBERS[first]
            return _Token(kind, start, start + struct.calcsize(layout), value=self.unpack(layout, start, end))
        if first <= 0xBF:
            kind = "map" if first <= 0x8F else "list" if first <= 0x9F else "text"
            size = first & (0x1F if kind == "text" else 0x0F)
        elif first in _SIZED:
            kind, layout = _SIZED[first]
            size, start = int(self.unpack(layout, start, end)), start + struct.calcsize(layout)
        elif 0xD4 <= first <= 0xD8:
            kind, size = "extension", 1 << (first - 0xD4)
        else:
            raise ValueError(f"expected a msgpack value at byte {position}, got 0x{first:02x}; {_AGAIN}")
        if kind == "extension":
            code, start = int(self.unpack(">b", start, end)), start + 1
        if kind in ("map", "list"):
            if size > end - start:  # an entry takes at least one byte
                raise ValueError(f"expected at most {end - start} entries at byte {position}, got {size}; {_AGAIN}")
            return _Token(kind, start, start, size)
        if start + size > end:
            raise ValueError(f"expected {size} bytes at byte {start}, got {end - start} before the end; {_AGAIN}")
        return _Token(kind, start, start + size, size, code=code)

    def expect(self, kind: str, position: int, end: int, what: str) -> _Token:
        token = self.token(position, end)
        if token.kind != kind:
            raise ValueError(f"{what}: expected {kind} at byte {position}, got {token.kind}; {_AGAIN}")
        return token

    def text(self, token: _Token) -> str:
        if token.size > MAX_NAME:
            raise ValueError(f"expected a name of at most {MAX_NAME} bytes, got {token.size}; {_AGAIN}")
        return self.data[token.start : token.stop].decode(errors="backslashreplace")

    def scan_map(self, name: str, token: _Token, end: int, depth: int) -> int:
        """Take in the map that `token` begins; return the position after it."""
        if token.kind != "map" or depth > MAX_DEPTH:
            got = token.kind if token.kind != "map" else "more"
            raise ValueError(f"{name or 'root'}: expected a map, at most {MAX_DEPTH} levels deep, got {got}; {_AGAIN}")
        position = token.stop
        for index in range(token.size):
            key, position = self.key(position, end, name or "root")
            if key == _CHUNKED:
                if index or token.size != 3:
                    raise ValueError(f"{name}: expected a chunked array of 3 entries, got {token.size}; {_AGAIN}")
                return self.scan_chunked(name, position, end)
            position = self.scan_value(f"{name}/{key}" if name else key, position, end, depth)
        return position

    def key(self, position: int, end: int, what: str) -> tuple[str, int]:
        self.entries += 1
        if self.entries > MAX_ENTRIES:
            raise ValueError(f"expected at most {MAX_ENTRIES} entries, got more; {_AGAIN}")
        token = self.expect("text", position, end, f"{what}: key")
        return self.text(token), token.stop

    def scan_value(self, name: str, position: int, end: int, depth: int) -> int:
        token = self.token(position, end)
        if token.kind == "map":
            return self.scan_map(name, token, end, depth + 1)
        if token.kind == "nil":
            return token.stop
        if token.kind == "extension" and token.code in (_NDARRAY, _SCALAR):
            self.add(name, self.array(name, token))
        elif token.kind in ("integer", "float"):
            self.add(name, FlaxArray("int64" if token.kind == "integer" else "float64", (), (), token.value))
        else:
            got = "a complex number" if token.kind == "extension" and token.code == _COMPLEX else token.kind
            raise ValueError(f"{name}: expected an array or a real number, got {got}; leave it out of the checkpoint")
        return token.stop

    def add(self, name: str, array: FlaxArray) -> None:
        if name in self.arrays or len(name) > MAX_NAME:
            got = "two" if name in self.arrays else f"one of {len(name)} letters"
            raise ValueError(f"{name:.{MAX_NAME}}: expected one entry of this name, short enough, got {got}; {_AGAIN}")
        if array.dtype == "int64" and array.value is not None and array.value >= 2**63:
            raise ValueError(f"{name}: expected an integer below 2**63, got {array.value}; {_AGAIN}")
        self.arrays[name] = array

    def array(self, name: str, token: _Token) -> FlaxArray:
        """Return the array whose extension token is given: msgpack of (shape, dtype name, bytes)."""
        end = token.stop
        outer = self.expect("list", token.start, end, name)
        dims = self.expect("list", outer.stop, end, f"{name}: shape")
        if outer.size != 3 or dims.size > MAX_DIMENSIONS:
            raise ValueError(
                f"{name}: expected (shape, dtype, bytes), at most {MAX_DIMENSIONS} dimensions, got more; {_AGAIN}"
            )
        shape, position = [], dims.stop
        for _ in range(dims.size):
            size = self.expect("integer", position, end, f"{name}: shape")
            shape.append(int(size.value or 0))
            position = size.stop
        dtype = self.token(position, end)
        data = self.token(dtype.stop, end)
        if dtype.kind not in ("text", "bytes") or data.kind not in ("text", "bytes") or data.stop != end:
            raise ValueError(f"{name}: expected (shape, dtype, bytes), got {dtype.kind} and {data.kind}; {_AGAIN}")
        return FlaxArray(self.text(dtype), tuple(shape), ((data.start, data.size),))

    def scan_chunked(self, name: str, position: int, end: int) -> int:
        """Take in an array in chunks: {marker: True, "shape": {"0": n, ...}, "chunks": {"0": array, ...}}."""
        position = self.expect("boolean", position, end, name).stop
        shape, position = self.numbered(name, "shape", position, end)
        chunks, position = self.numbered(name, "chunks", position, end)
        sizes = [int(size.value or 0) for size in shape if size.kind == "integer"]
        arrays = [self.array(name, chunk) for chunk in chunks if chunk.kind == "extension" and chunk.code == _NDARRAY]
        if len(sizes) != len(shape) or len(arrays) != len(chunks) or len({array.dtype for array in arrays}) != 1:
            raise ValueError(f"{name}: expected sizes and chunks of one dtype, got something else; {_AGAIN}")
        if sum(math.prod(array.shape) for array in arrays) != math.prod(sizes):
            raise ValueError(f"{name}: expected chunks of {math.prod(sizes)} elements in all, got others; {_AGAIN}")
        pieces = tuple(piece for array in arrays for piece in array.pieces)
        self.add(name, FlaxArray(arrays[0].dtype, tuple(sizes), pieces))
        return position

    def numbered(self, name: str, wanted: str, position: int, end: int) -> tuple[list[_Token], int]:
        """Return the values of the map {"0": ..., "1": ...} under the key `wanted`, and the position after it."""
        key, position = self.key(position, end, name)
        token = self.expect("map", position, end, f"{name}: {wanted}")
        if key != wanted or (wanted == "shape" and token.size > MAX_DIMENSIONS):
            raise ValueError(f"{name}: expected {wanted}, got {key} with {token.size} entries; {_AGAIN}")
        values, position = [], token.stop
        for index in range(token.size):
            number, position = self.key(position, end, name)
            if number != str(index):
                raise ValueError(f"{name}: expected {wanted}/{index}, got {wanted}/{number}; {_AGAIN}")
            values.append(self.token(position, end))
            position = values[-1].stop
        return values, position
