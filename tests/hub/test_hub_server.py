"""The loopback Hub answers the real client as the Hub does, and fails on demand as networks do."""

import hashlib
import subprocess
import sys
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import huggingface_hub
import pytest
from hub_server import HubServer
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


# huggingface_hub sends a large file in a way that its HTTP library calls deprecated
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

WEIGHTS = bytes(range(256)) * 40  # 10 KiB that are a large file by their name
STORAGE = "/storage/"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A server, and this process's client allowed to reach it."""
    with HubServer() as server:
        server.attach(monkeypatch, tmp_path / "cache")
        server.add_user("me", token="hf_me")
        server.add_user("you", token="hf_you")
        server.add_user("me", token="hf_read", can_write=False)
        yield server
    huggingface_hub.close_session()


def client(hub: HubServer, token: str | bool = "hf_me") -> HfApi:
    return HfApi(endpoint=hub.url, token=token)


def folder_of(path: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def content_of(folder: str) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


FILES = {"README.md": b"---\nlicense: mit\n---\n", "model.safetensors": WEIGHTS, "code/a.py": b"A = 1\n", "empty": b""}


def test_a_folder_comes_back_as_it_was_pushed_in_one_commit(hub, tmp_path):
    api = client(hub)
    assert api.create_repo("me/model", private=True).repo_id == "me/model"
    api.create_repo("me/model", exist_ok=True)
    commit = api.upload_folder(repo_id="me/model", folder_path=folder_of(tmp_path / "out", FILES))
    newest, first = api.list_repo_commits("me/model")
    assert (newest.commit_id, first.title) == (commit.oid, "initial commit")
    pulled = content_of(api.snapshot_download("me/model"))
    assert pulled.pop(".gitattributes")
    assert pulled == FILES


def test_an_unchanged_file_is_neither_sent_nor_committed_again(hub, tmp_path):
    api = client(hub)
    api.create_repo("me/model")
    first = api.upload_folder(repo_id="me/model", folder_path=folder_of(tmp_path, FILES))
    again = api.upload_folder(repo_id="me/model", folder_path=tmp_path)
    assert again.oid == first.oid
    assert len(hub.requested(STORAGE, "PUT")) == 1


def test_a_large_file_is_uploaded_in_parts_when_the_server_asks_for_parts(hub):
    hub.multipart_chunk_size = 4096
    api = client(hub)
    api.create_repo("me/model")
    api.upload_file(repo_id="me/model", path_in_repo="model.safetensors", path_or_fileobj=WEIGHTS)
    assert len(hub.requested(STORAGE, "PUT")) == 3
    assert hub.files("me/model")["model.safetensors"] == WEIGHTS


def test_large_files_are_redirected_to_a_host_that_never_sees_the_token(hub):
    hub.add_repository("me/model", {"model.safetensors": WEIGHTS, "config.json": b"{}"}, private=True)
    path = Path(client(hub).hf_hub_download("me/model", "model.safetensors"))
    assert path.read_bytes() == WEIGHTS
    assert path.resolve().name == hashlib.sha256(WEIGHTS).hexdigest()  # the linked ETag
    (asked,) = hub.requested("/resolve/")
    (served,) = hub.requested(STORAGE)
    assert (asked.host, asked.token, asked.status) == ("127.0.0.1", "Bearer hf_me", 302)
    assert (served.host, served.token, served.status) == ("localhost", None, 200)


@pytest.mark.parametrize(
    ("request_fields", "status", "reason"),
    [
        ({"headers": {"Authorization": "Bearer hf_me"}}, 400, "send no token"),
        ({"headers": {"Range": "bytes=10240-"}}, 416, ""),
        ({"method": "PUT", "data": b"other"}, 400, "does not match its sha256"),
    ],
)
def test_the_storage_refuses_tokens_wrong_ranges_and_wrong_content(hub, request_fields, status, reason):
    hub.add_repository("me/model", {"w.bin": WEIGHTS})
    request = Request(f"{hub.storage_url}{STORAGE}{hashlib.sha256(WEIGHTS).hexdigest()}", **request_fields)
    with pytest.raises(HTTPError) as caught:
        urlopen(request)
    assert caught.value.code == status
    assert reason in caught.value.read().decode()


def test_branches_tags_and_commits_are_revisions(hub):
    api = client(hub)
    api.create_repo("me/model")
    api.create_tag("me/model", tag="v0")
    api.create_branch("me/model", branch="feature/x")
    api.upload_file(repo_id="me/model", path_in_repo="a", path_or_fileobj=b"new", revision="feature/x")
    refs = api.list_repo_refs("me/model")
    assert ([b.name for b in refs.branches], [t.name for t in refs.tags]) == (["main", "feature/x"], ["v0"])
    newest = refs.branches[1].target_commit
    for revision in ("feature/x", newest):
        assert Path(api.hf_hub_download("me/model", "a", revision=revision)).read_bytes() == b"new"
        assert api.model_info("me/model", revision=revision).sha == newest
    assert not api.file_exists("me/model", "a", revision="v0")
    api.delete_branch("me/model", branch="feature/x")
    api.delete_tag("me/model", tag="v0")
    assert not api.revision_exists("me/model", "feature/x")


def test_a_commit_adds_and_deletes_and_refuses_an_outdated_parent(hub):
    api = client(hub)
    head = hub.add_repository("me/model", {"a": b"a", "old/b": b"b", "old/c": b"c", "w.bin": WEIGHTS}).branches["main"]
    operations = [
        CommitOperationDelete("a"),
        CommitOperationDelete("old/"),
        CommitOperationAdd("new", b"n"),
    ]
    api.create_commit("me/model", operations, commit_message="all at once", parent_commit=head.oid)
    files = hub.files("me/model")
    del files[".gitattributes"]
    assert files == {"w.bin": WEIGHTS, "new": b"n"}
    with pytest.raises(HfHubHTTPError, match="412"):
        api.create_commit("me/model", [CommitOperationAdd("z", b"")], commit_message="late", parent_commit=head.oid)
    with pytest.raises(EntryNotFoundError):
        api.create_commit("me/model", [CommitOperationDelete("gone")], commit_message="nothing there")


def test_a_stranger_may_open_a_pull_request_but_not_push(hub):
    hub.add_repository("me/model")
    add = [CommitOperationAdd("w.bin", WEIGHTS)]
    with pytest.raises(HfHubHTTPError, match="403"):
        client(hub, "hf_you").create_commit("me/model", add, commit_message="push")
    add = [CommitOperationAdd("w.bin", WEIGHTS)]
    commit = client(hub, "hf_you").create_commit("me/model", add, commit_message="suggest", create_pr=True)
    assert commit.pr_revision == "refs/pr/1"
    assert "w.bin" not in hub.files("me/model")
    assert Path(client(hub, False).hf_hub_download("me/model", "w.bin", revision="refs/pr/1")).read_bytes() == WEIGHTS


def test_listings_tell_sizes_and_digests(hub):
    hub.add_repository("me/model", {"w.bin": WEIGHTS, "code/a.py": b"A = 1\n"})
    api = client(hub)
    tree = {entry.path: entry for entry in api.list_repo_tree("me/model", recursive=True)}
    assert set(tree) == {".gitattributes", "w.bin", "code", "code/a.py"}
    assert tree["w.bin"].lfs.sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    assert tree["code/a.py"].blob_id == hashlib.sha1(b"blob 6\0A = 1\n").hexdigest()
    assert [entry.path for entry in api.list_repo_tree("me/model", "code")] == ["code/a.py"]
    assert {entry.path for entry in api.list_repo_tree("me/model")} == {".gitattributes", "w.bin", "code"}
    info = api.model_info("me/model", files_metadata=True)
    assert {s.rfilename: s.size for s in info.siblings}["w.bin"] == len(WEIGHTS)


def test_a_card_with_broken_metadata_is_refused_before_anything_is_sent(hub):
    api = client(hub)
    api.create_repo("me/model")
    operations = [CommitOperationAdd("README.md", b"---\nlicense: mit\n"), CommitOperationAdd("w.bin", WEIGHTS)]
    with pytest.raises(ValueError, match="not closed"):
        api.create_commit("me/model", operations, commit_message="card")
    assert not hub.requested(STORAGE)


@pytest.mark.parametrize(
    ("token", "error", "status"),
    [(False, RepositoryNotFoundError, 401), ("hf_you", RepositoryNotFoundError, 404), ("hf_bad", HfHubHTTPError, 401)],
)
def test_a_private_repository_is_hidden_from_everyone_else(hub, token, error, status):
    hub.add_repository("me/secret", {"w.bin": WEIGHTS}, private=True)
    for call in (client(hub, token).snapshot_download, client(hub, token).model_info):
        with pytest.raises(error) as caught:
            call("me/secret")
        assert caught.value.response.status_code == status
    assert client(hub, "hf_read").model_info("me/secret").private


def test_writing_needs_a_write_token_and_ones_own_name(hub):
    with pytest.raises(HfHubHTTPError, match="write access"):
        client(hub, "hf_read").create_repo("me/model")
    with pytest.raises(HfHubHTTPError, match="403"):
        client(hub).create_repo("you/model")
    with pytest.raises(HfHubHTTPError, match="401"):
        client(hub, False).create_repo("me/model")
    assert client(hub).whoami()["name"] == "me"
    assert hub.repositories == {}


def test_what_is_missing_is_told_apart(hub):
    hub.add_repository("me/model")
    api = client(hub)
    with pytest.raises(RepositoryNotFoundError):
        api.hf_hub_download("me/other", "a")
    with pytest.raises(RevisionNotFoundError):
        api.hf_hub_download("me/model", "a", revision="v9")
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download("me/model", "a")
    api.delete_repo("me/model")
    assert not api.repo_exists("me/model")


def test_a_dropped_download_resumes_where_it_stopped(hub, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)
    hub.add_repository("me/model", {"w.bin": WEIGHTS})
    hub.fault(STORAGE, drop_after=5000)
    assert Path(client(hub).hf_hub_download("me/model", "w.bin")).read_bytes() == WEIGHTS
    assert [(r.range, r.status) for r in hub.requested(STORAGE)] == [(None, 200), ("bytes=4096-", 206)]


def test_a_dropped_upload_is_sent_again(hub):
    api = client(hub)
    api.create_repo("me/model")
    hub.fault(STORAGE, method="PUT", drop_after=100)
    api.upload_file(repo_id="me/model", path_in_repo="w.bin", path_or_fileobj=WEIGHTS)
    assert [r.status for r in hub.requested(STORAGE, "PUT")] == [0, 200]
    assert hub.files("me/model")["w.bin"] == WEIGHTS


@pytest.mark.parametrize("status", [429, 500])
def test_an_error_that_passes_is_retried(hub, status):
    hub.add_repository("me/model", {"w.bin": WEIGHTS})
    hub.fault("/resolve/", status=status, times=2)
    assert Path(client(hub).hf_hub_download("me/model", "w.bin")).read_bytes() == WEIGHTS
    assert [r.status for r in hub.requested("/resolve/")] == [status, status, 302]


def test_a_corrupt_answer_has_the_right_size_and_the_wrong_bytes(hub):
    hub.add_repository("me/model", {"w.bin": WEIGHTS})
    hub.fault(STORAGE, corrupt=True)
    received = Path(client(hub).hf_hub_download("me/model", "w.bin")).read_bytes()
    assert len(received) == len(WEIGHTS)
    assert sum(a != b for a, b in zip(received, WEIGHTS, strict=True)) == 1


def test_a_slow_answer_is_given_up_and_asked_for_again(hub):
    hub.add_repository("me/model", {"w.bin": WEIGHTS})
    hub.fault("/resolve/", delay=0.3)
    path = hf_hub_download("me/model", "w.bin", endpoint=hub.url, token=False, etag_timeout=0.1)
    assert Path(path).read_bytes() == WEIGHTS
    assert len(hub.requested("/resolve/")) == 2


def test_a_new_process_takes_the_server_for_the_hub_by_its_environment_alone(hub, tmp_path):
    hub.add_repository("me/model", {"w.bin": WEIGHTS}, private=True)
    code = "from huggingface_hub import snapshot_download; print(snapshot_download('me/model'))"
    environment = hub.environment(tmp_path / "home", token="hf_me")
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    folder = Path(run.stdout.strip())
    assert folder.is_relative_to(tmp_path / "home")
    assert (folder / "w.bin").read_bytes() == WEIGHTS
    assert snapshot_download("me/model", endpoint=hub.url, token="hf_me", local_dir=tmp_path / "here")
