"""The short way into a folder of ours: the same model as by transformers' loading, and nothing else than asked for."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_vit import (
    HfViTBackbone,
    HfViTConfig,
    HfViTForImageClassification,
    HfViTForMaskedImageModeling,
    HfViTModel,
    checkpoints,
    mapped_loading,
)
from hf_vit.containers import CheckpointError


TINY = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 5,
    "zero_init_head": False,
}


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    HfViTForImageClassification(HfViTConfig(**TINY)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def ways(monkeypatch):
    """A word for each load that went the short way."""
    seen, load_mapped = [], checkpoints.load_mapped

    def watched(*args, **kwargs):
        model = load_mapped(*args, **kwargs)
        if model is not None:
            seen.append("short")
        return model

    monkeypatch.setattr(checkpoints, "load_mapped", watched)
    return seen


@pytest.mark.parametrize("cls", [HfViTForImageClassification, HfViTModel, HfViTBackbone, HfViTForMaskedImageModeling])
def test_both_ways_give_one_model(cls, tmp_path, ways, monkeypatch):
    torch.manual_seed(0)
    cls(HfViTConfig(**TINY)).save_pretrained(tmp_path)
    short = cls.from_pretrained(tmp_path)
    assert ways == ["short"]
    monkeypatch.setattr(checkpoints, "load_mapped", lambda *args, **kwargs: None)
    long = cls.from_pretrained(tmp_path)
    assert short.config.to_dict() == long.config.to_dict()
    assert short.config._attn_implementation == long.config._attn_implementation
    assert short.name_or_path == long.name_or_path == str(tmp_path)
    assert short.training == long.training
    assert short.dtype == long.dtype
    for (name, a), (other, b) in zip(short.state_dict().items(), long.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(a, b)
    assert [p.requires_grad for p in short.parameters()] == [p.requires_grad for p in long.parameters()]
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for a, b in zip(short(pixels)[0], long(pixels)[0], strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("asked", "way"),
    [
        ({}, ["short"]),
        ({"attn_implementation": "eager"}, ["short"]),
        ({"dtype": torch.float32}, ["short"]),
        ({"dtype": "auto"}, ["short"]),
        ({"dtype": torch.bfloat16}, []),
        ({"device_map": "cpu"}, []),
        ({"num_labels": 3}, []),
        ({"drop_path_rate": 0.1}, ["short"]),
        ({"image_size": 48}, ["short"]),
    ],
    ids=str,
)
def test_what_is_asked_for_is_there_by_either_way(folder, ways, asked, way):
    model = HfViTForImageClassification.from_pretrained(folder, **asked)
    assert ways == way
    assert model.config._attn_implementation == asked.get("attn_implementation", "sdpa")
    assert model.dtype == (torch.bfloat16 if asked.get("dtype") == torch.bfloat16 else torch.float32)
    assert model.num_labels == asked.get("num_labels", 5)
    assert model.config.drop_path_rate == asked.get("drop_path_rate", 0)
    grid = asked.get("image_size", 32) // 8
    assert model.vit.embeddings.position_embeddings.shape == (1, 1 + grid * grid, 24)


def test_the_file_is_not_written_to_by_training(folder):
    before = load_file(folder / "model.safetensors")
    before = {name: value.clone() for name, value in before.items()}
    model = HfViTForImageClassification.from_pretrained(folder).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(torch.randn(2, 3, 32, 32), labels=torch.tensor([0, 1])).loss.backward()
    optimizer.step()
    after = load_file(folder / "model.safetensors")
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not torch.equal(model.classifier.weight, before["classifier.weight"])


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="no /proc")
def test_what_the_check_has_read_is_there_for_the_model(tmp_path):
    HfViTModel(HfViTConfig(**TINY | {"hidden_size": 256, "intermediate_size": 2048})).save_pretrained(tmp_path)
    path = tmp_path.resolve() / "model.safetensors"
    model = HfViTModel.from_pretrained(tmp_path)
    maps = Path("/proc/self/smaps").read_text().split(f"{path}\n")[1:]
    resident = [int(lines.split("Rss:")[1].split()[0]) for lines in maps]  # kB
    assert len(resident) == 1
    assert resident[0] > 0.9 * path.stat().st_size / 1024 > 5000
    weight = model.embeddings.position_embeddings
    assert weight.untyped_storage().nbytes() == weight.nbytes  # each tensor has a storage of its own


def test_a_file_that_cannot_be_mapped_goes_the_long_way(folder, ways, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no such device")

    monkeypatch.setattr(mapped_loading.mmap, "mmap", refuse)
    assert HfViTForImageClassification.from_pretrained(folder).num_labels == 5
    assert ways == []


def test_a_model_outlives_its_file(folder):
    model = HfViTForImageClassification.from_pretrained(folder)
    expected = HfViTForImageClassification.from_pretrained(folder)(torch.zeros(1, 3, 32, 32)).logits
    model.save_pretrained(folder)  # over the file that the model is mapped from
    assert torch.equal(model(torch.zeros(1, 3, 32, 32)).logits, expected)
    assert torch.equal(HfViTForImageClassification.from_pretrained(folder)(torch.zeros(1, 3, 32, 32)).logits, expected)


def test_a_number_that_is_none_is_refused(folder):
    weights = load_file(folder / "model.safetensors")
    weights["classifier.bias"][2] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"NaN or Inf.*classifier\.bias"):
        HfViTForImageClassification.from_pretrained(folder)


def test_numbers_whose_sum_alone_is_not_finite_are_taken(folder):
    weights = load_file(folder / "model.safetensors")
    weights["classifier.bias"][:2] = 3e38
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model = HfViTForImageClassification.from_pretrained(folder)
    assert torch.equal(model.classifier.bias, weights["classifier.bias"])
