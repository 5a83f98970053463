"""data/media/corruption.py: spoilt patches, which rows get a pair of a true and a spoilt picture,
and what its unit is made of.
"""

from __future__ import annotations

import dataclasses
import hashlib
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.judged_rows import base, encoder, label, pair, ranking, rating, records
from support.tiny_runs import IMAGES, processor

from ernie_tune.data.batching import BatchStream, Dropped
from ernie_tune.data.media.corruption import CorruptedPairs, corrupted, corrupted_pair, masked
from ernie_tune.data.mixing import Mixture, Shard, hash_of
from ernie_tune.data.records import Corruption
from ernie_tune.data.units import UnitBatch, collate_units

MASK = Corruption("mask")


def test_patches_go_grey_or_under_noise() -> None:
    picture = np.random.default_rng(0).standard_normal((400, 588)).astype(np.float32) + 0.5
    before = picture.copy()
    assert not masked(picture).any()
    assert not corrupted(picture, MASK).any()
    noisy = corrupted(picture, Corruption("noise", 0.6, 7))
    assert noisy.dtype == picture.dtype
    # of x ~ N(1/2, 1): correlation 0.8 with what it was, mean 0.8 / 2, and still a variance of 1
    assert np.corrcoef(noisy.ravel(), picture.ravel())[0, 1] == pytest.approx(0.8, abs=0.005)
    assert noisy.mean() == pytest.approx(0.4, abs=0.01)
    assert noisy.var() == pytest.approx(1.0, abs=0.02)
    assert np.array_equal(noisy, corrupted(picture, Corruption("noise", 0.6, 7)))
    assert not np.array_equal(noisy, corrupted(picture, Corruption("noise", 0.6, 8)))
    alone = corrupted(picture, Corruption("noise", 1.0, 7))
    assert np.allclose(alone, corrupted(picture * 0, Corruption("noise", 1.0, 7))), "nothing of the picture is left"
    assert np.array_equal(picture, before), "the true picture stays"
    with pytest.raises(ValueError, match=r"image_corruption \('blur'\) must be mask or noise"):
        corrupted(picture, Corruption("blur"))
    for wrong in (0.0, 1.5):
        with pytest.raises(ValueError, match=rf"image_corruption_noise \({wrong}\) must be above 0 and at most 1"):
            corrupted(picture, Corruption("noise", wrong))


def test_every_judgement_that_knows_a_right_answer_makes_a_pair(tmp_path: Path) -> None:
    rows = [{**pair(0, margin=0.5, confidence=0.7), "weight": 2.0, "domain": "d"}, ranking(1), rating(2), label(4)]
    for record, said in zip(records(tmp_path, rows), ["0", "1", "2", "4"], strict=True):
        made = corrupted_pair(record, MASK)
        assert made is not None
        assert [c.messages[0]["content"] for c in made.candidates] == [said, said]
        assert [c.corruption for c in made.candidates] == [None, MASK]
        assert list(made.preferences()) == [(0, 1)]
        assert (made.signal, made.margin, made.confidence) == ("pair", None, 1.0)
        assert (made.weight, made.domain, made.images) == (record.weight, record.domain, record.images)
    tie = {**base(0), "signal": {"type": "ranking", "responses": ["a", "b"], "order": "A=B"}}
    for record in records(tmp_path, [pair(0, picture=False), label(1), tie]):
        assert corrupted_pair(record, MASK) is None, "no picture, or no answer known to be right"


def test_the_unit_shares_the_answer_and_not_the_picture(tmp_path: Path) -> None:
    (record,) = records(tmp_path, [pair(3)])
    plain = encoder()(record, Dropped())
    made = corrupted_pair(record, Corruption("noise", 0.5, 1))
    assert made is not None
    assert plain is not None
    unit, again = (encoder()(made, Dropped()) for _ in range(2))
    assert unit is not None
    assert again is not None
    true, spoilt = unit.dialogues
    assert np.array_equal(true.row.input_ids_L, spoilt.row.input_ids_L)
    assert np.array_equal(true.trained_L, spoilt.trained_L)
    assert np.array_equal(true.row.pixel_values_PC, plain.dialogues[0].row.pixel_values_PC)  # type: ignore[arg-type]
    assert not np.array_equal(true.row.pixel_values_PC, spoilt.row.pixel_values_PC)  # type: ignore[arg-type]
    assert (unit.edges, unit.shared, unit.best, unit.corrupted, plain.corrupted) == (((0, 1),), 0, [0], True, False)
    assert unit.num_patches == 2 * plain.num_patches
    # what names log-probabilities in a stored reference: the true side is the row's own answer, the
    # other is new and stays what it is
    assert unit.keys[0] == plain.keys[0]
    assert unit.keys[1] not in plain.keys
    assert again.keys == unit.keys
    batch = collate_units([unit], processor())
    assert batch.inputs.num_tokens == 2 * true.num_tokens
    # a candidate with pictures of its own is spoilt in those
    own = {**pair(3), "signal": {**pair(3)["signal"], "chosen_images": [str(IMAGES / "0005.png")]}}
    (record,) = records(tmp_path, [own])
    found = corrupted_pair(record, MASK)
    assert found is not None
    other = encoder()(found, Dropped())
    assert other is not None
    assert not np.array_equal(other.dialogues[0].row.pixel_values_PC, true.row.pixel_values_PC)  # type: ignore[arg-type]
    assert not other.dialogues[1].row.pixel_values_PC.any()  # type: ignore[union-attr]


def test_a_pair_whose_picture_was_cut_away_is_dropped(tmp_path: Path) -> None:
    (record,) = records(tmp_path, [pair(0)])
    made, dropped = corrupted_pair(record, MASK), Dropped()
    assert made is not None
    assert encoder(truncation="left", max_prompt=8)(record, dropped) is not None
    assert encoder(truncation="left", max_prompt=8)(made, dropped) is None
    assert dropped.lines()[0].startswith("dropped 1 row(s): no picture is left to corrupt")


def test_a_share_of_the_rows_with_pictures_gets_one(tmp_path: Path) -> None:
    rows = records(tmp_path, [pair(i % 30, picture=i % 3 != 2) for i in range(300)])
    every = CorruptedPairs(rows, "mask", 0.9, 1.0, 42, 0)
    assert every.chosen == [i for i in range(300) if i % 3 != 2]
    assert len(every) == 500
    assert every[:300] == rows
    assert every[-1] == corrupted_pair(rows[298], Corruption("mask", 0.9, hash_of(42, 0, 1, 298)))
    some = CorruptedPairs(rows, "mask", 0.9, 0.25, 42, 0)
    assert 33 < len(some.chosen) < 67, "0.25 of 200, three standard deviations either way"
    # decided by seed and number of the row: rows that are added later change nothing
    assert CorruptedPairs(rows[:150], "mask", 0.9, 0.25, 42, 0).chosen == [i for i in some.chosen if i < 150]
    assert CorruptedPairs(rows, "mask", 0.9, 0.25, 43, 0).chosen != some.chosen
    assert set(some.chosen) < set(CorruptedPairs(rows, "noise", 0.9, 0.5, 42, 0).chosen)
    seeds = {r.candidates[1].corruption.seed for r in every[300:]}
    assert len(seeds) == 200, "each picture has noise of its own"


def _pixels(batch: UnitBatch) -> str:
    return hashlib.sha256(np.concatenate([batch.inputs.pixel_values_PC.ravel()])).hexdigest()  # type: ignore[union-attr]


def test_streams_resume_and_ranks_see_the_same_rows(tmp_path: Path) -> None:
    rows = records(tmp_path, [pair(i) for i in range(9)])

    def stream(rank: int = 0, size: int = 1, **more: Any) -> BatchStream:
        shard = Shard(Mixture([CorruptedPairs(rows, "noise", 0.5, 0.6, 1, 0)], seed=1), rank, size)
        return BatchStream(shard, encoder(), **{"rows": 1, "accumulation": 1, **more})

    whole = [_pixels(window[0]) for window in islice(stream(), 12)]
    first = stream()
    assert [_pixels(window[0]) for window in islice(first, 5)] == whole[:5]
    second = stream()
    second.load_state_dict(first.state_dict())
    assert [_pixels(window[0]) for window in islice(second, 7)] == whole[5:]
    apart = [[_pixels(window[0]) for window in islice(stream(rank, 2), 6)] for rank in range(2)]
    assert [apart[i % 2][i // 2] for i in range(12)] == whole
    packed = next(iter(stream(packing=True)))[0]
    assert packed.num_rows > 1
    other = Shard(Mixture([CorruptedPairs(rows, "noise", 0.5, 0.2, 1, 0)], seed=1))
    with pytest.raises(ValueError, match="lengths"):
        other.load_state_dict(first.state_dict()["shard"])


def test_the_same_row_stays_the_same_under_dataclasses(tmp_path: Path) -> None:
    """Only what is seen differs: without the corruption both sides are one, and there is nothing to
    learn.
    """
    (record,) = records(tmp_path, [pair(3)])
    made = corrupted_pair(record, MASK)
    assert made is not None
    same = dataclasses.replace(made, candidates=tuple(dataclasses.replace(c, corruption=None) for c in made.candidates))
    unit = encoder()(same, Dropped())
    assert unit is not None
    assert unit.keys[0] == unit.keys[1]
