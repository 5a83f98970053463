"""The completed Gloo, collectives with gradients, split vocabularies and experts elsewhere, on
three processes; degrees that cannot be.
"""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
from collective_worker import CHECKS, READERS
from launching import launch

from ernie_tune.config.layout import Layout
from ernie_tune.parallel import gloo
from ernie_tune.parallel.mesh import Group, Mesh, fleet_degrees, init_mesh
from ernie_tune.parallel.placement import Placement

WORKER = Path(__file__).parent / "collective_worker.py"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    folder = tmp_path_factory.mktemp("collectives")
    code, tails = launch(folder, 3, WORKER, str(folder), timeout_s=150)
    assert code == 0, tails
    return [json.loads((folder / f"rank_{r}.json").read_text()) for r in range(3)]


@pytest.mark.parametrize("name", [*CHECKS, READERS])
def test_on_three_processes(name: str, found: list[dict[str, str]]) -> None:
    for rank in found:
        assert rank[name] == "", rank[name]


def test_who_waits_for_a_rank_that_has_ended_is_told(tmp_path: Path) -> None:
    launch(tmp_path, 3, WORKER, str(tmp_path), "one rank ends", timeout_s=100)
    for rank in (0, 1):
        said = json.loads((tmp_path / f"rank_{rank}.json").read_text())
        assert said["message"].startswith("rank 2 has ended; rank ")
        assert said["seconds"] < 20


def test_who_sends_to_a_rank_that_has_ended_is_told() -> None:
    """Not as a broken pipe, which the command line takes for `| head` and passes over."""
    links = object.__new__(gloo._Links)
    links.rank, links.closed = 0, set()
    ours, theirs = socket.socketpair()
    theirs.close()
    links.out = {1: ours}
    with ours, pytest.raises(ConnectionError, match=r"rank 1 has ended; rank 0 sent it something \(group 3") as told:
        links.send(1, 3, 0, memoryview(b"x"))
    assert not isinstance(told.value, BrokenPipeError)


def test_another_version_of_paddle_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gloo, "TESTED_WITH", ("0.0.1",))
    assert gloo.untested("9.9.9") == (
        "ernie_tune: paddle 9.9.9: the CPU collectives were tested with 0.0.1; compare losses with one process"
    )
    assert gloo.untested("0.0.1+cpu") == ""


@pytest.mark.parametrize(
    ("degrees", "message"),
    [
        ({"tensor": 0}, r"tensor \(0\) must be at least 1"),
        ({"sharding_stage": 4}, r"sharding_stage \(4\) must be 0, 1, 2 or 3"),
        ({"data": 2, "sharding_stage": 1}, r"give its ranks to sharding instead of data \(2\)"),
        ({"sharding": 2}, r"sharding \(2\) must go with sharding_stage"),
        ({"sharding": 2, "sharding_stage": 2, "pipe": 2}, r"sharding_stage \(2\) must be 0 or 1 with pipe \(2\)"),
        ({"sequence_parallel": True}, r"sequence_parallel must go with tensor \(1\) above 1"),
        ({"tensor": 2, "expert": 2}, r"expert \(2\) with tensor \(2\) must go with sequence_parallel"),
        ({"data": 2, "expert": 4}, r"expert \(4\) must be a multiple of tensor \(1\) and divide tensor x data x sharding \(2\)"),
    ],
)  # fmt: skip
def test_degrees_that_cannot_be(degrees: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mesh(Layout(**degrees))


def test_degrees_must_fit_the_processes() -> None:
    with pytest.raises(ValueError, match=r"\(2 x 1 x 1 x 1 = 2\) must equal the number of processes \(1\); start 2"):
        init_mesh(Layout(tensor=2))
    mesh = init_mesh(Layout())
    assert mesh.world == 1
    assert mesh.batch == (0, 1)
    assert mesh.describe() == "1 process(es)"


def test_experts_over_sharding_ranks_take_in_the_data_axis() -> None:
    d = Layout(tensor=2, data=2, sharding=2, sharding_stage=1, expert=4, sequence_parallel=True)
    assert fleet_degrees(d) == {
        "dp_degree": 1, "mp_degree": 2, "pp_degree": 1, "sharding_degree": 4, "ep_degree": 4, "moe_sharding_degree": 2,
    }  # fmt: skip
    assert not Layout(
        tensor=2, expert=2, sequence_parallel=True
    ).fleet_experts  # the official way: over the tensor group


def test_seeds_differ_where_rows_differ() -> None:
    def at(batch: int, pipe: int, tensor: int) -> int:
        groups = {
            "batch": Group("batch", (0, 1), batch),
            "pipe": Group("pipe", (0, 1), pipe),
            "tensor": Group("tensor", (0, 1), tensor),
        }
        return Mesh(Layout(), groups).seed(42, 7)

    assert Mesh().seed(42, 7) == 42 * 1_000_003 + 7  # the loop's own on one process
    assert at(0, 0, 0) == at(0, 0, 1)  # a dropout mask of what tensor ranks hold alike
    assert len({at(b, p, 0) for b in (0, 1) for p in (0, 1)}) == 4


def test_indices_of_a_slice() -> None:
    group = Group("expert", (0, 1), 1)
    assert list(Placement(0, "expert", handle=group).indices(6)) == [3, 4, 5]
    assert Placement(0, "expert", handle=group, kept=(2,)).indices(6) == (2,)
    assert list(Placement().indices(2)) == [0, 1]
