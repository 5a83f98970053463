"""`ernie_tune.estimate(...)`: what a run needs on each card and how long a step takes, as an object
that prints itself as a table.

Joins settings, model, card, layout and search. Refuses to know: paddle, the command line.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ernie_tune.config.arguments import RunConfig
from ernie_tune.config.convert import to_raw
from ernie_tune.config.language import Text, padded, say, shown
from ernie_tune.config.layout import Layout
from ernie_tune.config.loader import Entry, load_config, load_text
from ernie_tune.models.specs import parameter_count
from ernie_tune.plan import cards as card_table
from ernie_tune.plan.cards import GB, Card
from ernie_tune.plan.job import Job, job_of, model_shape
from ernie_tune.plan.layouts import run_problems
from ernie_tune.plan.memory import rows
from ernie_tune.plan.search import Plan, best, changes_that_fit, plan, smallest
from ernie_tune.plan.weights import base_bytes, trained_values

_SMALL_MODEL = 200_000_000  # parameters: below it the CPU is meant unless a card is named
_PLACE = "estimate"
# What a model that is named without a file is trained with: what its size asks for. Given settings
# go over it.
_DEFAULTS = "bf16: true\nrecompute: true\ngradient_accumulation_steps: 4\nlora_rank: 16\n"


@dataclass(frozen=True)
class Estimate:
    """The answer. `plan`: the layout asked for, or the best one; `better`: a faster layout on as
    many cards, if there is one; `changes`: where it does not fit, sets of settings with which it
    would.
    """

    job: Job
    card: Card
    plan: Plan
    searched: bool
    better: Plan | None
    changes: tuple[tuple[Text, ...], ...]

    @property
    def fits(self) -> bool:
        return self.plan.fits

    @property
    def card_gb(self) -> float:
        """GB (10^9 bytes) on the card that needs most."""
        return self.plan.memory.total / GB

    def __str__(self) -> str:
        return "\n".join(_lines(self))

    def as_dict(self) -> dict[str, Any]:
        """The numbers, for machines: bytes and seconds."""
        p, time = self.plan, self.plan.time
        return {
            "model": self.job.name,
            "parameters": parameter_count(self.job.model),
            "trained_parameters": trained_values(self.job),
            "stage": self.job.stage,
            "fine_tuning": self.job.method,
            "card": self.card.name,
            "card_bytes": self.card.memory_bytes,
            "cards": p.layout.world,
            "layout": str(p.layout),
            "settings": p.layout.settings(),
            "bytes_per_card": dict(p.memory.items),
            "total_bytes_per_card": p.memory.total,
            "bytes_per_stage": list(p.memory.stages),
            "host_bytes": p.memory.host_bytes,
            "fits": p.fits,
            "step": vars(time) if time else None,
            "better": str(self.better.layout) if self.better else None,
            "changes": [list(texts) for texts in self.changes],
            "notes": list(self.job.notes),
        }


def estimate(
    model: str | Path | RunConfig,
    *,
    cards: int | None = None,
    card: str | None = None,
    visual_tokens: int | None = None,
    row_tokens: int | None = None,
    overrides: tuple[Entry, ...] = (),
    **settings: Any,
) -> Estimate:
    """Memory and time of a run, without paddle and without a GPU.

    `model`: a YAML file, a resolved configuration, or the name of a model. `cards`: how many; by
    default what the layout needs, or the fewest where it fits. `card`: "h800-80g", "a100-40g",
    "80g", "cpu-16g"; by default h800-80g, for small models this machine's main memory.
    `visual_tokens`: of a micro-batch; by default half of it. `row_tokens`: the longest row, where
    shorter than max_seq_len. `settings` and `overrides` go over the file's.
    Raises ValueError for a setting, model or card that does not exist and for layouts that the
    model cannot have; OSError for a file that cannot be read.
    """
    config, named, told = _settings(model, [*overrides, *(Entry(k, to_raw(k, v), _PLACE) for k, v in settings.items())])
    shape = model_shape(config.model.model_name_or_path)
    device = card_table.card(card or ("cpu" if parameter_count(shape) < _SMALL_MODEL else card_table.DEFAULT))
    if device.is_cpu and card is None:
        device = _this_machine(device)
    job = _sized(job_of(config, shape, on_cpu=device.is_cpu, visual_tokens=visual_tokens), row_tokens, visual_tokens)
    job = job.replace(notes=(*told, *job.notes))
    asked = Layout.of(config.parallel)
    free = asked == Layout(sequence_parallel=asked.sequence_parallel) and named
    if free:
        chosen = best(job, device, cards) if cards else smallest(job, device)
        better = None
    else:
        world = cards or asked.world
        found = run_problems(config.parallel, config.train.gradient_accumulation_steps, shape, world)
        if found:
            raise ValueError("\n".join(message for _, message in found))
        chosen = plan(job, Layout.of(config.parallel, world), device)
        better = _better(job, device, chosen)
    changes = () if chosen.fits else tuple(changes_that_fit(job, device, chosen.layout.world, chosen.layout.offload))
    return Estimate(job, device, chosen, free, better, changes)


def _settings(model: str | Path | RunConfig, entries: list[Entry]) -> tuple[RunConfig, bool, tuple[str, ...]]:
    """(settings, whether only a model was named, so that the layout is ours to choose, what to tell
    of the settings).
    """
    if isinstance(model, RunConfig):
        return model, False, ()
    if str(model).endswith((".yaml", ".yml")):
        loaded = load_config(model, entries)
        return loaded.config, False, tuple(shown(note) for note in loaded.notes)
    loaded = load_text(_DEFAULTS, _PLACE, [*entries, Entry("model_name_or_path", str(model), _PLACE)])
    return loaded.config, True, tuple(shown(note) for note in loaded.notes)


def _sized(job: Job, row_tokens: int | None, visual_tokens: int | None) -> Job:
    """The job with rows of at most `row_tokens`."""
    if row_tokens is None:
        return job
    if not 0 < row_tokens <= job.row_tokens:
        raise ValueError(
            say(
                f"row_tokens ({row_tokens}) must be between 1 and max_seq_len ({job.row_tokens}); lower it",
                f"row_tokens（{row_tokens}）须在 1 与 max_seq_len（{job.row_tokens}）之间；请调小",
            )
        )
    shorter = job.replace(row_tokens=row_tokens)
    if visual_tokens is None:
        return shorter.replace(visual_tokens=min(job.visual_tokens, shorter.tokens // 2))
    return shorter


def _this_machine(card: Card) -> Card:
    """The CPU "card" with this machine's memory, where the system tells it."""
    file = Path("/proc/meminfo")
    if not file.is_file():
        return card
    kib = next(int(line.split()[1]) for line in file.read_text().splitlines() if line.startswith("MemTotal:"))
    return Card(**{**vars(card), "name": "cpu (this machine)", "memory_bytes": kib * 1024.0})


def _better(job: Job, card: Card, chosen: Plan) -> Plan | None:
    """A layout on as many cards that fits where the chosen one does not, or is faster by a
    tenth.
    """
    if card.is_cpu:
        return None
    other = best(job, card, chosen.layout.world)
    if other.layout == chosen.layout or not other.fits:
        return None
    if other.tight and chosen.fits and not chosen.tight:
        return None
    return other if not chosen.fits or other.speed > 1.1 * chosen.speed else None


def _lines(e: Estimate) -> list[str]:
    return [
        *_heading(e),
        "",
        *_memory_lines(e),
        "",
        *_time_lines(e),
        *_advice(e),
        *(str(say("note: {n}", "说明：{n}", n=n)) for n in e.job.notes),
    ]


def _heading(e: Estimate) -> list[str]:
    job, layout = e.job, e.plan.layout
    method = f"{job.method} r={job.lora.r}" if job.lora else job.method
    n = job.visual_tokens
    visual = say(f", {n:,} of them visual", f"，其中视觉 {n:,} 个") if n else say("", "")
    spelled = " ".join(f"{k}: {v}," for k, v in layout.settings().items()).rstrip(",")
    spelled = f"  ({spelled})" if spelled else ""
    how = say("chosen", "自动选择") if e.searched else say("as set", "按设置")
    every, trained = _values(parameter_count(job.model)), _values(trained_values(job))
    recompute, where = str(job.recompute).lower(), f"{layout.world} x {e.card.name}"
    said = [
        say(
            f"{job.name}: {every} parameters, {trained} trained by {job.stage} {method}",
            f"{job.name}：{every} 参数，{job.stage} {method} 训练其中 {trained}",
        ),
        say(
            "micro-batch: {n:,} tokens{visual}; x {times} accumulated; recompute: {recompute}",
            "微批：{n:,} 个 token{visual}；累积 {times} 次；recompute: {recompute}",
            n=job.tokens,
            visual=visual,
            times=job.accumulation,
            recompute=recompute,
        ),
        say("layout ({how}): {l} on {w}{s}", "并行布局（{how}）：{l}，{w}{s}", how=how, l=layout, w=where, s=spelled),
    ]
    return list(map(str, said))


def _values(count: float) -> str:
    """`28.405 B`, and of small models `4.93 M`."""
    return f"{count / 1e9:,.3f} B" if count >= 1e8 else f"{count / 1e6:,.2f} M"


def _memory_lines(e: Estimate) -> list[str]:
    m, out = e.plan.memory, []
    for name, chinese, gb in rows(m.items):
        out.append(f"  {padded(say(name, chinese), 20)}{abs(gb) if abs(gb) < 0.005 else gb:>9.2f}".rstrip())
    several = len(m.stages) > 1
    worst = say(f", pipeline stage {m.stage} of {len(m.stages)}", f"，最重的流水段 {m.stage} / {len(m.stages)}")
    verdict = str(say("fits", "可行") if e.plan.fits else say("DOES NOT FIT", "显存不足"))
    verdict += str(say(", tightly: keep some reserve", "，余量很小：请留出余地")) if e.plan.tight else ""
    host_gb = m.host_bytes / GB
    host = say(
        f"  main memory of a machine for offloaded states: {host_gb:,.0f} GB",
        f"  存放卸载状态的主机内存：{host_gb:,.0f} GB",
    )
    disk_gb = base_bytes(e.job.replace(quantize="none", element_bytes=2)) / GB
    total = padded(say("total", "合计"), 20)
    return [
        str(say("memory of one card, GB{w}", "单卡显存，GB{w}", w=worst if several else "")),
        *out,
        f"  {total}{e.card_gb:>9.2f}   / {e.card.memory_bytes / GB:.1f}: {verdict}",
        *([str(host)] if m.host_bytes else []),
        str(
            say(
                f"  disk: weights {disk_gb:,.1f} GB in bfloat16; an export needs as much again",
                f"  磁盘：bfloat16 权重 {disk_gb:,.1f} GB；导出还需同样大小",
            )
        ),
    ]


def _time_lines(e: Estimate) -> list[str]:
    t = e.plan.time
    if t is None:
        unknown = say(
            "time: the speed of this CPU is not known here; `ernie-tune train FILE --dry-run` and the first steps tell it",
            "时间：此处不知道本机 CPU 的速度；请看 `ernie-tune train FILE --dry-run` 和最初几步",
        )
        return [str(unknown)]
    parts = [
        (say("vision tower", "视觉塔"), t.vision),
        (say("offload", "卸载"), t.offload),
        (say("update", "更新"), t.update),
        (say("sampling", "采样"), t.sampling),
    ]
    more = "".join(f", {name} {seconds:.2f} s" for name, seconds in parts if seconds >= 0.005)
    arithmetic, communication, speed = t.compute * 1e3, t.communication * 1e3, t.tokens_per_second_per_card
    said = [
        say("time of a step, predicted from published speeds", "每步时间（由公开速度预测）"),
        say(
            f"  {t.seconds:.2f} s: per micro-batch {arithmetic:.0f} ms arithmetic + {communication:.0f} ms "
            f"communication, bubble {t.bubble:.0%}{more}",
            f"  {t.seconds:.2f} s：每微批计算 {arithmetic:.0f} ms + 通信 {communication:.0f} ms，空泡 {t.bubble:.0%}{more}",
        ),
        say(
            f"  {t.tokens:,} tokens a step, {speed:,.0f} tokens/s a card, {t.flops:.2e} FLOP, MFU {t.mfu:.1%}",
            f"  每步 {t.tokens:,} 个 token，每卡每秒 {speed:,.0f} 个，{t.flops:.2e} FLOP，MFU {t.mfu:.1%}",
        ),
    ]
    return list(map(str, said))


def _advice(e: Estimate) -> list[str]:
    out: list[str] = []
    if not e.card.bf16 and not e.card.is_cpu:
        out.append(
            say(
                f"{e.card.name} has no bfloat16: this model does not train on it; use it for tiny models, "
                "data checks and configuration",
                f"{e.card.name} 不支持 bfloat16：该模型无法在其上训练；可用于小模型、数据检查和配置",
            )
        )
    if e.better:
        p = e.better
        spelled = " ".join(f"{k}: {v}," for k, v in p.layout.settings().items()).rstrip(",")
        out.append(
            say(
                f"better on as many cards: {p.layout}, {p.memory.total / GB:.1f} GB, {p.speed:,.0f} tokens/s a card ({spelled})",
                f"同样卡数下更优的布局：{p.layout}，{p.memory.total / GB:.1f} GB，每卡每秒 {p.speed:,.0f} 个 token（{spelled}）",
            )
        )
    if not e.fits:
        out.append(
            say("it would fit with:", "以下任一组修改后可行：")
            if e.changes
            else say("no three changes make it fit", "三处修改之内无法放下")
        )
        out += [f"  {number}. {'; '.join(texts)}" for number, texts in enumerate(e.changes, 1)]
    return out
