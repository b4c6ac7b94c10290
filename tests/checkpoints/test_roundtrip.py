"""What is read from a JAX checkpoint is written back byte for byte, and what is written is read back bit for bit."""

import re
import zipfile

import pytest
import torch
from golden_cases import CHECKPOINT_KINDS, GOLDENS, import_command, read_cases
from safetensors.torch import load_file

from hf_vit import HfViTConfig, HfViTForImageClassification, HfViTModel
from hf_vit.checkpoints import convert_jax_checkpoint, write_jax_checkpoint
from hf_vit.checkpoints.layouts import OLD_BIG_VISION_POSITIONS, JaxLayout, group_by_theirs
from hf_vit.files.npz import write_npz


safetensors_to_jax = import_command("safetensors_to_jax")

CASES = read_cases(kinds=CHECKPOINT_KINDS)
COMPANIONS = re.compile(r"opt/(?!target/)|chrono/|(params/)?(txt/|t\.npy|b\.npy)")

PLAIN = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
PLAIN |= {"image_size": 32, "patch_size": 16, "num_labels": 5}
NO_TOKEN = {"use_cls_token": False, "pooling": "gap"}
STEM = {"patch_size": 1, "resnet_width_factor": 0.5}
VIT_JAX_FAMILIES = {
    "token": {},
    "gap": NO_TOKEN,
    "unpooled": {**NO_TOKEN, "pooling": "none"},
    "token_unpooled": {"pooling": "none"},
    "representation": {"representation_size": 24},
    "no head": {"num_labels": 0},
    "gray": {"num_channels": 1},
    "tall patch": {"patch_size": [8, 16], "image_size": [16, 64]},
    "wide image": {"image_size": [16, 48]},
    "twelve blocks": {"num_hidden_layers": 12},
    "root": {**STEM, "patch_size": 4, "resnet_layers": []},
    "three stages": {**STEM, "resnet_layers": [1, 2, 1]},
    "four stages": {**STEM, "image_size": 64, "resnet_layers": [1, 1, 1, 1]},
}
BIG_VISION_FAMILIES = {
    "gap": NO_TOKEN,
    "tok": {},
    "map": {**NO_TOKEN, "pooling": "map"},
    "0": {**NO_TOKEN, "pooling": "token"},
    "none": {**NO_TOKEN, "pooling": "none"},
    "sincos": {**NO_TOKEN, "position_embedding_type": "sincos2d"},
    "tok sincos": {"position_embedding_type": "sincos2d", "image_size": [16, 48]},
    "representation": {**NO_TOKEN, "representation_size": 32},
    "no head": {**NO_TOKEN, "pooling": "map", "num_labels": 0},
}
OLD_POSITIONS = {"positions": OLD_BIG_VISION_POSITIONS, "has_class_row": True}
VARIETIES = [
    *(
        (name, fields, JaxLayout.of_dialect(d))
        for name, fields in VIT_JAX_FAMILIES.items()
        for d in ("prelinen", "linen")
    ),
    *((name, fields, JaxLayout.of_dialect("big_vision")) for name, fields in BIG_VISION_FAMILIES.items()),
    *(
        (f"{name} scan", BIG_VISION_FAMILIES[name], JaxLayout.of_dialect("big_vision", is_stacked=True))
        for name in ("gap", "tok", "map")
    ),
    *(
        (f"prefix {prefix}", BIG_VISION_FAMILIES["gap"], JaxLayout.of_dialect("big_vision", prefix=prefix))
        for prefix in ("params/", "opt/target/", "img/", "params/img/")
    ),
    ("optimizer's prefix", {}, JaxLayout.of_dialect("prelinen", prefix="opt/target/")),
    *(
        (dtype, BIG_VISION_FAMILIES["map"], JaxLayout.of_dialect("big_vision", dtype=dtype))
        for dtype in ("bfloat16", "float16")
    ),
    ("bfloat16 scan", {}, JaxLayout.of_dialect("big_vision", dtype="bfloat16", is_stacked=True)),
    ("old positions", {}, JaxLayout.of_dialect("big_vision", **OLD_POSITIONS)),
    ("inlined map", BIG_VISION_FAMILIES["map"], JaxLayout.of_dialect("big_vision", has_inlined_map=True)),
]
VARIETY_IDS = [f"{layout.dialect}-{name}" for name, _, layout in VARIETIES]


def members(path):
    """Every array as it lies in the file: header and data."""
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def needed_arguments(fields):
    """What no file tells."""
    config = HfViTConfig(**PLAIN | fields)
    is_open = config.pooling == "none" or (config.pooling == "token" and not config.use_cls_token)
    arguments = {"image_size": config.image_size} if not isinstance(config.image_size, int) else {}
    return arguments | ({"pooling": config.pooling} if is_open else {})


def write_random_checkpoint(path, fields, layout):
    config = HfViTConfig(**PLAIN | fields)
    dtype = getattr(torch, layout.dtype)
    groups = group_by_theirs(layout.rules(config, config.num_labels or 0))
    arrays = {name: torch.randn(groups[name][0].theirs_shape).to(dtype) for name in sorted(groups)}
    write_npz(path, arrays.items())


@pytest.mark.parametrize("path", [GOLDENS / case["checkpoint"] for case in CASES.values()], ids=list(CASES))
def test_a_golden_comes_back_byte_for_byte(tmp_path, path):
    case = CASES[path.stem]
    stored_size = {"image_size": tuple(case["image"])}  # as recorded; a finetune case is opened at another size
    convert_jax_checkpoint(path, tmp_path / "model", **stored_size)
    safetensors_to_jax.main([str(tmp_path / "model"), str(tmp_path / "back.npz")])
    original, back = members(path), members(tmp_path / "back.npz")
    left_out = original.keys() - back.keys()
    assert all(COMPANIONS.match(name) for name in left_out)
    assert {name: data for name, data in original.items() if name not in left_out} == back


@pytest.mark.parametrize("path", sorted(GOLDENS.glob("*.checkpoint_*")), ids=lambda path: path.name)
def test_a_fine_tuning_checkpoint_comes_back_as_its_npz(tmp_path, path):
    convert_jax_checkpoint(path, tmp_path / "model")
    safetensors_to_jax.main([str(tmp_path / "model"), str(tmp_path / "back.npz"), "--dialect", "linen"])
    assert members(tmp_path / "back.npz") == members(path.with_suffix(".npz"))


@pytest.mark.parametrize(("name", "fields", "layout"), VARIETIES, ids=VARIETY_IDS)
def test_a_random_checkpoint_comes_back_byte_for_byte(tmp_path, name, fields, layout):
    torch.manual_seed(0)
    write_random_checkpoint(tmp_path / "x.npz", fields, layout)
    model = HfViTForImageClassification.from_pretrained(tmp_path / "x.npz", **needed_arguments(fields))
    write_jax_checkpoint(model.state_dict(), model.config, tmp_path / "back.npz")
    assert members(tmp_path / "back.npz") == members(tmp_path / "x.npz")


@pytest.mark.parametrize(("name", "fields", "layout"), VARIETIES, ids=VARIETY_IDS)
def test_a_random_checkpoint_comes_back_from_a_folder(tmp_path, name, fields, layout):
    torch.manual_seed(1)
    write_random_checkpoint(tmp_path / "x.npz", fields, layout)
    convert_jax_checkpoint(tmp_path / "x.npz", tmp_path / "model", max_shard_bytes=20_000, **needed_arguments(fields))
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    safetensors_to_jax.main([str(tmp_path / "model"), str(tmp_path / "back.npz")])
    assert members(tmp_path / "back.npz") == members(tmp_path / "x.npz")


@pytest.mark.parametrize(("name", "fields", "layout"), VARIETIES, ids=VARIETY_IDS)
def test_a_random_model_comes_back_bit_for_bit(tmp_path, name, fields, layout):
    torch.manual_seed(2)
    kind = HfViTForImageClassification if (PLAIN | fields)["num_labels"] else HfViTModel
    model = kind(HfViTConfig(**PLAIN | fields, checkpoint_layout=layout.to_dict()))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
        table = model.base_model.embeddings.position_embeddings
        if table is not None and model.config.use_cls_token and not layout.has_class_row:
            table[:, 0] = 0  # big_vision has no such row
    write_jax_checkpoint(model.state_dict(), model.config, tmp_path / "x.npz")
    back = kind.from_pretrained(tmp_path / "x.npz", **needed_arguments(fields)).state_dict()
    assert back.keys() == model.state_dict().keys()
    assert [name for name, value in model.state_dict().items() if not torch.equal(value, back[name])] == []


def test_a_class_row_is_folded_into_the_token_where_the_dialect_has_none(tmp_path):
    torch.manual_seed(3)
    model = HfViTForImageClassification(HfViTConfig(**PLAIN)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    write_jax_checkpoint(model.state_dict(), model.config, tmp_path / "x.npz", dialect="big_vision")
    back = HfViTForImageClassification.from_pretrained(tmp_path / "x.npz").eval()
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(back(pixels).logits, model(pixels).logits, atol=1e-6, rtol=0)
    assert not back.vit.embeddings.position_embeddings[:, 0].any()


def test_a_fine_tuned_model_keeps_its_float32(tmp_path):
    """bfloat16 is written back only where it loses nothing, tensor by tensor."""
    torch.manual_seed(4)
    write_random_checkpoint(tmp_path / "x.npz", NO_TOKEN, JaxLayout.of_dialect("big_vision", dtype="bfloat16"))
    model = HfViTForImageClassification.from_pretrained(tmp_path / "x.npz")
    with torch.no_grad():
        model.classifier.bias += 1e-7
    write_jax_checkpoint(model.state_dict(), model.config, tmp_path / "back.npz")
    original, back = members(tmp_path / "x.npz"), members(tmp_path / "back.npz")
    assert {name for name in original if original[name] != back[name]} == {"head/bias.npy"}
    again = HfViTForImageClassification.from_pretrained(tmp_path / "back.npz")
    assert torch.equal(again.classifier.bias, model.classifier.bias)


@pytest.mark.parametrize(
    ("fields", "dialect", "reason"),
    [
        ({**NO_TOKEN, "pooling": "map"}, "linen", "attention pooling"),
        ({"position_embedding_type": "sincos2d"}, "prelinen", "sine-cosine positions"),
        ({**STEM, "resnet_layers": [1, 1, 1]}, "big_vision", "a ResNet stem"),
        ({"qkv_bias": False}, "linen", "without biases"),
    ],
)
def test_a_dialect_that_cannot_hold_the_model_is_refused(tmp_path, fields, dialect, reason):
    model = HfViTForImageClassification(HfViTConfig(**PLAIN | fields))
    with pytest.raises(ValueError, match=f"no place for .*{reason}"):
        write_jax_checkpoint(model.state_dict(), model.config, tmp_path / "x.npz", dialect=dialect)
    assert list(tmp_path.iterdir()) == []


def test_shards_hold_what_one_file_does(tmp_path):
    torch.manual_seed(5)
    write_random_checkpoint(tmp_path / "x.npz", {}, JaxLayout.of_dialect("prelinen"))
    convert_jax_checkpoint(tmp_path / "x.npz", tmp_path / "one")
    convert_jax_checkpoint(tmp_path / "x.npz", tmp_path / "many", max_shard_bytes=20_000)
    whole = load_file(tmp_path / "one" / "model.safetensors")
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    shards = {name: value for path in files for name, value in load_file(path).items()}
    assert shards.keys() == whole.keys()
    assert all(torch.equal(shards[name], whole[name]) for name in whole)
    model = HfViTForImageClassification.from_pretrained(tmp_path / "many")
    assert all(torch.equal(value, whole[name]) for name, value in model.state_dict().items())
