"""A file server on this machine that misbehaves on request; standard library only."""

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class FileServer:
    """What the server gives, and how. The faults are used up from the front, one per GET; then it behaves."""

    content: bytes
    etag: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    ignores_range: bool = False
    requests: list[str | None] = field(default_factory=list)  # the Range header of each GET
    release: threading.Event = field(default_factory=threading.Event)  # ends a stall
    url: str = ""

    @property
    def gets(self) -> int:
        return len(self.requests)


@contextmanager
def serve(content: bytes, name: str = "model.npz", **behaviour) -> Iterator[FileServer]:
    state = FileServer(content, **behaviour)
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format, *args) -> None:
            pass

        def do_GET(self) -> None:
            with lock:
                state.requests.append(self.headers.get("Range"))
                fault = state.faults.pop(0) if state.faults else ""
            _answer(self, state, fault)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}/{name}"
    try:
        yield state
    finally:
        state.release.set()
        server.shutdown()
        thread.join()
        server.server_close()


def _answer(handler: BaseHTTPRequestHandler, state: FileServer, fault: str) -> None:
    """Answer one GET with one fault.

    A status (`503`), `drop N` (close after N bytes of the body), `stall N` (say no more after them), `corrupt` (one
    bit, equal size), `redirect ADDRESS`, `shift` (continue from the wrong byte), "" (none).
    """
    if fault.isdigit():
        handler.send_response(int(fault))
        _send_headers(handler, {"Content-Length": "0", **state.headers})
        return
    if fault.startswith("redirect "):
        handler.send_response(302)
        _send_headers(handler, {"Content-Length": "0", "Location": fault.removeprefix("redirect ")})
        return
    content = state.content
    if fault == "corrupt":
        middle = len(content) // 2
        content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    start = _range_start(handler, state)
    body = content[start:]
    handler.send_response(206 if start else 200)
    if start:
        begin = start - 1 if fault == "shift" else start
        handler.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
    etag = {"ETag": state.etag} if state.etag else {}
    _send_headers(handler, {"Content-Length": str(len(body)), **etag, **state.headers})
    kind, _, amount = fault.partition(" ")
    handler.wfile.write(body[: int(amount)] if kind in ("drop", "stall") else body)
    if kind == "stall":
        state.release.wait(60)


def _send_headers(handler: BaseHTTPRequestHandler, headers: dict[str, str]) -> None:
    for name, value in headers.items():
        handler.send_header(name, value)
    handler.end_headers()


def _range_start(handler: BaseHTTPRequestHandler, state: FileServer) -> int:
    wanted = handler.headers.get("Range")
    if wanted is None or state.ignores_range or handler.headers.get("If-Range", state.etag) != state.etag:
        return 0
    return int(wanted.removeprefix("bytes=").removesuffix("-"))


def strong_etag(content: bytes) -> str:
    """An ETag that says nothing about the digest of the content."""
    return f'"{hashlib.sha256(content).hexdigest()[:20]}"'
