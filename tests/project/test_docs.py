"""`docs/how-vit-works.md`: made by its script from the code as it is, with no number typed by hand."""

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image


DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "how-vit-works.md"
NAMES = r"ViT-\w+/\d+|R\d+\+ViT-\w+/\d+|ImageNet-21k|[\w.]+_\d"


def load_build():
    specification = importlib.util.spec_from_file_location("build_docs", DOCS / "build.py")
    assert specification is not None
    assert specification.loader is not None
    module = sys.modules["build_docs"] = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


build: Any = load_build()


def test_the_page_is_what_the_script_makes_of_the_code_today():
    rendered = build.render(build.TEMPLATE.read_text(encoding="utf-8"))
    assert PAGE.read_text(encoding="utf-8") == rendered, "the code has changed under the page: python docs/build.py"


def test_no_number_is_typed():
    text = build.TEMPLATE.read_text(encoding="utf-8")
    for pattern in (r"\{\{.+?\}\}", r"<!--.+?-->", r"\$\$.+?\$\$", r"\$.+?\$", NAMES):
        text = re.sub(pattern, "", text, flags=re.DOTALL)
    assert re.findall(r".*\d.*", text) == []


def test_links_lead_to_lines_that_hold_what_they_are_called():
    links = re.findall(r"\[(`?)([^\]]+?)`?\]\(\.\./([\w/]+\.py)#L(\d+)\)", PAGE.read_text(encoding="utf-8"))
    assert len(links) > 25
    for is_code, label, path, number in links:
        line = (DOCS.parent / path).read_text(encoding="utf-8").splitlines()[int(number) - 1]
        if is_code:
            assert label.rpartition(".")[2] in line, f"{label} is not in line {number} of {path}"


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("modeling_hf_vit.Blocks", "expected one Blocks in modeling_hf_vit.py, got 0"),
        ("modeling_hf_vit.Block.forward > self.nothing", "expected one line with 'self.nothing'"),
        ("modeling_hf_vit.Block.forward > x", "expected one line with 'x' in modeling_hf_vit.Block.forward, got 3"),
    ],
)
def test_a_link_that_finds_no_line_stops_the_script(target, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build.link(target)


def test_facts_known_from_elsewhere_are_on_the_page():
    facts = build.gather_facts()
    known = {  # the paper, and the files of its authors
        "parameters": "86,567,656",
        "hybrid.parameters": "98,659,112",
        "patches": "196",
        "patch numbers": "768",
        "shape.attention": f"12{build.TIMES}197{build.TIMES}197",
        "hybrid.shape.stage 3": f"1024{build.TIMES}14{build.TIMES}14",
        "tune.tokens": "577",
        "classes.21k": "21,843",
        "example.parameters": "208,074",
    }
    assert {name: facts[name] for name in known} == known
    work = build.multiplications(build.HfViTConfig.from_preset("ViT-B_16", num_labels=1000), 197)
    assert sum(work.values()) == pytest.approx(17.58e9, rel=2e-3)  # as published for it
    assert "304,326,632" in facts["presets"]
    assert "632,045,800" in facts["presets"]


def test_the_page_shows_every_figure_and_no_other():
    shown = set(re.findall(r"\]\(figures/([\w.-]+)\)", PAGE.read_text(encoding="utf-8")))
    assert shown == {path.name for path in (DOCS / "figures").iterdir()} == set(build.FIGURES)


@pytest.mark.slow
def test_the_figures_are_those_of_the_command(tmp_path):
    build.draw_figures(tmp_path)
    for name in build.FIGURES:
        with Image.open(DOCS / "figures" / name) as committed, Image.open(tmp_path / name) as drawn:
            assert committed.size == drawn.size, name
            old, new = (np.asarray(image.convert("RGB"), dtype=float) for image in (committed, drawn))
        assert np.abs(old - new).mean() < 2, f"{name} is another image: python docs/build.py --figures"
