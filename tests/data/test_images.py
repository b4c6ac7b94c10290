"""Reading images: 31 unusual files made here, each read correctly or refused by name; bands, arrays, reduced JPEGs."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from npz_files import npy_header
from odd_images import HEIGHT, JPEG_LOSS, READ_RIGHT, REFUSED, SCENE, WIDTH, png, saved, tiff, turned
from PIL import Image, ImageOps

from hf_vit.data.datasets import load_splits
from hf_vit.data.images import ImageError, read_image, read_pixels
from hf_vit.image_processing_hf_vit import PROTOCOLS, HfViTImageProcessor, HfViTImageProcessorPil
from hf_vit.image_resizing import undecoded_jpeg


def test_there_are_thirty_one_unusual_files():
    assert len(READ_RIGHT) + len(REFUSED) == 31


@pytest.mark.reliability(row="I01")
@pytest.mark.parametrize("name", READ_RIGHT)
def test_an_unusual_image_is_read_correctly(name, tmp_path):
    write, expected, tolerance = READ_RIGHT[name]
    write(tmp_path / name)
    image = read_image(tmp_path / name)
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image).astype(int) - expected).max() <= tolerance
    assert torch.equal(read_pixels(tmp_path / name).permute(1, 2, 0), torch.from_numpy(np.array(image)))


@pytest.mark.reliability(row="I01")
@pytest.mark.parametrize("name", READ_RIGHT)
def test_the_processor_reads_unusual_files_the_same(name, tmp_path):
    READ_RIGHT[name][0](tmp_path / name)
    processor = HfViTImageProcessor(size=16)
    from_path = processor(tmp_path / name, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(from_path, processor.to_pixels(read_image(tmp_path / name)))


@pytest.mark.reliability(row="I01")
@pytest.mark.filterwarnings("ignore:Image size:PIL.Image.DecompressionBombWarning")  # Pillow's own, before ours
@pytest.mark.filterwarnings("ignore:Truncated File Read:UserWarning")
@pytest.mark.parametrize("read", [read_image, read_pixels])
@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_is_not_a_complete_image_is_refused_by_name(name, read, tmp_path):
    write, said = REFUSED[name]
    write(tmp_path / name)
    with pytest.raises(ImageError, match=said) as refusal:
        read(tmp_path / name)
    assert str(refusal.value).startswith(str(tmp_path / name) + ": ")


@pytest.mark.reliability(row="I04")
def test_a_bomb_is_refused_before_it_is_decoded(monkeypatch):
    def load(self):
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    for read in (read_image, read_pixels):
        with pytest.raises(ImageError, match="image is 9000x9000: expected at most 1,000,000 pixels"):
            read(png(9000, 9000, b""), max_pixels=10**6)


@pytest.mark.reliability(row="I04")
@pytest.mark.filterwarnings("ignore:Image size:PIL.Image.DecompressionBombWarning")
def test_the_processor_refuses_a_bomb_by_its_path(monkeypatch, tmp_path):
    def load(self):
        raise AssertionError("decoded")

    (tmp_path / "bomb.png").write_bytes(png(12000, 12000, b""))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    with pytest.raises(ValueError, match="image is 12000x12000: expected at most 89,478,485 pixels"):
        HfViTImageProcessor()(tmp_path / "bomb.png")


def test_a_rotated_file_of_two_images_becomes_upright(tmp_path):
    path = tmp_path / "phone.jpg"
    stored = [Image.fromarray(np.ascontiguousarray(SCENE[::-1, ::-1])), Image.new("RGB", (WIDTH, HEIGHT))]
    stored[0].save(path, format="MPO", save_all=True, append_images=stored[1:], exif=turned(3), quality=95)
    for got in (np.asarray(read_image(path)), read_pixels(path).permute(1, 2, 0).numpy()):
        assert np.abs(got.astype(int) - SCENE).max() <= JPEG_LOSS


def test_every_kind_of_source_is_read_and_named(tmp_path):
    path = tmp_path / "scene.png"
    saved(SCENE, path)
    with path.open("rb") as file:
        for source in (path, str(path), path.read_bytes(), file, Image.fromarray(SCENE)):
            assert np.array_equal(np.asarray(read_image(source)), SCENE)
        assert not file.closed
    with pytest.raises(ImageError, match=r"missing\.png: .*No such file"):
        read_image(tmp_path / "missing.png")
    with pytest.raises(ImageError, match="image of 5 bytes: expected an image"):
        read_image(b"hello")


def test_torchvisions_decoder_gives_pillows_pixels(tmp_path):
    for subsampling in (0, 2):  # 4:4:4 and 4:2:0
        path = tmp_path / f"{subsampling}.jpg"
        saved(SCENE, path, quality=90, subsampling=subsampling)
        with Image.open(path) as image:
            decoded = undecoded_jpeg(image)
            assert decoded is not None
            assert torch.equal(read_pixels(path), decoded)
            assert np.array_equal(decoded.permute(1, 2, 0), image)
            assert undecoded_jpeg(image) is None  # Pillow has decoded it


def test_the_processor_reads_a_path_by_torchvisions_decoder(monkeypatch, tmp_path):
    saved(SCENE, tmp_path / "color.jpg", quality=95)
    marked = torch.full((3, 9, 9), 255, dtype=torch.uint8)
    monkeypatch.setattr("hf_vit.image_processing_hf_vit.undecoded_jpeg", lambda image: marked)
    assert (HfViTImageProcessor(size=4).to_pixels(Image.open(tmp_path / "color.jpg")) != 1).any()
    assert (HfViTImageProcessor(size=4)(tmp_path / "color.jpg", return_tensors="pt").pixel_values == 1).all()
    assert (HfViTImageProcessorPil(size=4)(tmp_path / "color.jpg", return_tensors="pt").pixel_values != 1).any()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_fast_path_gives_the_protocols_pixels(protocol, tmp_path):
    path = tmp_path / "color.jpg"
    READ_RIGHT["color.jpg"][0](path)
    processor = HfViTImageProcessor(protocol=protocol, size=16)
    with Image.open(path) as image:
        expected = processor(image, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(processor.to_pixels(read_pixels(path)), expected)


def entry_points(folder):
    """Return {name: a function from a file in a class folder of `folder` to the upright (H, W, 3) pixels}."""
    processor = HfViTImageProcessor(do_resize=False, do_rescale=False, do_normalize=False)

    def processed(source):
        return processor(source, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)

    def through_pil(path):
        with Image.open(path) as image:
            return processed(image)

    def through_pil_backend(path):
        with Image.open(path) as image:
            pil = HfViTImageProcessorPil(do_resize=False, do_rescale=False, do_normalize=False)
            return pil(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)

    def through_dataset(path):
        part = load_splits(str(folder), test_size=0.5)["train"]
        return np.asarray(next(row["image"] for row in part))

    def through_stream(path):
        part = load_splits(str(folder), test_size=0.5, streaming=True)["train"]
        return np.asarray(next(row["image"] for row in part))

    return {
        "read_image": lambda path: np.asarray(read_image(path)),
        "read_image of bytes": lambda path: np.asarray(read_image(path.read_bytes())),
        "read_pixels": lambda path: read_pixels(path).permute(1, 2, 0).numpy(),
        "processor of a path": processed,
        "processor of an open image": through_pil,
        "the PIL processor of an open image": through_pil_backend,
        "a dataset": through_dataset,
        "a stream": through_stream,
    }


@pytest.mark.reliability(row="I02")
@pytest.mark.parametrize("orientation", [3, 6, 8])
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_rotated_image_is_upright_at_every_entry_point(suffix, orientation, figure, tmp_path):
    turns = {3: 2, 6: 1, 8: 3}  # quarter turns, counter-clockwise, that undo it
    stored = Image.fromarray(np.ascontiguousarray(np.rot90(SCENE, turns[orientation])))
    for name in ("cat/one", "cat/two", "dog/one", "dog/two"):
        path = tmp_path / f"{name}.{suffix}"
        path.parent.mkdir(exist_ok=True)
        stored.save(path, exif=turned(orientation), **({"quality": 95} if suffix == "jpg" else {}))
    tolerance = JPEG_LOSS if suffix == "jpg" else 0
    ways = entry_points(tmp_path)
    for name, read in ways.items():
        found = read(path)
        assert found.shape == SCENE.shape, name
        assert np.abs(found.astype(int) - SCENE).max() <= tolerance, name
    figure("ways in that are upright", f"{len(ways)}/{len(ways)}")


@pytest.mark.reliability(row="I02")
def test_images_are_opened_in_two_places_only():
    root = Path(__file__).parents[2]
    files = [path for folder in ("src", "examples") for path in (root / folder).rglob("*.py")]
    opening = {path.name for path in files if "Image.open(" in path.read_text(encoding="utf-8")}
    assert opening == {"images.py", "image_processing_hf_vit.py"}


# --- channels, ranges and reduced sizes ---


def in_bytes(image, kind="TIFF", **options):
    file = BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("dtype", ["u1", "u2", "i4", "f4", "f8"])
@pytest.mark.parametrize("bands", [2, 3, 4, 5, 13])
def test_a_tiff_of_any_bands_is_read_exactly(bands, dtype, order):
    values = np.random.default_rng(0).integers(0, 256, (37, 23, bands))
    stored = (values * 257 if dtype == "u2" else values / 255 if dtype[0] == "f" else values).astype(dtype)
    expected = torch.from_numpy(values.astype(np.uint8)).permute(2, 0, 1)
    for options in ({}, {"tile": 16}, {"planar": True}, {"planar": True, "tile": 16}):
        for packed in ({}, {"deflate": True}, {"deflate": True, "predictor": dtype[0] != "f"}):
            content = tiff(stored, order=order, **options, **packed)
            assert torch.equal(read_pixels(content, num_channels=bands), expected), (options, packed)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_rotated_tiff_of_many_bands_becomes_upright(orientation):
    values = np.random.default_rng(0).integers(0, 256, (9, 5, 6), dtype=np.uint8)
    got = read_pixels(tiff(values, orientation=orientation), num_channels=6)
    for band in range(6):
        gray = Image.open(BytesIO(in_bytes(values[..., band], exif=turned(orientation))))
        assert np.array_equal(got[band], ImageOps.exif_transpose(gray))


def test_arrays_in_npy_files_are_images(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (9, 7, 6), dtype=np.uint8)
    for array in (values, values.transpose(2, 0, 1), (values / 255).astype(np.float32)):
        np.save(tmp_path / "image.npy", array)
        assert np.array_equal(read_pixels(tmp_path / "image.npy", num_channels=6), values.transpose(2, 0, 1))
    np.save(tmp_path / "gray.npy", values[..., 0])
    assert np.array_equal(read_image(tmp_path / "gray.npy"), np.repeat(values[..., :1], 3, axis=2))
    with pytest.raises(ImageError, match=r"image\.npy: image has shape \(9, 7, 6\): expected 3 channels"):
        read_image(tmp_path / "image.npy")
    with pytest.raises(ImageError, match=r"image is 7x9: expected at most 10 pixels"):
        read_pixels(tmp_path / "image.npy", num_channels=6, max_pixels=10)
    (tmp_path / "object.npy").write_bytes(npy_header("|O", (1,)) + bytes(8))
    with pytest.raises(ImageError, match=r"object\.npy: image has dtype object: expected integers"):
        read_pixels(tmp_path / "object.npy")


def test_four_channels_are_kept_where_four_are_meant():
    four = np.random.default_rng(0).integers(0, 256, (9, 7, 4), dtype=np.uint8)
    for content in (in_bytes(four, "PNG"), in_bytes(four), in_bytes(Image.fromarray(four).convert("RGBA"), "PNG")):
        assert np.array_equal(read_image(content, num_channels=4), four)
        assert np.array_equal(read_pixels(content, num_channels=4), four.transpose(2, 0, 1))
    with pytest.raises(ImageError, match="image of mode RGB has 3 channels: expected 4"):
        read_image(in_bytes(four[..., :3], "PNG"), num_channels=4)
    with pytest.raises(ImageError, match="image has 5 bands: expected 3, the channels of the model"):
        read_image(tiff(np.zeros((9, 7, 5), np.uint8)))
    with pytest.raises(ValueError, match="num_channels is 5: expected 1, 3 or 4; read_pixels reads any number"):
        read_image(in_bytes(four), num_channels=5)


@pytest.mark.parametrize("read", [read_image, read_pixels])
def test_the_range_of_a_deep_image_never_depends_on_its_values(read):
    ramp = np.tile(np.arange(0, 256, 16), (8, 1))

    def brightest(values, **options):
        return int(np.asarray(read(in_bytes(values), **options)).max())

    assert brightest(ramp.astype(np.int32)) == 240
    assert brightest((ramp * 16).astype(np.uint16)) == 15  # of 65535, though all are below 4096
    assert brightest((ramp * 16).astype(np.uint16), value_range=(0, 4095)) == 239
    assert brightest((ramp * 20).astype(np.int32), value_range=(0, 5100)) == 240
    assert brightest(ramp.astype(np.uint16), value_range=(0, 65535)) == 1
    assert brightest((ramp / 510).astype(np.float32)) == 120
    for most in (1.0001, 255, 255.5, 65535):
        values = (ramp / 240 * most).astype(np.float32)
        assert brightest(values, value_range=(0, most)) == 255
        with pytest.raises(ImageError, match=r"float32 values 0\.\.\..*: expected 0\.\.\.1; give the range of all"):
            brightest(values)
    with pytest.raises(ImageError, match=r"int32 values 0\.\.\.4800: expected 0\.\.\.255; give the range of all"):
        brightest((ramp * 20).astype(np.int32))
    with pytest.raises(ImageError, match=r"uint16 values 0\.\.\.240, which fit 0\.\.\.255 as well as 0\.\.\.65535"):
        brightest(ramp.astype(np.uint16))


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_large_jpeg_is_decoded_at_a_reduced_scale(orientation):
    photo = Image.fromarray(SCENE).resize((800, 480), Image.Resampling.BICUBIC)
    content = in_bytes(photo, "JPEG", quality=95, exif=turned(orientation))
    full = read_pixels(content)
    assert torch.equal(read_pixels(content, at_least=(241, 400) if orientation == 1 else (400, 241)), full)
    for scale in (2, 4, 8):
        height, width = (side // scale for side in full.shape[1:])
        reduced = read_pixels(content, at_least=(height, width))
        assert reduced.shape == (3, height, width)
        means = torch.nn.functional.avg_pool2d(full.float(), scale)
        assert (reduced - means).abs().mean() < 2  # of 255
    assert torch.equal(
        read_pixels(in_bytes(photo, "PNG"), at_least=(9, 9)).permute(1, 2, 0), torch.from_numpy(np.array(photo))
    )
    with pytest.raises(ImageError, match="image is 800x480: expected at most 100,000 pixels"):
        read_pixels(in_bytes(photo, "JPEG"), at_least=(60, 100), max_pixels=100_000)
    with pytest.raises(ValueError, match="at_least is"):
        read_pixels(content, at_least=(0, 9))
