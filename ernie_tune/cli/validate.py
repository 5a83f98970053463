"""`ernie-tune validate`: what a YAML file means, where each value comes from, and what is not there
yet.

Refuses to know: paddle, rules (config/checks.py, plan/judgement.py).
"""

from __future__ import annotations

from ernie_tune.cli.verbs import file_and_settings
from ernie_tune.config.language import Text, counted, say, shown
from ernie_tune.config.loader import Loaded, dump_config, load_config
from ernie_tune.plan.judgement import judged


def run(args: list[str]) -> int:
    """ernie-tune validate run.yaml [key=value | --key value …]

    Checks names, types, choices, ranges and combinations without loading paddle, whether this
    version can train what is asked, whether the model can be cut as the degrees of parallelism say,
    and tells of files that are not there yet; prints every setting that has an effect with the
    place that set it. The output is itself a YAML file that repeats the run.
    """
    path, settings = file_and_settings(args)
    loaded = load_config(path, settings, for_training=True)
    notes = (*loaded.notes, *judged(loaded, f"{path}:1", training=False))
    for line in dump_config(loaded.config).splitlines():
        name = line.partition(":")[0]
        entry = loaded.sources.get(name)
        spelled = f" as {entry.name}" if entry and entry.name != name else ""
        print(f"{line:<50}  # {entry.where}{spelled}" if entry else line)
    for note in notes:
        for line in say("note: {note}", "提示：{note}", note=shown(note)).splitlines():
            print(f"# {line}")
    print(_end(loaded, path))
    return 0


def _end(loaded: Loaded, path: str) -> Text:
    """That it is valid, and whether a run could start now."""
    try:
        judged(loaded, f"{path}:1", training=True)
    except ValueError as error:
        count = len(str(error).splitlines())
        what = counted(count, "thing")
        return say(
            f"# {path} is valid, but cannot run yet: {what} named above must be there first",
            f"# {path} 配置有效，但尚不能运行：提示中的 {count} 项须先备齐",
        )
    return say(f"# {path} is valid", f"# {path} 配置有效")
