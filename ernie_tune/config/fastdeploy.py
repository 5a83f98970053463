"""The command that starts FastDeploy 2.x on a folder, with ports that do not collide. Words only:
nothing is run or looked up.

The published example gives one port to the metrics and to the cache queue; here every service has
its own, counted up from the HTTP port.
Refuses to know: folders, models, whether FastDeploy is installed.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field

from ernie_tune.config.language import say

MODULE = "fastdeploy.entrypoints.openai.api_server"
# What --mm-processor-kwargs knows of ERNIE, by type: with one wrong value FastDeploy warns and
# ignores them all.
MM_PROCESSOR: Mapping[str, type] = {
    "spatial_conv_size": int,
    "temporal_conv_size": int,
    "image_min_pixels": int,
    "image_max_pixels": int,
    "video_min_pixels": int,
    "video_max_pixels": int,
    "video_target_frames": int,
    "video_frames_sample": str,
    "video_max_frames": int,
    "video_min_frames": int,
    "video_fps": int,
}
_DEFAULT_MIN_FRAMES, _DEFAULT_MAX_FRAMES = 16, 180


def _video() -> dict[str, int | str]:
    return {"video_max_frames": 30}


def _limits() -> dict[str, int]:
    return {"image": 10, "video": 3}


@dataclass(frozen=True)
class FastDeployCommand:
    """What FastDeploy is told. `quantization`: "", "wint8", "wint4" or its JSON form; `vision`:
    whether images are served.

    `mm_processor`: the pixel and frame settings, which FastDeploy takes from the command line
    alone, never from the folder. Raises ValueError for ports that do not exist, and for settings of
    pictures and clips that FastDeploy would refuse or ignore.
    """

    model: str
    port: int = 8180
    tensor_parallel_size: int = 1
    quantization: str = ""
    max_model_len: int = 32768
    max_num_seqs: int = 32
    vision: bool = True
    mm_processor: Mapping[str, int | str] = field(default_factory=_video)
    limits: Mapping[str, int] = field(default_factory=_limits)
    reasoning_parser: str = "ernie-45-vl"
    cached: bool = False  # the folder holds a model-load cache for these settings

    def __post_init__(self) -> None:
        if not 0 < self.port <= 65532:
            raise ValueError(
                say(
                    f"port ({self.port}) must be from 1 to 65532, since the three ports above it are used "
                    "too; choose another",
                    f"port（{self.port}）须在 1 到 65532 之间，因为还要用其后三个端口；请换一个",
                )
            )
        for name, value in self.mm_processor.items():
            kind = MM_PROCESSOR.get(name)
            if kind is None or type(value) is not kind:
                wanted = f"a {kind.__name__}" if kind else f"one of {', '.join(MM_PROCESSOR)}"
                raise ValueError(
                    say(
                        f"mm_processor {name} ({value!r}) must be {wanted}: FastDeploy ignores all of these "
                        "settings otherwise; correct it",
                        f"mm_processor 的 {name}（{value!r}）须为 {wanted}，否则 FastDeploy 会忽略这些设置；请改正",
                    )
                )
        least = self.mm_processor.get("video_min_frames", _DEFAULT_MIN_FRAMES)
        most = self.mm_processor.get("video_max_frames", _DEFAULT_MAX_FRAMES)
        if int(most) < int(least):
            raise ValueError(
                say(
                    f"video_max_frames ({most}) must be at least FastDeploy's video_min_frames ({least}); raise it",
                    f"video_max_frames（{most}）不能小于 FastDeploy 的 video_min_frames（{least}）；请调大",
                )
            )

    def ports(self) -> dict[str, int]:
        """Flag -> port, all different."""
        names = ("--port", "--engine-worker-queue-port", "--metrics-port", "--cache-queue-port")
        return {name: self.port + i for i, name in enumerate(names)}

    def environment(self) -> dict[str, str]:
        """Variables that must be set. A cache holds the plain layout of dense weights, which
        Hopper's Machete kernels do not read.
        """
        return {"FD_ENABLE_MODEL_LOAD_CACHE": "1", "FD_USE_MACHETE": "0"} if self.cached else {}

    def words(self, python: str = "python") -> list[str]:
        """The command line."""
        words = [python, "-m", MODULE, "--model", self.model]
        for name, port in self.ports().items():
            words += [name, str(port)]
        words += ["--tensor-parallel-size", str(self.tensor_parallel_size)]
        if self.quantization:
            words += ["--quantization", self.quantization]
        # The older loader mixes up text and vision experts, and cannot read torch's layout.
        words += ["--load-choices", "default_v1"]
        words += ["--max-model-len", str(self.max_model_len), "--max-num-seqs", str(self.max_num_seqs)]
        if self.vision:
            words += ["--mm-processor-kwargs", json.dumps(dict(self.mm_processor))]
            words += ["--limit-mm-per-prompt", json.dumps(dict(self.limits))]
            words += ["--reasoning-parser", self.reasoning_parser]
        return words

    def shell(self) -> str:
        """The same for a shell, variables first."""
        variables = [f"{name}={value}" for name, value in self.environment().items()]
        return " ".join([*variables, shlex.join(self.words())])
