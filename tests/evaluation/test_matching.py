"""Classes of a dataset matched to those of a model: by name, index, WordNet id or the user's table, or refused."""

import json

import pytest

from hf_vit import HfViTConfig
from hf_vit.catalogue.labels import id2label, wordnet_ids
from hf_vit.evaluation import match_classes


def config_of(*names: str, num_labels: int = 0) -> HfViTConfig:
    return HfViTConfig(num_labels=num_labels) if num_labels else HfViTConfig(id2label=dict(enumerate(names)))


@pytest.mark.parametrize(
    ("model", "dataset", "columns", "method"),
    [
        (("cat", "dog", "eel"), ["eel", "cat"], [2, 0], "by name"),
        (("Cat", "Dog"), ["dog", "cat"], [1, 0], "by name, ignoring case"),
        (("golden_retriever", "tabby-cat"), ["Tabby cat", "Golden Retriever"], [1, 0], "by name, ignoring case"),
        (
            ("tench, Tinca tinca", "great white shark, white shark"),
            ["white shark", "tench"],
            [1, 0],
            "comma-separated",
        ),
        (("cat", "dog", "eel"), ["2", "0"], [2, 0], "by index"),
        (("7", "1", "0"), ["00", "07"], [2, 0], "by the value of numerals"),
    ],
)
def test_names_are_matched_and_the_way_is_reported(model, dataset, columns, method):
    found = match_classes(config_of(*model), dataset)
    assert found.columns == columns
    assert method in found.method


def test_numerals_are_matched_to_the_indices_of_unnamed_classes():
    names = sorted(str(index) for index in range(12))  # as folders are sorted: 0, 1, 10, 11, 2
    assert match_classes(config_of(num_labels=12), names).columns == [int(name) for name in names]


def test_folders_of_imagenet_are_matched_by_wordnet_id():
    ids = wordnet_ids(1000)
    names = [ids[7], ids[3]]
    for config in (HfViTConfig(id2label=id2label(1000)), HfViTConfig(num_labels=1000)):
        assert match_classes(config, names).columns == [7, 3]
    with pytest.raises(ValueError, match="not classes of the model"):
        match_classes(HfViTConfig(id2label={index: f"thing {index}" for index in range(1000)}), names)


@pytest.mark.parametrize(
    ("model", "dataset"),
    [
        (("cat", "dog", "eel"), ["cat", "dog", "fox"]),  # all but one
        (("cat", "dog"), ["rose", "tulip"]),  # as many, unrelated
        (("LABEL_0", "LABEL_1"), ["cat", "dog"]),  # unnamed: any order is possible
        (("cat", "dog"), ["1", "2"]),  # counted from one: no such index
        (("Cat", "cat", "dog"), ["CAT", "dog"]),  # two candidates
        (("cat", "dog"), ["cat", "Cat"]),  # two classes for one
    ],
)
def test_classes_that_leave_a_question_are_refused_with_the_way_out(model, dataset):
    with pytest.raises(ValueError, match=r"not classes of the model: .*give --label_map FILE"):
        match_classes(config_of(*model), dataset)


def test_a_mismatch_lists_the_classes_that_the_model_lacks():
    with pytest.raises(ValueError, match=r"^1 of the dataset's 3 classes are not classes of the model: fox;"):
        match_classes(config_of("cat", "dog", "eel"), ["cat", "dog", "fox"])


def test_a_label_map_maps_to_names_or_indices(tmp_path):
    (tmp_path / "map.json").write_text(json.dumps({"chat": "cat", "chien": 1}))
    (tmp_path / "map.csv").write_text("chat,cat\nchien,1\n")
    for name in ("map.json", "map.csv"):
        found = match_classes(config_of("cat", "dog"), ["chien", "chat"], label_map=tmp_path / name)
        assert found.columns == [1, 0]
        assert found.method == f"by {name}"
    assert match_classes(config_of("a", "b"), ["x", "y"], label_map="position").columns == [0, 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"chat": "cat"}', "no entry for the class 'chien'"),
        ('{"chat": "cat", "chien": "wolf"}', "'wolf', which is not a class of the model"),
        ('{"chat": "cat", "chien": "cat"}', "several classes are mapped to cat"),
        ("[1]", "is not a JSON object"),
        ("{", "not a readable label map"),
    ],
)
def test_a_label_map_that_leaves_a_question_is_refused(content, message, tmp_path):
    (tmp_path / "map.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        match_classes(config_of("cat", "dog"), ["chien", "chat"], label_map=tmp_path / "map.json")
