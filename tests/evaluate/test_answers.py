"""evaluate/answers.py: losses against an independent forward, answers in batches against answers
one by one, questions without their answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from support.scripted import script
from support.tiny_runs import mixed_rows, picture_row, processor, records

from ernie_tune.data.batching import Dropped, Encoder
from ernie_tune.data.records import Record
from ernie_tune.evaluate.answers import answers, evaluation_loss, question
from ernie_tune.generate.batch import generate
from ernie_tune.generate.sampling import SamplingParams
from ernie_tune.models.inputs import pack

PROCESSOR = processor()


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Sequence[Record]:
    return records(tmp_path_factory.mktemp("rows"), mixed_rows(7))


def test_the_loss_is_that_of_an_independent_forward(rows: Sequence[Record], golden_model: Any) -> None:
    model, encoder = golden_model("tiny-b"), Encoder(PROCESSOR, 60)
    nll, hits, kept = [], [], 0
    for row in rows:
        sample = encoder(row, Dropped())
        if sample is None:
            continue
        kept += 1
        scores = model.logits(model(pack([sample.row], PROCESSOR.tokens))).numpy().astype(np.float64)
        logp_TV = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
        for t in np.flatnonzero(sample.trained_L):
            nll.append(-logp_TV[t - 1, sample.row.input_ids_L[t]])
            hits.append(scores[t - 1].argmax() == sample.row.input_ids_L[t])
    assert 0 < kept < len(rows)
    for batch in (1, 2, 100):
        model.train()
        told: list[int] = []
        found = evaluation_loss(model, rows, encoder, batch, told.append)
        assert sum(told) == kept
        assert model.training, "the mode is put back"
        assert found["loss"] == pytest.approx(np.mean(nll), rel=1e-5)
        assert found["token_acc"] == pytest.approx(np.mean(hits))
        assert (found["rows"], found["dropped_rows"]) == (kept, len(rows) - kept)
    model.eval()
    assert "dropped_rows" not in evaluation_loss(model, rows, Encoder(PROCESSOR, 1000), 8)
    assert not model.training


def test_a_loss_over_nothing_is_refused(rows: Sequence[Record], golden_model: Any) -> None:
    model = golden_model("tiny-b")
    with pytest.raises(
        ValueError, match=r"must hold one that can be measured: dropped 7 row\(s\): longer than max_seq"
    ):
        evaluation_loss(model, rows, Encoder(PROCESSOR, 5), 2)
    with pytest.raises(ValueError, match="must hold one that can be measured: there is none"):
        evaluation_loss(model, [], Encoder(PROCESSOR, 100), 2)


def test_answers_in_batches_are_answers_one_by_one(rows: Sequence[Record], golden_model: Any) -> None:
    model = golden_model("tiny-b")
    asked = [question(row) for row in rows[:5]]
    told: list[int] = []
    together = answers(model, PROCESSOR, asked, max_new_tokens=4, rows=3, done=told.append)
    assert sum(told) == len(asked)
    alone = [answers(model, PROCESSOR, [q], max_new_tokens=4, rows=1)[0] for q in asked]
    assert together == alone
    assert len(set(together)) > 1, "the order must be able to show"
    # and by hand: the prompt, greedily continued
    encoded = PROCESSOR.encode(rows[3].messages[:-1], rows[3].images, add_generation_prompt=True)
    banned = PROCESSOR.tokens.placeholders() + PROCESSOR.tokens.markers()
    params = SamplingParams(max_new_tokens=4, stop_ids=PROCESSOR.stop_ids, banned_ids=banned)
    done = generate(model, [encoded.row], PROCESSOR.tokens, params)[0][0]
    assert alone[3] == PROCESSOR.decode(done.token_ids).strip()


def test_answers_come_in_the_order_of_the_questions(
    rows: Sequence[Record], monkeypatch: pytest.MonkeyPatch, golden_model: Any
) -> None:
    """Each answer is the length of its prompt; prompts of like length are asked together."""
    prompts = script(monkeypatch, lambda p: PROCESSOR.tokenizer.encode(str(len(p.row.input_ids_L))))
    asked = [question(row) for row in rows]
    expected = [str(PROCESSOR.encode(r.messages[:-1], r.images, add_generation_prompt=True).num_tokens) for r in rows]
    assert answers(golden_model("tiny-b"), PROCESSOR, asked, max_new_tokens=6, rows=3) == expected
    lengths = [len(p.row.input_ids_L) for p in prompts]
    assert lengths == sorted(lengths)
    assert len(set(expected)) > 3


# --- questions ------------------------------------------------------------------------------------


def dialogue(*turns: tuple[str, str], **more: Any) -> Record:
    return Record("sft", tuple({"role": r, "content": c} for r, c in turns), **more)  # type: ignore[misc]


def test_a_question_keeps_only_the_media_that_it_shows(tmp_path: Any) -> None:
    made = question(
        dialogue(
            ("user", "<image>a"), ("assistant", "b"), ("user", "<image>c<video>"), ("assistant", "see <image><video>"),
            images=("1", "2", "3"), videos=("x", "y"),
        )
    )  # fmt: skip
    assert (made.images, made.videos, made.reference) == (("1", "2"), ("x",), "see <image><video>")
    first = question(records(tmp_path, [picture_row(4)])[0])
    assert first.reference == "4"
    assert len(first.images) == 1


def test_references_are_answers_without_thoughts() -> None:
    assert question(dialogue(("user", "a"), ("assistant", "<think>\nso\n</think>\n\nseven"))).reference == "seven"
    turn = {"role": "assistant", "content": "seven", "reasoning_content": "so"}
    assert question(Record("sft", ({"role": "user", "content": "a"}, turn))).reference == "seven"  # type: ignore[arg-type]


def test_a_row_without_an_answer_cannot_be_measured() -> None:
    with pytest.raises(ValueError, match=r"last role \(user\) must be assistant to evaluate; add the reference answer"):
        question(dialogue(("user", "a")))


@pytest.mark.parametrize(
    ("content", "mode", "thinks"),
    [("b", "auto", False), ("<think>\nso\n</think>\n\nb", "auto", True), ("b", "think", True), ("b", "nothink", False)],
)
def test_a_model_is_asked_to_think_where_the_reference_does(
    content: str, mode: str, thinks: bool, monkeypatch: pytest.MonkeyPatch, golden_model: Any
) -> None:
    ids = PROCESSOR.tokenizer.encode("\nwhy\n</think>\n\n7 ", allow_special=True)
    prompts = script(monkeypatch, lambda _: ids)
    asked = [question(dialogue(("user", "a"), ("assistant", content), mode=mode))]
    answer = answers(golden_model("tiny-b"), PROCESSOR, asked, max_new_tokens=6, rows=3)
    asked_text = PROCESSOR.tokenizer.decode(prompts[0].row.input_ids_L)
    assert asked_text.endswith("Assistant: <think>" if thinks else "</think>\n\n")
    if thinks:
        assert answer == ["7"], "the prompt opened the thought, so the answer begins inside it"
