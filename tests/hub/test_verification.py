"""Damage that the Hub's client does not see: wrong bytes of the right size, and a cache that changed later."""

import shutil
from pathlib import Path

import huggingface_hub
import pytest
from hub_server import HubServer
from huggingface_hub import snapshot_download

from hf_vit.files.errors import CheckpointError
from hf_vit.hub import verify


WEIGHTS = bytes(range(256)) * 40


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with HubServer() as server:
        server.attach(monkeypatch, tmp_path / "cache")
        files = {"config.json": b"{}", "model.safetensors": WEIGHTS, "part/model.safetensors": b"2" + WEIGHTS}
        server.add_repository("me/model", files)
        yield server
    huggingface_hub.close_session()


def test_a_sound_snapshot_is_checked_file_by_file(hub):
    assert verify(snapshot_download("me/model")) == 2


@pytest.mark.reliability(row="L06")
def test_a_download_that_was_damaged_at_its_right_size_is_refused(hub):
    hub.fault("/storage/", corrupt=True)
    folder = snapshot_download("me/model")
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: damaged .*: expected sha256 .*delete .*load it again"
    ):
        verify(folder)


@pytest.mark.reliability(row="L06")
@pytest.mark.parametrize("damage", [WEIGHTS[:-1], WEIGHTS[:100] + b"\0" + WEIGHTS[101:]], ids=["truncated", "flipped"])
def test_a_cache_that_was_damaged_later_is_refused_until_it_is_loaded_again(hub, damage):
    folder = Path(snapshot_download("me/model"))
    stored = (folder / "model.safetensors").resolve()
    stored.write_bytes(damage)
    assert snapshot_download("me/model") == str(folder)  # the client sees nothing
    with pytest.raises(CheckpointError, match=str(stored)):
        verify(folder)
    stored.unlink()  # as the error says
    assert verify(snapshot_download("me/model")) == 2


def test_what_was_loaded_is_found_again_by_its_id_without_the_network(hub, tmp_path):
    folder = snapshot_download("me/model", cache_dir=tmp_path / "elsewhere")
    hub.requests.clear()
    assert verify("me/model", cache_dir=tmp_path / "elsewhere") == 2
    assert verify(folder) == 2
    assert hub.requests == []


def test_a_folder_outside_the_cache_has_no_digests_to_check(hub, tmp_path):
    shutil.copytree(snapshot_download("me/model"), tmp_path / "copy")
    assert verify(tmp_path / "copy") == 0
