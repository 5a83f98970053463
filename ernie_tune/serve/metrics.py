"""Counters of a server in Prometheus' text format (version 0.0.4). Refuses to know: what is
counted, HTTP.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass
class Counter:
    """A sum that only grows, by label values."""

    name: str
    help: str
    labels: tuple[str, ...] = ()
    values: dict[tuple[str, ...], float] = field(default_factory=dict)

    def add(self, amount: float = 1.0, *labels: str) -> None:
        self.values[labels] = self.values.get(labels, 0.0) + amount

    def lines(self) -> Iterable[str]:
        yield from _head(self.name, self.help, "counter")
        for labels, value in sorted(self.values.items()) or ([((), 0.0)] if not self.labels else []):
            yield f"{self.name}{_braces(zip(self.labels, labels, strict=True))} {value:g}"


@dataclass
class LatencyHistogram:
    """How long things took, in buckets of seconds."""

    name: str
    help: str
    counts: list[int] = field(default_factory=lambda: [0] * (len(SECONDS) + 1))
    total: float = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[sum(seconds > bound for bound in SECONDS)] += 1
        self.total += seconds

    def lines(self) -> Iterable[str]:
        yield from _head(self.name, self.help, "histogram")
        below = 0
        for bound, count in zip((*map("{:g}".format, SECONDS), "+Inf"), self.counts, strict=True):
            below += count
            yield f'{self.name}_bucket{{le="{bound}"}} {below}'
        yield f"{self.name}_sum {self.total:g}"
        yield f"{self.name}_count {below}"


@dataclass
class Metrics:
    """Everything that a server counts."""

    requests: Counter = field(
        default_factory=lambda: Counter("ernie_tune_requests_total", "Requests by path and status.", ("path", "status"))
    )
    prompt_tokens: Counter = field(
        default_factory=lambda: Counter("ernie_tune_prompt_tokens_total", "Tokens of prompts.", ("model",))
    )
    answer_tokens: Counter = field(
        default_factory=lambda: Counter("ernie_tune_generation_tokens_total", "Tokens of answers.", ("model",))
    )
    first_token: LatencyHistogram = field(
        default_factory=lambda: LatencyHistogram(
            "ernie_tune_time_to_first_token_seconds", "From a request's arrival to its first token."
        )
    )
    whole: LatencyHistogram = field(
        default_factory=lambda: LatencyHistogram("ernie_tune_request_seconds", "From a request's arrival to its end.")
    )

    def text(self, gauges: dict[str, tuple[str, float]]) -> str:
        """All of it, with `gauges` (name -> help, value) of this moment."""
        lines: list[str] = []
        for metric in (self.requests, self.prompt_tokens, self.answer_tokens, self.first_token, self.whole):
            lines += metric.lines()
        for name, (help_, value) in gauges.items():
            lines += [*_head(name, help_, "counter" if name.endswith("_total") else "gauge"), f"{name} {value:g}"]
        return "\n".join(lines) + "\n"


def _head(name: str, help_: str, kind: str) -> list[str]:
    return [f"# HELP {name} {help_}", f"# TYPE {name} {kind}"]


def _braces(labels: Iterable[tuple[str, str]]) -> str:
    escaped = [(name, value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")) for name, value in labels]
    return "{" + ",".join(f'{name}="{value}"' for name, value in escaped) + "}" if escaped else ""
