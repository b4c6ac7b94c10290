"""What is pushed is whole, comes back as it was and loads without this package; its card states only what is known."""

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hub_server import HubServer
from huggingface_hub import EvalResult, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from PIL import Image
from safetensors.torch import load_file
from transformers import pipeline

import hf_vit
from hf_vit import (
    HfViTBackbone,
    HfViTConfig,
    HfViTForImageClassification,
    HfViTForMaskedImageModeling,
    HfViTImageProcessor,
    HfViTModel,
)
from hf_vit.hub.push import AUTO_MAP, HUB_FILES, push, write_model_card


# huggingface_hub sends a large file in a way that its HTTP library calls deprecated
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
    "zero_init_head": False,
}
ROOT_ONLY = SMALL | {"patch_size": 2, "resnet_layers": [], "resnet_width_factor": 0.5}
PACKAGE = Path(hf_vit.__file__).parent
PROCESSOR_CODE = {"image_processing_hf_vit.py", "image_resizing.py"}
EVERYTHING = {"README.md", "config.json", "model.safetensors", "preprocessor_config.json", *HUB_FILES}


def small(model_class=HfViTForImageClassification, fields=SMALL, **more):
    torch.manual_seed(0)
    return model_class(HfViTConfig(**fields, **more)).eval()


def sample_image() -> Image.Image:
    return Image.frombytes("RGB", (40, 30), bytes(value * 7 % 256 for value in range(40 * 30 * 3)))


def weights(hub: HubServer, name: str, revision: str = "main") -> bytes:
    return hub.files(name, revision)["model.safetensors"]


def new_hub(monkeypatch, home: Path) -> HubServer:
    server = HubServer()
    server.add_user("me", token="hf_me")
    server.add_user("you", token="hf_you")
    server.attach(monkeypatch, home)
    monkeypatch.setenv("HF_TOKEN", "hf_me")
    return server


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A server, this process's client logged in to it as `me`, and an empty folder to work in."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    with new_hub(monkeypatch, tmp_path / "cache") as server:
        yield server
    huggingface_hub.close_session()


# a machine without the package

LOAD_WITHOUT_THE_PACKAGE = """
import json, sys
import torch
from PIL import Image
from safetensors.torch import save_file

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_vit":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
torch.set_num_threads(1)
from transformers import AutoBackbone, AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline

remote = {"trust_remote_code": True}
classifier = AutoModelForImageClassification.from_pretrained("me/classifier", **remote).eval()
branch = AutoModelForImageClassification.from_pretrained("me/classifier", revision="v2", **remote).eval()
hybrid = AutoModelForImageClassification.from_pretrained("me/hybrid", **remote).eval()
backbone = AutoBackbone.from_pretrained("me/backbone", **remote).eval()
base = AutoModel.from_pretrained("me/classifier", **remote).eval()
backends = ("torchvision", "pil")
processors = {b: AutoImageProcessor.from_pretrained("me/classifier", backend=b, **remote) for b in backends}
image = Image.open(sys.argv[1])
pixels = {b: p(image, return_tensors="pt").pixel_values for b, p in processors.items()}
seen = pixels["torchvision"]
with torch.no_grad():
    outputs = {
        "classifier": classifier(seen).logits,
        "branch": branch(seen).logits,
        "hybrid": hybrid(seen).logits,
        "backbone": backbone(seen).feature_maps[0],
        "base": base(seen).last_hidden_state,
        "torchvision": seen,
        "pil": pixels["pil"],
    }
save_file({name: tensor.contiguous() for name, tensor in outputs.items()}, sys.argv[2])
answers = pipeline("image-classification", model="me/classifier", **remote)(image, top_k=2)
try:
    import hf_vit
    importable = True
except ModuleNotFoundError:
    importable = False
names = {type(thing).__name__: type(thing).__module__ for thing in (classifier, backbone, base, *processors.values())}
print(json.dumps({"importable": importable, "modules": names, "answers": answers}))
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """Models pushed from here, and what a process that cannot import hf_vit makes of the repositories."""
    home = tmp_path_factory.mktemp("elsewhere")
    models = {
        "classifier": small(num_labels=3),
        "branch": small(num_labels=5),
        "hybrid": small(fields=ROOT_ONLY, num_labels=4),
        "backbone": small(HfViTBackbone),
    }
    with pytest.MonkeyPatch.context() as monkeypatch, new_hub(monkeypatch, home / "cache") as hub:
        for name in ("classifier", "hybrid", "backbone"):
            push(models[name], f"me/{name}", private=True)
        push(models["branch"], "me/classifier", revision="v2")
        huggingface_hub.close_session()
        sample_image().save(home / "image.png")
        hub.requests.clear()
        hub.fault("/storage/", method="GET", drop_after=2000, times=2)
        command = [sys.executable, "-c", LOAD_WITHOUT_THE_PACKAGE, home / "image.png", home / "outputs.safetensors"]
        environment = hub.environment(home, token="hf_me")
        run = subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
    outputs = load_file(home / "outputs.safetensors")
    return models, outputs, json.loads(run.stdout.splitlines()[-1]), hub


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_a_pushed_repository_loads_where_the_package_cannot_be_imported(elsewhere):
    _, _, said, _ = elsewhere
    assert not said["importable"]
    assert set(said["modules"]) == {
        "HfViTForImageClassification",
        "HfViTBackbone",
        "HfViTModel",
        "HfViTImageProcessor",
        "HfViTImageProcessorPil",
    }
    assert all(module.startswith("transformers_modules.") for module in said["modules"].values())
    assert {answer["label"] for answer in said["answers"]} < {"LABEL_0", "LABEL_1", "LABEL_2"}


@pytest.mark.parametrize("name", ["classifier", "branch", "hybrid"])
def test_classifiers_come_back_with_their_logits(elsewhere, name):
    models, outputs, _, _ = elsewhere
    with torch.no_grad():
        torch.testing.assert_close(outputs[name], models[name](outputs["torchvision"]).logits, atol=1e-6, rtol=0)


def test_a_backbone_and_a_base_model_come_back_with_their_features(elsewhere):
    models, outputs, _, _ = elsewhere
    with torch.no_grad():
        (features,) = models["backbone"](outputs["torchvision"]).feature_maps
        hidden = models["classifier"].vit(outputs["torchvision"]).last_hidden_state
    torch.testing.assert_close(outputs["backbone"], features, atol=1e-6, rtol=0)
    torch.testing.assert_close(outputs["base"], hidden, atol=1e-6, rtol=0)


def test_the_image_processor_comes_back_with_its_pixels_in_both_backends(elsewhere):
    models, outputs, _, _ = elsewhere
    processor = HfViTImageProcessor.for_model(models["classifier"].config)
    pixels = processor(sample_image(), return_tensors="pt").pixel_values
    assert torch.equal(outputs["torchvision"], pixels)
    torch.testing.assert_close(outputs["pil"], pixels, atol=1 / 255, rtol=0)


def test_dropped_downloads_are_taken_up_again_and_the_token_stays_on_the_hub(elsewhere):
    *_, hub = elsewhere
    assert [fault.times for fault in hub.faults] == [0]
    stored = hub.requested("/storage/", "GET")
    assert len(stored) > len({request.path for request in stored})
    assert {request.token for request in stored} == {None}
    assert {request.token for request in hub.requested("/resolve/")} == {"Bearer hf_me"}


# what is pushed


def test_one_commit_holds_weights_processor_code_and_card(hub):
    commit = push(small(), "me/model")
    newest, _empty = hub.repositories["me/model"].branches["main"].history()
    assert newest.oid == commit.oid
    files = hub.files("me/model")
    assert set(files) == EVERYTHING | {".gitattributes"}
    for name in HUB_FILES:
        assert files[name] == (Path(hf_vit.__file__).parent / name).read_bytes()


def test_saving_with_a_push_leaves_the_folder_and_pushes_under_its_name(hub, tmp_path):
    small().save_pretrained(tmp_path / "mine", push_to_hub=True, commit_message="first")
    saved = {path.name for path in (tmp_path / "mine").iterdir()}
    assert saved == EVERYTHING - {"README.md", "preprocessor_config.json", *PROCESSOR_CODE}
    assert set(hub.files("me/mine")) == EVERYTHING | {".gitattributes"}
    small().save_pretrained(tmp_path / "mine", push_to_hub=True, repo_id="me/other")
    assert set(hub.files("me/other")) == EVERYTHING | {".gitattributes"}


def test_the_auto_map_names_a_class_of_a_pushed_file_for_every_auto_class(hub):
    push(small(), "me/model")
    files = hub.files("me/model")
    config, processor = (json.loads(files[name]) for name in ("config.json", "preprocessor_config.json"))
    assert set(config["auto_map"]) == {
        "AutoConfig",
        "AutoModel",
        "AutoModelForImageClassification",
        "AutoModelForMaskedImageModeling",
        "AutoBackbone",
    }
    assert config["auto_map"] == AUTO_MAP
    references = [*AUTO_MAP.values(), *processor["auto_map"]["AutoImageProcessor"].values()]
    assert len(references) == 7
    for module, _, name in (reference.partition(".") for reference in references):
        tree = ast.parse(files[f"{module}.py"])
        assert name in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}


def test_pushing_does_not_change_the_model_or_later_saves(hub, tmp_path):
    model = small()
    model.save_pretrained(tmp_path / "earlier")  # which notes the class and dtype in the configuration
    before = model.config.to_dict()
    push(model, "me/model", include_code=False)
    assert model.config.to_dict() == before
    model.save_pretrained(tmp_path / "later")
    for name in ("config.json", "modeling_hf_vit.py"):
        assert (tmp_path / "later" / name).read_bytes() == (tmp_path / "earlier" / name).read_bytes()


# Package installed and not imported: the code of the repository must run alone, with every road to the Hub.
OPEN_BESIDE_THE_PACKAGE = """
import sys
import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, pipeline

torch.set_num_threads(1)
for name in sys.argv[1:]:
    remote = {"trust_remote_code": True}
    processor = AutoImageProcessor.from_pretrained(name, **remote)
    model = AutoModelForImageClassification.from_pretrained(name, **remote)
    config = AutoConfig.from_pretrained(name, **remote)
    pipeline("image-classification", model=name, **remote)
    for thing in (processor, model, config):
        assert type(thing).__module__.startswith("transformers_modules."), type(thing)
    model.save_pretrained("again")
    model.from_pretrained("again")
assert "hf_vit" not in sys.modules
"""


def push_separately(model, processor, name):
    """Push as the tutorials do: the model, then the processor."""
    model.push_to_hub(name)
    processor.push_to_hub(name)


def save_and_upload(model, processor, name):
    for part in (model, processor):
        part.save_pretrained("saved")
    HfApi().create_repo(name)
    HfApi().upload_folder(repo_id=name, folder_path="saved")


def push_pipeline(model, processor, name):
    pipeline("image-classification", model=model, image_processor=processor).push_to_hub(name)


def push_configuration_after_the_model(model, processor, name):
    push_separately(model, processor, name)
    model.config.push_to_hub(name)


def save_again_elsewhere(model, processor, name):
    push_separately(model, processor, "me/first")
    loaded = HfViTForImageClassification.from_pretrained("me/first")
    save_and_upload(loaded, HfViTImageProcessor.from_pretrained("me/first"), name)


ROADS = (push_separately, save_and_upload, push_pipeline, push_configuration_after_the_model, save_again_elsewhere)


@pytest.mark.slow
def test_every_road_to_the_hub_leaves_a_repository_that_opens_beside_the_package(hub, tmp_path):
    model = small(num_labels=3)
    processor = HfViTImageProcessor.for_model(model.config)
    for road in ROADS:
        road(model, processor, f"me/{road.__name__}")
    environment = hub.environment(tmp_path / "home", token="hf_me") | {"PYTHONPATH": str(PACKAGE.parent)}
    command = [sys.executable, "-c", OPEN_BESIDE_THE_PACKAGE, *(f"me/{road.__name__}" for road in ROADS)]
    run = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_a_copy_of_the_code_never_asks_the_installed_package(tmp_path):
    small().save_pretrained(tmp_path / "copied_vit")
    (tmp_path / "copied_vit" / "__init__.py").write_text("")
    spec = importlib.util.spec_from_file_location(
        "copied_configuration", tmp_path / "copied_vit" / "configuration_hf_vit.py"
    )
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    assert copy.installed_module("checkpoints.loading") is None
    assert hf_vit.configuration_hf_vit.installed_module("checkpoints.loading") is not None


def test_a_branch_is_created_and_the_main_branch_left_alone(hub):
    push(small(num_labels=2), "me/model")
    old = weights(hub, "me/model")
    push(small(num_labels=5), "me/model", revision="five")
    assert weights(hub, "me/model") == old
    assert HfViTForImageClassification.from_pretrained("me/model", revision="five").config.num_labels == 5


def test_without_the_code_the_repository_asks_for_the_package(hub):
    push(small(), "me/model")
    push(small(), "me/model", include_code=False)
    files = hub.files("me/model")
    assert not {name for name in files if name.endswith(".py")}
    assert b"auto_map" not in files["config.json"] + files["preprocessor_config.json"]


def test_a_folder_is_pushed_without_the_leftovers_of_training(hub, tmp_path):
    folder = tmp_path / "trained"
    small().save_pretrained(folder)
    leftovers = ("training_args.bin", "optimizer.pt", "my_script.py", "checkpoint-5/model.safetensors", ".cache/x")
    for name in leftovers:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    (folder / "all_results.json").write_text("{}")
    push(folder, "me/model", processor=HfViTImageProcessor(size=32))
    assert set(hub.files("me/model")) == EVERYTHING | {".gitattributes", "all_results.json"}


def test_weights_of_an_earlier_push_do_not_outlive_it(hub):
    push(small(), "me/model", max_shard_size="40KB")
    sharded = {name for name in hub.files("me/model") if "safetensors" in name}
    assert "model.safetensors.index.json" in sharded
    assert len(sharded) > 2
    push(small(), "me/model")
    assert {name for name in hub.files("me/model") if "safetensors" in name} == {"model.safetensors"}
    push(small(), "me/model", max_shard_size="40KB")
    assert {name for name in hub.files("me/model") if "safetensors" in name} == sharded


@pytest.mark.parametrize("more", ["", "tags: [mine]\npipeline_tag: text-generation\n"])
def test_a_card_written_by_hand_keeps_its_words_and_gets_the_metadata_that_it_needs(hub, more):
    push(small(), "me/model")
    card = f"---\nlicense: mit\n{more}---\nmy words\r\nand **more**\n".encode()
    huggingface_hub.HfApi().upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id="me/model")
    push(small(num_labels=7), "me/model", tags="seven")
    kept = ModelCard(hub.files("me/model")["README.md"].decode())
    assert kept.text.strip().splitlines() == ["my words", "and **more**"]
    assert kept.data.to_dict() == {
        "license": "mit",
        "library_name": "transformers",
        "pipeline_tag": "image-classification",
        "tags": [*(["mine"] if more else []), "vision-transformer", "hf_vit", "seven"],
    }
    before = hub.files("me/model")["README.md"]
    push(small(num_labels=8), "me/model", tags="seven")
    assert hub.files("me/model")["README.md"] == before


def test_the_card_of_another_program_in_a_folder_gets_the_metadata_that_it_needs(tmp_path):
    small(HfViTModel).save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("---\nmodel-index: [{name: x}]\n---\n# Trained\n")
    push(tmp_path, "me/model", dry_run=True)
    text = (tmp_path / "README.md").read_text()
    assert "pipeline_tag: image-feature-extraction\n" in text
    assert "model-index:\n- name: x\n" in text
    assert text.endswith("---\n# Trained\n")
    (tmp_path / "README.md").write_text("---\n[\n---\n")
    with pytest.raises(ValueError, match="its metadata are no YAML"):
        push(tmp_path, "me/model", dry_run=True)


def test_the_conversion_command_pushes_what_it_has_written(hub, tmp_path):
    root = Path(__file__).parents[2]
    command = [root / "conversion" / "jax_to_safetensors.py", root / "tests" / "goldens" / "vit_p16_tok_rep.npz"]
    command += [tmp_path / "model", "--push_to_hub", "me/vit"]
    environment = hub.environment(tmp_path / "home", token="hf_me")
    run = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert set(hub.files("me/vit")) == EVERYTHING | {".gitattributes", "parity.json"}
    pulled = HfViTForImageClassification.from_pretrained("me/vit")
    original = HfViTForImageClassification.from_pretrained(root / "tests" / "goldens" / "vit_p16_tok_rep.npz")
    assert all(torch.equal(*pair) for pair in zip(pulled.parameters(), original.parameters(), strict=True))


def test_a_stranger_proposes_the_whole_push_as_a_pull_request(hub, monkeypatch):
    hub.add_repository("me/model")
    commit = push(small(), "me/model", token="hf_you", create_pr=True)
    assert commit.pr_revision == "refs/pr/1"
    assert set(hub.files("me/model", "refs/pr/1")) == EVERYTHING | {".gitattributes"}
    assert set(hub.files("me/model")) == {".gitattributes"}


# when it fails


def test_a_dropped_upload_is_sent_again(hub):
    hub.fault("/storage/", method="PUT", drop_after=500)
    model = small()
    push(model, "me/model")
    assert [request.status for request in hub.requested("/storage/", "PUT")] == [0, 200]
    pulled = HfViTForImageClassification.from_pretrained("me/model")
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(model.parameters(), pulled.parameters(), strict=True))


def test_a_push_that_broke_off_leaves_nothing_behind_and_ends_when_run_again(hub):
    hub.fault("/commit/", method="POST", drop_after=100)
    with pytest.raises(Exception, match=r"disconnected|reset|closed"):
        push(small(), "me/model")
    assert set(hub.files("me/model")) == {".gitattributes"}
    push(small(), "me/model")
    assert set(hub.files("me/model")) == EVERYTHING | {".gitattributes"}
    assert len(hub.requested("/storage/", "PUT")) == 1


def test_without_a_token_the_error_says_what_to_do_before_anything_is_sent(hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nowhere/token")
    with pytest.raises(LocalTokenNotFoundError, match=r"hf auth login.*HF_TOKEN.*dry_run=True"):
        push(small(), "me/model")
    assert hub.requests == []


@pytest.mark.parametrize(("token", "repository"), [("hf_wrong", "me/model"), ("hf_me", "you/model")])
def test_a_token_that_may_not_write_there_is_told_so(hub, token, repository):
    with pytest.raises(HfHubHTTPError, match=rf"may not write to {repository}: make a token with write access"):
        push(small(), repository, token=token)


def test_a_folder_of_another_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit", "architectures": ["ViTModel"]}))
    with pytest.raises(ValueError, match=r"expected a config\.json with model_type hf_vit"):
        push(tmp_path, "me/model", dry_run=True)


def test_a_dry_run_needs_no_token_and_writes_what_would_be_pushed(hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    folder = push(small(), "me/model", dry_run=True)
    assert folder == Path("model")
    assert {path.name for path in folder.iterdir()} == EVERYTHING
    assert hub.requests == []
    with pytest.raises(FileExistsError, match="model is not empty"):
        push(small(), "me/model", dry_run=True)
    push(folder, "me/model", token="hf_me")
    assert {path.name: path.read_bytes() for path in folder.iterdir()}.items() <= hub.files("me/model").items()


# the image processor


def test_the_processor_of_the_checkpoint_goes_along_at_the_models_size(hub, tmp_path):
    small().save_pretrained(tmp_path / "old")
    HfViTImageProcessor(protocol="timm", size=32, image_mean=[0.1, 0.2, 0.3]).save_pretrained(tmp_path / "old")
    push(HfViTForImageClassification.from_pretrained(tmp_path / "old"), "me/same")
    same = json.loads(hub.files("me/same")["preprocessor_config.json"])
    assert (same["protocol"], same["image_mean"]) == ("timm", [0.1, 0.2, 0.3])
    push(HfViTForImageClassification.from_pretrained(tmp_path / "old", image_size=64), "me/larger")
    larger = json.loads(hub.files("me/larger")["preprocessor_config.json"])
    assert larger["crop_size"] == {"height": 64, "width": 64}
    assert (larger["protocol"], larger["image_mean"]) == ("timm", [0.1, 0.2, 0.3])


@pytest.mark.parametrize(("layout", "protocol"), [({"dialect": "big_vision"}, "big_vision"), (None, "vit_jax")])
def test_a_model_without_a_processor_gets_that_of_its_code_base(hub, layout, protocol):
    push(small(checkpoint_layout=layout), "me/model")
    assert json.loads(hub.files("me/model")["preprocessor_config.json"])["protocol"] == protocol


# the card

PARITY = {
    "source": "gs://vit_models/augreg/Ti_16.npz",
    "sha256": "ab" * 32,
    "tensors": 152,
    "differences": {"block 0": 1.25e-6, "logits": 3.5e-6},
    "bound": 1e-5,
    "passed": True,
}
RESULTS = [
    EvalResult(
        "image-classification", "owner/pets", "Pets", "accuracy", 0.91, metric_name="top-1", dataset_split="test"
    ),
    EvalResult(
        "image-classification", "owner/pets", "Pets", "accuracy", 0.99, metric_name="top-5", dataset_split="test"
    ),
    EvalResult("image-classification", "digits", "Digits", "accuracy", 0.98),
]


def test_a_card_says_nothing_that_nobody_gave(tmp_path):
    small().save_pretrained(tmp_path)
    card = ModelCard.load(write_model_card(tmp_path))
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "image-classification",
        "tags": ["vision-transformer", "hf_vit"],
    }
    headings = [line for line in card.text.splitlines() if line.startswith("## ")]
    assert headings == ["## How to load it", "## Limits", "## Citation"]
    assert "trust_remote_code" not in card.text.replace("instead of `trust_remote_code`", "")
    assert not (tmp_path / ".eval_results").exists()


def test_a_full_card_carries_metadata_results_certificate_protocol_recipe_and_citations(tmp_path):
    small(num_labels=10).save_pretrained(tmp_path)
    HfViTImageProcessor(protocol="big_vision", size=32).save_pretrained(tmp_path)
    (tmp_path / "parity.json").write_text(json.dumps(PARITY))
    path = write_model_card(
        tmp_path,
        repo_id="me/pets",
        license="apache-2.0",
        base_model="google/vit-base-patch16-224",
        datasets=["owner/pets"],
        tags=["pets"],
        recipe={"optimizer": "SGD", "learning rate": 0.03},
        results=RESULTS,
        limits=["It has seen pets alone."],
    )
    data, text = ModelCard.load(path).data, path.read_text()
    assert (data.license, data.base_model, data.datasets) == (
        "apache-2.0",
        "google/vit-base-patch16-224",
        ["owner/pets"],
    )
    assert data.tags[-1] == "pets"
    assert [(r.dataset_type, r.metric_name, r.metric_value) for r in data.eval_results] == [
        ("owner/pets", "top-1", 0.91),
        ("owner/pets", "top-5", 0.99),
        ("digits", None, 0.98),
    ]
    for line in (
        f"Converted from `{PARITY['source']}`, sha256 `{PARITY['sha256']}`.",
        "| logits | 3.50e-06 |",
        "152 tensors compared; bound 1e-05: passed.",
        "Protocol `big_vision`: resized to 36 on the shorter side, the central 32x32 kept,",
        "| learning rate | 0.03 |",
        "| Pets | test | top-1 | 0.91 |",
        "- It knows 10 classes",
        "- It has seen pets alone.",
        "@inproceedings{dosovitskiy2021image,",
        "@article{steiner2022train,",
    ):
        assert line in text, line


def test_results_on_data_sets_of_the_hub_are_written_in_the_newer_form_too(hub, tmp_path):
    small().save_pretrained(tmp_path / "out")
    write_model_card(tmp_path / "out", results=RESULTS)
    push(tmp_path / "out", "me/model")
    written = {name: text for name, text in hub.files("me/model").items() if name.startswith(".eval_results/")}
    assert list(written) == [".eval_results/owner-pets.yaml"]
    expected = "- dataset:\n    id: owner/pets\n    task_id: default\n  value: 0.91\n  notes: top-1, split test\n"
    assert written[".eval_results/owner-pets.yaml"].decode() == expected


@pytest.mark.parametrize(
    ("model_class", "tag", "auto_class"),
    [
        (HfViTForImageClassification, "image-classification", "AutoModelForImageClassification"),
        (HfViTModel, "image-feature-extraction", "AutoModel"),
        (HfViTBackbone, "image-feature-extraction", "AutoBackbone"),
        (HfViTForMaskedImageModeling, "image-feature-extraction", "AutoModelForMaskedImageModeling"),
    ],
)
def test_the_card_loads_each_class_by_its_own_name_and_auto_class(hub, model_class, tag, auto_class):
    card = (push(small(model_class), "me/model", dry_run=True) / "README.md").read_text()
    assert f"pipeline_tag: {tag}\n" in card
    assert f"from hf_vit import {model_class.__name__}, HfViTImageProcessor\n" in card
    assert f'model = {auto_class}.from_pretrained("me/model", trust_remote_code=True)\n' in card


def test_the_card_counts_parameters_from_the_weights_themselves(tmp_path):
    model = small(fields=ROOT_ONLY)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    count = sum(parameter.numel() for parameter in model.parameters())
    text = write_model_card(tmp_path).read_text()
    assert f"{count:,} parameters" in text
    assert "on a ResNet stem (its root alone)" in text
