"""Training from nothing: labels, or hidden patches; and what fine-tuning makes of it."""

import json
from pathlib import Path
from runpy import run_path

import pytest
import torch

from hf_vit import HfViTConfig, HfViTForImageClassification, HfViTForMaskedImageModeling
from hf_vit.data.augmentation import MaskingCollator


EXAMPLES = Path(__file__).parents[2] / "examples"
FLAGS = [
    "--dataset=digits",
    "--learning_rate=0.003",
    "--logging_steps=1",
    "--total_batch_size=32",
    "--eval_strategy=no",
    "--save_strategy=no",
    "--use_cpu=true",
    "--dataloader_num_workers=0",
    "--dataloader_persistent_workers=false",
    "--disable_tqdm=true",
]


@pytest.fixture
def network(tmp_path) -> str:
    file = tmp_path / "network.json"
    fields = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    file.write_text(json.dumps(HfViTConfig(**fields, image_size=8, patch_size=2).to_dict()))
    return str(file)


def pretrain(network: str, out: Path, *more: str) -> dict:
    arguments = [f"--preset={network}", f"--output_dir={out}", *FLAGS, *more]
    assert run_path(str(EXAMPLES / "pretrain.py"))["main"](arguments) == 0
    return json.loads((out / "results.json").read_text())


def test_hidden_patches_are_learnt_and_the_encoder_can_be_fine_tuned(network, tmp_path):
    out = tmp_path / "out"
    first = pretrain(network, out, "--objective=simmim", "--max_steps=1")
    later = pretrain(network, out, "--objective=simmim", "--max_steps=60", "--overwrite_output_dir=true")
    assert later["eval_loss"] < 0.8 * first["eval_loss"]
    model = HfViTForMaskedImageModeling.from_pretrained(out)
    assert "SimMIM" in (out / "README.md").read_text()
    tuned = HfViTForImageClassification.from_pretrained(out, num_labels=10)
    assert torch.equal(tuned.vit.encoder.layer[0].attn.query.weight, model.vit.encoder.layer[0].attn.query.weight)


def test_labels_are_learnt_from_nothing(network, tmp_path):
    results = pretrain(network, tmp_path / "out", "--max_steps=60", "--mixup_alpha=0", "--randaugment_layers=0")
    assert results["eval_accuracy"] > 0.3  # of ten classes
    HfViTForImageClassification.from_pretrained(tmp_path / "out")


def test_masks_hide_their_share_in_blocks_and_depend_on_seed_epoch_and_index_alone():
    def masks(seed: int = 0, epoch: int = 0, first: int = 0) -> torch.Tensor:
        samples = [{"pixel_values": torch.zeros(3, 8, 8), "index": first + i, "epoch": epoch} for i in range(50)]
        return MaskingCollator((6, 8), block=2, ratio=0.6, seed=seed)(samples)["bool_masked_pos"]

    found = masks()
    assert found.shape == (50, 48)
    assert set(found.sum(1).tolist()) == {4 * 8}  # 8 of 12 blocks
    blocks = found.view(50, 3, 2, 4, 2)
    assert torch.equal(blocks, blocks[:, :, :1, :, :1].expand_as(blocks))
    torch.manual_seed(1)
    assert torch.equal(found, masks())
    assert torch.equal(found[10:], masks(first=10)[:40])
    for other in (masks(seed=1), masks(epoch=1), masks(first=1)):
        assert not torch.equal(found, other)
    share = found.float().mean(0)
    assert share.min() > 0.4
    assert share.max() < 0.9


def test_a_mask_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="6x8 patches has no blocks of 4"):
        MaskingCollator((6, 8), block=4)
    with pytest.raises(ValueError, match="expected a number in"):
        MaskingCollator((6, 8), ratio=1.0)
