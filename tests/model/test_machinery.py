"""What the rest of the library does with our models: Trainer, PEFT, quantisers, pipelines, UperNet, DPT, ranks."""

import os
import socket
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AttentionInterface,
    DPTConfig,
    DPTForDepthEstimation,
    Trainer,
    TrainingArguments,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    ViTConfig,
    ViTForImageClassification,
    pipeline,
)
from transformers.distributed import DistributedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from hf_vit import HfViTConfig, HfViTForImageClassification, HfViTImageProcessor
from hf_vit.checkpoints.foreign import is_finite
from hf_vit.export.formats import export_timm, export_transformers


SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 5,
}


def randomised(model):
    """Every parameter random, scales near one."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.copy_(1 + noise if name.endswith(".weight") and parameter.ndim == 1 else noise)
    return model.eval()


def classifier(**fields):
    return randomised(HfViTForImageClassification(HfViTConfig(**{**SIZES, **fields})))


def images(count=2, height=32, width=32):
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(1))


def assert_equal_tensors(one, other):
    assert set(one) == set(other)
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


# -- the library's own Trainer on a folder of the library's own ViT


@pytest.fixture
def stock_folder(tmp_path):
    randomised(ViTForImageClassification(ViTConfig(**SIZES))).save_pretrained(tmp_path / "stock")
    return tmp_path / "stock"


def stock_trainer(source: Path, folder: Path, **settings: Any) -> Trainer:
    args = TrainingArguments(
        str(folder),
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=0.05,
        save_strategy="steps",
        save_steps=2,
        disable_tqdm=True,
        use_cpu=True,
        report_to="none",
        **settings,
    )
    samples = [{"pixel_values": pixels, "labels": i % 5} for i, pixels in enumerate(images(20))]
    model = HfViTForImageClassification.from_pretrained(source)
    return Trainer(model=model, args=args, train_dataset=samples, eval_dataset=samples[:8])  # ty: ignore[invalid-argument-type]


def test_a_resumed_training_of_a_stock_folder_restores_every_tensor(stock_folder, tmp_path):
    whole = stock_trainer(stock_folder, tmp_path / "out")
    whole.train()
    checkpoint = tmp_path / "out" / "checkpoint-2"
    resumed = stock_trainer(stock_folder, tmp_path / "resumed")
    before = {name: value.clone() for name, value in resumed.model.state_dict().items()}
    resumed._load_from_checkpoint(str(checkpoint))
    assert_equal_tensors(resumed.model.state_dict(), load_file(checkpoint / "model.safetensors"))
    unchanged = [name for name, value in resumed.model.state_dict().items() if torch.equal(value, before[name])]
    assert unchanged == []  # every one of them was trained, and every one restored
    resumed = stock_trainer(stock_folder, tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_equal_tensors(resumed.model.state_dict(), whole.model.state_dict())


def test_the_best_checkpoint_of_a_stock_folder_comes_back_whole(stock_folder, tmp_path):
    worst_is_best = {"metric_for_best_model": "loss", "greater_is_better": True, "load_best_model_at_end": True}
    trainer = stock_trainer(stock_folder, tmp_path / "out", eval_strategy="steps", eval_steps=2, **worst_is_best)
    trainer.train()
    best = Path(str(trainer.state.best_model_checkpoint))
    assert best.name != "checkpoint-6"
    assert_equal_tensors(trainer.model.state_dict(), load_file(best / "model.safetensors"))
    assert trainer.evaluate()["eval_loss"] == trainer.state.best_metric


# -- PEFT


asks_by_an_old_name = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT does


@asks_by_an_old_name
def test_lora_on_query_and_value_trains_merges_saves_and_loads(tmp_path):
    classifier().save_pretrained(tmp_path / "base")
    base = HfViTForImageClassification.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        at_first = base(images()).logits
    settings = peft.LoraConfig(r=4, target_modules=["query", "value"], modules_to_save=["classifier"])
    adapted = peft.get_peft_model(base, settings)
    trainable = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert len([name for name in trainable if "lora_" in name]) == 2 * 2 * SIZES["num_hidden_layers"]
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        adapted(pixel_values=images(), labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()
    adapted.eval().save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        trained = adapted(pixel_values=images()).logits
    assert (trained - at_first).abs().max() > 1e-2
    again = peft.PeftModel.from_pretrained(
        HfViTForImageClassification.from_pretrained(tmp_path / "base"), str(tmp_path / "adapter")
    )
    with torch.no_grad():
        assert torch.equal(again(pixel_values=images()).logits, trained)
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(images()).logits, trained, atol=1e-5, rtol=0)
        merged.save_pretrained(tmp_path / "merged")
        loaded = HfViTForImageClassification.from_pretrained(tmp_path / "merged")
        assert torch.equal(loaded(images()).logits, merged(images()).logits)


@asks_by_an_old_name
def test_a_folder_with_an_adapter_opens_with_it(tmp_path):
    classifier().save_pretrained(tmp_path / "base")
    base = HfViTForImageClassification.from_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(base, peft.LoraConfig(target_modules=["query"], init_lora_weights=False)).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = HfViTForImageClassification.from_pretrained(tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(loaded(images()).logits, adapted(pixel_values=images()).logits)


# -- quantisers


def converted_layers(model):
    kept = HfQuantizer.get_modules_to_not_convert(model)
    linear = {name for name, module in model.named_modules() if type(module) is torch.nn.Linear}
    return linear, {name for name in linear if should_convert_module(f"{name}.weight", kept)}


def test_quantisers_convert_the_same_layers_as_in_a_stock_model():
    linear, converted = converted_layers(classifier(num_hidden_layers=2))
    stock_linear, stock_converted = converted_layers(
        ViTForImageClassification(ViTConfig(**(SIZES | {"num_hidden_layers": 2})))
    )
    assert len(linear) == len(stock_linear) == 1 + 6 * 2
    assert ("classifier" in converted) == ("classifier" in stock_converted)
    assert len(converted) == len(stock_converted)


class Quantised(torch.Tensor):
    """Whole numbers and a scale that look like one tensor, on which nothing can be computed."""

    @staticmethod
    def __new__(cls, numbers, scale):
        return torch.Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=scale.dtype)

    def __init__(self, numbers, scale):
        self.numbers, self.scale = numbers, scale

    def __tensor_flatten__(self):
        return ["numbers", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise NotImplementedError(function)  # as classes that implement a few operations alone


def test_a_quantised_tensor_is_finite_if_its_scale_is():
    numbers = torch.ones(2, 2, dtype=torch.int8)
    assert is_finite(Quantised(numbers, torch.ones(2)))
    assert not is_finite(Quantised(numbers, torch.tensor([1.0, float("nan")])))


# -- attention backends


@pytest.mark.slow  # torch.compile, half a minute
def test_flex_attention_is_the_same_function():
    model = classifier()
    with torch.no_grad():
        expected = model(images()).logits
        model.set_attn_implementation("flex_attention")
        assert {layer.attn.config._attn_implementation for layer in model.vit.encoder.layer} == {"flex_attention"}
        torch.testing.assert_close(model(images()).logits, expected, atol=1e-5, rtol=0)


def test_an_attention_backend_of_ones_own_is_asked_as_flash_attention_would_be():
    asked = []

    def mine(module, query, key, value, attention_mask, **options):
        asked.append((query.shape, attention_mask, module.is_causal, options["scaling"], options["dropout"]))
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)

    AttentionInterface.register("mine", mine)
    model = classifier(attention_probs_dropout_prob=0.25)
    with torch.no_grad():
        expected = model(images()).logits
        model.set_attn_implementation("mine")
        assert torch.equal(model(images()).logits, expected)
        model.train()(images())
    assert asked[0] == ((2, 4, 17, 8), None, False, 8**-0.5, 0.0)
    assert asked[4] == ((2, 4, 17, 8), None, False, 8**-0.5, 0.25)
    assert (model._supports_flash_attn, model._supports_flex_attn, model._supports_sdpa) == (True, True, True)


# -- pipelines


def photos():
    """Images of every kind that a pipeline meets: three channels, transparency, gray with and without it."""
    noise = torch.randint(0, 256, (40, 30, 3), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    image = Image.fromarray(noise.numpy())
    return [image, image.convert("RGBA"), image.convert("LA"), image.convert("L")]


@pytest.fixture
def folder(tmp_path):
    model = classifier(id2label={i: f"kind {i}" for i in range(5)})
    model.save_pretrained(tmp_path / "model")
    HfViTImageProcessor.for_model(model.config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_the_image_classification_pipeline_takes_every_image_in_batches(folder, tmp_path):
    classify = pipeline("image-classification", model=str(folder), top_k=2)
    photos()[0].save(tmp_path / "photo.png")
    alone = [classify(photo) for photo in [*photos(), str(tmp_path / "photo.png")]]
    assert alone[-1] == alone[0]
    for answer in alone:
        assert [set(entry) for entry in answer] == [{"label", "score"}] * 2
        assert answer[0]["score"] >= answer[1]["score"]
    batched = list(classify((photo for photo in photos() * 3), batch_size=5))
    assert [answer[0]["label"] for answer in batched] == [answer[0]["label"] for answer in alone[:4] * 3]
    assert [answer[0]["score"] for answer in batched] == pytest.approx(
        [a[0]["score"] for a in alone[:4] * 3], abs=1e-5
    )
    everything = classify(photos()[0], top_k=9, function_to_apply="sigmoid")
    assert {entry["label"] for entry in everything} == {f"kind {i}" for i in range(5)}
    half = pipeline("image-classification", model=str(folder), dtype="bfloat16")
    assert half(photos()[0])[0]["score"] == pytest.approx(alone[0][0]["score"], abs=0.02)


def test_the_feature_extraction_pipeline_gives_tokens_or_the_pooled_representation(folder):
    extract = pipeline("image-feature-extraction", model=str(folder))
    assert len(extract(photos()[0])[0]) == 17
    assert torch.tensor(extract(photos())).shape == (4, 1, 17, 32)
    pooled = extract(photos()[0], pool=True, return_tensors=True)
    assert pooled.shape == (1, 32)
    assert torch.equal(pooled[0], extract(photos()[0], return_tensors=True)[0, 0])  # pooling by the class token
    with pytest.raises(ValueError, match="grid of 6x6 patches, but the position embeddings are for 4x4"):
        extract(photos()[0], image_processor_kwargs={"size": {"height": 48, "width": 48}})


# -- as a part of another model


def backbone_config(**fields):
    return HfViTConfig(**{**SIZES, "out_indices": [1, 2, 3, 4], **fields})


@pytest.mark.parametrize("shape", [(32, 32), (32, 64)])
def test_upernet_segments_with_our_backbone_and_saves_it(tmp_path, shape):
    settings: dict[str, Any] = {
        "hidden_size": 16,
        "pool_scales": [1, 2],
        "auxiliary_in_channels": 32,
        "auxiliary_channels": 16,
    }
    config = UperNetConfig(backbone_config=backbone_config(), num_labels=3, **settings)
    model = UperNetForSemanticSegmentation(config).train()
    labels = torch.zeros(2, *shape, dtype=torch.long)
    output = model(images(2, *shape), labels=labels)
    assert output.logits.shape == (2, 3, *shape)
    output.loss.backward()
    assert [name for name, p in model.backbone.named_parameters() if p.grad is None] == []
    model.eval().save_pretrained(tmp_path)
    loaded = UperNetForSemanticSegmentation.from_pretrained(tmp_path)
    assert_equal_tensors(loaded.state_dict(), model.state_dict())
    with torch.no_grad():
        assert torch.equal(loaded(images(2, *shape)).logits, model(images(2, *shape)).logits)


def test_dpt_estimates_depth_with_our_backbone(tmp_path):
    config = DPTConfig(
        backbone_config=backbone_config(reshape_hidden_states=False),
        is_hybrid=False,
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        reassemble_factors=[4, 2, 1, 0.5],
        hidden_size=32,
        image_size=32,
        patch_size=8,
    )
    model = DPTForDepthEstimation(config).train()
    depth = model(images()).predicted_depth
    assert depth.shape == (2, 64, 64)
    depth.mean().backward()
    unused = [name for name, p in model.backbone.named_parameters() if p.grad is None]
    assert unused == []
    model.eval().save_pretrained(tmp_path)
    loaded = DPTForDepthEstimation.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(images()).predicted_depth, model(images()).predicted_depth)


# -- in parts


def whole(value):
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def compare_on_two_ranks(rank, folder, port):
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank}
    os.environ.update({name: str(value) for name, value in environment.items()})
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    labels = torch.tensor([0, 1, 2, 3])
    for source in (folder / "own", folder / "transformers", folder / "timm", folder / "hybrid"):
        expected: Any = HfViTForImageClassification.from_pretrained(source).train()
        out = expected(images(4), labels=labels)
        out.loss.backward()
        for kind, parts in {"tp": DistributedConfig(tp_size=2), "fsdp": DistributedConfig(fsdp_size=2)}.items():
            model: Any = HfViTForImageClassification.from_pretrained(source, distributed_config=parts).train()
            weight = model.vit.encoder.layer[0].attn.query.weight
            assert weight.to_local().shape != weight.shape
            assert_equal_tensors({k: whole(v) for k, v in model.state_dict().items()}, expected.state_dict())
            mine = slice(None) if kind == "tp" else slice(2 * rank, 2 * rank + 2)
            ours = model(images(4)[mine], labels=labels[mine])
            torch.testing.assert_close(ours.logits, out.logits[mine], atol=1e-6, rtol=0)
            ours.loss.backward()
            gradients = {name: whole(parameter.grad) for name, parameter in model.named_parameters()}
            for name, parameter in expected.named_parameters():
                torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-6, rtol=0, msg=name)
            saved = folder / f"{source.name}-{kind}"
            model.save_pretrained(saved)
            torch.distributed.barrier()
            again = HfViTForImageClassification.from_pretrained(saved)
            assert_equal_tensors(again.state_dict(), expected.state_dict())
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_compute_learn_and_save_what_one_does(tmp_path):
    model = classifier(layer_norm_eps=1e-6, hidden_act="gelu")
    model.save_pretrained(tmp_path / "own")
    export_transformers(model, tmp_path / "transformers")
    export_timm(model, tmp_path / "timm")
    stem = {"resnet_layers": [], "resnet_width_factor": 0.5, "patch_size": 2}
    classifier(pooling="map", **stem).save_pretrained(tmp_path / "hybrid")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(compare_on_two_ranks, args=(tmp_path, port), nprocs=2)
