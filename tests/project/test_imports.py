"""Who may import whom, what importing costs, and what no source may do."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "hf_vit"
HUB_FILES = {
    "configuration_hf_vit": set(),
    "position_embeddings": set(),
    "resnetv2": set(),
    "cpu_kernels": set(),
    "modeling_hf_vit": {"configuration_hf_vit", "cpu_kernels", "position_embeddings", "resnetv2"},
    "image_processing_hf_vit": {"configuration_hf_vit"},
}
ON_TOP = {"training", "explain", "probing", "inference", "hub"}
SOURCES = sorted(
    path for folder in ("src", "conversion", "examples", "benchmarks") for path in (ROOT / folder).rglob("*.py")
)


def imports_of(path):
    """(module, level) of every import in a file; level 0 is absolute."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", node.level


def own_imports(path):
    """Names of modules of this package that a file of it imports."""
    for module, level in imports_of(path):
        if level == 1:
            yield module.split(".")[0]
        elif module.startswith("hf_vit"):
            yield module.split(".")[1] if "." in module else "__init__"


@pytest.mark.parametrize("name", HUB_FILES)
def test_hub_files_import_each_other_only(name):
    path = PACKAGE / f"{name}.py"
    assert set(own_imports(path)) <= HUB_FILES[name]
    assert all(level < 2 for _, level in imports_of(path)), "one level, or the Hub's copy is incomplete"
    roots = {module.split(".")[0] for module, level in imports_of(path) if level == 0}
    assert roots - set(sys.stdlib_module_names) <= {
        "torch",
        "torchvision",
        "transformers",
        "huggingface_hub",
        "PIL",
        "numpy",
    }


@pytest.mark.parametrize("name", ["layouts", "position_embeddings", "resnetv2", "cpu_kernels"])
def test_tables_and_tensor_functions_import_torch_alone(name):
    roots = {module.split(".")[0] for module, level in imports_of(PACKAGE / f"{name}.py")}
    assert roots - set(sys.stdlib_module_names) == {"torch"}


def test_what_sits_on_top_does_not_import_its_neighbours():
    for name in sorted(ON_TOP):
        files = [PACKAGE / f"{name}.py", *(PACKAGE / name).rglob("*.py")]
        allowed = {name} | ({"hub"} if name == "training" else set())  # the trained folder gets its card
        for path in filter(Path.exists, files):
            assert not (set(own_imports(path)) & ON_TOP) - allowed, path


def test_nothing_below_imports_what_sits_on_top():
    for path in PACKAGE.glob("*.py"):
        if path.stem not in ON_TOP:
            assert not set(own_imports(path)) & ON_TOP, path


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
    }
    assert all(hasattr(hf_vit, name) for name in hf_vit.__all__)
