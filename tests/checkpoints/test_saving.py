"""A model's folder is the old one or the new one: on a full disk, after SIGKILL, among writers and readers."""

import os
import stat
import textwrap
from pathlib import Path

import pytest
import torch
from measuring import depth, run_alone
from safetensors.torch import load_file

from hf_vit import HfViTConfig, HfViTForImageClassification, HfViTImageProcessor
from hf_vit.checkpoints import convert_jax_checkpoint, write_jax_checkpoint
from hf_vit.export.formats import export_timm, export_transformers
from hf_vit.files.atomic import atomic_folder


# Two models, told apart by their depth and by every number of their weights and of their configuration.
MODELS = """
import hashlib, os, torch
from forking import die_at_operation, in_child, status_of, unshare_progress_bars, was_killed
from hf_vit import HfViTConfig, HfViTForImageClassification, HfViTImageProcessor
from hf_vit.checkpoints import convert_jax_checkpoint, write_jax_checkpoint
from transformers.utils import logging as library_logging

library_logging.disable_progress_bar()
torch.set_num_threads(1)
unshare_progress_bars()

def model_of(tag):
    config = HfViTConfig(
        hidden_size=16, num_hidden_layers=1 + tag % 3, num_attention_heads=2, intermediate_size=24, image_size=8,
        patch_size=4, num_labels=3, initializer_range=tag / 1000,
    )
    model = HfViTForImageClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(tag)
    return model

def tag_of(folder):
    # the model's tag; -1 if it is a mixture
    model = HfViTForImageClassification.from_pretrained(folder)
    tags = {float(value) for parameter in model.parameters() for value in parameter.detach().aminmax()}
    return int(tags.pop()) if tags == {round(model.config.initializer_range * 1000)} else -1

def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}

folder = Path(sys.argv[1]) / "model"
npz = {tag: Path(sys.argv[1]) / "npz" / f"{tag}.npz" for tag in (1, 2)}

def write_npz():
    for tag, path in npz.items():
        path.parent.mkdir(exist_ok=True)
        model = model_of(tag)
        write_jax_checkpoint(model.state_dict(), model.config, path)

def save(tag):
    model_of(tag).save_pretrained(folder)

def save_shards(tag):
    model_of(tag).save_pretrained(folder, max_shard_size="4KB")

def convert(tag):
    convert_jax_checkpoint(npz[tag], folder, initializer_range=tag / 1000)
"""


SLOW = pytest.mark.slow
WRITES = ["save", pytest.param("save_shards", marks=SLOW), pytest.param("convert", marks=SLOW)]


@pytest.mark.reliability(row="R08")
@pytest.mark.parametrize("write", WRITES)
def test_no_room_for_the_new_model_leaves_the_old_one_bit_for_bit(write, figure, tmp_path):
    """A limit on a file's size stands for the full disk; every write meets its error in turn as the limit grows."""
    code = """
    import resource
    write_npz()
    write = globals()[WRITE]
    write(1)
    notes = folder / "notes.md"
    notes.write_text("mine")
    old, refused, silent, bytes_said = digests(folder), 0, 0, 0
    largest = max(path.stat().st_size for path in folder.iterdir())
    limits = [0, 1, 100, *range(500, 4 * largest, max(largest // 8, 1))]
    for limit in limits:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            write(2)
        except OSError as error:
            refused += 1
            bytes_said += "bytes free" in str(error)
            silent += digests(folder) != old or sorted(os.listdir(folder.parent)) != ["model", "npz"]
        else:
            break
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    answer([refused, silent, bytes_said, tag_of(folder), notes.exists()])
    """
    code = MODELS + textwrap.dedent(code)
    refused, changed, bytes_said, tag, has_notes = run_alone(code, tmp_path, WRITE=write)
    assert changed == 0
    assert bytes_said == refused >= 4
    assert tag == 2
    assert has_notes
    figure(f"old one intact, {write}", f"{refused}/{refused}")


def test_a_model_that_the_disk_has_no_room_for_is_refused_before_writing(tmp_path, monkeypatch):
    model = HfViTForImageClassification(HfViTConfig(num_hidden_layers=0, hidden_size=12))
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(OSError, match=r"1000 bytes free, \d{5,} needed; nothing was written"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.reliability(row="R09")
@pytest.mark.parametrize("write", WRITES)
def test_sigkill_at_any_file_operation_leaves_the_old_model_or_the_new_one(write, figure, tmp_path):
    code = """
    write_npz()
    write = globals()[WRITE]

    def dying(deadline):
        model_of(2)  # what is imported late is imported now
        die_at_operation(deadline)
        write(2)

    write(1)
    in_child(lambda: write(2)) and os.wait()
    found, strays, deadline, died = [], 0, 0, True
    while died:
        write(1)
        strays += sorted(os.listdir(folder.parent)) != ["model", "npz"] or any(
            path.name.startswith(".") for path in folder.iterdir()
        )
        died = was_killed(in_child(lambda: dying(deadline)))
        found.append(tag_of(folder))
        deadline += STEP
    answer([found, strays])
    """
    found, strays = run_alone(MODELS + textwrap.dedent(code), tmp_path, WRITE=write, STEP=depth(4, 1))
    assert set(found) == {1, 2}
    assert found == sorted(found)
    assert strays == 0
    figure(f"old or new, {write}", f"{len(found)}/{len(found)} kills")


@pytest.mark.slow
@pytest.mark.reliability(row="L01")
def test_six_readers_never_meet_a_mixture_while_a_writer_replaces_the_model(figure, tmp_path):
    code = """
    save(1)
    end = time.monotonic() + SECONDS

    def read(pipe):
        seen = []
        while time.monotonic() < end:
            try:
                seen.append(tag_of(folder))
            except Exception as error:
                print(repr(error), file=sys.stderr, flush=True)
                seen.append(-2)
        os.write(pipe, json.dumps([len(seen), seen.count(-1), seen.count(-2), sorted(set(seen))]).encode() + b"\\n")

    source, sink = os.pipe()
    readers = [in_child(lambda: read(sink)) for _ in range(6)]
    os.close(sink)
    writes = 0
    while time.monotonic() < end:
        (save if writes % 3 else save_shards)(1 + writes % 50)
        writes += 1
    statuses = [status_of(pid) for pid in readers]
    with os.fdopen(source) as file:
        counts = [json.loads(line) for line in file]
    answer([writes, statuses, counts])
    """
    seconds = depth(6, 12)
    writes, statuses, counts = run_alone(MODELS + textwrap.dedent(code), tmp_path, SECONDS=seconds)
    loads, mixed, failed = (sum(column) for column in list(zip(*counts, strict=True))[:3])
    assert statuses == [0] * 6
    assert (mixed, failed) == (0, 0)
    assert writes > 5
    assert len(set().union(*(seen for *_, seen in counts))) > 1  # the readers met more than one state
    figure("loads", f"{loads} in {seconds} s, {mixed} mixed, {failed} failed, {writes} writes")


@pytest.mark.slow
@pytest.mark.reliability(row="L02")
def test_eight_writers_of_one_model_leave_one_of_theirs_whole(figure, tmp_path):
    code = """
    whole = 0
    for turn in range(ROUNDS):
        write = save if turn % 2 else save_shards
        statuses = [status_of(pid) for pid in [in_child(lambda: write(10 * (1 + turn) + i)) for i in range(8)]]
        whole += statuses == [0] * 8 and tag_of(folder) // 10 == 1 + turn and os.listdir(folder.parent) == ["model"]
    answer(whole)
    """
    rounds = depth(4, 20)
    assert run_alone(MODELS + textwrap.dedent(code), tmp_path, ROUNDS=rounds) == rounds
    figure("whole, single file and shards", f"{rounds}/{rounds}")


@pytest.mark.reliability(row="L07")
def test_all_that_is_written_has_the_modes_of_the_umask(figure, tmp_path):
    config = HfViTConfig(hidden_size=12, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4)
    model = HfViTForImageClassification(config)
    before = os.umask(0o022)
    try:
        model.save_pretrained(tmp_path / "single")
        HfViTImageProcessor.for_model(config).save_pretrained(tmp_path / "single")
        model.save_pretrained(tmp_path / "shards", max_shard_size="4KB")
        write_jax_checkpoint(model.state_dict(), config, tmp_path / "model.npz")
        convert_jax_checkpoint(tmp_path / "model.npz", tmp_path / "converted")
        export_transformers(model, tmp_path / "transformers")
        export_timm(model, tmp_path / "timm")
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 15
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o644}
    figure("modes", f"0644 of {len(files)} files")


# -- what stays and what goes -----------------------------------------------------------------------------------------


@pytest.fixture
def model():
    torch.manual_seed(0)
    return HfViTForImageClassification(
        HfViTConfig(hidden_size=12, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4)
    )


def test_shards_of_the_old_model_go_and_what_is_not_the_models_stays(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    model.save_pretrained(tmp_path, variant="half")
    HfViTImageProcessor().save_pretrained(tmp_path)
    (tmp_path / "notes.md").write_text("mine")
    (tmp_path / "checkpoint-3").mkdir()
    assert len(list(tmp_path.glob("model-*"))) > 1
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir() if path.suffix != ".py"} == {
        "config.json",
        "model.safetensors",
        "model.half.safetensors",
        "preprocessor_config.json",
        "notes.md",
        "checkpoint-3",
    }
    HfViTForImageClassification.from_pretrained(tmp_path)


def test_the_current_folder_is_filled_file_by_file(model, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    monkeypatch.chdir(tmp_path)
    model.save_pretrained(".")
    assert sorted(name for name in os.listdir(".") if not name.endswith(".py")) == ["config.json", "model.safetensors"]
    assert_same_weights(model, Path("model.safetensors"))


def test_a_file_is_no_folder_to_save_in(model, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match="expected a folder, got a file"):
        model.save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_another_process_than_the_main_one_writes_nothing(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    before = (tmp_path / "model" / "model.safetensors").stat().st_mtime_ns
    model.save_pretrained(tmp_path / "model", is_main_process=False)
    assert (tmp_path / "model" / "model.safetensors").stat().st_mtime_ns == before


def test_without_the_package_saving_is_that_of_transformers(model, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_vit.modeling_hf_vit.installed_module", lambda name: None)
    monkeypatch.setattr("hf_vit.configuration_hf_vit.installed_module", lambda name: None)
    model.save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir() if path.suffix != ".py"}
    assert names == {"config.json", "model.safetensors"}
    assert_same_weights(model, tmp_path / "model.safetensors")


def test_a_model_read_from_a_folder_has_that_folders_name_and_errors_name_it(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = HfViTForImageClassification.from_pretrained(tmp_path)
    assert loaded.name_or_path == loaded.config._name_or_path == str(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(OSError, match=f"found in directory {tmp_path}"):
        HfViTForImageClassification.from_pretrained(tmp_path)


def assert_same_weights(model, path):
    saved = load_file(path)
    assert saved.keys() == model.state_dict().keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in model.state_dict().items())


def test_a_writer_reads_what_he_has_written_so_far(model, tmp_path):
    with atomic_folder(tmp_path / "out") as staging:
        model.save_pretrained(staging)
        found = HfViTForImageClassification.from_pretrained(staging)  # waits for nobody
    assert torch.equal(found.classifier.weight, model.classifier.weight)
