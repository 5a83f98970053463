"""Values of a parsed `config.json` by key, in all its spellings, of the kind that they must have.

Refuses to know: what a key means, which keys there are beside those with two names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ernie_tune.config.language import say

# canonical key -> other spellings of it; two spellings in one file must agree
_ALIASES: dict[str, tuple[str, ...]] = {
    "moe_num_experts": ("num_experts",),
    "moe_k": ("num_experts_per_tok",),
    "moe_num_shared_experts": ("num_shared_experts",),
    "dtype": ("torch_dtype",),
    "image_token_id": ("im_patch_id", "image_patch_id"),
    "image_start_token_id": ("image_start",),
    "image_end_token_id": ("image_end",),
    "video_start_token_id": ("video_start",),
    "video_end_token_id": ("video_end",),
    "spatial_merge_size": ("spatial_conv_size",),
    "temporal_merge_size": ("temporal_conv_size",),
}
_DTYPES = ("float32", "bfloat16", "float16")
_REQUIRED = object()


def value_of(
    flat: Mapping[str, Any], key: str, default: Any = _REQUIRED, aliases: Mapping[str, tuple[str, ...]] = _ALIASES
) -> Any:
    """The value of a key, under whichever of its names; `default` where there is none. Raises
    ValueError where it is required, or where two names disagree.
    """
    found = {k: flat[k] for k in (key, *aliases.get(key, ())) if flat.get(k) is not None}
    if not found:
        if default is _REQUIRED:
            spelled = " or ".join((key, *aliases.get(key, ())))
            raise ValueError(
                say(
                    f"{spelled} (missing) must be in config.json; add it, or use the config.json that came with "
                    "the weights",
                    f"config.json 中缺少 {spelled}；请补上，或用权重自带的 config.json",
                )
            )
        return default
    first = next(iter(found.values()))
    if any(value != first for value in found.values()):
        raise ValueError(
            say(
                f"{' and '.join(f'{k} ({v!r})' for k, v in found.items())} must be equal: they are spellings of "
                "one key; keep one of them",
                f"{'、'.join(f'{k}（{v!r}）' for k, v in found.items())} 须相等：它们是同一个键的不同写法；请只留其一",
            )
        )
    return first


def integer(
    flat: Mapping[str, Any], key: str, default: Any = _REQUIRED, aliases: Mapping[str, tuple[str, ...]] = _ALIASES
) -> int:
    """`value_of` that must be an integer, else ValueError."""
    value = value_of(flat, key, default, aliases)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(
            say(
                f"{key} ({value!r}) must be an integer; fix config.json",
                f"{key}（{value!r}）须为整数；请修改 config.json",
            )
        )
    return value


def number(
    flat: Mapping[str, Any], key: str, default: float, aliases: Mapping[str, tuple[str, ...]] = _ALIASES
) -> float:
    """`value_of` that must be a number, else ValueError."""
    value = value_of(flat, key, default, aliases)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(
            say(f"{key} ({value!r}) must be a number; fix config.json", f"{key}（{value!r}）须为数；请修改 config.json")
        )
    return float(value)


def boolean(flat: Mapping[str, Any], key: str, default: bool) -> bool:
    """`value_of` that must be true or false, else ValueError."""
    value = value_of(flat, key, default)
    if not isinstance(value, bool):
        raise ValueError(
            say(
                f"{key} ({value!r}) must be true or false; fix config.json",
                f"{key}（{value!r}）须为 true 或 false；请修改 config.json",
            )
        )
    return value


def per_modality(flat: Mapping[str, Any], key: str, modalities: int, default: Any = _REQUIRED) -> tuple[int, ...]:
    """A scalar counts for every modality; a list has one entry for each."""
    value = value_of(flat, key, default)
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,) * modalities
    if len(values) != modalities or any(isinstance(v, bool) or not isinstance(v, int) for v in values):
        raise ValueError(
            say(
                f"{key} ({value!r}) must be an integer or a list of {modalities} integer(s), one per modality; "
                "fix config.json",
                f"{key}（{value!r}）须为整数，或 {modalities} 个整数的列表（每种模态一个）；请修改 config.json",
            )
        )
    return values


def dtype_of(flat: Mapping[str, Any]) -> str:
    """In what the weights were saved; bfloat16 where it is not said."""
    names = {k: str(flat[k]).rsplit(".", 1)[-1] for k in ("dtype", "torch_dtype") if flat.get(k) is not None}
    name = str(value_of(names, "dtype", "bfloat16"))
    if name not in _DTYPES:
        raise ValueError(
            say(
                f"dtype ({name!r}) must be one of {list(_DTYPES)}; fix config.json",
                f"dtype（{name!r}）须为 {list(_DTYPES)} 之一；请修改 config.json",
            )
        )
    return name
