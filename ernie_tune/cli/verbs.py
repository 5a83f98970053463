"""The table of verbs and what verbs share. A new verb is one line here and one
function.

Refuses to know what a verb does: its module is imported when the verb runs.
"""

from __future__ import annotations

import glob
import importlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ernie_tune.config.language import Text, say

if TYPE_CHECKING:
    from ernie_tune.config.loader import Entry


class UsageError(ValueError):
    """The command line itself is wrong: exit code 2. Wrong settings and data are plain ValueErrors:
    exit code 1.
    """


@dataclass(frozen=True)
class Verb:
    """A word of the command line. `target`: "module:function", a function of the remaining words
    that returns the exit code; its docstring is the verb's help.
    """

    name: str
    target: str
    help: str
    aliases: tuple[str, ...] = ()

    def load(self) -> Callable[[list[str]], int]:
        module, _, function = self.target.partition(":")
        found: Callable[[list[str]], int] = vars(importlib.import_module(module))[function]
        return found


VERBS = (
    Verb(
        "train",
        "ernie_tune.cli.train:run",
        say("fine-tune a model as a YAML file says", "按 YAML 文件微调模型"),
        ("sft",),
    ),
    Verb("dpo", "ernie_tune.cli.train:dpo", say("learn from pairs of answers", "从成对的回答中学习")),
    Verb("kto", "ernie_tune.cli.train:kto", say("learn from answers called good or bad", "从标为好或坏的回答中学习")),
    Verb(
        "upo",
        "ernie_tune.cli.train:upo",
        say("learn from pairs, rankings, ratings and labels together", "从成对、排序、评分和标签中一起学习"),
    ),
    Verb("reward", "ernie_tune.cli.train:reward", say("train a reward model", "训练奖励模型"), ("rm",)),
    Verb(
        "rlvr",
        "ernie_tune.cli.train:rlvr",
        say("sample answers and learn from rewards that can be checked", "采样回答，从可验证的奖励中学习"),
        ("grpo",),
    ),
    Verb(
        "ppo",
        "ernie_tune.cli.train:ppo",
        say("sample answers and learn from a reward model, with a critic", "采样回答，从奖励模型学习，带价值网络"),
        ("rlhf",),
    ),
    Verb("score", "ernie_tune.cli.score:run", say("score answers with a reward model", "用奖励模型给回答打分")),
    Verb(
        "eval",
        "ernie_tune.cli.train:evaluate",
        say("loss and scores of a model on held-out rows", "模型在评测数据上的损失与得分"),
    ),
    Verb(
        "predict",
        "ernie_tune.cli.predict:run",
        say("answer every row of a file, into a file", "回答文件中的每一行，结果写入文件"),
        ("infer", "generate"),
    ),
    Verb(
        "chat",
        "ernie_tune.cli.chat:run",
        say("talk to a model in the terminal, with /image", "在终端与模型对话，可用 /image 附图"),
    ),
    Verb(
        "serve",
        "ernie_tune.cli.serve:run",
        say("answer OpenAI's API with a model and its adapters", "以 OpenAI 接口提供模型及其适配器的服务"),
        ("server", "api", "deploy"),
    ),
    Verb(
        "ui",
        "ernie_tune.cli.ui:run",
        say("a studio in the browser: data, training, curves, judging", "浏览器中的工作室：数据、训练、曲线与评判"),
        ("webui", "web-ui", "studio"),
    ),
    Verb(
        "judge",
        "ernie_tune.cli.ui:judge",
        say("judge answers by hand; what you say becomes training rows", "人工评判回答，结果成为训练数据"),
    ),
    Verb(
        "export",
        "ernie_tune.cli.export:run",
        say(
            "merge, convert or quantise a model into a checked folder that serves",
            "合并、转换或量化模型，导出经过校验、可部署的文件夹",
        ),
        ("merge", "quantize", "split"),
    ),
    Verb(
        "download",
        "ernie_tune.cli.hubs:download",
        say("fetch a model from a hub, checked", "从模型库下载模型并核对"),
    ),
    Verb(
        "push",
        "ernie_tune.cli.hubs:push",
        say("put a model or adapter into a hub, private by default", "将模型或适配器上传到模型库，默认私有"),
        ("upload",),
    ),
    Verb("plot", "ernie_tune.cli.plot:run", say("draw the curves of one or several runs", "绘制一次或多次运行的曲线")),
    Verb(
        "demo",
        "ernie_tune.cli.demo:run",
        say("the first minutes: a small model learns to read digits", "最初几分钟：小模型学会识别数字"),
    ),
    Verb(
        "init",
        "ernie_tune.cli.init:run",
        say("write a commented YAML file and sample rows", "生成带注释的 YAML 文件和示例数据"),
        ("cp",),
    ),
    Verb(
        "estimate",
        "ernie_tune.cli.estimate:run",
        say("memory a card and time a step of a run, without paddle", "估算每卡显存和每步用时，无需 paddle"),
    ),
    Verb(
        "validate",
        "ernie_tune.cli.validate:run",
        say("check a YAML file without loading paddle", "检查 YAML 文件，无需加载 paddle"),
    ),
    Verb(
        "data",
        "ernie_tune.cli.data:run",
        say("check, show, count or convert training data", "检查、查看、统计或转换训练数据"),
    ),
    Verb(
        "doctor",
        "ernie_tune.cli.doctor:run",
        say("describe this machine, to paste into an issue", "描述本机环境，便于粘贴到 issue"),
        ("env",),
    ),
    Verb("version", "ernie_tune.cli.main:version", say("print the version", "显示版本")),
    Verb("help", "ernie_tune.cli.main:help_", say("explain a verb or a setting", "解释一个命令或设置")),
)


def find_verb(word: str) -> Verb:
    """The verb that `word` names. Raises UsageError with the nearest name."""
    by_word = {name: verb for verb in VERBS for name in (verb.name, *verb.aliases)}
    if word not in by_word:
        from ernie_tune.config.convert import did_you_mean

        raise UsageError(
            say(
                f"unknown verb {word!r}{did_you_mean(word, by_word)}; `ernie-tune help` lists the verbs",
                f"未知的命令 {word!r}{did_you_mean(word, by_word)}；`ernie-tune help` 列出所有命令",
            )
        )
    return by_word[word]


def _no_file(word: str) -> Text:
    """That neither a YAML file nor a run is there, and what may be meant."""
    from ernie_tune.config.convert import did_you_mean

    folder = os.path.dirname(word) or "."
    near = glob.glob(os.path.join(glob.escape(folder), "*.y*ml")) if os.path.isdir(folder) else []
    hint = did_you_mean(word, [os.path.relpath(one) if folder == "." else one for one in near])
    here = os.getcwd()
    return say(
        "{word} is not there, seen from {here}{hint}; give a YAML file or the output_dir of a run "
        "(`ernie-tune init` writes a YAML file)",
        "没有 {word}（当前文件夹为 {here}）{hint}；请给出 YAML 文件，或某次运行的 output_dir（`ernie-tune init` 可生成 YAML 文件）",
        word=word,
        here=here,
        hint=hint,
    )


def file_and_settings(args: Sequence[str]) -> tuple[str, list[Entry]]:
    """The one file that `args` must name, and the settings beside it; of the folder of a run, its
    settings file. Raises UsageError for none or several files, and for a folder of something else.
    """
    from ernie_tune.config.loader import ARGS_FILE, split_overrides

    words, entries = split_overrides(args)
    if len(words) != 1:
        raise UsageError(
            say(
                f"expected one YAML file, got {len(words)}: {' '.join(words) or 'nothing'}",
                f"需要一个 YAML 文件，得到 {len(words)} 个：{' '.join(words) or '无'}",
            )
        )
    if not os.path.exists(words[0]):
        raise ValueError(_no_file(words[0]))
    if not os.path.isdir(words[0]):
        return words[0], entries
    file = os.path.join(words[0], ARGS_FILE)
    if not os.path.isfile(file):
        raise UsageError(
            say(
                f"{words[0]} is a folder without {ARGS_FILE}; give a YAML file, or the output_dir of a run",
                f"目录 {words[0]} 中没有 {ARGS_FILE}；请给出 YAML 文件，或某次运行的 output_dir",
            )
        )
    return file, entries
