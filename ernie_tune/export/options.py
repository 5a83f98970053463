"""What may be asked of an export, and which of it goes together. Refuses to know: how any of it is
done.
"""

from __future__ import annotations

from dataclasses import dataclass

from ernie_tune.checkpoint.writer import DEFAULT_SHARD_BYTES
from ernie_tune.config.fastdeploy import FastDeployCommand
from ernie_tune.config.language import say
from ernie_tune.export.choose import METHODS
from ernie_tune.export.scheme import scheme
from ernie_tune.peft.formats import ALGORITHMS

# layout -> how it is written (checkpoint/names.py)
LAYOUTS = {"paddle": "paddle", "pt": "hf", "hf": "hf_saved"}
EMITS = ("weights", "cache", "packed")
VERIFY = ("full", "files")


@dataclass(frozen=True)
class ExportOptions:
    """How to export. `layout`: "paddle" (-Paddle releases, FastDeploy), "pt" (-PT releases,
    FastDeploy and vLLM), "hf" (transformers 5).

    `quantization`: "none", "wint8", "wint4", "mix" (`scheme.py`), and for `emit` "packed" what
    `weight_quantize_algo` makes at load, "weight_only_int8", "weight_only_int4", "weight_only_mix"
    (`at_load.py`); `method`: "rtn", "clip", "gptq" (`choose.py`), by default clip, of codes as at
    load always rtn; `calib`: rows that activations come from, a quarter of them kept for the checks
    unless `eval` names others. `emit`: "weights" that FastDeploy quantises itself, those and a load
    "cache" beside them, or "packed" codes for our own server. `awq`: exponent of the
    activation-aware scaling, 0 for none. `verify`: "full", or "files" without comparing models in
    memory. Raises ValueError for values that do not exist or contradict each other.
    """

    layout: str = "paddle"
    quantization: str = "none"
    method: str = ""
    calib: str = ""
    eval: str = ""
    calib_rows: int = 128
    target_tp: int = 1
    emit: str = "weights"
    awq: float = 0.0
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    verify: str = "full"
    port: int = 8180

    def __post_init__(self) -> None:
        scheme(self.quantization)
        self._check_at_load()
        if not self.method:
            object.__setattr__(self, "method", "rtn" if self.at_load else "clip")
        for name, value, known in (
            ("layout", self.layout, tuple(LAYOUTS)),
            ("method", self.method, METHODS),
            ("emit", self.emit, EMITS),
            ("verify", self.verify, VERIFY),
        ):
            if value not in known:
                raise ValueError(
                    say(
                        f"{name} ({value!r}) must be one of {known}; choose one of them",
                        f"{name}（{value!r}）须为 {known} 之一；请选一种",
                    )
                )
        if self.target_tp < 1:
            raise ValueError(
                say(
                    f"target_tp ({self.target_tp}) must be at least 1; give the number of cards that will serve",
                    f"target_tp（{self.target_tp}）须至少为 1；请给出部署的卡数",
                )
            )
        if self.quantization == "none" and self.emit != "weights":
            raise ValueError(
                say(
                    f"emit ({self.emit}) must go with a quantization, not none; give wint8, wint4 or mix",
                    f"emit（{self.emit}）须与量化同用，不能为 none；请给出 wint8、wint4 或 mix",
                )
            )
        if self.quantization != "none" and self.layout == "hf":
            raise ValueError(
                say(
                    f"quantization ({self.quantization}) must go with layout paddle or pt: transformers has "
                    "no such grid; leave it out",
                    f"quantization（{self.quantization}）须与 layout paddle 或 pt 同用：transformers "
                    "没有这种格式；请去掉",
                )
            )
        if self.awq and (self.quantization not in ("wint4", "mix") or not self.calib):
            raise ValueError(
                say(
                    f"awq ({self.awq:g}) must go with quantization wint4 or mix and with calib; leave it out, "
                    "or give them",
                    f"awq（{self.awq:g}）须与 quantization wint4 或 mix 以及 calib 同用；请去掉，或补上它们",
                )
            )
        if not 0 <= self.awq <= 1:
            raise ValueError(
                say(
                    f"awq ({self.awq:g}) must be from 0 to 1; 0.25 is a good start",
                    f"awq（{self.awq:g}）须在 0 到 1 之间；可从 0.25 开始",
                )
            )
        FastDeployCommand("", port=self.port)
        if self.method == "gptq" and not self.calib:
            raise ValueError(
                say(
                    "method (gptq) must come with calibration data; give --calib FILE, or take method clip",
                    "method（gptq）需要校准数据；请给出 --calib FILE，或改用 clip",
                )
            )

    @property
    def at_load(self) -> bool:
        """Whether the codes are those that a run makes while it loads a model."""
        return self.quantization in ALGORITHMS

    def _check_at_load(self) -> None:
        """ValueError for settings that such codes cannot follow."""
        if not self.at_load:
            return
        for name, value, wanted in (
            ("emit", self.emit, "packed"),
            ("method", self.method or "rtn", "rtn"),
            ("target_tp", self.target_tp, 1),
            ("awq", self.awq, 0.0),
        ):
            if value != wanted:
                raise ValueError(
                    say(
                        f"{name} ({value}) must be {wanted} with quantization {self.quantization}, whose codes are "
                        "those that a run makes at load; set it so, or take quantization wint4",
                        f"quantization 为 {self.quantization} 时 {name}（{value}）须为 {wanted}，其编码与训练加载时所得相同；"
                        "请照此设置，或改用 quantization wint4",
                    )
                )
