"""`ernie-tune export`: merge, convert, quantise, check, and say how to serve.

Refuses to know how any of it is done; it adds the task's score, which needs the parts that training
measures with.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from typing import Any

from ernie_tune.cli.verbs import UsageError
from ernie_tune.config.cpu import while_paddle_loads
from ernie_tune.config.language import Text, say
from ernie_tune.config.loader import Entry, split_overrides

_SHARD_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
# other tools' names of our options
_ALIASES = {
    "output": "output_dir",
    "out": "output_dir",
    "export_dir": "output_dir",
    "precision": "quantization",
    "tp": "target_tp",
    "export_size": "max_shard_size",
    "calibration": "calib",
}


def run(args: list[str]) -> int:
    """ernie-tune export FOLDER [ADAPTER …] --output_dir OUT [--layout paddle] [--quantization
    wint4] [--calib rows.jsonl] …

    Writes a model folder, with the adapters merged into it, complete and checked: weights,
    tokenizer, model card, serve.sh, export_report.json.
    One adapter alone brings its base model from its settings.

    --layout paddle|pt|hf      Paddle's layout for FastDeploy (default), that of the -PT releases,
                               that of transformers 5
    --quantization none|wint8|wint4|mix    what FastDeploy will quantise to; wint4: experts int4,
                                           the rest int8; mix: vision experts int8 too
    --quantization weight_only_mix|weight_only_int8|weight_only_int4    (with --emit packed) what
                               weight_quantize_algo makes while a run loads, bit for bit: scales of
                               64 rows for int4, nearer to the weights; FastDeploy cannot read it
    --method rtn|clip|gptq     how int4 codes are chosen (default clip); with --calib FILE by what
                               the layers see
    --calib FILE, --calib_rows 128, --eval FILE    rows to choose by, and rows to check and score on
    --target_tp N              cards that will serve together: each has scales of its own
    --emit weights|cache|packed    weights (default); with a load cache for FastDeploy beside them;
                                   or packed codes: a base for `ernie-tune train`, and for
                               `ernie-tune serve`
    --awq 0.25                 fold activation-aware scales into the weights first (needs --calib)
    --max_shard_size 5GB, --port 8180, --verify full|files, --eval_max_samples 200,
    --eval_max_new_tokens 32
    """
    words, entries = split_overrides(args)
    if not words:
        raise UsageError(say("expected a model folder or an adapter, got nothing", "需要模型文件夹或适配器，没有给出"))
    options = _options(entries)
    if "output_dir" not in options:
        raise UsageError(say("--output_dir must be given: the folder to write", "须给出 --output_dir：要写入的文件夹"))
    with while_paddle_loads():
        from ernie_tune.export.run import export

    limits = options.pop("eval_max_samples", 200), options.pop("eval_max_new_tokens", 32)
    rows = options.get("eval") or options.get("calib")
    folder = options.pop("output_dir")
    report = export(words, folder, score=task_score(rows, *limits) if rows else None, **options)
    for note in report["notes"]:
        print(say("note: {note}", "提示：{note}", note=note))
    if report["replaced"]:
        print(say(f"note: the earlier export in {folder} was replaced", f"提示：已替换 {folder} 中原有的导出"))
    later = report["quantization"] != "none" and report["layout"] != "packed"
    told = say(
        "{files} files, {size} MB of {kind}, every check passed; {use}",
        "{files} 个文件，{kind} {size} MB，全部检查通过；{use}",
        files=len(report["sha256"]),
        size=f"{report['weight_bytes'] / 1e6:.1f}",
        kind=say("bfloat16 weights", "bfloat16 权重") if later else say("weights", "权重"),
        use=_use(folder, report),
    )
    print(told)
    return 0


def _use(folder: str, report: Mapping[str, Any]) -> Text:
    """What to do with the result: FastDeploy's command, or ours where its kernels cannot multiply
    with this model.
    """
    if report["unservable"]:
        ours = f"ernie-tune serve {shlex.quote(folder)}"
        return say(
            f"FastDeploy cannot serve this model (see the note), our own server does:\n\n{ours}",
            f"FastDeploy 无法部署该模型（见提示），可用本工具的服务器：\n\n{ours}",
        )
    if report["quantization"] != "none" and report["layout"] != "packed":
        return say(
            f"FastDeploy makes {report['quantization']} of them when it loads; serve it with\n\n{report['command']}",
            f"FastDeploy 加载时转为 {report['quantization']}；部署命令：\n\n{report['command']}",
        )
    if report["layout"] == "packed":
        name = f"model_name_or_path: {folder}"
        return say(
            f"serve it with\n\n{report['command']}\n\nor train an adapter on it: {name}",
            f"部署命令：\n\n{report['command']}\n\n或在其上训练适配器：{name}",
        )
    return say(f"serve it with\n\n{report['command']}", f"部署命令：\n\n{report['command']}")


def _options(entries: list[Entry]) -> dict[str, Any]:
    kinds: dict[str, Callable[[Any], Any]] = {
        "output_dir": str,
        "layout": str,
        "quantization": str,
        "method": str,
        "calib": str,
        "eval": str,
        "calib_rows": int,
        "target_tp": int,
        "emit": str,
        "awq": float,
        "max_shard_size": shard_bytes,
        "verify": str,
        "port": int,
        "eval_max_samples": int,
        "eval_max_new_tokens": int,
    }
    options: dict[str, Any] = {}
    for entry in entries:
        name = _ALIASES.get(entry.name, entry.name)
        if name not in kinds:
            raise UsageError(
                say(
                    f"unknown option {entry.name!r}; export takes {', '.join(kinds)}",
                    f"未知的选项 {entry.name!r}；export 的选项：{', '.join(kinds)}",
                )
            )
        try:
            options[name] = kinds[name](entry.raw)
        except ValueError as error:
            raise UsageError(
                say(
                    f"{name} ({entry.raw!r}) must be a {kinds[name].__name__}: {error}",
                    f"{name}（{entry.raw!r}）须为 {kinds[name].__name__}：{error}",
                )
            ) from error
    if "max_shard_size" in options:
        options["max_shard_bytes"] = options.pop("max_shard_size")
    return options


def shard_bytes(text: str) -> int:
    """ "5GB" or a number of bytes. ValueError for other forms."""
    unit = text[-2:].upper()
    return int(float(text[:-2]) * _SHARD_UNITS[unit]) if unit in _SHARD_UNITS else int(text)


def task_score(path: str, rows: int, max_new_tokens: int) -> Callable[[Any, Any], Mapping[str, float]]:
    """Scores of greedy answers to the rows of a file that end in an answer, by the metrics that fit
    their references.
    """

    def score(model: Any, processor: Any) -> Mapping[str, float]:
        from ernie_tune.data.sources import load_dataset
        from ernie_tune.evaluate.answers import answers, question
        from ernie_tune.rewards.evidence import answer_part
        from ernie_tune.rewards.scores import fitting_metrics, score_answers

        records = load_dataset(path)
        count = min(rows, len(records))
        asked = [question(records[i * len(records) // count]) for i in range(count)]
        references = [answer_part(q.reference) for q in asked]
        given = answers(model, processor, asked, max_new_tokens=max_new_tokens, rows=16)
        return score_answers([answer_part(text) for text in given], references, fitting_metrics(references))

    return score
