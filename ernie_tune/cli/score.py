"""`ernie-tune score`: the rewards that a trained reward model gives to answers.

Refuses to know: how rewards are made, the formats of rows.
"""

from __future__ import annotations

import json
from pathlib import Path

from ernie_tune.cli.verbs import UsageError
from ernie_tune.config.atomic import write_atomically
from ernie_tune.config.cpu import while_paddle_loads
from ernie_tune.config.language import say


def run(args: list[str]) -> int:
    """ernie-tune score FOLDER ROWS [OUT.jsonl]

    Gives every judged answer of ROWS (any format with pairs, rankings, ratings or labels) a reward
    by the model in FOLDER, the output_dir of `ernie-tune reward`. One line a row: id, rewards in
    the order of the row's answers (null: too long), best; of a model that was trained with
    rating_loss: ordinal also the ratings to expect, from 1 to rating_levels. Written to OUT, or
    printed.
    """
    if len(args) not in (2, 3):
        raise UsageError(
            say(
                f"expected FOLDER ROWS [OUT.jsonl], got {len(args)} words",
                f"需要 FOLDER ROWS [OUT.jsonl]（模型文件夹与数据文件），得到 {len(args)} 个词",
            )
        )
    with while_paddle_loads():
        from ernie_tune.data.sources import load_dataset
        from ernie_tune.data.units import JUDGED
        from ernie_tune.trainers.reward import RewardModel

    rows = load_dataset(args[1], signals=JUDGED)
    records = [rows[i] for i in range(len(rows))]
    lines, model = [], RewardModel.from_pretrained(args[0])
    for record, rewards in zip(records, model.score(records), strict=True):
        best = None if rewards is None else max(range(len(rewards)), key=rewards.__getitem__)
        ratings = None if rewards is None else model.ratings(rewards)
        more = {} if ratings is None else {"ratings": ratings}
        line = {"id": record.id or str(record.meta), "rewards": rewards, **more, "best": best}
        lines.append(json.dumps(line, ensure_ascii=False))
    text = "".join(line + "\n" for line in lines)
    if len(args) == 2:
        print(text, end="")
        return 0
    out = Path(args[2])
    write_atomically(out, text)
    print(say(f"wrote {out} ({len(lines)} rows)", f"已写入 {out}（{len(lines)} 行）"))
    return 0
