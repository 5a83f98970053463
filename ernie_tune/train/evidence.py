"""Rewards that only a policy which looks at the picture can earn: twins, dependence on the picture,
boxes that the answer needs.

A row's twin is its picture after a small edit that changes the answer; both are answered in the
same round, and an answer is worth all only where the other picture's are right too. Dependence and
boxes compare the log-probability of a right answer with and without (a part of) the picture, by the
policy of the moment, without a gradient. Evidence is worth something beside a right answer only.
Refuses to know: how answers are sampled and judged, how advantages and losses are made, layouts.
Sources: DeFacto (arXiv 2509.20912), PAPO (2507.06448). Legend: G answers of a group, P patches.
"""

from __future__ import annotations

import dataclasses
import io
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ernie_tune.checkpoint.state import ALONE, Ranks
from ernie_tune.config.language import say
from ernie_tune.data.media.corruption import masked
from ernie_tune.data.media.images import image_size
from ernie_tune.data.processor import Encoded, Processor
from ernie_tune.data.records import Media, Record, Reward
from ernie_tune.data.units import Unit, UnitBatch, collate_units
from ernie_tune.rewards.evidence import blind_reward, box_evidence, dependence, read_claims, twin_rewards
from ernie_tune.rewards.scores import Box
from ernie_tune.train.rolled import Rolled

_CLOSE = "</evidence>"
RIGHT = 1.0 - 1e-9
_HALF = 0.5  # of the picture: a box that says nothing
_GREY = (122, 116, 104)  # about the mean of what processors expect
Logp = Callable[[UnitBatch], np.ndarray]  # log-probabilities [N] of a batch's targets


@dataclass(frozen=True)
class EvidenceSettings:
    """`twins`: answer each row's twin in the same round; `twin_share` of an answer's worth does not
    depend on the twin. `dependence` and `boxes`: what full marks for them add to the reward of a
    right answer. `mask_ratio` of the picture is grey for the former; `scale`: nats a token that are
    full marks. `groups_per_batch`: of a forward.
    """

    twins: bool = False
    twin_share: float = 0.5
    dependence: float = 0.0
    boxes: float = 0.0
    mask_ratio: float = 0.6
    scale: float = 2.0
    seed: int = 42
    groups_per_batch: int = 1

    @property
    def wanted(self) -> bool:
        """Whether rewards look for evidence at all."""
        return self.twins or self.dependence > 0 or self.boxes > 0


# --- other pictures to the same question ----------------------------------------------------------


def twin_of(record: Record) -> Record | None:
    """The row with its edited picture, and with the answer and scene of that; None where the scene
    holds no twin. Raises ValueError, naming the row, for a twin without pictures or answer, or with
    the same answer.
    """
    twin = record.reward.scene.get("twin") if record.reward else None
    if not isinstance(twin, Mapping) or record.reward is None:
        return None
    answer = twin.get("answer")
    if not twin.get("images") or answer is None or str(answer) == str(record.reward.answer):
        raise ValueError(
            say(
                f"{record.meta}: scene.twin must have images and an answer other than {record.reward.answer!r}; "
                "correct it, or leave the twin out",
                f"{record.meta}: scene.twin 须有 images，且 answer 不同于 {record.reward.answer!r}；请改正，或去掉 twin",
            )
        )
    evidence = dict(record.reward.evidence)
    if "required" in twin:
        evidence["required"] = twin["required"]
    scene = {k: v for k, v in twin.items() if k not in ("images", "answer", "required")}
    reward = Reward(answer, record.reward.verifiers, evidence, scene, record.reward.hint)
    return dataclasses.replace(record, images=_pictures(record, twin["images"]), reward=reward)


def control_of(record: Record) -> Record | None:
    """The row with a picture whose edit must not change the answer; None where the scene holds
    none.
    """
    control = record.reward.scene.get("control") if record.reward else None
    if not isinstance(control, Mapping) or not control.get("images"):
        return None
    return dataclasses.replace(record, images=_pictures(record, control["images"]))


def _pictures(record: Record, names: Sequence[str]) -> tuple[Media, ...]:
    """Files that a row names in its scene, beside the row's own."""
    folder = os.path.dirname(record.meta.path)
    return tuple(name if os.path.isabs(name) or "://" in name else os.path.join(folder, name) for name in names)


def without_picture(record: Record) -> Record:
    """The row with grey pictures of the same size."""
    out = []
    for source in record.images:
        size = image_size(source, str(record.meta))  # type: ignore[arg-type]
        stream = io.BytesIO()
        Image.new("RGB", size, _GREY).save(stream, "PNG")
        out.append(stream.getvalue())
    return dataclasses.replace(record, images=tuple(out))


def greyed(encoded: Encoded, hidden_P: np.ndarray | None = None) -> Encoded:
    """The same input with grey patches where `hidden_P` says so; everywhere without it."""
    pixels_PC = encoded.row.pixel_values_PC
    if pixels_PC is None:
        return encoded
    grey_PC = masked(pixels_PC)
    if hidden_P is not None:
        grey_PC = np.where(hidden_P[:, None], grey_PC, pixels_PC).astype(pixels_PC.dtype)
    return dataclasses.replace(encoded, row=dataclasses.replace(encoded.row, pixel_values_PC=grey_PC))


def some_hidden(encoded: Encoded, ratio: float, *key: int) -> np.ndarray:
    """A share of what the model sees of the pictures, by chance of `key`: patches [P], those of one
    visual token (neighbours in the input) together.
    """
    pixels_PC = encoded.row.pixel_values_PC
    tokens = 0 if pixels_PC is None else len(pixels_PC) // 4
    hidden = np.zeros(tokens, bool)
    order = np.random.default_rng(np.random.SeedSequence(key)).permutation(tokens)
    hidden[order[: round(ratio * tokens)]] = True
    return np.repeat(hidden, 4)


def touched(encoded: Encoded, box: Box, size: tuple[int, int]) -> np.ndarray:
    """Which patches [P] of the first picture a box touches; patches of others are not touched.
    `box` in pixels of the picture of `size` (width, height).
    """
    pixels_PC, grid_n3 = encoded.row.pixel_values_PC, encoded.row.grid_thw_n3
    if pixels_PC is None or grid_n3 is None:
        return np.zeros(0, bool)
    _, rows, columns = (int(n) for n in grid_n3[0])
    top, left = np.arange(rows) * size[1] / rows, np.arange(columns) * size[0] / columns
    in_rows = (top < box[3]) & (top + size[1] / rows > box[1])
    in_columns = (left < box[2]) & (left + size[0] / columns > box[0])
    grid = in_rows[:, None] & in_columns[None, :]
    blocks = grid.reshape(rows // 2, 2, columns // 2, 2).transpose(0, 2, 1, 3)  # 2 x 2 blocks in row order
    out = np.zeros(len(pixels_PC), bool)
    out[: rows * columns] = blocks.reshape(-1)
    return out


def cited_box(text: str) -> Box | None:
    """The box of the first claim that has one; None where the evidence has none, or cannot be
    read."""
    claims = read_claims(text) or []
    return next((claim.box for claim in claims if claim.box is not None and _proper(claim.box)), None)


def _proper(box: Box) -> bool:
    return bool(np.isfinite(box).all()) and box[0] < box[2] and box[1] < box[3]


# --- what a round is worth ------------------------------------------------------------------------


def blind_ceiling(records: Sequence[Record], share: float = 0.5) -> tuple[float, float]:
    """(share of right answers, mean reward with twins) that a policy which sees no picture may
    reach on rows with pictures, knowing the questions and how often each is answered how. The
    second is of the rows that have twins; 0 without.
    """
    golds: dict[str, dict[str, int]] = {}
    pairs: dict[str, list[tuple[Any, Any]]] = {}
    for record in records:
        if record.reward is None or record.reward.answer is None or not record.images:
            continue
        words = " ".join(str(message.get("content", "")) for message in record.prompt)
        counts, gold = golds.setdefault(words, {}), str(record.reward.answer)
        counts[gold] = counts.get(gold, 0) + 1
        twin = twin_of(record)
        if twin is not None and twin.reward is not None:
            pairs.setdefault(words, []).append((gold, twin.reward.answer))
    rows = sum(sum(counts.values()) for counts in golds.values())
    right = sum(max(counts.values()) for counts in golds.values()) / max(rows, 1)
    doubled = sum(map(len, pairs.values()))
    reward = sum(len(some) * blind_reward([a for a, _ in some], [b for _, b in some], share) for some in pairs.values())
    return right, reward / max(doubled, 1)


class Evidence:
    """Weighs the judged groups of a round. `records` are the rows, and behind them their twins,
    when those are answered too; `partner` of a row's number is its twin's, and the other way round.
    """

    def __init__(self, settings: EvidenceSettings, rows: Sequence[Record], processor: Processor, logp: Logp) -> None:
        self.settings, self.processor, self.logp = settings, processor, logp
        self.records: list[Record] = list(rows)
        self.partner: dict[int, int] = {}
        for number, record in enumerate(rows if settings.twins else ()):
            twin = twin_of(record)
            if twin is not None:
                self.partner[number], self.partner[len(self.records)] = len(self.records), number
                self.records.append(twin)
        if settings.twins and not self.partner:
            raise ValueError(
                say(
                    "evidence_twins (true) must have rows with scene.twin (images, answer); add them, or set it to false",
                    "evidence_twins（true）需要含 scene.twin（images、answer）的数据；请补充，或设为 false",
                )
            )
        self.metrics: dict[str, float] = {}
        self._totals: dict[str, tuple[float, int]] = {}  # sums and counts of the round, over all ranks

    def together(self, number: int) -> tuple[int, ...]:
        """What is answered in the same round as a row: itself, and its twin."""
        return (number, self.partner[number]) if number in self.partner else (number,)

    @property
    def width(self) -> int:
        return 2 if self.partner else 1

    def blind_ceiling(self) -> tuple[float, float]:
        """`blind_ceiling` of the rows that are answered."""
        return blind_ceiling(self.records, self.settings.twin_share)

    def weigh(self, groups: Sequence[Rolled], ranks: Ranks = ALONE, more: bool = False) -> None:
        """Change the rewards of judged groups in place by what their evidence is worth. All ranks
        call it; a row's twin may be another rank's. `more`: the groups join those of the call
        before, as refills of a round do; `metrics` are then of them all.
        """
        s = self.settings
        said: dict[str, list[float]] = {}
        if s.twins:
            self._twins(groups, ranks, said)
        if s.dependence:
            self._dependence(groups, ranks, said)
        if s.boxes:
            self._boxes(groups, ranks, said)
        told = ranks.gather({name: (float(np.sum(values)), len(values)) for name, values in said.items()})
        if not more:
            self._totals = {}
        for name, (total, count) in ((name, part[name]) for part in told for name in part):
            before, counted = self._totals.get(name, (0.0, 0))
            self._totals[name] = before + total, counted + count
        self.metrics = {f"evidence/{name}": total / max(1, count) for name, (total, count) in self._totals.items()}

    def _twins(self, groups: Sequence[Rolled], ranks: Ranks, said: dict[str, list[float]]) -> None:
        mine = {group.number: group.right_G.tolist() for group in groups if group.number in self.partner}
        everybody = {number: right for part in ranks.gather(mine) for number, right in part.items()}
        for group in groups:
            other = everybody.get(self.partner.get(group.number, -1))
            if other is None:
                continue
            earned = [one.earned for one in group.scored]
            worth = twin_rewards(earned, other, self.settings.twin_share)
            group.reward_G += np.array(worth) - np.array(earned)
            if group.number < self.partner[group.number]:
                said.setdefault("twin_both_right", []).append(float(np.mean(group.right_G) * np.mean(other)))

    def _dependence(self, groups: Sequence[Rolled], ranks: Ranks, said: dict[str, list[float]]) -> None:
        s = self.settings
        shown = [group for group in groups if sees(group) and (group.right_G >= RIGHT).any()]
        hidden = [some_hidden(group.unit.dialogues[0], s.mask_ratio, s.seed, group.number) for group in shown]
        units = [_greyed_unit(group.unit, h) for group, h in zip(shown, hidden, strict=True)]
        for group, blind in zip(shown, self._logps(units, groups, ranks), strict=True):
            for i, (seen, without) in enumerate(zip(self._seen(group), blind, strict=True)):
                if group.right_G[i] >= RIGHT and len(seen):
                    at = answer_start(group, i, self.processor)
                    group.reward_G[i] += s.dependence * dependence(seen[at:].tolist(), without[at:].tolist(), s.scale)
                    said.setdefault("image_delta", []).append(float(np.mean(seen[at:] - without[at:])))

    def _boxes(self, groups: Sequence[Rolled], ranks: Ranks, said: dict[str, list[float]]) -> None:
        s = self.settings
        cited = []
        for group in groups:
            for i, answer in enumerate(group.answers):
                if group.right_G[i] >= RIGHT:
                    box = cited_box(answer.text) if sees(group) else None
                    said.setdefault("cites_box", []).append(float(box is not None))
                    if box is None:
                        said.setdefault("box", []).append(0.0)
                    else:
                        cited.append((group, i, *self._in_picture(group, box)))
        without = [_greyed_unit(g.unit, hidden, i) for g, i, hidden, _ in cited]
        only = [_greyed_unit(g.unit, ~hidden, i) for g, i, hidden, _ in cited]
        logps = self._logps([*without, *only], groups, ranks)
        for k, (group, i, _, area) in enumerate(cited):
            at = answer_start(group, i, self.processor)
            full, none, alone = (
                float(np.mean(one[at:])) if len(one[at:]) else 0.0
                for one in (self._seen(group)[i], logps[k][0], logps[len(cited) + k][0])
            )
            worth = box_evidence(full, none, alone, area, s.scale)
            group.reward_G[i] += s.boxes * worth
            whole = float(area > _HALF)
            for name, value in (
                ("box", worth), ("need", full - none), ("lost", full - alone), ("area", area), ("whole_box", whole)
            ):  # fmt: skip
                said.setdefault(name, []).append(value)

    def _in_picture(self, group: Rolled, box: Box) -> tuple[np.ndarray, float]:
        """(the patches [P] that a cited box touches, its share of the picture). The box is in the
        frame that the scene names (1000 or 1), by default in pixels.
        """
        scene = group.record.reward.scene if group.record.reward else {}
        size = image_size(group.record.images[0])  # type: ignore[arg-type]
        width, height = size
        frame = scene.get("frame")
        scaled = (
            box
            if not frame
            else (box[0] / frame * width, box[1] / frame * height, box[2] / frame * width, box[3] / frame * height)
        )
        left, top = max(0.0, scaled[0]), max(0.0, scaled[1])
        right, bottom = min(float(width), scaled[2]), min(float(height), scaled[3])
        area = max(0.0, right - left) * max(0.0, bottom - top) / (width * height)
        return touched(group.unit.dialogues[0], scaled, size), area

    def _seen(self, group: Rolled) -> list[np.ndarray]:
        """Log-probabilities of each answer's tokens when they were sampled."""
        return np.split(group.columns["old_logp_N"], np.cumsum(group.length_G)[:-1])

    def _logps(self, units: Sequence[Unit], groups: Sequence[Rolled], ranks: Ranks) -> list[list[np.ndarray]]:
        """What the policy says of each unit's answers, token by token. Every rank makes as many
        forwards as the one with most.
        """
        size = max(1, self.settings.groups_per_batch)
        parts = [units[i : i + size] for i in range(0, len(units), size)]
        out: list[list[np.ndarray]] = []
        for k in range(max(ranks.gather(len(parts)))):
            some = parts[k] if k < len(parts) else [groups[0].unit]
            values = self.logp(collate_units(some, self.processor))
            if k >= len(parts):
                continue
            for unit in some:
                lengths = [int(d.trained_L.sum()) for d in unit.dialogues]
                out.append(np.split(values[: sum(lengths)], np.cumsum(lengths)[:-1]))
                values = values[sum(lengths) :]
        return out


def sees(group: Rolled) -> bool:
    """Whether the prompt shows a picture."""
    return group.unit.dialogues[0].row.pixel_values_PC is not None and bool(group.record.images)


def _greyed_unit(unit: Unit, hidden_P: np.ndarray, answer: int | None = None) -> Unit:
    """The unit with grey patches; of one of its answers alone, where that is named."""
    if answer is None:
        return dataclasses.replace(unit, dialogues=tuple(greyed(d, hidden_P) for d in unit.dialogues))
    one = greyed(unit.dialogues[answer], hidden_P)
    nothing = np.full(1, np.nan)
    return Unit((one,), 0, unit.signal, nothing, nothing, nothing, where=unit.where)


def answer_start(group: Rolled, i: int, processor: Processor) -> int:
    """How many of an answer's trained tokens belong to its evidence block: what stands there says
    already what was seen, and must not count for having looked.
    """
    dialogue, answer = group.unit.dialogues[i], group.answers[i]
    if _CLOSE not in answer.text:
        return 0
    ids = list(answer.token_ids)
    low, high = 0, len(ids)
    while low < high:  # the first prefix that holds the whole block
        middle = (low + high) // 2
        low, high = (low, middle) if _CLOSE in processor.decode(ids[:middle]) else (middle + 1, high)
    start = dialogue.num_tokens - len(ids)
    return int(dialogue.trained_L[start : start + low].sum())
