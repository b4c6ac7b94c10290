"""A real headless Chromium for pages of ours: fresh profile, and every request, console message and error recorded."""

import contextlib
import shutil
import tempfile
from collections.abc import Generator
from dataclasses import dataclass, field

from playwright.sync_api import Page, sync_playwright


FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
SIZES = {"wide": {"width": 1280, "height": 900}, "phone": {"width": 390, "height": 844}}


@dataclass
class Visit:
    """A page, and what it did behind the reader's back."""

    page: Page
    messages: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


def find_chromium() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    raise FileNotFoundError("no chromium on PATH: apt-get install chromium")


@contextlib.contextmanager
def visit(url: str, *, size: str = "wide", scheme: str = "light") -> Generator[Visit]:
    """Open `url`; `requests` are those other than for the page itself and for data in it."""
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as profile:
        context = playwright.chromium.launch_persistent_context(
            profile,
            executable_path=find_chromium(),
            args=list(FLAGS),
            viewport=SIZES[size],
            color_scheme=scheme,
            has_touch=size == "phone",
        )
        try:
            page = context.new_page()
            seen = Visit(page)
            page.on("console", lambda message: seen.messages.append(message.text))
            page.on("pageerror", lambda error: seen.messages.append(str(error)))
            page.on("request", lambda request: seen.requests.append(request.url))
            page.goto(url)
            yield seen
        finally:
            context.close()
