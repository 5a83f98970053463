"""The page at `/`: talk to the model in a browser, with pictures. One file, nothing from elsewhere,
no key inside.

The browser is told to run the page's own script and style alone, so that no text could become
either, and that no other page may show it in a frame. Refuses to know: the model, requests.
"""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from pathlib import Path

_FILE = Path(__file__).with_name("page.html")


@cache
def page() -> bytes:
    """The page, in UTF-8."""
    return _FILE.read_bytes()


@cache
def page_headers() -> dict[str, str]:
    """What a browser must know about it."""
    text = page().decode("utf-8")
    script, style = (_hash(text, name) for name in ("script", "style"))
    policy = (
        f"default-src 'none'; script-src '{script}'; style-src '{style}'; img-src data: blob:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }


def _hash(text: str, element: str) -> str:
    """The Content-Security-Policy source of the one such element: the digest of what stands in
    it.
    """
    (inside,) = re.findall(f"<{element}>(.*?)</{element}>", text, re.DOTALL)
    digest = hashlib.sha256(inside.encode("utf-8")).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"
