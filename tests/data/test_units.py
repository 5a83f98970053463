"""data/units.py: which comparisons a row makes, what is shared, where targets lie, what is cut or
dropped, and streams of units.
"""

from __future__ import annotations

import dataclasses
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.judged_rows import base, encoder, label, mixture, pair, pairs, ranking, rating, records, units
from support.tiny_runs import IMAGES, processor

from ernie_tune.data.batching import BatchStream, Dropped
from ernie_tune.data.mixing import Mixture, Shard
from ernie_tune.data.units import UnitEncoder, collate_units, first_answer, following, mismatched


def test_comparisons_of_each_kind(tmp_path: Path) -> None:
    first, second, third, fourth = units(tmp_path, [pair(0), ranking(1), rating(2), label(3)])
    assert first.edges == ((0, 1),)
    assert set(second.edges) == {(1, 0), (1, 2), (1, 3), (2, 0), (2, 3)}, "ties compare with nothing"
    assert set(third.edges) == {(0, 1), (0, 2), (1, 2)}
    assert fourth.edges == ()
    assert [u.best for u in (first, second, third, fourth)] == [[0], [1], [0], []]
    assert third.score_C.tolist() == [1.0, 0.5, 0.0]
    (good,) = units(tmp_path, [label(4)])
    assert (good.best, good.label_C.tolist()) == ([0], [1.0])
    (weighed,) = units(tmp_path, [{**pair(0, margin=0.5, confidence=0.8), "domain": "d", "weight": 2.0}])
    assert (weighed.margin, weighed.confidence, weighed.domain, weighed.weight) == (0.5, 0.8, "d", 2.0)


@pytest.mark.parametrize("share", [True, False])
def test_targets_are_the_answers_and_are_predicted_by_what_precedes_them(tmp_path: Path, share: bool) -> None:
    made = units(tmp_path, mixture(8), share=share)
    batch = collate_units(made, processor())
    ids = batch.inputs.input_ids_T
    number = 0
    for unit in made:
        for dialogue in unit.dialogues:
            mine = batch.candidate_N == number
            at = np.flatnonzero(dialogue.trained_L)
            row = dialogue.row.input_ids_L
            assert np.array_equal(batch.target_N[mine], row[at])
            assert np.array_equal(ids[batch.source_N[mine]], row[at - 1])
            assert batch.length_C[number] == len(at)
            assert ids[batch.end_C[number]] == row[-1]
            answer = processor().decode(row[at].tolist())
            assert answer.strip(), "only the answer's own tokens are targets"
            assert "read" not in answer
            number += 1
    assert number == len(batch.length_C) == batch.unit_C[-1:].size * 0 + sum(u.num_candidates for u in made)
    whole = sum(d.num_tokens for u in made for d in u.dialogues)
    assert batch.inputs.num_tokens == sum(u.num_tokens for u in made)
    assert (batch.inputs.num_tokens < whole) == share
    assert sum(u.num_patches for u in made) == len(batch.inputs.pixel_values_PC)  # type: ignore[arg-type]


def test_earlier_answers_of_a_dialogue_are_no_targets(tmp_path: Path) -> None:
    row = pair(0, picture=False)
    turns = [{"role": "user", "content": "first"}, {"role": "assistant", "content": "earlier"}]
    (unit,) = units(tmp_path, [{**row, "messages": [*turns, *row["messages"]]}])
    text = processor().decode(unit.dialogues[0].row.input_ids_L[unit.dialogues[0].trained_L].tolist())
    assert "earlier" not in text
    assert "0" in text


def test_candidates_with_pictures_of_their_own_share_nothing(tmp_path: Path) -> None:
    row = pair(0)
    other = {**row, "signal": {**row["signal"], "rejected_images": [str(IMAGES / "0005.png")]}}
    (unit,) = units(tmp_path, [other])
    assert unit.shared == 0
    a, b = (d.row.pixel_values_PC for d in unit.dialogues)
    assert not np.array_equal(a, b)
    assert unit.num_patches == 32
    (same,) = units(tmp_path, [row])
    assert same.shared > 4
    assert same.num_patches == 16


def test_a_key_names_tokens_targets_and_pixels(tmp_path: Path) -> None:
    first, again, other = units(
        tmp_path, [pair(0), pair(0), pair(10)]
    )  # 0 and 10 ask for the same answer about other pictures
    assert first.keys == again.keys
    assert not set(first.keys) & set(other.keys)
    dialogue = first.dialogues[0]
    changed = dialogue.row.pixel_values_PC.copy()  # type: ignore[union-attr]
    changed[0, 0] += 1e-3
    row = dataclasses.replace(dialogue.row, pixel_values_PC=changed)
    moved = dataclasses.replace(first, dialogues=(dataclasses.replace(dialogue, row=row), *first.dialogues[1:]))
    assert moved.keys[0] != first.keys[0]
    assert moved.keys[1] == first.keys[1]


def test_what_is_dropped_and_why(tmp_path: Path) -> None:
    def reasons(row: dict[str, Any], **changes: Any) -> list[str]:
        dropped = Dropped()
        assert encoder(**changes)(records(tmp_path, [row])[0], dropped) is None
        return dropped.lines()

    assert (
        "longer than max_prompt_len (5 tokens) or dialogue than max_seq_len (200)" in reasons(pair(0), max_prompt=5)[0]
    )
    assert "max_seq_len (20)" in reasons(pair(0), max_tokens=20, max_prompt=19)[0]
    tie = {**base(0), "signal": {"type": "ranking", "responses": ["a", "b"], "order": "A=B"}}
    assert "no answer is better than another" in reasons(tie)[0]
    assert "nothing learns from a label" in reasons(label(0), signals=("pair",))[0]
    assert (
        "no answer that is judged"
        in reasons({**base(0), "signal": {"type": "verifiable", "answer": "7"}}, signals=("verifiable",))[0]
    )
    dropped = Dropped()
    silent = dataclasses.replace(records(tmp_path, [pair(0)])[0])
    mute = tuple(
        dataclasses.replace(c, messages=tuple({**m, "loss": False} for m in c.messages))  # type: ignore[misc]
        for c in silent.candidates
    )
    assert encoder()(dataclasses.replace(silent, candidates=mute), dropped) is None
    assert "an answer without a token to learn from" in dropped.lines()[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"truncation": "middle"}, "truncation_strategy ..middle.. must be one of"),
        ({"max_prompt": 200}, "max_prompt_len .200. must be below max_seq_len .200."),
    ],
)
def test_settings_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encoder(**changes)


def test_truncation_keeps_media_whole_and_prompts_alike(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"judged.jsonl:1: prompt \(\d+ tokens\) and dialogue"):
        units(tmp_path, [pair(1)], max_prompt=5, truncation="error")
    (whole,) = units(tmp_path, [pair(1)])
    prompt = int(np.argmax(whole.dialogues[0].trained_L))
    (left,) = units(tmp_path, [pair(1)], max_prompt=8, truncation="left")
    (right,) = units(tmp_path, [pair(1)], max_prompt=prompt - 2, truncation="right")
    tokens = processor().tokens
    for unit, pictured in ((left, False), (right, True)):
        for dialogue in unit.dialogues:
            ids = dialogue.row.input_ids_L
            assert int(np.argmax(dialogue.trained_L)) <= (prompt - 2 if pictured else 8)
            assert int(np.isin(ids, tokens.placeholders()).sum()) == (4 if pictured else 0)
            assert (dialogue.row.grid_thw_n3 is not None) == pictured
        collate_units([unit], processor())
    (short,) = units(tmp_path, [pair(1)], max_prompt=prompt, max_tokens=prompt + 2, truncation="right")
    assert [d.num_tokens for d in short.dialogues] == [prompt + 2] * 2
    assert [d.num_trained for d in short.dialogues] == [2] * 2


def test_mismatched_answers(tmp_path: Path) -> None:
    made = units(tmp_path, [label(0), label(2), label(5)])
    answers = [first_answer(unit) for unit in made]
    mixed = mismatched(made, following([answers], 0))
    assert len(mixed) == 3
    for i, unit in enumerate(mixed):
        (dialogue,), own, other = unit.dialogues, made[i].dialogues[0], made[(i + 1) % 3].dialogues[0]
        cut, start = int(np.argmax(own.trained_L)), int(np.argmax(other.trained_L))
        wanted = np.concatenate([own.row.input_ids_L[:cut], other.row.input_ids_L[start:]])
        assert np.array_equal(dialogue.row.input_ids_L, wanted)
        assert np.array_equal(dialogue.row.pixel_values_PC, own.row.pixel_values_PC)  # type: ignore[arg-type]
        assert dialogue.num_trained == other.num_trained
    assert following([answers[:1]], 0) == []
    assert mismatched([], []) == []


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_following_answer_is_that_of_one_process_on_every_rank(ranks: int) -> None:
    every = [(np.array([i]), np.array([True])) for i in range(7)]
    dealt = [every[rank::ranks] for rank in range(ranks)]
    for rank in range(ranks):
        found = [int(ids[0]) for ids, _ in following(dealt, rank)]
        assert found == [(i + 1) % 7 for i in range(7)][rank::ranks]
    assert following([[every[0]], []], 0) == following([[every[0]], []], 1) == []


@pytest.mark.parametrize("packing", [False, True])
def test_a_stream_of_units_resumes_with_the_very_next_window(tmp_path: Path, packing: bool) -> None:
    rows = records(tmp_path, mixture(12))

    def stream() -> BatchStream:
        made = UnitEncoder(processor(), 150, 100)
        return BatchStream(
            Shard(Mixture([rows], seed=3)), made, rows=2, accumulation=2, packing=packing, best_fit=packing
        )

    def seen(windows: Any) -> list[list[list[str]]]:
        return [[[k for u in b.units for k in u.keys] for b in window] for window in windows]

    whole = seen(islice(stream(), 7))
    first = stream()
    head = seen(islice(first, 3))
    later = stream()
    later.load_state_dict(first.state_dict())
    assert head + seen(islice(later, 4)) == whole
    for batch in next(iter(stream())):
        assert np.bincount(batch.unit_C).tolist() == [u.num_candidates for u in batch.units], "no unit is parted"


def test_pairs_of_text_alone(tmp_path: Path) -> None:
    batch = collate_units(units(tmp_path, pairs(3)[2:]), processor())
    assert batch.inputs.pixel_values_PC is None


def test_columns_have_known_names_and_the_batch_s_lengths(tmp_path: Path) -> None:
    batch = collate_units(units(tmp_path, [pair(0), pair(1)]), processor())
    count = len(batch.target_N)
    more = batch.with_columns(ref_logp_N=np.zeros(count), density_C=np.ones(4), mismatch_S=np.array([0.5, 2]))
    assert set(more.with_columns(advantage_N=np.ones(count)).columns) == {*more.columns, "advantage_N"}
    assert not batch.columns
    with pytest.raises(ValueError, match=r"column \(ref_logps_N\) must be one of ref_logp_N, "):
        batch.with_columns(ref_logps_N=np.zeros(count))
    for name, size in (("value_N", count + 1), ("density_C", count), ("mismatch_S", 1)):
        with pytest.raises(ValueError, match=rf"column {name} \[{size}\] must be \["):
            batch.with_columns(**{name: np.zeros(size)})
