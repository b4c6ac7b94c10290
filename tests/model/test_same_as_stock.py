"""Ordinary uses of a model, run on stock transformers' ViT and on hf-vit's side by side, with the results compared."""

import copy
import warnings
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    Trainer,
    TrainingArguments,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    ViTConfig,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTModel,
)

from hf_vit import (
    HfViTConfig,
    HfViTForImageClassification,
    HfViTForMaskedImageModeling,
    HfViTModel,
)


SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def pair_of_models(**fields):
    """Return a stock classifier and hf-vit's with the same weights and the same function (erf GELU, its epsilon)."""
    torch.manual_seed(0)
    stock = ViTForImageClassification(ViTConfig(**SIZES, **{"num_labels": 3, **fields})).eval()
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    config = HfViTConfig(**SIZES, **{"num_labels": 3, **fields}, hidden_act="gelu", layer_norm_eps=1e-12)
    ours = HfViTForImageClassification(config).eval()
    renames = {
        "vit.layers.": "vit.encoder.layer.",
        ".attention.q_proj": ".attn.query",
        ".attention.k_proj": ".attn.key",
        ".attention.v_proj": ".attn.value",
        ".attention.o_proj": ".attn.out",
        ".layernorm_before": ".attention_norm",
        ".layernorm_after": ".ffn_norm",
        ".mlp.": ".ffn.",
        "vit.layernorm": "vit.encoder.encoder_norm",
        "patch_embeddings.projection": "patch_embeddings",
    }
    state = {}
    for name, tensor in stock.state_dict().items():
        for old, new in renames.items():
            name = name.replace(old, new)
        state[name] = tensor
    ours.load_state_dict(state)
    return stock, ours


def loss_and_gradient(model, labels, **kwargs):
    model.zero_grad()
    loss = model(IMAGES[: len(labels)], labels=labels, **kwargs).loss
    loss.backward()
    return loss.detach(), model.classifier.weight.grad.clone()


def test_the_pair_computes_the_same_logits():
    stock, ours = pair_of_models()
    with torch.no_grad():
        torch.testing.assert_close(ours(IMAGES).logits, stock(IMAGES).logits, atol=1e-6, rtol=0)


# -- labels and losses


INDICES, MULTI_HOT = torch.tensor([0, 2, 1, 0]), torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]])
SOFT = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8], [0.3, 0.3, 0.4], [1.0, 0, 0]])
VALUES = torch.tensor([3.0, 5.0, -2.0, 40.0])


@pytest.mark.parametrize(
    ("fields", "labels"),
    [
        ({}, INDICES),
        ({}, MULTI_HOT),
        ({}, F.one_hot(INDICES, 3).float()),
        ({}, SOFT),
        ({"problem_type": "multi_label_classification"}, MULTI_HOT),
        ({"problem_type": "single_label_classification"}, INDICES),
        ({"num_labels": 1}, VALUES),
        ({"num_labels": 1}, VALUES[:, None]),
        ({"num_labels": 2, "problem_type": "regression"}, torch.randn(4, 2)),
        ({}, torch.tensor([0, -100, 1, 2])),
    ],
    ids=["indices", "multi-hot", "one-hot floats", "soft", "multi-label", "single-label", "value", "value in a column",
         "two values", "an ignored index"],
)  # fmt: skip
def test_loss_and_gradient_are_those_of_stock(fields, labels):
    stock, ours = pair_of_models(**fields)
    for found, expected in zip(loss_and_gradient(ours, labels), loss_and_gradient(stock, labels), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert ours.config.problem_type == stock.config.problem_type


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int16])
def test_indices_of_any_integer_dtype_are_the_same_labels(dtype):
    _, ours = pair_of_models()
    torch.testing.assert_close(
        loss_and_gradient(ours, INDICES.to(dtype)), loss_and_gradient(ours, INDICES), atol=0, rtol=0
    )


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8])
def test_multi_hot_labels_of_any_dtype_are_the_same_labels(dtype):
    _, ours = pair_of_models(problem_type="multi_label_classification")
    torch.testing.assert_close(loss_and_gradient(ours, MULTI_HOT.to(dtype)), loss_and_gradient(ours, MULTI_HOT))


def test_probabilities_are_a_cross_entropy_where_the_problem_type_is_single_label():
    _, ours = pair_of_models(problem_type="single_label_classification")
    loss, _ = loss_and_gradient(ours, SOFT)
    torch.testing.assert_close(loss, F.cross_entropy(ours(IMAGES).logits.detach(), SOFT))
    torch.testing.assert_close(
        loss_and_gradient(ours, F.one_hot(INDICES, 3).float())[0], loss_and_gradient(ours, INDICES)[0]
    )


@pytest.mark.parametrize(
    ("fields", "labels"),
    [
        ({}, F.one_hot(INDICES, 3)),  # of integers: one-hot or multi-hot?
        ({}, VALUES),
        ({}, torch.zeros(4, 2)),
        ({"problem_type": "multi_label_classification"}, INDICES),
        ({"problem_type": "single_label_classification"}, VALUES),
        ({"num_labels": 2, "problem_type": "regression"}, VALUES),
    ],
)
def test_labels_of_another_kind_are_an_error_that_changes_nothing(fields, labels):
    _, ours = pair_of_models(**fields)
    before = ours.config.problem_type
    with pytest.raises(ValueError, match=r"labels are .* expected for"):
        ours(IMAGES, labels=labels)
    assert ours.config.problem_type == before
    assert "labels" not in vars(ours.config)


class Rows(torch.utils.data.Dataset):
    def __init__(self, labels):
        self.labels = labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"pixel_values": IMAGES[index], "labels": self.labels[index]}


def first_step(model, labels, folder, *, batch, accumulation):
    """Return the loss that the stock Trainer logs for one step, and the weights of the head after it."""
    args = TrainingArguments(
        str(folder),
        max_steps=1,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        learning_rate=0.1,
        optim="sgd",
        max_grad_norm=0,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    trainer = Trainer(model=copy.deepcopy(model).train(), args=args, train_dataset=Rows(labels))
    trainer.train()
    loss = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    return loss, trainer.model.classifier.weight.detach()


@pytest.mark.parametrize(
    ("fields", "labels"),
    [
        ({}, INDICES),
        ({"problem_type": "single_label_classification"}, SOFT),
        ({}, MULTI_HOT),
        ({"num_labels": 1}, VALUES[:, None] / 10),
        ({"num_labels": 1}, VALUES / 10),
    ],
    ids=["indices", "soft", "multi-hot", "value in a column", "value"],
)
def test_the_stock_trainer_makes_the_same_step_with_and_without_accumulation(fields, labels, tmp_path):
    stock, ours = pair_of_models(**fields)
    whole = first_step(ours, labels, tmp_path / "a", batch=4, accumulation=1)
    parts = first_step(ours, labels, tmp_path / "b", batch=2, accumulation=2)
    assert parts[0] == pytest.approx(whole[0], abs=1e-3)
    torch.testing.assert_close(parts[1], whole[1], atol=1e-5, rtol=1e-5)
    if labels is not SOFT:  # stock has no cross-entropy of probabilities
        expected = first_step(stock, labels, tmp_path / "c", batch=4, accumulation=1)
        assert whole[0] == pytest.approx(expected[0], abs=1e-3)
        torch.testing.assert_close(whole[1], expected[1], atol=1e-5, rtol=1e-5)


# -- hooks and tools


SPOTS = [
    ("vit", "vit"),
    ("vit.layernorm", "vit.encoder.encoder_norm"),
    ("vit.layers.1", "vit.encoder.layer.1"),
    ("vit.layers.1.mlp.fc2", "vit.encoder.layer.1.ffn.fc2"),
    ("vit.layers.0.attention.q_proj", "vit.encoder.layer.0.attn.query"),
    ("classifier", "classifier"),
]


def tensor_of(output):
    """Return the tokens among the outputs of a module, or its output where that is a tensor."""
    if hasattr(output, "logits"):
        return output.logits
    if hasattr(output, "last_hidden_state"):
        return output.last_hidden_state
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize(("stock_name", "our_name"), SPOTS)
def test_forward_and_backward_hooks_see_what_they_see_in_stock(stock_name, our_name):
    seen = []
    for model, name in zip(pair_of_models(), (stock_name, our_name), strict=True):
        module, found = model.get_submodule(name), {}
        module.register_forward_pre_hook(lambda _, args, found=found: found.update(given=args[0]))
        module.register_forward_hook(lambda _, args, output, found=found: found.update(made=tensor_of(output)))
        if name != "vit":
            module.register_full_backward_hook(lambda _, given, made, found=found: found.update(back=made[0]))
        model(IMAGES).logits.sum().backward()
        seen.append(found)
    for name, expected in seen[0].items():
        torch.testing.assert_close(seen[1][name], expected, atol=1e-5, rtol=1e-4)


def test_a_global_hook_sees_all_tokens_everywhere():
    _, model = pair_of_models()
    shapes = {}
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, _, output: shapes.__setitem__(module, tensor_of(output).shape)
    )
    try:
        model(IMAGES)
    finally:
        handle.remove()
    assert shapes[model.vit.encoder.layer[-1]] == shapes[model.vit.encoder] == (4, 17, 32)


def test_a_hook_may_edit_the_output_of_a_linear_layer_in_place_while_training():
    gradients = []
    for model, name in zip(pair_of_models(), ("vit.layers.0.mlp.fc1", "vit.encoder.layer.0.ffn.fc1"), strict=True):
        model.get_submodule(name).register_forward_hook(lambda _, args, output: output.mul_(0.5))
        model.train()(IMAGES, labels=INDICES).loss.backward()
        gradients.append(model.get_submodule(name).weight.grad)
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-6, rtol=1e-4)


def test_flop_counters_count_as_much_as_for_stock():
    counts = []
    for model in pair_of_models():
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(IMAGES)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


@pytest.mark.filterwarnings("ignore")  # torch's own, at the first use of a compiled decomposition
def test_forward_derivatives_and_per_sample_gradients_are_those_of_stock():
    tangents, per_sample = [], []
    for model in pair_of_models():
        model.set_attn_implementation("eager")
        _, tangent = torch.func.jvp(lambda x, model=model: model(x).logits, (IMAGES,), (torch.ones_like(IMAGES),))
        tangents.append(tangent)
        weights = {"classifier.weight": model.classifier.weight.detach()}

        def loss(weights, image, label, model=model):
            logits = torch.func.functional_call(model, weights, (image[None],)).logits
            return F.cross_entropy(logits, label[None])

        per_sample.append(torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(weights, IMAGES, INDICES))
    torch.testing.assert_close(tangents[1], tangents[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(per_sample[1], per_sample[0], atol=1e-5, rtol=1e-4)


def test_dynamic_quantisation_and_pruning_find_the_same_layers():
    counts = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for model in pair_of_models():
            quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
            counts.append(sum("quantized" in type(module).__module__ for module in quantized.modules()))
            for module in model.modules():
                if type(module) is nn.Linear:
                    prune.l1_unstructured(module, "weight", amount=0.5)
            assert (model.classifier.weight == 0).float().mean() > 0.4
    assert counts[0] == counts[1] > 0


# -- adapters


METHODS = {
    "LoRA": lambda target: peft.LoraConfig(target_modules=target, r=2, init_lora_weights=False),
    "DoRA": lambda target: peft.LoraConfig(target_modules=target, r=2, use_dora=True),
    "IA3": lambda target: peft.IA3Config(target_modules=target, feedforward_modules=[]),
    "VeRA": lambda target: peft.VeraConfig(target_modules=target, r=2),
    "LoHa": lambda target: peft.LoHaConfig(target_modules=target, r=2),
    "LoKr": lambda target: peft.LoKrConfig(target_modules=target, r=2),
    "OFT": lambda target: peft.OFTConfig(target_modules=target, oft_block_size=8),
    "AdaLoRA": lambda target: peft.AdaLoraConfig(target_modules=target, total_step=10, tinit=1, tfinal=1),
    "C3A": lambda target: peft.C3AConfig(target_modules=target, block_size=8),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore")
def test_adapters_learn_merge_save_and_load(method, tmp_path):
    _, base = pair_of_models()
    base.save_pretrained(tmp_path / "base")
    base = HfViTForImageClassification.from_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(base, METHODS[method](["query", "value"])).train()
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = adapted(pixel_values=IMAGES, labels=INDICES).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    adapted.eval().save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with torch.no_grad():
        expected = adapted(pixel_values=IMAGES).logits
        if method == "VeRA":  # transformers cannot inject its shared matrices into a model; PEFT's class can
            opened = HfViTForImageClassification.from_pretrained(tmp_path / "base")
            loaded = peft.PeftModel.from_pretrained(opened, str(tmp_path / "adapter")).base_model.model.eval()
        else:
            loaded = HfViTForImageClassification.from_pretrained(tmp_path / "adapter").eval()
        torch.testing.assert_close(loaded(IMAGES).logits, expected, atol=1e-5, rtol=1e-5)
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(IMAGES).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT reads a deprecated attribute of transformers
@pytest.mark.parametrize("target", [["query", "value"], "all-linear"])
def test_a_new_head_learns_under_adapters(target):
    torch.manual_seed(0)
    model = HfViTForImageClassification(HfViTConfig(**SIZES, num_labels=3))
    assert not model.classifier.weight.any()
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=target, r=4)).train()
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = adapted(pixel_values=IMAGES, labels=INDICES).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


# -- inputs, composites, masked images


def test_unnormalised_images_are_reported(caplog):
    from transformers.utils import logging

    _, model = pair_of_models()
    logging.enable_propagation()
    with torch.no_grad():
        model(IMAGES * 0 + 251.0)
    logging.disable_propagation()
    assert "expected normalised images" in caplog.text


@pytest.mark.parametrize("channels", [2, 4, 13])
def test_images_of_other_channels_are_taken_as_in_stock(channels):
    stock, ours = pair_of_models(num_channels=channels)
    images = torch.randn(2, channels, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(images).logits, stock(images).logits, atol=1e-6, rtol=0)


def test_a_composite_holds_the_very_configuration_it_was_given():
    backbone = HfViTConfig(**SIZES, out_indices=[1, 2])
    config = UperNetConfig(backbone_config=backbone, hidden_size=8, use_auxiliary_head=False, num_labels=2)
    model = UperNetForSemanticSegmentation(config)
    assert model.backbone.config is config.backbone_config


def test_masked_image_modelling_takes_stocks_configuration_fields():
    stock = ViTForMaskedImageModeling(ViTConfig(**SIZES, encoder_stride=8)).eval()
    config = HfViTConfig(**SIZES)
    assert hasattr(config, "encoder_stride")
    config.update({"image_size": 32, "patch_size": 8, "encoder_stride": 8})
    ours = HfViTForMaskedImageModeling(config).eval()
    mask = torch.zeros(4, 16, dtype=torch.bool)
    mask[:, ::2] = True
    for model in (stock, ours):
        out = model(IMAGES, bool_masked_pos=mask)
        assert out.reconstruction.shape == IMAGES.shape
        hidden = mask.view(4, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
        expected = ((out.reconstruction - IMAGES).abs() * hidden).sum() / (hidden.sum() + 1e-5) / 3
        torch.testing.assert_close(out.loss, expected)
    config = HfViTConfig(**SIZES, encoder_stride=4)
    with pytest.raises(ValueError, match="encoder_stride must equal patch_size"):
        HfViTForMaskedImageModeling(config)(IMAGES, bool_masked_pos=mask)


def test_outputs_on_request_are_those_of_stock():
    stock, ours = pair_of_models()
    stock.set_attn_implementation("eager")
    with torch.no_grad():
        expected = stock(IMAGES, output_attentions=True, output_hidden_states=True)
        found = ours(IMAGES, output_attentions=True, output_hidden_states=True)
        as_tuple = ours(IMAGES, return_dict=False)
    for theirs, mine in zip(expected.hidden_states, found.hidden_states, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    for theirs, mine in zip(expected.attentions, found.attentions, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-5)
    assert isinstance(as_tuple, tuple)


def test_base_models_take_the_same_masks():
    stock, ours = pair_of_models()
    mask = torch.ones(4, 17)
    mask[:, -3:] = 0
    assert isinstance(stock.vit, ViTModel)
    assert isinstance(ours.vit, HfViTModel)
    with torch.no_grad():
        torch.testing.assert_close(
            ours.vit(IMAGES, attention_mask=mask).last_hidden_state,
            stock.vit(IMAGES, attention_mask=mask).last_hidden_state,
            atol=1e-5,
            rtol=1e-5,
        )
