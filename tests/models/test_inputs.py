"""Positions, routing types and packing against worked examples."""

from __future__ import annotations

import numpy as np
import pytest

from ernie_tune.models.config import TokenIds
from ernie_tune.models.inputs import Row, check_grid, feature_count, pack, position_ids

IDS = TokenIds(image=60, image_start=61, image_end=62, video=60, video_start=63, video_end=64)


def image(n: int) -> list[int]:
    return [61, *[60] * n, 62]


def video(n: int) -> list[int]:
    return [63, *[60] * n, 64]


def test_golden_example() -> None:
    ids = np.array([1, 2, 3, *image(6), 4, 5, *video(8), 6, *image(6), 7, 8, 9])
    got = position_ids(ids, np.array([[1, 4, 6], [4, 4, 4], [1, 6, 4]]), IDS)
    t = "0 1 2 3 4 4 4 4 4 4 7 8 9 10 11 11 11 11 12 12 12 12 13 14 15 16 16 16 16 16 16 19 20 21 22"
    h = "0 1 2 3 4 4 4 5 5 5 7 8 9 10 11 11 12 12 11 11 12 12 13 14 15 16 16 17 17 18 18 19 20 21 22"
    w = "0 1 2 3 4 5 6 4 5 6 7 8 9 10 11 12 11 12 11 12 11 12 13 14 15 16 17 16 17 16 17 19 20 21 22"
    np.testing.assert_array_equal(got.T, [[int(x) for x in row.split()] for row in (t, h, w)])


def test_a_video_longer_than_wide_follows_each_rule() -> None:
    """Grid (12,4,4) at 3: time runs 3..8; text goes on at 9 by Paddle's rule, at 5 by transformers'
    (without markers).
    """
    ids = np.array([1, 2, 3, *[60] * 24, 4, 5, 6])
    grid = np.array([[12, 4, 4]])
    assert position_ids(ids, grid, IDS)[3:27, 0].tolist() == [3 + i // 4 for i in range(24)]
    assert position_ids(ids, grid, IDS)[-3:, 0].tolist() == [9, 10, 11]
    assert position_ids(ids, grid, IDS, rule="hf")[-3:, 0].tolist() == [5, 6, 7]


def test_hf_rule_equals_transformers(golden) -> None:
    units = golden("units")
    tokens = TokenIds(image=602, image_start=600, image_end=601, video=602, video_start=603, video_end=604)
    got = position_ids(units["t_dominant/input_ids"], units["t_dominant/grid_thw"], tokens, rule="hf")
    np.testing.assert_array_equal(got, units["t_dominant/position_ids"])


def test_markers_are_vision_for_routing_and_text_for_positions() -> None:
    packed = pack([Row(np.array([1, *image(4), 2]), np.zeros((16, 588), np.float32), np.array([[1, 4, 4]]))], IDS)
    assert packed.vision_T.tolist() == [False, True, True, True, True, True, True, False]
    assert packed.placeholder_T.sum() == 4
    assert packed.position_ids_T3[[1, 6]].tolist() == [[1, 1, 1], [4, 4, 4]]


def test_packed_segments_restart_positions() -> None:
    packed = pack([Row(np.array([5, 6, 7])), Row(np.array([8, 9]))], IDS)
    assert packed.offsets == (0, 3, 5)
    assert packed.segment_lengths == (3, 2)
    assert packed.position_ids_T3[:, 1].tolist() == [0, 1, 2, 0, 1]
    assert packed.pixel_values_PC is None


def test_feature_count() -> None:
    assert feature_count((1, 34, 46)) == 391
    assert feature_count((4, 4, 6)) == 12


@pytest.mark.parametrize(("ids", "grid", "match"), [
    ([1, 60, 60, 2], [[1, 4, 4]], r"placeholder tokens \(2\) must equal the number of visual features \(4\)"),
    ([1, 60, 60, 2, 60, 60], [[1, 4, 4]], "must be consecutive"),
    ([60], [[1, 3, 4]], r"grid_thw\[0\] \(1, 3, 4\) must have an even"),
    ([60], [[3, 2, 2]], r"must have 1 or an even number of frames"),
])  # fmt: skip
def test_mismatches_are_named(ids: list[int], grid: list[list[int]], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        position_ids(np.array(ids), np.array(grid), IDS)


def test_other_errors() -> None:
    with pytest.raises(ValueError, match="rule"):
        position_ids(np.array([1]), None, IDS, rule="torch")
    with pytest.raises(ValueError, match="rows \\(0\\) must be at least 1"):
        pack([], IDS)
    with pytest.raises(ValueError, match="row 1 has 0 tokens"):
        pack([Row(np.array([1])), Row(np.array([], np.int64))], IDS)
    with pytest.raises(ValueError, match=r"row 0: number of patches \(3\) must equal .* \(16\)"):
        pack([Row(np.array([60] * 4), np.zeros((3, 588)), np.array([[1, 4, 4]]))], IDS)
    with pytest.raises(ValueError, match="must have an even"):
        check_grid(np.array([[1, 0, 4]]))
