"""Rows of tokens and images -> one packed, flat model input: 3-D positions, routing types, segment
bounds. numpy only, never paddle.

Legend: T tokens of the whole pack, L tokens of one row, P patches, C values per patch (588), n
images and videos.
Source of the rules: the modeling code beside the released weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ernie_tune.config.language import say
from ernie_tune.models.config import TokenIds

POSITION_RULES = (
    "paddle",
    "hf",
    # they differ only where a video has more frame pairs than rows and columns
)


@dataclass(frozen=True)
class Row:
    """One sequence before packing. `grid_thw` rows are in order of appearance, images and videos
    together; so are the patches.
    """

    input_ids_L: np.ndarray  # int64
    pixel_values_PC: np.ndarray | None = None  # float32, normalised, block-major patch order
    grid_thw_n3: np.ndarray | None = None  # int64 (frames, patch rows, patch columns)


@dataclass(frozen=True)
class PackedInput:
    """What the model's forward takes. Segment i owns tokens [offsets[i], offsets[i+1]); attention
    never leaves its segment and the one it continues.
    """

    input_ids_T: np.ndarray  # int64
    position_ids_T3: np.ndarray  # int64 (time, height, width), restarting in each segment
    vision_T: np.ndarray  # bool: routed to the vision experts (placeholders and start/end markers)
    placeholder_T: np.ndarray  # bool: embedding overwritten by visual features
    offsets: tuple[int, ...]  # segment bounds, first 0, last T
    pixel_values_PC: np.ndarray | None = None
    grid_thw_n3: np.ndarray | None = None
    parents: tuple[int, ...] | None = (
        None  # for each segment the number of the one that it continues, -1: none; None: none has
    )

    @property
    def num_tokens(self) -> int:
        return int(self.input_ids_T.shape[0])

    @property
    def segment_lengths(self) -> tuple[int, ...]:
        return tuple(b - a for a, b in zip(self.offsets, self.offsets[1:], strict=False))


def tails(offsets: tuple[int, ...], read: np.ndarray) -> tuple[tuple[int, ...], np.ndarray]:
    """What a last layer must compute for the tokens `read` of a pack: each segment from its first
    such token on. Returns how many tokens of each segment that is, and all of them in order, [R].
    """
    bounds = np.asarray(offsets)
    first = bounds[1:].copy()
    np.minimum.at(first, np.searchsorted(bounds, read, side="right") - 1, read)
    counts = bounds[1:] - first
    rows_R = np.repeat(first - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())
    return tuple(counts.tolist()), rows_R


def feature_count(grid_thw: Sequence[int]) -> int:
    """Resampler rows for one image or video: Hp*Wp/4 for an image, T*Hp*Wp/8 for a video of T
    frames.
    """
    t, h, w = (int(v) for v in grid_thw)
    return (1 if t == 1 else t // 2) * (h // 2) * (w // 2)


def check_grid(grid_thw_n3: np.ndarray) -> None:
    """Refuse grids the tower cannot merge. Raises ValueError."""
    for i, (t, h, w) in enumerate(np.asarray(grid_thw_n3).tolist()):
        if t < 1 or h < 2 or w < 2 or h % 2 or w % 2:
            raise ValueError(
                say(
                    f"grid_thw[{i}] ({t}, {h}, {w}) must have an even, positive number of patch rows and columns; "
                    "resize with smart_resize",
                    f"grid_thw[{i}]（{t}, {h}, {w}）的图块行数与列数须为正偶数；请用 smart_resize 调整大小",
                )
            )
        if t > 1 and t % 2:
            raise ValueError(
                say(
                    f"grid_thw[{i}] ({t}, {h}, {w}) must have 1 or an even number of frames; repeat the last frame",
                    f"grid_thw[{i}]（{t}, {h}, {w}）的帧数须为 1 或偶数；请重复最后一帧",
                )
            )


def position_ids(
    input_ids_L: np.ndarray, grid_thw_n3: np.ndarray | None, tokens: TokenIds, rule: str = "paddle"
) -> np.ndarray:
    """3-D positions [L, 3] (time, height, width) of one row without padding.

    `rule` "paddle" continues after the largest coordinate used so far, "hf" (transformers 5.23)
    after max(height, width) only.
    Raises ValueError when placeholders and grids do not match.
    """
    if rule not in POSITION_RULES:
        raise ValueError(
            say(
                f"position rule ({rule!r}) must be one of {POSITION_RULES}; use 'paddle'",
                f"位置规则（{rule!r}）须为 {POSITION_RULES} 之一；请用 'paddle'",
            )
        )
    ids = np.asarray(input_ids_L)
    grids = np.zeros((0, 3), np.int64) if grid_thw_n3 is None else np.asarray(grid_thw_n3, np.int64)
    check_grid(grids)
    is_visual = np.isin(ids, tokens.placeholders())
    expected = sum(feature_count(g) for g in grids)
    if int(is_visual.sum()) != expected:
        raise ValueError(
            say(
                f"number of placeholder tokens ({int(is_visual.sum())}) must equal the number of visual features "
                f"({expected}) of grid_thw "
                f"{grids.tolist()}; expand every <image>/<video> to Hp*Wp/4 (image) or T*Hp*Wp/8 (video) placeholders",
                f"占位 token 数（{int(is_visual.sum())}）须等于 grid_thw {grids.tolist()} 的视觉特征数（{expected}）；请把每个 "
                "<image>/<video> 展开为 Hp*Wp/4（图片）或 T*Hp*Wp/8（视频）个占位 token",
            )
        )
    out = np.empty((ids.shape[0], 3), np.int64)
    cur = start = 0
    for grid in grids:
        first = start + int(np.argmax(is_visual[start:]))
        out[start:first] = (cur + np.arange(first - start))[:, None]
        cur += first - start
        t, h, w = (1 if grid[0] == 1 else int(grid[0]) // 2), int(grid[1]) // 2, int(grid[2]) // 2
        start = first + t * h * w
        if not is_visual[first:start].all():
            raise ValueError(
                say(
                    f"placeholders of one image must be consecutive: the run at token {first} is shorter than its "
                    f"{t * h * w} features",
                    f"一张图片的占位 token 须连续：从第 {first} 个 token 起的一段短于它的 {t * h * w} 个特征",
                )
            )
        out[first:start] = cur + np.stack(
            np.meshgrid(np.arange(t), np.arange(h), np.arange(w), indexing="ij"), -1
        ).reshape(-1, 3)
        cur += max(t, h, w) if rule == "paddle" else max(h, w)
    out[start:] = (cur + np.arange(ids.shape[0] - start))[:, None]
    return out


def next_position(row: Row, tokens: TokenIds, rule: str = "paddle") -> int:
    """The position, on all three axes, that a text token behind the row has: not always one more
    than the largest, since under rule "hf" text goes on below the time coordinates of a long clip.
    """
    text = next(i for i in range(len(tokens.placeholders()) + 1) if i not in tokens.placeholders())
    return int(position_ids(np.append(row.input_ids_L, text), row.grid_thw_n3, tokens, rule)[-1, 0])


def pack(rows: Sequence[Row], tokens: TokenIds, rule: str = "paddle") -> PackedInput:
    """Concatenate rows into one flat input. No padding exists; each row is one segment. Raises
    ValueError for an empty row or a mismatch.
    """
    if not rows:
        raise ValueError(
            say("rows (0) must be at least 1; pass one or more rows to pack", "行数（0）至少为 1；请传入一行或多行")
        )
    for i, row in enumerate(rows):
        _check_row(i, row)
    return _joined(
        [_Segment(row, position_ids(row.input_ids_L, row.grid_thw_n3, tokens, rule)) for row in rows], tokens
    )


def pack_families(
    families: Sequence[tuple[Sequence[Row], int]], tokens: TokenIds, rule: str = "paddle"
) -> tuple[PackedInput, list[list[np.ndarray]]]:
    """Pack families of rows; those of one share their first `shared` tokens, images included, which
    are packed once: a segment that the rest of each row continues. `shared` 0: each row is a
    segment of its own. Also returns, for each row of each family, where its tokens lie in the pack.

    Segments of one length lie side by side, since these share products. Raises ValueError as
    `pack`, and for rows that do not share what they should.
    """
    segments: list[_Segment] = []
    for number, (rows, shared) in enumerate(families):
        for row in rows:
            _check_row(number, row)
        _check_family(number, rows, shared, tokens)
        if shared:
            first = rows[0]
            head = Row(first.input_ids_L[:shared], first.pixel_values_PC, first.grid_thw_n3)
            segments.append(_Segment(head, position_ids(first.input_ids_L, first.grid_thw_n3, tokens, rule)[:shared]))
        parent = len(segments) - 1 if shared else -1
        for row in rows:
            positions = position_ids(row.input_ids_L, row.grid_thw_n3, tokens, rule)[shared:]
            rest = Row(row.input_ids_L[shared:]) if shared else row
            segments.append(_Segment(rest, positions, parent))
    lengths = [len(s.row.input_ids_L) for s in segments]
    order = sorted(range(len(segments)), key=lambda i: (_prefix(segments, lengths, i), lengths[i]))
    inputs = _joined([segments[i] for i in order], tokens)
    place = {i: k for k, i in enumerate(order)}
    parents = tuple(place[segments[i].parent] if segments[i].parent >= 0 else -1 for i in order)
    if max(parents, default=-1) >= 0:
        inputs = dataclasses.replace(inputs, parents=parents)

    def where(i: int) -> np.ndarray:
        own = inputs.offsets[place[i]] + np.arange(lengths[i])
        return np.concatenate([where(segments[i].parent), own]) if segments[i].parent >= 0 else own

    found, cursor = [], 0
    for rows, shared in families:
        cursor += int(shared > 0)
        found.append([where(cursor + j) for j in range(len(rows))])
        cursor += len(rows)
    return inputs, found


@dataclass(frozen=True)
class _Segment:
    row: Row
    positions_L3: np.ndarray
    parent: int = -1


def _prefix(segments: Sequence[_Segment], lengths: Sequence[int], i: int) -> int:
    return lengths[segments[i].parent] if segments[i].parent >= 0 else 0


def _check_row(number: int, row: Row) -> None:
    if len(row.input_ids_L) == 0:
        raise ValueError(
            say(
                f"row {number} has 0 tokens, must have at least 1; drop empty rows before packing",
                f"第 {number} 行有 0 个 token，至少须有 1 个；请在打包前去掉空行",
            )
        )
    want = 0 if row.grid_thw_n3 is None else int(np.prod(np.asarray(row.grid_thw_n3, np.int64), axis=1).sum())
    have = 0 if row.pixel_values_PC is None else len(row.pixel_values_PC)
    if want != have:
        raise ValueError(
            say(
                f"row {number}: number of patches ({have}) must equal the sum of T*Hp*Wp over grid_thw ({want}); "
                "build both with the same processor",
                f"第 {number} 行：图块数（{have}）须等于 grid_thw 中 T*Hp*Wp 之和（{want}）；请用同一个处理器生成两者",
            )
        )


def _check_family(number: int, rows: Sequence[Row], shared: int, tokens: TokenIds) -> None:
    if not rows:
        raise ValueError(
            say(
                f"family {number} (0 rows) must have at least 1; drop it",
                f"第 {number} 组（0 行）至少须有 1 行；请去掉它",
            )
        )
    shortest = min(len(row.input_ids_L) for row in rows)
    if not 0 <= shared < shortest:
        raise ValueError(
            say(
                f"shared ({shared}) must be at least 0 and below the family's shortest row ({shortest}); lower it",
                f"shared（{shared}）须不小于 0 且小于该组最短的行（{shortest}）；请调小",
            )
        )
    head = rows[0].input_ids_L[:shared]
    if any(not np.array_equal(row.input_ids_L[:shared], head) for row in rows):
        raise ValueError(
            say(
                f"family {number}: rows must have the same first {shared} tokens; set shared to 0",
                f"第 {number} 组：各行的前 {shared} 个 token 须相同；请将 shared 设为 0",
            )
        )
    if shared and any(np.isin(row.input_ids_L[shared:], tokens.placeholders()).any() for row in rows):
        raise ValueError(
            say(
                f"family {number}: images must lie within the first {shared} tokens of its rows; set shared to 0",
                f"第 {number} 组：图片须位于各行的前 {shared} 个 token 之内；请将 shared 设为 0",
            )
        )


def _joined(segments: Sequence[_Segment], tokens: TokenIds) -> PackedInput:
    rows = [s.row for s in segments]
    ids = np.concatenate([np.asarray(r.input_ids_L, np.int64) for r in rows])
    grids = [np.asarray(r.grid_thw_n3, np.int64) for r in rows if r.grid_thw_n3 is not None and len(r.grid_thw_n3)]
    pixels = [np.asarray(r.pixel_values_PC) for r in rows if r.pixel_values_PC is not None and len(r.pixel_values_PC)]
    placeholder = np.isin(ids, tokens.placeholders())
    return PackedInput(
        input_ids_T=ids,
        position_ids_T3=np.concatenate([s.positions_L3 for s in segments]),
        vision_T=placeholder | np.isin(ids, tokens.markers()),
        placeholder_T=placeholder,
        offsets=tuple(np.cumsum([0, *(len(r.input_ids_L) for r in rows)]).tolist()),
        pixel_values_PC=np.concatenate(pixels) if pixels else None,
        grid_thw_n3=np.concatenate(grids) if grids else None,
    )
