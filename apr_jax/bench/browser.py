"""A headless Chromium, to test this package's pages and to take pictures of them.

It needs Debian's chromium (or any Chromium or Chrome) and the extra `[browser]`, a Python driver that brings no browser
of its own. Making and reading a report needs neither.
"""

import contextlib
import io
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
# No sandbox: it needs rights that containers seldom give, and only our own pages are opened. The rest keeps it offline.
_FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
_COLOURS = 256
# Each picture: its file, light or dark, the part of the page, keys that are pressed first.
_PICTURES = (
    ("figures.png", "light", "#figures", ""),
    ("context_window.png", "light", "#context-window", ""),
    ("sequential_tokens.png", "light", "#sequential-tokens", ""),
    ("threads.png", "light", "#threads", ""),
    ("side_by_side.png", "dark", "#threads", "c"),
)


class NoBrowserError(RuntimeError):
    """A missing browser or driver. The message says what to install."""


def find_chromium() -> str:
    """Return the browser's path: $CHROMIUM, or one on the search path. Raise NoBrowserError if there is none."""
    found = (
        [os.environ["CHROMIUM"]] if os.environ.get("CHROMIUM") else [path for n in _NAMES if (path := shutil.which(n))]
    )
    if not found:
        raise NoBrowserError("no Chromium here: apt-get install -y chromium (or set CHROMIUM to a browser's path)")
    return found[0]


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """Start a browser (playwright's `Browser`) and close it at the end. Raise NoBrowserError if there is none."""
    path = find_chromium()
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        raise NoBrowserError("playwright is not installed: pip install 'apr_jax[browser]'") from error
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=_FLAGS)
        try:
            yield browser
        finally:
            browser.close()


def take_pictures(browser: Any, report: pathlib.Path, folder: pathlib.Path) -> list[pathlib.Path]:
    """Take pictures of a comparison's page: figures, a rollout's threads, and two methods side by side in the dark.

    Args:
      browser: of `chromium`.
      page: the page's file.
      folder: where the pictures go; it is made if need be.

    Returns: the pictures' files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for name, scheme, selector, keys in _PICTURES:
        context = browser.new_context(color_scheme=scheme, viewport={"width": 1360, "height": 900}, offline=True)
        page = context.new_page()
        page.goto(report.absolute().as_uri())
        place = page.locator(selector)
        if place.count():
            for key in keys:
                page.keyboard.press(key)
            made.append(folder / name)
            made[-1].write_bytes(_small(place.screenshot(animations="disabled")))
        context.close()
    return made


def _small(png: bytes) -> bytes:
    """Return the same picture in fewer colours, which takes a third of the bytes."""
    from PIL import Image

    with Image.open(io.BytesIO(png)) as picture:
        out = io.BytesIO()
        picture.convert("RGB").quantize(_COLOURS, Image.Quantize.MAXCOVERAGE).save(out, "PNG", optimize=True)
    return out.getvalue()
