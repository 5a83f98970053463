"""The request of /v1/embeddings: OpenAI's fields, and parts of messages among its inputs. Refuses
to know: the model, replies, bytes.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, StrictInt, Tag

from ernie_tune.config.language import say
from ernie_tune.serve import idle
from ernie_tune.serve.messages import MAX_LABEL_CHARACTERS, MAX_PARTS, Label, Part, Strict

MAX_INPUTS = 2048  # as OpenAI's
MAX_INPUT_TOKENS = 2**20  # of a list of ids; the model's own limit is lower


def _kind(value: Any) -> str | None:
    if isinstance(value, str):
        return "<text>"
    if not isinstance(value, list):
        return "<part>" if isinstance(value, dict) else None
    return "<parts>" if value and isinstance(value[0], str | dict) else "<ids>"


def _list_kind(value: Any) -> str | None:
    if isinstance(value, str):
        return "<text>"
    if not isinstance(value, list):
        return None
    return "<ids>" if value and not isinstance(value[0], str | list | dict) else "<inputs>"


_Ids = Annotated[list[StrictInt], Field(fail_fast=True, max_length=MAX_INPUT_TOKENS)]
_Parts = Annotated[list[Part], Field(fail_fast=True, min_length=1, max_length=MAX_PARTS)]
Input = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[_Ids, Tag("<ids>")]
    | Annotated[Part, Tag("<part>")]
    | Annotated[_Parts, Tag("<parts>")],
    Discriminator(
        _kind, "kind", say("must be a text, token ids, or parts of a message", "须为文本、token id 或消息的部分")
    ),
]


class EmbeddingRequest(Strict):
    """POST /v1/embeddings. `input`: OpenAI's text, texts, token ids or lists of them; an entry of
    its list may also be a part of a message, or a list of parts, that are embedded as one.
    """

    idle = idle.EMBEDDING

    input: Annotated[
        Annotated[str, Tag("<text>")]
        | Annotated[_Ids, Tag("<ids>")]
        | Annotated[list[Input], Field(fail_fast=True, min_length=1, max_length=MAX_INPUTS), Tag("<inputs>")],
        Discriminator(
            _list_kind, "kind", say("must be a text, token ids, or a list of inputs", "须为文本、token id 或输入的列表")
        ),
    ]
    model: str | None = Field(None, max_length=MAX_LABEL_CHARACTERS)
    dimensions: int | None = Field(None, ge=1)
    encoding_format: Literal["float", "base64"] = "float"
    user: Label | None = None
    request_id: Label | None = None

    @property
    def inputs(self) -> list[Any]:
        """One entry an embedding: a text, ids, or parts."""
        given: Any = self.input
        alone = isinstance(given, str) or not given or isinstance(given[0], int)
        entries = [given] if alone else given
        return [one if isinstance(one, str | list) else [one] for one in entries]
