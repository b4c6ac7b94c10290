"""The recipes: what the papers and the reference's configs say, and that nothing in them is misspelt."""

import dataclasses

import pytest

from hf_vit import HfViTConfig
from hf_vit.training.arguments import HfViTTrainingArguments, recipe_defaults, refuse_trainer_only
from hf_vit.training.recipes import RECIPES, Recipe, dataset_key, find_recipe, format_recipes, model_settings


ABOUT = {"summary", "source", "expected", "datasets"}
OF_THE_MODEL = {"image_size", "hidden_dropout_prob", "drop_path_rate", "trainable", "lora_rank"}


@pytest.mark.parametrize(
    ("dataset", "steps", "warmup", "rate"),
    [
        ("cifar10", 10_000, 500, 0.03),
        ("cifar100", 10_000, 500, 0.03),
        ("imagenet", 20_000, 500, 0.03),
        ("pets", 500, 100, 0.03),
        ("flowers", 500, 100, 0.03),
    ],
)
def test_the_paper_recipe_is_the_papers(dataset, steps, warmup, rate):
    settings = find_recipe("paper").arguments(dataset)
    assert (settings["max_steps"], settings["warmup_steps"], settings["learning_rate"]) == (steps, warmup, rate)
    assert settings["optim"] == "sgd"
    assert settings["lr_scheduler_type"] == "cosine"
    assert settings["momentum_dtype"] == "bfloat16"
    assert settings["total_batch_size"] == 512
    assert settings["image_size"] == 384
    assert settings["max_grad_norm"] == 1.0
    off = ("weight_decay", "label_smoothing_factor", "mixup_alpha", "cutmix_alpha", "ema_decay", "drop_path_rate")
    assert [settings[name] for name in off] == [0.0] * len(off)


@pytest.mark.parametrize(
    ("dataset", "rate"),
    [("imagenet", 0.03), ("cifar10", 0.003), ("cifar100", 0.01), ("pets", 0.003), ("flowers", 0.003)],
)
def test_big_vision_has_its_best_rate_for_each_dataset(dataset, rate):
    assert find_recipe("big_vision").arguments(dataset)["learning_rate"] == rate


def test_augreg_is_the_paper_in_500_steps():
    paper, augreg = find_recipe("paper").arguments(), find_recipe("augreg").arguments()
    assert {name: value for name, value in augreg.items() if paper[name] != value} == {
        "max_steps": 500,
        "warmup_steps": 100,
        "hidden_dropout_prob": 0.0,
    }


def test_weight_decay_from_scratch_is_that_of_an_optimizer_that_multiplies_it_by_the_rate():
    settings = find_recipe("scratch").arguments()
    assert settings["weight_decay"] * settings["learning_rate"] == pytest.approx(1e-4)


@pytest.mark.parametrize("name", RECIPES)
def test_every_setting_of_a_recipe_is_an_argument(name):
    known = {item.name for item in dataclasses.fields(HfViTTrainingArguments)} | OF_THE_MODEL
    assert set(RECIPES[name].arguments()) <= known
    for dataset, settings in RECIPES[name].datasets.items():
        assert dataset == dataset_key(dataset)
        assert set(settings) <= {item.name for item in dataclasses.fields(Recipe)} - ABOUT


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_trains_on_digits_without_mirroring_them(name, tmp_path):
    defaults = recipe_defaults(RECIPES[name], "digits")
    assert defaults["horizontal_flip"] is False
    assert defaults["image_size"] is None
    arguments = {key: value for key, value in defaults.items() if key not in OF_THE_MODEL}
    args = HfViTTrainingArguments(str(tmp_path), use_cpu=True, **arguments)
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == defaults["total_batch_size"]


def test_a_large_total_batch_is_accumulated(tmp_path):
    defaults = recipe_defaults(find_recipe("paper"), "cifar10", world_size=2)
    assert defaults["per_device_train_batch_size"] == 64
    args = HfViTTrainingArguments(
        str(tmp_path), use_cpu=True, total_batch_size=512, per_device_train_batch_size=64, max_grad_norm=1.0
    )
    assert args.gradient_accumulation_steps == 8


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"total_batch_size": 100}, "total_batch_size is 100, but one pass takes 8 images"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0"),
        ({"layer_decay": 0.0}, "layer_decay is 0.0"),
        ({"crop_scale": 0.0}, "crop_scale is 0.0"),
        ({"momentum_dtype": "int8"}, "expected bfloat16 or float32"),
        ({"dataloader_timeout": -1.0}, "dataloader_timeout is -1.0"),
        ({"remove_unused_columns": True}, "remove_unused_columns must be false"),
        ({"train_sampling_strategy": "sequential"}, "train_sampling_strategy is sequential"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha is 5.0"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size is True"),
        ({"lr_scheduler_kwargs": {"num_cycles": 2}, "lr_scheduler_type": "cosine"}, "lr_scheduler_kwargs is"),
    ],
)
def test_an_argument_out_of_its_range_is_refused_by_name(wrong, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        HfViTTrainingArguments(str(tmp_path), use_cpu=True, **wrong)


def test_names_of_datasets_are_recognised():
    assert dataset_key("uoft-cs/cifar10") == dataset_key("CIFAR-10") == "cifar10"
    assert dataset_key("ILSVRC/imagenet-1k") == "imagenet"
    assert dataset_key("timm/oxford-iiit-pet") == "pets"
    assert dataset_key("some/folder/") == "folder"


def test_the_table_of_recipes_names_each_with_its_source_and_expectation():
    text = format_recipes()
    for name, recipe in RECIPES.items():
        assert f"{name}: {recipe.summary}" in text
        assert recipe.source in text
        assert recipe.expected in text


def test_an_unknown_recipe_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown recipe 'papr': expected one of paper, augreg"):
        find_recipe("papr")


@pytest.mark.parametrize(
    "ignored",
    [
        {"eval_on_start": True, "eval_strategy": "epoch"},
        {"fsdp": True},
        {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"},
    ],
)
def test_the_plain_loop_refuses_what_it_would_not_do(ignored, tmp_path):
    name = next(iter(ignored))
    args = HfViTTrainingArguments(str(tmp_path), use_cpu=True, **ignored)
    with pytest.raises(ValueError, match=f"does not follow {name}"):
        refuse_trainer_only(args)


def test_the_plain_loop_takes_what_every_recipe_sets(tmp_path):
    for recipe in RECIPES.values():
        settings = {key: value for key, value in recipe_defaults(recipe).items() if key not in OF_THE_MODEL}
        settings |= {"early_stopping_patience": 2, "gradient_checkpointing": True, "dataloader_drop_last": True}
        settings |= {"eval_strategy": "epoch", "save_strategy": "epoch", "report_to": "none", "bf16": False}
        refuse_trainer_only(HfViTTrainingArguments(str(tmp_path), use_cpu=True, **settings))


@pytest.mark.parametrize(
    ("preset", "dataset", "expected"),
    [
        ("ViT-B_16", "uoft-cs/cifar10", {"learning_rate": 0.01}),
        ("ViT-B_32", "cifar10", {}),
        ("ViT-B_16", "cifar100", {}),
        ("ViT-L_16", "cifar10", {"hidden_dropout_prob": 0.1}),
        ("ViT-L_32", "cifar10", {}),
        ("ViT-H_14", "imagenet", {"hidden_dropout_prob": 0.1}),
        ("R50+ViT-B_16", "imagenet", {"hidden_dropout_prob": 0.1}),
    ],
)
def test_the_paper_recipe_sets_for_a_model_what_the_reference_sets_for_it(preset, dataset, expected):
    """Source: vit_jax/configs/vit.py and models.py at c6de1e5."""
    config = HfViTConfig.from_preset(preset)
    assert model_settings("paper", dataset, config) == expected
    assert config.hidden_dropout_prob == expected.get("hidden_dropout_prob", 0.0)
    assert model_settings("augreg", dataset, config) == {}
