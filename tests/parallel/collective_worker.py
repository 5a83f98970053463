"""Run on three processes by test_collectives.py: every check compares with numpy, or with the
unsplit computation, on this rank alone.
"""

from __future__ import annotations

import json
import re
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import paddle
import paddle.distributed as dist
import pytest
from paddle import nn

from ernie_tune.config.layout import Layout
from ernie_tune.models.moe import Experts
from ernie_tune.objectives import logprobs
from ernie_tune.objectives.logprobs import token_logp
from ernie_tune.parallel import gloo
from ernie_tune.parallel.collectives import TokenRuns, enter, leave
from ernie_tune.parallel.expert import ExchangedRows
from ernie_tune.parallel.mesh import Mesh, init_mesh
from ernie_tune.parallel.placement import Placement, place, split_


def values(rank: int, size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(100 * seed + rank).standard_normal(size).astype(np.float32)


def close(a: object, b: object, tolerance: float = 1e-6) -> None:
    left, right = (np.asarray(x, np.float64) for x in (a, b))
    assert left.shape == right.shape, (left.shape, right.shape)
    assert np.abs(left - right).max(initial=0.0) <= tolerance, np.abs(left - right).max()


def refused(call: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        call()


def check_all_reduce_of_every_kind(mesh: Mesh) -> None:
    for dtype in ("float32", "float64", "int32", "int64"):
        for op, reduced in ((dist.ReduceOp.SUM, np.sum), (dist.ReduceOp.MAX, np.max), (dist.ReduceOp.MIN, np.min)):
            parts = np.stack([(values(r, 5) * 10).astype(dtype) for r in range(3)])
            x = paddle.to_tensor(parts[mesh.rank])
            dist.all_reduce(x, op)
            close(x.numpy(), reduced(parts, 0), 1e-5)
    x = paddle.to_tensor(values(mesh.rank, 4))
    dist.all_reduce(x, dist.ReduceOp.AVG)
    close(x.numpy(), np.mean([values(r, 4) for r in range(3)], 0))


def check_half_precision_is_added_in_float32(mesh: Mesh) -> None:
    """Stock Gloo returns inf for float16, and loses the small addend in bfloat16: 256 + 1 is 256
    there.
    """
    for dtype, first in (("float16", 30000.0), ("bfloat16", 256.0)):
        parts = [first, 1.0, 1.0]
        x = paddle.to_tensor([parts[mesh.rank]]).astype(dtype)
        dist.all_reduce(x)
        assert x.astype("float32").item() == np.float32(
            paddle.to_tensor([sum(parts)]).astype(dtype).astype("float32").item()
        )


def check_large_sums_are_equal_to_the_bit(mesh: Mesh) -> None:
    x = paddle.to_tensor(values(mesh.rank, 100_003))
    dist.all_reduce(x)
    close(x.numpy(), sum(values(r, 100_003).astype(np.float64) for r in range(3)), 1e-5)
    said = mesh.group("world").objects(x.numpy().tobytes())
    assert said[0] == said[1] == said[2]


def check_gathers_and_scatters(mesh: Mesh) -> None:
    mine = paddle.to_tensor(values(mesh.rank, 6))
    out = paddle.empty([18])
    dist.stream.all_gather(out, mine)
    close(out.numpy(), np.concatenate([values(r, 6) for r in range(3)]))
    parts: list[paddle.Tensor] = []
    dist.all_gather(parts, mine)
    close(parts[2].numpy(), values(2, 6))
    small = paddle.empty([2])
    dist.stream.reduce_scatter(small, mine)
    close(small.numpy(), sum(values(r, 6) for r in range(3))[2 * mesh.rank : 2 * mesh.rank + 2])
    dist.broadcast(mine, 1)
    close(mine.numpy(), values(1, 6))
    target = paddle.to_tensor(values(mesh.rank, 3))
    dist.reduce(target, 2)
    close(target.numpy(), sum(values(r, 3) for r in range(3)) if mesh.rank == 2 else values(mesh.rank, 3))


def check_uneven_all_to_all_with_empty_parts(mesh: Mesh) -> None:
    rows = np.array([[0, 2, 1], [3, 0, 0], [0, 0, 0]])  # [from, to]; rank 2 sends nothing
    mine = paddle.to_tensor(np.full([rows[mesh.rank].sum(), 2], mesh.rank, np.float32))
    out = paddle.empty([int(rows[:, mesh.rank].sum()), 2])
    dist.alltoall_single(
        out, mine, in_split_sizes=rows[mesh.rank].tolist(), out_split_sizes=rows[:, mesh.rank].tolist()
    )
    close(out.numpy()[:, 0], np.repeat(np.arange(3), rows[:, mesh.rank]))


def check_two_ranks_send_first(mesh: Mesh) -> None:
    """Stock Gloo dead-locks: its send waits for the receive."""
    to, back = (mesh.rank + 1) % 3, (mesh.rank - 1) % 3
    got = paddle.empty([200_000])
    dist.send(paddle.to_tensor(values(mesh.rank, 200_000)), to)
    dist.recv(got, back)
    close(got.numpy(), values(back, 200_000))
    tasks = [
        dist.P2POp(dist.irecv, got, back),
        dist.P2POp(dist.isend, paddle.to_tensor(values(mesh.rank, 200_000, 1)), to),
    ]
    for task in dist.batch_isend_irecv(tasks):
        task.wait()
    close(got.numpy(), values(back, 200_000, 1))


def check_ranks_may_come_late(mesh: Mesh) -> None:
    if mesh.rank == 1:
        time.sleep(1.0)
    dist.barrier()


def check_token_runs_of_any_length(mesh: Mesh) -> None:
    """Gather, scatter, spread and join with their gradients, against the whole tensors, for lengths
    that do not divide.
    """
    group = mesh.group("tensor")
    for total in (3, 4, 5, 7, 9):
        runs = TokenRuns(group)
        whole = paddle.to_tensor(values(7, total * 2, total).reshape(total, 2))
        whole.stop_gradient = False
        mine = runs.spread(whole)
        first, end = runs.span()
        close(mine.numpy(), whole.numpy()[first:end])
        assert end - first in (total // 3, total // 3 + 1)
        pull = paddle.to_tensor(values(8, total * 2, total).reshape(total, 2))
        (enter(mine, group, runs) * pull * (mesh.rank + 1)).sum().backward()  # 1 + 2 + 3 of it
        close(whole.grad.numpy(), 6 * pull.numpy(), 1e-5)
        partial = whole.detach() * (mesh.rank + 1)
        partial.stop_gradient = False
        out = leave(partial, group, runs)
        close(out.numpy(), 6 * whole.numpy()[first:end], 1e-5)
        (runs.join(out) * pull).sum().backward()
        close(partial.grad.numpy(), pull.numpy())
    refused(
        lambda: TokenRuns(group).spread(paddle.ones([2, 4])),
        "a pack of 2 token(s) must have at least one for each of the 3 tensor ranks",
    )


def check_split_vocabulary(mesh: Mesh) -> None:
    """token_logp on slices: values and gradients of the unsplit one, in both layouts of the matrix,
    in chunks, and where scores are huge.
    """
    group = mesh.group("tensor")
    rng = np.random.default_rng(1)
    tokens, width, vocab = 7, 5, 12
    for transposed in (True, False):
        for scale, temperature in ((1.0, 1.0), (300.0, 0.7)):
            for chunk in (2**24, 4 * vocab * 2):
                logprobs.CHUNK_BYTES, before = chunk, logprobs.CHUNK_BYTES
                hidden = paddle.to_tensor(rng.standard_normal((tokens, width)) * scale)
                matrix = rng.standard_normal((vocab, width) if transposed else (width, vocab))
                target = paddle.to_tensor(rng.integers(0, vocab, tokens))
                pull = paddle.to_tensor(rng.standard_normal(tokens))
                found = []
                for split in (False, True):
                    layer = nn.Layer()
                    weight = layer.create_parameter(list(matrix.shape), dtype="float64")
                    weight.set_value(paddle.to_tensor(matrix))
                    if split:
                        split_(weight, 0 if transposed else 1, group)
                    x = hidden.clone()
                    x.stop_gradient = False
                    logp = token_logp(x, weight, target, transposed=transposed, temperature=temperature)
                    (logp * pull).sum().backward()
                    grad = weight.grad.numpy()
                    if not split:
                        grad = np.split(grad, 3, 0 if transposed else 1)[mesh.rank]
                    found.append((logp.numpy(), x.grad.numpy(), grad))
                logprobs.CHUNK_BYTES = before
                for a, b in zip(*found, strict=True):
                    close(a, b, 1e-9 * scale)


def check_experts_elsewhere(mesh: Mesh) -> None:
    """Six experts of two families on three ranks: outputs and gradients are those of local experts;
    ranks without rows of a family, experts without any.
    """
    group, rng = mesh.group("tensor"), np.random.default_rng(3)
    counts = {  # family -> [rank, expert]
        0: np.array([[2, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 3], [1, 1, 1, 1, 1, 1]]),
        # nobody sends to ranks 1 and 2
        1: np.array([[0, 0, 0, 0, 0, 0], [0, 2, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]]),
    }
    weights = {f: (rng.standard_normal((6, 4, 6)), rng.standard_normal((6, 3, 4))) for f in counts}

    def stack(f: int, split: bool) -> Experts:
        paddle.set_default_dtype("float64")
        experts = Experts(6, 4, 3)
        paddle.set_default_dtype("float32")
        for value, given in zip((experts.up_gate_proj, experts.down_proj), weights[f], strict=True):
            value.set_value(paddle.to_tensor(given))
            if split:
                split_(value, 0, group, expert=True)
        return experts

    rows = {f: [rng.standard_normal((c[r].sum(), 4)) for r in range(3)] for f, c in counts.items()}
    pulls = {f: [rng.standard_normal((c[r].sum(), 4)) for r in range(3)] for f, c in counts.items()}
    whole, parts = {f: stack(f, False) for f in counts}, {f: stack(f, True) for f in counts}
    want = {}
    for f in counts:
        for r in range(3):
            if not counts[f][r].any():
                continue
            x = paddle.to_tensor(rows[f][r])
            x.stop_gradient = False
            out = whole[f](x, tuple(counts[f][r].tolist()))
            (out * paddle.to_tensor(pulls[f][r])).sum().backward()
            want[f, r] = (out.numpy(), x.grad.numpy())
    from ernie_tune.models.moe import ExpertWork

    inputs = {f: paddle.to_tensor(rows[f][mesh.rank]) for f in counts if counts[f][mesh.rank].any()}
    for x in inputs.values():
        x.stop_gradient = False
    work = [ExpertWork(parts[f], inputs.get(f), tuple(counts[f][mesh.rank].tolist())) for f in counts]
    exchange = ExchangedRows(group, None)
    outs = exchange(work)
    assert [o is None for o in outs] == [f not in inputs for f in counts]
    sum((outs[f] * paddle.to_tensor(pulls[f][mesh.rank])).sum() for f in inputs).backward()
    for f, x in inputs.items():
        close(outs[f].numpy(), want[f, mesh.rank][0], 1e-12)
        close(x.grad.numpy(), want[f, mesh.rank][1], 1e-12)
    exchange.drop_unused()
    for f in counts:
        for part, full in zip(parts[f].parameters(), whole[f].parameters(), strict=True):
            reached = counts[f][:, 2 * mesh.rank : 2 * mesh.rank + 2].any()
            assert (part.grad is not None) == bool(reached)
            if reached:
                close(part.grad.numpy(), full.grad.numpy()[2 * mesh.rank : 2 * mesh.rank + 2], 1e-12)


def check_what_does_not_divide_is_refused(mesh: Mesh) -> None:
    weight = nn.Layer().create_parameter([4, 7])
    refused(lambda: split_(weight, 1, mesh.group("tensor")), "dimension 1 (7) of a parameter")
    refused(lambda: split_(weight, 1, mesh.group("tensor")), "divisible by the tensor ranks (3)")
    place(weight, Placement(partial=True))
    assert weight.placement.partial
    assert not weight.is_distributed


CHECKS: dict[str, Callable[[Mesh], None]] = {
    name.removeprefix("check_"): value for name, value in list(globals().items()) if name.startswith("check_")
}


READERS = "no reader is left when the interpreter ends"


def main() -> None:
    mesh = init_mesh(Layout(tensor=3))
    folder, found = Path(sys.argv[1]), {}
    if sys.argv[2:] == ["one rank ends"]:
        if mesh.rank == 2:
            raise SystemExit(0)
        start = time.monotonic()
        try:
            dist.barrier(mesh.group("tensor").fleet)
        except ConnectionError as error:
            found = {"message": str(error), "seconds": time.monotonic() - start}
        (folder / f"rank_{mesh.rank}.json").write_text(json.dumps(found))
        return
    for name, check in CHECKS.items():
        try:
            check(mesh)
            found[name] = ""
        except AssertionError:
            found[name] = traceback.format_exc()
        (folder / f"rank_{mesh.rank}.json").write_text(json.dumps(found))
    gloo._mesh().close()
    left = [link for link, thread in gloo._mesh().readers if thread.is_alive()]
    found[READERS] = f"{len(left)} threads read on" if left or len(gloo._mesh().readers) < 3 else ""
    (folder / f"rank_{mesh.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
