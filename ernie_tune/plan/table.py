"""The table of launch/README.md: what the two released models need on 8 to 64 cards of 80 GB,
beside what their makers ask for.

Refuses to know: how anything is counted. A test compares the file with what this prints.
"""

from __future__ import annotations

from ernie_tune.config.loader import load_text
from ernie_tune.models.presets import preset
from ernie_tune.plan.cards import GB, card
from ernie_tune.plan.job import Job, job_of
from ernie_tune.plan.search import Plan, best

CARDS = (8, 16, 32, 64)
_COMMON = "bf16: true\nrecompute: true\nmax_seq_len: 8192\ngradient_accumulation_steps: 4\nfreeze_config: freeze_vision freeze_aligner\n"
_ALL = "lora_rank: 32\nlora_target_modules: all\nlora_experts: both\n"
# (what is trained, its settings)
METHODS = (
    ("LoRA r 16, attention and shared layers", "lora_rank: 16\n"),
    ("LoRA r 32, every linear layer and expert", _ALL),
    ("the same on WINT4/8", _ALL + "weight_quantize_algo: weight_only_mix\n"),
    ("full", "fine_tuning: Full\n"),
)
# Published minima of ERNIEKit, cards of 80 GB.
PUBLISHED = {
    ("28B", 0): "4",
    ("28B", 1): "4",
    ("28B", 2): "-",
    ("28B", 3): "8",
    ("424B", 0): "16",
    ("424B", 1): "16",
    ("424B", 2): "8",
    ("424B", 3): "-",
}
_MODELS = {"28B": "ernie-4.5-vl-28b-a3b", "424B": "ernie-4.5-vl-424b-a47b"}


def jobs() -> dict[tuple[str, int], Job]:
    """(model, number of the method) -> job: 8,192 tokens, half of them visual."""
    return {
        (short, number): job_of(load_text(f"model: {name}\n{_COMMON}{text}", "table").config, preset(name))
        for short, name in _MODELS.items()
        for number, (_, text) in enumerate(METHODS)
    }


def markdown() -> str:
    """The table, as Markdown."""
    device = card("h800-80g")
    lines = [
        "| model | trained | " + " | ".join(f"{n} cards" for n in CARDS) + " | published minimum |",
        "|---|---|" + "---|" * (len(CARDS) + 1),
    ]
    for (short, number), job in jobs().items():
        cells = [_cell(best(job, device, n)) for n in CARDS]
        lines.append(f"| {short} | {METHODS[number][0]} | {' | '.join(cells)} | {PUBLISHED[short, number]} |")
    return "\n".join(lines)


def _cell(plan: Plan) -> str:
    gb = f"{plan.memory.total / GB:.0f} GB"
    if not plan.fits:
        return f"no: {gb} at least ({plan.layout})"
    speed = f", {plan.speed / 1e3:.1f} K tok/s/card" if plan.time else ""
    return f"**{gb}**{' (tight)' if plan.tight else ''} {plan.layout}{speed}"
