"""What a server is told of a folder's pictures and clips. FastDeploy takes limits, frames and rates
from its command line alone.

Refuses to know: weights, tokens, how a command is run.
Source: FastDeploy e53f518, `--mm-processor-kwargs` (mm_model_config.py, ernie_encoding.py).
"""

from __future__ import annotations

from ernie_tune.config.language import say
from ernie_tune.data.media.images import ImageSettings
from ernie_tune.data.media.video import VideoSettings


def media_arguments(images: ImageSettings, videos: VideoSettings) -> tuple[dict[str, int | str], list[str]]:
    """(FastDeploy's --mm-processor-kwargs for these settings, what FastDeploy cannot be told: one
    line each).
    """
    fps = videos.fps or 0.0
    whole = max(1, round(fps or 2))
    told: dict[str, int | str] = {
        "image_min_pixels": images.min_pixels,
        "image_max_pixels": images.max_pixels,
        "video_min_pixels": videos.min_pixels,
        "video_max_pixels": videos.max_pixels,
        "video_min_frames": videos.min_frames,
        "video_max_frames": videos.max_frames,
        "video_fps": whole,
        "video_frames_sample": videos.sampling,
    }
    untold: list[str] = []
    if fps != whole:
        said = f"{fps:g}" if fps else "none"
        untold.append(
            say(
                f"FastDeploy takes whole frames a second only: clips are sampled at {whole}, here at {said}.",
                f"FastDeploy 每秒只取整数帧：它按 {whole} 抽帧，这里按 {said}。",
            )
        )
    for english, chinese, rule in (
        ("resizes pictures", "缩放图片", images.rule),
        ("chooses frames", "选取视频帧", videos.rule),
    ):
        if rule != "paddle":
            untold.append(
                say(
                    f"FastDeploy {english} by the rule 'paddle', this folder by {rule!r}; narrow pictures and clips differ.",
                    f"FastDeploy 按规则 'paddle' {chinese}，这个文件夹按 {rule!r}；很窄的图片和视频会不同。",
                )
            )
    if not videos.draw_timestamps:
        untold.append(
            say(
                "FastDeploy draws the time into every frame; this folder does not.",
                "FastDeploy 会在每一帧上写时间；这个文件夹的设置不写。",
            )
        )
    return told, untold
