"""Loading beside stock transformers: subclasses, labels, offload, quantizers, threads and adapters."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from tiny_models import TINY, randomised
from torch import nn
from transformers import BitsAndBytesConfig, ViTConfig, ViTForImageClassification

from hf_vit import HfViTConfig, HfViTForImageClassification, HfViTModel, HfViTPreTrainedModel
from hf_vit.checkpoints import CheckpointError, write_jax_checkpoint


pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's
LAYOUTS = ["own", "transformers", "timm", "npz", "pth"]
IMAGES = torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)


def write(kind, folder):
    """Write a checkpoint of one layout; return its path and the arguments that it needs."""
    if kind in ("transformers", "pth"):
        model = randomised(ViTForImageClassification(ViTConfig(**TINY)))
        if kind == "transformers":
            model.save_pretrained(folder / kind)
            return folder / kind, {}
        torch.save(model.state_dict(), folder / "model.pth")
        return folder / "model.pth", {"num_attention_heads": 2}
    if kind == "timm":
        sizes = {"embed_dim": 24, "depth": 2, "num_heads": 2, "img_size": 32, "patch_size": 8, "num_classes": 5}
        save_for_hf(timm.create_model("vit_tiny_patch16_224", **sizes), folder / kind, safe_serialization=True)
        return folder / kind, {}
    model = randomised(HfViTForImageClassification(HfViTConfig(**TINY)))
    if kind == "own":
        model.save_pretrained(folder / kind)
        return folder / kind, {}
    write_jax_checkpoint(model.state_dict(), model.config, folder / "model.npz")
    return folder / "model.npz", {"num_attention_heads": 2}


class TwoHeads(HfViTPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.vit = HfViTModel(config)
        self.age = nn.Linear(config.hidden_size, 1)
        self.post_init()


class WithAuxiliary(HfViTForImageClassification):
    def __init__(self, config):
        super().__init__(config)
        self.aux = nn.Linear(config.hidden_size, 4)
        self.post_init()


@pytest.mark.parametrize("cls", [TwoHeads, WithAuxiliary])
@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_subclass_opens_every_layout_and_its_own_folder(tmp_path, caplog, kind, cls):
    source, needed = write(kind, tmp_path)
    expected = HfViTForImageClassification.from_pretrained(source, **needed)
    model = cls.from_pretrained(source, **needed)
    assert "age.weight" in caplog.text or "aux.weight" in caplog.text
    for name, value in model.vit.state_dict().items():
        assert torch.equal(value, expected.vit.state_dict()[name])
    model.save_pretrained(tmp_path / "saved")
    again = cls.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    HfViTForImageClassification.from_pretrained(tmp_path / "saved")  # reports what it has no place for
    larger = cls.from_pretrained(tmp_path / "saved", image_size=48)
    assert all(torch.equal(v, larger.state_dict()[n]) for n, v in model.state_dict().items() if "position" not in n)


def test_a_subclass_does_not_lose_the_strict_check(tmp_path):
    WithAuxiliary(HfViTConfig(**TINY)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["vit.encoder.renamed"] = tensors.pop("vit.encoder.encoder_norm.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for cls in (WithAuxiliary, HfViTForImageClassification):
        with pytest.raises(CheckpointError, match="missing: -"):
            cls.from_pretrained(tmp_path)


def test_mismatched_sizes_are_initialised_anew_on_request_as_in_stock(tmp_path, caplog):
    source, _ = write("own", tmp_path)
    model = HfViTForImageClassification.from_pretrained(source, num_channels=1, ignore_mismatched_sizes=True)
    assert model.vit.embeddings.patch_embeddings.weight.shape[1] == 1
    assert "vit.embeddings.patch_embeddings.weight" in caplog.text
    with pytest.raises(CheckpointError, match=r"mis-shaped: !"):
        HfViTForImageClassification.from_pretrained(source, hidden_act="gelu", intermediate_size=48)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_labels_follow_one_rule_for_every_layout(tmp_path, kind):
    source, needed = write(kind, tmp_path)

    def load(**labels):
        return HfViTForImageClassification.from_pretrained(source, **needed, **labels)

    old = load()
    names = {str(i): f"class {i}" for i in range(3)}
    for labels in ({"id2label": names}, {"label2id": {name: int(i) for i, name in names.items()}}):
        model = load(**labels)
        assert model.config.id2label == {0: "class 0", 1: "class 1", 2: "class 2"}
        assert model.config.label2id["class 2"] == 2
        assert not model.classifier.weight.any()
    renamed = load(id2label={i: str(i) for i in range(5)})
    assert torch.equal(renamed.classifier.weight, old.classifier.weight)
    assert isinstance(load(num_labels=0).classifier, nn.Identity)
    with pytest.raises(ValueError, match="num_labels is -1: expected"):
        load(num_labels=-1)


def test_the_problem_type_of_an_old_head_does_not_survive_into_a_new_one(tmp_path):
    HfViTForImageClassification(HfViTConfig(**TINY, problem_type="multi_label_classification")).save_pretrained(
        tmp_path
    )
    load = HfViTForImageClassification.from_pretrained
    assert load(tmp_path).config.problem_type == "multi_label_classification"
    for arguments in ({}, {"image_size": 48}):
        assert load(tmp_path, num_labels=3, **arguments).config.problem_type is None


@pytest.mark.parametrize("kind", LAYOUTS)
def test_arguments_of_transformers_work_for_every_layout(tmp_path, kind):
    source, needed = write(kind, tmp_path)
    load = HfViTForImageClassification.from_pretrained
    assert isinstance(load(source, **needed, return_dict=False)(IMAGES), tuple)
    assert len(load(source, **needed, output_attentions=True)(IMAGES).attentions) == 2
    assert load(source, **needed, attn_implementation="eager").config._attn_implementation == "eager"
    assert load(source, **needed, dtype=torch.float16, low_cpu_mem_usage=True).dtype == torch.float16
    _, info = load(source, **needed, output_loading_info=True)
    assert not info["missing_keys"]
    with torch.inference_mode():
        expected = load(source, **needed)(IMAGES).logits
    offloaded = load(
        source, **needed, device_map={"vit": "disk", "classifier": "cpu"}, offload_folder=str(tmp_path / "offload")
    )
    assert torch.equal(offloaded(IMAGES).logits, expected)


def test_variant_and_kind_of_file_mean_the_same_for_stock_layouts(tmp_path):
    source, _ = write("transformers", tmp_path)
    state = load_file(source / "model.safetensors")
    save_file({name: value + 1 for name, value in state.items()}, source / "model.fp16.safetensors")
    load = HfViTForImageClassification.from_pretrained
    assert torch.equal(load(source, variant="fp16").classifier.bias, state["classifier.bias"] + 1)
    with pytest.raises(CheckpointError, match=r"has a config\.json but no weights"):
        load(source, use_safetensors=False)


@pytest.mark.parametrize("bits", [pytest.param(4, marks=pytest.mark.slow), 8])
def test_bitsandbytes_shrinks_the_model_as_it_shrinks_stock(tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    sizes = {**TINY, "hidden_size": 64, "intermediate_size": 128}
    footprints = []
    for model in (HfViTForImageClassification(HfViTConfig(**sizes)), ViTForImageClassification(ViTConfig(**sizes))):
        model.save_pretrained(tmp_path / type(model).__name__)
        quantized = type(model).from_pretrained(
            tmp_path / type(model).__name__, quantization_config=BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
        )
        footprints.append(quantized.get_memory_footprint())
    assert footprints[0] == footprints[1]


@pytest.mark.slow
def test_threads_that_load_leave_layers_of_other_threads_initialised(tmp_path):
    folders = []
    for i in range(2):
        model = randomised(HfViTForImageClassification(HfViTConfig(**TINY)))
        nn.init.constant_(model.classifier.bias, i + 1.0)
        model.save_pretrained(tmp_path / str(i))
        folders.append(tmp_path / str(i))
    done, bad = threading.Event(), []

    def build():
        while not done.is_set():
            if not 0.06 < nn.Linear(50, 50).weight.std().item() < 0.1:
                bad.append(1)

    builder = threading.Thread(target=build)
    builder.start()
    with ThreadPoolExecutor(2) as pool:
        biases = list(
            pool.map(
                lambda i: [
                    HfViTForImageClassification.from_pretrained(folders[i]).classifier.bias[0].item()
                    for _ in range(50)
                ],
                range(2),
            )
        )
    done.set()
    builder.join()
    assert biases == [[1.0] * 50, [2.0] * 50]
    assert not bad


# -- adapters


@pytest.fixture(params=LAYOUTS)
def adapted(request, tmp_path):
    """An adapter folder over each layout, the arguments of its base, and the logits of the merged model."""
    peft = pytest.importorskip("peft")
    source, needed = write(request.param, tmp_path)
    base = HfViTForImageClassification.from_pretrained(source, **needed, num_labels=3)
    settings = peft.LoraConfig(r=2, target_modules=["query", "value"], modules_to_save=["classifier"])
    model = peft.get_peft_model(base, settings)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    return tmp_path / "adapter", source, needed, model.merge_and_unload().eval()(IMAGES).logits


def test_an_adapter_over_each_layout_equals_the_merged_model(adapted):
    folder, _, needed, expected = adapted
    model = HfViTForImageClassification.from_pretrained(folder, **needed).eval()
    torch.testing.assert_close(model(IMAGES).logits, expected, rtol=0, atol=1e-5)


def test_a_damaged_adapter_is_refused(adapted):
    folder, _, needed, _ = adapted
    path = folder / "adapter_model.safetensors"
    sound = load_file(path)
    name = next(name for name in sound if "lora_B" in name)
    for change in ({name: torch.full_like(sound[name], float("nan"))}, {name: torch.zeros(7, 2)}, {name: None}):
        changed = {key: value for key, value in {**sound, **change}.items() if value is not None}
        save_file(changed, path)
        with pytest.raises(CheckpointError):
            HfViTForImageClassification.from_pretrained(folder, **needed)


def test_a_damaged_base_under_an_adapter_is_refused(tmp_path):
    peft = pytest.importorskip("peft")
    source, _ = write("own", tmp_path)
    model = peft.get_peft_model(
        HfViTForImageClassification.from_pretrained(source), peft.LoraConfig(target_modules=["query"])
    )
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    tensors = load_file(source / "model.safetensors")
    tensors.pop("vit.encoder.layer.1.ffn.fc1.weight")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing: -.*layer\.1\.ffn\.fc1\.weight"):
        HfViTForImageClassification.from_pretrained(tmp_path / "adapter")


@pytest.mark.parametrize("targets", [["query", "value"], "all-linear"])
def test_a_new_head_under_an_adapter_learns(tmp_path, targets):
    peft = pytest.importorskip("peft")
    source, _ = write("own", tmp_path)
    model = HfViTForImageClassification.from_pretrained(source, num_labels=3)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 3e-2)
    images, labels = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = model(pixel_values=images, labels=labels).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.02


# -- names that do not exist


@pytest.mark.parametrize("name", ["/nope/vit-b-16", "./nope", "a/b/c", "missing.pth"])
def test_a_path_that_does_not_exist_is_named_at_once(name):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        HfViTModel.from_pretrained(name)


def test_a_mistyped_name_of_the_catalogue_gets_a_suggestion():
    with pytest.raises(FileNotFoundError, match=r"did you mean .*ViT-B_16"):
        HfViTModel.from_pretrained("ViT-B-16")


def test_without_the_package_the_positions_are_resampled(tmp_path, monkeypatch):
    source, _ = write("own", tmp_path)
    expected = HfViTForImageClassification.from_pretrained(source, image_size=48)
    monkeypatch.setattr("hf_vit.modeling_hf_vit.installed_module", lambda name: None)
    found = HfViTForImageClassification.from_pretrained(source, image_size=48)
    assert torch.equal(found.vit.embeddings.position_embeddings, expected.vit.embeddings.position_embeddings)
