"""What examples/base draws and asks is true: pixels against words, numerals by hand, held-out parts
apart, scores against closed forms.

Knows the scripts of examples/base and pixels, nothing of models.
"""

from __future__ import annotations

import importlib
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

BASE = Path(__file__).parent.parent / "examples" / "base"
MODULES = (
    *(
        "words",
        "scenes",
        "printed",
        "plots",
        "clips",
        "phrases",
        "shop",
        "texts",
        "lookups",
        "heads",
        "make_data",
        "score",
    ),
    "widen",
)


@pytest.fixture(scope="module")
def base() -> Iterator[dict[str, ModuleType]]:
    """The scripts, imported as they import each other: by bare name, and only for these tests."""
    before = {name: sys.modules.pop(name, None) for name in MODULES}
    sys.path.insert(0, str(BASE))
    yield {name: importlib.import_module(name) for name in MODULES}
    sys.path.remove(str(BASE))
    for name, module in before.items():
        sys.modules.pop(name, None)
        if module is not None:
            sys.modules[name] = module


def nearest(colors: dict[str, Any], rgb: tuple[int, ...]) -> str:
    return min(colors, key=lambda n: sum((a - b) ** 2 for a, b in zip(colors[n][1], rgb, strict=True)))


def test_things_are_where_and_what_the_scene_says(base: dict[str, ModuleType]) -> None:
    rng, colors = random.Random(0), base["words"].COLORS
    for i in range(60):
        draw = base["scenes"].crowd if i % 3 == 0 else base["scenes"].scene
        s = draw(rng, held_out=i % 2 == 0)
        assert 1 <= len(s.things) <= 9
        for t in s.things:
            left, top, right, bottom = t.box
            assert left >= 0 <= top, t
            assert right <= s.side >= bottom, t
            ring = t.shape == "ring"
            x, y = (t.x - t.r + max(1, t.r // 5), t.y) if ring else (t.x, t.y)
            assert nearest(colors, s.image.getpixel((x, y))) == t.color, t
            corner = s.image.getpixel((t.x - t.r + 1, t.y - t.r + 1))
            if t.shape in ("diamond", "star", "cross") and t.r > 7:
                assert min(corner) > 180, "the corner of its box is ground"


def test_captions_name_everything_in_both_languages(base: dict[str, ModuleType]) -> None:
    thing = base["scenes"].Thing
    things = [thing("red", "circle", "large", 10, 10, 8), thing("blue", "star", "small", 70, 45, 6)]
    s = base["scenes"].Scene(Image.new("RGB", (84, 84)), things, 84)
    assert base["scenes"].caption(s, False) == "top left large red circle, right small blue star"
    assert base["scenes"].caption(s, True) == "左上大红色圆形，右边小蓝色五角星"


def test_held_out_pairs_occur_nowhere_else(base: dict[str, ModuleType]) -> None:
    rng, scenes = random.Random(3), base["scenes"]

    def pairs(held_out: bool) -> set[tuple[str, str]]:
        drawn = [(scenes.crowd if i % 2 == 0 else scenes.scene)(rng, held_out=held_out) for i in range(150)]
        return {(t.color, t.shape) for s in drawn for t in s.things}

    assert not pairs(False) & scenes.HELD_OUT_PAIRS
    assert pairs(True) & scenes.HELD_OUT_PAIRS


def test_held_out_pairs_are_not_asked_for_where_they_are_not_shown(base: dict[str, ModuleType]) -> None:
    rng, scenes = random.Random(9), base["scenes"]
    asked = {scenes.ask_exists(scenes.scene(rng, most=2), rng, False)[0] for _ in range(2000)}
    assert len(asked) > 60
    for color, shape in scenes.HELD_OUT_PAIRS:
        assert not any(question.endswith(f" {color} {shape}?") for question in asked)


def test_yes_and_no_are_balanced_and_true(base: dict[str, ModuleType]) -> None:
    rng, scenes = random.Random(4), base["scenes"]
    answers = []
    for _ in range(300):
        s = scenes.scene(rng)
        question, answer = scenes.ask_exists(s, rng, False)
        there = any(question == f"Is there {'an' if t.color == 'orange' else 'a'} {t.name(False)}?" for t in s.things)
        assert answer == ("yes" if there else "no"), (question, answer)
        answers.append(answer)
    assert 0.4 < answers.count("yes") / 300 < 0.6


def test_a_colour_or_a_shape_alone(base: dict[str, ModuleType]) -> None:
    rng, scenes, words = random.Random(6), base["scenes"], base["words"]
    answers = []
    for _ in range(300):
        s = scenes.scene(rng)
        question, answer = scenes.ask_has(s, rng, False)
        asked = set(question.rstrip("?").split())
        held = {t.color for t in s.things} | {t.shape for t in s.things}
        (value,) = asked & (set(words.COLORS) | set(words.SHAPES))
        assert answer == ("yes" if (value in held) != bool({"no", "missing", "without"} & asked) else "no"), (
            question,
            answer,
        )
        answers.append(answer)
        assert not question.startswith(("Is there no", "Is no ")), "yes and no would both be right"
    assert 0.4 < answers.count("yes") / 300 < 0.6


def test_verdicts_on_few_words_are_true_and_balanced(base: dict[str, ModuleType]) -> None:
    """Of one thing and of two, in both languages: what is asked against the scene's words."""
    rng, scenes, words = random.Random(12), base["scenes"], base["words"]
    chinese = {**{v[0]: k for k, v in words.COLORS.items()}, **{v: k for k, v in words.SHAPES.items()}}
    few = {"color": scenes.FEW["color"][:3], "shape": scenes.FEW["shape"][:3]}
    answers = []
    for i in range(400):
        zh, alone = i % 2 == 1, i % 4 < 2
        if alone:
            s = scenes.lone(rng, few=few)
            key = ("color", "shape")[i % 3 % 2]
            question, answer = scenes.ask_among(s, rng, zh, key, few[key], 0.5)
        else:
            s = scenes.scene(rng, most=2, few=few)
            question, answer = scenes.ask_few(s, rng, zh, few)
        held = [{t.color, t.shape} for t in s.things]
        assert set().union(*held) <= {*few["color"], *few["shape"]}
        said = question.rstrip("?？吗。").split()
        asked = {e for c, e in chinese.items() if c in question} if zh else {*few["color"], *few["shape"]} & set(said)
        assert 1 <= len(asked) <= 2, question
        assert answer == (("是", "否") if zh else ("yes", "no"))[not any(asked <= h for h in held)], question
        answers.append(answer in ("yes", "是"))
    assert 0.4 < sum(answers) / 400 < 0.62


def test_sides_and_denials_are_true_and_balanced(base: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    """Left, right, above, below of few words, and what is not there, against the things drawn."""
    rng, make, scenes = random.Random(13), base["make_data"], base["scenes"]
    drawn: list[Any] = []
    for name in ("scene", "lone"):
        real = getattr(scenes, name)
        monkeypatch.setattr(scenes, name, lambda *a, real=real, **k: drawn.append(real(*a, **k)) or drawn[-1])
    for kind, held in ((make.sides_one, "left"), (make.sides_two, "yes"), (make.denied, "yes")):
        answers = []
        for _ in range(240):
            _, ((question, answer),) = kind(rng, False)
            things = {t.name(False): t for t in drawn[-1].things}
            named = sorted((n for n in things if n in question), key=question.index)
            if len(named) == 2 and question.startswith("Is the "):
                a, b = (things[n] for n in named)
                up = "above" in question or "below" in question
                truth = ("above" if a.y < b.y else "below") if up else "left" if a.x < b.x else "right"
                if " or " in question:
                    assert answer == truth, question
                else:
                    assert answer == ("yes" if f" {truth} " in question else "no"), question
            elif kind is make.denied:
                held_words = {w for t in drawn[-1].things for w in (t.color, t.shape)}
                there = bool(held_words & set(question.rstrip("?").split()))
                denies = bool({"no", "missing", "without"} & set(question.rstrip("?").split()))
                assert answer == ("yes" if there != denies else "no"), question
            answers.append(answer)
        sure = [a for a in answers if a in (("left", "right") if held == "left" else ("yes", "no"))]
        assert 0.4 < sure.count(held) / len(sure) < 0.6, kind


def test_printed_rows_fill_their_pictures_with_ink_alone(
    base: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two colours and what lies between them; nothing cut off at an edge; digits where asked."""
    rng, printed = random.Random(2), base["printed"]
    if not list(Path("/usr/share/fonts").rglob("DejaVuSans.ttf")):
        monkeypatch.setattr(printed, "fonts", lambda chinese, held_out: (printed.BITMAP,))
    for i in range(60):
        image, said = printed.row(rng, 2 + i % 4, digits=1.0 if i % 2 else 0.3)
        assert 2 <= len(said) <= 2 + i % 4
        assert said.isdigit() or not i % 2
        pixels = np.asarray(image, int)
        paper = pixels[-1, -1]
        assert (np.abs(pixels - paper).max(axis=(0, 1)) > 60).any(), "there is ink"
        assert image.height % 28 == 0


def test_charts_draw_every_value_at_every_size(base: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    rng, plots, colors = random.Random(5), base["plots"], base["words"].COLORS
    if not list(Path("/usr/share/fonts").rglob("DejaVuSans.ttf")):
        monkeypatch.setattr(plots, "fonts", lambda chinese, held_out: (plots.BITMAP,))
    sides = set()
    for _ in range(60):
        c = plots.chart(rng)
        sides.add(c.image.width)
        assert len(c.labels) == len(c.values) == len(set(c.values))
        pixels = np.asarray(c.image.convert("RGB"), int).reshape(-1, 3)
        for name in set(c.colors):
            near = np.abs(pixels - np.array(colors[name][1])).max(axis=1) <= 14
            assert near.sum() >= 8, f"{name} is drawn"
        if c.kind == "pie":
            assert sum(c.values) == 100
    assert sides == {112, 140, 168}


def test_customers_and_names(base: dict[str, ModuleType]) -> None:
    rng, shop, texts = random.Random(2), base["shop"], base["texts"]
    written = {
        form.format(thing)
        for parts in shop.KINDS.values()
        for things, said in (parts[:2], parts[2:])
        for form in said.split("|")
        for thing in things.split("|")
    }
    assert len(written) > 3000
    with (BASE.parent / "classify" / "eval.csv").open(encoding="utf-8") as file:
        assert not written & {line.rsplit(",", 1)[0].strip('"') for line in file}, "no held-out message is drawn"
        phrases = [p for kinds in base["phrases"].PHRASES.values() for said in kinds for p in said.split("|")]
        file.seek(0)
        held = {line.rsplit(",", 1)[0].strip('"？?。.！!').lower() for line in file}
    assert len(set(phrases)) > 380
    assert not {p.lower() for p in phrases} & held, "nor its words"
    labels = {w for per in shop.LABELS.values() for ws in per for w in ws} | {k for kind in shop.KINDS for k in kind}
    for i in range(200):
        question, answer = shop.kind_of(rng, i % 2 == 1)
        assert answer in labels
        if "One of: " in question:
            listed = question.split("One of: ")[1]
            assert answer in listed.split(", ")
            assert listed.isascii(), "English labels beside English"
        told = texts.persona(rng, i % 2 == 1)
        name = (
            told[0][0].split("你叫")[1].split("，")[0] if i % 2 else told[0][0].split("name is ")[1].split(" and ")[0]
        )
        assert all("{" not in answer for _, answer in told)
        assert all(name in a for q, a in told if ("叫" in q.split("。")[-1] or "your name" in q.split(". ")[-1]))
        question, answer = texts.repeated(rng, i % 2 == 1)
        assert question.endswith(answer)


def test_a_tokenizer_is_widened_and_old_text_means_the_same(
    base: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ernie_tune import AutoModel, AutoProcessor
    from ernie_tune.checkpoint.tensors import TensorReader, cast

    old, held = AutoModel.from_config("nano", seed=1), AutoProcessor.from_pretrained("nano")
    old.save_pretrained(tmp_path / "old", dtype="bfloat16")  # as the weights of the package are
    held.save_pretrained(tmp_path / "old")
    words = ["--pieces", "16", "--characters", "8", "--rows", "300"]
    monkeypatch.setattr(sys, "argv", ["x", "--weights", str(tmp_path / "old"), "--out", str(tmp_path / "new"), *words])
    base["widen"].main()
    new, processor = AutoModel.from_pretrained(tmp_path / "new"), AutoProcessor.from_pretrained(tmp_path / "new")
    before, after = held.tokenizer, processor.tokenizer
    assert after.vocab_size == before.vocab_size + 16 == new.config.vocab_size
    assert new.config.tokens == after.token_ids()
    special = 10
    readers, name = [TensorReader(tmp_path / n) for n in ("old", "new")], "model.embed_tokens.weight"
    table_old, table = (cast(r.read(name), r.entries[name].dtype, "F32") for r in readers)
    assert {entry.dtype for entry in readers[1].entries.values()} == {"F32"}
    np.testing.assert_array_equal(table[: -special - 16], table_old[:-special])
    np.testing.assert_array_equal(table[-special:], table_old[-special:])
    for i in range(after.vocab_size - special - 16, after.vocab_size - special):
        spelled = before.encode(after.decode([i]))
        np.testing.assert_allclose(table[i], table_old[spelled].mean(axis=0), atol=1e-6)
    for text in ("large red circle", "一共有几个图形？", "☃ 12\n"):
        assert after.decode(after.encode(text)) == text
        assert len(after.encode(text)) <= len(before.encode(text))


def test_lookups_are_answered_by_their_context(base: dict[str, ModuleType]) -> None:
    rng, lookups = random.Random(8), base["lookups"]
    answers = []
    for _ in range(200):
        ((question, answer),) = lookups.echo(rng, False)
        assert question.endswith(answer)
        turns = lookups.pairs(rng, False)
        story = turns[0][0].partition(". ")[0].split()
        told = dict(zip(story[::2], story[1::2], strict=True))
        said = [(q.rpartition(". ")[2].rstrip("?"), a) for q, a in turns]
        for key, value in said:
            pairs = [(key, value)] if key in told else zip(value.split()[::2], value.split()[1::2], strict=True)
            assert all(told[k] == v for k, v in pairs), (turns, key)
        turns = lookups.after(rng, False)
        words = turns[0][0].partition(". ")[0].split()
        for question, answer in turns:
            word = question.rpartition("What comes after ")[2].rstrip("?")
            assert words[words.index(word) + 1] == answer
        turns = lookups.there(rng, False)
        words = turns[0][0].partition(". ")[0].split()
        for question, answer in turns:
            assert answer == ("yes" if question.rstrip("?").split()[-1] in words else "no"), turns
            answers.append(answer)
        for question, answer in lookups.same(rng, False):
            a, b = question.removeprefix("Is ").rstrip("?").split(" the same as ")
            assert answer == ("yes" if a == b else "no")
    assert 0.4 < answers.count("yes") / len(answers) < 0.6


def test_attention_of_a_head_that_copies(base: dict[str, ModuleType]) -> None:
    """Of a run of ten tokens twice in a template of one before and six behind."""
    heads, tokens, period = base["heads"], 1 + 20 + 6, 10
    before, copies, same = np.zeros((3, tokens, tokens))
    before[np.arange(1, tokens), np.arange(tokens - 1)] = 1.0
    second = np.arange(1 + period, 1 + 2 * period)
    copies[second, second - period + 1] = 0.5
    same[second, second - period] = 1.0
    got = heads.shares(np.stack([before, copies, same]), period)
    np.testing.assert_allclose(got, [[1.0, 0.0], [0.0, 0.5], [0.0, 0.0]])
    q, k = np.random.default_rng(0).standard_normal((2, 5, 4, 8))
    weights = heads.attention(q, k[:, :2])
    assert weights.shape == (4, 5, 5)
    np.testing.assert_allclose(weights.sum(-1), 1.0)
    score = np.array([q[1, 3] @ k[j, 1] for j in range(2)]) / 8**0.5
    np.testing.assert_allclose(weights[3, 1, :2], np.exp(score) / np.exp(score).sum())
    assert weights[0, 1, 2] == 0.0, "nothing later"


def test_no_turn_about_one_thing_tells_another(base: dict[str, ModuleType]) -> None:
    """What an earlier answer says would be copied, not seen."""
    rng, make = random.Random(7), base["make_data"]
    facts = (*base["words"].COLORS, *base["words"].SHAPES)
    for _ in range(200):
        _, turns = make.single(rng, False)
        for i, (question, answer) in enumerate(turns):
            said = " ".join(f"{q} {a}" for q, a in turns[:i])
            assert not any(fact in said.split() for fact in facts if fact in answer.split()), turns
            assert len({q for q, _ in turns}) == len(turns), question


def test_number_words(base: dict[str, ModuleType]) -> None:
    by_hand = {
        0: ("zero", "零"),
        14: ("fourteen", "十四"),
        40: ("forty", "四十"),
        99: ("ninety-nine", "九十九"),
        100: ("one hundred", "一百"),
        205: ("two hundred and five", "二百零五"),
        310: ("three hundred and ten", "三百一十"),
        718: ("seven hundred and eighteen", "七百一十八"),
    }
    for number, (english, chinese) in by_hand.items():
        assert base["texts"].english(number) == english
        assert base["texts"].chinese(number) == chinese


def test_answers_without_pictures_are_right(base: dict[str, ModuleType]) -> None:
    rng, texts = random.Random(5), base["texts"]
    for _ in range(200):
        question, answer = texts.order(rng, False)
        numbers = [int(n) for n in question.replace("?", " ").replace(".", " ").split() if n.isdigit()]
        said = [int(n) for n in answer.split()]
        wanted = (
            [max(numbers)] if "largest" in question else [min(numbers)] if "smallest" in question
            else sorted(numbers, reverse=True) if "descending" in question
            else sorted(numbers) if "ascending" in question else numbers[::-1]
        )  # fmt: skip
        assert said == wanted, question
        question, answer = texts.letters(rng, False)
        if question.startswith("Count the letter "):
            letter, word = question.removeprefix("Count the letter ").removesuffix(".").split(" in ")
            assert int(answer) == word.count(letter)


def test_no_row_asks_what_a_held_out_part_asks(base: dict[str, ModuleType]) -> None:
    forbidden = base["make_data"].held_out_questions(BASE.parent)
    assert "Who trained you?" in forbidden, "of examples/identity"
    assert len(forbidden) > 100
    manners = {q for asked, _ in base["texts"]._MANNERS for q in asked.split("|")}
    assert not manners & forbidden


def test_rows_are_the_same_again_and_their_media_are_there(
    base: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = base["make_data"]
    if not list(Path("/usr/share/fonts").rglob("DejaVuSans.ttf")) or not list(
        Path("/usr/share/fonts").rglob("NotoSansCJK*")
    ):
        monkeypatch.setitem(make.MIXES, "wide", {"scene": 1, "many": 1, "pair": 1, "clip": 1, "words": 1})
    texts = []
    for name in ("a", "b"):
        monkeypatch.setattr(sys, "argv", ["x", "--out", str(tmp_path / name), "--part", "some", "--rows", "40"])
        make.main()
        texts.append((tmp_path / name / "some.jsonl").read_text(encoding="utf-8"))
    assert texts[0] == texts[1]
    for line in texts[0].splitlines():
        row = json.loads(line)
        assert [m["role"] for m in row["messages"]] == ["user", "assistant"] * (len(row["messages"]) // 2)
        for file in (*row.get("images", ()), *row.get("videos", ())):
            with Image.open(tmp_path / "a" / file) as image:
                assert image.size >= (8, 8)
        thoughts = ["<think>" in m["content"] for m in row["messages"]]
        assert not any(thoughts[:-1]), "a thought on the way to an earlier answer is not trained"


def test_scores(base: dict[str, ModuleType]) -> None:
    score = base["score"].score
    assert score("caption", "red star top, blue ring left", "blue ring left, red star bottom") == 0.5
    assert score("caption", "red star top", "red star top, red star top") == 0.5, "saying more costs"
    assert score("text", "abcd", "abed") == 0.75
    assert score("text", "ab", "xyz") == 0.0
    assert score("chart", "100", "104") == 1.0
    assert score("chart", "100", "106") == 0.0
    assert score("table", "A 20，B 50", "A 20，B 60") == 0.5
    assert score("yesno", "yes", "no") == 0.0
