"""The image processor: each protocol against its reference, both backends, inputs, and files from elsewhere."""

import json
import logging
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image
from transformers import ViTImageProcessor
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
from transformers.utils import logging as transformers_logging

from hf_vit.image_processing_hf_vit import PROTOCOLS, HfViTImageProcessor, HfViTImageProcessorPil
from hf_vit.image_resizing import MAX_PIXELS


GOLDENS = Path(os.environ.get("HF_VIT_GOLDENS", Path(__file__).parents[1] / "goldens"))
BACKENDS = pytest.mark.parametrize("processor_class", [HfViTImageProcessor, HfViTImageProcessorPil])
EACH_PROTOCOL = pytest.mark.parametrize("protocol", PROTOCOLS)
STEP = 1 / 255


def recorded_fields(operation):
    """Return the fields that describe one recorded TensorFlow operation, such as `bv_small56_central48`."""
    name, _, size = operation.rpartition("_")
    if name == "vit_jax_eval":
        return {"size": int(size)}
    if name in ("lit", "bv_resize"):
        return {"size": int(size), "rounding": "truncate"}
    if name == "lit_crop":
        edge = {"shortest_edge": int(size)}
        return {"size": edge, "do_center_crop": True, "crop_size": int(size), "rounding": "truncate"}
    edge, size = operation.removeprefix("bv_small").split("_central")
    return {"protocol": "big_vision", "size": {"shortest_edge": int(edge)}, "crop_size": int(size)}


def recorded():
    """Yield each recorded operation: its name, the image and TensorFlow's pixels as (C, h, w)."""
    with np.load(GOLDENS / "preproc.npz") as file:
        for name in file.files:
            image, operation = name.split("/")
            if operation != "u8":
                yield operation, file[f"{image}/u8"], torch.from_numpy(file[name]).permute(2, 0, 1)


@pytest.fixture
def photo():
    """Return an image of 250 x 188 with detail at every scale, so that filters, rounding and offsets all show."""
    random = np.random.default_rng(0)
    coarse = Image.fromarray(random.integers(0, 256, (15, 20, 3), dtype=np.uint8)).resize((250, 188))
    noise = random.integers(-20, 21, (188, 250, 3))
    return Image.fromarray((np.asarray(coarse).astype(int) + noise).clip(0, 255).astype(np.uint8))


def pixels(processor, image, **options):
    return torch.as_tensor(processor(image, return_tensors="pt", **options)["pixel_values"])[0]


# --- protocols against their references ---


@BACKENDS
def test_reference_protocols_give_the_pixels_of_tensorflow(processor_class):
    seen = set()
    for operation, image, expected in recorded():
        got = pixels(processor_class(**recorded_fields(operation)), image)
        assert (got - expected).abs().max() <= 5e-7, operation
        seen.add(operation.rstrip("0123456789_"))
    assert {"vit_jax_eval", "lit", "lit_crop", "bv_resize"} < seen


def test_an_antialiased_filter_is_not_the_reference():
    worst = {}
    for operation, image, expected in recorded():
        if operation.startswith("vit_jax"):
            got = pixels(HfViTImageProcessor(protocol="transformers", size=expected.shape[1]), image)
            worst[operation] = float((got - expected).abs().max())
    assert max(worst.values()) > 0.1


@EACH_PROTOCOL
def test_backends_give_equal_pixels(protocol, photo):
    fields = {"protocol": protocol, "image_mean": 0.0, "image_std": 1.0}
    for image in (photo, photo.transpose(Image.Transpose.ROTATE_90), photo.resize((97, 31))):
        on_torchvision, on_pil = (pixels(c(**fields), image) for c in (HfViTImageProcessor, HfViTImageProcessorPil))
        assert (on_torchvision - on_pil).abs().max() <= STEP + 1e-6


def test_transformers_protocol_is_the_stock_processor(photo):
    for ours, stock in ((HfViTImageProcessor, ViTImageProcessor), (HfViTImageProcessorPil, ViTImageProcessorPil)):
        difference = pixels(ours(protocol="transformers"), photo) - pixels(stock(), photo)
        assert difference.abs().max() <= 1e-6


@BACKENDS
@pytest.mark.parametrize("crop_mode", ["center", "squash"])
def test_timm_protocol_is_the_transform_of_timm(processor_class, crop_mode, photo, tmp_path):
    pretrained = {
        "input_size": [3, 96, 96],
        "crop_pct": 0.9,
        "crop_mode": crop_mode,
        "interpolation": "bicubic",
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    }
    config = {"architecture": "vit_tiny_patch16_224", "pretrained_cfg": pretrained}
    (tmp_path / "config.json").write_text(json.dumps(config))
    expected = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=pretrained))
    processor = processor_class.from_pretrained(tmp_path)
    for image in (photo, photo.transpose(Image.Transpose.ROTATE_90), photo.resize((211, 120)), photo.resize((60, 90))):
        assert (pixels(processor, image) - expected(image)).abs().max() <= 2e-6


@pytest.mark.parametrize(
    ("protocol", "resized", "left", "top"), [("big_vision", (341, 256), 58, 16), ("timm", (330, 248), 53, 12)]
)
def test_cropping_protocols_keep_the_centre_as_documented(protocol, resized, left, top, photo):
    image, size = photo.resize((500, 375)), {"width": resized[0], "height": resized[1]}
    resized_image = pixels(HfViTImageProcessor(protocol=protocol, do_center_crop=False, size=size), image)
    assert torch.equal(
        pixels(HfViTImageProcessor(protocol=protocol), image), resized_image[:, top : top + 224, left : left + 224]
    )


# --- fields ---


@BACKENDS
@EACH_PROTOCOL
def test_a_saved_processor_comes_back_with_every_field(processor_class, protocol, tmp_path):
    processor = processor_class(protocol=protocol, size=48)
    processor.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "preprocessor_config.json").read_text())
    explicit = set(PROTOCOLS["timm"]) - ({"crop_pct"} if not processor.do_center_crop else set())
    assert explicit | {"protocol", "size", "image_mean", "image_std", "num_channels", "rescale_factor"} <= set(written)
    assert processor_class.from_pretrained(tmp_path).to_dict() == processor.to_dict()


@EACH_PROTOCOL
def test_size_is_what_the_model_sees(protocol, photo):
    model = SimpleNamespace(image_size=(32, 48), num_channels=3)
    assert pixels(HfViTImageProcessor.for_model(model, protocol=protocol), photo).shape == (3, 32, 48)
    processor = HfViTImageProcessor(protocol=protocol, size=64)
    assert pixels(processor, photo).shape == (3, 64, 64)
    assert pixels(processor, photo, size={"height": 40, "width": 40}).shape == (3, 40, 40)


@EACH_PROTOCOL
def test_size_given_at_load_is_what_the_model_sees(protocol, tmp_path):
    HfViTImageProcessor(protocol=protocol, size=64).save_pretrained(tmp_path)
    loaded = HfViTImageProcessor.from_pretrained(tmp_path, size={"height": 96, "width": 96})
    assert loaded.to_dict() == HfViTImageProcessor(protocol=protocol, size=96).to_dict()


def test_transfer_ratio_of_big_vision_is_a_field():
    processor = HfViTImageProcessor(protocol="big_vision", size=384, crop_pct=384 / 448)
    assert (dict(processor.size), dict(processor.crop_size)) == ({"shortest_edge": 448}, {"height": 384, "width": 384})


def test_another_protocol_replaces_the_fields_of_the_saved_one(tmp_path, photo):
    HfViTImageProcessor(protocol="timm", size=64).save_pretrained(tmp_path)
    changed = HfViTImageProcessor.from_pretrained(tmp_path, protocol="transformers")
    assert changed.to_dict() == HfViTImageProcessor(protocol="transformers", size=64).to_dict()


def test_wrong_fields_are_refused_by_name(photo):
    with pytest.raises(ValueError, match="protocol is 'jax': expected one of vit_jax, big_vision"):
        HfViTImageProcessor(protocol="jax")
    with pytest.raises(ValueError, match="rounding is 'floor': expected one of none"):
        HfViTImageProcessor(rounding="floor")
    with pytest.raises(ValueError, match="build another with protocol="):
        HfViTImageProcessor()(photo, protocol="timm")
    with pytest.raises(ValueError, match="resample is BICUBIC with antialias=False: expected BILINEAR or BOX"):
        HfViTImageProcessor(resample=3)(photo)
    with pytest.raises(ValueError, match=r"size is \{'longest_edge': 9\}: expected height and width"):
        HfViTImageProcessor(size={"longest_edge": 9})(photo)
    with pytest.raises(ValueError, match="do_pad is set"):
        HfViTImageProcessor()(photo, do_pad=True, pad_size=300)


# --- files from elsewhere ---


@pytest.mark.parametrize("kind", ["ViTImageProcessor", "ViTImageProcessorFast", "ViTFeatureExtractor", None])
def test_a_stock_file_becomes_the_transformers_protocol(kind, tmp_path, photo):
    stock = ViTImageProcessor(size={"height": 64, "width": 64}, image_mean=[0.4] * 3, image_std=[0.2] * 3)
    fields = stock.to_dict() | {"image_processor_type": kind, "size": 64}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(fields))
    processor = HfViTImageProcessor.from_pretrained(tmp_path)
    assert processor.protocol == "transformers"
    assert (pixels(processor, photo) - pixels(stock, photo)).abs().max() <= 1e-6


def test_deit_file_crops_after_a_bicubic_squash(tmp_path, photo):
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "DeiTImageProcessor"}')
    small = photo.resize((256, 256), Image.Resampling.BICUBIC).crop((16, 16, 240, 240))
    expected = torch.from_numpy(np.array(small)).permute(2, 0, 1) / 127.5 - 1
    assert (pixels(HfViTImageProcessor.from_pretrained(tmp_path), photo) - expected).abs().max() <= 1e-6


def test_the_file_of_another_model_is_refused(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "CLIPImageProcessor"}')
    with pytest.raises(ValueError, match="CLIPImageProcessor: expected HfViTImageProcessor, ViTImageProcessor"):
        HfViTImageProcessor.from_pretrained(tmp_path)


@BACKENDS
@pytest.mark.parametrize(
    ("name", "protocol", "size"), [("vit_p16_tok_rep", "vit_jax", (64, 64)), ("bv_gap_bf16", "big_vision", (64, 64))]
)
def test_an_original_checkpoint_has_the_protocol_of_its_code(processor_class, name, protocol, size, photo):
    source = Path(__file__).parents[1] / "goldens" / f"{name}.npz"
    for processor in (processor_class.from_pretrained(source), processor_class.from_pretrained(str(source))):
        assert type(processor) is processor_class
        assert processor.protocol == protocol
        assert processor(photo, return_tensors="pt").pixel_values.shape[2:] == size
    assert not processor_class.from_pretrained(source, do_normalize=False).do_normalize


def test_weights_of_pytorch_code_have_no_processor_of_their_own(tmp_path):
    (tmp_path / "model.pth").write_bytes(b"\x80\xfe")
    with pytest.raises(OSError, match=r"weights alone have no image processor; make one with .*for_model"):
        HfViTImageProcessor.from_pretrained(tmp_path / "model.pth")


def test_a_folder_without_a_processor_is_refused(tmp_path):
    with pytest.raises(OSError, match="Can't load image processor"):
        HfViTImageProcessor.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(OSError, match="Can't load image processor"):
        HfViTImageProcessor.from_pretrained(tmp_path)


def test_timm_crops_that_cannot_be_kept_are_refused(tmp_path):
    for pretrained, said in (
        ({"crop_mode": "border"}, "crop_mode is border at 224x224"),
        ({"input_size": [3, 96, 64]}, "crop_mode is center at 96x64"),
        ({"interpolation": "random"}, "interpolation is random"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": pretrained}))
        with pytest.raises(ValueError, match=said):
            HfViTImageProcessor.from_pretrained(tmp_path)


# --- images as they come ---


@BACKENDS
@EACH_PROTOCOL
def test_every_kind_of_input_gives_the_same_pixels(processor_class, protocol, photo, tmp_path):
    processor = processor_class(protocol=protocol, size=32)
    expected = pixels(processor, photo)
    array = np.array(photo)
    photo.save(tmp_path / "photo.png")
    read_only = array.copy()
    read_only.setflags(write=False)
    channels_first = torch.from_numpy(array).permute(2, 0, 1)
    for image in (
        array,
        read_only,
        array[::-1][::-1],
        channels_first,
        tmp_path / "photo.png",
        str(tmp_path / "photo.png"),
    ):
        assert torch.equal(pixels(processor, image), expected)
    assert torch.equal(processor.to_pixels(photo), expected)
    mixed = processor([photo, array[:50], channels_first], return_tensors="pt")["pixel_values"]
    assert torch.equal(mixed[0], expected)
    assert torch.equal(mixed[2], expected)


@BACKENDS
def test_floats_keep_their_units_and_are_never_rounded(processor_class, photo):
    unit = np.asarray(photo, dtype=np.float32) / 255
    for protocol in PROTOCOLS:
        processor = processor_class(protocol=protocol, size=32)
        step = 0 if protocol == "vit_jax" else 1.5 * 2 * STEP  # 8-bit integers on the way, -1...1
        got = pixels(processor, unit, do_rescale=False)
        assert (got - pixels(processor, photo)).abs().max() <= step + 1e-5
        assert torch.allclose(got, pixels(processor, unit * 255), atol=1e-5)


@pytest.mark.reliability(row="I01")
def test_images_deeper_than_8_bits_are_scaled_not_clipped():
    ramp = np.linspace(0, 65535, 16 * 16).astype(np.uint16).reshape(16, 16)
    processor = HfViTImageProcessor(size=16, do_normalize=False, do_rescale=False)
    expected = torch.from_numpy((ramp / 257).round().astype(np.float32)).expand(3, 16, 16)
    for image in (Image.fromarray(ramp), ramp[None], torch.from_numpy(ramp)[None], ramp.astype(">u2")[..., None]):
        assert torch.equal(pixels(processor, image).float(), expected)
    in_range = HfViTImageProcessor(size=16, do_normalize=False, do_rescale=False, value_range=[0, 65535])
    assert torch.equal(pixels(in_range, Image.fromarray(ramp.astype(np.float32))).float(), expected)
    assert torch.equal(pixels(in_range, ramp.astype(np.int64)).float(), expected)
    assert torch.equal(pixels(processor, Image.fromarray(ramp.astype(np.float32) / 65535)).float(), expected)


@pytest.mark.reliability(row="N03")
def test_pixels_out_of_range_are_refused(photo):
    processor = HfViTImageProcessor()
    with pytest.raises(ValueError, match=r"int64 values 0\.\.\.300: expected 0\.\.\.255; give the range"):
        processor(np.arange(301)[None, :, None])
    with pytest.raises(ValueError, match="NaN or infinite"):
        processor(np.full((3, 8, 8), np.nan, dtype=np.float32))
    with pytest.raises(ValueError, match=r"float32 values -1\.\.\.-1: expected 0\.\.\.1;"):
        processor(Image.fromarray(np.full((8, 8), -1, dtype=np.float32)))
    with pytest.raises(ValueError, match=r"shape \(8, 8, 5\): expected 3 channels first or last"):
        processor(np.zeros((8, 8, 5), dtype=np.uint8))


def test_a_huge_image_is_refused_before_it_is_decoded():
    image = Image.new("1", (1, 1))
    image._size = (MAX_PIXELS, 2)
    with pytest.raises(ValueError, match="expected at most 89,478,485 pixels"):
        HfViTImageProcessor()(image)


@BACKENDS
def test_transparent_parts_turn_white_and_gray_becomes_three_equal_channels(processor_class):
    processor = processor_class(size=4, do_normalize=False, do_rescale=False)
    clear = np.zeros((6, 5, 4), dtype=np.uint8)
    clear[..., 3] = 51  # a fifth
    for image in (clear, Image.fromarray(clear), Image.fromarray(clear[..., 2:]), clear.astype(np.float32)):
        assert (pixels(processor, image).float() == 204).all()
    gray = np.full((6, 5), 77, dtype=np.uint8)
    for image in (gray[None], gray[..., None], Image.fromarray(gray)):
        assert torch.equal(pixels(processor, image).float(), torch.full((3, 4, 4), 77.0))


@BACKENDS
def test_one_channel_models_get_gray(processor_class, photo, tmp_path):
    processor = processor_class.for_model(SimpleNamespace(image_size=28, num_channels=1))
    from_color, from_array = pixels(processor, photo), pixels(processor, np.array(photo))
    expected = pixels(processor, photo.convert("L"))
    assert from_color.shape == (1, 28, 28)
    assert torch.equal(from_color, expected)
    assert (from_array - expected).abs().max() <= 2 * STEP + 1e-6
    processor.save_pretrained(tmp_path)
    assert processor_class.from_pretrained(tmp_path).to_dict() == processor.to_dict()


@BACKENDS
def test_channels_stay_as_they_are_without_conversion(processor_class):
    four = np.random.default_rng(0).integers(0, 256, (30, 40, 4), dtype=np.uint8)
    for protocol in PROTOCOLS:
        processor = processor_class(protocol=protocol, size=16, num_channels=4)
        assert pixels(processor, four).shape == (4, 16, 16)


@pytest.mark.reliability(row="I02")
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_rotated_image_becomes_upright(orientation, photo, tmp_path):
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Pillow's value for the opposite rotation
    stored = photo.transpose(Image.Transpose(back[orientation])) if orientation > 1 else photo
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "turned.png", exif=exif)
    processor = HfViTImageProcessor(size=(24, 32))
    expected = pixels(processor, photo)
    assert torch.equal(pixels(processor, tmp_path / "turned.png"), expected)
    with Image.open(tmp_path / "turned.png") as image:
        assert torch.equal(pixels(processor, image), expected)


@pytest.mark.parametrize(
    "fields", [{"num_channels": 10**30}, {"num_channels": 2**31}, {"num_channels": "x"}, {"protocol": []}], ids=str
)
def test_an_invalid_processor_file_is_a_value_error(tmp_path, fields):
    HfViTImageProcessor().save_pretrained(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    with pytest.raises(ValueError, match=f"{next(iter(fields))} is .*: expected"):
        HfViTImageProcessor.from_pretrained(tmp_path)


# --- arrays of any shape ---


@BACKENDS
def test_gray_arrays_without_a_channel_dimension_are_taken_everywhere(processor_class):
    gray = np.random.default_rng(0).integers(0, 256, (20, 30), dtype=np.uint8)
    processor = processor_class(size=16)
    expected = pixels(processor, Image.fromarray(gray))
    for image in (gray, torch.from_numpy(gray), gray.astype(np.float64), [gray], [[torch.from_numpy(gray)]]):
        assert torch.allclose(pixels(processor, image), expected, atol=1e-6)
    assert torch.equal(processor.to_pixels(gray), expected)
    assert processor([gray, gray[:5]], return_tensors="pt").pixel_values.shape == (2, 3, 16, 16)


@BACKENDS
@pytest.mark.parametrize("height", [1, 3, 4])
def test_a_low_color_array_is_not_read_sideways(processor_class, height):
    red = np.zeros((height, 50, 3), dtype=np.uint8)
    red[..., 0] = 255
    processor = processor_class(size=16)
    for got in (pixels(processor, red), processor.to_pixels(red)):
        assert torch.equal(got, pixels(processor, Image.fromarray(red)))
        assert got.mean((1, 2)).tolist() == [1, -1, -1]


def test_an_ambiguous_array_is_channels_last_a_tensor_channels_first():
    image = torch.arange(3 * 5 * 3, dtype=torch.uint8).reshape(3, 5, 3)
    processor = HfViTImageProcessor(size=(3, 5))
    last = pixels(processor, image, input_data_format="channels_last")
    assert torch.equal(pixels(processor, image.numpy()), last)
    first = pixels(processor, image, input_data_format="channels_first")
    assert torch.equal(pixels(processor, image), first)
    assert not torch.equal(first, last)


@BACKENDS
@pytest.mark.parametrize("num_channels", [2, 4, 5, 6, 13])
def test_arrays_of_any_channel_count_are_placed_by_num_channels(processor_class, num_channels):
    image = np.random.default_rng(0).integers(0, 256, (num_channels, 40, 50), dtype=np.uint8)
    model = SimpleNamespace(image_size=16, num_channels=num_channels)
    for protocol in PROTOCOLS:
        processor = processor_class.for_model(model, protocol=protocol)
        got = pixels(processor, image)
        alone = processor_class.for_model(SimpleNamespace(image_size=16, num_channels=1), protocol=protocol)
        for channel in range(num_channels):
            assert (got[channel] - pixels(alone, image[channel])[0]).abs().max() <= 1e-6
        assert torch.equal(pixels(processor, np.moveaxis(image, 0, 2)), got)
        assert torch.equal(processor.to_pixels(torch.from_numpy(image)), got)
        assert torch.equal(pixels(processor, image[None]), got)


@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
def test_input_data_format_decides_in_every_call(layout):
    image = np.random.default_rng(0).integers(0, 256, (3, 40, 3), dtype=np.uint8)
    processor = HfViTImageProcessor(protocol="transformers", size=16)
    expected = pixels(ViTImageProcessor(size={"height": 16, "width": 16}), image, input_data_format=layout)
    built = HfViTImageProcessor(protocol="transformers", size=16, input_data_format=layout)
    for got in (
        pixels(processor, image, input_data_format=layout),
        processor.to_pixels(image, input_data_format=layout),
        pixels(built, image),
        built.to_pixels(image),
    ):
        assert (got - expected).abs().max() <= 1e-6


@pytest.mark.parametrize("name", ["bicubic", "BILINEAR", "lanczos"])
def test_a_filter_is_given_by_name_as_in_stock_processors(name, photo):
    number = int(Image.Resampling[name.upper()])
    expected = pixels(ViTImageProcessor(size={"height": 32, "width": 32}, resample=number), photo)
    processor = HfViTImageProcessor(protocol="transformers", size=32, resample=name)
    by_number = HfViTImageProcessor(protocol="transformers", size=32, resample=number)
    called = pixels(HfViTImageProcessor(protocol="transformers", size=32), photo, resample=name)
    assert torch.equal(pixels(processor, photo), pixels(by_number, photo))
    assert torch.equal(called, pixels(by_number, photo))
    assert (called - expected).abs().mean() <= 2 * STEP  # torchvision's 8-bit bicubic differs from Pillow's
    assert processor.to_dict() == by_number.to_dict()
    with pytest.raises(ValueError, match="resample is 'cubic': expected one of nearest, box, bilinear"):
        HfViTImageProcessor(resample="cubic")


@BACKENDS
def test_a_batch_is_one_tensor_with_the_pixels_of_each_image(processor_class, photo):
    images = [photo, np.array(photo.resize((40, 30))), torch.rand(3, 20, 20, dtype=torch.float64) * 255]
    for protocol in PROTOCOLS:
        processor = processor_class(protocol=protocol, size=16)
        batch = processor(images, return_tensors="pt").pixel_values
        assert batch.dtype == torch.float32
        for got, image in zip(batch, images, strict=True):
            assert torch.equal(got, processor.to_pixels(image))
        assert np.array_equal(processor(images, return_tensors="np").pixel_values, batch.numpy())
        listed = processor(images).pixel_values
        assert all(np.array_equal(np.asarray(one), got) for one, got in zip(listed, batch, strict=True))
    plain = processor_class(size=16, do_rescale=False, do_normalize=False, do_resize=False)
    mixed = [np.full((3, 9, 9), 200, np.uint8), np.full((3, 9, 9), 0.5, np.float32)]
    batch = plain(mixed, return_tensors="pt").pixel_values
    assert (batch[0] == 200).all()
    assert (batch[1] == 0.5).all()


@BACKENDS
@pytest.mark.parametrize(
    ("image", "said"),
    [
        ([], "there are no images: expected at least one"),
        ([[]], "there are no images"),
        (np.zeros((0, 3, 9, 9), np.uint8), "there are no images"),
        (np.zeros((0, 9, 3), np.uint8), r"shape \(0, 9, 3\)"),
        (np.zeros((1, 1, 3, 9, 9), np.uint8), r"shape \(1, 3, 9, 9\)|shape \(1, 1, 3, 9, 9\)"),
        (np.zeros((9, 9), complex), "dtype complex128: expected integers, floats or booleans"),
        (np.zeros((7, 9, 9), np.uint8), r"shape \(7, 9, 9\): expected 3 channels first or last"),
        ([np.zeros((9, 9, 3), np.uint8), np.zeros((7,), np.uint8)], r"shape \(7,\)"),
        (np.full((9, 9), 240, np.uint16), r"uint16 values 240\.\.\.240, which fit 0\.\.\.255 as well as 0\.\.\.65535"),
    ],
)
def test_an_unusable_image_is_one_line_without_its_pixels(processor_class, image, said):
    with pytest.raises(ValueError, match=said) as refusal:
        processor_class()(image, return_tensors="pt")
    assert len(str(refusal.value)) < 200
    assert "\n" not in str(refusal.value)


def test_channels_that_the_model_lacks_are_refused_by_count():
    four = HfViTImageProcessor.for_model(SimpleNamespace(image_size=16, num_channels=4))
    with pytest.raises(ValueError, match=r"image of mode RGB has 3 channels: expected 4"):
        four(Image.new("RGB", (9, 9)))
    with pytest.raises(ValueError, match="image has 1 channels: expected 4"):
        four(np.zeros((9, 9), np.uint8))
    rgba = np.random.default_rng(0).integers(0, 256, (16, 16, 4), dtype=np.uint8)
    assert torch.equal(pixels(four, Image.fromarray(rgba)), pixels(four, rgba))


def test_floats_that_cannot_be_0_to_255_are_reported(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    processor, normalised = HfViTImageProcessor(size=4), np.linspace(-1, 1, 48, dtype=np.float32).reshape(4, 4, 3)
    transformers_logging.warning_once.cache_clear()
    processor(normalised)
    assert "image has floats in -1...1 and is divided by 255: pass value_range=(-1, 1)" in caplog.text
    in_range = HfViTImageProcessor(size=4, value_range=(-1, 1))
    assert np.allclose(in_range.to_pixels(normalised).permute(1, 2, 0), normalised, atol=1e-6)


@pytest.mark.parametrize("value_range", [(1, 0), (0,), "all", (0, float("inf")), 255])
def test_an_invalid_value_range_is_refused(value_range):
    with pytest.raises(ValueError, match=r"value_range is .*: expected \(low, high\)"):
        HfViTImageProcessor(value_range=value_range)


def test_a_value_range_is_kept_in_the_file_and_covers_all_deep_images(tmp_path):
    HfViTImageProcessor(size=8, value_range=[0, 4095]).save_pretrained(tmp_path)
    processor = HfViTImageProcessor.from_pretrained(tmp_path)
    dark = np.full((8, 8), 1365, np.uint16)  # a third of 4095
    for image in (dark, Image.fromarray(dark), dark.astype(np.float32), torch.from_numpy(dark.astype(np.int32))):
        assert torch.allclose(pixels(processor, image), torch.full((3, 8, 8), 2 * 85 / 255 - 1), atol=1e-6)
    eight_bits = np.full((8, 8), 85, np.uint8)
    assert torch.equal(pixels(processor, eight_bits), pixels(HfViTImageProcessor(size=8), eight_bits))
    with pytest.raises(ValueError, match=r"uint16 values 4096\.\.\.4096: expected 0\.\.\.4095; give the range of all"):
        processor(np.full((8, 8), 4096, np.uint16))
    assert "value_range" not in HfViTImageProcessor().to_dict()
