"""Where a pipeline is cut, as users write it (`pp_seg_method`) -> the first item of every part.
Items are counted as in the official recipes: embedding, decoder layers, norm, head; 31 for 28
layers, 57 for 54. Refuses to know: paddle, what an item costs (the default, a balanced cut, is not
made here).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

from ernie_tune.config.language import say

# in the class names of all ports: Ernie4_5_DecoderLayer, Ernie4_5_VLMoeDecoderLayer, ...
_LAYER = "DecoderLayer"


def bounds_of(method: Sequence[str], layers: int, parts: int) -> tuple[int, ...]:
    """First items of the parts and the number of items, or () for a cut balanced by cost.

    `method`: empty; `uniform` (as many items each; the last ones have one more where it does not
    divide); `layer:...DecoderLayer...` (as many decoder layers each); first items from 0 on, with
    or without the end ([0, 13, 31]); or numbers of decoder layers ([12, 16]). Raises ValueError for
    others.
    """
    words = [word.strip(" []") for word in method]
    items = layers + 3
    if not words:
        return ()
    if words == ["uniform"]:
        if parts > items:
            raise ValueError(
                say(
                    f"pp_seg_method (uniform) must have an item for each of {parts} parts, not {items}; lower a degree",
                    f"pp_seg_method（uniform）的 {parts} 段每段至少一项，只有 {items} 项；请降低并行度",
                )
            )
        size, longer = divmod(items, parts)
        sizes = [size + (i >= parts - longer) for i in range(parts)]
        return (0, *itertools.accumulate(sizes))
    if words[0].startswith("layer:"):
        if len(words) > 1 or _LAYER not in words[0]:
            raise ValueError(
                say(
                    f"pp_seg_method ({','.join(words)}) must count decoder layers, the one kind of layer that "
                    f"repeats; set layer:{_LAYER}",
                    f"pp_seg_method（{','.join(words)}）须按重复出现的解码层计数；请设为 layer:{_LAYER}",
                )
            )
        if layers % parts:
            raise ValueError(
                say(
                    f"pp_seg_method ({words[0]}) must give each of {parts} parts as many of the {layers} "
                    f"layers; list them, as [{', '.join(map(str, _near(layers, parts)))}], or set uniform",
                    f"pp_seg_method（{words[0]}）须使 {parts} 段平分 {layers} 层；请逐段列出，如 ["
                    f"{', '.join(map(str, _near(layers, parts)))}]，或设为 uniform",
                )
            )
        return _after([layers // parts] * parts, items)
    if not all(re.fullmatch(r"\d+", word) for word in words):
        raise ValueError(
            say(
                f"pp_seg_method ({','.join(words)}) must be uniform, layer:{_LAYER}, first items ([0, 13, "
                "31]) or numbers of layers ([12, 16]); choose one",
                f"pp_seg_method（{','.join(words)}）须为 uniform、layer:{_LAYER}、各段起点（[0, 13, "
                "31]）或各段层数（[12, 16]）；请选一种",
            )
        )
    return _listed([int(word) for word in words], layers, parts)


def _listed(numbers: list[int], layers: int, parts: int) -> tuple[int, ...]:
    items, near = layers + 3, _near(layers, parts)
    if numbers[0]:
        if len(numbers) != parts or sum(numbers) != layers or 0 in numbers:
            raise ValueError(
                say(
                    f"pp_seg_method ({numbers}) must be {parts} numbers of layers above 0 that add up to "
                    f"{layers}; for example {near}",
                    f"pp_seg_method（{numbers}）须为 {parts} 个大于 0 且总和为 {layers} 的层数；例如 {near}",
                )
            )
        return _after(numbers, items)
    given = [*numbers, items] if len(numbers) == parts else numbers
    if len(given) != parts + 1 or given[-1] != items or any(a >= b for a, b in itertools.pairwise(given)):
        raise ValueError(
            say(
                f"pp_seg_method ({numbers}) must be {parts + 1} rising numbers from 0 to the {items} "
                f"pipeline items (embedding, {layers} layers, norm, head); for example "
                f"{list(_after(near, items))}",
                f"pp_seg_method（{numbers}）须为从 0 到 {items} 的 {parts + 1} 个递增数（embedding、"
                f"{layers} 层、norm、head）；例如 {list(_after(near, items))}",
            )
        )
    return tuple(given)


def _near(layers: int, parts: int) -> list[int]:
    """Numbers of layers that differ by one at most, the last ones lighter: they have the head."""
    return [layers // parts + (i < layers % parts) for i in range(parts)]


def _after(counts: Sequence[int], items: int) -> tuple[int, ...]:
    """Bounds from numbers of layers: the embedding goes with the first, norm and head with the
    last.
    """
    return (0, *(1 + n for n in itertools.accumulate(counts[:-1])), items)
