"""What a run shows afterwards: a page of held-out rows before and after training, and the model card.

The page needs no network and no script library: small pictures are inside it, large ones are copied beside it. Labels are Chinese and English, a
button switches. Everything that comes from data is escaped. Refuses to know: models, how answers were made or scored, paddle.
Sources: ecosystem.md 4.5 (README.md), 5 row 26 (before/after on the same rows).
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from ernie_tune.report.log import write_atomically
from ernie_tune.rewards.scores import Confusion

Picture = str | Path | bytes  # a file, a data URL, a web address (never fetched), or encoded bytes
_MAGIC = {
    b"\x89PNG": "image/png",
    b"\xff\xd8\xff": "image/jpeg",
    b"GIF8": "image/gif",
    b"BM": "image/bmp",
    b"RIFF": "image/webp",
}
_EMBEDDED_BYTES = 200_000
_PACKAGES = ("ernie-tune", "paddlepaddle", "paddlepaddle-gpu", "numpy", "safetensors", "sentencepiece", "pillow")


@dataclass(frozen=True)
class ReportRow:
    """One held-out row. Scores are in [0, 1]: 1 right, 0 wrong, between: partly; None where nothing scored it."""

    question: str
    reference: str
    before: str
    after: str
    before_score: float | None = None
    after_score: float | None = None
    images: tuple[Picture, ...] = ()
    source: str = ""  # file:line

    @property
    def change(self) -> str:
        """fixed, broken, right, wrong, or other where a score is missing or the answers are partly right alike."""
        if self.before_score is None or self.after_score is None:
            return "other"
        if self.before_score == self.after_score:
            return {1.0: "right", 0.0: "wrong"}.get(self.after_score, "other")
        return "fixed" if self.after_score > self.before_score else "broken"


_WORDS = {
    "title": ("Before and after training", "训练前后对比"),
    "question": ("Question", "问题"),
    "reference": ("Reference", "参考答案"),
    "before": ("Before", "训练前"),
    "after": ("After", "训练后"),
    "metric": ("Metric", "指标"),
    "delta": ("Change", "变化"),
    "all": ("All", "全部"),
    "fixed": ("Better", "变好"),
    "broken": ("Worse", "变差"),
    "right": ("Right both times", "一直正确"),
    "wrong": ("Wrong both times", "一直错误"),
    "other": ("Unchanged", "无变化"),
    "confusion": ("Classes: what was answered for which", "分类：各类被答成了什么"),
    "gold": ("Reference ↓ / answer →", "参考 ↓ / 回答 →"),
    "none": ("no class", "未匹配"),
    "classes": ("Scores of each class", "各类得分"),
    "precision": ("Precision", "精确率"),
    "recall": ("Recall", "召回率"),
    "f1": ("F1", "F1"),
    "support": ("Rows", "行数"),
    "missing": ("cannot be shown", "无法显示"),
    "empty": ("(empty)", "（空）"),
}


def _word(key: str) -> str:
    english, chinese = _WORDS[key]
    return f'<span class="en">{escape(english)}</span><span class="zh">{escape(chinese)}</span>'


def write_before_after(
    path: Path,
    rows: Sequence[ReportRow],
    before: Mapping[str, float],
    after: Mapping[str, float],
    *,
    confusions: Mapping[str, Confusion] | None = None,
    title: str = "",
) -> None:
    """Write the page to `path`, large pictures to `<stem>_files/` beside it. `confusions`: "before" and "after", where the rows have classes."""
    order = ("broken", "fixed", "wrong", "other", "right")
    counts = {change: sum(row.change == change for row in rows) for change in order}
    buttons = [f'<label><input type="radio" name="f" value="all" checked>{_word("all")} <b>{len(rows)}</b></label>']
    for change in (c for c in order if counts[c]):
        radio = f'<input type="radio" name="f" value="{change}">'
        buttons.append(f'<label class="{change}">{radio}{_word(change)} <b>{counts[change]}</b></label>')
    files = path.with_name(f"{path.stem}_files")
    cards = [_card(row, files) for row in sorted(rows, key=lambda row: order.index(row.change))]
    tables = [_confusion(key, table) for key, table in (confusions or {}).items()]
    body = [
        f"<header><h1>{_word('title')}</h1><button onclick=\"document.body.classList.toggle('chinese')\">中文 / English</button></header>",
        f"<p class=sub>{escape(title)}</p>" if title else "",
        _metrics(before, after),
        *tables,
        f"<nav>{''.join(buttons)}</nav>",
        f"<main>{''.join(cards)}</main>",
    ]
    page = '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">\n'
    page += (
        f"<title>{escape(title or _WORDS['title'][0])}</title>\n<style>{_STYLE}</style></head>\n<body>{''.join(body)}\n"
    )
    write_atomically(path, f"{page}<script>{_SCRIPT}</script></body></html>\n")


def _card(row: ReportRow, files: Path) -> str:
    pictures = "".join(_picture(picture, files) for picture in row.images)
    return (
        f'<article class="{row.change}"><div class=pics>{pictures}</div><div class=text>'
        f"<p class=q>{_lines(row.question)}</p><dl>"
        f"<dt>{_word('reference')}</dt><dd>{_lines(row.reference)}</dd>"
        f"<dt>{_word('before')} {_mark(row.before_score)}</dt><dd>{_lines(row.before)}</dd>"
        f"<dt>{_word('after')} {_mark(row.after_score)}</dt><dd>{_lines(row.after)}</dd></dl>"
        f"<p class=src>{escape(row.source)}</p></div></article>\n"
    )


def _lines(text: str) -> str:
    return escape(text) if text.strip() else f"<i>{_word('empty')}</i>"


def _mark(score: float | None) -> str:
    if score is None:
        return ""
    kind, sign = ("ok", "✓") if score == 1 else ("no", "✗") if score == 0 else ("part", f"{score:.2f}")
    return f'<span class="mark {kind}">{sign}</span>'


def _picture(picture: Picture, files: Path) -> str:
    """An <img>, or a box with the name of what cannot be shown: missing files, videos, web addresses."""
    if isinstance(picture, str) and picture.startswith("data:image/"):
        return f'<img src="{escape(picture)}" loading="lazy" alt="">'
    shown = Path(picture) if isinstance(picture, str | Path) else None
    data = picture if isinstance(picture, bytes) else shown.read_bytes() if shown and shown.is_file() else b""
    kind = next((mime for magic, mime in _MAGIC.items() if data.startswith(magic)), "")
    if not kind:
        name = "" if isinstance(picture, bytes) else str(picture)[:200]
        return f"<div class=gone>{escape(name)}<br>{_word('missing')}</div>"
    if len(data) <= _EMBEDDED_BYTES:
        source = f"data:{kind};base64,{base64.b64encode(data).decode()}"
    else:
        files.mkdir(parents=True, exist_ok=True)
        name = f"{hashlib.sha256(data).hexdigest()[:16]}.{kind.removeprefix('image/')}"
        (files / name).write_bytes(data)
        source = f"{files.name}/{name}"
    return f'<img src="{escape(source)}" loading="lazy" alt="">'


def _metrics(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """The table of all scores. More is better except for names that end in loss."""
    rows = []
    for name in dict.fromkeys([*before, *after]):
        a, b = before.get(name), after.get(name)
        delta = b - a if a is not None and b is not None else None
        gain = delta is not None and (-delta if name.endswith("loss") else delta)
        kind = "ok" if gain > 0 else "no" if gain < 0 else ""
        cells = (escape(name), _number(a), _number(b), f"<b class='{kind}'>{_number(delta, '+')}</b>")
        rows.append("<tr><td>" + "<td>".join(cells))
    head = "".join(f"<th>{_word(key)}" for key in ("metric", "before", "after", "delta"))
    return f"<table><tr>{head}{''.join(rows)}</table>" if rows else ""


def _number(value: float | None, sign: str = "") -> str:
    return "–" if value is None else format(value, f"{sign}.4f")


def _confusion(key: str, table: Confusion) -> str:
    top = max(max(row) for row in table.counts) or 1
    head = "".join(f"<th>{escape(label)}" for label in table.labels) + f"<th>{_word('none')}"
    rows = []
    for i, (label, counts) in enumerate(zip(table.labels, table.counts, strict=True)):
        # Green on the diagonal, red off it, stronger where more rows are.
        colours = ((22, 163, 74) if i == j else (220, 38, 38) for j in range(len(counts)))
        cells = zip(counts, colours, strict=True)
        shade = "".join(f'<td style="background:rgba({r},{g},{b},{0.6 * n / top:.2f})">{n}' for n, (r, g, b) in cells)
        rows.append(f"<tr><th>{escape(label)}{shade}")
    scores = [
        f"<tr><th>{escape(label)}"
        + "".join(f"<td>{s[k]:.3f}" for k in ("precision", "recall", "f1"))
        + f"<td>{s['support']:.0f}"
        for label, s in table.per_class().items()
    ]
    names = "".join(f"<th>{_word(name)}" for name in ("precision", "recall", "f1", "support"))
    return (
        f"<details{' open' if key == 'after' else ''}><summary>{_word('confusion')} · {_word(key)}: {table.accuracy:.1%}</summary>"
        f"<div class=scroll><table class=conf><tr><th>{_word('gold')}{head}{''.join(rows)}</table></div>"
        f"<div class=scroll><table class=conf><tr><th>{_word('classes')}{names}{''.join(scores)}</table></div></details>"
    )


_STYLE = """
body{font:15px/1.55 system-ui,-apple-system,'Segoe UI',Roboto,'Noto Sans SC','PingFang SC','Microsoft YaHei',sans-serif;color:#0f172a;background:#f8fafc;
 max-width:1060px;margin:0 auto;padding:24px 20px 60px}
.zh,.chinese .en{display:none}.chinese .zh{display:inline}
header{display:flex;justify-content:space-between;align-items:center}h1{font-size:22px;margin:0}.sub{color:#475569;margin:4px 0 18px}
button{border:1px solid #cbd5e1;background:#fff;border-radius:8px;padding:6px 12px;cursor:pointer}
table{border-collapse:collapse;background:#fff;border:1px solid #e2e8f0;border-radius:10px;margin:14px 0;font-variant-numeric:tabular-nums}
th,td{padding:7px 16px;text-align:right;border-bottom:1px solid #eef2f7;font-weight:400}th{color:#475569;font-size:13px}
th:first-child,td:first-child{text-align:left}.conf td{text-align:center;min-width:34px}.scroll{overflow-x:auto}
details{margin:10px 0}summary{cursor:pointer;color:#334155}b.ok{color:#15803d}b.no{color:#b91c1c}
nav{display:flex;flex-wrap:wrap;gap:8px;margin:22px 0 14px}nav label{background:#fff;border:1px solid #e2e8f0;border-radius:999px;padding:5px 14px;cursor:pointer}
nav label:has(:checked){background:#0f172a;color:#fff}nav input{position:absolute;opacity:0}
article{display:flex;gap:18px;background:#fff;border:1px solid #e2e8f0;border-left:5px solid #cbd5e1;border-radius:12px;padding:16px;margin:12px 0}
article.fixed,article.right{border-left-color:#22c55e}article.broken,article.wrong{border-left-color:#ef4444}
.pics{flex:0 0 220px;display:flex;flex-direction:column;gap:8px}.pics:empty{display:none}.pics img{max-width:220px;max-height:260px;border-radius:8px}
.gone{border:1px dashed #cbd5e1;border-radius:8px;padding:14px;color:#64748b;font-size:12.5px;word-break:break-all}
.text{flex:1;min-width:0}.q{font-weight:600;margin:0 0 10px;white-space:pre-wrap;overflow-wrap:anywhere}
dl{display:grid;grid-template-columns:max-content 1fr;gap:6px 16px;margin:0}dt{color:#64748b}dd{margin:0;white-space:pre-wrap;overflow-wrap:anywhere}
.mark{font-weight:700}.mark.ok{color:#16a34a}.mark.no{color:#dc2626}.mark.part{color:#ca8a04}.src{color:#94a3b8;font-size:12px;margin:10px 0 0}
@media(max-width:640px){article{flex-direction:column}.pics{flex-basis:auto}}
@media print{nav,button{display:none}}
"""
_SCRIPT = """
if((navigator.language||'').startsWith('zh'))document.body.classList.add('chinese');
document.querySelector('nav').addEventListener('change',e=>document.querySelectorAll('article').forEach(a=>
 a.style.display=e.target.value==='all'||a.className===e.target.value?'':'none'));
"""


@dataclass(frozen=True)
class DataFile:
    """One file of the run: where it was, what was in it, how many rows were used."""

    path: str
    sha256: str
    rows: int


def describe_file(path: Path, rows: int) -> DataFile:
    """Hash a file in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        for piece in iter(lambda: stream.read(1 << 20), b""):
            digest.update(piece)
    return DataFile(str(path), digest.hexdigest(), rows)


def environment() -> dict[str, str]:
    """Versions that a run depends on: Python, system, packages. Packages that are not installed are left out; nothing is imported."""
    found = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@dataclass(frozen=True)
class ModelCard:
    """What README.md tells. `arguments` are those of ernie_tune_args.yaml; `commands`: purpose -> what to type, in the order of use."""

    name: str
    base_model: str
    method: str  # e.g. "SFT, LoRA rank 8"
    data: Sequence[DataFile]
    arguments: Mapping[str, Any]
    before: Mapping[str, float] = field(default_factory=dict)
    after: Mapping[str, float] = field(default_factory=dict)
    commands: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=environment)
    licence: str = "apache-2.0"


def usage(folder: str, adapter: bool) -> dict[str, str]:
    """Commands for a finished run in `folder`: talk to it, score it again, repeat the run. `adapter`: the folder holds an adapter, no whole model."""
    settings = f"{folder}/ernie_tune_args.yaml"
    result = "lora_path" if adapter else "model_name_or_path"
    return {
        "Talk to it": f"ernie-tune chat {folder}",
        "Score it again": f"ernie-tune eval {settings} --{result} {folder}",
        "Repeat the run": f"ernie-tune train {settings} --output_dir {folder}-again",
    }


def model_card(card: ModelCard) -> str:
    """README.md with the metadata block that model hubs read. Values from data cannot break its tables."""
    front = {"base_model": card.base_model, "library_name": "ernie_tune", "license": card.licence}
    metrics = [
        (name, _number(card.before.get(name)), _number(card.after.get(name)))
        for name in dict.fromkeys([*card.before, *card.after])
    ]
    parts = [
        "---\n"
        + "".join(f"{key}: {_quoted(value)}\n" for key, value in front.items())
        + "pipeline_tag: image-text-to-text\n---",
        f"# {_inline(card.name)}\n\n{_inline(card.method)} of `{_inline(card.base_model)}` with ernie_tune.",
        _section("Results on held-out rows", ("metric", "before", "after"), metrics),
        _section("Data", ("file", "rows", "sha256"), [(f.path, str(f.rows), f.sha256) for f in card.data]),
        "\n\n".join(["## Use", *(f"{_inline(what)}:\n\n```bash\n{how}\n```" for what, how in card.commands.items())]),
        _section("Arguments", ("name", "value"), [(k, _shown(v)) for k, v in card.arguments.items()]),
        _section("Environment", ("", "version"), list(card.environment.items())),
        "## Licence\n\n"
        f"These weights derive from `{_inline(card.base_model)}` and stay under its licence, here stated as {_inline(card.licence)}; "
        "the licences of the data files above apply to what was learned from them.",
    ]
    return "\n\n".join(part for part in parts if part not in ("", "## Use")) + "\n"


def write_model_card(path: Path, card: ModelCard) -> None:
    """Write README.md."""
    write_atomically(path, model_card(card))


def _section(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(map(_inline, row))} |" for row in rows]
    return "\n".join([f"## {title}\n", f"| {' | '.join(head)} |", "|" + "---|" * len(head), *lines]) if rows else ""


def _inline(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("`", "'")


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _quoted(text: str) -> str:
    return '"' + " ".join(text.split()).replace("\\", "\\\\").replace('"', '\\"') + '"'
