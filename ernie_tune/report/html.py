"""The kit of all pages: one frame with its colours (light and dark, as the system asks), a switch
between English and Chinese, tables, pictures, clips.

A page needs no network and no script library, and stays readable without scripts. Everything lies
in one element with its own class, so that a page shown inside a notebook leaves the notebook's
style alone. Everything that comes from data is escaped. Refuses to know: what a page tells, models,
paddle.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageSequence, UnidentifiedImageError

from ernie_tune.config.language import Text, say

Picture = str | Path | bytes  # a file, a data URL, a web address (never fetched), or encoded bytes
Clip = Picture | tuple[Picture, ...]  # an animation, or its frames
_MAGIC = {
    b"\x89PNG": "image/png",
    b"\xff\xd8\xff": "image/jpeg",
    b"GIF8": "image/gif",
    b"BM": "image/bmp",
    b"RIFF": "image/webp",
}
_EMBEDDED_BYTES = 200_000
_FRAMES = 3
_THUMBNAIL, _TINY = 320, 32  # pixels of the longer side
_MOST_PIXELS = 50_000_000  # of a picture that is made smaller
_TINY_BYTES = 4_000  # a picture with more is not looked at for its size
_MISSING = say("cannot be shown", "无法显示")


def both(text: Text) -> str:
    """A text that the page's switch turns: both languages, of which the style shows one."""
    return f'<span class="en">{escape(text.english)}</span><span class="zh">{escape(text.chinese)}</span>'


def lines(text: str, empty: Text) -> str:
    """A text from data; `empty` where it has nothing to see."""
    return escape(text) if text.strip() else f"<i>{both(empty)}</i>"


def page(title: Text, subtitle: str, body: Iterable[str], script: str = "") -> str:
    """A whole page. `script` may speak of `page`, the element that holds it."""
    head = (
        '<!doctype html>\n<html lang="en" class="ernie-tune-page"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width"><meta name="color-scheme" content="light dark">'
        f"<title>{escape(subtitle or title.english)}</title>\n<style>{STYLE}</style></head>\n<body>"
    )
    top = f"<header><h1>{both(title)}</h1><button type=button>中文 / English</button></header>"
    sub = f"<p class=sub>{escape(subtitle)}</p>" if subtitle else ""
    inside = f"{top}{sub}{''.join(body)}\n<script>(page=>{{{_SCRIPT}{script}}})(document.currentScript.parentElement);</script>"
    return f'{head}<div class="ernie-tune">{inside}</div></body></html>\n'


def facts(rows: Iterable[tuple[Text, str]]) -> str:
    """A list of names and values; the values are HTML."""
    cells = "".join(f"<dt>{both(name)}</dt><dd>{value}</dd>" for name, value in rows)
    return f"<dl class=facts>{cells}</dl>" if cells else ""


class Cell(NamedTuple):
    """A cell of a table with attributes of its own."""

    html: str
    attributes: str


def table(head: Sequence[str], rows: Iterable[Sequence[str | Cell]], kind: str = "") -> str:
    """A table that scrolls by itself where the screen is narrow. Cells are HTML."""
    cells = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f'<div class=scroll><table class="{kind}"><tr>{cells}</tr>{body}</table></div>' if body else ""


def _cell(cell: str | Cell) -> str:
    return f"<td {cell.attributes}>{cell.html}</td>" if isinstance(cell, Cell) else f"<td>{cell}</td>"


def bars(counts: Sequence[tuple[str, int]]) -> str:
    """A horizontal bar for each count, its label before and its number behind it; as wide as the
    screen lets it.
    """
    highest = max((count for _, count in counts), default=0) or 1
    rows = "".join(
        f'<div class=bar><span title="{escape(label)}">{escape(label)}</span>'
        f'<i style="width:{max(0.3, 100 * count / highest):.1f}%{";opacity:.25" if not count else ""}"></i>'
        f'<b class="{"" if count else "zero"}">{count:,}</b></div>'
        for label, count in counts
    )
    return f"<div class=bars>{rows}</div>"


def media(pictures: Sequence[Picture], clips: Sequence[Clip], files: Path | None, small: bool = False) -> str:
    """Pictures, then clips. `files`: the folder beside the page to which large pictures are copied;
    None, or `small`: they are drawn smaller instead.
    """
    shown = [picture(p, files, small) for p in pictures]
    return "".join([*shown, *(clip(c, files, small) for c in clips)])


def picture(source: Picture, files: Path | None, small: bool = False) -> str:
    """An <img>, or a box with the name of what cannot be shown: missing files, videos, web
    addresses.
    """
    if isinstance(source, str) and source.startswith("data:image/"):
        return _image(source)
    file = Path(source) if isinstance(source, str | Path) else None
    data = source if isinstance(source, bytes) else _read(file)
    kind = next((mime for magic, mime in _MAGIC.items() if data.startswith(magic)), "")
    if not kind:
        name = "" if isinstance(source, bytes) else str(source)[:200]
        return gone(name)
    if small or (files is None and len(data) > _EMBEDDED_BYTES):
        data, kind = _thumbnail(data, kind)
        if not data:
            return gone("" if isinstance(source, bytes) else str(source)[:200])
    if len(data) <= _EMBEDDED_BYTES or files is None:
        return _image(
            f"data:{kind};base64,{base64.b64encode(data).decode()}", len(data) < _TINY_BYTES and _is_tiny(data)
        )
    files.mkdir(parents=True, exist_ok=True)
    name = f"{hashlib.sha256(data).hexdigest()[:16]}.{kind.removeprefix('image/')}"
    (files / name).write_bytes(data)
    return _image(f"{files.name}/{name}")


def gone(name: str) -> str:
    """A box with the name of what is not shown."""
    return f"<div class=gone>{escape(name)}<br>{both(_MISSING)}</div>"


def clip(source: Clip, files: Path | None, small: bool = False) -> str:
    """A small animation moves; of other clips the first, the middle and the last frame are shown
    side by side, of what cannot be opened the name.
    """
    if isinstance(source, tuple):
        chosen = [source[i] for i in _spread(len(source))]
        return f"<div class=clip>{''.join(picture(frame, files, small) for frame in chosen)}</div>" if chosen else ""
    data = source if isinstance(source, bytes) else _read(Path(source) if not str(source).startswith("data:") else None)
    if not data or (data.startswith(b"GIF8") and len(data) <= _EMBEDDED_BYTES):
        return picture(source, files)
    frames = _frames(data)
    return f"<div class=clip>{''.join(picture(f, files) for f in frames)}</div>" if frames else picture(source, files)


def _spread(count: int) -> list[int]:
    return sorted({i * (count - 1) // (_FRAMES - 1) for i in range(_FRAMES)}) if count else []


def _frames(data: bytes) -> list[bytes]:
    """Three frames of an animation as small pictures; none of what Pillow cannot open."""
    try:
        with Image.open(io.BytesIO(data)) as opened:
            count = getattr(opened, "n_frames", 1)
            wanted = _spread(count)
            return [_jpeg(frame) for i, frame in enumerate(ImageSequence.Iterator(opened)) if i in wanted]
    except (OSError, ValueError, UnidentifiedImageError, Image.DecompressionBombError):
        return []


def _is_tiny(data: bytes) -> bool:
    """Whether a picture has so few pixels that it must be drawn larger to be seen."""
    try:
        with Image.open(io.BytesIO(data)) as opened:
            return max(opened.size) < _TINY
    except (OSError, ValueError, UnidentifiedImageError, Image.DecompressionBombError):
        return False


def _thumbnail(data: bytes, kind: str) -> tuple[bytes, str]:
    if len(data) <= _EMBEDDED_BYTES // 10:
        return data, kind
    try:
        with Image.open(io.BytesIO(data)) as opened:
            if opened.width * opened.height > _MOST_PIXELS:  # few bytes that would fill the memory
                return b"", kind
            return _jpeg(opened), "image/jpeg"
    except (OSError, ValueError, UnidentifiedImageError, Image.DecompressionBombError):
        return data, kind


def _jpeg(opened: Image.Image) -> bytes:
    shown = opened.convert("RGB")
    shown.thumbnail((_THUMBNAIL, _THUMBNAIL))
    out = io.BytesIO()
    shown.save(out, "JPEG", quality=85)
    return out.getvalue()


def _read(file: Path | None) -> bytes:
    """Of files alone: a pipe or a device may never end."""
    try:
        return file.read_bytes() if file and file.is_file() else b""
    except (OSError, ValueError):
        return b""


def _image(source: str, tiny: bool = False) -> str:
    return f'<img src="{escape(source)}" loading="lazy" alt=""{" class=tiny" if tiny else ""}>'


STYLE = """
html.ernie-tune-page{background:#f8fafc}html.ernie-tune-page>body{margin:0}
.ernie-tune{--bg:#f8fafc;--card:#fff;--ink:#0f172a;--soft:#475569;--faint:#64748b;--line:#e2e8f0;--ok:#15803d;--no:#b91c1c;--part:#a16207;--bar:#2563eb;
 color-scheme:light;font:15px/1.55 system-ui,-apple-system,'Segoe UI',Roboto,'Noto Sans SC','Noto Sans CJK SC','PingFang SC','Microsoft YaHei',sans-serif;
 color:var(--ink);background:var(--bg);max-width:1060px;margin:0 auto;padding:24px 20px 60px;box-sizing:border-box}
.ernie-tune *{box-sizing:border-box}.ernie-tune a{color:var(--bar)}
.ernie-tune .zh,.ernie-tune.chinese .en{display:none}.ernie-tune.chinese .zh{display:inline}
.ernie-tune header{display:flex;justify-content:space-between;align-items:center;gap:12px}.ernie-tune h1{font-size:22px;margin:0}
.ernie-tune h2{font-size:17px;margin:34px 0 10px}.ernie-tune h3{font-size:14px;margin:0 0 8px;font-weight:600}
.ernie-tune .sub{color:var(--soft);margin:4px 0 14px}.ernie-tune .zero{color:var(--faint)}
.ernie-tune button{border:1px solid var(--line);background:var(--card);color:var(--ink);border-radius:8px;padding:6px 12px;cursor:pointer;font:inherit;
 font-size:13px;white-space:nowrap}
.ernie-tune .facts{display:grid;grid-template-columns:max-content 1fr;gap:2px 16px;margin:14px 0;font-size:14px}
.ernie-tune .facts dt{color:var(--soft)}.ernie-tune .facts dd{margin:0;overflow-wrap:anywhere}
.ernie-tune .scroll{overflow-x:auto;margin:14px 0}
.ernie-tune table{border-collapse:separate;border-spacing:0;background:var(--card);border:1px solid var(--line);border-radius:10px;
 font-variant-numeric:tabular-nums;color:inherit;font-size:inherit}
.ernie-tune th,.ernie-tune td{padding:7px 16px;text-align:right;border:0;border-bottom:1px solid var(--line);font-weight:400;background:none}
.ernie-tune tr:last-child>*{border-bottom:0}.ernie-tune th{color:var(--soft);font-size:13px;white-space:nowrap}
.ernie-tune th:first-child,.ernie-tune td:first-child{text-align:left;overflow-wrap:anywhere}
.ernie-tune .words th,.ernie-tune .words td{text-align:left;vertical-align:top}.ernie-tune .words td:first-child{white-space:nowrap}
.ernie-tune .conf th,.ernie-tune .conf td{text-align:center;min-width:38px;padding:6px 9px}.ernie-tune .conf :first-child{text-align:left}
.ernie-tune details{margin:10px 0}.ernie-tune summary{cursor:pointer;color:var(--soft)}
.ernie-tune .ok{color:var(--ok)}.ernie-tune .no{color:var(--no)}.ernie-tune .part{color:var(--part)}
.ernie-tune nav{display:flex;flex-wrap:wrap;gap:8px;margin:22px 0 14px}
.ernie-tune nav label{background:var(--card);border:1px solid var(--line);border-radius:999px;padding:5px 14px;cursor:pointer;font-size:14px}
.ernie-tune nav label:has(:checked){background:var(--ink);color:var(--bg)}.ernie-tune nav input{position:absolute;opacity:0;pointer-events:none}
.ernie-tune nav label:has(:focus-visible){outline:2px solid var(--bar)}
.ernie-tune article{display:flex;gap:18px;background:var(--card);border:1px solid var(--line);border-left:5px solid var(--line);border-radius:12px;
 padding:16px;margin:12px 0}
.ernie-tune article.fixed,.ernie-tune article.right{border-left-color:#22c55e}
.ernie-tune article.broken,.ernie-tune article.wrong,.ernie-tune article.error{border-left-color:#ef4444}
.ernie-tune article.warning{border-left-color:#eab308}
.ernie-tune .pics{flex:0 0 220px;display:flex;flex-wrap:wrap;gap:8px;align-items:flex-start;align-content:flex-start}.ernie-tune .pics:empty{display:none}
.ernie-tune .pics img{max-width:220px;max-height:260px;border-radius:8px;outline:1px solid var(--line)}
.ernie-tune .pics img.tiny{width:88px;image-rendering:pixelated}
.ernie-tune .clip{display:flex;gap:4px;max-width:220px}.ernie-tune .clip img{min-width:0;flex:1;max-width:33%;height:auto}
.ernie-tune .gone{border:1px dashed var(--line);border-radius:8px;padding:14px;color:var(--soft);font-size:12.5px;word-break:break-all}
.ernie-tune .text{flex:1;min-width:0}.ernie-tune .q{font-weight:600;margin:0 0 10px;white-space:pre-wrap;overflow-wrap:anywhere}
.ernie-tune .turns{display:grid;grid-template-columns:max-content 1fr;gap:6px 16px;margin:0}.ernie-tune .turns dt{color:var(--soft)}
.ernie-tune .turns dd{margin:0;white-space:pre-wrap;overflow-wrap:anywhere;max-height:20em;overflow-y:auto}
.ernie-tune .mark{font-weight:700}.ernie-tune .src{color:var(--faint);font-size:12px;margin:10px 0 0;overflow-wrap:anywhere}
.ernie-tune .said{margin:6px 0;overflow-wrap:anywhere}.ernie-tune ul{padding-left:1.2em;margin:8px 0;overflow-wrap:anywhere}
.ernie-tune .charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:14px}
.ernie-tune .chart{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:14px 16px}
.ernie-tune .bar{display:grid;grid-template-columns:minmax(64px,7em) 1fr 5.5em;gap:10px;align-items:center;font-size:12.5px;line-height:1.6;
 font-variant-numeric:tabular-nums}
.ernie-tune .bar span{text-align:right;color:var(--soft);overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
.ernie-tune .bar i{height:11px;border-radius:3px;background:var(--bar);display:block}.ernie-tune .bar b{font-weight:400}
.ernie-tune .hero{display:flex;flex-wrap:wrap;gap:6px 40px;margin:18px 0 6px}.ernie-tune .hero p{margin:0;color:var(--soft);font-size:13px}
.ernie-tune .hero strong{display:block;font-size:30px;line-height:1.25;color:var(--ink);font-variant-numeric:tabular-nums}
.ernie-tune .hero s{text-decoration:none;color:var(--faint);font-weight:400}
@media(max-width:640px){.ernie-tune{padding:18px 14px 40px}.ernie-tune article{flex-direction:column}.ernie-tune .pics{flex-basis:auto}
 .ernie-tune .turns{grid-template-columns:1fr;gap:0}.ernie-tune .turns dd{margin-bottom:8px}.ernie-tune th,.ernie-tune td{padding:6px 10px}
 .ernie-tune .words,.ernie-tune .words tbody,.ernie-tune .words tr,.ernie-tune .words td{display:block}.ernie-tune .words tr:has(th),
 .ernie-tune .words td:empty{display:none}.ernie-tune .words td{border:0;padding:2px 12px;overflow-wrap:anywhere}
 .ernie-tune .words td:first-child{white-space:normal;font-weight:600;padding-top:8px}.ernie-tune .words tr{border-bottom:1px solid var(--line);padding-bottom:6px}}
@media(prefers-color-scheme:dark){html.ernie-tune-page{background:#0b1220}
 .ernie-tune{--bg:#0b1220;--card:#131c2e;--ink:#e2e8f0;--soft:#a3b1c6;--faint:#8d9bb0;--line:#26334a;--ok:#4ade80;--no:#f87171;--part:#facc15;--bar:#60a5fa;
 color-scheme:dark}}
@media print{.ernie-tune nav,.ernie-tune button{display:none}}
"""
_SCRIPT = """
if((navigator.language||'').toLowerCase().startsWith('zh'))page.classList.add('chinese');
page.querySelector('button').addEventListener('click',()=>page.classList.toggle('chinese'));
"""
