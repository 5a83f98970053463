"""An export that is changed between writing and checking."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ernie_tune.export import verify


def spoil(monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], object]) -> None:
    """`change` happens to the folder that is being made before it is opened again."""
    original = verify.reopen

    def reopen(folder: Path, *args: Any, **options: Any) -> verify.Opened:
        change(folder)
        return original(folder, *args, **options)

    monkeypatch.setattr(verify, "reopen", reopen)
