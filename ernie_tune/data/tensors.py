"""Rows <-> rectangles of token ids with masks, the inputs that users of transformers hand from a
processor to `model.generate`.

Nothing here needs the rectangle: rows are packed, never padded. It is the shape in which other
libraries pass prompts on, so it is made and taken apart at the border. Refuses to know: models,
chat templates, how a picture is cut.

Legend: B rows, L tokens of the longest, P patches of all rows, C values per patch, n media.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ernie_tune.config.language import say
from ernie_tune.models.config import TokenIds
from ernie_tune.models.inputs import Row, feature_count

if TYPE_CHECKING:
    from ernie_tune.data.processor import Processor

IDS, MASK, PIXELS, GRIDS = "input_ids", "attention_mask", "pixel_values", "image_grid_thw"


class Inputs(dict[str, Any]):
    """What transformers calls a BatchFeature: a dict whose values are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def inputs_of(rows: Sequence[Row], pad: int, kind: str | None = None) -> Inputs:
    """`input_ids` and `attention_mask` [B, L], filled up on the left with `pad`; with media
    `pixel_values` [P, C] and `image_grid_thw` [n, 3], pictures and clips of all rows in the order
    of their places. `kind`: "np" (the default) or "pd" for paddle's tensors. Raises ValueError for
    another one."""
    longest = max(len(row.input_ids_L) for row in rows)
    ids_BL, mask_BL = np.full((len(rows), longest), pad, np.int64), np.zeros((len(rows), longest), np.int64)
    for b, row in enumerate(rows):
        start = longest - len(row.input_ids_L)
        ids_BL[b, start:], mask_BL[b, start:] = row.input_ids_L, 1
    out = Inputs({IDS: ids_BL, MASK: mask_BL})
    pixels = [row.pixel_values_PC for row in rows if row.pixel_values_PC is not None]
    grids = [row.grid_thw_n3 for row in rows if row.grid_thw_n3 is not None]
    if pixels:
        out[PIXELS], out[GRIDS] = np.concatenate(pixels), np.concatenate(grids)
    if kind in (None, "np"):
        return out
    if kind != "pd":
        raise ValueError(
            say(
                f"return_tensors ({kind!r}) must be 'np' or 'pd'; models here are paddle's",
                f"return_tensors（{kind!r}）须为 'np' 或 'pd'；此处的模型是飞桨模型",
            )
        )
    import paddle

    return Inputs({name: paddle.to_tensor(value) for name, value in out.items()})


def rows_of(
    input_ids: Any,
    attention_mask: Any = None,
    pixel_values: Any = None,
    image_grid_thw: Any = None,
    *,
    tokens: TokenIds,
) -> list[Row]:
    """The rows of such inputs, each with the media whose placeholders it holds. Raises ValueError
    where tokens, mask, patches and grids do not fit."""
    ids_BL = np.atleast_2d(np.asarray(input_ids, np.int64))
    mask_BL = np.ones_like(ids_BL) if attention_mask is None else np.atleast_2d(np.asarray(attention_mask, np.int64))
    if ids_BL.ndim != 2 or mask_BL.shape != ids_BL.shape or not mask_BL.any(1).all():
        raise ValueError(
            say(
                f"attention_mask ({list(mask_BL.shape)}) must have the shape of input_ids ({list(ids_BL.shape)}) and a 1 in each row; pass both as they came",
                f"attention_mask（{list(mask_BL.shape)}）的形状须与 input_ids（{list(ids_BL.shape)}）相同，且每行至少有一个 1；请原样传入",
            )
        )
    grids = np.zeros((0, 3), np.int64) if image_grid_thw is None else np.asarray(image_grid_thw, np.int64)
    pixels = np.zeros((0, 1), np.float32) if pixel_values is None else np.asarray(pixel_values, np.float32)
    rows, grid, patch = [], 0, 0
    for ids_L, mask_L in zip(ids_BL, mask_BL, strict=True):
        kept_L = ids_L[mask_L != 0]
        waiting = int(np.isin(kept_L, tokens.placeholders()).sum())
        first = grid
        while waiting > 0 and grid < len(grids):
            waiting -= feature_count(grids[grid])
            grid += 1
        count = int(np.prod(grids[first:grid], axis=1).sum())
        if waiting or patch + count > len(pixels):
            break
        own = pixels[patch : patch + count]
        rows.append(Row(kept_L, own, grids[first:grid]) if count else Row(kept_L))
        patch += count
    if len(rows) != len(ids_BL) or grid != len(grids) or patch != len(pixels):
        raise ValueError(
            say(
                f"pixel_values ({len(pixels)} patches) and image_grid_thw ({len(grids)} media) must fit the placeholders in "
                "input_ids; pass all that the processor made",
                f"pixel_values（{len(pixels)} 个图块）与 image_grid_thw（{len(grids)} 个媒体）须与 input_ids 中的占位符相符；请传入 processor 的全部输出",
            )
        )
    return rows


def template_inputs(
    processor: Processor,
    conversation: Sequence[Any],
    images: Sequence[Any] | None,
    videos: Sequence[Any] | None,
    *,
    tokenize: bool,
    return_dict: bool,
    return_tensors: str | None,
    **options: Any,
) -> Any:
    """`Processor.apply_chat_template`."""
    several = bool(conversation) and not isinstance(conversation[0], Mapping)
    dialogues = list(conversation) if several else [conversation]
    if not tokenize:
        texts = [processor.template.render(one, **options) for one in dialogues]
        return texts if several else texts[0]
    given = [[None] * len(dialogues) if media is None else list(media) for media in (images, videos)]
    if not several:
        given = [[media] for media in (images, videos)]
    rows = [
        processor.encode(one, pictures, clips, **options).row
        for one, pictures, clips in zip(dialogues, *given, strict=True)
    ]
    if return_dict or return_tensors:
        made = inputs_of(rows, processor.tokens.pad or 0, return_tensors)
        return made if return_dict else made[IDS]
    ids = [row.input_ids_L.tolist() for row in rows]
    return ids if several else ids[0]


def text_inputs(
    processor: Processor, text: str | Sequence[str], images: Any, videos: Any, return_tensors: str | None
) -> Inputs:
    """`Processor.__call__`."""
    left = {"image": _flat(images), "video": _flat(videos)}
    rows = [_row(processor, one, left) for one in ([text] if isinstance(text, str) else text)]
    over = {kind: len(media) for kind, media in left.items() if media}
    if over:
        kind, count = next(iter(over.items()))
        raise ValueError(
            say(
                f"{kind}s ({count} too many) must have a placeholder each in text; make it with apply_chat_template",
                f"text 中须为每个 {kind} 留有占位符（多出 {count} 个）；请用 apply_chat_template 生成",
            )
        )
    return inputs_of(rows, processor.tokens.pad or 0, return_tensors)


def _flat(media: Any) -> list[Any]:
    if media is None:
        return []
    return [one for part in media for one in _flat(part)] if isinstance(media, list | tuple) else [media]


def _row(processor: Processor, text: str, left: dict[str, list[Any]]) -> Row:
    """A rendered text with one placeholder a medium -> its row; media are taken from `left`."""
    tokens, ids = processor.tokens, []
    patches, grids, before = [], [], None
    for i in processor.tokenizer.encode(text, allow_special=True):
        if i in tokens.placeholders():
            kind = "video" if before == tokens.video_start else "image"
            if not left[kind]:
                raise ValueError(
                    say(
                        f"{kind}s (none left) must be one for each placeholder in text; pass them",
                        f"text 中每个占位符须对应一个 {kind}；请传入",
                    )
                )
            pixels_PC, grid = processor.patches(kind, left[kind].pop(0))
            patches.append(pixels_PC)
            grids.append(grid)
            ids += [i] * feature_count(grid)
        else:
            ids.append(i)
        before = i
    found = np.asarray(ids, np.int64)
    return Row(found, np.concatenate(patches), np.asarray(grids, np.int64)) if grids else Row(found)
