"""`ernie-tune help NAME` and `help --all [--html]`: all that is known of settings, from what stands
beside their fields.

Refuses to know: verbs, files but the page it is told to write, what a setting does.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ernie_tune.cli.verbs import VERBS, UsageError
from ernie_tune.config import peers
from ernie_tune.config.aliases import EXPANDED, RENAMED, VALUES
from ernie_tune.config.arguments import SETTINGS, VARYING, RunConfig, Setting, default_for
from ernie_tune.config.atomic import write_atomically
from ernie_tune.config.convert import did_you_mean, to_yaml
from ernie_tune.config.language import Text, join, say
from ernie_tune.config.section_titles import SECTIONS
from ernie_tune.config.sections_model import METHODS
from ernie_tune.config.sections_online import CHECKERS
from ernie_tune.config.stages import STAGES
from ernie_tune.models.presets import PRESETS

PAGE = "ernie_tune_settings.html"


def run(words: list[str]) -> int:
    """`help --all [--html[=PATH.html]]`: every setting, as text, or as a page. Raises UsageError
    for other words.
    """
    pages = [word for word in words if word.split("=")[0] == "--html"]
    if len(words) > len(pages) + 1 or len(pages) > 1:
        raise UsageError(say("help --all takes --html or nothing more", "help --all 之后只能是 --html"))
    if not pages:
        print(everything())
        return 0
    target = Path(pages[0].partition("=")[2] or PAGE)
    write_atomically(target, page())
    print(say(f"wrote {target}", f"已写入 {target}"))
    return 0


def about(word: str) -> str:
    """What is known of a setting, of another tool's name, or of a stage or method. Raises
    UsageError for a word that is none of these.
    """
    name = word.replace("-", "_")
    ours = RENAMED.get(name, name)
    if ours in SETTINGS:
        return "\n".join(map(str, _lines(SETTINGS[ours])))
    if name in EXPANDED:
        return "\n".join(str(line) for line in _expanded(name))
    if name in peers.REFUSED:
        return str(
            say(f"{name}: not a setting here; {{why}}", f"{name}：此处没有；{{why}}", why=peers.REFUSED[name][0])
        )
    why = peers.reason(name)
    if why is not None:
        return str(say(f"{name}: not used here: {{why}}", f"{name}：在此不使用：{{why}}", why=why))
    if word.upper() in STAGES:
        return "\n".join(map(str, _stage_lines(word.upper())))
    verbs = [known for verb in VERBS for known in (verb.name, *verb.aliases)]
    # a verb or stage is short: one wrong letter weighs more in it
    hint = did_you_mean(word, [*verbs, *STAGES], 0.72) or did_you_mean(word, [*SETTINGS, *RENAMED, *EXPANDED])
    raise UsageError(
        say(
            f"no verb or setting is named {word!r}{hint}; `ernie-tune help` lists the verbs, `ernie-tune help --all` the settings",
            f"没有名为 {word!r} 的命令或设置{hint}；`ernie-tune help` 列出命令，`ernie-tune help --all` 列出设置",
        )
    )


def everything() -> str:
    """All settings by section: the methods first, then every setting with values, defaults and
    other spellings.
    """
    out = [str(say("stages of training:", "训练阶段："))]
    for stage in STAGES.values():
        out.append(f"  {stage.name:<6} {say(stage.help, stage.help_zh)}")
    out.append(str(say("methods of fine-tuning:", "微调方法：")))
    out += [f"  {name:<8} {say(*words)}" for name, words in METHODS.items()]
    for section in _sections():
        out += ["", f"### {section}: {SECTIONS[section]}"]
        for setting in SETTINGS.values():
            if setting.section == section:
                first, *rest = _lines(setting)
                out += [str(first), *(f"    {line}" for line in rest)]
    return "\n".join(out)


def page() -> str:
    """The same as a page with a switch of language."""
    from html import escape

    from ernie_tune.report import html

    head = [
        html.both(text)
        for text in (
            say("setting", "设置"),
            say("meaning", "含义"),
            say("default", "默认"),
            say("values", "取值"),
            say("read at", "适用"),
            say("also written", "其他写法"),
        )
    ]
    body = []
    for section in _sections():
        rows = []
        for setting in (s for s in SETTINGS.values() if s.section == section):
            a = setting.about
            note, bounds = _limits(setting), _range(setting)
            told = html.both(bounds) if isinstance(bounds, Text) else escape(bounds)
            meaning = html.both(join("; ", [say(a.help, a.help_zh), *note]))
            values = "<br>".join(
                f"<code>{escape(c)}</code>" + (f" {html.both(say(*a.explained[c]))}" if c in a.explained else "")
                for c in a.choices
            )
            names = ", ".join(f"<code>{escape(n)}</code>" for n in spellings(setting.name))
            where = escape(_where(setting))
            default = "<br>".join(escape(str(line)) for line in _defaults(setting))
            rows.append([f"<code>{setting.name}</code>", meaning, default, values or told, where, names])
        body.append(f"<h2>{section}: {html.both(SECTIONS[section])}</h2>{html.table(head, rows, 'words')}")
    return html.page(say("Settings", "设置"), "ernie_tune", body)


def spellings(name: str) -> list[str]:
    """Names of other tools that mean this setting."""
    expanded = [alias for alias, words in EXPANDED.items() if any(name in meaning for meaning in words.values())]
    return [*(alias for alias, ours in RENAMED.items() if ours == name), *expanded]


def _sections() -> list[str]:
    return [section.name for section in dataclasses.fields(RunConfig)]


def _lines(setting: Setting) -> list[str | Text]:
    a, name = setting.about, setting.name
    lines: list[str | Text] = [f"{name}: {say(a.help, a.help_zh)}"]
    lines.append(say(f"section: {setting.section}", f"分组：{setting.section}"))
    lines += [say("default: {v}", "默认：{v}", v=line) for line in _defaults(setting)]
    if a.choices:
        lines.append(say(f"one of: {', '.join(a.choices)}", f"可取：{', '.join(a.choices)}"))
        lines += [f"  {word}: {say(*words)}" for word, words in a.explained.items()]
    elif _range(setting):
        lines.append(_range(setting))
    if name == "model_name_or_path":
        lines.append(say(f"presets: {', '.join(PRESETS)}", f"预设：{', '.join(PRESETS)}"))
    if name == "reward_funcs":
        lines.append(say(f"checkers: {', '.join(CHECKERS)}", f"检查器：{', '.join(CHECKERS)}"))
    if name == "loss_type":
        lines += [f"  {stage.name}: {', '.join(stage.losses)}" for stage in STAGES.values() if stage.losses]
    if _where(setting):
        lines.append(say("read at: {where}", "适用：{where}", where=_where(setting)))
    lines += _limits(setting)
    words = [f"{other} = {ours}" for other, ours in VALUES.get(name, {}).items() if other and ours]
    lines += [say(f"other words: {', '.join(words)}", f"其他取值写法：{', '.join(words)}")] if words else []
    also = ", ".join(alias for alias, ours in RENAMED.items() if ours == name)
    lines += [say(f"also written: {also}", f"其他写法：{also}")] if also else []
    by = ", ".join(alias for alias in spellings(name) if alias in EXPANDED)
    lines += [say(f"also set by: {by}", f"也可由以下设置：{by}")] if by else []
    return lines


def _defaults(setting: Setting) -> list[str]:
    """The default; where it varies, one line for each value and where it holds."""
    if setting.name not in VARYING:
        return [to_yaml(setting.default)]
    by_method = {
        method: tuple(
            (stage, to_yaml(default_for(setting.name, stage, method)))
            for stage in STAGES
            if setting.read_at(stage, method)
        )
        for method in METHODS
    }
    lines: list[str] = []
    for row in dict.fromkeys(by_method.values()):
        methods = [method for method, other in by_method.items() if other == row]
        which = "" if len(methods) == len(METHODS) else f" ({', '.join(methods)})"
        for value in dict.fromkeys(value for _, value in row):
            stages = ", ".join(stage for stage, v in row if v == value) + which
            lines.append(say(f"{value} at {stages}", f"{value}（{stages}）"))
    return lines


def _range(setting: Setting) -> Text | str:
    low, high = setting.low, setting.high
    kind = {bool: "true | false", int: say("a whole number", "整数"), float: say("a number", "数"), str: ""}[
        setting.kind
    ]
    if low is None and high is None:
        return kind
    bounds = " … ".join(f"{bound:g}" if bound is not None else "" for bound in (low, high)).strip()
    return say("{kind}: {bounds}", "{kind}：{bounds}", kind=kind, bounds=bounds)


def _where(setting: Setting) -> str:
    a = setting.about
    methods = "" if not a.methods else f"fine_tuning {', '.join(a.methods)}"
    losses = "" if not a.losses else f"loss {', '.join(a.losses)}"
    needs = "" if a.needs is None else f"{a.needs[0]} {', '.join(a.needs[1])}"
    stages = "" if not a.stages else f"stage {', '.join(a.stages)}"
    return "; ".join(part for part in (stages, methods, losses, needs) if part)


def _limits(setting: Setting) -> list[Text]:
    a = setting.about
    out = []
    if a.unread:
        out.append(say("has no effect in this version: {why}", "此版本无效：{why}", why=a.unread))
    if a.unbuilt:
        out.append(say("not in this version: {why}", "此版本尚无：{why}", why=a.unbuilt))
    if not a.shapes:
        out.append(say("does not change the loss or the trained weights", "不改变损失与训练结果"))
    return out


def _expanded(name: str) -> list[str]:
    """What each word of a name of others means in ours."""
    lines = [str(say(f"{name}: another tool's name; its words here:", f"{name}：其他工具的名称；在此的含义："))]
    for word, meaning in EXPANDED[name].items():
        told = ", ".join(f"{ours}: {value}" for ours, value in meaning.items()) or str(say("nothing", "无"))
        lines.append(f"  {word}: {told}")
    return lines


def _stage_lines(name: str) -> list[str | Text]:
    stage = STAGES[name]
    lines: list[str | Text] = [f"{name}: {say(stage.help, stage.help_zh)}"]
    lines.append(say(f"rows: {', '.join(stage.signals)}", f"数据：{', '.join(stage.signals)}"))
    if stage.losses:
        lines.append(say(f"loss_type: {', '.join(stage.losses)}", f"loss_type：{', '.join(stage.losses)}"))
    full, adapters = stage.rates
    lines.append(
        say(
            f"learning_rate: Full {full:g}, adapters {adapters:g}", f"learning_rate：Full {full:g}，适配器 {adapters:g}"
        )
    )
    own = [s.name for s in SETTINGS.values() if s.about.stages and name in s.about.stages]
    lines.append(say(f"settings of its own: {', '.join(own)}", f"专用设置：{', '.join(own)}"))
    return lines
