"""What methods on judged answers share: units for rows, pairs of true and spoilt pictures, and what
is known of where a policy comes from.

Refuses to know: formulas, references, the run.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ernie_tune.config.arguments import RunConfig
from ernie_tune.config.language import Text, say
from ernie_tune.config.loader import ARGS_FILE, load_config
from ernie_tune.data.batching import Dropped
from ernie_tune.data.media.corruption import CorruptedPairs
from ernie_tune.data.processor import Processor
from ernie_tune.data.units import (
    Answer,
    Unit,
    UnitBatch,
    UnitEncoder,
    first_answer,
    following,
    mismatched,
)
from ernie_tune.machine.place import Place
from ernie_tune.models.ernie import ErnieModel
from ernie_tune.models.presets import is_fresh, shipped_name
from ernie_tune.peft.config import PrefixConfig, PromptConfig
from ernie_tune.peft.model import PeftModel
from ernie_tune.report.log import RunLog
from ernie_tune.train.reference import Asked, Reference, frozen_logp
from ernie_tune.trainers.assemble import data_seed
from ernie_tune.trainers.method import Rows


def unit_encoder(config: RunConfig, processor: Processor, learned: tuple[str, ...]) -> UnitEncoder:
    """What makes units of the rows. `learned`: the kinds of judgement that the method learns
    from.
    """
    d, p = config.data, config.preference
    return UnitEncoder(processor, d.max_seq_len, p.max_prompt_len, d.truncation_strategy, p.prefix_sharing, learned)


def check_shared_prompts(model: ErnieModel, share: bool) -> None:
    """ValueError for a model with virtual tokens, which begin every dialogue, where prompts are to
    be computed once."""
    if isinstance(model, PeftModel) and model.active is not None:
        config = model.adapters[model.active].config
        if isinstance(config, PromptConfig | PrefixConfig) and share:
            raise ValueError(
                say(
                    f"prefix_sharing (true) must be false with {type(config).__name__.removesuffix('Config')}"
                    ": virtual tokens begin every dialogue; set it",
                    f"使用 {type(config).__name__.removesuffix('Config')} 时每段对话以虚拟 token "
                    "开头，prefix_sharing（true）须为 false；请设置",
                )
            )


class SpoiltPictures:
    """Pairs whose worse side is the right answer to a spoilt picture, where `image_corruption` asks
    for them."""

    def __init__(self, config: RunConfig) -> None:
        self.config, self.made, self.rows = config, 0, 0

    def beside(self, sets: Sequence[Rows], learns_pairs: bool) -> Sequence[Rows]:
        """Each set with the pairs that its pictures make. Raises ValueError where there are none,
        or where nothing would learn from them."""
        c, d = self.config.picture, self.config.data
        if c.image_corruption == "none":
            return sets
        if not learns_pairs:
            raise ValueError(
                say(
                    f"image_corruption ({c.image_corruption}) makes pairs and must go with a weight of the "
                    "term that learns from them; raise pair in term_weights",
                    f"image_corruption（{c.image_corruption}）会生成成对数据，须给学习它们的项设权重；请在 "
                    "term_weights 中调大 pair",
                )
            )
        self.rows = sum(len(rows) for rows in sets)
        how = (c.image_corruption, c.image_corruption_noise, c.image_corruption_ratio, data_seed(self.config))
        made = [CorruptedPairs(rows, *how, k) for k, rows in enumerate(sets)]
        self.made = sum(len(rows.chosen) for rows in made)
        if not self.made:
            raise ValueError(
                say(
                    f"image_corruption ({c.image_corruption}) must find rows with a picture and an answer "
                    f"known to be right, none of {self.rows} in "
                    f"{','.join(d.train_dataset_path) or 'train_dataset'} was taken; give such rows, raise "
                    "image_corruption_ratio, or set none",
                    f"image_corruption（{c.image_corruption}）需要有图片且已知正确回答的数据，"
                    f"{','.join(d.train_dataset_path) or 'train_dataset'} 的 {self.rows} "
                    "行中没有可用的；请补充此类数据、调大 image_corruption_ratio，或设为 none",
                )
            )
        return made

    def tell(self, log: RunLog) -> None:
        """How many there are, where there are any."""
        if self.made:
            kind = self.config.picture.image_corruption
            log.info(
                say(
                    f"image_corruption {kind}: {self.made} pairs of a true and a spoilt picture beside "
                    f"{self.rows} rows",
                    f"image_corruption {kind}：在 {self.rows} 行之外生成 {self.made} 对真图与损坏图",
                )
            )


def every_row(encoder: UnitEncoder, size: int, *sets: Rows) -> Iterator[UnitBatch]:
    """Each row once, `size` to a micro-batch, the same on every process."""
    dropped = Dropped()
    every = (encoder(rows[i], dropped) for rows in sets for i in range(len(rows)))
    return map(encoder.collate, _chunks((unit for unit in every if unit is not None), size))


def _chunks(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    chunk: list[Any] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def compared_with(reference: Reference, place: Place, window: Sequence[UnitBatch]) -> list[UnitBatch]:
    """The window's batches with what the reference says of their answers. All processes call it:
    where experts are apart, a forward is everybody's, and what one rank lacks, all compute.
    """
    lacks = zip(*place.gather([reference.lacks(batch) for batch in window]), strict=True)
    return [reference.attached(batch, any(some)) for batch, some in zip(window, lacks, strict=True)]


def with_mismatched(
    window: list[UnitBatch],
    collate: Callable[[Sequence[Unit]], UnitBatch],
    policy: Asked,
    reference: Reference,
    rank: int,
    said: Callable[[list[Answer]], list[list[Answer]]],
) -> list[UnitBatch]:
    """The window with KTO's baseline on its first batch: mismatched answers of the whole window, so
    that it does not depend on how the window is cut. `rank` and `said` tell apart the processes
    that hold different rows of it.
    """
    units = [unit for batch in window for unit in batch.units]
    answers = following(said([first_answer(unit) for unit in units]), rank)
    others = iter(mismatched(units, answers) if answers else ())
    total = 0.0
    for batch in window if answers else ():
        mixed = collate(list(itertools.islice(others, batch.num_rows)))
        total += float((frozen_logp(policy, mixed) - reference.compute(mixed)).sum())
    return [window[0].with_columns(mismatch_S=np.array([total, len(answers)])), *window[1:]]


def ancestry(config: RunConfig) -> tuple[bool | None, Text]:
    """(whether the policy has been through SFT, None where nothing says so; what is known of it).
    Read from the arguments that our runs leave beside their weights, and from the names of presets
    and base models."""
    m = config.model
    for folder in (config.lora.lora_path, m.model_name_or_path):
        file = Path(folder) / ARGS_FILE
        if folder and file.is_file():
            stage = load_config(file).config.model.stage
            return stage != "PT", say(f"{folder}, made by {stage}", f"{folder}，由 {stage} 训练")
    name = m.model_name_or_path.rsplit("/", 1)[-1].lower()
    if is_fresh(name) and not Path(m.model_name_or_path).is_dir():
        return False, say(f"{m.model_name_or_path}, fresh weights", f"{m.model_name_or_path}，随机初始化的权重")
    if shipped_name(name):
        return True, say(f"{m.model_name_or_path}, made by SFT", f"{m.model_name_or_path}，由 SFT 训练")
    if "-base" in name:
        return False, say(f"{m.model_name_or_path}, a base model", f"{m.model_name_or_path}，基座模型")
    return None, say(
        "{model}, of which no arguments tell how it was trained",
        "{model}，没有参数文件说明它如何训练",
        model=m.model_name_or_path or say("a model given as an object", "以对象给出的模型"),
    )
