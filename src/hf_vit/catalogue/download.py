"""Downloads of published files into a local cache: resumed where they stopped, checked before every use.

A file lies in the cache as `<hash of the address>/<file name>`, beside `<file name>.pin.json` (address, size,
sha256). No public list of checksums exists for the published files, so the pin is written at the first download and
holds from then on: a cached file whose bytes differ from it is fetched again, and a server that later gives other
bytes is refused.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import ipaddress
import json
import logging
import os
import re
import shutil
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote, urlsplit

from huggingface_hub import constants
from huggingface_hub.utils import WeakFileLock, tqdm

from hf_vit.catalogue.entries import CatalogueEntry, find, is_published, to_https
from hf_vit.files.atomic import atomic_file
from hf_vit.files.errors import CheckpointError
from hf_vit.files.npz import open_arrays


logger = logging.getLogger(__name__)

_CHUNK = 1 << 20
_PROGRESS_THAT_RESETS_RETRIES = 8 * _CHUNK
_LONGEST_WAIT = 30.0  # seconds
_SIZE_TOLERANCE = 1.0  # MiB: sizes are listed to 0.01 MiB at best, to 1 MiB at worst
_RETRIED_STATUSES = {408, 425, 429, 500, 502, 503, 504}


class DownloadError(OSError):
    """A file could not be brought: what was tried, why it failed, what to do. `mirrors` are Hub ids of the weights."""

    def __init__(self, message: str, *, mirrors: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.mirrors = mirrors


class _TransferError(Exception):
    """This attempt failed; the next one may not. `start_over`: what arrived is of no use (counts as two failures)."""

    def __init__(self, message: str, *, start_over: bool = False, wait: float = 0.0) -> None:
        super().__init__(message)
        self.start_over = start_over
        self.wait = wait


@dataclass(frozen=True)
class _Target:
    """What is fetched and where it goes. All four files lie in one folder, so that moving into place is atomic."""

    url: str
    path: Path
    entry: CatalogueEntry | None
    sha256: str | None  # None: not known from outside, the pin decides

    def beside(self, suffix: str) -> Path:
        return self.path.with_name(self.path.name + suffix)

    @property
    def partial(self) -> Path:
        return self.beside(".partial")

    @property
    def mirrors(self) -> tuple[str, ...]:
        return tuple(mirror.repo for mirror in self.entry.mirrors) if self.entry else ()


def default_cache_dir() -> Path:
    """`hf_vit` inside `HF_HOME` (by default `~/.cache/huggingface/hf_vit`)."""
    return Path(constants.HF_HOME) / "hf_vit"


def fetch(
    source: str | CatalogueEntry,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    sha256: str | None = None,
    offline: bool | None = None,
    retries: int = 5,
    backoff: float = 1.0,
    timeout: float = 30.0,
    progress: bool = True,
) -> Path:
    """Path of a verified local copy of a published file, downloaded if it is not in the cache.

    A download that was cut off, by the network or by the end of the process, continues where it stopped. Processes and
    threads that ask for the same file at once share one download. A copy in the cache is read against its sha256
    before it is handed out.

    Args:
        source: an entry or a name of the catalogue, a `gs://bucket/...` address, or an `https://` address. Plain
            `http://` is taken from this machine only (`localhost`, 127.0.0.0/8, `::1`), and no redirect leads there.
        cache_dir: `default_cache_dir()` if None.
        sha256: expected digest in hexadecimal; if None, that of the catalogue, else that of the first download.
        offline: never open a connection; if None, as `HF_HUB_OFFLINE` says.
        retries: how often a transfer that makes no progress is tried again.
        backoff: seconds before the first of these; doubled each time, 30 at most. A server's `Retry-After` is obeyed
            up to the same limit.
        timeout: seconds without a byte after which a connection counts as dropped.
        progress: show a progress bar.

    Raises:
        DownloadError: if the file can't be had, or what arrives is not what was published; says what to do.
        ValueError: if `source` is neither a known name nor an address of an allowed kind.
    """
    target = _choose_target(source, Path(cache_dir).expanduser() if cache_dir else default_cache_dir(), sha256)
    offline = constants.HF_HUB_OFFLINE if offline is None else offline
    if _is_intact(target):
        return target.path
    if offline:
        state = "does not have the expected checksum" if target.path.exists() else "is not in the cache"
        raise DownloadError(
            f"{target.url} {state} ({target.path}) and offline mode does not allow downloading it: "
            "unset HF_HUB_OFFLINE, or give the path of a local file",
            mirrors=target.mirrors,
        )
    target.path.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(target.beside(".lock")):
        if not _is_intact(target):  # another process may have fetched it meanwhile
            if target.path.exists():
                logger.warning("%s does not have the expected checksum: fetching it again", target.path)
            _download(target, retries=retries, backoff=backoff, timeout=timeout, progress=progress)
    return target.path


def _choose_target(source: str | CatalogueEntry, cache_dir: Path, sha256: str | None) -> _Target:
    if isinstance(source, CatalogueEntry):
        entry, url = source, source.https_url
    else:
        is_address = "://" in source
        entry = find(source) if not is_address or is_published(source) else None
        url = entry.https_url if entry else to_https(source)
    _check_address(url)
    parts = urlsplit(url)
    name = re.sub(r"[^\w.+-]", "_", unquote(parts.path).rpartition("/")[2], flags=re.ASCII).lstrip(".")
    folder = cache_dir / hashlib.sha256(url.encode()).hexdigest()[:24]
    digest = sha256 or (entry.sha256 if entry else None)
    if digest is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", digest):
        raise ValueError(f"sha256 must be 64 hexadecimal digits, got {digest!r}")
    return _Target(url, folder / (name[-180:] or "file"), entry, digest.lower() if digest else None)


def _check_address(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme == "https" and parts.hostname:
        return
    if parts.scheme == "http" and _is_loopback(parts.hostname):
        return
    raise ValueError(
        f"can't fetch {url!r}: expected a name of the catalogue, gs://bucket/file or https://host/file "
        "(plain http only from this machine)"
    )


def _is_loopback(host: str | None) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with atomic_file(path) as temporary:
        Path(temporary).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _read_pin(target: _Target) -> dict[str, Any]:
    """The pin of this file, {} where there is none that can be trusted."""
    pin = _read_json(target.beside(".pin.json"))
    is_whole = pin.get("url") == target.url and re.fullmatch(r"[0-9a-f]{64}", str(pin.get("sha256")))
    return pin if is_whole and isinstance(pin.get("size"), int) else {}


def _is_intact(target: _Target) -> bool:
    """Whether the cache holds the file, with the size and the digest of its pin and the digest that was asked for."""
    pin = _read_pin(target)
    expected = target.sha256 or pin.get("sha256")
    if not pin or pin["sha256"] != expected:
        return False
    try:
        return target.path.stat().st_size == pin["size"] and _digest(target.path, "sha256") == expected
    except FileNotFoundError:
        return False


def _digest(path: Path, algorithm: str) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()


def _download(target: _Target, *, retries: int, backoff: float, timeout: float, progress: bool) -> None:
    """Transfer until whole, verify, move into place. A transfer that gets further starts the count of retries anew."""
    failures, furthest = 0, 0
    while True:
        try:
            headers = _transfer(target, timeout=timeout, progress=progress)
            return _accept(target, headers)
        except _TransferError as error:
            if error.start_over:
                _forget_partial(target)
            arrived = target.partial.stat().st_size if target.partial.exists() else 0
            if arrived >= furthest + _PROGRESS_THAT_RESETS_RETRIES:
                failures, furthest = 0, arrived
            failures += 2 if error.start_over else 1
            if failures > retries:
                kept = f"; {arrived} bytes are kept, call again to continue" if arrived else ""
                raise DownloadError(
                    f"could not fetch {target.url}: {error}{kept}{_advise_mirrors(target)}", mirrors=target.mirrors
                ) from error
            wait = min(max(error.wait, backoff * 2 ** (failures - 1)), _LONGEST_WAIT)
            logger.info("fetching %s: %s; trying again in %.1f s", target.url, error, wait)
            time.sleep(wait)


def _forget_partial(target: _Target) -> None:
    target.partial.unlink(missing_ok=True)
    target.beside(".partial.json").unlink(missing_ok=True)


def _transfer(target: _Target, *, timeout: float, progress: bool) -> dict[str, Any]:
    """Bring what is missing of the partial file; what the server said of the whole one is returned."""
    known = _read_announcement(target)
    offset = target.partial.stat().st_size if known and target.partial.exists() else 0
    if offset and offset == known.get("size"):
        return known
    with _open(target, offset, known, timeout) as response:
        offset, said = _read_headers(response, offset, known)
        _check_room(target, offset, said["size"])
        if said != known:
            _write_json(target.beside(".partial.json"), said)
        _copy(response, target, offset, said["size"], progress)
    return said


def _read_announcement(target: _Target) -> dict[str, Any]:
    """What the server said of the file whose first part is here, {} where that is not known."""
    known = _read_json(target.beside(".partial.json"))
    kinds = {"size": int | None, "validator": str, "digests": dict}
    return known if all(isinstance(known.get(key, 0.0), kind) for key, kind in kinds.items()) else {}


def _open(target: _Target, offset: int, known: Mapping[str, Any], timeout: float) -> http.client.HTTPResponse:
    headers = {"User-Agent": "hf-vit", "Accept-Encoding": "identity"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
        if known.get("validator"):
            headers["If-Range"] = known["validator"]
    proxies = [urllib.request.ProxyHandler({})] if _is_loopback(urlsplit(target.url).hostname) else []
    opener = urllib.request.build_opener(CheckedRedirects, *proxies)
    try:
        return opener.open(urllib.request.Request(target.url, headers=headers), timeout=timeout)
    except urllib.error.HTTPError as error:
        with error:
            raise _explain_status(target, error) from error
    except DownloadError:
        raise
    except (http.client.HTTPException, OSError) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLCertVerificationError):
            raise DownloadError(f"could not fetch {target.url}: its certificate is not trusted ({reason})") from error
        raise _TransferError(f"the connection failed ({reason or type(error).__name__})") from error


class CheckedRedirects(urllib.request.HTTPRedirectHandler):
    """Redirects stay within the allowed kinds of address, and lead to plain http only from this machine to itself."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        try:
            _check_address(newurl)
            is_allowed = newurl.startswith("https:") or _is_loopback(urlsplit(req.full_url).hostname)
        except ValueError:
            is_allowed = False
        if not is_allowed:
            raise DownloadError(f"{req.full_url} redirects to {newurl!r}: expected another https:// address")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _explain_status(target: _Target, error: urllib.error.HTTPError) -> Exception:
    if error.code == 416:
        return _TransferError("the server has less than what is already here", start_over=True)
    if error.code in _RETRIED_STATUSES:
        seconds = error.headers.get("Retry-After", "")
        return _TransferError(f"the server answered {error.code}", wait=float(seconds) if seconds.isdecimal() else 0.0)
    meaning = "refuses it" if error.code in (401, 403, 451) else "does not give it"
    return DownloadError(
        f"could not fetch {target.url}: the server {meaning} (status {error.code}){_advise_mirrors(target)}",
        mirrors=target.mirrors,
    )


def _advise_mirrors(target: _Target) -> str:
    if not target.mirrors:
        return "; give the path of a local copy if you have one"
    assert target.entry is not None
    notes = {mirror.repo: f" ({mirror.note})" if mirror.note else "" for mirror in target.entry.mirrors}
    listed = " or ".join(f"from_pretrained({repo!r}){note}" for repo, note in notes.items())
    return f"; the same weights are on the Hub: try {listed}"


def _read_headers(
    response: http.client.HTTPResponse, offset: int, known: Mapping[str, Any]
) -> tuple[int, dict[str, Any]]:
    """Where the body begins, and size, validator and digests of the whole file."""
    headers = response.headers
    if headers.get("Content-Encoding", "identity") != "identity":
        raise DownloadError(f"{response.url} comes {headers['Content-Encoding']}-encoded: expected the file as it is")
    if response.status == 206:
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", headers.get("Content-Range", ""))
        if match is None or int(match[1]) != offset or int(match[2]) != known.get("size", int(match[2])):
            raise _TransferError("the server continues another file than it began", start_over=True)
        size = int(match[2])
    else:
        offset, size = 0, int(headers["Content-Length"]) if headers.get("Content-Length", "").isdecimal() else None
    etag = headers.get("ETag", "")
    validator = etag if etag.startswith('"') else headers.get("Last-Modified", "")
    said = {"size": size, "validator": validator, "digests": _read_digests(headers)}
    if not offset:
        return 0, said
    if validator and known.get("validator", validator) != validator:
        raise _TransferError("the file changed on the server", start_over=True)
    return offset, {key: value or known.get(key) for key, value in said.items()}  # a 206 may say less than the 200


def _read_digests(headers: http.client.HTTPMessage) -> dict[str, str]:
    """Digests of the whole file in hexadecimal, by algorithm, from `x-goog-hash` or an ETag that is one.

    Its crc32c is left aside (no implementation in the standard library): a zip carries a CRC-32 of every array.
    """
    digests = {}
    for item in ",".join(headers.get_all("x-goog-hash", [])).split(","):
        algorithm, _, value = item.strip().partition("=")
        if algorithm == "md5":
            digests["md5"] = base64.b64decode(value).hex()
    etag = headers.get("ETag", "").strip('"')
    is_encrypted = "x-amz-server-side-encryption" in headers  # such an ETag has the form of an md5 and is none
    if re.fullmatch(r"[0-9a-f]{32}|[0-9a-f]{64}", etag) and not is_encrypted:
        digests.setdefault("md5" if len(etag) == 32 else "sha256", etag)
    return digests


def _check_room(target: _Target, offset: int, size: int | None) -> None:
    free = shutil.disk_usage(target.path.parent).free
    if size is not None and size - offset > free:
        raise DownloadError(
            f"no room for {target.url}: {size - offset} bytes are needed at {target.path.parent} and {free} are free; "
            "make room or set HF_HOME to another disk"
        )


def _copy(response: http.client.HTTPResponse, target: _Target, offset: int, size: int | None, progress: bool) -> None:
    bar_format = {"unit": "B", "unit_scale": True, "desc": target.path.name[-40:], "disable": not progress}
    with target.partial.open("ab" if offset else "wb") as file, tqdm(total=size, initial=offset, **bar_format) as bar:
        arrived = offset
        for chunk in _read_chunks(response):
            file.write(chunk)
            arrived += len(chunk)
            bar.update(len(chunk))
        file.flush()
        os.fsync(file.fileno())
    if size is not None and arrived < size:
        raise _TransferError(f"the connection ended after {arrived} of {size} bytes")


def _read_chunks(response: http.client.HTTPResponse) -> Iterator[bytes]:
    try:
        while chunk := response.read1(_CHUNK):  # not read: that would hold back what came before a break
            yield chunk
    except (http.client.HTTPException, OSError) as error:
        raise _TransferError(f"the connection broke off ({error or type(error).__name__})") from error


def _accept(target: _Target, said: Mapping[str, Any]) -> None:
    """Verify the partial file, pin it, move it into place."""
    path, pin = target.partial, _read_pin(target)
    size, digest = path.stat().st_size, _digest(path, "sha256")
    for algorithm, expected in said["digests"].items():
        got = digest if algorithm == "sha256" else _digest(path, algorithm)
        if got != expected:
            raise _TransferError(
                f"what arrived has {algorithm} {got}, the server announced {expected}", start_over=True
            )
    _check_content(target, size)
    expected = target.sha256 or pin.get("sha256", digest)
    if digest != expected:
        origin = "was expected" if target.sha256 else "came with the first download"
        raise _TransferError(
            f"what arrived has sha256 {digest}, but {expected} {origin} "
            f"(if the change is known and wanted, delete {target.path.parent})",
            start_over=True,
        )
    # the pin goes first: a file without one is never taken for good
    _write_json(target.beside(".pin.json"), {"url": target.url, "size": size, "sha256": digest})
    path.replace(target.path)
    target.beside(".partial.json").unlink(missing_ok=True)


def _check_content(target: _Target, size: int) -> None:
    """Hold what arrived against the listed size, and an `.npz` against the CRC-32 of each of its arrays."""
    listed = target.entry.size_mib if target.entry else None
    if listed is not None and abs(size / 2**20 - listed) > _SIZE_TOLERANCE:
        raise _TransferError(f"what arrived has {size / 2**20:.2f} MiB, {listed} MiB are listed", start_over=True)
    if target.path.suffix != ".npz":
        return
    try:
        with open_arrays(target.partial) as arrays:
            for name in arrays.shapes:
                arrays.read(name)
    except CheckpointError as error:
        raise _TransferError(f"what arrived is damaged ({error})", start_over=True) from error
