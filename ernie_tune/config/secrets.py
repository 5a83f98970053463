"""Which variables of the environment are secrets, and how they are kept out of files.

Paddle's launcher writes its environment, and that of each worker, into the log folder, which lies
in output_dir, which people upload. So the launcher is started without secrets, and the workers read
them from the process that started it, where the system lets them (/proc); where somebody else has
started the launcher, the workers remove what it has written as soon as they run.
Refuses to know: what a secret is for, how workers are started.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Mapping, MutableMapping
from pathlib import Path

# The process that has the whole environment, for workers whose launcher was started without the
# secrets.
PARENT_VARIABLE = "ERNIE_TUNE_STARTED_BY"
_NAME = re.compile(
    r"HEADERS|LOGIN|SESSION|TOKEN|KEY|SECRET|PASSW|PASSPHRASE|(^|_)PASS(_|$)|_PWD|PWD_|CREDENTIAL|AUTH|COOKIE|PRIVATE|BEARER|JWT|SIGNATURE|WEBHOOK|DSN|CONNECTION_STRING|(^|_)(PAT|SAS|AK|SK|OTP|PIN|SALT)(_|$)|_API$",
    re.IGNORECASE,
)
_IN_ADDRESS = re.compile(
    r"[a-z][a-z0-9+.-]*://[^/\s@]+:[^/\s@]*@|://[^/\s@:]{16,}@", re.IGNORECASE
)  # user:password@host
# What tokens, keys and headers look like, whatever the variable is called.
_LOOKS = re.compile(
    r"-----BEGIN |\b(bearer|basic)\s+\S"
    r"|(?<![/\w.\-])(hf_|sk-|rk_|pk_live_|gh[a-z]_|github_pat_|glpat-|npm_|pypi-|xox[a-z]-|AKIA|ASIA|AIza|ya29\.|dckr_pat_)[\w.\-]{8,}"
    r"|\beyJ[\w\-]{6,}\.[\w\-]+"
    r"|\w*(token|key|secret|passw\w*|pwd|signature|sig|credential|auth\w*)[\"']?\s*[=:]\s*[\"']?[^\s\"']"
    r"|://hooks\.",
    re.IGNORECASE,
)
# A word of letters and digits that says nothing, as random keys are.
_OPAQUE = re.compile(r"(?=[^\d]*\d)(?=[^a-zA-Z]*[a-zA-Z])[\w+=\-]{24,}")
# What processes need to start and find each other, where values are not looked at.
_SETTINGS = re.compile(
    r"(PADDLE|FLAGS|NCCL|CUDA|OMP|MKL|LD|PYTHON|ERNIE_TUNE|POD|HOST)(_|$)|HOSTNAME$|.*(PATH|HOME|TMPDIR|VISIBLE_DEVICES)$"
)
# of the file from which Paddle reads what it did not find in the environment
_BACKUP = "PADDLE_BACKUP_ENV_PATH"


def is_secret(name: str, value: str) -> bool:
    """Whether a variable may hold a secret: by its name, as an address with a password in it, or
    because it looks like one.

    Rather one too many: workers get them all the same.
    """
    if _NAME.search(name) or _IN_ADDRESS.search(value):
        return True
    return not _SETTINGS.match(name) and bool(_LOOKS.search(value) or _OPAQUE.fullmatch(value))


def without_secrets(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that may be written to files."""
    return {name: value for name, value in environ.items() if not is_secret(name, value)}


def take_secrets(environ: MutableMapping[str, str]) -> None:
    """Put what the launcher was not given into a worker's environment; what is set stays. Nothing
    where the system does not show it.
    """
    parent = environ.get(PARENT_VARIABLE, "")
    if not parent.isdecimal():
        return
    try:
        raw = Path(f"/proc/{parent}/environ").read_bytes()
    except OSError:
        return
    for entry in raw.decode("utf-8", "surrogateescape").split("\0"):
        name, equals, value = entry.partition("=")
        if equals and is_secret(name, value):
            environ.setdefault(name, value)


def clean_launcher_files(environ: Mapping[str, str]) -> None:
    """In a worker: take the secrets out of what its launcher has written before it started it. What
    cannot be written is left: another rank's.
    """
    backup = environ.get(_BACKUP)
    if not backup:
        return
    file = Path(backup)
    with contextlib.suppress(OSError, ValueError):
        held = json.loads(file.read_text(encoding="utf-8"))
        kept = without_secrets({str(k): str(v) for k, v in held.items()})
        if len(kept) < len(held):  # Paddle reads the file, so it is not removed before the end
            staged = file.with_suffix(f".{os.getpid()}.tmp")
            staged.touch(0o600)
            staged.write_text(json.dumps(kept), encoding="utf-8")
            staged.replace(file)
    for other in (*file.parent.glob("envlog.*"), *_pod_logs(file.parent)):
        with contextlib.suppress(OSError):
            other.unlink()


def remove_launcher_files(folder: Path) -> None:
    """After the launcher's end: its records of the environment go, the workers' lines stay."""
    for file in (*folder.glob("backup_env.*.json"), *folder.glob("envlog.*"), *_pod_logs(folder)):
        with contextlib.suppress(OSError):
            file.unlink()


def _pod_logs(folder: Path) -> list[Path]:
    """`<job>.<pod>.log`, which begin with the launcher's environment."""
    found = []
    for file in folder.glob("*.log"):
        with contextlib.suppress(OSError), file.open("rb") as stream:
            if stream.read(8) == b"environ(":
                found.append(file)
    return found
