import base64
import hashlib
import io
import json
import multiprocessing
import os
import time
import urllib.request
from http.client import HTTPMessage
from pathlib import Path

import numpy as np
import pytest
from file_server import serve, strong_etag

from hf_vit.catalogue.download import CheckedRedirects, DownloadError, default_cache_dir, fetch
from hf_vit.catalogue.entries import CatalogueEntry, Mirror


def npz_bytes(kilobytes: int = 64, seed: int = 0) -> bytes:
    arrays = {
        f"block_{i}/kernel": np.random.default_rng(seed + i).standard_normal((16, 64)) for i in range(kilobytes // 8)
    }
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


CONTENT = npz_bytes()
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def fetch_now(source, cache_dir: Path, **settings) -> Path:
    return fetch(source, cache_dir=cache_dir, **{"offline": False, "backoff": 0.0, "progress": False} | settings)


def files_in(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"}


def test_a_second_use_opens_no_connection(tmp_path):
    with serve(CONTENT) as server:
        path = fetch_now(server.url, tmp_path)
        again = fetch_now(server.url, tmp_path)
        assert server.gets == 1
    assert again == path
    assert path.name == "model.npz"
    assert path.read_bytes() == CONTENT
    assert json.loads((path.parent / "model.npz.pin.json").read_text()) == {
        "url": server.url,
        "size": len(CONTENT),
        "sha256": SHA256,
    }
    assert files_in(tmp_path) == {"model.npz", "model.npz.pin.json"}


@pytest.mark.reliability(row="L06")
def test_three_dropped_connections_are_continued_where_they_broke(tmp_path):
    faults = ["drop 10000", "drop 20000", "drop 5000"]
    with serve(CONTENT, faults=faults, etag=strong_etag(CONTENT)) as server:
        assert fetch_now(server.url, tmp_path).read_bytes() == CONTENT
        assert server.requests == [None, "bytes=10000-", "bytes=30000-", "bytes=35000-"]


def test_a_later_call_continues_what_an_earlier_one_left(tmp_path):
    with serve(CONTENT, faults=["drop 40000"], etag=strong_etag(CONTENT)) as server:
        with pytest.raises(DownloadError, match="40000 bytes are kept, call again to continue"):
            fetch_now(server.url, tmp_path, retries=0)
        assert fetch_now(server.url, tmp_path).read_bytes() == CONTENT
        assert server.requests == [None, "bytes=40000-"]


@pytest.mark.parametrize("damage", ["", "[]", '{"size": "many"}', '{"size": 1, "validator": 2, "digests": null}'])
def test_a_part_without_a_readable_record_is_fetched_anew(tmp_path, damage):
    with serve(CONTENT, faults=["drop 40000"]) as server:
        with pytest.raises(DownloadError):
            fetch_now(server.url, tmp_path, retries=0)
        next(tmp_path.rglob("*.partial.json")).write_text(damage)
        assert fetch_now(server.url, tmp_path).read_bytes() == CONTENT
        assert server.requests == [None, None]


def test_a_download_continues_without_a_validator_if_the_size_is_the_same(tmp_path):
    with serve(CONTENT, faults=["drop 40000"]) as server:
        assert fetch_now(server.url, tmp_path).read_bytes() == CONTENT
        assert server.requests == [None, "bytes=40000-"]


def test_a_server_that_ignores_range_is_read_from_the_start(tmp_path):
    with serve(CONTENT, faults=["drop 40000"], ignores_range=True) as server:
        assert fetch_now(server.url, tmp_path).read_bytes() == CONTENT
        assert server.requests == [None, "bytes=40000-"]


def test_a_server_that_continues_at_the_wrong_byte_is_read_from_the_start(tmp_path):
    with serve(CONTENT, faults=["drop 40000", "shift"]) as server:
        assert fetch_now(server.url, tmp_path).read_bytes() == CONTENT
        assert server.requests == [None, "bytes=40000-", None]


def test_a_file_that_changed_between_two_parts_is_never_mixed(tmp_path):
    other = npz_bytes(seed=100)
    assert len(other) == len(CONTENT)
    with serve(CONTENT, faults=["drop 40000"], etag=strong_etag(CONTENT)) as server:
        with pytest.raises(DownloadError):
            fetch_now(server.url, tmp_path, retries=0)
        server.content, server.etag = other, strong_etag(other)
        assert fetch_now(server.url, tmp_path).read_bytes() == other
        assert server.requests == [None, "bytes=40000-"]  # answered with the whole new file


def test_without_validators_a_mixture_is_recognised_by_its_checksums(tmp_path):
    other = npz_bytes(seed=100)
    with serve(CONTENT, faults=["drop 40000"]) as server:
        with pytest.raises(DownloadError):
            fetch_now(server.url, tmp_path, retries=0)
        server.content = other
        assert fetch_now(server.url, tmp_path).read_bytes() == other
        assert server.requests == [None, "bytes=40000-", None]


def test_busy_servers_are_asked_again(tmp_path):
    with serve(CONTENT, faults=["503", "429", "500"]) as server:
        assert fetch_now(server.url, tmp_path).read_bytes() == CONTENT
        assert server.gets == 4


def test_a_server_that_stays_busy_is_given_up_with_its_status(tmp_path):
    with serve(CONTENT, faults=["503"] * 9) as server:
        with pytest.raises(DownloadError, match="answered 503"):
            fetch_now(server.url, tmp_path, retries=2)
        assert server.gets == 3


def test_waiting_doubles_and_obeys_the_server(tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    with serve(CONTENT, faults=["503"] * 7, headers={"Retry-After": "7"}) as server:
        fetch_now(server.url, tmp_path, retries=7, backoff=1.0)
    assert waits == [7, 7, 7, 8, 16, 30, 30]


def test_a_refused_file_names_its_mirrors_and_is_not_asked_for_again(tmp_path):
    with serve(CONTENT, faults=["403"]) as server:
        mirrors = (Mirror("google/vit-x", "transformers", "without the head"), Mirror("timm/vit_x", "timm"))
        entry = CatalogueEntry(server.url, mirrors=mirrors)
        with pytest.raises(
            DownloadError, match=r"refuses .*403.*google/vit-x'\) \(without the head\) or .*timm/vit_x"
        ) as error:
            fetch_now(entry, tmp_path)
        assert error.value.mirrors == ("google/vit-x", "timm/vit_x")
        assert server.gets == 1


def test_an_absent_file_is_an_error_at_once(tmp_path):
    with serve(CONTENT, faults=["404"]) as server:
        with pytest.raises(DownloadError, match=r"404.*local copy"):
            fetch_now(server.url, tmp_path)
        assert server.gets == 1


@pytest.mark.reliability(row="L06")
@pytest.mark.parametrize("knows", ["archive", "etag", "goog-hash", "catalogue"])
def test_equal_size_corruption_on_the_way_is_fetched_again(tmp_path, knows):
    content = CONTENT if knows == "archive" else bytes(range(256)) * 100
    md5 = hashlib.md5(content, usedforsecurity=False)
    behaviour = {
        "etag": {"etag": f'"{md5.hexdigest()}"'},
        "goog-hash": {"headers": {"x-goog-hash": "crc32c=AAAAAA==,md5=" + base64.b64encode(md5.digest()).decode()}},
    }.get(knows, {})
    name = "model.npz" if knows == "archive" else "model.bin"
    digest = hashlib.sha256(content).hexdigest() if knows == "catalogue" else None
    with serve(content, name, faults=["corrupt"], **behaviour) as server:
        path = fetch_now(CatalogueEntry(server.url, sha256=digest), tmp_path)
        assert server.requests == [None, None]
    assert path.read_bytes() == content


@pytest.mark.reliability(row="L06")
def test_lasting_corruption_is_never_handed_out(tmp_path):
    with serve(CONTENT, faults=["corrupt"] * 9) as server:
        with pytest.raises(DownloadError, match="damaged"):
            fetch_now(server.url, tmp_path)
        assert server.gets == 3
    assert files_in(tmp_path) == set()


@pytest.mark.reliability(row="L06")
def test_a_file_with_another_digest_than_expected_is_refused(tmp_path):
    with serve(CONTENT) as server:
        with pytest.raises(DownloadError, match=f"sha256 {SHA256}, but {'0' * 64} was expected"):
            fetch_now(server.url, tmp_path, sha256="0" * 64)
        assert not list(tmp_path.rglob("*.npz"))


def test_a_wrong_expected_digest_does_not_cost_the_cached_file(tmp_path):
    with serve(CONTENT) as server:
        path = fetch_now(server.url, tmp_path)
        with pytest.raises(DownloadError, match="was expected"):
            fetch_now(server.url, tmp_path, sha256="0" * 64)
        gets = server.gets
        assert fetch_now(server.url, tmp_path) == path
        assert server.gets == gets


def test_a_file_of_another_size_than_listed_is_refused(tmp_path):
    with serve(CONTENT) as server, pytest.raises(DownloadError, match=r"0\.06 MiB, 330\.3 MiB are listed"):
        fetch_now(CatalogueEntry(server.url, size_mib=330.3), tmp_path)


@pytest.mark.reliability(row="L06")
@pytest.mark.parametrize("damage", ["truncate", "flip", "delete", "empty", "no pin", "half a pin", "another pin"])
def test_a_damaged_cache_entry_is_noticed_and_fetched_again(tmp_path, damage):
    with serve(CONTENT) as server:
        path = fetch_now(server.url, tmp_path)
        pin = path.with_name("model.npz.pin.json")
        if damage == "truncate":
            path.write_bytes(CONTENT[:-1])
        elif damage == "flip":
            path.write_bytes(CONTENT[:5000] + bytes([CONTENT[5000] ^ 1]) + CONTENT[5001:])
        elif damage == "delete":
            path.unlink()
        elif damage == "empty":
            path.write_bytes(b"")
        elif damage == "no pin":
            pin.unlink()
        elif damage == "half a pin":
            pin.write_text(pin.read_text()[:40])
        else:
            pin.write_text(json.dumps(["not", "a", "pin"]))
        assert fetch_now(server.url, tmp_path).read_bytes() == CONTENT
        assert server.gets == 2


def test_other_bytes_than_the_first_download_brought_are_refused(tmp_path):
    other = npz_bytes(seed=100)
    with serve(CONTENT) as server:
        path = fetch_now(server.url, tmp_path)
        path.unlink()
        server.content = other
        with pytest.raises(DownloadError, match=r"came with the first download.*delete"):
            fetch_now(server.url, tmp_path)
        assert not path.exists()


def test_offline_mode_uses_the_cache_and_opens_no_connection(tmp_path):
    with serve(CONTENT) as server:
        path = fetch_now(server.url, tmp_path)
        assert fetch(server.url, cache_dir=tmp_path) == path  # HF_HUB_OFFLINE=1 in every test
        path.write_bytes(CONTENT[:-1])
        with pytest.raises(DownloadError, match=r"does not have the expected checksum.*HF_HUB_OFFLINE"):
            fetch(server.url, cache_dir=tmp_path)
        with pytest.raises(DownloadError, match=r"not in the cache.*HF_HUB_OFFLINE"):
            fetch("ViT-B_16", cache_dir=tmp_path)
        assert server.gets == 1


FORK = multiprocessing.get_context("fork")  # children import nothing again; they touch sockets and files only
forks = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


def fetch_in_process(url: str, cache_dir: Path, results) -> None:
    results.put(fetch_now(url, cache_dir).stat().st_size)


@pytest.mark.reliability(row="L06")
@forks
def test_eight_processes_at_once_fetch_once(tmp_path):
    results = FORK.SimpleQueue()
    with serve(CONTENT, faults=["drop 30000"]) as server:
        workers = [FORK.Process(target=fetch_in_process, args=(server.url, tmp_path, results)) for _ in range(8)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(60)
        assert [worker.exitcode for worker in workers] == [0] * 8
        assert [results.get() for _ in workers] == [len(CONTENT)] * 8
        assert server.requests == [None, "bytes=30000-"]


@pytest.mark.reliability(row="L06")
@forks
def test_a_killed_download_continues_in_another_process(tmp_path):
    content = npz_bytes(1024)
    with serve(content, faults=["stall 700000"], etag=strong_etag(content)) as server:
        worker = FORK.Process(target=fetch_in_process, args=(server.url, tmp_path, FORK.SimpleQueue()))
        worker.start()
        while not any(path.stat().st_size for path in tmp_path.rglob("*.npz.partial")):
            assert worker.is_alive()
            time.sleep(0.01)
        worker.kill()
        worker.join()
        kept = next(tmp_path.rglob("*.npz.partial")).stat().st_size
        assert fetch_now(server.url, tmp_path).read_bytes() == content
        assert server.requests == [None, f"bytes={kept}-"]


def test_a_silent_server_counts_as_a_dropped_connection(tmp_path):
    with serve(CONTENT, faults=["stall 30000"], etag=strong_etag(CONTENT)) as server:
        assert fetch_now(server.url, tmp_path, timeout=0.2).read_bytes() == CONTENT
        assert server.requests == [None, "bytes=30000-"]


@pytest.mark.parametrize("target", ["http://example.com/x.npz", "file:///etc/hostname", "ftp://127.0.0.1/x.npz"])
def test_a_redirect_to_a_forbidden_address_is_refused(tmp_path, target):
    with (
        serve(CONTENT, faults=[f"redirect {target}"]) as server,
        pytest.raises(DownloadError, match=r"redirect|status 302"),
    ):
        fetch_now(server.url, tmp_path)


def test_no_other_machine_can_redirect_to_this_one():
    handler, request = CheckedRedirects(), urllib.request.Request("https://example.com/x.npz")
    with pytest.raises(DownloadError, match="expected another https"):
        handler.redirect_request(request, io.BytesIO(), 302, "", HTTPMessage(), "http://127.0.0.1/x.npz")


def test_a_proxy_is_not_asked_for_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    with serve(CONTENT) as server:
        assert fetch_now(server.url, tmp_path, retries=0).read_bytes() == CONTENT


def test_a_redirect_on_this_machine_is_followed(tmp_path):
    with serve(CONTENT) as other, serve(b"", faults=[f"redirect {other.url}"]) as server:
        assert fetch_now(server.url, tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize(
    "url", ["http://example.com/x.npz", "ftp://localhost/x.npz", "file:///etc/passwd", "https:///x"]
)
def test_only_https_is_fetched_from_other_machines(tmp_path, url):
    with pytest.raises(ValueError, match=r"can't fetch .* expected .*https"):
        fetch_now(url, tmp_path)


def test_an_unknown_name_is_an_error_with_the_closest_ones(tmp_path):
    with pytest.raises(ValueError, match=r"ViT-B16.*did you mean ViT-B_16"):
        fetch_now("ViT-B16", tmp_path)


def test_names_of_files_cannot_leave_the_cache(tmp_path):
    with serve(CONTENT, "a/..%2F..%2Fevil%00.npz?x=../../y") as server:
        path = fetch_now(server.url, tmp_path / "cache")
    assert path.is_relative_to(tmp_path / "cache")
    assert path.resolve() == path
    assert path.read_bytes() == CONTENT


def test_files_of_one_name_at_two_addresses_do_not_meet(tmp_path):
    other = npz_bytes(seed=100)
    with serve(CONTENT, "sam/ViT-B_16.npz") as one, serve(other, "gsam/ViT-B_16.npz") as two:
        assert fetch_now(one.url, tmp_path).read_bytes() == CONTENT
        assert fetch_now(two.url, tmp_path).read_bytes() == other


def test_a_full_disk_is_said_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with serve(CONTENT) as server, pytest.raises(DownloadError, match=r"no room .* 1000 are free"):
        fetch_now(server.url, tmp_path)


@pytest.mark.reliability(row="L07")
def test_files_have_the_modes_of_the_umask(tmp_path):
    before = os.umask(0o022)
    try:
        with serve(CONTENT) as server:
            path = fetch_now(server.url, tmp_path)
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in (path, path.with_name("model.npz.pin.json"))} == {0o644}


def test_the_default_cache_is_in_the_home_of_hugging_face(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", "/somewhere")
    assert default_cache_dir() == Path("/somewhere/hf_vit")
