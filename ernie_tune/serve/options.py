"""What an operator decides about a server. Refuses to know: how it is enforced."""

from __future__ import annotations

from dataclasses import dataclass, field

from ernie_tune.config.language import say
from ernie_tune.serve.media import MediaPolicy


@dataclass(frozen=True)
class ServeOptions:
    """Limits are per request unless they say otherwise. Raises ValueError for impossible ones."""

    max_model_len: int | None = None  # prompt and answer in tokens; None: what the model allows
    default_max_tokens: int = 1024  # of an answer whose request names no limit
    max_num_seqs: int = 64  # answers computed at once
    max_concurrency: int = 256  # requests in the house, waiting ones included; beyond it 429
    # key/value cache: answers at once times the longest of them, over all adapters
    cache_tokens: int = 262_144
    prefill_tokens: int = 8192  # prompts computed between two steps of the others
    images: int = 10
    videos: int = 3
    max_body_bytes: int = 64 * 2**20
    max_text_bytes: int | None = (
        None  # of a body without its data: URLs; None: 1 MiB and 16 bytes a token of the context
    )
    max_pending_bytes: int = 2**30  # all bodies together; beyond it 429
    body_timeout_seconds: float = 30.0  # between two parts of a body
    # from the first byte of a request, or the connection, to the end of its head
    head_timeout_seconds: float = 15.0
    idle_timeout_seconds: float = 30.0  # of a connection between two requests
    # until a client has read what waits for it; then it is gone
    write_timeout_seconds: float = 30.0
    # to download and decode the pictures and videos of a request
    media_timeout_seconds: float = 60.0
    max_connections: int = 2048  # beyond it the one that is silent for longest is closed
    request_timeout_seconds: float = 600.0
    shutdown_timeout_seconds: float = 60.0
    preparing: int = 4  # threads that encode text, and as many that download and decode
    api_keys: tuple[str, ...] = ()  # none: everyone may ask
    # by which clients may call the server, beside those of the loopback
    host_names: tuple[str, ...] = ()
    any_address: bool = False  # also by any IP address: it listens to other machines
    log_requests: bool = False
    media: MediaPolicy = field(default_factory=MediaPolicy)

    def __post_init__(self) -> None:
        least = {
            "max_model_len": 2,
            "default_max_tokens": 1,
            "max_num_seqs": 1,
            "max_concurrency": 1,
            "cache_tokens": 2,
            "prefill_tokens": 1,
            "images": 0,
            "videos": 0,
            "max_body_bytes": 1,
            "max_text_bytes": 1,
            "max_connections": 1,
            "head_timeout_seconds": 0.001,
            "idle_timeout_seconds": 0.001,
            "write_timeout_seconds": 0.001,
            "media_timeout_seconds": 0.001,
            "max_pending_bytes": 1,
            "body_timeout_seconds": 0.001,
            "request_timeout_seconds": 0.001,
            "shutdown_timeout_seconds": 0,
            "preparing": 1,
        }
        for name, low in least.items():
            value = vars(self)[name]
            if value is not None and not value >= low:
                raise ValueError(
                    say(f"{name} ({value}) must be at least {low}; raise it", f"{name}（{value}）至少为 {low}；请调大")
                )
        if any(not (key.isascii() and key.isprintable() and key == key.strip() != "") for key in self.api_keys):
            raise ValueError(
                say(
                    "api_key must be of printable ASCII characters, none of them a blank at its ends; choose another",
                    "api_key 须为可打印的 ASCII 字符，首尾不得为空格；请另选",
                )
            )
