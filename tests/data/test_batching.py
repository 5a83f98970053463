"""Rows become micro-batches: targets, truncation that never parts a medium, packing, and a stream
that resumes where it stopped.

Legend: L tokens of a row, N targets.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from ernie_tune.data.batching import (
    BatchStream,
    Dropped,
    Encoder,
    MicroBatch,
    Sample,
    collate,
    dealt_again,
    steps_per_epoch,
    truncate,
)
from ernie_tune.data.mixing import Mixture, Shard
from ernie_tune.data.processor import Encoded, Processor
from ernie_tune.data.records import Record
from ernie_tune.models.config import TokenIds
from ernie_tune.models.inputs import Row, position_ids

TOKENS = TokenIds(image=602, image_start=600, image_end=601, video=605, video_start=603, video_end=604)
PROCESSOR = Processor.bundled("tiny")


# --- collating ------------------------------------------------------------------------------------


def sample(ids: list[int], trained: list[int], weights: list[float], domain: str = "") -> Sample:
    return Sample(Row(np.array(ids)), np.array(trained, bool), np.array(weights, np.float32), domain)


def test_targets_are_predicted_by_the_token_before_them() -> None:
    # the first token of a row has nothing before it
    a = sample([10, 11, 12, 13], [1, 0, 1, 1], [9, 9, 0.5, 2], "a")
    b = sample([20, 21, 22], [0, 1, 0], [9, 1, 9], "b")
    batch = collate([a, b], TOKENS)
    assert batch.inputs.input_ids_T.tolist() == [10, 11, 12, 13, 20, 21, 22]
    assert batch.inputs.offsets == (0, 4, 7)
    assert batch.source_N.tolist() == [1, 2, 4]
    assert batch.target_N.tolist() == [12, 13, 21]
    assert batch.weight_N.tolist() == [0.5, 2, 1]
    assert batch.weight_N.dtype == np.float32
    assert batch.row_N.tolist() == [0, 0, 1]
    assert batch.row_tokens_R.tolist() == [4, 3]
    assert (batch.num_rows, batch.domains) == (2, ("a", "b"))


# --- truncation -----------------------------------------------------------------------------------


@st.composite
def rows(draw: st.DrawFn) -> tuple[Encoded, list[tuple[int, int, int, int]]]:
    """A row of text, images and videos, with or without markers; and (first, end, first patch,
    patches) of each medium with its markers.
    """
    ids: list[int] = draw(st.lists(st.integers(10, 500), max_size=4))
    grids, media = [], []
    patch = 0
    for video in draw(st.lists(st.booleans(), max_size=4)):
        height, width = 2 * draw(st.integers(1, 2)), 2 * draw(st.integers(1, 2))
        frames = 2 if video else 1
        marks = draw(st.booleans())
        start, fill, end = (603, 605, 604) if video else (600, 602, 601)
        first = len(ids)
        ids += [start] * marks + [fill] * (height * width // 4) + [end] * marks
        media.append((first, len(ids), patch, frames * height * width))
        patch += frames * height * width
        grids.append((frames, height, width))
        # something between two media: two runs of placeholders without markers would be one
        ids += draw(st.lists(st.integers(10, 500), min_size=1, max_size=3))
    ids += draw(st.lists(st.integers(10, 500), min_size=1, max_size=6))
    pixels = np.arange(patch, dtype=np.float32)[:, None] if grids else None
    trained = draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
    row = Row(np.array(ids, np.int64), pixels, np.array(grids, np.int64) if grids else None)
    return Encoded(row, np.array(trained)), media


@given(rows(), st.integers(1, 40), st.sampled_from(["left", "right"]))
@examples(max_examples=300, deadline=None)
def test_truncation_keeps_a_medium_whole_or_drops_it_whole(
    made: tuple[Encoded, list[tuple[int, int, int, int]]], limit: int, side: str
) -> None:
    encoded, media = made
    length = encoded.num_tokens
    cut = truncate(encoded, limit, side, TOKENS.placeholders(), TOKENS.markers())
    if length <= limit:
        assert cut is encoded
        return
    window = range(length - limit, length) if side == "left" else range(limit)
    whole = [m for m in media if m[0] in window and m[1] - 1 in window]
    gone = {i for m in media if m not in whole for i in range(m[0], m[1])}
    # text in the window, and media that lie in it as a whole
    stays = [i for i in window if i not in gone]
    assert cut.row.input_ids_L.tolist() == encoded.row.input_ids_L[stays].tolist()
    assert cut.trained_L.tolist() == encoded.trained_L[stays].tolist()
    patches = [i for m in whole for i in range(m[2], m[2] + m[3])]
    if whole:
        assert cut.row.pixel_values_PC is not None
        assert cut.row.pixel_values_PC[:, 0].tolist() == patches
    else:
        assert cut.row.pixel_values_PC is None
        assert cut.row.grid_thw_n3 is None
    if len(stays):
        # raises where placeholders and grids differ
        position_ids(cut.row.input_ids_L, cut.row.grid_thw_n3, TOKENS)


def test_the_first_token_may_be_a_placeholder_and_the_last_a_marker() -> None:
    # Nothing stands before token 0; in particular not the last token of the row.
    encoded = Encoded(
        Row(np.array([602, 10, 11, 601]), np.zeros((4, 1), np.float32), np.array([[1, 2, 2]])), np.ones(4, bool)
    )
    cut = truncate(encoded, 3, "left", TOKENS.placeholders(), TOKENS.markers())
    assert cut.row.input_ids_L.tolist() == [10, 11, 601]
    assert cut.row.pixel_values_PC is None


# --- encoding -------------------------------------------------------------------------------------


def record(question: str, answer: str, **more: Any) -> Record:
    return Record("sft", ({"role": "user", "content": question}, {"role": "assistant", "content": answer}), **more)


LONG = record("one two three four five six seven eight nine ten", "ten nine eight seven six five four")


def test_rows_that_are_too_long_are_deleted_cut_or_refused() -> None:
    dropped = Dropped()
    whole = Encoder(PROCESSOR, 1000)(LONG, dropped)
    assert whole is not None
    ids = whole.row.input_ids_L.tolist()
    assert dropped.lines() == []
    limit = len(ids) - 5
    assert Encoder(PROCESSOR, limit)(LONG, dropped) is None
    assert Encoder(PROCESSOR, limit)(LONG, dropped) is None
    assert dropped.lines() == [
        f"dropped 2 row(s): longer than max_seq_len ({limit} tokens), first at a row that is in no file"
    ]
    left = Encoder(PROCESSOR, limit, "left")(LONG, Dropped())
    right = Encoder(PROCESSOR, limit, "right")(LONG, Dropped())
    assert left is not None
    assert right is not None
    assert left.row.input_ids_L.tolist() == ids[-limit:]
    assert right.row.input_ids_L.tolist() == ids[:limit]
    with pytest.raises(ValueError, match=rf"row \({len(ids)} tokens\) must have at most max_seq_len \({limit}\)"):
        Encoder(PROCESSOR, limit, "error")(LONG, Dropped())
    with pytest.raises(ValueError, match=r"truncation_strategy \('middle'\) must be one of"):
        Encoder(PROCESSOR, 10, "middle")


def test_rows_without_a_target_are_dropped_and_counted() -> None:
    dropped, encoder = Dropped(), Encoder(PROCESSOR, 8, "right")
    assert encoder(LONG, dropped) is None  # the answer was cut off
    assert Encoder(PROCESSOR, 100)(record("a", "b", weight=0.0), dropped) is None
    silent = Record("sft", (LONG.messages[0], {**LONG.messages[1], "loss": False}))
    assert Encoder(PROCESSOR, 1000)(silent, dropped) is None
    assert dropped.count == {"no token to learn from": 3}


def test_thoughts_and_answers_have_their_weights() -> None:
    turns = (
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "an answer before"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "seven", "reasoning_content": "so it is"},
    )
    encoder = Encoder(PROCESSOR, 1000, thought_weight=0.25, answer_weight=3.0)
    made = encoder(Record("sft", turns, weight=2.0), Dropped())  # type: ignore[arg-type]
    assert made is not None
    weights = made.weight_L[made.trained_L]
    text = [PROCESSOR.tokenizer.decode([i]) for i in made.row.input_ids_L[made.trained_L]]
    # the opening mark is part of the prompt, the line break after it is not
    thought = text.index("\n")
    end = text.index("</think>")
    assert weights[:thought].tolist() == [6.0] * thought, "the answer of an earlier turn is no thought"
    assert weights[thought : end + 1].tolist() == [0.5] * (end + 1 - thought)
    assert weights[end + 1 :].tolist() == [6.0] * (len(text) - end - 1)
    assert end + 1 < len(text)
    plain = Encoder(PROCESSOR, 1000)(record("a", "b", weight=0.5, domain="x"), Dropped())
    assert plain is not None
    assert set(plain.weight_L.tolist()) == {0.5}
    assert plain.domain == "x"


def test_the_mode_of_a_row_decides_whether_it_thinks() -> None:
    encoder, think = Encoder(PROCESSOR, 1000), PROCESSOR.tokenizer.special["</think>"]
    for mode, trained in (("think", True), ("nothink", False), ("auto", False)):
        made = encoder(record("a", "b", mode=mode), Dropped())
        assert made is not None
        at = made.row.input_ids_L.tolist().index(think)
        # without a thought the empty one is part of the prompt
        assert made.trained_L[at] == trained, mode


# --- streams --------------------------------------------------------------------------------------


class Lengths:
    """An encoder of integers: a row of that many tokens, all of them its number; rows above
    `max_tokens` are dropped.
    """

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens

    def collate(self, samples: Sequence[Sample]) -> MicroBatch:
        return collate(samples, PROCESSOR.tokens)

    def __call__(self, record: int, dropped: Dropped) -> Sample | None:
        if record > self.max_tokens:
            dropped.add("too long", str(record))
            return None
        return Sample(Row(np.full(record, record)), np.ones(record, bool), np.ones(record, np.float32))


def stream(
    lengths: list[int], limit: int = 100, *, shuffle: bool = False, rank: int = 0, size: int = 1, **options: Any
) -> BatchStream:
    shard = Shard(Mixture([lengths], shuffle=shuffle), rank, size)
    return BatchStream(shard, Lengths(limit), **{"rows": 1, "accumulation": 1, **options})  # type: ignore[arg-type]


def take(made: BatchStream, windows: int) -> list[list[list[int]]]:
    """The row lengths in each micro-batch of the next windows."""
    return [[list(b.inputs.segment_lengths) for b in w] for w in islice(made, windows)]


def test_windows_hold_rows_in_order_and_the_data_never_end() -> None:
    made = stream([2, 3, 4, 5, 6], rows=2, accumulation=2)
    assert take(made, 1) == [[[2, 3], [4, 5]]]
    assert made.epoch == 0.8
    assert take(made, 1) == [[[6, 2], [3, 4]]]
    assert made.epoch == 1.6


def test_packs_in_order_close_when_the_next_row_does_not_fit() -> None:
    made = stream([4, 5, 3, 9, 2, 7], limit=10, packing=True, accumulation=3)
    assert take(made, 1) == [[[4, 5], [3], [9]]]
    assert made.taken == 4  # the next row has been read, and waits
    assert take(made, 1) == [[[2, 7], [4, 5], [3]]]
    assert take(stream([4, 5, 3, 9], limit=10, packing=True, rows=2), 2) == [[[4, 5, 3]], [[9, 4, 5]]]


def test_best_fit_fills_the_room_from_the_rows_ahead() -> None:
    made = stream([4, 5, 3, 9, 6, 1, 1], limit=10, packing=True, best_fit=True, accumulation=3)
    # 4 leaves 6: the 6 fits best; 5 leaves 5: the 5 of the next pass; 3 leaves 7: the next 6, then
    # a 1
    assert take(made, 1) == [[[4, 6], [5, 5], [3, 6, 1]]]
    for _ in range(30):
        oldest = made._waiting[0][1].num_tokens
        assert take(made, 1)[0][0][0] == oldest, "no row is starved"


@pytest.mark.parametrize("options", [{"packing": True}, {"packing": True, "best_fit": True}, {"rows": 3}])
def test_every_row_comes_once_a_pass(options: dict[str, Any]) -> None:
    lengths = list(range(1, 41))
    made = stream(lengths, limit=50, shuffle=True, **options)
    seen: Counter[int] = Counter()
    while made.shard.position < 10 * len(lengths):
        seen.update(n for pack in take(made, 1)[0] for n in pack)
    waiting = Counter(s.num_tokens for _, s in made._waiting)
    total = seen + waiting
    assert sum(total.values()) == made.shard.position
    assert set(total.values()) <= {10, 11}
    assert made.taken == sum(seen.values())


@pytest.mark.parametrize("options", [{"rows": 2}, {"packing": True}, {"packing": True, "best_fit": True, "rows": 2}])
@pytest.mark.parametrize(("rank", "size"), [(0, 1), (1, 2)])
def test_a_resumed_stream_gives_the_next_window(options: dict[str, Any], rank: int, size: int) -> None:
    def make() -> BatchStream:
        return stream(
            list(range(1, 31)), limit=25, shuffle=True, rank=rank, size=size, **{"accumulation": 2, **options}
        )

    whole = make()
    windows = take(whole, 12)
    for cut in (0, 1, 5, 9):
        first = make()
        take(first, cut)
        state = json.loads(json.dumps(first.state_dict()))
        second = make()
        second.load_state_dict(state)
        assert second.epoch == first.epoch
        assert take(second, 12 - cut) == windows[cut:]
    assert second.dropped.count == whole.dropped.count
    assert second.dropped.lines()[0].startswith("dropped ")


@pytest.mark.parametrize("options", [{"rows": 2}, {"packing": True}, {"packing": True, "best_fit": True, "rows": 2}])
@pytest.mark.parametrize(("before", "after"), [(3, 2), (2, 5), (4, 1)])
def test_no_row_is_lost_or_used_twice_when_the_number_of_ranks_changes(
    options: dict[str, Any], before: int, after: int
) -> None:
    """Over a pass that three numbers of ranks share; rows above the limit are dropped, on whichever
    rank.
    """
    lengths, limit = list(range(1, 601)), 540
    seen: Counter[int] = Counter()
    states: list[dict[str, Any]] = []
    for size, windows in ((before, 9), (after, 6), (before, 10**6)):
        made = [stream(lengths, limit, shuffle=True, rank=r, size=size, **options) for r in range(size)]
        if states:
            for rank, part in enumerate(made):
                part.load_state_dict(json.loads(json.dumps(dealt_again(states, rank, size))))
        for _ in range(windows):
            if max(part.shard.position for part in made) >= len(lengths) - 60 * size:
                break
            seen.update(n for part in made for pack in take(part, 1)[0] for n in pack)
        states = [part.state_dict() for part in made]
    rest = dealt_again(states, 0, 1)
    order = Mixture([lengths], shuffle=True)
    unused = Counter(order[i] for i in (*rest["waiting"], *rest["unread"], *range(rest["shard"]["position"], 600)))
    lost = Counter(n for n in range(limit + 1, 601) if not unused[n])
    assert seen + unused + lost == Counter(lengths)
    assert sum(rest["dropped"].values()) == sum(lost.values())
    assert sum(seen.values()) > 60


def test_ranks_share_the_rows() -> None:
    parts = [[n for w in take(stream([1, 2, 3, 4, 5, 6], rank=r, size=2), 3) for b in w for n in b] for r in (0, 1)]
    assert parts == [[1, 3, 5], [2, 4, 6]]


def test_a_state_is_a_picture_not_a_view() -> None:
    made = stream([99, 1, 98, 1], limit=10)
    take(made, 1)
    state = made.state_dict()
    take(made, 1)
    assert state["dropped"] == {"too long": 1}
    assert made.dropped.lines() == ["dropped 2 row(s): too long, first at 99"]


def test_a_stream_refuses_data_without_usable_rows_and_states_of_others() -> None:
    with pytest.raises(ValueError, match=r"no row of the training data can be used: dropped 2 row\(s\): too long"):
        take(stream([99, 98], limit=10), 1)
    made = stream([4, 5, 3], limit=10, packing=True)
    take(made, 1)
    state = made.state_dict()
    assert state["waiting"] == [2]
    with pytest.raises(ValueError, match="row at position 2 must be usable as in the saved run; restore max_seq_len"):
        stream([4, 5, 3], limit=2, packing=True).load_state_dict(state)
    with pytest.raises(ValueError, match=r"lengths .* must be that of the saved run"):
        stream([4, 5, 3, 1], limit=10, packing=True).load_state_dict(state)


def test_steps_of_a_pass() -> None:
    assert steps_per_epoch(lambda: stream([1] * 300, rows=3)) == 100.0
    assert steps_per_epoch(lambda: stream([1] * 10, rows=2, accumulation=2)) == 2.5
    assert steps_per_epoch(lambda: stream([1] * 10, size=2)) == 5.0
    # every second row is dropped, so a pass has half the steps
    assert steps_per_epoch(lambda: stream([1, 99] * 20, limit=10)) == pytest.approx(20, rel=0.03)
    # five rows of four tokens fill a pack of twenty
    assert steps_per_epoch(lambda: stream([4] * 1000, limit=20, packing=True)) == pytest.approx(200, rel=0.02)
