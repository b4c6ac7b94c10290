"""Reading pictures: 31 odd files made here, each read right or refused by name."""

from pathlib import Path

import numpy as np
import pytest
import torch
from odd_images import HEIGHT, JPEG_LOSS, READ_RIGHT, REFUSED, SCENE, WIDTH, png, saved, turned
from PIL import Image

from hf_vit.data.datasets import load_splits
from hf_vit.data.images import ImageError, read_image, read_pixels
from hf_vit.image_processing_hf_vit import PROTOCOLS, HfViTImageProcessor, HfViTImageProcessorPil


def test_there_are_thirty_one_odd_files():
    assert len(READ_RIGHT) + len(REFUSED) == 31


@pytest.mark.reliability(row="I01")
@pytest.mark.parametrize("name", READ_RIGHT)
def test_an_odd_picture_is_read_right(name, tmp_path):
    write, expected, tolerance = READ_RIGHT[name]
    write(tmp_path / name)
    image = read_image(tmp_path / name)
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image).astype(int) - expected).max() <= tolerance
    assert torch.equal(read_pixels(tmp_path / name).permute(1, 2, 0), torch.from_numpy(np.array(image)))


@pytest.mark.reliability(row="I01")
@pytest.mark.parametrize("name", READ_RIGHT)
def test_the_processor_reads_odd_files_alike(name, tmp_path):
    READ_RIGHT[name][0](tmp_path / name)
    processor = HfViTImageProcessor(size=16)
    from_path = processor(tmp_path / name, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(from_path, processor.to_pixels(read_image(tmp_path / name)))


@pytest.mark.reliability(row="I01")
@pytest.mark.filterwarnings("ignore:Image size:PIL.Image.DecompressionBombWarning")  # Pillow's own, before ours
@pytest.mark.filterwarnings("ignore:Truncated File Read:UserWarning")
@pytest.mark.parametrize("read", [read_image, read_pixels])
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_whole_picture_is_refused_by_name(name, read, tmp_path):
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
        with pytest.raises(ImageError, match="picture is 9000x9000: expected at most 1,000,000 pixels"):
            read(png(9000, 9000, b""), max_pixels=10**6)


@pytest.mark.reliability(row="I04")
@pytest.mark.filterwarnings("ignore:Image size:PIL.Image.DecompressionBombWarning")
def test_the_processor_refuses_a_bomb_by_its_path(monkeypatch, tmp_path):
    def load(self):
        raise AssertionError("decoded")

    (tmp_path / "bomb.png").write_bytes(png(12000, 12000, b""))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    with pytest.raises(ValueError, match="picture is 12000x12000: expected at most 89,478,485 pixels"):
        HfViTImageProcessor()(tmp_path / "bomb.png")


def test_a_turned_file_of_two_pictures_comes_upright(tmp_path):
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
    with pytest.raises(ImageError, match="picture of 5 bytes: expected a picture"):
        read_image(b"hello")


def test_without_torchvisions_decoder_pillow_reads_the_same(monkeypatch, tmp_path):
    path = tmp_path / "color.jpg"
    READ_RIGHT["color.jpg"][0](path)
    quick = read_pixels(path)
    monkeypatch.setattr("hf_vit.data.images._jpeg_decoder", lambda: None)
    assert torch.equal(read_pixels(path), quick)


def test_torchvisions_decoder_is_used_for_plain_jpegs(monkeypatch, tmp_path):
    path = tmp_path / "color.jpg"
    READ_RIGHT["color.jpg"][0](path)
    marked = torch.zeros(3, 2, 2, dtype=torch.uint8)
    monkeypatch.setattr("hf_vit.data.images._jpeg_decoder", lambda: lambda data, mode: marked)
    assert read_pixels(path) is marked


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_quick_way_gives_the_protocols_pixels(protocol, tmp_path):
    path = tmp_path / "color.jpg"
    READ_RIGHT["color.jpg"][0](path)
    processor = HfViTImageProcessor(protocol=protocol, size=16)
    with Image.open(path) as image:
        expected = processor(image, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(processor.to_pixels(read_pixels(path)), expected)


def ways_in(folder):
    """Returns {name: a function from a file in a class folder of `folder` to the upright (H, W, 3) pixels}."""
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
        "processor of an open picture": through_pil,
        "the PIL processor of an open picture": through_pil_backend,
        "a dataset": through_dataset,
        "a stream": through_stream,
    }


@pytest.mark.reliability(row="I02")
@pytest.mark.parametrize("orientation", [3, 6, 8])
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_turned_picture_is_upright_at_every_way_in(suffix, orientation, figure, tmp_path):
    turns = {3: 2, 6: 1, 8: 3}  # quarters against the clock that undo it, as stored
    stored = Image.fromarray(np.ascontiguousarray(np.rot90(SCENE, turns[orientation])))
    for name in ("one", "two"):
        (tmp_path / "cat").mkdir(exist_ok=True)
        path = tmp_path / "cat" / f"{name}.{suffix}"
        stored.save(path, exif=turned(orientation), **({"quality": 95} if suffix == "jpg" else {}))
    tolerance = JPEG_LOSS if suffix == "jpg" else 0
    ways = ways_in(tmp_path)
    for name, read in ways.items():
        found = read(path)
        assert found.shape == SCENE.shape, name
        assert np.abs(found.astype(int) - SCENE).max() <= tolerance, name
    figure("ways in that are upright", f"{len(ways)}/{len(ways)}")


@pytest.mark.reliability(row="I02")
def test_pictures_are_opened_in_two_places_only():
    root = Path(__file__).parents[2]
    files = [path for folder in ("src", "examples") for path in (root / folder).rglob("*.py")]
    opening = {path.name for path in files if "Image.open(" in path.read_text(encoding="utf-8")}
    assert opening == {"images.py", "image_processing_hf_vit.py"}
