"""The page of `examples/explain.py`: what is packed into it, and what a reader in a real browser meets."""

import importlib.util
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from browser import SIZES, visit
from PIL import Image
from tiny_models import TINY

from hf_vit import HfViTConfig, HfViTForImageClassification
from hf_vit.data.images import ImageError
from hf_vit.explain import TokenGrid
from hf_vit.explain.figures import times_uniform
from hf_vit.explain.maps import join_patches, uniform_distance
from hf_vit.explain.page import AttentionPage, pack_rows, unpack_rows


ROOT = Path(__file__).parents[2]
MNIST = ROOT / "examples" / "checkpoints" / "vit-mnist.npz"
HOSTILE = "</script><img src=x onerror=console.log(1)>"


def make_page(*, images=1, grid=(6, 9), max_bytes=64 * 2**20, pooling="token", heads=3, layers=2, labels=("cat",)):
    """A page on random images, the model that is explained in it, and what was found."""
    torch.manual_seed(0)
    names = dict(enumerate(labels)) if len(labels) > 1 else {0: labels[0], 1: "dog"}
    config = HfViTConfig(
        hidden_size=16 * heads, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=32,
        image_size=32, patch_size=8, pooling=pooling, id2label=names,
        label2id={name: index for index, name in names.items()}, zero_init_head=False,
    )  # fmt: skip
    model = HfViTForImageClassification(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    page = AttentionPage(model, name="tiny", num_images=images, max_bytes=max_bytes)
    found = []
    for number in range(images):
        pixels = make_pixels(grid, number)
        image = Image.new("RGB", (pixels.shape[3], pixels.shape[2]), (90 + 60 * number, 120, 60))
        found.append(page.add(f"image {number}", image, pixels, num_classes=2, occlusion_steps=3))
    return page, model, found


def make_pixels(grid, seed):
    size = (8 * grid[0] + 3, 8 * grid[1] + 5)  # what does not fill a patch is dropped
    return torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def attention_of(model, layer):
    """The attention (K, N, N) of the first image, by the model's own output."""
    with torch.no_grad():
        output = model(make_pixels((6, 9), 0), output_attentions=True, interpolate_pos_encoding=True)
    return output.attentions[layer][0]


def packed_blocks(html):
    return re.findall(r'<script type="text/plain" id="attention-\d+-\d+">([^<]+)</script>', html)


# --- what is in the page ---


def test_packed_attention_comes_back_to_a_fraction_of_each_rows_largest():
    attention = torch.softmax(4 * torch.randn(3, 50, 50, generator=torch.Generator().manual_seed(0)), dim=-1)
    difference = (unpack_rows(pack_rows(attention), 3, 50) - attention).abs()
    assert (difference / attention.amax(-1, keepdim=True)).max() <= 0.004
    assert pack_rows(torch.zeros(1, 2, 2))  # no row to scale by


def test_joined_patches_give_and_get_what_their_patches_did():
    tokens = TokenGrid((3, 5), (8, 8), 1)
    attention = torch.softmax(torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    joined, coarse = join_patches(attention, tokens, 2)
    assert coarse == TokenGrid((2, 3), (16, 16), 1)
    assert torch.allclose(joined.sum(-1), torch.ones(2, 7))
    square = [1 + 5 * row + column for row in (0, 1) for column in (2, 3)]  # the second square of the first row
    corner = [1 + 5 * 2 + 4]  # a single patch, lower right
    expected = attention[:, square][:, :, corner].sum(-1).mean(-1)
    assert torch.allclose(joined[:, 2, 6], expected)
    assert torch.allclose(joined[:, 0, 0], attention[:, 0, 0])


@pytest.mark.parametrize(("budget", "join"), [(64 * 2**20, 1), (20_000, 1), (10_000, 2), (1, 9)])
def test_a_page_keeps_to_its_budget_by_joining_patches(budget, join):
    page, _, _ = make_page(max_bytes=budget)
    described = page.images[0]
    assert described["join"] == join
    tokens = 1 + described["grid"][0] * described["grid"][1]
    if budget > 1:
        assert 2 * 3 * tokens**2 <= budget
    assert sum(described["weights"]) == pytest.approx(1, abs=1e-6)
    assert len(packed_blocks(page.html())) == 2


def test_the_page_is_whole_and_names_nothing_outside():
    page, _, _ = make_page(labels=("</script>cat", "dog & <b>"))
    html = page.html()
    assert "{{" not in html
    assert not re.findall(r"(?:src|href)=[\"'](?!data:)", html)
    assert not re.findall(r"https?://(?!www\.w3\.org/)", html)
    assert html.count("</script>") == 2 + len(page.attentions[0])  # the labels' own are escaped


def run_example(name, *arguments):
    specification = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert specification is not None
    assert specification.loader is not None
    script = sys.modules[name] = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    return script.main([str(argument) for argument in arguments])


@pytest.fixture
def digit(tmp_path):
    from sklearn.datasets import load_digits

    pixels = torch.from_numpy(load_digits().images[3] * 15).to(torch.uint8)
    path = tmp_path / "a three.png"
    Image.fromarray(pixels.numpy()).resize((200, 120)).save(path)
    return path


def test_the_command_writes_one_page_and_its_figures_and_keeps_what_was_there(tmp_path, digit, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    arguments = ("--model_name_or_path", MNIST, "--output_dir", out, "--top_k", 1, "--occlusion_steps", 3)
    assert run_example("explain", digit, *arguments, "--image_size", 24, 40) == 0
    assert sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()) == [
        "figures/01-a_three-heads.png",
        "figures/01-a_three-overview.png",
        "figures/model-distances.png",
        "figures/model-filters.png",
        "figures/model-positions.png",
        "index.html",
        "notes.txt",
    ]
    for path in (out / "figures").glob("*.png"):
        with Image.open(path) as image:
            colors = image.convert("RGB").getcolors(2**20)
            assert colors is None or len(colors) > 50, f"{path.name} is empty"
    html = (out / "index.html").read_text()
    assert "a three.png" in html
    assert '"patches": [6, 10]' in html
    assert run_example("explain", digit, *arguments, "--image_size", 24, 40) == 0  # its own page is replaced
    assert str(out / "index.html") in capsys.readouterr().out


@pytest.mark.parametrize("name", ["index.html", "figures/model-filters.png", "figures/01-a_three-heads.png"])
def test_a_page_or_figure_of_another_program_is_refused(name, tmp_path, digit):
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    arguments = ("--model_name_or_path", "/nowhere", "--output_dir", tmp_path / "out")
    with pytest.raises(FileExistsError, match=f"{name}, which hf-vit did not write"):
        run_example("explain", digit, *arguments)
    assert path.read_text() == "mine"


def test_a_random_twin_is_another_entry_and_leaves_the_figures_of_the_model_alone():
    torch.manual_seed(3)
    model = HfViTForImageClassification(HfViTConfig(**(TINY | {"zero_init_head": False}))).eval()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    page, pixels = AttentionPage(model, name="m", num_images=2), torch.randn(1, 3, 32, 32)
    image = Image.new("RGB", (32, 32))
    state = torch.get_rng_state()
    explanation = page.add("a", image, pixels, num_classes=1, occlusion_steps=0)
    twin = page.add_random_twin("a", image, pixels)
    assert torch.equal(torch.get_rng_state(), state)
    assert [entry["name"] for entry in page.images] == ["a", "a, random weights"]
    assert page.images[1]["classes"] == []
    assert not torch.allclose(twin.pooled_attention, explanation.pooled_attention)
    assert torch.equal(page.mean_distances(), explanation.distances)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in page.model.state_dict().items())
    assert page.uniform_distance() == pytest.approx(uniform_distance(explanation.tokens))


def test_uniform_attention_is_one_on_the_scale_whatever_the_image():
    low, one, high = times_uniform(torch.tensor([0.1, 1.0, 16.0])).tolist()
    assert (low, high) == (0, 1)
    assert one == pytest.approx(math.log(4) / math.log(64))


def test_the_uniform_distance_is_the_mean_over_all_pairs_of_patches():
    tokens = TokenGrid((2, 3), (4, 5), 1)
    centres = [(4 * row, 5 * column) for row in range(2) for column in range(3)]
    pairs = [math.dist(a, b) for a in centres for b in centres]
    assert uniform_distance(tokens) == pytest.approx(sum(pairs) / len(pairs))


def test_an_unreadable_image_leaves_no_half_made_folder(tmp_path, digit):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    out = tmp_path / "out"
    with pytest.raises(ImageError, match=r"broken\.png"):
        run_example("explain", digit, broken, "--model_name_or_path", MNIST, "--output_dir", out)
    assert not out.exists()


# --- what a reader meets ---


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A page of two images on disk, and the model in it."""
    page, model, found = make_page(images=2, labels=(HOSTILE, "dog"))
    path = tmp_path_factory.mktemp("site") / "index.html"
    path.write_text(page.html(), encoding="utf-8")
    return path.as_uri(), model, found


def ready(seen, expected):
    seen.page.wait_for_selector(f'body[data-ready="{expected}"]')


def centre_of(seen, row, column, grid=(6, 9)):
    box = seen.page.locator("#stage").bounding_box()
    width = min(box["width"], box["height"] * (grid[1] * 8) / (grid[0] * 8))
    cell = width / grid[1]
    return box["x"] + (column + 0.5) * cell, box["y"] + (row + 0.5) * cell


def quiet(seen, url):
    """Nothing on the console, and no request but for the page itself and for data in it."""
    assert seen.messages == []
    assert [request for request in seen.requests if not request.startswith("data:")] == [url]


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_pointing_at_a_patch_shows_where_it_looks(site, size, scheme):
    url, model, _ = site
    with visit(url, size=size, scheme=scheme) as seen:
        ready(seen, "0 1 -1 pooled looks")
        if size == "phone":
            seen.page.touchscreen.tap(*centre_of(seen, 2, 4))
        else:
            seen.page.mouse.move(*centre_of(seen, 2, 4))
        ready(seen, "0 1 -1 22 looks")
        row = attention_of(model, 1).mean(0)[1 + 22]
        best = divmod(int(row[1:].argmax()), 9)
        text = seen.page.inner_text("#readout")
        assert f"patch in row 3, column 5 looks most at the patch in row {best[0] + 1}, column {best[1] + 1}" in text
        shown = [float(number) for number in re.findall(r"([\d.]+) %", text)]
        assert shown == pytest.approx([100 * float(row[1:].max()), 100 * float(row[0])], abs=0.6)
        assert seen.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        paper = seen.page.evaluate("getComputedStyle(document.body).backgroundColor")
        light = sum(int(n) for n in re.findall(r"\d+", paper)[:3]) > 384
        assert light == (scheme == "light")
        quiet(seen, url)


@pytest.mark.slow
def test_the_brightest_cell_on_the_stage_is_where_the_attention_is_largest(site):
    url, model, _ = site
    with visit(url) as seen:
        ready(seen, "0 1 -1 pooled looks")
        seen.page.mouse.move(*centre_of(seen, 5, 8))
        ready(seen, "0 1 -1 53 looks")
        bright = seen.page.evaluate("""() => {
            const stage = document.getElementById("stage"), context = stage.getContext("2d");
            const cell = stage.width / 9;
            return Array.from({length: 54}, (_, i) => {
                const x = (i % 9 + 0.5) * cell, y = (Math.floor(i / 9) + 0.5) * cell;
                return context.getImageData(x, y, 1, 1).data.slice(0, 3).reduce((sum, part) => sum + part);
            });
        }""")
        row = attention_of(model, 1).mean(0)[1 + 53, 1:]
        assert bright.index(max(bright)) == int(row.argmax())


@pytest.mark.slow
def test_everything_can_be_reached_by_keyboard(site):
    url, model, _ = site
    with visit(url) as seen:
        ready(seen, "0 1 -1 pooled looks")
        seen.page.focus("#image")
        seen.page.keyboard.press("Tab")
        assert seen.page.evaluate("document.activeElement.id") == "stage"
        for key, expected in (
            ("ArrowLeft", "0 1 -1 30 looks"),
            ("ArrowUp", "0 1 -1 21 looks"),
            ("ArrowRight", "0 1 -1 22 looks"),
            ("ArrowDown", "0 1 -1 31 looks"),
            ("PageUp", "0 0 -1 31 looks"),
            ("PageUp", "0 0 -1 31 looks"),
            ("h", "0 0 0 31 looks"),
            ("h", "0 0 1 31 looks"),
            ("Shift+H", "0 0 0 31 looks"),
            ("d", "0 0 0 31 seen"),
        ):
            seen.page.keyboard.press(key)
            ready(seen, expected)
        column = attention_of(model, 0)[0, :, 1 + 31]
        best = divmod(int(column[1:].argmax()), 9)
        assert f"row {best[0] + 1}, column {best[1] + 1}, which gives it" in seen.page.inner_text("#readout")
        seen.page.keyboard.press("c")
        ready(seen, "0 0 0 pooled seen")
        seen.page.focus("#block")
        seen.page.keyboard.press("ArrowRight")
        ready(seen, "0 1 0 pooled seen")
        seen.page.focus("#heads input:checked")
        seen.page.keyboard.press("ArrowRight")
        ready(seen, "0 1 1 pooled seen")
        quiet(seen, url)


@pytest.mark.slow
def test_classes_are_compared_and_labels_are_text(site):
    url, _, found = site
    with visit(url) as seen:
        ready(seen, "0 1 -1 pooled looks")
        titles = seen.page.locator("#classes h3").all_inner_texts()
        assert [title.rsplit(" · ", 1)[0] for title in titles] == [best.label for best in found[0].classes]
        assert HOSTILE in [best.label for best in found[0].classes]
        assert seen.page.locator("#classes canvas").count() == 4
        seen.page.select_option("#image", "1")
        ready(seen, "1 1 -1 pooled looks")
        assert seen.page.inner_text("#about") == "image 1: 6 \N{MULTIPLICATION SIGN} 9 patches, 2 blocks of 3 heads"
        quiet(seen, url)


@pytest.mark.slow
@pytest.mark.parametrize(("pooling", "budget"), [("gap", 64 * 2**20), ("map", 12_000)])
def test_other_poolings_and_joined_patches_are_shown_too(tmp_path, pooling, budget):
    page, _, _ = make_page(pooling=pooling, max_bytes=budget)
    path = tmp_path / "index.html"
    path.write_text(page.html(), encoding="utf-8")
    with visit(path.as_uri()) as seen:
        ready(seen, "0 1 -1 pooled looks")
        assert "What is pooled looks most at" in seen.page.inner_text("#readout")
        assert ("joined" in seen.page.inner_text("#about")) == (budget == 12_000)
        quiet(seen, path.as_uri())


@pytest.mark.slow
def test_a_grid_of_24_by_24_patches_follows_the_pointer(tmp_path):
    page, _, _ = make_page(grid=(24, 24), heads=12, layers=1, labels=("cat", "dog"))
    path = tmp_path / "index.html"
    path.write_text(page.html(), encoding="utf-8")
    assert page.images[0]["join"] == 1
    with visit(path.as_uri()) as seen:
        ready(seen, "0 0 -1 pooled looks")
        for cell in (0, 100, 575):
            seen.page.mouse.move(*centre_of(seen, cell // 24, cell % 24, (24, 24)))
            ready(seen, f"0 0 -1 {cell} looks")
        quiet(seen, path.as_uri())
