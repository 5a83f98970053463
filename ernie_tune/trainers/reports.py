"""The model card of a run: what was trained, on what, and how much better it is.

Refuses to know: the loop, how anything was measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from ernie_tune.config.arguments import SETTINGS, RunConfig
from ernie_tune.config.language import say
from ernie_tune.data.sources import load_dataset
from ernie_tune.evaluate.measure import Measure
from ernie_tune.machine.placed import Placed
from ernie_tune.peft.config import LoraConfig
from ernie_tune.peft.model import PeftModel
from ernie_tune.report.log import RunLog
from ernie_tune.report.pages import ModelCard, describe_file, usage, write_model_card


class Described(Protocol):
    """What the model card is told of a run."""

    described: RunConfig
    policy: Placed
    base_model: str

    @property
    def output_dir(self) -> Path: ...


def write_reports(run: Described, measure: Measure, log: RunLog, changed: Sequence[tuple[int, str]] = ()) -> None:
    """The model card. `changed`: (after which step, what) where the run went on under other
    settings.
    """
    c, model = run.described, run.policy.model
    adapter = model.adapters[model.active or ""].config if isinstance(model, PeftModel) else None
    files = [path.split("#")[0] for path in (*c.data.train_dataset_path, *c.data.eval_dataset_path)]
    data = [
        describe_file(Path(f), len(load_dataset(f, dataset_dir=c.data.dataset_dir or ".")))
        for f in files
        if Path(f).is_file()
    ]
    rank = f" rank {adapter.r}" if isinstance(adapter, LoraConfig) else ""
    method = f"{c.model.stage}, {c.model.fine_tuning}{rank}"
    first: Mapping[str, float] = measure.first.get("metrics", {})
    card = ModelCard(
        name=run.output_dir.resolve().name,
        base_model=run.base_model,
        method=method,
        data=data,
        arguments={name: value for name, value in c.flat().items() if value != SETTINGS[name].default},
        before=first,
        after=measure.last.get("metrics", {}),
        commands=usage(str(run.output_dir), adapter is not None),
        changed=changed,
    )
    write_model_card(run.output_dir / "README.md", card)
    pages = [
        name for name in ("README.md", "before_after.html", "training_loss.svg") if (run.output_dir / name).is_file()
    ]
    log.info(
        say(
            f"everything is in {run.output_dir}: {', '.join(pages)}", f"全部结果在 {run.output_dir}：{', '.join(pages)}"
        )
    )
