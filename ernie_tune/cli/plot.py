"""`ernie-tune plot`: curves of finished or running runs, in the terminal and as SVG.

Refuses to know: training, paddle.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from ernie_tune.cli.verbs import UsageError
from ernie_tune.config.language import say
from ernie_tune.config.loader import split_overrides


def run(args: list[str]) -> int:
    """ernie-tune plot RUN_FOLDER... [--name loss] [--svg FILE]

    Draws a logged value of one or several runs in the terminal, on one chart; --svg writes all
    curves of all runs to a file.
    """
    from ernie_tune.checkpoint.writer import write_atomically
    from ernie_tune.report.log import LOG_FILE, read_log
    from ernie_tune.report.plot import curves_svg, short_names, terminal_plot

    folders, entries = split_overrides(args)
    options = {e.name: str(e.raw) for e in entries}
    unknown = sorted(set(options) - {"name", "svg"})
    if unknown or not folders:
        raise UsageError(
            say(
                f"expected run folders and --name or --svg, got {unknown or 'no folder'}",
                f"需要运行的输出文件夹，可加 --name 或 --svg，得到 {unknown or 'no folder'}",
            )
        )
    missing = [f for f in folders if not (Path(f) / LOG_FILE).is_file()]
    if missing:
        raise ValueError(
            say(
                f"{missing[0]} must hold {LOG_FILE}; give the output_dir of a run",
                f"{missing[0]} 中须有 {LOG_FILE}；请给出某次运行的 output_dir",
            )
        )
    names = short_names(folders)
    runs = {names[f]: read_log(Path(f) / LOG_FILE)[0] for f in folders}
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    print(terminal_plot(runs, options.get("name", "loss"), colour=colour))
    if "svg" in options:
        write_atomically(Path(options["svg"]), curves_svg(runs))
        print(say(f"wrote {options['svg']}", f"已写入 {options['svg']}"))
    return 0
