"""The wheel is the product: it holds the commands, and they run outside the repository."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_wheel_runs_its_commands_in_an_empty_folder(tmp_path):
    source = tmp_path / "source"
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        source.mkdir(exist_ok=True)
        shutil.copyfile(ROOT / name, source / name)
    for name in ("src", "conversion", "examples"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*build, "--wheel-dir", str(tmp_path), str(source)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("hf_vit-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    for folder in ("conversion", "examples"):
        scripts = {path.name for path in (ROOT / folder).glob("*.py")}
        assert {f"hf_vit/scripts/{folder}/{name}" for name in scripts} <= names
    assert {"hf_vit/py.typed", "hf_vit/catalogue/entries.toml", "hf_vit/explain/page.html"} <= names
    empty = tmp_path / "empty"
    empty.mkdir()
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    checkpoint = tmp_path / "site" / "hf_vit" / "scripts" / "examples" / "checkpoints" / "vit-mnist.npz"

    def run(*arguments):
        command = [sys.executable, "-m", "hf_vit.cli", *map(str, arguments)]
        return subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True, check=False)

    assert "convert" in run("--help").stdout
    assert run("convert", checkpoint, "model").returncode == 0
    assert (empty / "model" / "parity.json").is_file()
    assert run("to-jax", "model", "back.npz").returncode == 0
    assert (empty / "back.npz").read_bytes() == checkpoint.read_bytes()
    wrong = run("convertt")
    assert wrong.returncode == 2
    assert wrong.stderr.strip().splitlines()[-1] == "error: unknown command convertt, did you mean convert?"
