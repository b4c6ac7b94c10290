"""The demo, from one end to the other."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hf_vit import HfViTForImageClassification


DEMO = Path(__file__).parents[2] / "examples" / "demo.py"


def test_a_folder_of_the_user_is_refused(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("mine")
    done = subprocess.run([sys.executable, DEMO, "--output_dir", tmp_path], capture_output=True, text=True)
    assert done.returncode == 1
    expected = f"error: {tmp_path} holds files of others: choose another --output_dir, or remove it"
    assert done.stderr.splitlines()[-1] == expected
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["model", "model/config.json"]


@pytest.mark.slow
def test_the_demo_converts_proves_trains_and_leaves_a_model(tmp_path):
    out = tmp_path / "demo"
    for _ in range(2):  # a second run replaces the first
        done = subprocess.run(
            [sys.executable, DEMO, "--output_dir", out, "--num_train_epochs", "1"], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    difference = re.search(r"at the logits: (\S+)", done.stdout)
    assert difference is not None
    assert float(difference[1]) <= 1e-5
    tuned = re.search(r"fine-tuned from the checkpoint +([\d.]+)%", done.stdout)
    scratch = re.search(r"the same from random weights +([\d.]+)%", done.stdout)
    assert tuned is not None
    assert scratch is not None
    assert float(tuned[1]) > float(scratch[1]) + 20
    assert (out / "predictions.png").stat().st_size > 10_000
    names = {path.name for path in (out / "model").iterdir()}
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"} <= names
    assert "pipeline_tag: image-classification" in (out / "model" / "README.md").read_text()
    code = f"import hf_vit, transformers; print(transformers.pipeline(model={str(out / 'model')!r}).task)"
    code = code.replace("pipeline(", "pipeline('image-classification', ")
    assert "image-classification" in subprocess.check_output([sys.executable, "-c", code], text=True)


@pytest.mark.slow
def test_ctrl_c_leaves_a_checkpoint_that_loads(tmp_path):
    out = tmp_path / "demo"
    command = [sys.executable, DEMO, "--output_dir", out, "--num_train_epochs", "50"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    checkpoints = out / "model"
    while not list(checkpoints.glob("checkpoint-*")) and process.poll() is None:
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGINT)
    output, _ = process.communicate()
    assert process.returncode == 128 + signal.SIGINT, output
    newest = max(checkpoints.glob("checkpoint-*"), key=lambda folder: int(folder.name.rpartition("-")[2]))
    HfViTForImageClassification.from_pretrained(newest)
