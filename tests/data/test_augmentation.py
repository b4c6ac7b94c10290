"""A sample's augmentation depends on seed, epoch and index, and on nothing else."""

import json
import os
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import skip_first_batches
from torch.utils.data import DataLoader

from hf_vit.data.augmentation import (
    Augment,
    AugmentedImages,
    AugmentedStream,
    EpochSampler,
    MixingCollator,
    collate_images,
)
from hf_vit.data.datasets import load_splits
from hf_vit.image_processing_hf_vit import HfViTImageProcessor


SIZE = {"height": 16, "width": 16}
WHOLE = Augment(crop_area=None, flip=0.0)
EVERYTHING = Augment(randaugment_ops=2, erasing=0.5)


class Samples:
    """Noise of 20 x 14 pixels (width x height), or the given samples, with labels 0...3."""

    def __init__(self, samples=None, length=12):
        generator = np.random.default_rng(0)
        noise = [generator.integers(0, 256, (14, 20, 3), dtype=np.uint8) for _ in range(length)]
        self.samples = [PIL.Image.fromarray(pixels) for pixels in (samples or noise)]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return {"image": self.samples[index], "label": index % 4}


def images(augment=EVERYTHING, *, seed=0, samples=None, length=12, **processor) -> AugmentedImages:
    processor = HfViTImageProcessor(**({"size": SIZE} | processor))
    return AugmentedImages(Samples(samples, length), processor, augment=augment, seed=seed)


def batches(dataset, *, collate=collate_images, epochs=2, **loader):
    sampler = EpochSampler(dataset, seed=5)
    loader = DataLoader(dataset, batch_size=4, sampler=sampler, collate_fn=collate, **loader)
    found = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        found.extend(loader)
    return found


def assert_equal_batches(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def coordinates(height=40, width=50) -> np.ndarray:
    """An image whose red is the column and whose green is the row."""
    rows, columns = np.mgrid[:height, :width].astype(np.uint8)
    return np.stack([columns, rows, np.zeros_like(rows)], axis=-1)


# --- a function of seed, epoch and index ---


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("workers", [1, 2])
def test_workers_do_not_change_a_bit(workers, persistent):
    collate = MixingCollator(4, mixup_alpha=0.5, cutmix_alpha=1.0)
    expected = batches(images(), collate=collate)
    assert_equal_batches(
        batches(images(), collate=collate, num_workers=workers, persistent_workers=persistent), expected
    )
    assert not torch.equal(expected[0]["pixel_values"], expected[3]["pixel_values"])


@pytest.mark.slow
def test_spawned_workers_that_live_on_see_the_epoch_change():
    collate = MixingCollator(4, cutmix_alpha=1.0)
    spawned = batches(
        images(), collate=collate, num_workers=1, persistent_workers=True, multiprocessing_context="spawn"
    )
    assert_equal_batches(spawned, batches(images(), collate=collate))


def test_seed_epoch_and_index_each_change_the_augmentation():
    samples = [np.asarray(Samples().samples[0])] * 2
    one, other = images(seed=0, samples=samples), images(seed=1, samples=samples)
    first = one[0]["pixel_values"]
    assert torch.equal(one[0]["pixel_values"], first)
    assert not torch.equal(one[1]["pixel_values"], first)
    assert not torch.equal(other[0]["pixel_values"], first)
    one.set_epoch(1)
    assert not torch.equal(one[0]["pixel_values"], first)
    one.set_epoch(0)
    assert torch.equal(one[0]["pixel_values"], first)


def test_the_generator_of_the_process_is_neither_read_nor_moved():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = batches(images(), collate=MixingCollator(4), epochs=1)
    loader_draw = torch.empty((), dtype=torch.int64)
    torch.set_rng_state(state)
    images()[3]
    MixingCollator(4)([images()[0], images()[1]])
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    loader_draw.random_()
    assert_equal_batches(batches(images(), collate=MixingCollator(4), epochs=1), first)


def test_an_epoch_is_a_permutation_drawn_from_seed_and_epoch():
    dataset = images(length=50)
    sampler, same, other = EpochSampler(dataset, seed=1), EpochSampler(dataset, seed=1), EpochSampler(dataset, seed=2)
    first = list(sampler)
    assert sorted(first) == list(range(50))
    assert first == list(same) != list(other)
    dataset.set_epoch(1)
    assert list(sampler) != first


def test_an_epoch_resumed_in_its_middle_gives_the_rest_bit_for_bit():
    whole = batches(images(), epochs=2)
    dataset = images()
    sampler = EpochSampler(dataset, seed=5)
    loader = DataLoader(dataset, batch_size=4, sampler=sampler, collate_fn=collate_images, num_workers=1)
    sampler.set_epoch(1)
    assert_equal_batches(list(skip_first_batches(loader, 2)), whole[5:])


def test_a_stream_augments_an_image_the_same_whoever_reads_it_and_anew_each_epoch(tmp_path):
    for split in ("train", "test"):
        for number, sample in enumerate(Samples().samples):
            folder = tmp_path / split / ("cat" if number % 2 else "dog")
            folder.mkdir(parents=True, exist_ok=True)
            sample.save(folder / f"{number}.png")
    stream = load_splits(str(tmp_path), streaming=True)["train"]
    processor = HfViTImageProcessor(size=SIZE)
    once, endless = (AugmentedStream(stream, processor, augment=EVERYTHING, repeat=repeat) for repeat in (False, True))
    first = {sample["index"]: sample["pixel_values"] for sample in once}
    again = {sample["index"]: sample["pixel_values"] for sample in DataLoader(once, batch_size=None, num_workers=2)}
    assert len(first) == 12
    assert first.keys() == again.keys()
    assert all(torch.equal(first[index], again[index]) for index in first)
    two_epochs = [sample for sample, _ in zip(endless, range(24), strict=False)]
    second = {sample["index"]: sample["pixel_values"] for sample in two_epochs[12:]}
    assert second.keys() == first.keys()
    assert not any(torch.equal(second[index], first[index]) for index in first)


TWO_RANKS = """
import json, sys
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from hf_vit import HfViTImageProcessor
from hf_vit.data.images import ImageError
from hf_vit.data import decoding
from hf_vit.data.augmentation import Augment, AugmentedImages, EpochSampler, collate_images
from hf_vit.data.datasets import load_splits

decoding.SCAN_CHUNK = 11  # of 12 images: each rank meets one of the bad ones
accelerator = Accelerator(cpu=True)
good, bad = sys.argv[1:]
try:
    load_splits(bad)
except ImageError as error:
    named = str(error)
dataset = AugmentedImages(load_splits(good)["train"], HfViTImageProcessor(size=16), augment=Augment(), seed=3)
loader = DataLoader(dataset, batch_size=2, sampler=EpochSampler(dataset, seed=5), collate_fn=collate_images)
loader = accelerator.prepare(loader)
sums = []
for epoch in range(2):
    loader.set_epoch(epoch)
    for batch in loader:
        sums += [[epoch, int(index), float(image.double().sum())]
                 for index, image in zip(batch["index"], batch["pixel_values"])]
found = [None] * accelerator.num_processes
torch.distributed.all_gather_object(found, [sums, named])
if accelerator.is_main_process:
    print(json.dumps(found))
accelerator.end_training()
"""


@pytest.mark.slow
def test_two_ranks_share_an_epoch_and_the_search_for_bad_images(tmp_path):
    for folder in ("good", "bad"):
        for number, sample in enumerate(Samples(length=10).samples):
            name = "cat" if number < 5 or folder == "bad" else "dog"
            (tmp_path / folder / name).mkdir(parents=True, exist_ok=True)
            sample.save(tmp_path / folder / name / f"{number:02d}.png")
    (tmp_path / "bad" / "dog").mkdir()
    for number in range(2):
        Samples(length=10).samples[number].save(tmp_path / "bad" / "dog" / f"dog{number}.png")
    bad = ["09.png", "zz.png"]  # in the first chunk, and in the second
    (tmp_path / "bad" / "cat" / "10.png").write_bytes((tmp_path / "bad" / "cat" / "00.png").read_bytes())
    for name in bad:
        (tmp_path / "bad" / "cat" / name).write_bytes(b"no image")
    (tmp_path / "run.py").write_text(TWO_RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(tmp_path / "run.py"), str(tmp_path / "good"), str(tmp_path / "bad")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    (first, named), (second, also_named) = json.loads(finished.stdout.strip().splitlines()[-1])
    assert named == also_named
    assert all(name in named for name in bad)
    expected = AugmentedImages(
        load_splits(str(tmp_path / "good"))["train"], HfViTImageProcessor(size=16), augment=Augment(), seed=3
    )
    for epoch in range(2):
        expected.set_epoch(epoch)
        parts = [{index: total for number, index, total in part if number == epoch} for part in (first, second)]
        assert not parts[0].keys() & parts[1].keys()
        found = parts[0] | parts[1]
        assert found == {index: float(expected[index]["pixel_values"].double().sum()) for index in range(8)}


# --- what the transforms do ---


@pytest.mark.parametrize("protocol", ["vit_jax", "transformers", "big_vision"])
def test_without_augmentation_the_pixels_are_the_processors(protocol):
    dataset = images(None, protocol=protocol)
    expected = HfViTImageProcessor(protocol=protocol, size=SIZE)(Samples()[2]["image"], return_tensors="pt")
    assert torch.equal(dataset[2]["pixel_values"], expected["pixel_values"][0])


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]},
        {"do_normalize": False},
        {"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [127.5] * 3},
        {"num_channels": 1},
    ],
)
def test_the_whole_image_unflipped_is_what_the_processor_gives(fields):
    augmented, plain = images(WHOLE, **fields)[2]["pixel_values"], images(None, **fields)[2]["pixel_values"]
    torch.testing.assert_close(augmented, plain, rtol=0, atol=2e-6 * float(plain.abs().max()))


def test_crops_keep_to_the_references_area_and_aspect_ratio():
    dataset = images(Augment(flip=0.0), samples=[coordinates()] * 300, do_rescale=False, do_normalize=False)
    pixels = torch.stack([dataset[index]["pixel_values"] for index in range(300)])
    # the middle of the first and last output pixel lie half a step inside the box
    width = (pixels[:, 0].amax((1, 2)) - pixels[:, 0].amin((1, 2))) * 16 / 15
    height = (pixels[:, 1].amax((1, 2)) - pixels[:, 1].amin((1, 2))) * 16 / 15
    area, ratio = width * height / (40 * 50), width / height
    assert area.min() < 0.1
    assert area.min() > 0.03
    assert area.max() > 0.85
    assert 0.7 < ratio.min() < 0.8
    assert 1.25 < ratio.max() < 1.45


def test_half_of_the_images_are_mirrored_and_none_when_told():
    samples = [coordinates()] * 200
    upright = images(WHOLE, samples=samples)[0]["pixel_values"]
    flipped = images(Augment(crop_area=None, flip=0.5), samples=samples)
    mirrored = [torch.equal(flipped[index]["pixel_values"], upright.flip(-1)) for index in range(200)]
    straight = [torch.equal(flipped[index]["pixel_values"], upright) for index in range(200)]
    assert 70 < sum(mirrored) < 130
    assert sum(mirrored) + sum(straight) == 200


def test_erasing_puts_the_mean_colour_into_one_box():
    samples = [np.full((14, 20, 3), 255, np.uint8)] * 20
    dataset = images(Augment(crop_area=None, flip=0.0, erasing=1.0), samples=samples)
    for index in range(20):
        erased = dataset[index]["pixel_values"][0] == 0
        rows, columns = erased.any(1).sum(), erased.any(0).sum()
        assert erased.sum() == rows * columns > 0


def test_randaugment_changes_images_and_stays_in_range():
    dataset, plain = images(Augment(crop_area=None, flip=0.0, randaugment_ops=2)), images(WHOLE)
    changed = [not torch.equal(dataset[index]["pixel_values"], plain[index]["pixel_values"]) for index in range(12)]
    assert sum(changed) >= 9
    assert all(dataset[index]["pixel_values"].abs().max() <= 1 for index in range(12))


def test_a_size_without_height_and_width_is_refused():
    with pytest.raises(ValueError, match="expected height and width"):
        images(WHOLE, size={"shortest_edge": 16})


# --- batches ---


def constant_samples(count=4, size=16):
    """Samples of label i whose pixels are all i."""
    return [
        {"pixel_values": torch.full((3, size, size), float(index)), "labels": index, "index": index, "epoch": 0}
        for index in range(count)
    ]


def test_a_plain_batch_has_pixels_labels_and_indices():
    batch = collate_images(constant_samples())
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == {
        "pixel_values": (4, 3, 16, 16),
        "labels": (4,),
        "index": (4,),
    }
    unlabelled = [{name: value for name, value in row.items() if name != "labels"} for row in constant_samples()]
    assert collate_images(unlabelled).keys() == {"pixel_values", "index"}


@pytest.mark.parametrize("alphas", [(1.0, 0.0), (0.0, 1.0)])
def test_soft_labels_are_the_shares_of_the_images_in_the_mixture(alphas):
    batch = MixingCollator(4, *alphas)(constant_samples())
    labels, pixels = batch["labels"], batch["pixel_values"]
    torch.testing.assert_close(labels.sum(1), torch.ones(4))
    assert (labels > 0).sum() == 8  # two classes a sample
    torch.testing.assert_close(labels @ torch.arange(4.0), pixels.mean((1, 2, 3)))
    assert (len(pixels[1].unique()) == 1) == (alphas[0] > 0)  # mixup blends everywhere, cutmix pastes a box


def test_mixing_changes_with_the_epoch_and_happens_as_often_as_told():
    samples = constant_samples()
    first = MixingCollator(4, 1.0)(samples)["labels"]
    assert torch.equal(MixingCollator(4, 1.0)(samples)["labels"], first)
    assert not torch.equal(MixingCollator(4, 1.0)([row | {"epoch": 1} for row in samples])["labels"], first)
    collate = MixingCollator(4, 1.0, 1.0, probability=0.5)
    soft = [collate([row | {"epoch": epoch} for row in samples])["labels"] for epoch in range(200)]
    assert 70 < sum(bool((labels.amax(1) < 1).all()) for labels in soft) < 130
    assert torch.equal(MixingCollator(4, 0.0)(samples)["labels"], torch.eye(4))
