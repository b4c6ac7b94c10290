"""Foreign files: what is valid is read bit for bit, what is not ends in one CheckpointError and costs nothing."""

import io
import os
import struct
import tracemalloc
import warnings
import weakref
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzz.fuzz_containers import pack, pack_extension
from npz_files import npy_header

from hf_vit.files.errors import CheckpointError
from hf_vit.files.npz import open_arrays, write_npz


GOLDENS = Path(os.environ.get("HF_VIT_GOLDENS", Path(__file__).parents[1] / "goldens"))
ARRAYS = {
    "Transformer/encoderblock_0/LayerNorm_0/scale": np.linspace(-1, 1, 12, dtype=np.float32),
    "embedding/kernel": np.arange(2 * 3 * 5, dtype=np.float32).reshape(2, 3, 5) / 7,
    "cls": np.full((1, 1, 6), 0.5, dtype=np.float32),
}


def save_npz(path, arrays=ARRAYS, **kwargs):
    np.savez(path, **arrays, **kwargs)
    return path


def npy_bytes(array):
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def save_zip(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a name twice is what some tests are about
        for name, content in members:
            archive.writestr(name, content)
    return path


def read_all(path, **kwargs):
    with open_arrays(path, **kwargs) as file:
        return {name: file.read(name) for name in file.shapes}


def assert_same(tensors, arrays):
    assert list(tensors) == list(arrays)
    for name, array in arrays.items():
        assert tensors[name].numpy().dtype == array.dtype.newbyteorder("=")
        np.testing.assert_array_equal(tensors[name].numpy(), array, strict=False)
        assert tensors[name].shape == array.shape
        assert tensors[name].is_contiguous()


# -- valid files ------------------------------------------------------------------------------------------------------


def test_names_shapes_and_dtypes_come_from_the_headers_in_file_order(tmp_path):
    path = save_npz(tmp_path / "a.npz")
    content = bytearray(path.read_bytes())
    for array in ARRAYS.values():  # no data left that could be read
        at = content.find(array.tobytes())
        content[at : at + array.nbytes] = bytes(array.nbytes)
    path.write_bytes(content)
    with open_arrays(path) as file:
        assert file.kind == "npz"
        assert file.path == path
        assert list(file.shapes.items()) == [(name, array.shape) for name, array in ARRAYS.items()]
        assert set(file.dtypes.values()) == {torch.float32}
        with pytest.raises(CheckpointError, match=r"a\.npz: cls: .*expected data with checksum"):
            file.read("cls")


@pytest.mark.parametrize(
    "dtype", ["<f2", "<f4", "<f8", ">f2", ">f4", ">f8", "<i8", ">i4", "i1", "u1", "<u2", ">u4", "<u8"]
)
@pytest.mark.parametrize("compressed", [False, True], ids=["stored", "deflated"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_every_real_dtype_and_axis_order_reads_as_numpy_reads_it(tmp_path, dtype, compressed, order):
    rng = np.random.default_rng(0)
    arrays = {
        "a/b": np.asarray(rng.integers(0, 100, (3, 4, 5)), dtype, order=order),
        "scalar": np.asarray(7, dtype),
        "row": np.asarray([1, 2, 3], dtype),
        "nothing": np.zeros((0, 3), dtype),
    }
    (np.savez_compressed if compressed else np.savez)(tmp_path / "a.npz", **arrays)
    assert_same(read_all(tmp_path / "a.npz"), arrays)


@pytest.mark.reliability(row="W02")
@pytest.mark.parametrize("descr", ["|V2", "<V2"])
def test_bfloat16_stored_as_two_byte_void_is_the_upper_half_of_float32(tmp_path, descr):
    bits = np.arange(0, 1 << 16, 7, dtype=np.uint16).reshape(-1, 1)
    path = save_zip(tmp_path / "a.npz", [("w.npy", npy_header(descr, bits.shape) + bits.tobytes())])
    tensor = read_all(path)["w"]
    assert tensor.dtype == torch.bfloat16
    np.testing.assert_array_equal(
        tensor.float().view(torch.int32).numpy().view(np.uint32), bits.astype(np.uint32) << 16
    )


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_every_npy_version_is_read(tmp_path, version):
    data = np.arange(6, dtype=np.float32)
    path = save_zip(tmp_path / "a.npz", [("w.npy", npy_header("<f4", (2, 3), version=version) + data.tobytes())])
    assert_same(read_all(path), {"w": data.reshape(2, 3)})


def test_zip64_sizes_and_sizes_after_the_data_are_read(tmp_path):
    class Pipe(io.RawIOBase):
        def __init__(self, file):
            self.file = file

        def writable(self):
            return True

        def write(self, data):
            return self.file.write(data)

    with (tmp_path / "a.npz").open("wb") as file, zipfile.ZipFile(Pipe(file), "w") as archive:
        for name, array in ARRAYS.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                member.write(npy_bytes(array))
    assert_same(read_all(tmp_path / "a.npz"), ARRAYS)


def test_zip64_directory_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 1)
    path = save_npz(tmp_path / "a.npz")
    monkeypatch.undo()
    assert b"PK\x06\x06" in path.read_bytes()
    assert_same(read_all(path), ARRAYS)


def test_writing_to_a_tensor_never_reaches_the_file(tmp_path):
    path = save_npz(tmp_path / "a.npz")
    before = path.read_bytes()
    for tensor in read_all(path).values():
        tensor.zero_()
    assert path.read_bytes() == before
    assert_same(read_all(path), ARRAYS)


def test_tensors_outlive_the_open_file(tmp_path):
    path = save_npz(tmp_path / "a.npz")
    with open_arrays(path) as file:
        tensors = {name: file.read(name) for name in file.shapes}
    path.unlink()
    assert_same(tensors, ARRAYS)
    with pytest.raises(ValueError, match="closed"):
        file.read("cls")


def test_a_stored_aligned_array_is_a_view_of_the_file_not_a_copy(tmp_path):
    header = npy_header("<f4", (1 << 20,))
    name = "w" * (-(30 + len(header) + len(".npy")) % 4 + 4) + ".npy"
    path = save_zip(tmp_path / "a.npz", [(name, header + bytes(4 << 20))])
    with open_arrays(path) as file:
        first, second = (file.read(name.removesuffix(".npy")) for _ in range(2))
    assert first.data_ptr() == second.data_ptr()


# -- Flax msgpack -----------------------------------------------------------------------------------------------------


def save_flax(path, tree):
    path.write_bytes(pack(tree))
    return path


@pytest.mark.parametrize("path", sorted(GOLDENS.glob("*.checkpoint_*")), ids=lambda path: path.name)
def test_a_checkpoint_that_flax_wrote_holds_the_weights_of_its_npz(path):
    expected = read_all(path.with_suffix(".npz"))
    with open_arrays(path) as file:
        assert file.kind == "msgpack"
        params = [name for name in file.shapes if name.startswith("0/")]
        assert sorted(name.removeprefix("0/") for name in params) == sorted(expected)
        for name in params:
            assert torch.equal(file.read(name), expected[name.removeprefix("0/")])
        moments = {file.dtypes[name] for name in file.shapes if name.startswith("1/") and file.shapes[name]}
        assert moments == {torch.bfloat16}
        assert file.read("2").item() == 3


def test_a_flax_tree_reads_with_its_numbers_chunks_and_gaps(tmp_path):
    big = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    chunks = {str(i): chunk for i, chunk in enumerate(np.split(big.reshape(-1), [10, 20]))}
    chunked = {"__msgpack_chunked_array__": True, "shape": {"0": 2, "1": 3, "2": 4}, "chunks": chunks}
    tree = {
        "0": {"head": {"kernel": chunked, "bias": np.float16([1, 2])}},
        "1": {"mu": None, "count": np.int32(5)},
        "2": 3,
        "lr": 0.1,
    }
    tensors = read_all(save_flax(tmp_path / "checkpoint_3", tree))
    assert list(tensors) == ["0/head/kernel", "0/head/bias", "1/count", "2", "lr"]
    assert torch.equal(tensors["0/head/kernel"], torch.from_numpy(big))
    assert tensors["0/head/bias"].tolist() == [1, 2]
    assert (tensors["1/count"].item(), tensors["2"].item(), tensors["lr"].item()) == (5, 3, 0.1)
    assert (tensors["1/count"].dtype, tensors["2"].dtype) == (torch.int32, torch.int64)


def deep_tree(levels):
    tree = {"w": np.zeros(1, np.float32)}
    for _ in range(levels):
        tree = {"a": tree}
    return tree


ONES = np.ones((2, 3), np.float32)
DEFECTIVE_FLAX = {
    "truncated": (pack({"0": ONES})[:-5], "before the end"),
    "trailing": (pack({"0": ONES}) + b"x", "to end with the file"),
    "a list": (pack({"0": (1, 2)}), "got list"),
    "a number as key": (b"\x81\x01\x02", "expected text"),
    "twice": (pack({"0": {"a/b": 1, "a": {"b": 2}}}), "got two"),
    "complex": (pack({"0": ONES.astype(np.complex64)}), "real values"),
    "a complex number": (b"\x81\xa1a" + pack_extension(2, pack((1.0, 2.0))), "complex"),
    "bool": (pack({"0": True}), "real number"),
    "unknown extension": (b"\x81\xa1a" + pack_extension(9, b"abc"), "got extension"),
    "path": (pack({"..": {"a": ONES}}), "array name"),
    "too deep": (pack(deep_tree(100)), "64 levels"),
    "lying map": (b"\xdf\xff\xff\xff\xff" + bytes(50), "entries"),
    "lying shape": (b"\x81\xa1a" + pack_extension(1, pack(((1 << 40,), "float32", b"1234"))), "4398046511104 bytes"),
    "overflowing shape": (b"\x81\xa1a" + pack_extension(1, pack(((1 << 62, 0), "float32", b""))), "fits in memory"),
    "negative shape": (b"\x81\xa1a" + pack_extension(1, pack(((-1, -4), "float32", b"1" * 16))), "sizes from 0"),
    "reserved byte": (b"\x81\xa1a\xc1", "0xc1"),
    "empty": (b"\x80", "pickle"),
    "chunks missing": (
        pack({"a": {"__msgpack_chunked_array__": True, "shape": {"0": 6}, "chunks": {"0": ONES[0]}}}),
        "6 elements",
    ),
    "huge integer": (b"\x81\xa1a\xcf" + b"\xff" * 8, r"below 2\*\*63"),
}


@pytest.mark.parametrize("defect", DEFECTIVE_FLAX)
def test_a_defective_flax_file_is_one_clear_error(tmp_path, defect):
    content, message = DEFECTIVE_FLAX[defect]
    path = tmp_path / "checkpoint_3"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"checkpoint_3: .*{message}"):
        read_all(path)


# -- defective and hostile .npz ---------------------------------------------------------------------------------------


def patched(path, old, new, *, count=-1):
    content = path.read_bytes()
    assert len(old) == len(new)
    assert old in content
    path.write_bytes(content.replace(old, new, count))
    return path


def with_header(path, header, data=b""):
    return save_zip(path, [("w.npy", header + data)])


def truncated(keep):
    def make(path):
        content = save_npz(path).read_bytes()
        path.write_bytes(content[: int(len(content) * keep)])

    return make


def overlapping(path):
    content = save_zip(path, [("a.npy", npy_bytes(ONES)), ("b.npy", npy_bytes(ONES))]).read_bytes()
    first = content.find(b"PK\x01\x02")
    second = content.find(b"PK\x01\x02", first + 1)
    path.write_bytes(content[:second] + content[first:second] + content[second + (second - first) :])


class RunsCode:
    def __reduce__(self):
        return (os.mkdir, ("ran",))


DEFECTIVE = {
    "empty file": (lambda path: path.write_bytes(b""), "empty"),
    "text": (lambda path: path.write_text("<html>404 not found</html>"), "begins with b'<html>40'"),
    "a single npy": (lambda path: path.write_bytes(npy_bytes(ONES)), "single .npy"),
    "a pickle": (lambda path: path.write_bytes(b"\x80\x04" + b"." * 20), "pickle"),
    "no members": (lambda path: save_zip(path, []), "at least one array"),
    "truncated early": (truncated(0.3), "zip directory"),
    "truncated late": (truncated(0.95), "zip directory"),
    "truncated by a byte": (lambda path: path.write_bytes(save_npz(path).read_bytes()[:-1]), "zip directory"),
    "trailing bytes": (lambda path: path.write_bytes(save_npz(path).read_bytes() + b"x"), "zip directory"),
    "leading bytes": (
        lambda path: path.write_bytes(b"PK\x03\x04xx" + save_npz(path).read_bytes()),
        "directory that ends",
    ),
    "a bit flipped in stored data": (
        lambda path: patched(save_npz(path), ARRAYS["cls"].tobytes(), b"\x01" + ARRAYS["cls"].tobytes()[1:]),
        "cls: expected data with checksum",
    ),
    "a bit flipped in the header": (lambda path: patched(save_npz(path), b"'descr'", b"'desCr'"), "header with descr"),
    "deflated data damaged": (
        lambda path: patched(
            save_zip(path, [("w.npy", npy_bytes(np.zeros(5000)))], zipfile.ZIP_DEFLATED), b"|\x00PK", b"|\x07PK"
        ),
        "w: expected",
    ),
    "a member twice": (
        lambda path: save_zip(path, [("w.npy", npy_bytes(ONES))] * 2),
        "w: expected one member of this name",
    ),
    "not an npy member": (lambda path: save_zip(path, [("w.txt", "hello")]), r"end in \.npy"),
    "not an npy content": (lambda path: save_zip(path, [("w.npy", "hello there")]), "version 1 to 3"),
    "npy version 9": (
        lambda path: with_header(path, npy_header("<f4", (1,), version=(9, 0)), bytes(4)),
        "version 1 to 3",
    ),
    "object": (lambda path: save_npz(path, {"w": np.array([RunsCode()], dtype=object)}), "w: expected real values"),
    "complex": (lambda path: save_npz(path, {"w": ONES.astype(complex)}), "w: expected real values"),
    "bool": (lambda path: save_npz(path, {"w": ONES > 0}), "w: expected real values"),
    "structured": (lambda path: save_npz(path, {"w": np.zeros(2, "f4,i4")}), "w: expected real values"),
    "void of 4 bytes": (lambda path: save_npz(path, {"w": np.zeros(2, "V4")}), "w: expected real values"),
    "text array": (lambda path: save_npz(path, {"w": np.array(["a"])}), "w: expected real values"),
    "fewer data than the shape": (
        lambda path: with_header(path, npy_header("<f4", (3, 3)), bytes(32)),
        "expected 36 bytes .*got 32",
    ),
    "more data than the shape": (
        lambda path: with_header(path, npy_header("<f4", (3, 3)), bytes(40)),
        "expected 36 bytes .*got 40",
    ),
    "a shape of 4 TiB": (
        lambda path: with_header(path, npy_header("<f4", (1 << 40,)), bytes(64)),
        "4398046511104 bytes",
    ),
    "an overflowing shape": (
        lambda path: with_header(path, npy_header("<f4", (1 << 62, 1 << 62, 0))),
        "fits in memory",
    ),
    "a negative shape": (lambda path: with_header(path, npy_header("<f4", (-2, -2)), bytes(16)), "sizes from 0"),
    "a shape of floats": (lambda path: with_header(path, npy_header("<f4", (2.0,)), bytes(8)), "sizes from 0"),
    "a header that is a program": (
        lambda path: with_header(path, npy_header("<f4", (1,)).replace(b"(1,)", b"f()+"), bytes(4)),
        "header with descr",
    ),
    "a header of 60 kB": (
        lambda path: with_header(path, npy_header("<f4", (1,) * 20_000), bytes(4)),
        "header of at most",
    ),
    "a deeply nested header": (
        lambda path: with_header(path, npy_header("(" * 5000, (1,)).replace(b"'(", b"(("), b""),
        "w: expected",
    ),
    "a path": (lambda path: save_zip(path, [("../w.npy", npy_bytes(ONES))]), "array name"),
    "an absolute path": (lambda path: save_zip(path, [("/etc/w.npy", npy_bytes(ONES))]), "array name"),
    "an empty name": (lambda path: save_zip(path, [(".npy", npy_bytes(ONES))]), "array name"),
    "a control character": (lambda path: save_zip(path, [("a\x1bb.npy", npy_bytes(ONES))]), "array name"),
    "encrypted": (
        lambda path: patched(
            save_zip(path, [("w.npy", npy_bytes(ONES))]),
            b"PK\x01\x02\x14\x03\x14\x00\x00",
            b"PK\x01\x02\x14\x03\x14\x00\x01",
        ),
        "encrypted",
    ),
    "bzip2": (lambda path: save_zip(path, [("w.npy", npy_bytes(ONES))], zipfile.ZIP_BZIP2), "zip method 12"),
    "overlapping members": (overlapping, "members overlap"),
    "a folder": (lambda path: path.mkdir(), "a folder"),
}


@pytest.mark.reliability(row="W01")
@pytest.mark.parametrize("defect", DEFECTIVE)
def test_a_defective_npz_is_one_clear_error(tmp_path, monkeypatch, defect):
    monkeypatch.chdir(tmp_path)
    make, message = DEFECTIVE[defect]
    make(tmp_path / "a.npz")
    with pytest.raises(CheckpointError, match=rf"a\.npz: .*({message})"):
        read_all(tmp_path / "a.npz")
    assert not Path("ran").exists()


def test_a_missing_file_stays_file_not_found(tmp_path):
    with pytest.raises(FileNotFoundError):
        open_arrays(tmp_path / "a.npz")


def test_more_than_max_bytes_is_refused_before_reading(tmp_path):
    path = save_npz(tmp_path / "a.npz")
    total = sum(array.nbytes for array in ARRAYS.values())
    assert len(read_all(path, max_bytes=total)) == 3
    with pytest.raises(CheckpointError, match=f"at most {total - 1} bytes of arrays, got {total}"):
        open_arrays(path, max_bytes=total - 1)


@pytest.mark.reliability(row="W03")
def test_a_zip_bomb_is_refused_from_its_directory_without_memory(tmp_path):
    with (
        zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("w.npy", "w") as member,
    ):
        member.write(npy_header("<f4", (1 << 24,)))
        for _ in range(64):
            member.write(bytes(1 << 20))
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="zip bomb"):
            open_arrays(tmp_path / "bomb.npz")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_directory_of_too_many_members_is_refused_from_its_count(tmp_path):
    path = save_zip(tmp_path / "a.npz", [(f"{index}.npy", b"") for index in range(10_001)])
    with pytest.raises(CheckpointError, match=r"at most 10000 members .* got 10001"):
        open_arrays(path)


@pytest.mark.parametrize(
    ("compression", "message"),
    [(zipfile.ZIP_DEFLATED, "bytes unpacked, got more"), (zipfile.ZIP_STORED, "stored bytes, got")],
    ids=["deflated", "stored"],
)
def test_a_member_with_more_data_than_it_announces_is_refused(tmp_path, compression, message):
    content = npy_header("<f8", (999,)) + bytes(8000)
    path = save_zip(tmp_path / "a.npz", [("w.npy", content)], compression)
    with zipfile.ZipFile(path) as archive:
        packed = archive.getinfo("w.npy").compress_size
    sizes = [struct.pack("<II", packed, size) for size in (len(content), len(content) - 8)]
    with pytest.raises(CheckpointError, match=f"w.*: expected .*{message}"):
        read_all(patched(path, *sizes))


# -- writing ----------------------------------------------------------------------------------------------------------


def test_written_npz_has_the_bytes_of_numpy_savez(tmp_path):
    arrays = {
        **ARRAYS,
        "step": np.int64(3),
        "half": np.float16([[1, 2]]),
        "none": np.zeros((0, 2)),
    }
    save_npz(tmp_path / "numpy.npz", arrays)
    write_npz(tmp_path / "ours.npz", read_all(tmp_path / "numpy.npz").items())
    assert (tmp_path / "ours.npz").read_bytes() == (tmp_path / "numpy.npz").read_bytes()


def test_written_bfloat16_has_the_header_that_jax_arrays_get(tmp_path):
    write_npz(tmp_path / "a.npz", [("b", torch.arange(4, dtype=torch.bfloat16))])
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        assert b"'descr': '<V2'" in archive.read("b.npy")


def test_written_npz_takes_non_contiguous_tensors_and_gradients(tmp_path):
    tensor = torch.arange(6.0).view(2, 3).t().requires_grad_()
    write_npz(tmp_path / "a.npz", [("w", tensor)])
    assert torch.equal(read_all(tmp_path / "a.npz")["w"], tensor)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([("w", torch.zeros(1)), ("w", torch.zeros(1))], "'w' twice"),
        ([("w", torch.zeros(1, dtype=torch.bool))], "torch.bool"),
        ([("a/../w", torch.zeros(1))], "array name"),
    ],
)
def test_what_no_reader_would_take_is_not_written(tmp_path, pairs, message):
    (tmp_path / "a.npz").write_text("old")
    with pytest.raises(ValueError, match=message):
        write_npz(tmp_path / "a.npz", pairs)
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]
    assert (tmp_path / "a.npz").read_text() == "old"


def test_a_tensor_is_let_go_before_the_next_is_asked_for(tmp_path):
    alive = weakref.WeakSet()

    def produce():
        for index in range(3):
            assert not alive
            tensor = torch.full((4,), float(index))
            alive.add(tensor)
            yield f"w{index}", tensor
            del tensor

    write_npz(tmp_path / "a.npz", produce())
    assert list(read_all(tmp_path / "a.npz")) == ["w0", "w1", "w2"]
