"""`examples/space`: what a Hugging Face Space needs, and the app from one end to the other in a real browser."""

import os
import re
import socket
import subprocess
import sys
import time
import tomllib
import urllib.request
from pathlib import Path

import pytest
import torch
from browser import visit
from PIL import Image
from sklearn.datasets import load_digits

from hf_vit import HfViTForImageClassification
from hf_vit.checkpoints.processors import processor_of
from hf_vit.data.images import read_image


ROOT = Path(__file__).parents[2]
SPACE = ROOT / "examples" / "space"
MNIST = ROOT / "examples" / "checkpoints" / "vit-mnist.npz"
GRADIOS_OWN = "Method not implemented."  # gradio 6 writes it to the console of every page


def test_the_space_says_what_to_run_and_keeps_its_dependencies_apart():
    _, front, _ = (SPACE / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    fields = dict(line.split(": ", 1) for line in front.splitlines())
    assert fields["sdk"] == "gradio"
    assert (SPACE / fields["app_file"]).is_file()
    needed = {re.split(r"[<>=]", line)[0] for line in (SPACE / "requirements.txt").read_text().split()}
    assert needed == {"gradio", "hf-vit"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert not [name for name in project["dependencies"] if name.startswith("gradio")]


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    """The address of the app, started by its one command."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": str(port)}
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    log = tmp_path_factory.mktemp("space") / "log"
    with log.open("w") as output:
        command = [sys.executable, str(SPACE / "app.py")]
        environment = os.environ | place | {"PYTHONPATH": path}
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            wait_for(f"http://127.0.0.1:{port}", server, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait()


def wait_for(url, server, log):
    for _ in range(600):
        if server.poll() is not None:
            pytest.fail(f"the app ended with {server.returncode}:\n{log.read_text()}")
        try:
            with urllib.request.urlopen(url):
                return
        except OSError:
            time.sleep(0.3)
    pytest.fail(f"the app does not answer:\n{log.read_text()}")


@pytest.fixture
def digit(tmp_path):
    path = tmp_path / "three.png"
    pixels = torch.from_numpy(load_digits().images[3] * 255 / 16).round().to(torch.uint8)
    Image.fromarray(pixels.numpy()).resize((320, 320), Image.Resampling.BILINEAR).save(path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(("size", "scheme"), [("wide", "light"), ("phone", "dark")])
def test_an_uploaded_image_gets_its_classes_and_its_attention(app, digit, size, scheme):
    model = HfViTForImageClassification.from_pretrained(MNIST)
    pixels = processor_of(MNIST, model.config)(read_image(digit), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        probability, index = model(pixels).logits.softmax(-1)[0].max(0)
    with visit(app, size=size, scheme=scheme) as seen:
        seen.page.set_input_files("input[type=file]", digit)
        label = seen.page.get_by_test_id("label-output-value")
        label.wait_for()
        assert label.inner_text() == str(int(index))
        assert (
            f"{100 * float(probability):.0f}%" in seen.page.get_by_test_id(f"{int(index)}-confidence-set").inner_text()
        )
        attention = seen.page.frame_locator("#attention iframe")
        attention.locator("body[data-ready]").wait_for()
        attention.locator("#stage").hover(position={"x": 5, "y": 5})
        attention.locator('body[data-ready="0 3 -1 0 looks"]').wait_for()
        assert "patch in row 1, column 1 looks most at" in attention.locator("#readout").inner_text()
        assert seen.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert [message for message in seen.messages if message != GRADIOS_OWN] == []
        outside = [request for request in seen.requests if not request.startswith((app, "data:", "blob:"))]
        assert outside == []


@pytest.mark.slow
def test_an_image_with_transparency_is_read_as_everywhere_else(app, digit, tmp_path):
    stroke = Image.open(digit)
    image = Image.new("RGBA", stroke.size, "black")
    image.putalpha(stroke)  # black where there is a stroke; the rest shows white
    path = tmp_path / "transparent.png"
    image.save(path)
    model = HfViTForImageClassification.from_pretrained(MNIST)
    pixels = processor_of(MNIST, model.config)(read_image(path), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        probability, index = model(pixels).logits.softmax(-1)[0].max(0)
    with visit(app) as seen:
        seen.page.set_input_files("input[type=file]", path)
        shown = seen.page.get_by_test_id(f"{int(index)}-confidence-set")
        shown.wait_for()
        assert f"{100 * float(probability):.0f}%" in shown.inner_text()


@pytest.mark.slow
def test_a_file_that_is_no_image_is_refused_in_words(app, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    with visit(app) as seen:
        seen.page.set_input_files("input[type=file]", broken)
        toast = seen.page.get_by_test_id("toast-body")
        toast.wait_for()
        assert "broken.png" in toast.inner_text()
        assert "/" not in toast.inner_text()  # where the server keeps it is its own affair
        assert seen.page.locator("#attention iframe").count() == 0
