"""Shared by all tests: the golden models, built once a session."""

from __future__ import annotations

import os
import signal
from functools import cache
from pathlib import Path

# numpy's own BLAS, before it loads: two threads that share a core with another process wait for
# each other, in small products ten times as long
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ["ERNIE_TUNE_LANG"] = "en"  # what tests expect does not depend on the machine's language
# a shell lets what it starts in the background ignore Ctrl-C
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # and nohup the end of a terminal
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

import numpy as np
import pytest

import ernie_tune  # noqa: F401  sets the CPU variables before any test loads paddle

GOLDEN = Path(__file__).parent / "golden"


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Bytes are not named by what they hold: a gzip or zip file holds the second in which it was
    made, and two processes that collect in different seconds would not agree on their tests.
    """
    return argname if isinstance(val, bytes) else None


@cache
def _golden_model(name: str, dtype: str):  # type: ignore[no-untyped-def]
    import paddle
    from weights import golden_config, golden_weights

    from ernie_tune.models.ernie import ErnieModel

    model = ErnieModel(golden_config(name), dtype)
    state = model.state_dict()
    for key, value in golden_weights(model.config).items():
        state[key].set_value(paddle.to_tensor(value).astype(state[key].dtype))
    return model


@pytest.fixture
def golden_model():  # type: ignore[no-untyped-def]
    """name, dtype -> the preset with `golden_weights`, without gradients, in eval mode; shared by
    tests, so leave its weights alone.
    """

    def get(name: str, dtype: str = "float32"):  # type: ignore[no-untyped-def]
        model = _golden_model(name, dtype)
        model.clear_gradients(set_to_zero=False)
        model.eval()
        return model

    return get


@pytest.fixture(scope="session")
def golden():  # type: ignore[no-untyped-def]
    """file stem -> its arrays."""
    return cache(lambda stem: dict(np.load(GOLDEN / f"{stem}.npz")))
