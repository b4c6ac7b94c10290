"""The promises of README and CONTRIBUTING: the code runs, the tree is the tree, the links lead somewhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
FOLDERS = ("src/hf_vit", "conversion", "examples", "benchmarks", "docs")
SKIPPED = {"__pycache__", "checkpoints", "results", "figures"}  # named as folders


def test_every_python_block_runs():
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert blocks
    for block in blocks:
        done = subprocess.run([sys.executable, "-c", block], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == "0"  # the first digit of the set


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_tree_names_every_file_with_a_comment(folder):
    tree = CONTRIBUTING[CONTRIBUTING.index("## Where things are") :]
    section = re.split(r"\n    (?=\S)", tree[tree.index(f"\n    {folder}/") + 1 :], maxsplit=1)[
        0
    ]  # up to the next folder
    lines = {line.split()[0].rstrip("/"): line.split(maxsplit=1)[1:] for line in section.splitlines() if line.split()}
    for path in (ROOT / folder).rglob("*"):
        inner = path.relative_to(ROOT / folder)
        if path.is_file() and not SKIPPED & set(inner.parts) and path.suffix != ".pyc":
            assert lines.get(inner.parts[0] if len(inner.parts) > 1 else path.name), f"{folder}/{inner} has no comment"


def test_links_lead_somewhere():
    for document in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "SECURITY.md",
        *(ROOT / "docs").glob("*.md"),
        ROOT / "conversion" / "README.md",
    ):
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text(encoding="utf-8")):
            assert (document.parent / link).exists(), f"{document.name}: {link}"


@pytest.mark.parametrize("command", ["demo", "test", "test-slow", "style", "quality", "bench", "reliability"])
def test_every_make_target_is_there(command):
    assert re.search(rf"^{command}:", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
