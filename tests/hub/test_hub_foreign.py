"""Models of transformers and timm open by their Hub id, wherever in a repository and in whatever form they are."""

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from hub_server import HubServer
from timm.models import save_for_hf
from transformers import ViTConfig, ViTForImageClassification
from transformers.models.vit import ViTImageProcessor

from hf_vit import HfViTBackbone, HfViTForImageClassification, HfViTImageProcessor, HfViTModel
from hf_vit.checkpoints.processors import processor_of
from hf_vit.files.errors import CheckpointError
from hf_vit.hub import verify


# huggingface_hub sends a large file in a way that its HTTP library calls deprecated
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 5,
}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A server with an account, which this process's client is logged in to."""
    with HubServer() as server:
        server.add_user("org", token="hf_org")
        server.attach(monkeypatch, tmp_path / "cache")
        monkeypatch.setenv("HF_TOKEN", "hf_org")
        yield server
    huggingface_hub.close_session()


def randomised(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def stock():
    return randomised(ViTForImageClassification(ViTConfig(**SIZES)))


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same_logits(ours, theirs, dtype=torch.float32):
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        got, expected = ours(pixels).logits, theirs(pixels)
    expected = expected if isinstance(expected, torch.Tensor) else expected.logits
    tolerance = 1e-5 if dtype == torch.float32 else 0.05 * expected.abs().max().item()
    torch.testing.assert_close(got.float(), expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("has_old_names", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"dtype": torch.bfloat16}, {"device_map": "auto"}, {"low_cpu_mem_usage": True}, {"local_files_only": True}],
    ids=str,
)
def test_a_repository_of_transformers_opens_by_its_id(hub, tmp_path, has_old_names, options):
    model = stock()
    model.save_pretrained(tmp_path / "stock", save_original_format=has_old_names)
    hub.add_repository("org/stock-vit", files_of(tmp_path / "stock"))
    if options.get("local_files_only"):
        huggingface_hub.snapshot_download("org/stock-vit")
        hub.requests.clear()
    loaded = HfViTForImageClassification.from_pretrained("org/stock-vit", **options)
    assert loaded.dtype == options.get("dtype", torch.float32)
    assert_same_logits(loaded, model, loaded.dtype)
    assert loaded.config.layer_norm_eps == 1e-12
    assert loaded.config._name_or_path == "org/stock-vit"
    assert hub.requests == [] or not options.get("local_files_only")


def test_a_subfolder_of_a_revision_of_a_private_repository_opens_in_shards(hub, tmp_path, monkeypatch):
    model = stock()
    model.save_pretrained(tmp_path / "repo" / "a" / "deep", max_shard_size="20KB")
    shards = list((tmp_path / "repo").rglob("*.safetensors"))
    assert len(shards) > 2
    hub.add_repository("org/stock-vit", private=True)
    api = huggingface_hub.HfApi()
    api.create_branch("org/stock-vit", branch="v2")
    api.upload_folder(repo_id="org/stock-vit", folder_path=tmp_path / "repo", revision="v2")
    place = {"subfolder": "a/deep", "revision": "v2"}
    assert_same_logits(HfViTForImageClassification.from_pretrained("org/stock-vit", **place), model)
    backbone = HfViTBackbone.from_pretrained("org/stock-vit", **place)
    assert torch.equal(backbone.encoder.encoder_norm.weight, model.vit.layernorm.weight)
    with pytest.raises(OSError, match="org/stock-vit"):
        HfViTModel.from_pretrained("org/stock-vit", subfolder="a/deep")  # not on main
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(OSError, match=r"private.*hf auth login"):
        HfViTModel.from_pretrained("org/stock-vit", token=False, **place)
    assert_same_logits(HfViTForImageClassification.from_pretrained("org/stock-vit", token="hf_org", **place), model)


def test_weights_alone_in_a_repository_open_with_a_preset(hub, tmp_path):
    model = randomised(timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=5))
    torch.save(model.state_dict(), tmp_path / "weights.bin")
    hub.add_repository("org/weights", {"pytorch_model.bin": (tmp_path / "weights.bin").read_bytes()})
    assert_same_logits(HfViTForImageClassification.from_pretrained("org/weights", preset="ViT-Ti_16"), model)
    with pytest.raises(CheckpointError, match="pass preset="):
        HfViTForImageClassification.from_pretrained("org/weights")


@pytest.mark.parametrize(
    ("architecture", "size"), [("vit_tiny_patch16_224.augreg_in21k_ft_in1k", 32), ("vit_tiny_r_s16_p8_224", 32)]
)
def test_a_repository_of_timm_opens_by_its_id(hub, tmp_path, architecture, size):
    model = randomised(timm.create_model(architecture, depth=1, img_size=size, num_classes=5))
    save_for_hf(model, tmp_path / "timm", safe_serialization=True)
    hub.add_repository(f"timm/{architecture}", files_of(tmp_path / "timm"))
    assert_same_logits(HfViTForImageClassification.from_pretrained(f"timm/{architecture}"), model)
    processor = HfViTImageProcessor.from_pretrained(f"timm/{architecture}")
    assert (processor.protocol, processor.crop_pct) == ("timm", model.pretrained_cfg["crop_pct"])


def test_the_processor_of_a_repository_comes_along(hub, tmp_path):
    stock().save_pretrained(tmp_path / "stock")
    ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.1, 0.2, 0.3]).save_pretrained(tmp_path / "stock")
    hub.add_repository("org/stock-vit", files_of(tmp_path / "stock"))
    model = HfViTForImageClassification.from_pretrained("org/stock-vit")
    processor = processor_of(model.name_or_path, model.config)
    assert (processor.protocol, list(processor.image_mean)) == ("transformers", [0.1, 0.2, 0.3])


def test_a_foreign_download_with_one_wrong_bit_is_found_on_request(hub, tmp_path):
    stock().save_pretrained(tmp_path / "stock")
    hub.add_repository("org/stock-vit", files_of(tmp_path / "stock"))
    huggingface_hub.hf_hub_download("org/stock-vit", "config.json")
    cached = Path(huggingface_hub.hf_hub_download("org/stock-vit", "model.safetensors")).resolve()
    damaged = bytearray(cached.read_bytes())
    damaged[-3] ^= 1
    cached.write_bytes(damaged)
    with pytest.raises(CheckpointError, match="damaged in transit or in the cache: expected sha256"):
        verify("org/stock-vit")


def test_a_repository_of_another_model_is_refused_before_its_weights_are_fetched(hub):
    hub.add_repository(
        "org/bert", {"config.json": json.dumps({"model_type": "bert"}).encode(), "model.safetensors": b""}
    )
    with pytest.raises(CheckpointError, match="org/bert: model_type is 'bert'"):
        HfViTModel.from_pretrained("org/bert")
    assert hub.requested("model.safetensors") == []
