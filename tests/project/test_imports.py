"""Who may import whom, what importing costs, and what no source may do."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "hf_vit"
HUB_FILES = {
    "configuration_hf_vit": set(),
    "position_embeddings": set(),
    "patch_embeddings": set(),
    "resnetv2": set(),
    "image_resizing": {"configuration_hf_vit"},
    "modeling_hf_vit": {"configuration_hf_vit", "patch_embeddings", "position_embeddings", "resnetv2"},
    "image_processing_hf_vit": {"configuration_hf_vit", "image_resizing"},
}
# Who may import whom: a package imports those in earlier lines. Packages of one line do not import each other, except
# for the pairs below.
LEVELS = (
    ("files",),
    ("catalogue",),
    tuple(HUB_FILES),
    ("__init__",),
    ("checkpoints",),
    ("data", "hub", "export", "evaluation", "inference", "explain"),
    ("training",),
    ("cli",),
)
BESIDE = {("evaluation", "data"), ("explain", "evaluation")}
SOURCES = sorted(
    path
    for folder in ("src", "conversion", "examples", "benchmarks", "docs")
    for path in (ROOT / folder).rglob("*.py")
)


def imports_of(path):
    """(module, level) of every import in a file; level 0 is absolute."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", node.level


def own_imports(path):
    """Names of the modules and packages at the root of hf_vit that a file of it imports."""
    for module, level in imports_of(path):
        if level == 1:
            yield module.split(".")[0]
        elif module.split(".")[0] == "hf_vit":
            yield module.split(".")[1] if "." in module else "__init__"


@pytest.mark.parametrize("name", HUB_FILES)
def test_hub_files_import_each_other_only(name):
    path = PACKAGE / f"{name}.py"
    assert set(own_imports(path)) <= HUB_FILES[name]
    assert all(level < 2 for _, level in imports_of(path)), "one level, or the Hub's copy is incomplete"
    roots = {module.split(".")[0] for module, level in imports_of(path) if level == 0}
    allowed = {"torch", "torchvision", "transformers", "huggingface_hub", "PIL", "numpy"}
    assert roots - set(sys.stdlib_module_names) <= allowed


def test_what_travels_to_the_hub_is_what_the_table_says():
    from hf_vit.hub.push import HUB_FILES as PUSHED

    assert {name.removesuffix(".py") for name in PUSHED} == set(HUB_FILES)
    assert len(PUSHED) <= 7


def test_imports_go_downhill():
    level_of = {name: number for number, names in enumerate(LEVELS) for name in names}
    for path in PACKAGE.rglob("*.py"):
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if own in ("__init__", *HUB_FILES):
            continue
        for name in own_imports(path):
            is_below = level_of[name] < level_of[own] or name == own or (own, name) in BESIDE
            assert is_below, f"{path.relative_to(PACKAGE)} imports hf_vit.{name}"


def test_there_is_no_import_cycle_between_modules():
    modules = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    graph = {}
    for name, path in modules.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found = set()
        for node in tree.body:  # imports at the top: those inside functions run later
            if isinstance(node, ast.ImportFrom):
                target = f"hf_vit.{node.module}" if node.level else node.module or ""
                if target.startswith("hf_vit."):
                    found.add(target.removeprefix("hf_vit."))
        graph[name] = found & set(modules)

    def visit(name, above):
        assert name not in above, " -> ".join([*above[above.index(name) :], name])
        for target in graph.pop(name, ()):
            visit(target, [*above, name])

    for name in list(graph):
        visit(name, [])


@pytest.mark.parametrize("folder", ["conversion", "examples", "benchmarks", "docs"])
def test_scripts_import_public_names(folder):
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "hf_vit":
                private = node.module not in ("hf_vit.cli", "hf_vit.modeling_hf_vit") and node.module.count(".") > 1
                assert not private, f"{path.relative_to(ROOT)} imports {node.module}"
                if node.module.count(".") <= 1 and node.module not in ("hf_vit.cli", "hf_vit.modeling_hf_vit"):
                    public = set(importlib.import_module(node.module).__all__)
                    assert {alias.name for alias in node.names} - {"cli"} <= public, path


@pytest.mark.parametrize("package", sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py")))
def test_packages_say_what_is_public(package):
    module = importlib.import_module(f"hf_vit.{package}")
    assert module.__doc__
    assert all(hasattr(module, name) for name in module.__all__)


def test_the_package_is_small_enough_to_find_ones_way():
    entries = [path for path in PACKAGE.iterdir() if path.name != "__pycache__"]
    assert sum(path.is_file() for path in entries) <= 11
    assert sum(path.is_dir() for path in entries) <= 11
    model = (PACKAGE / "modeling_hf_vit.py").read_text(encoding="utf-8")
    assert len(model.splitlines()) <= 500
    assert not re.search(r"torch\._C|torch\.ops\.|forward_ad", model)


def test_no_test_imports_another_test_file():
    for path in (ROOT / "tests").rglob("*.py"):
        assert not [module for module, _ in imports_of(path) if module.split(".")[0].startswith("test_")], path


@pytest.mark.reliability(row="W06")
@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_unpickles(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.keyword):
            assert not (node.arg == "allow_pickle" and getattr(node.value, "value", None) is not False), node.lineno
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            assert any(word.arg == "weights_only" and word.value.value is True for word in node.keywords), node.lineno
    assert not {"pickle", "dill", "cloudpickle", "joblib", "shelve"} & {m.split(".")[0] for m, _ in imports_of(path)}


def test_importing_the_package_stays_light():
    code = "import sys, hf_vit; print(*sys.modules)"
    loaded = set(subprocess.check_output([sys.executable, "-c", code], text=True).split())
    assert not loaded & {"matplotlib", "evaluate", "datasets", "timm", "sklearn", "onnx", "hf_vit.checkpoints.loading"}


def test_importing_the_package_prints_nothing():
    done = subprocess.run([sys.executable, "-c", "import hf_vit"], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert done.stderr == ""


def test_public_names_are_there():
    import hf_vit

    assert set(hf_vit.__all__) == {
        "PRESETS",
        "HfViTBackbone",
        "HfViTConfig",
        "HfViTForImageClassification",
        "HfViTForMaskedImageModeling",
        "HfViTImageProcessor",
        "HfViTImageProcessorPil",
        "HfViTModel",
        "HfViTPreTrainedModel",
        "__version__",
    }
    assert all(hasattr(hf_vit, name) for name in hf_vit.__all__)
