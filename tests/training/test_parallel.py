"""Trainer and the Accelerate loop, one process, DDP and FSDP2 on two, accumulation: one training, one checkpoint."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from example_scripts import load_example
from safetensors.torch import load_file

from hf_vit import HfViTConfig, HfViTForImageClassification, HfViTImageProcessor
from hf_vit.training.checkpointing import verify_checkpoint


SUPPORT = Path(__file__).parents[1] / "support"
SCRIPTS = {"trainer": "finetune_trainer", "accelerate": "finetune_accelerate"}
TOLERANCE = 1e-5  # sums of another order; measured: 3e-7 for losses, 2e-7 for weights, 1e-5 of 2 for norms
NOISE = "attn.key.bias"  # cancels in the softmax: its gradient is rounding, which AdamW scales up to whole steps
SETTINGS = {
    "adamw": ["--label_smoothing_factor=0.1", "--layer_decay=0.7", "--learning_rate=0.003"],
    "sgd": ["--optim=sgd", "--weight_decay=0", "--momentum_dtype=float32", "--learning_rate=0.05"],
}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A model without dropout, one with it, and 40 images to learn from, 21 held out: two ranks must fill up."""
    root = tmp_path_factory.mktemp("parallel")
    for name, rate in (("model", 0.0), ("dropout", 0.2)):
        torch.manual_seed(0)
        config = HfViTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            image_size=8,
            patch_size=4,
            hidden_dropout_prob=rate,
            id2label={0: "a", 1: "b", 2: "c"},
            zero_init_head=False,
        )
        HfViTForImageClassification(config).save_pretrained(root / name)
        HfViTImageProcessor.for_model(config).save_pretrained(root / name)
    generator = np.random.default_rng(0)
    for split, counts in (("train", (14, 13, 13)), ("test", (7, 5, 9))):
        for channel, (name, count) in enumerate(zip("abc", counts, strict=True)):
            (root / "images" / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 200, (9, 11, 3), dtype=np.uint8)
                pixels[..., channel] += 40
                PIL.Image.fromarray(pixels).save(root / "images" / split / name / f"{number}.png")
    return root


def case(root: Path, name: str, *more: str, model: str = "model", per_device: int = 8) -> dict:
    """A training of 20 steps of 8 images by the script that the last word of its name says."""
    return {
        "name": name,
        "script": SCRIPTS[name.split("-")[-1]],
        "is_sharded": "fsdp" in name,
        "arguments": [
            f"--model_name_or_path={root / model}",
            f"--dataset={root / 'images'}",
            f"--output_dir={root / name}",
            "--max_steps=20",
            "--total_batch_size=8",
            f"--per_device_train_batch_size={per_device}",
            "--per_device_eval_batch_size=4",
            "--ema_decay=0.9",
            "--eval_strategy=steps",
            "--eval_steps=10",
            "--save_strategy=steps",
            "--save_steps=10",
            "--logging_steps=1",
            "--dataloader_num_workers=0",
            "--dataloader_persistent_workers=false",
            "--disable_tqdm=true",
            "--use_cpu=true",
            *more,
        ],
    }


def run_alone(case: dict) -> None:
    assert load_example(case["script"]).main(case["arguments"]) == 0


def run_by_two(cases: list[dict], folder: Path) -> None:
    file = folder / "cases.json"
    file.write_text(json.dumps(cases))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [*launcher, str(SUPPORT / "parallel_cases.py"), str(file)]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr[-5000:]


def history(root: Path, name: str, what: str) -> dict[int, float]:
    state = json.loads((root / name / "checkpoint-20" / "trainer_state.json").read_text())
    return {entry["step"]: entry[what] for entry in state["log_history"] if what in entry}


def assert_same_training(root: Path, one: str, other: str, tolerance: float) -> None:
    for what, count in (("loss", 20), ("grad_norm", 20), ("learning_rate", 20), ("eval_loss", 2)):
        left, right = history(root, one, what), history(root, other, what)
        assert len(left) == count
        assert right == pytest.approx(left, rel=tolerance, abs=tolerance), what
    assert history(root, one, "eval_accuracy") == history(root, other, "eval_accuracy")
    for name in ("checkpoint-20/model.safetensors", "checkpoint-20/ema.safetensors", "model.safetensors"):
        left, right = load_file(root / one / name), load_file(root / other / name)
        assert left.keys() == right.keys()
        worst = max(float((left[key] - right[key]).abs().max()) for key in left if NOISE not in key)
        assert worst <= tolerance, name


def test_the_accelerate_loop_is_trainer_bit_for_bit_dropout_included(root):
    for script in SCRIPTS:
        run_alone(case(root, f"dropout-{script}", *SETTINGS["adamw"], "--mixup_alpha=0.5", model="dropout"))
    for what in ("loss", "grad_norm", "learning_rate"):
        assert history(root, "dropout-trainer", what) == history(root, "dropout-accelerate", what)
    assert_same_training(root, "dropout-trainer", "dropout-accelerate", 1e-6)  # the loss over the held-out part
    left, right = (load_file(root / f"dropout-{script}" / "model.safetensors") for script in SCRIPTS)
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_each_goes_on_from_the_others_checkpoint_bit_for_bit(root):
    for script in SCRIPTS:
        if not (root / f"dropout-{script}").exists():
            run_alone(case(root, f"dropout-{script}", *SETTINGS["adamw"], "--mixup_alpha=0.5", model="dropout"))
    for writer, reader in (("trainer", "accelerate"), ("accelerate", "trainer")):
        resume = f"--resume_from_checkpoint={root / f'dropout-{writer}' / 'checkpoint-10'}"
        settings = [*SETTINGS["adamw"], "--mixup_alpha=0.5", resume]
        run_alone(case(root, f"resumed-{reader}", *settings, model="dropout"))
        ends = (f"resumed-{reader}", f"dropout-{writer}")
        assert history(root, ends[0], "loss") == history(root, ends[1], "loss")
        left, right = (
            load_file(root / f"{name}" / "model.safetensors") for name in (f"resumed-{reader}", f"dropout-{writer}")
        )
        assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.slow
def test_processes_sharding_and_accumulation_do_not_change_a_training(root):
    together = []
    for optimizer, settings in SETTINGS.items():
        for script in SCRIPTS:
            run_alone(case(root, f"{optimizer}-one-{script}", *settings))
            run_alone(case(root, f"{optimizer}-accumulated-{script}", *settings, per_device=4))
            together += [case(root, f"{optimizer}-{way}-{script}", *settings, per_device=4) for way in ("ddp", "fsdp")]
    for reader, writer in (("fsdp-trainer", "one-accelerate"), ("ddp-accelerate", "fsdp-trainer")):
        resume = f"--resume_from_checkpoint={root / f'adamw-{writer}' / 'checkpoint-10'}"
        together.append(case(root, f"resumed-{reader}", *SETTINGS["adamw"], resume, per_device=4))
    run_by_two(together, root)
    for optimizer in SETTINGS:
        for way in (
            "one-accelerate",
            *(f"{way}-{script}" for way in ("accumulated", "ddp", "fsdp") for script in SCRIPTS),
        ):
            assert_same_training(root, f"{optimizer}-one-trainer", f"{optimizer}-{way}", TOLERANCE)
    for reader, writer in (("one-trainer", "fsdp-accelerate"), ("one-accelerate", "ddp-trainer")):
        resume = f"--resume_from_checkpoint={root / f'adamw-{writer}' / 'checkpoint-10'}"
        run_alone(case(root, f"resumed-{reader}", *SETTINGS["adamw"], resume))
    for reader in ("fsdp-trainer", "ddp-accelerate", "one-trainer", "one-accelerate"):
        assert_same_training(root, "adamw-one-trainer", f"resumed-{reader}", TOLERANCE)
    for way in ("one", "ddp", "fsdp"):
        for script in SCRIPTS:
            folder = root / f"adamw-{way}-{script}"
            verify_checkpoint(folder / "checkpoint-20")
            HfViTForImageClassification.from_pretrained(folder / "checkpoint-20")
            HfViTForImageClassification.from_pretrained(folder)
            assert "accuracy" in (folder / "README.md").read_text()
    another = history(root, "sgd-one-trainer", "loss")
    assert another != pytest.approx(history(root, "adamw-one-trainer", "loss"), rel=0, abs=100 * TOLERANCE)


@pytest.mark.slow
def test_two_processes_share_a_stream_and_evaluate_every_image_once(root, tmp_path):
    """Each of the 40 images is one process's in an epoch, and an epoch is 5 steps of 2 x 4 images."""
    cases = [
        case(root, f"streamed-{script}", *SETTINGS["adamw"], "--streaming=true", "--shuffle_buffer=8", per_device=4)
        for script in SCRIPTS
    ]
    run_by_two(cases, tmp_path)
    for name in ("streamed-trainer", "streamed-accelerate"):
        taken = [(tmp_path / f"taken-{name}-{rank}.txt").read_text().split("\n")[:-1] for rank in (0, 1)]
        assert [len(lines) for lines in taken] == [80, 80]  # 20 steps of 4
        for epoch in range(4):
            parts = [[line for line in lines if line.startswith(f"{epoch} ")] for lines in taken]
            assert [len(part) for part in parts] == [20, 20]
            assert len(set(parts[0]) | set(parts[1])) == 40
        orders = [[line.split()[1] for line in taken[0] if line.startswith(f"{epoch} ")] for epoch in (0, 1)]
        assert orders[0] != orders[1]
        results = json.loads((root / name / "results.json").read_text())
        arguments = [f"--model_name_or_path={root / name}", f"--dataset={root / 'images'}", "--num_workers=0"]
        assert load_example("eval").main([*arguments, f"--json={tmp_path / name}.json"]) == 0
        alone = json.loads((tmp_path / f"{name}.json").read_text())
        assert alone["num_samples"] == 21
        assert results["eval_accuracy"] == alone["accuracy"]
        assert results["eval_ece"] == pytest.approx(alone["ece"], abs=1e-6)
    assert_same_training(root, "streamed-trainer", "streamed-accelerate", TOLERANCE)
