import pytest
import torch
from PIL import Image
from timm.data import ImageNetInfo
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor, pipeline

from hf_vit.catalogue.entries import find
from hf_vit.catalogue.labels import head_kind, id2label, problem_type, wordnet_ids


def test_names_of_imagenet_1k_are_in_the_order_of_the_heads():
    names = id2label(1000)
    assert names is not None
    assert list(names) == list(range(1000))
    known = {
        0: "tench, Tinca tinca",
        1: "goldfish, Carassius auratus",
        207: "golden retriever",
        281: "tabby, tabby cat",
    }
    assert known.items() <= names.items()
    assert names[999] == "toilet tissue, toilet paper, bathroom tissue"


def test_names_of_imagenet_21k_are_in_the_order_of_googles_head():
    names = id2label(21843)
    assert names is not None
    assert list(names) == list(range(21843))
    assert [names[i] for i in (0, 1, 2)] == ["organism, being", "benthos", "heterotroph"]


@pytest.mark.parametrize("num_classes", [1000, 21843])
def test_names_are_unique_so_that_label2id_is_their_inverse(num_classes):
    names = id2label(num_classes)
    assert names is not None
    assert len(set(names.values())) == num_classes
    assert all(name.strip() == name != "" for name in names.values())


def test_the_two_cranes_carry_their_wordnet_ids():
    names = id2label(1000)
    assert names is not None
    assert (names[134], names[517]) == ("crane (n02012849)", "crane (n03126707)")


def test_other_numbers_of_classes_have_no_names():
    assert id2label(10) is None
    assert wordnet_ids(21841) is None


def test_wordnet_ids_ascend_and_1k_lies_within_21k_but_for_the_teddy():
    small, large = wordnet_ids(1000), wordnet_ids(21843)
    assert small is not None
    assert large is not None
    assert (small[0], small[999], large[0], large[21842]) == ("n01440764", "n15075141", "n00004475", "n15102894")
    assert small == sorted(set(small))
    assert large == sorted(set(large))
    assert set(small) - set(large) == {"n04399382"}


def test_both_lists_give_a_synset_the_same_name():
    for num_classes, subset in ((1000, "imagenet-1k"), (21843, "imagenet-21k-goog")):
        info, names = ImageNetInfo(subset), id2label(num_classes)
        assert names is not None
        assert wordnet_ids(num_classes) == info.label_names()
        for index, description in enumerate(info.label_descriptions(detailed=False)):
            assert names[index].startswith(description)


def test_a_head_of_zeros_is_recognised():
    kernel, bias = torch.zeros(8, 21843), torch.zeros(21843)
    assert head_kind(kernel, bias) == "zeros"
    assert head_kind(kernel, bias, trained_with="sigmoid") == "zeros"
    assert head_kind(kernel.bfloat16(), bias.bfloat16()) == "zeros"


@pytest.mark.parametrize("value", [1e-38, -1.0, float("nan")])
@pytest.mark.parametrize("where", [0, 1])
def test_a_single_number_makes_a_head_that_is_not_zeros(where, value):
    head = torch.zeros(4, 10), torch.zeros(10)
    head[where].view(-1)[3] = value
    assert head_kind(*head) is None


def test_heads_are_marked_by_what_they_were_trained_with():
    small, large = (torch.ones(4, 1000), torch.ones(1000)), (torch.ones(1, 21843), torch.ones(21843))
    assert head_kind(*large) == "sigmoid"
    assert head_kind(*large, trained_with="softmax") == "softmax"
    assert head_kind(*small) is None
    assert head_kind(*small, trained_with=find("ViT-B_16-224").head) == "softmax"
    assert head_kind(*large, trained_with=find("B_16").head) == "sigmoid"


@pytest.mark.parametrize(
    ("head", "function"),
    [("sigmoid", torch.sigmoid), ("softmax", lambda x: x.softmax(0)), (None, lambda x: x.softmax(0))],
)
def test_pipelines_score_a_head_as_it_was_trained(head, function):
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        image_size=32,
        num_labels=5,
        problem_type=problem_type(head),
    )
    model = ViTForImageClassification(config).eval()
    with torch.no_grad():
        model.classifier.bias.normal_()
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    image = Image.new("RGB", (32, 32), (200, 30, 90))
    scores = pipeline("image-classification", model=model, image_processor=processor, device="cpu")(image, top_k=5)
    with torch.no_grad():
        logits = model(**processor(image, return_tensors="pt")).logits[0]
    expected = function(logits).sort(descending=True).values
    torch.testing.assert_close(torch.tensor([score["score"] for score in scores]), expected, atol=1e-6, rtol=0)
