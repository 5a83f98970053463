"""Everything in an exported folder but the weights: config.json, tokenizer and processor files, the
model card, and `serve.sh`.

Refuses to know: tensors, how weights were made.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ernie_tune.config.atomic import write_atomically
from ernie_tune.config.fastdeploy import FastDeployCommand
from ernie_tune.data.processor import Processor
from ernie_tune.data.templates import RELEASED, Placeholders, with_template
from ernie_tune.data.tokenizer import TEMPLATE_FILE, TEMPLATE_JSON_FILE

# copied byte for byte from the model's folder; what the processor writes itself is not here
COPIED = (
    "generation_config.json",
    "spm.model",
    "ernie_token_100k.model",
    "processor_config.json",
    "video_preprocessor_config.json",
    "LICENSE",
    "NOTICE",
)
_READ_BY = {
    "paddle": "FastDeploy. PaddleFormers, vLLM and transformers read other names: `--layout pt`, `--layout hf`",
    "pt": "FastDeploy, PaddleFormers, vLLM",
    "hf": "transformers 5",
    "packed": "`ernie-tune serve`, and `ernie-tune train` as a frozen base",
}
_THINKING = """
FastDeploy lets the model think unless a request says otherwise, and the server has no switch for it. A
model that was trained without thoughts must be asked with
`"chat_template_kwargs": {"enable_thinking": false}` (with OpenAI's client: in `extra_body`).
"""
CARD, SCRIPT, REPORT = "README.md", "serve.sh", "export_report.json"
_USE = re.compile(r"\n## Use\n[^#]*?ernie-tune chat .*?(?=\n## |\Z)", re.DOTALL)  # of the folder that was exported


def copy_files(
    folders: Sequence[Path], target: Path, processor: Processor, placeholders: Placeholders = RELEASED
) -> list[str]:
    """Tokenizer and processor files to `target`, and those of `COPIED` that one of `folders` (the
    first that has it) holds.

    `placeholders`: those that the layout's readers search for. Returns what was changed in chat
    templates, one line each.
    """
    changes = processor.save_pretrained(target, placeholders)
    ours, variant = processor.template.to_jinja(*placeholders), processor.template.variant
    # of the base model, where an adapter's folder has none
    for name in (TEMPLATE_FILE, TEMPLATE_JSON_FILE):
        folder = next((folder for folder in folders if (folder / name).is_file()), None)
        if folder and not (target / name).is_file():
            held = {name: (folder / name).read_bytes()}
            made, more = with_template(held, str(folder), placeholders, ours, variant, processor.sees)
            write_atomically(target / name, made[name])
            changes += more
    for name in COPIED:
        source = next((folder / name for folder in folders if (folder / name).is_file()), None)
        if source:
            shutil.copyfile(source, target / name)
    generation = target / COPIED[0]
    if not generation.is_file():
        settings = {"do_sample": True, "top_p": 0.7, "temperature": 1.0, "eos_token_id": list(processor.stop_ids)}
        generation.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return changes


def serve_script(command: FastDeployCommand | None) -> str:
    """A shell script that serves the folder it lies in: with FastDeploy, or (None) with our own
    server. PORT and PYTHON may be set from outside.
    """
    head = "#!/usr/bin/env bash\n# Serves the model in this folder. PORT: the HTTP port"
    if command is None:
        return (
            f'{head}.\nset -euo pipefail\ncd "$(dirname "$0")"\nexec ernie-tune serve . --port "${{PORT:-8180}}" "$@"\n'
        )
    words = command.words()
    ports = command.ports()
    shown = []
    for flag, word in zip(["", *words], words, strict=False):
        if flag in ports:
            offset = ports[flag] - command.port
            shown.append(f'"$((PORT + {offset}))"' if offset else '"$PORT"')
        elif flag == "--model":
            shown.append('"$PWD"')
        else:
            shown.append(shlex.quote(word))
    shown[0] = '"${PYTHON:-python}"'
    lines: list[str] = []
    for word in shown:
        if word.startswith("--") and lines:
            lines.append(word)
        elif lines:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    exports = "".join(f"export {name}={value}\n" for name, value in command.environment().items())
    about = "; the three ports above it are used too. Needs FastDeploy 2.3 or newer (fastdeploy-gpu, from Baidu's package index)."
    body = " \\\n  ".join(lines)
    return f'{head}{about}\nset -euo pipefail\ncd "$(dirname "$0")"\nPORT="${{PORT:-{command.port}}}"\n{exports}exec {body} "$@"\n'


def card(existing: str, name: str, report: Mapping[str, Any], shell: str) -> str:
    """README.md: what the model's own folder had, what the export did, and how to use the result,
    the folder `name`.
    """
    own = f"\n## Use\n\nFrom the folder that holds this one:\n\n```bash\nernie-tune chat {shlex.quote(name)}\n```\n"
    existing = _USE.sub(lambda _: own, existing)
    head = existing.split("\n## Export\n")[0].rstrip() or (
        f"---\nlibrary_name: ernie_tune\nlicense: apache-2.0\npipeline_tag: image-text-to-text\n---\n\n# {name}"
    )
    rows = [("layout", report["layout"]), ("read by", _READ_BY[report["layout"]])]
    later = report["quantization"] != "none" and report["layout"] != "packed"
    when = ", when FastDeploy loads it: the weights here are bfloat16" if later else ""
    rows += [("quantization", report["quantization"] + when), ("method", report["method"])]
    rows += [("tensor parallel size it is made for", report["target_tp"])] if report["quantization"] != "none" else []
    rows += [("adapters merged", ", ".join(map(str, report["adapters"])))] if report["adapters"] else []
    rows += [("verification", report["verify"])]
    lines = "\n".join(f"| {key} | {value} |" for key, value in rows)
    table = f"\n```text\n{report['table']}\n```\n" if report.get("table") else ""
    thinking = _THINKING if report["layout"] in ("paddle", "pt") else ""
    notes = "".join(f"\nNote: {note}\n" for note in report.get("notes", ()))
    serve = f"Serve it with `bash {SCRIPT}`, which runs\n\n```bash\n{shell}\n```\n{thinking}"
    if report["unservable"]:
        serve = f"FastDeploy cannot serve it, see above; `ernie-tune serve {shlex.quote(name)}` does.\n"
    return (
        f"{head}\n\n## Export\n\n| | |\n|---|---|\n{lines}\n{table}{notes}\n{serve}\n"
        f"`{REPORT}` holds the checks, the errors of every class of layers and the sha256 of every file.\n"
    )


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file in the folder, the report aside."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != REPORT):
        digest = hashlib.sha256()
        with path.open("rb") as stream:
            for piece in iter(lambda: stream.read(1 << 20), b""):
                digest.update(piece)
        found[str(path.relative_to(folder))] = digest.hexdigest()
    return found
