"""Labelled images from folders, parquet files and streams, and the bad ones among them."""

import io
import logging
import zipfile
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
from odd_images import READ_RIGHT, REFUSED, write_odd_files
from sklearn.datasets import load_digits

from hf_vit import HfViTImageProcessor
from hf_vit.data import AugmentedImages, BalancedSampler, class_weights
from hf_vit.data.datasets import (
    decode_images,
    default_num_workers,
    find_column,
    load_splits,
    shard_by_rank,
    stratified_split,
)
from hf_vit.data.images import ImageError


def write_image(path: Path, color: int = 0, *, size: tuple[int, int] = (12, 8)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", size, (color, 0, 255 - color)).save(path)
    return path


def write_folders(root: Path, counts: dict[str, int]) -> Path:
    for number, (folder, count) in enumerate(counts.items()):
        for image in range(count):
            write_image(root / folder / f"{image}.png", 40 * number + image)
    return root


def spoil(root: Path) -> list[str]:
    """Three bad images beside the good ones: cut short, empty, text."""
    good = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    PIL.Image.fromarray(noise).save(good, "jpeg")
    (root / "cat" / "cut.jpg").write_bytes(good.getvalue()[: len(good.getvalue()) // 2])
    (root / "dog" / "empty.png").write_bytes(b"")
    (root / "dog" / "text.jpg").write_text("this is not an image")
    return ["cut.jpg", "empty.png", "text.jpg"]


def png(color: int) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (4, 4), (color, color, color)).save(buffer, "png")
    return buffer.getvalue()


def labels_of(part) -> list[int]:
    return [row["label"] for row in part.select_columns("label")]


def write_parquet(path: Path, images: list, labels: list, feature, names=("img", "target")) -> Path:
    features = datasets.Features({names[0]: datasets.Image(decode=False), names[1]: feature})
    datasets.Dataset.from_dict({names[0]: images, names[1]: labels}, features=features).to_parquet(str(path))
    return path


@pytest.fixture(scope="module")
def digits():
    return load_splits("digits")


# --- digits and the split ---


def test_digits_hold_out_a_fifth_of_every_class(digits):
    assert {name: len(part) for name, part in digits.items()} == {"train": 1437, "test": 360}
    held_out, everything = np.bincount(labels_of(digits["test"])), np.bincount(load_digits().target)
    assert np.abs(held_out - everything / 5).max() < 1


def test_digits_are_the_pixels_of_scikit_learn_in_three_equal_channels(digits):
    ours = sorted(np.asarray(row["image"]).tobytes() for part in digits.values() for row in part)
    scaled = (load_digits().images * 255 / 16).astype(np.uint8)
    assert ours == sorted(np.repeat(image[..., None], 3, axis=2).tobytes() for image in scaled)


def test_the_split_depends_on_the_seed_and_on_nothing_else():
    dataset = datasets.Dataset.from_dict({"label": [0, 1] * 20, "row": list(range(40))})
    first, again, other = (stratified_split(dataset, seed=seed)[1]["row"][:] for seed in (1, 1, 2))
    assert first == again != other


def test_a_small_class_is_on_both_sides_of_the_split_and_a_single_sample_in_training():
    dataset = datasets.Dataset.from_dict({"label": [0] * 10 + [1] * 2 + [2], "row": list(range(13))})
    train, test = stratified_split(dataset, test_size=0.2, seed=0)
    assert np.bincount(test["label"][:], minlength=3).tolist() == [2, 1, 0]
    assert sorted(train["row"][:] + test["row"][:]) == list(range(13))


@pytest.mark.parametrize("test_size", [0, 1, 1.5])
def test_a_held_out_part_must_be_a_fraction(test_size, tmp_path):
    with pytest.raises(ValueError, match="expected a fraction between 0 and 1"):
        load_splits(str(write_folders(tmp_path, {"cat": 5, "dog": 5})), test_size=test_size)


# --- class folders ---


def test_folders_without_splits_are_split(tmp_path):
    splits = load_splits(str(write_folders(tmp_path, {"cat": 5, "dog": 10})))
    assert np.bincount(labels_of(splits["train"])).tolist() == [4, 8]
    assert np.bincount(labels_of(splits["test"])).tolist() == [1, 2]
    assert splits["train"].features["label"].names == ["cat", "dog"]


@pytest.mark.parametrize(
    ("train", "held_out", "part"),
    [
        ("train", "test", "test"),
        ("Train", "Test", "test"),
        ("train", "Test", "test"),
        ("Training", "Testing", "test"),
        ("training_set", "test_set", "test"),
        ("seg_train", "seg_test", "test"),
        ("train", "val", "validation"),
        ("train", "valid", "validation"),
        ("TRAIN", "validation", "validation"),
    ],
)
def test_a_held_out_folder_is_a_part_with_the_same_classes(tmp_path, train, held_out, part):
    counts = {f"{train}/ant": 2, f"{train}/bee": 2, f"{train}/cat": 2, f"{held_out}/cat": 3}
    splits = load_splits(str(write_folders(tmp_path, counts)))
    assert set(splits) == {"train", part}
    assert splits.held_out == part
    assert labels_of(splits[part]) == [2, 2, 2]
    assert splits["train"].features["label"].names == splits[part].features["label"].names == ["ant", "bee", "cat"]


def test_validation_and_test_are_both_kept(tmp_path):
    counts = {"train/cat": 2, "train/dog": 2, "val/cat": 3, "val/dog": 1, "test/cat": 4, "test/dog": 1}
    splits = load_splits(str(write_folders(tmp_path, counts)))
    assert {name: len(part) for name, part in splits.items()} == {"train": 4, "validation": 4, "test": 5}
    assert splits.held_out == "test"


@pytest.mark.parametrize(
    "folder", [".ipynb_checkpoints", "__pycache__", "__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN"]
)
def test_system_folders_are_ignored_wherever_they_are(tmp_path, folder):
    counts = {"cat": 5, "dog": 5, f"{folder}": 2, f"cat/{folder}": 3}
    splits = load_splits(str(write_folders(tmp_path, counts)))
    assert splits.class_names == ["cat", "dog"]
    assert sum(map(len, splits.values())) == 10


def test_an_extra_level_of_folders_is_the_dataset(tmp_path):
    splits = load_splits(str(write_folders(tmp_path, {"data/train/cat": 4, "data/train/dog": 4, "data/test/dog": 2})))
    assert splits.class_names == ["cat", "dog"]
    assert {name: len(part) for name, part in splits.items()} == {"train": 8, "test": 2}


@pytest.mark.parametrize("counts", [{"cat": 5}, {"train/cat": 5, "test/cat": 5}, {"train/cat": 5, "test/dog": 5}])
def test_fewer_than_two_trained_classes_are_refused(tmp_path, counts):
    with pytest.raises(ValueError, match=r"1 class|expected at least two|no training images"):
        load_splits(str(write_folders(tmp_path, counts)))


def test_one_part_is_opened_without_a_look_at_the_images_of_the_others(tmp_path):
    root = write_folders(tmp_path, {"train/cat": 2, "train/dog": 2, "val/cat": 3, "val/dog": 1})
    (root / "train" / "cat" / "bad.png").write_bytes(b"")
    assert {name: len(part) for name, part in load_splits(str(root), split="held_out").items()} == {"validation": 4}
    with pytest.raises(ImageError, match=r"bad\.png"):
        load_splits(str(root), split="train")
    with pytest.raises(ValueError, match="no labelled part test; expected one of train, validation"):
        load_splits(str(root), split="test")


def test_a_class_without_training_images_does_not_stop_an_evaluation(tmp_path):
    root = str(write_folders(tmp_path, {"train/cat": 2, "train/dog": 2, "test/cat": 3, "test/owl": 1}))
    with pytest.raises(ValueError, match="no training images of 1 of 3 classes"):
        load_splits(root)
    assert labels_of(load_splits(root, split="test")["test"]) == [0, 0, 0, 2]


def test_all_images_are_one_part_and_the_held_out_fifth_is_the_same_alone(tmp_path):
    root = str(write_folders(tmp_path, {"cat": 10, "dog": 5}))
    assert len(load_splits(root, split="all")["all"]) == 15
    both, alone = load_splits(root, seed=3), load_splits(root, seed=3, split="held_out")
    assert list(alone) == ["test"]
    assert [row["image"].tobytes() for row in alone["test"]] == [row["image"].tobytes() for row in both["test"]]


def test_files_that_are_not_images_by_name_are_counted_and_left_out(tmp_path, caplog):
    root = write_folders(tmp_path, {"cat": 3, "dog": 2})
    (root / "cat" / "notes.txt").write_text("x")
    (root / "cat" / ".DS_Store").write_text("x")
    (root / ".cache").mkdir()
    with caplog.at_level(logging.WARNING):
        splits = load_splits(str(root))
    assert sum(map(len, splits.values())) == 5
    assert "left out: 1 .txt" in caplog.text


def test_a_folder_that_only_evaluates_must_be_asked_for(tmp_path):
    root = write_folders(tmp_path, {"val/cat": 2, "val/dog": 1})
    with pytest.raises(ValueError, match="has the splits validation; expected one named train"):
        load_splits(str(root))
    assert list(load_splits(str(root), require_train=False)) == ["validation"]


def test_a_folder_without_classes_and_a_missing_dataset_say_what_is_expected(tmp_path):
    with pytest.raises(ValueError, match=r"has no class folders with images; expected .*/CLASS/IMAGE"):
        load_splits(str(tmp_path))
    with pytest.raises(ValueError, match="neither `digits` nor a file or folder here"):
        load_splits(str(tmp_path / "nowhere"))


# --- bad images ---


def test_every_bad_image_is_named_in_one_error(tmp_path):
    names = spoil(write_folders(tmp_path, {"cat": 5, "dog": 5}))
    with pytest.raises(ImageError, match="3 of 13 images cannot be read") as caught:
        load_splits(str(tmp_path))
    assert all(name in str(caught.value) for name in names)
    assert "0.png" not in str(caught.value)


@pytest.mark.reliability(row="I03")
def test_bad_images_are_named_and_skipped_when_asked(tmp_path, caplog):
    names = spoil(write_folders(tmp_path, {"cat": 5, "dog": 5}))
    with caplog.at_level(logging.WARNING):
        splits = load_splits(str(tmp_path), bad_images="skip")
    assert sum(len([row["image"] for row in part]) for part in splits.values()) == 10
    assert "3 of 13 images cannot be read and are skipped" in caplog.text
    assert all(name in caplog.text for name in names)


def test_a_part_without_a_good_image_is_an_error_even_when_skipping(tmp_path):
    write_folders(tmp_path, {"train/cat": 2, "train/dog": 2})
    (tmp_path / "test" / "cat").mkdir(parents=True)
    (tmp_path / "test" / "cat" / "bad.png").write_bytes(b"")
    with pytest.raises(ImageError, match="none of the 1 images of test can be read"):
        load_splits(str(tmp_path), bad_images="skip")


def test_an_unknown_policy_is_refused():
    with pytest.raises(ValueError, match='expected one of "fail", "skip"'):
        load_splits("digits", bad_images="ignore")


def test_images_are_upright_rgb_and_sixteen_bits_are_scaled(tmp_path):
    write_folders(tmp_path, {"cat": 1, "dog": 1})
    rotated = PIL.Image.new("RGB", (12, 8), "red")
    exif = rotated.getexif()
    exif[0x0112] = 6  # to be turned by a quarter
    rotated.save(tmp_path / "cat" / "rotated.jpg", exif=exif)
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    PIL.Image.fromarray(ramp).save(tmp_path / "dog" / "deep.png")
    splits = load_splits(str(tmp_path))
    images = {row["image"].size: row["image"] for part in splits.values() for row in part}
    assert set(images) == {(12, 8), (8, 12), (8, 8)}
    np.testing.assert_allclose(np.asarray(images[8, 8])[..., 0], ramp / 257, atol=1)


@pytest.mark.reliability(row="I03")
@pytest.mark.reliability(row="I01")
@pytest.mark.filterwarnings("ignore:Image size:PIL.Image.DecompressionBombWarning")  # Pillow's own, before ours
@pytest.mark.filterwarnings("ignore:Truncated File Read:UserWarning")
def test_of_the_odd_files_the_refused_are_all_named_and_the_others_are_pixel_correct(tmp_path, caplog):
    write_odd_files(tmp_path, READ_RIGHT | REFUSED)
    with pytest.raises(ImageError, match="9 of 30 images cannot be read") as caught:
        load_splits(str(tmp_path))
    named = {name for name in READ_RIGHT | REFUSED if f"/{name}: " in str(caught.value)}
    assert named == set(REFUSED) - {"drawing.eps"}  # not an image by its name
    with caplog.at_level(logging.WARNING):
        splits = load_splits(str(tmp_path), bad_images="skip")
    assert "9 of 30 images cannot be read and are skipped" in caplog.text
    found = {}
    for part in splits.values():
        paths = [Path(cell["path"]).name for cell in part.with_format("arrow")[:].column("image").to_pylist()]
        found |= {name: row["image"] for name, row in zip(paths, part, strict=True)}
    assert found.keys() == READ_RIGHT.keys()
    for name, (_, expected, tolerance) in READ_RIGHT.items():
        assert np.abs(np.asarray(found[name]).astype(int) - expected).max() <= tolerance, name


# --- columns and labels ---


def test_embedded_images_with_unusual_columns_are_found(tmp_path):
    file = write_parquet(
        tmp_path / "data.parquet",
        [{"bytes": png(color), "path": f"{color}.png"} for color in range(10)],
        [color % 2 for color in range(10)],
        datasets.ClassLabel(names=["even", "odd"]),
    )
    splits = load_splits(str(file), cache_dir=str(tmp_path / "cache"))
    assert set(splits["train"].column_names) == {"image", "label"}
    assert splits["train"].features["label"].names == ["even", "odd"]
    assert all(row["image"].getpixel((0, 0))[0] % 2 == row["label"] for part in splits.values() for row in part)


def test_a_bad_embedded_image_is_named_by_its_row_and_file(tmp_path):
    images = [{"bytes": png(1), "path": None}, {"bytes": b"no", "path": "b.png"}, {"bytes": b"", "path": None}]
    images.append({"bytes": png(2), "path": None})
    file = write_parquet(tmp_path / "data.parquet", images, [0, 0, 0, 1], datasets.ClassLabel(names=["a", "b"]))
    with pytest.raises(ImageError, match=r"2 of 4 images cannot be read[^$]*row 1 \(b\.png\): "):
        load_splits(str(file), cache_dir=str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["pear", "fig", "pear", "fig"], ["fig", "pear"]),
        ([2, 0, 2, 0], ["0", "2"]),
        ([7, 200007, 7, 200007], ["7", "200007"]),
    ],
)
def test_text_and_integers_become_classes(tmp_path, labels, names):
    images = [{"bytes": png(color), "path": None} for color in range(4)]
    feature = datasets.Value("string" if isinstance(labels[0], str) else "int64")
    file = write_parquet(tmp_path / "data.parquet", images, labels, feature)
    splits = load_splits(str(file), cache_dir=str(tmp_path / "cache"), test_size=0.5)
    assert splits["train"].features["label"].names == names
    for part in splits.values():
        for row in part:
            assert names[row["label"]] == str(labels[row["image"].getpixel((0, 0))[0]])


def test_missing_labels_are_counted_and_one_column_of_floats_is_a_regression(tmp_path):
    images = [{"bytes": png(color), "path": None} for color in range(3)]
    file = write_parquet(tmp_path / "a.parquet", images, ["x", None, None], datasets.Value("string"))
    with pytest.raises(ValueError, match=r"train: 2 of 3 labels are missing \(rows 1, 2"):
        load_splits(str(file), cache_dir=str(tmp_path / "cache"))
    file = write_parquet(tmp_path / "b.parquet", images, [0.5, 1.0, 2.0], datasets.Value("float32"))
    assert load_splits(str(file), cache_dir=str(tmp_path / "cache")).problem_type == "regression"


def test_a_test_part_with_secret_answers_gives_way_to_validation(tmp_path):
    classes = datasets.ClassLabel(names=["a", "b"])
    images = [{"bytes": png(color), "path": None} for color in range(4)]
    for split, labels in {"train": [0, 1, 0, 1], "validation": [1, 1, 0, 0], "test": [-1] * 4}.items():
        write_parquet(tmp_path / f"{split}.parquet", images, labels, classes)
    splits = load_splits(str(tmp_path), cache_dir=str(tmp_path / "cache"))
    assert labels_of(splits[splits.held_out]) == [1, 1, 0, 0]


def test_a_column_is_found_by_type_then_by_name_or_asked_for():
    image, classes, text = datasets.Image(), datasets.ClassLabel(names=["a"]), datasets.Value("string")
    assert find_column(datasets.Features({"scan": image, "image": text}), "image") == "scan"
    assert find_column(datasets.Features({"coarse_label": classes, "fine_label": classes}), "label") == "fine_label"
    assert find_column(datasets.Features({"x": text, "target": text}), "label") == "target"
    assert find_column(datasets.Features({"x": text, "label": text}), "label", "x") == "x"
    with pytest.raises(ValueError, match=r"left \(Image\), right \(Image\): several could be the image; say which"):
        find_column(datasets.Features({"left": image, "right": image}), "image")
    with pytest.raises(ValueError, match="none is clearly the label; say which with label_column="):
        find_column(datasets.Features({"x": image}), "label")
    with pytest.raises(ValueError, match="label_column is 'y', but the columns are x"):
        find_column(datasets.Features({"x": classes}), "label", "y")


# --- streams ---


def test_a_stream_gives_the_same_images_as_the_table(tmp_path):
    root = str(write_folders(tmp_path, {"cat": 10, "dog": 15}))
    splits, streams = load_splits(root), load_splits(root, streaming=True)
    for name, part in splits.items():
        table = [(row["image"].tobytes(), row["label"]) for row in part]
        assert len(set(table)) == len(table)
        assert [(row["image"].tobytes(), row["label"]) for row in streams[name]] == table


def test_ranks_divide_a_stream_and_lose_nothing(tmp_path):
    stream = load_splits(str(write_folders(tmp_path, {"cat": 9, "dog": 11})), streaming=True)["train"]
    parts = [[row["index"] for row in shard_by_rank(stream, rank=rank, world_size=3)] for rank in range(3)]
    assert sorted(index for part in parts for index in part) == sorted(row["index"] for row in stream)
    assert len({row["index"] for row in stream}) == 16
    assert [len(part) for part in parts] == [6, 5, 5]


def test_a_stream_names_a_bad_image_where_it_meets_it_or_skips_it(tmp_path, caplog):
    names = spoil(write_folders(tmp_path, {"cat": 5, "dog": 5}))
    with pytest.raises(ImageError, match="|".join(names)):
        [list(part) for part in load_splits(str(tmp_path), streaming=True).values()]
    with caplog.at_level(logging.WARNING):
        streams = load_splits(str(tmp_path), streaming=True, bad_images="skip")
        assert sum(len(list(part)) for part in streams.values()) == 10
    assert all(name in caplog.text for name in names)


def test_a_stream_reads_images_inside_a_remote_archive(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("one.png", png(7))
        archive.writestr("two.png", b"no image")
    found = [{"path": f"zip://{name}.png::{tmp_path}/a.zip", "bytes": None} for name in ("one", "two")]
    assert decode_images({"image": found[:1]})["image"][0].getpixel((0, 0)) == (7, 7, 7)
    with pytest.raises(ImageError, match=r"zip://two\.png::"):
        decode_images({"image": found[1:]})


def test_workers_are_this_processs_share_of_the_cores(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(12)), raising=False)
    assert default_num_workers() == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert default_num_workers() == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    assert default_num_workers() == 1


# --- lists, multi-label and regression ---


def write_list(root: Path, name: str, header: str, rows: list[str]) -> str:
    (root / "images").mkdir(exist_ok=True)
    for color in range(8):
        (root / "images" / f"{color}.png").write_bytes(png(color))
    (root / name).write_text("\n".join([header, *rows]) + "\n")
    return str(root / name)


def test_a_list_of_files_is_read_with_relative_and_absolute_paths(tmp_path):
    rows = [f"images/{color}.png,{'even' if color % 2 == 0 else 'odd'}" for color in range(7)]
    rows.append(f"{tmp_path}/images/7.png,odd")
    splits = load_splits(write_list(tmp_path, "labels.csv", "file_name,label", rows), test_size=0.25)
    assert splits.class_names == ["even", "odd"]
    assert splits.problem_type == "single_label_classification"
    for part in splits.values():
        assert all(row["image"].getpixel((0, 0))[0] % 2 == row["label"] for row in part)


def test_a_table_whose_integers_are_names_in_several_folders_is_not_a_list_of_images(tmp_path):
    root = write_folders(tmp_path, {"cat": 4, "dog": 4})
    (root / "metadata.csv").write_text("id,age\n1,2\n")
    assert sum(map(len, load_splits(str(root)).values())) == 8


def test_cells_of_several_classes_make_a_multi_label_problem(tmp_path):
    tags = ["a;b", "a", "b;c", "c", "a;c", "b", "a;b;c", "c"]
    rows = [f"images/{color}.png,{tag}" for color, tag in enumerate(tags)]
    splits = load_splits(write_list(tmp_path, "labels.csv", "file_name,label", rows), test_size=0.25)
    assert splits.problem_type == "multi_label_classification"
    assert splits.class_names == ["a", "b", "c"]
    for part in splits.values():
        for row in part:
            expected = [float(name in tags[row["image"].getpixel((0, 0))[0]].split(";")) for name in "abc"]
            assert np.asarray(row["label"], dtype=float).tolist() == expected


def test_several_columns_of_flags_are_a_multi_label_problem(tmp_path):
    rows = [f"images/{color}.png,{color % 2},{int(color > 3)}" for color in range(8)]
    source = write_list(tmp_path, "labels.csv", "file_name,odd,large", rows)
    splits = load_splits(source, label_columns=["odd", "large"], test_size=0.25)
    assert splits.problem_type == "multi_label_classification"
    assert splits.class_names == ["odd", "large"]


def test_one_column_of_floats_is_a_regression(tmp_path):
    rows = [f"images/{color}.png,{color / 2 + 0.25}" for color in range(8)]
    splits = load_splits(write_list(tmp_path, "labels.csv", "file_name,label", rows), test_size=0.25)
    assert splits.problem_type == "regression"
    for part in splits.values():
        for row in part:
            assert float(row["label"]) == pytest.approx(row["image"].getpixel((0, 0))[0] / 2 + 0.25)


def test_class_weights_are_inverse_frequencies_with_mean_one():
    weights = class_weights([0, 0, 0, 1], "single_label_classification")
    assert np.asarray(weights).tolist() == pytest.approx([0.5, 1.5])


def test_balanced_sampling_gives_every_class_its_share_and_depends_on_seed_and_epoch_alone(tmp_path):
    splits = load_splits(str(write_folders(tmp_path, {"cat": 30, "dog": 6})))
    images = AugmentedImages(splits["train"], HfViTImageProcessor(size={"height": 8, "width": 8}))
    labels = np.array(labels_of(splits["train"]))
    orders = []
    for epoch in (0, 0, 1):
        images.set_epoch(epoch)
        orders.append(list(BalancedSampler(images, seed=3)))
    assert orders[0] == orders[1] != orders[2]
    counts = np.bincount(labels[orders[0]])
    assert abs(int(counts[0]) - int(counts[1])) <= 1
    assert counts.sum() == len(labels)
