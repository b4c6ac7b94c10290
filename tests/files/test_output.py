"""What a command may replace in an output folder, and what it finds out before its work starts."""

import hashlib
import json
import os

import pytest

from hf_vit.files.output import (
    CODE_FILES,
    check_output,
    check_outputs,
    check_writable,
    is_generated,
    mark,
    owned_files,
)
from hf_vit.hub.push import HUB_FILES


CARD = "---\nlicense: mit\n---\n# Model\n\nText.\n"


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "ViT.npz"
    path.write_bytes(b"weights")
    return path


@pytest.fixture
def model(tmp_path, source):
    """A folder as a conversion of `source` leaves it."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"0")
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    (folder / "parity.json").write_text(json.dumps({"sha256": digest}))
    (folder / "README.md").write_text(mark(CARD))
    return folder


def test_the_marker_survives_new_metadata_and_not_a_new_text(tmp_path):
    card = tmp_path / "README.md"
    assert not is_generated(card)
    for text, expected in (
        (CARD, False),
        (mark(CARD), True),
        (mark(mark(CARD)), True),
        (mark(CARD).replace("license: mit", "license: mit\ntags:\n- a"), True),
        (mark(CARD).replace("\n", "\r\n"), True),
        (mark(CARD).replace("Text.", "My text."), False),
        (mark(CARD) + "My notes.\n", False),
    ):
        card.write_text(text, newline="")
        assert is_generated(card) is expected, text


def test_the_code_that_travels_with_a_model_is_known():
    assert CODE_FILES == HUB_FILES


def test_companions_of_a_model_are_owned_only_beside_a_card_of_hf_vit(model):
    assert {"results.json", "README.md", ".eval_results/*.yaml"} < set(owned_files(model))
    (model / "README.md").write_text("mine")
    assert not {"results.json", "README.md", ".eval_results/*.yaml"} & set(owned_files(model))
    assert "config.json" in owned_files(model)


def test_a_folder_with_files_of_the_user_is_accepted(tmp_path, source):
    (tmp_path / "notes.txt").write_text("mine")
    check_output(tmp_path, source=source)
    check_output(tmp_path / "new" / "model", source=source)
    assert sorted(os.listdir(tmp_path)) == ["ViT.npz", "notes.txt"]


def test_a_finished_model_is_refused_unless_the_source_is_the_same(model, source):
    check_output(model, source=source)
    with pytest.raises(FileExistsError, match=r"already holds .*config\.json.*pass --overwrite"):
        check_output(model)
    source.write_bytes(b"other weights")
    with pytest.raises(FileExistsError, match=r"already holds README\.md, config\.json, model\.safetensors"):
        check_output(model, source=source)
    check_output(model, source=source, overwrite=True)
    (model / "parity.json").write_text("[]")
    with pytest.raises(FileExistsError, match="already holds"):
        check_output(model, source=source)


@pytest.mark.parametrize("text", [CARD, mark(CARD) + "Edited.\n"], ids=["foreign", "edited"])
def test_a_card_of_the_user_is_refused_even_for_the_same_source(model, source, text):
    (model / "README.md").write_text(text)
    with pytest.raises(FileExistsError, match=r"README\.md was not written by hf-vit, or was edited .* --overwrite"):
        check_output(model, source=source)
    check_output(model, source=source, overwrite=True)


def test_a_source_that_would_be_replaced_is_refused_in_every_case(model):
    with pytest.raises(ValueError, match=r"model\.safetensors is the source and would be replaced"):
        check_output(model, source=model / "model.safetensors", overwrite=True)


def test_a_place_below_a_file_or_without_a_parent_is_refused(tmp_path, source):
    with pytest.raises(NotADirectoryError, match=r"expected a folder, got a file; .*ViT\.npz"):
        check_writable(source / "out" / "model", is_folder=True)
    with pytest.raises(NotADirectoryError, match="expected a folder, got a file"):
        check_writable(source, is_folder=True)
    with pytest.raises(FileNotFoundError, match=r"the folder does not exist: make it first: .*nope"):
        check_outputs([None, tmp_path / "nope" / "p.json"])
    with pytest.raises(IsADirectoryError, match="expected a file, got a folder"):
        check_writable(tmp_path)
    assert os.listdir(tmp_path) == ["ViT.npz"]


def test_a_place_that_cannot_be_written_is_refused():
    with pytest.raises(OSError, match=r"cannot be written .*choose another folder: .*/proc"):
        check_writable("/proc/hf-vit/model", is_folder=True)


def test_missing_space_is_refused_with_both_figures(tmp_path):
    with pytest.raises(OSError, match=r"disk full: \d+ bytes free, 100000000000000000 needed"):
        check_writable(tmp_path / "model", is_folder=True, needed=10**17)


def test_the_current_folder_a_link_and_a_device_can_be_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path)
    for folder in (".", "link", "link/new"):
        check_writable(folder, is_folder=True)
    check_writable("/dev/stdout")
    check_writable("p.json")
    assert os.listdir(tmp_path) == ["link"]
