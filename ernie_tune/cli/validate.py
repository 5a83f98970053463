"""`ernie-tune validate`: what a YAML file means, and where each value comes from.

Refuses to know: paddle, whether model and data exist.
"""

from __future__ import annotations

from ernie_tune.cli.verbs import file_and_settings
from ernie_tune.config.language import say
from ernie_tune.config.loader import Loaded, dump_config, load_config
from ernie_tune.plan.job import known_shape
from ernie_tune.plan.layouts import run_problems


def run(args: list[str]) -> int:
    """ernie-tune validate run.yaml [key=value | --key value …]

    Checks names, types, choices, ranges and combinations without loading paddle, and whether the model can be cut as the
    degrees of parallelism say; prints every setting that has an effect with the place that set it. The output is itself a
    YAML file that repeats the run.
    """
    path, settings = file_and_settings(args)
    loaded = load_config(path, settings, for_training=True)
    checked = _check_layout(loaded, path)
    for line in dump_config(loaded.config).splitlines():
        name = line.partition(":")[0]
        entry = loaded.sources.get(name)
        spelled = f" as {entry.name}" if entry and entry.name != name else ""
        print(f"{line:<50}  # {entry.where}{spelled}" if entry else line)
    for note in loaded.notes:
        print(say(f"# note: {note}", f"# 提示：{note}"))
    if not checked:
        print(
            say(
                f"# note: {loaded.config.model.model_name_or_path} is not here: degrees of parallelism "
                "were not checked",
                f"# 提示：此处没有 {loaded.config.model.model_name_or_path}：未检查并行度",
            )
        )
    print(say(f"# {path} is valid", f"# {path} 配置有效"))
    return 0


def _check_layout(loaded: Loaded, path: str) -> bool:
    """Whether the model's shape is known. Raises ValueError, with the place of each setting, for a layout that it cannot have."""
    shape = known_shape(loaded.config.model.model_name_or_path)
    if shape is None:
        return False
    found = run_problems(loaded.config, shape)
    if found:
        places = {name: loaded.sources[name].where if name in loaded.sources else f"{path}:1" for name, _ in found}
        raise ValueError("\n".join(f"{places[name]}: {message}" for name, message in found))
    return True
