"""From a trained model to a folder that serves: merge, quantise, FastDeploy and Hugging Face
layouts, verification.

The package can be called: `ernie_tune.export(folders, output_dir, ...)` is `run.export`. The public
name and the package's are one word, so either import order must give something that works.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    def __call__(self, *args: Any, **options: Any) -> dict[str, Any]:
        from ernie_tune.export.run import export

        return export(*args, **options)


sys.modules[__name__].__class__ = _Callable
