"""What a data set looks like in numbers: lengths, languages, answers, pictures, domains, and what
follows for the size of pictures.

Refuses to know: files, what is wrong with rows, how numbers are drawn (`report.py`). Memory
does not grow with the rows.
Lengths are UTF-8 bytes, which tokens follow closely in every language (a Chinese character has
three); one factor, measured on the first rows with a tokenizer, turns them into tokens.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ernie_tune.config.language import say
from ernie_tune.data.doctor.checks import Finding
from ernie_tune.data.doctor.media import image_tokens
from ernie_tune.data.doctor.rows import Columns
from ernie_tune.data.media.images import ImageSettings
from ernie_tune.data.processor import Processor

_STEPS = 2  # buckets an octave
_BUCKETS = 31 * _STEPS
_PROBE_BYTES = 60_000  # of text that are tokenised to measure the factor
_COUNTED_BYTES = 1_000_000  # whose letters are all counted
_CLASSES = 1000  # distinct answers that are counted; beyond that the rare ones are forgotten
_DOMAINS = 1000
# Where a warning begins.
LENGTH_RATIO, MIN_PAIRS = 1.3, 10
CONSTANT_SHARE, MIN_ANSWERS = 0.9, 20
IMBALANCE, MAX_CLASSES, MIN_CLASSIFIED = 10, 20, 50
BUDGETS = tuple(side * side for side in (224, 448, 672, 896, 1344))
SHRUNK_SHARE = 0.05  # of the pictures, that an advised budget may shrink


@dataclass
class Histogram:
    """Counts of positive numbers in half octaves, with sum and maximum."""

    counts: np.ndarray = field(default_factory=lambda: np.zeros(_BUCKETS, np.int64))
    total: int = 0
    highest: int = 0

    def add(self, values_n: np.ndarray) -> None:
        if len(values_n):
            buckets = (np.log2(np.maximum(values_n, 1)) * _STEPS).astype(np.int64)
            self.counts += np.bincount(buckets, minlength=_BUCKETS)[:_BUCKETS]
            self.total += int(values_n.sum())
            self.highest = max(self.highest, int(values_n.max()))

    @property
    def mean(self) -> float:
        return self.total / max(1, int(self.counts.sum()))

    def bars(self, scale: float = 1.0) -> list[tuple[str, int]]:
        """(range, count) for the occupied octaves and those between them; `scale` converts the
        values.
        """
        octaves = self.counts.reshape(-1, _STEPS).sum(1)
        used = np.flatnonzero(octaves)
        if not len(used):
            return []
        span = range(int(used[0]), int(used[-1]) + 1)
        return [(f"{scale * 2**i:,.0f}-{scale * 2 ** (i + 1):,.0f}", int(octaves[i])) for i in span]

    def quantile(self, share: float) -> float:
        """The value below which this share lies, to half an octave."""
        reached = np.searchsorted(np.cumsum(self.counts), share * self.counts.sum())
        return float(min(self.highest, 2 ** ((int(reached) + 1) / _STEPS)))


class Stats:
    """Numbers of one data set. `add` takes a batch at a time."""

    def __init__(self, processor: Processor) -> None:
        self.processor = processor
        self.rows = 0
        self.signals: Counter[str] = Counter()
        self.domains: Counter[str] = Counter()
        self.letters: Counter[str] = Counter()  # zh, en, other
        self.text, self.answers = Histogram(), Histogram()  # bytes; characters
        self.media: Counter[int] = Counter()  # media in a row -> rows
        self.sizes: list[tuple[int, int]] = []  # of opened pictures
        self._classes: Counter[int] = Counter()
        self._forgot = False
        self._batches = self._answered = self._pairs = self._chosen = self._rejected = 0
        self._probed_bytes = self._probed_tokens = 0

    def add(self, columns: Columns, joined: bytes, ends_n: np.ndarray, answer_hash_n: np.ndarray) -> None:
        """A batch of rows, their joined texts and where each ends in them
        (`doctor_compare.join_texts`).
        """
        self.rows += len(ends_n)
        first = columns.signal[0]
        self.signals.update({first: len(ends_n)} if columns.signal.count(first) == len(ends_n) else columns.signal)
        self.media.update(map(len, columns.media) if any(columns.media) else {0: len(ends_n)})
        if any(columns.domain):
            self.domains.update(columns.domain)
            if len(self.domains) > _DOMAINS:
                kept = Counter(dict(self.domains.most_common(_DOMAINS // 2)))
                kept["(others)"] += self.domains.total() - kept.total()
                self.domains = kept
        lengths_n = np.fromiter(map(len, columns.answer), np.int64, len(ends_n))
        self.text.add(np.diff(ends_n, prepend=0) - 3)
        self.answers.add(lengths_n[lengths_n > 0])
        if "pair" in columns.signal:
            pair_n = np.array([signal == "pair" for signal in columns.signal])
            self._pairs += int(pair_n.sum())
            self._chosen += int(lengths_n[pair_n].sum())
            self._rejected += sum(len(text) for text, pair in zip(columns.rejected, pair_n, strict=True) if pair)
        self._add_classes(answer_hash_n[columns.taught() & (lengths_n > 0)])
        self._count_letters(np.frombuffer(joined, np.uint8))
        if self._probed_bytes < _PROBE_BYTES:
            text = joined[:_PROBE_BYTES].decode("utf-8", "ignore").replace("\0", "\n")
            self._probed_bytes += len(text.encode())
            self._probed_tokens += len(self.processor.tokenizer.encode(text))

    def _add_classes(self, answer_hash_n: np.ndarray) -> None:
        """Answers as classes. Where there are too many to count, the frequent ones survive (lossy
        counting).
        """
        self._answered += len(answer_hash_n)
        self._classes.update(answer_hash_n.tolist())
        if len(self._classes) > _CLASSES:
            self._forgot = True
            self._classes = Counter({key: count - 1 for key, count in self._classes.items() if count > 1})

    def _count_letters(self, bytes_B: np.ndarray) -> None:
        """Letters by script, from the first bytes of their UTF-8; of large data every eighth batch
        stands for all.
        """
        self._batches += 1
        weight = 1 if self.text.total < _COUNTED_BYTES else 8
        if self._batches % weight:
            return
        often = np.bincount(bytes_B, minlength=256)
        zh = int(often[0xE4:0xEA].sum())
        kana = 0
        if often[0xE3]:
            after = bytes_B[np.flatnonzero(bytes_B[:-1] == 0xE3) + 1]
            kana = int(np.count_nonzero((after >= 0x81) & (after <= 0x83)))
        # punctuation, full-width forms, pictograms
        symbols = int(often[0xE2] + often[0xE3] + often[0xEE:].sum())
        self.letters["en"] += weight * int(often[ord("A") : ord("Z") + 1].sum() + often[ord("a") : ord("z") + 1].sum())
        self.letters["zh"] += weight * zh
        self.letters["other"] += weight * (int(often[0xC3:].sum()) - zh - symbols + kana)

    @property
    def tokens_per_byte(self) -> float:
        return self._probed_tokens / max(1, self._probed_bytes)

    def languages(self) -> dict[str, float]:
        """Shares of zh, en and other letters."""
        total = sum(self.letters.values())
        return {name: self.letters[name] / max(1, total) for name in ("zh", "en", "other")}

    def image_tokens(self, settings: ImageSettings) -> np.ndarray:
        """Tokens of each opened picture under these settings; the most they allow where its shape
        does not fit them.
        """
        most = settings.max_pixels // settings.factor**2

        def tokens(size: tuple[int, int]) -> int:
            try:
                return image_tokens(size, settings)
            except ValueError:
                return most

        return np.array([tokens(size) for size in self.sizes], np.int64)

    def budgets(self) -> list[tuple[int, float, float]]:
        """(max_pixels, mean tokens a picture, share of pictures that it shrinks) for usual limits,
        up to the first that shrinks none.
        """
        ours = self.processor.images
        pixels_n = np.array([height * width for height, width in self.sizes])
        out: list[tuple[int, float, float]] = []
        for limit in sorted({*(budget for budget in BUDGETS if budget >= ours.min_pixels), ours.max_pixels}):
            if len(pixels_n) and (not out or out[-1][2] > 0):
                tokens_n = self.image_tokens(dataclasses.replace(ours, max_pixels=limit))
                out.append((limit, float(tokens_n.mean()), float((pixels_n > limit).mean())))
        return out

    def advice(self) -> int | None:
        """The smallest usual image_max_pixels that leaves nearly all pictures as they are; None
        without pictures.
        """
        return min((limit for limit, _, shrunk in self.budgets() if shrunk <= SHRUNK_SHARE), default=None)

    def findings(self, path: str) -> Iterator[Finding]:
        """What the rows together suffer from."""
        ratio = self._chosen / max(1, self._rejected)
        if self._pairs >= MIN_PAIRS and ratio > LENGTH_RATIO:
            yield Finding.of("length_bias", path, 0, "chosen", f"{ratio:.1f} times as long on average")
        good, bad = self.signals["label:good"], self.signals["label:bad"]
        classes = Counter({"good": good, "bad": bad}) if good + bad else self._classes
        total = good + bad or self._answered
        if good + bad > 1 and not (good and bad):
            kind = say("good", "好") if good else say("bad", "坏")
            yield Finding.of(
                "one_kind",
                path,
                0,
                "label",
                say(f"{total:,} {kind.english} answers and no other", f"{total:,} 个回答均为“{kind.chinese}”"),
                kind=kind,
            )
            return
        if not classes or total < MIN_ANSWERS:
            return
        most, least = max(classes.values()), min(classes.values())
        if most >= CONSTANT_SHARE * total:
            field = "label" if good + bad else "answers"
            yield Finding.of("constant", path, 0, field, f"{most:,} of {total:,} the same")
        elif len(classes) <= MAX_CLASSES and not self._forgot and total >= MIN_CLASSIFIED and most > IMBALANCE * least:
            yield Finding.of("imbalance", path, 0, "label", f"{most:,} of one class, {least:,} of another")

    def as_dict(self) -> dict[str, Any]:
        """For the JSON report."""
        images_n = self.image_tokens(self.processor.images)
        return {
            "rows": self.rows,
            "signals": dict(self.signals),
            "domains": dict(self.domains.most_common(20)),
            "languages": {name: round(share, 4) for name, share in self.languages().items()},
            "text_tokens": round(self.text.total * self.tokens_per_byte),
            "text_tokens_per_row": round(self.text.mean * self.tokens_per_byte, 1),
            "answer_characters": {
                "mean": round(self.answers.mean, 1),
                "median": round(self.answers.quantile(0.5)),
                "p95": round(self.answers.quantile(0.95)),
                "max": self.answers.highest,
            },
            "media_per_row": {str(count): rows for count, rows in sorted(self.media.items())},
            "tokens_per_image": round(float(images_n.mean()), 1) if len(images_n) else None,
            "image_max_pixels_advised": self.advice(),
        }
