"""Files that are there whole or not at all.

Refuses to know: what stands in them, folders (checkpoint/ and peft/ stage those).
"""

from __future__ import annotations

import os
from pathlib import Path


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write under a temporary name, then rename: a reader never sees half a file. Text in UTF-8.
    Raises OSError; the file that was there then stays as it was.
    """
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(unfinished, path)
