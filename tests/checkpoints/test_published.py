"""Original checkpoints in repositories of the Hub, and the Hub's copies of published files."""

import json

import huggingface_hub
import pytest
import timm
import torch
from file_server import serve
from hub_server import HubServer
from timm.models import save_for_hf
from tiny_models import TINY, randomised

from hf_vit import HfViTConfig, HfViTForImageClassification
from hf_vit.catalogue import find
from hf_vit.checkpoints import CheckpointError, write_jax_checkpoint


pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with HubServer() as server:
        for name in ("org", "timm"):
            server.add_user(name, token=f"hf_{name}")
        server.attach(monkeypatch, tmp_path / "cache")
        yield server
    huggingface_hub.close_session()


def upload(folder, repo):
    api = huggingface_hub.HfApi(token=f"hf_{repo.split('/')[0]}")
    api.create_repo(repo)
    api.upload_folder(repo_id=repo, folder_path=folder)


@pytest.fixture
def original(tmp_path):
    model = randomised(HfViTForImageClassification(HfViTConfig(**TINY)))
    (tmp_path / "files").mkdir()
    write_jax_checkpoint(model.state_dict(), model.config, tmp_path / "files" / "ViT.npz")
    return model, tmp_path / "files"


def test_a_repository_with_one_original_file_opens(hub, original):
    model, folder = original
    upload(folder, "org/one")
    assert torch.equal(HfViTForImageClassification.from_pretrained("org/one").classifier.bias, model.classifier.bias)
    (folder / "other.npz").write_bytes((folder / "ViT.npz").read_bytes())
    upload(folder, "org/two")
    with pytest.raises(CheckpointError, match=r"several checkpoints \(.*other.npz"):
        HfViTForImageClassification.from_pretrained("org/two")


def test_a_published_file_that_its_bucket_refuses_opens_from_its_mirror(hub, tmp_path, monkeypatch):
    name = "imagenet21k+imagenet2012/ViT-B_16"
    mirror = next(mirror.repo for mirror in find(name).mirrors if mirror.note is None and mirror.layout == "timm")
    arguments = {"embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 5, "img_size": 32}
    theirs = randomised(timm.create_model("vit_base_patch16_384", **arguments))
    save_for_hf(theirs, tmp_path / "mirror", model_args=arguments, safe_serialization=True)
    upload(tmp_path / "mirror", mirror)
    assert json.loads((tmp_path / "mirror" / "config.json").read_text())["architecture"] == "vit_base_patch16_384"
    with serve(b"", faults=["403"] * 20) as server:
        monkeypatch.setattr("hf_vit.catalogue.entries.GOOGLE_STORAGE", server.url.removesuffix("model.npz"))
        loaded = HfViTForImageClassification.from_pretrained(name)
    assert torch.equal(loaded.classifier.bias, theirs.head.bias)
    assert (loaded.config.hidden_act, loaded.config.position_resampling) == ("gelu_pytorch_tanh", "jax")
