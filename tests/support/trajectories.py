"""Twenty steps of every method on a tiny model: losses, gradient norms, and digests of every
gradient and of the final parameters.

    # write tests/golden/trajectories.json, in float64
    python tests/support/trajectories.py
    # another checkout: equal bit for bit, in float32?
    python tests/support/trajectories.py --compare OTHER
    python tests/support/trajectories.py --only dpo kto ...

The stored values hold on any x86-64 processor: float64 (float32 for reward models, whose head knows
no other), so that no rounding can send a token to another expert, and no bound on parameters, which
AdamW moves by a full step wherever a tiny gradient changes its sign. Bit equality is asked of two
checkouts on one machine. Uses the public names of the package alone, so it also runs older
checkouts.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "examples" / "digits" / "images"
GOLDEN = ROOT / "tests" / "golden" / "trajectories.json"
STEPS = 20
_QUESTIONS = ("read", "read the digit", "why is it so", "tell me")
_LORA = {"fine_tuning": "LoRA", "lora_rank": 4, "lora_target_modules": "all-linear", "lora_experts": "both"}
_SAMPLED = {
    **{"num_generations": 2, "max_completion_length": 8, "num_iterations": 2},
    "reward_funcs": f"{Path(__file__)}:parity",
}

# name -> (trainer, kinds of rows, settings)
METHODS: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "sft_full": ("SFTTrainer", ("sft",), {"stage": "SFT"}),
    "sft_lora": ("SFTTrainer", ("sft",), {"stage": "SFT", **_LORA, "learning_rate": 1e-2}),
    "pt": ("SFTTrainer", ("sft",), {"stage": "PT", "packing": True, "max_seq_len": 64}),
    "dpo": ("DPOTrainer", ("pair",), {"stage": "DPO"}),
    "dpo_moving": ("DPOTrainer", ("pair",), {"stage": "DPO", "ref_model_update_steps": 5}),
    "dpo_lora": ("DPOTrainer", ("pair", "ranking"), {"stage": "DPO", **_LORA, "loss_type": "sigmoid,bco_pair"}),
    "kto": ("KTOTrainer", ("label",), {"stage": "KTO"}),
    "bco": ("KTOTrainer", ("label",), {"stage": "KTO", "loss_type": "bco", "bco_density": True}),
    "listwise": ("UPOTrainer", ("ranking", "rating"), {"stage": "UPO", "allow_base": True, "rate_loss": "infonca"}),
    "upo": ("UPOTrainer", ("pair", "ranking", "rating", "label"), {"stage": "UPO", "allow_base": True}),
    "rm": ("RewardTrainer", ("pair", "ranking"), {"stage": "RM"}),
    "rm_levels": ("RewardTrainer", ("pair", "rating"), {"stage": "RM", "rating_loss": "ordinal"}),
    "rlvr": ("RLVRTrainer", ("verifiable",), {"stage": "RLVR", **_SAMPLED}),
    "ppo": ("PPOTrainer", ("verifiable",), {"stage": "PPO", **_SAMPLED}),
}


def parity(completions: list[Any], **_: Any) -> list[float]:
    """A reward that differs between nearly all answers of a model that has learned nothing."""
    return [sum(map(ord, answer[0]["content"])) % 7 / 7 for answer in completions]


def row(kind: str, i: int) -> dict[str, Any]:
    """One row of a kind; every third is text alone."""
    picture = i % 3 != 2
    question = ("<image>" if picture else "") + _QUESTIONS[i % len(_QUESTIONS)]
    messages = [{"role": "user", "content": question}]
    made: dict[str, Any] = {"messages": messages, **({"images": [str(IMAGES / f"{i:04d}.png")]} if picture else {})}
    right, wrong = str(i % 10), f"I think it is {(i + 1) % 10}"
    if kind == "sft":
        return {**made, "messages": [*messages, {"role": "assistant", "content": right}]}
    if kind == "pair":
        signal: dict[str, Any] = {"chosen": right, "rejected": wrong}
    elif kind == "ranking":
        signal = {"responses": [f"no {i}", right, f"digit {right}", "no"], "order": "B>C>A=D"}
    elif kind == "verifiable":
        signal = {"answer": right}
    elif kind == "rating":
        rated = ((right, 5), (f"it is {right}", 3), ("no", 1))
        signal = {"responses": [{"text": text, "score": score} for text, score in rated], "scale": [1, 5]}
    else:
        signal = {"response": right if i % 2 else wrong, "label": i % 2}
    return {**made, "signal": {"type": kind, **signal}}


@contextlib.contextmanager
def _watched() -> Iterator[list[dict[str, Any]]]:
    """What AdamW is given at each of its steps: a digest of all gradients, and the sum of each
    one's squares at the first.
    """
    import numpy as np
    import paddle

    seen: list[dict[str, Any]] = []
    step = paddle.optimizer.AdamW.step

    def watched(self: Any) -> Any:
        groups = [g["params"] if isinstance(g, dict) else [g] for g in self._parameter_list]
        gradients = [p.grad.numpy() for group in groups for p in group if p.grad is not None]
        digest = hashlib.blake2b(digest_size=16)
        for gradient in gradients:
            digest.update(np.ascontiguousarray(gradient).tobytes())
        found: dict[str, Any] = {"gradients": digest.hexdigest()}
        if not seen:
            found["squares"] = sorted(float((g.astype(np.float64) ** 2).sum()) for g in gradients)
        seen.append(found)
        return step(self)

    paddle.optimizer.AdamW.step = watched
    try:
        yield seen
    finally:
        paddle.optimizer.AdamW.step = step


def run(name: str, folder: Path, float64: bool) -> dict[str, Any]:
    """The trajectory of one method."""
    import ernie_tune

    trainer_name, kinds, changes = METHODS[name]
    data = folder / f"{name}.jsonl"
    rows = [row(kinds[i % len(kinds)], i) for i in range(12)]
    data.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    settings: dict[str, Any] = {
        "model_name_or_path": "tiny-a",
        "fine_tuning": "Full",
        "train_dataset_path": str(data),
        "output_dir": str(folder / name),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2 if name == "kto" else 1,
        "max_seq_len": 200,
        **({} if kinds == ("sft",) else {"max_prompt_len": 150}),
        "learning_rate": 1e-3,
        "adam_epsilon": 1e-5,
        "warmup_steps": 2,
        "save_strategy": "no",
        "plot_loss": False,
        "disable_tqdm": True,
        "float64": float64 and trainer_name != "RewardTrainer",  # whose head is float32
    }
    with _watched() as seen, contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        trainer = getattr(ernie_tune, trainer_name)(args=ernie_tune.TrainingArguments(**{**settings, **changes}))
        trainer.train()
    digest = hashlib.blake2b(digest_size=16)
    for parameter in trainer.model.parameters():
        digest.update(parameter.numpy().tobytes())
    log = (folder / name / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()
    records = [r for r in map(json.loads, log) if "loss" in r]
    return {
        "losses": [r["loss"] for r in records],
        "grad_norms": [r["grad_norm"] for r in records],
        "first_squares": seen[0]["squares"],
        "gradients": [s["gradients"] for s in seen],
        "parameters": digest.hexdigest(),
    }


def trajectories(names: list[str], float64: bool) -> dict[str, dict[str, Any]]:
    """name -> its trajectory."""
    with tempfile.TemporaryDirectory() as folder:
        return {name: run(name, Path(folder), float64) for name in names}


def _of_checkout(checkout: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [sys.executable, __file__, "--bits", str(out), "--only", *names]
        subprocess.run(command, env={**os.environ, "PYTHONPATH": str(checkout)}, check=True, cwd=folder)
        return json.loads(out.read_text(encoding="utf-8"))


def compare(other: Path, names: list[str]) -> int:
    """Print, for each method, whether this checkout's run is that of `other`, bit for bit; how many
    are not.
    """
    mine, theirs = _of_checkout(ROOT, names), _of_checkout(other, names)
    for name in names:
        differ = [part for part in mine[name] if mine[name][part] != theirs[name][part]]
        digests = zip(mine[name]["gradients"], theirs[name]["gradients"], strict=True)
        first = next((i + 1 for i, (a, b) in enumerate(digests) if a != b), None)
        words = f"DIFFERS in {', '.join(differ)}, gradients from step {first}" if differ else "equal"
        print(f"{name}: {words}; loss {mine[name]['losses'][0]:.9g} to {mine[name]['losses'][-1]:.9g}")
    return sum(mine[name] != theirs[name] for name in names)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--compare", type=Path, help="another checkout")
    parser.add_argument("--bits", type=Path, help="write a float32 run here, digests included")
    parser.add_argument("--only", nargs="+", default=list(METHODS), choices=list(METHODS))
    given = parser.parse_args()
    if given.compare:
        return min(1, compare(given.compare.resolve(), given.only))
    if given.bits:
        given.bits.write_text(json.dumps(trajectories(given.only, float64=False)), encoding="utf-8")
        return 0
    stored = json.loads(GOLDEN.read_text(encoding="utf-8")) if GOLDEN.is_file() else {}
    for name, found in trajectories(given.only, float64=True).items():
        stored[name] = {
            part: [float(f"{x:.10g}") for x in found[part]] for part in ("losses", "grad_norms", "first_squares")
        }
    GOLDEN.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
