"""Whether a model can look anything up in its context: how much each head attends to the token
before, and to what came behind the same token earlier. Knows ernie_tune's decoder and this folder's
words, nothing of training.

Usage: python heads.py output/base/stage9
Runs of words that stand twice in a row. `previous`: mean attention to the token before.
`successor`: of the tokens of the second run, to the token behind the same one in the first. What
copies is a head of the second kind above one of the first (Olsson et al. 2022, In-context Learning
and Induction Heads).
"""

from __future__ import annotations

import random
import sys
from unittest import mock

import lookups
import numpy as np

from ernie_tune import AutoModel, AutoProcessor
from ernie_tune.generate.engine import Engine, Request
from ernie_tune.models import ernie

RUNS, WORDS = 12, 12
EDGE = 6  # tokens of the chat template around a question, at most


def attention(q_TNH: np.ndarray, k_TKH: np.ndarray) -> np.ndarray:
    """Causal attention [N, T, T] of one segment; query head j reads key head j // (N/K)."""
    tokens, heads, width = q_TNH.shape
    k_TNH = np.repeat(k_TKH, heads // k_TKH.shape[1], axis=1)
    scores = np.einsum("inh,jnh->nij", q_TNH, k_TNH) / np.sqrt(width)
    scores = np.where(np.tril(np.ones((tokens, tokens), bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def shares(weights_NTT: np.ndarray, period_tokens: int) -> np.ndarray:
    """[N, 2]: attention to the token before, and to the one behind the same token one period
    earlier.
    """
    tokens = weights_NTT.shape[1]
    here = np.arange(EDGE, tokens)
    again = np.arange(tokens - period_tokens, tokens - EDGE)  # of the second run, whatever the template holds
    previous = weights_NTT[:, here, here - 1].mean(1)
    return np.stack([previous, weights_NTT[:, again, again - period_tokens + 1].mean(1)], 1)


def main() -> None:
    model, processor = AutoModel.from_pretrained(sys.argv[1]), AutoProcessor.from_pretrained(sys.argv[1])
    engine, rng = Engine(model, processor), random.Random(5)
    found: list[list[np.ndarray]] = []  # by run, then by layer
    attend = ernie.segment_attention
    for i in range(RUNS):
        words = lookups.run(rng, zh=i % 2 == 1, count=WORDS)
        layers: list[np.ndarray] = []
        period_tokens = len(processor.tokenizer.encode(words))

        def seen(q, k, v, plan, layers=layers, period_tokens=period_tokens):  # type: ignore[no-untyped-def]
            layers.append(shares(attention(q.numpy(), k.numpy()), period_tokens))
            return attend(q, k, v, plan)

        question = [{"role": "user", "content": words + words}]
        with mock.patch.object(ernie, "segment_attention", seen):
            engine.answer([Request(question)], engine.params(max_new_tokens=1, temperature=0.0))
        found.append(layers)
    for layer, heads in enumerate(np.mean(found, axis=0)):
        for head, (previous, successor) in enumerate(heads):
            print(f"layer {layer} head {head}: previous {previous:.2f} successor {successor:.2f}")


if __name__ == "__main__":
    main()
