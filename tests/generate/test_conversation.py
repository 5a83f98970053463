"""generate/conversation.py and data/tensors.py: the calls that users of transformers know give what
the engine gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
import pytest
from PIL import Image
from support.tiny_runs import IMAGES, processor

import ernie_tune
from ernie_tune.data.tensors import inputs_of, rows_of
from ernie_tune.generate.engine import Engine, Request
from ernie_tune.models.ernie import ErnieModel

PROCESSOR = processor()
DIGIT = str(IMAGES / "0003.png")
QUESTIONS = [
    [{"role": "user", "content": "why"}],
    [{"role": "system", "content": "be short"}, {"role": "user", "content": "<image>read the digit"}],
    [{"role": "user", "content": [{"type": "image", "image": DIGIT}, {"type": "text", "text": "and a longer one"}]}],
]
PICTURES: list[list[Any]] = [[], [DIGIT], []]


@pytest.fixture
def model(golden_model: Any) -> ErnieModel:
    assert ernie_tune.AutoModel, "resolving a public name gives models their voice"
    return golden_model("tiny-b")


def answered(model: ErnieModel, i: int, **params: Any) -> list[Any]:
    engine = Engine(model, PROCESSOR)
    return engine.answer([Request(QUESTIONS[i], PICTURES[i])], engine.params(**params))[0]


@pytest.mark.parametrize("i", [0, 1, 2])
def test_chat_is_the_engine(model: Any, i: int) -> None:
    wanted = answered(model, i, max_new_tokens=6)[0].content.strip()
    assert model.chat(QUESTIONS[i], PICTURES[i], processor=PROCESSOR, max_new_tokens=6) == wanted
    pieces = model.chat(QUESTIONS[i], PICTURES[i], processor=PROCESSOR, max_new_tokens=6, stream=True)
    assert "".join(pieces).strip() == wanted


def test_chat_takes_a_question_and_a_picture_without_tags(model: Any) -> None:
    tagged = [{"role": "user", "content": "<image><image>read the digit"}]
    wanted = model.chat(tagged, [DIGIT, DIGIT], processor=PROCESSOR, max_new_tokens=4)
    told = [{"role": "user", "content": "read the digit"}]
    assert (
        model.chat("read the digit", images=[DIGIT, Image.open(DIGIT)], processor=PROCESSOR, max_new_tokens=4) == wanted
    )
    assert model.chat(told, [DIGIT, DIGIT], processor=PROCESSOR, max_new_tokens=4) == wanted
    assert told == [{"role": "user", "content": "read the digit"}], "the caller's messages stay as they are"
    one = model.chat("read the digit", DIGIT, processor=PROCESSOR, max_new_tokens=4)
    assert one == model.chat("<image>read the digit", [DIGIT], processor=PROCESSOR, max_new_tokens=4)


def test_chat_samples(model: Any) -> None:
    samples = model.chat(QUESTIONS[0], processor=PROCESSOR, max_new_tokens=5, num_return_sequences=3, seed=4)
    wanted = [a.content.strip() for a in answered(model, 0, max_new_tokens=5, n=3, temperature=1.0, seed=4)]
    assert samples == wanted
    greedy = model.chat(QUESTIONS[0], processor=PROCESSOR, max_new_tokens=5, do_sample=False)
    assert greedy == model.chat(QUESTIONS[0], processor=PROCESSOR, max_new_tokens=5)
    drawn = model.chat(QUESTIONS[0], processor=PROCESSOR, max_new_tokens=5, do_sample=True, seed=4)
    assert drawn == wanted[0]


def test_generate_is_the_engine_in_the_shape_of_transformers(model: Any) -> None:
    inputs = PROCESSOR.apply_chat_template(
        QUESTIONS, PICTURES, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pd"
    )
    length = inputs["input_ids"].shape[1]
    assert inputs.attention_mask.numpy()[0, 0] == 0, "shorter rows are filled up on the left"
    out = model.generate(**inputs, max_new_tokens=5, processor=PROCESSOR)
    assert isinstance(out, paddle.Tensor)
    assert np.array_equal(out[:, :length].numpy(), inputs["input_ids"].numpy())
    for i, row in enumerate(out[:, length:].numpy().tolist()):
        wanted = [*answered(model, i, max_new_tokens=5)[0].token_ids]
        assert row == wanted + [PROCESSOR.stop_ids[0]] * (len(row) - len(wanted))
    texts = PROCESSOR.batch_decode(out[:, length:], skip_special_tokens=True)
    assert texts[0].strip() == model.chat(QUESTIONS[0], processor=PROCESSOR, max_new_tokens=5)
    assert PROCESSOR.decode(out[0, length:], skip_special_tokens=True) == texts[0]
    alone = PROCESSOR.apply_chat_template(QUESTIONS[0], add_generation_prompt=True, tokenize=True, return_tensors="np")
    three = model.generate(alone, max_new_tokens=5, num_return_sequences=3, seed=4, processor=PROCESSOR)
    assert three.shape[0] == 3
    drawn = [list(a.token_ids) for a in answered(model, 0, max_new_tokens=5, n=3, temperature=1.0, seed=4)]
    assert three[:, alone.shape[1] :].numpy().tolist()[1][: len(drawn[1])] == drawn[1]


def test_generate_stops_at_the_ids_it_is_told(model: Any) -> None:
    ids = PROCESSOR.apply_chat_template(QUESTIONS[0], add_generation_prompt=True, tokenize=True)
    free = model.generate([ids], max_new_tokens=4, processor=PROCESSOR).numpy()[0, len(ids) :].tolist()
    cut = model.generate([ids], max_new_tokens=4, processor=PROCESSOR, eos_token_id=free[1]).numpy()[0, len(ids) :]
    assert cut.tolist() == free[: free.index(free[1]) + 1]


def test_template_and_call_give_the_ids_of_encode() -> None:
    text = PROCESSOR.apply_chat_template(QUESTIONS[1], add_generation_prompt=True)
    assert text == PROCESSOR.template.render(QUESTIONS[1], add_generation_prompt=True)
    encoded = PROCESSOR.encode(QUESTIONS[1], [DIGIT], add_generation_prompt=True)
    ids = PROCESSOR.apply_chat_template(QUESTIONS[1], [DIGIT], add_generation_prompt=True, tokenize=True)
    assert ids == encoded.row.input_ids_L.tolist()
    called = PROCESSOR(text=text, images=DIGIT)
    assert called["input_ids"].tolist() == [ids]
    assert np.array_equal(called["pixel_values"], encoded.row.pixel_values_PC)
    assert np.array_equal(called["image_grid_thw"], encoded.row.grid_thw_n3)
    texts = PROCESSOR.apply_chat_template(QUESTIONS[:2], add_generation_prompt=True)
    together = PROCESSOR(text=texts, images=[[DIGIT]], return_tensors="np")
    assert together["attention_mask"].sum(1).tolist() == [len(PROCESSOR(text=texts[0])["input_ids"][0]), len(ids)]
    thought = PROCESSOR.apply_chat_template(QUESTIONS[0], add_generation_prompt=True, enable_thinking=True)
    assert thought.endswith("<think>")


def test_rows_come_back_from_the_rectangle() -> None:
    rows = [PROCESSOR.encode(q, p, add_generation_prompt=True).row for q, p in zip(QUESTIONS, PICTURES, strict=True)]
    back = rows_of(**inputs_of(rows, 0, "np"), tokens=PROCESSOR.tokens)
    for row, again in zip(rows, back, strict=True):
        assert np.array_equal(row.input_ids_L, again.input_ids_L)
        assert (row.grid_thw_n3 is None) == (again.grid_thw_n3 is None)
        if row.pixel_values_PC is not None:
            assert np.array_equal(row.pixel_values_PC, again.pixel_values_PC)


def test_what_does_not_fit_is_refused(model: Any) -> None:
    made = PROCESSOR.apply_chat_template(
        QUESTIONS[1], [DIGIT], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    with pytest.raises(ValueError, match="must fit the placeholders"):
        model.generate(made["input_ids"], processor=PROCESSOR)
    with pytest.raises(ValueError, match="must fit the placeholders"):
        model.generate(**{**made, "pixel_values": made["pixel_values"][:-4]}, processor=PROCESSOR)
    with pytest.raises(ValueError, match=r"attention_mask \(\[1, 2\]\) must have the shape"):
        model.generate(**{**made, "attention_mask": [[1, 1]]}, processor=PROCESSOR)
    with pytest.raises(ValueError, match=r"input_ids .* must be given"):
        model.generate(max_new_tokens=3, processor=PROCESSOR)
    with pytest.raises(ValueError, match="num_beams is no setting of sampling"):
        model.chat("why", processor=PROCESSOR, num_beams=4)
    with pytest.raises(ValueError, match=r"return_tensors .'pt'. must be 'np' or 'pd'"):
        PROCESSOR.apply_chat_template(QUESTIONS[0], add_generation_prompt=True, tokenize=True, return_tensors="pt")
    with pytest.raises(ValueError, match="must be one for each placeholder"):
        PROCESSOR(text=PROCESSOR.apply_chat_template(QUESTIONS[1], add_generation_prompt=True))
    with pytest.raises(ValueError, match="1 too many"):
        PROCESSOR(text="plain", images=[DIGIT])
    with pytest.raises(ValueError, match=r"processor .None. must be given"):
        ErnieModel.chat(model, "why")  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "given",
    [[], None, 3, [3], [{}], [[]], b"x", {"role": "user", "content": "q"}, [{"role": "user"}], [{"content": "q"}]],
)
def test_what_is_no_conversation_is_told_what_to_pass(model: Any, given: Any) -> None:
    with pytest.raises(ValueError, match=r"messages \(.*\) must be a question, or messages .* pass model\.chat\("):
        model.chat(given, processor=PROCESSOR)


@pytest.mark.parametrize(
    "given", ["text", [], [[]], [["a"]], [[1.5]], [1.5, 2.0], [[True]], [[-1]], [[10**9]], [[1, 2], [3]], [[[1]]], {"input_ids": [[1]]},
              object(), 3]
)  # fmt: skip
def test_what_are_no_ids_is_told_what_to_pass(model: Any, given: Any) -> None:
    with pytest.raises(ValueError, match=r"input_ids \(.*\) must be int64 \[rows, tokens\] .* model\.chat\(messages\)"):
        model.generate(given, processor=PROCESSOR)


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_new_tokens", "x"), ("max_new_tokens", 2.5), ("temperature", "x"), ("temperature", None), ("top_p", "x"), ("top_k", 1.5),
     ("seed", 1.5), ("seed", "x"), ("n", "2"), ("n", True)],
)  # fmt: skip
def test_settings_of_another_kind_are_refused(model: Any, name: str, value: Any) -> None:
    for ask in (lambda **more: model.chat("q", **more), lambda **more: model.generate([[5, 6]], **more)):
        with pytest.raises(ValueError, match=rf"{name} \(.*\) must be a( whole)? number"):
            ask(**{name: value}, processor=PROCESSOR)


@pytest.mark.parametrize(
    ("name", "value"),
    [("eos_token_id", "x"), ("eos_token_id", -1), ("eos_token_id", []), ("pixel_values", 3), ("image_grid_thw", "x"), ("attention_mask", "x")],
)  # fmt: skip
def test_arrays_of_another_kind_are_refused(model: Any, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name} \(.*\) must be"):
        model.generate([[5, 6]], **{name: value}, processor=PROCESSOR)


def test_a_model_from_a_folder_or_preset_knows_its_processor(tmp_path: Any, model: Any) -> None:
    made = ernie_tune.AutoModel.from_config("tiny-a", seed=1)
    told = made.chat("why", max_new_tokens=3)
    made.save_pretrained(tmp_path)
    PROCESSOR.save_pretrained(tmp_path)
    again = ernie_tune.AutoModel.from_pretrained(tmp_path)
    assert again.chat("why", max_new_tokens=3) == told
    adapted = ernie_tune.get_peft_model(again, ernie_tune.LoraConfig(r=2, target_modules=["q_proj"]))
    assert adapted.chat("why", max_new_tokens=3) == told, "a fresh adapter changes nothing, and speaks too"


def test_every_public_door_gives_models_a_voice(monkeypatch: pytest.MonkeyPatch, model: ErnieModel) -> None:
    monkeypatch.delattr(ErnieModel, "chat")
    monkeypatch.delattr(ErnieModel, "generate")
    monkeypatch.delitem(vars(ernie_tune), "PeftModel", raising=False)
    assert callable(ernie_tune.PeftModel.chat)  # type: ignore[attr-defined]
    assert callable(ErnieModel.generate)  # type: ignore[attr-defined]
