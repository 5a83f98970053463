"""Tokenizers and processors of other libraries, as objects: taken as a `Processor`.

They write what they are into a folder, as all of them can, and that folder is read; nothing of
theirs is changed. Refuses to know: other libraries' classes, models.
"""

from __future__ import annotations

import tempfile
from typing import Any

from ernie_tune.config.language import say
from ernie_tune.data.processor import Processor


def is_tokenizer(given: object) -> bool:
    """Whether it is a tokenizer or processor that is none of ours."""
    saves = callable(getattr(given, "save_pretrained", None))
    speaks = hasattr(given, "tokenizer") or hasattr(given, "convert_tokens_to_ids")
    return saves and speaks and not isinstance(given, Processor | type)


def take_processor(theirs: Any) -> Processor:
    """Ours with their vocabulary, template and, where they see, their limits for pictures. Raises
    ValueError for one that is not of an ERNIE-4.5 model, as `Processor.from_pretrained`.
    """
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        try:
            return Processor.from_pretrained(folder)
        except ValueError as error:
            told = str(error).replace(folder, type(theirs).__name__)
            raise ValueError(
                say(
                    f"their {type(theirs).__name__} must be that of an ERNIE-4.5 model: {told}",
                    f"其 {type(theirs).__name__} 须属于 ERNIE-4.5 模型：{told}",
                )
            ) from error
