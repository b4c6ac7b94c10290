import itertools
import re

import pytest
import timm

from hf_vit import HfViTForImageClassification
from hf_vit.catalogue import AugRegName, CatalogueEntry, format_catalogue, suggest
from hf_vit.catalogue.entries import find, is_published, read_catalogue, to_https


R_TI_16 = "R_Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_224.npz"

# parameters at 1,000 classes and 224 pixels (vit_jax/models_test.py, MODEL_SIZES), hidden size, pixels per token
MODELS = {
    "ViT-Ti_16": (5_717_416, 192, 16),
    "ViT-S_16": (22_050_664, 384, 16),
    "ViT-S_32": (22_878_952, 384, 32),
    "ViT-B_8": (86_576_872, 768, 8),
    "ViT-B_16": (86_567_656, 768, 16),
    "ViT-B_16-gap-norep": (86_566_120, 768, 16),
    "ViT-B_32": (88_224_232, 768, 32),
    "ViT-L_16": (304_326_632, 1024, 16),
    "ViT-L_32": (306_535_400, 1024, 32),
    "ViT-H_14": (632_045_800, 1280, 14),
    "R+ViT-Ti_16": (6_337_704, 192, 32),
    "R50+ViT-B_16": (98_659_112, 768, 16),
    "R26+ViT-B_32": (101_383_976, 768, 32),
    "R26+ViT-S_32": (36_431_912, 384, 32),
    "R50+ViT-L_32": (328_994_856, 1024, 32),
}
ENTRIES = list(read_catalogue().values())


def mib_of_parameters(entry: CatalogueEntry) -> float:
    parameters, width, stride = MODELS[entry.preset]
    parameters += (entry.classes - 1000) * (width + 1)
    parameters += ((entry.resolution // stride) ** 2 - (224 // stride) ** 2) * width
    parameters += width * (width + 1) if entry.representation else 0
    return 4 * copies_of_parameters(entry) * parameters / 2**20


def copies_of_parameters(entry: CatalogueEntry) -> int:
    return 3 if entry.name == "sam/ViT-S_16" else 1  # Adam keeps two numbers beside each parameter


def listed(*, to_a_hundredth: bool) -> list[CatalogueEntry]:
    return [entry for entry in ENTRIES if entry.size_mib and (entry.size_mib % 1 != 0) == to_a_hundredth]


@pytest.mark.parametrize("entry", listed(to_a_hundredth=True), ids=lambda entry: entry.name)
def test_exact_sizes_are_those_of_the_parameters(entry):
    # what exceeds them are the headers of the archive, about 340 bytes an array: 0.05 MiB for B/16, 0.10 for R50+B/16
    assert 0.0 < entry.size_mib - mib_of_parameters(entry) < 0.105 * copies_of_parameters(entry)


@pytest.mark.parametrize("entry", listed(to_a_hundredth=False), ids=lambda entry: entry.name)
def test_rounded_sizes_are_those_of_the_parameters(entry):
    assert abs(entry.size_mib - mib_of_parameters(entry)) < 0.6


def test_sizes_tell_a_wrong_description_apart():
    entry = find("imagenet21k/ViT-B_16")
    without_layer = mib_of_parameters(entry) - 4 * 768 * 769 / 2**20
    assert entry.size_mib - without_layer > 2.0


def test_every_entry_is_well_formed():
    for entry in ENTRIES:
        assert re.fullmatch(r"gs://(vit_models|big_vision)/[\w+./-]+\.npz", entry.url)
        assert entry.preset is None or entry.preset in MODELS
        assert entry.head in (None, "softmax", "sigmoid", "zeros")
        assert entry.sha256 is None or re.fullmatch(r"[0-9a-f]{64}", entry.sha256)
        assert (entry.size_mib is None) == (entry.size_source is None)
        for accuracy in entry.accuracy + entry.transfer:
            assert 70 < accuracy.top1 < 100
            assert accuracy.top5 is None or accuracy.top1 < accuracy.top5 < 100
            assert len(accuracy.source) > 20
        for mirror in entry.mirrors:
            assert re.fullmatch(r"(google|timm)/[\w.-]+", mirror.repo)
            assert mirror.layout == ("timm" if mirror.repo.startswith("timm/") else "transformers")


def test_timm_mirrors_are_the_ones_that_timm_loads_from_the_same_file():
    for entry in ENTRIES:
        for mirror in entry.mirrors:
            if mirror.layout == "timm":
                config = timm.models.get_pretrained_cfg(mirror.repo.removeprefix("timm/"))
                assert config is not None
                assert config.hf_hub_id == mirror.repo
                assert not config.custom_load or config.url == entry.https_url
                assert config.num_classes == (0 if entry.head == "zeros" else entry.classes)


def test_every_name_and_alias_finds_its_own_entry():
    names = [(name, entry) for entry in ENTRIES for name in (entry.name, *entry.aliases)]
    assert len({name for name, _ in names}) == len(names)
    for name, entry in names:
        assert find(name) is entry
    for entry in ENTRIES:
        assert find(entry.url) is find(entry.https_url) is find(f"{entry.name}.npz") is entry


def test_a_model_name_is_the_file_that_the_reference_takes():
    assert find("ViT-B_16").url == "gs://vit_models/imagenet21k/ViT-B_16.npz"
    assert find("ViT-B_16-224").url == "gs://vit_models/imagenet21k+imagenet2012/ViT-B_16-224.npz"
    assert find("B_16").name == "augreg/B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0"


def test_some_facts_of_the_published_files():
    facts = {
        "imagenet21k/ViT-B_16": ("ViT-B_16", 224, 21843, "zeros", True),
        "imagenet21k/R50+ViT-B_16": ("R50+ViT-B_16", 224, 21843, "zeros", True),
        "imagenet21k+imagenet2012/R50+ViT-B_16": ("R50+ViT-B_16", 384, 1000, "softmax", False),
        "B_16": ("ViT-B_16", 224, 21843, "sigmoid", False),
        f"augreg/{R_TI_16}": ("R+ViT-Ti_16", 224, 1000, "softmax", False),
        "gsam/ViT-B_16": ("ViT-B_16-gap-norep", 224, 1000, None, False),
    }
    for name, fact in facts.items():
        entry = find(name)
        assert (entry.preset, entry.resolution, entry.classes, entry.head, entry.representation) == fact
    assert find("imagenet21k+imagenet2012/R50+ViT-B_16").accuracy[0].top1 == 85.082


def test_an_address_of_another_place_is_not_taken_for_a_published_file():
    for name in (f"gs://elsewhere/{R_TI_16}", "gs://imagenet21k/ViT-B_16.npz", "https://example.com/ViT-B_16.npz"):
        assert not is_published(name)


def test_an_unknown_name_lists_the_closest():
    with pytest.raises(ValueError, match=r"unknown checkpoint 'ViT-B-16': did you mean ViT-B_16"):
        find("ViT-B-16")


def test_bucket_addresses_become_public_ones():
    assert to_https("gs://a/b+c/d.npz") == "https://storage.googleapis.com/a/b+c/d.npz"
    assert to_https("https://example.com/x") == "https://example.com/x"


def test_an_augreg_name_is_read():
    name = AugRegName.parse(R_TI_16)
    assert (name.model, name.dataset, name.epochs, name.learning_rate) == ("R_Ti_16", "i21k", 300, 0.001)
    assert (name.augmentation, name.weight_decay, name.dropout, name.stochastic_depth) == ("none", 0.03, 0.0, 0.0)
    adaptation = name.adaptation
    assert adaptation is not None
    assert (adaptation.dataset, adaptation.steps) == ("imagenet2012", 20000)
    assert (adaptation.learning_rate, adaptation.resolution) == (0.03, 224)


@pytest.mark.parametrize(("text", "steps"), [("0k", 500), ("2k", 2500), ("10k", 10000), ("20k", 20000)])
def test_thousands_of_steps_are_rounded_down_in_names(text, steps):
    name = AugRegName.parse(R_TI_16.replace("20k", text))
    assert name.adaptation is not None
    assert name.adaptation.steps == steps
    assert f"-steps_{text}-" in name.filename


def test_every_augreg_name_is_printed_back_exactly():
    upstream = itertools.product(
        ("Ti_16", "S_32", "B_8", "L_16", "R_Ti_16", "R26_S_32", "R50_L_32"),
        ("i1k", "i21k"),
        ("30", "300"),
        ("none", "light0", "light1", "medium1", "medium2", "strong1", "strong2"),
        ("0.03", "0.1"),
        ("0.0", "0.1"),
    )
    downstream = [
        "",
        *(
            f"--{dataset}-steps_{steps}-lr_{rate}-res_{resolution}"
            for dataset in ("cifar100", "imagenet2012", "kitti", "oxford_iiit_pet", "resisc45")
            for steps in ("0k", "2k", "10k", "20k")
            for rate in ("0.001", "0.003", "0.01", "0.03")
            for resolution in (224, 384)
        ),
    ]
    names = [
        f"{model}-{data}-{epochs}ep-lr_0.001-aug_{augmentation}-wd_{decay}-do_{dropout}-sd_{dropout}{rest}"
        for (model, data, epochs, augmentation, decay, dropout), rest in zip(upstream, itertools.cycle(downstream))
    ]
    assert len({AugRegName.parse(name) for name in names}) == len(names) == 784
    for name in names:
        assert str(AugRegName.parse(name)) == name
        assert AugRegName.parse(f"{name}.npz").filename == f"{name}.npz"
        assert find(name).url == find(f"augreg/{name}.npz").url == f"gs://vit_models/augreg/{name}.npz"


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ("R_Ti_16-", "R_Ti_17-"),
        ("R_Ti_16-", "ViT-Ti_16-"),
        ("i21k", "i22k"),
        ("300ep", "0ep"),
        ("lr_0.001", "lr_0.0010"),
        ("lr_0.001", "lr_nan"),
        ("lr_0.001", "lr_0.0.1"),
        ("lr_0.001", "lr_-0.001"),
        ("aug_none", "aug_heavy"),
        ("wd_0.03", "wd_.03"),
        ("do_0.0", "do_0"),
        ("--", "-"),
        ("steps_20k", "steps_5k"),
        ("imagenet2012", "imagenet"),
        ("res_224", "res_0224"),
        (".npz", ".npy"),
        (".npz", ".npz\n"),
        ("lr_0.001", "lr_0.00\u0661"),
    ],
)
def test_what_is_no_augreg_name_is_refused(good, bad):
    assert good in R_TI_16
    with pytest.raises(ValueError, match="not the name of an AugReg file"):
        AugRegName.parse(R_TI_16.replace(good, bad, 1))


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("ViT-B-16", "ViT-B_16"), ("imagenet21k/vit-b_16", "imagenet21k/ViT-B_16"), ("ViTB_32", "ViT-B_32")],
)
def test_a_mistyped_name_is_answered_at_once_with_the_closest_names(typed, meant):
    assert suggest(typed)[0] == meant
    with pytest.raises(FileNotFoundError, match=f"did you mean {meant}"):
        HfViTForImageClassification.from_pretrained(typed)
    assert suggest("bert-base-uncased") == []


@pytest.mark.parametrize("path", ["/nope/vit-b-16", "./nope", "a/b/c", "../nope"])
def test_a_path_that_does_not_exist_is_named_at_once(path):
    with pytest.raises(FileNotFoundError, match=f"{re.escape(path)}: no such file or folder"):
        HfViTForImageClassification.from_pretrained(path)


def test_the_table_of_the_catalogue_lists_every_file_and_can_be_filtered():
    assert len(format_catalogue().splitlines()) == len(read_catalogue()) + 1
    header, *rows = format_catalogue("flexivit_s").splitlines()
    assert header.split()[:4] == ["name", "model", "MiB", "pixels"]
    assert [row.split()[0] for row in rows] == [name for name in read_catalogue() if "flexivit_s" in name]
    assert "82.58 imagenet2012" in rows[0]
    assert rows[0].endswith("timm results/results-imagenet.csv")
