"""Named model shapes: the released models, the shipped "nano", "small", and the tiny ones. Shapes
only, no paddle.

Refuses to know where weights are: a preset is built with fresh weights, `AutoModel.from_pretrained`
reads released ones.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from ernie_tune.config.language import say
from ernie_tune.models.config import ModelConfig, MoEConfig, TokenIds, VisionConfig

# Ids of the released vocabulary, facts of those models only.
_RELEASED = TokenIds(
    0, 1, 2, image=100295, image_start=101304, image_end=101305, video=100295, video_start=101306, video_end=101307
)
# Ids of the shipped tokenizers.
_TINY = TokenIds(0, 1, 2, image=604, image_start=605, image_end=606, video=604, video_start=607, video_end=608)
_SMALL = TokenIds(0, 1, 2, image=8004, image_start=8005, image_end=8006, video=8004, video_start=8007, video_end=8008)
_NANO = TokenIds(0, 1, 2, image=2906, image_start=2907, image_end=2908, video=2906, video_start=2909, video_end=2910)
_TOWER = VisionConfig(depth=32, hidden_size=1280, num_heads=16, intermediate_size=5120)


def _layers(first: int, depth: int) -> tuple[int, ...]:
    return tuple(range(first, depth))


def _28b(vision: bool) -> ModelConfig:
    return ModelConfig(
        vocab_size=103424,
        hidden_size=2560,
        intermediate_size=12288,
        num_hidden_layers=28,
        num_attention_heads=20,
        num_key_value_heads=4,
        head_dim=128,
        moe=MoEConfig(64, (1536, 512) if vision else (1536,), 6, 2, _layers(1, 28)),
        vision=_TOWER if vision else None,
        tokens=_RELEASED if vision else TokenIds(),
    )


def _424b(vision: bool) -> ModelConfig:
    return ModelConfig(
        vocab_size=103424,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=54,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=False,
        moe=MoEConfig(64, (3584, 1536) if vision else (3584,), 8, 0, _layers(3, 54)),
        vision=_TOWER if vision else None,
        tokens=_RELEASED if vision else TokenIds(),
    )


_ASSETS = Path(__file__).parent.parent / "data" / "assets"
NANO = "ernie-4.5-vl-nano"
ALIASES = {"nano": NANO}
SHIPPED = frozenset({NANO})  # shapes whose weights come with the package
PRESETS: dict[str, ModelConfig] = {
    "ernie-4.5-vl-28b-a3b": _28b(vision=True),
    "ernie-4.5-vl-424b-a47b": _424b(vision=True),
    "ernie-4.5-21b-a3b": _28b(vision=False),
    "ernie-4.5-300b-a47b": _424b(vision=False),
    "ernie-4.5-0.3b": ModelConfig(
        vocab_size=103424,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=18,
        num_attention_heads=16,
        num_key_value_heads=2,
        head_dim=128,
    ),
    "tiny-a": ModelConfig(
        vocab_size=640,
        hidden_size=96,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        freq_allocation=2,
        max_position_embeddings=4096,
        moe=MoEConfig(8, (48, 32), 3, 2, _layers(1, 3)),
        vision=VisionConfig(depth=2, hidden_size=64, num_heads=4, intermediate_size=256),
        tokens=_TINY,
        dtype="float32",
    ),
    "tiny-b": ModelConfig(
        vocab_size=1024,
        hidden_size=160,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=5,
        num_key_value_heads=1,
        head_dim=32,
        freq_allocation=4,
        max_position_embeddings=4096,
        moe=MoEConfig(16, (96, 32), 6, 2, _layers(1, 4)),
        vision=VisionConfig(depth=3, hidden_size=80, num_heads=4, intermediate_size=320),
        tokens=_TINY,
        dtype="float32",
    ),
    "tiny-c": ModelConfig(
        vocab_size=1024,
        hidden_size=160,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=20,
        freq_allocation=2,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        moe=MoEConfig(16, (88, 40), 8, 0, _layers(3, 5)),
        vision=VisionConfig(depth=3, hidden_size=80, num_heads=4, intermediate_size=320),
        tokens=_TINY,
        dtype="float32",
    ),
    NANO: ModelConfig(
        vocab_size=2912,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        freq_allocation=4,
        max_position_embeddings=4096,
        moe=MoEConfig(8, (80, 48), 2, 1, _layers(1, 4)),
        vision=VisionConfig(depth=4, hidden_size=112, num_heads=4, intermediate_size=448),
        tokens=_NANO,
        dtype="float32",
    ),
    "small": ModelConfig(
        vocab_size=8192,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        freq_allocation=4,
        max_position_embeddings=4096,
        moe=MoEConfig(16, (256, 128), 2, 2, _layers(1, 6)),
        vision=VisionConfig(depth=4, hidden_size=128, num_heads=4, intermediate_size=512),
        tokens=_SMALL,
        dtype="float32",
    ),
}


def shipped_name(name: str) -> str | None:
    """The full name of a model that comes with the package, for it or its alias in any case; None
    for all others.
    """
    key = name.lower()
    key = ALIASES.get(key, key)
    return key if key in SHIPPED else None


def shipped_folder(name: str | os.PathLike[str]) -> Path | None:
    """The folder of a model that comes with the package. None for other names, and where a folder
    beside the caller has that name.
    """
    full = shipped_name(os.fspath(name))
    return None if full is None or Path(name).is_dir() else _ASSETS / full


def is_fresh(name: str) -> bool:
    """Whether `name` is that of a preset without weights, which a run draws. A folder of that name
    has to be looked for first.
    """
    return name.rsplit("/", 1)[-1].lower() in PRESETS and shipped_name(name) is None


def preset(name: str) -> ModelConfig:
    """The shape called `name` (case and `_`/`-` do not matter, an owner prefix and
    -PT/-Paddle/-Base suffixes are dropped). ValueError with a suggestion.
    """
    key = name.rsplit("/", 1)[-1].lower().replace("_", "-")
    for suffix in ("-pt", "-paddle", "-base", "-thinking"):
        key = key.removesuffix(suffix)
    key = ALIASES.get(key, key)
    if key in PRESETS:
        return PRESETS[key]
    close = [name for name in PRESETS if key and key in name] or difflib.get_close_matches(
        key, PRESETS, n=1, cutoff=0.5
    )
    hint = (
        say(f"did you mean {close[0]!r}?", f"是否想写 {close[0]!r}？")
        if close
        else say("choose one of them", "请从中选择")
    )
    raise ValueError(
        say(
            "preset ({name!r}) must be one of {known}; {hint}",
            "预设（{name!r}）须为 {known} 之一；{hint}",
            name=name,
            known=sorted(PRESETS),
            hint=hint,
        )
    )
