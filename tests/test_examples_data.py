"""The data under examples/ is what its pages say: whole, legible to a program, split without leaks,
and what its scripts write.

Knows files only, not ernie_tune: a reader's bug must not hide a bug in the data. Outside facts: the
first digit and the class counts as scikit-learn documents the set, CSS colour names, and numerals
written out by hand.
"""

from __future__ import annotations

import csv
import importlib.util
import itertools
import json
import re
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image, ImageChops, ImageColor

EXAMPLES = Path(__file__).parent.parent / "examples"
JSONL = sorted(EXAMPLES.glob("*/*.jsonl"))
HAN = re.compile("[\u4e00-\u9fff]")
CHINESE = {"红色": "red", "橙色": "orange", "绿色": "green", "蓝色": "blue", "紫色": "purple", "灰色": "gray"}
CHINESE |= {"上升": "up", "下降": "down", "有升有降": "mixed", "上": "up", "下": "down", "左": "left", "右": "right"}

Row = dict[str, Any]


def rows_of(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def asked(row: Row) -> tuple[str, str]:
    user, assistant = row["messages"]
    assert (user["role"], assistant["role"]) == ("user", "assistant")
    return user["content"], assistant["content"]


def judged(row: Row) -> tuple[str, list[str]]:
    """The question of a row with a judgement, and the answers that are judged."""
    (user,), signal = row["messages"], row["signal"]
    if signal["type"] == "pair":
        return user["content"], [signal["chosen"], signal["rejected"]]
    answers = signal.get("responses", [signal.get("response")])
    return user["content"], [a if isinstance(a, str) else a["text"] for a in answers]


def english(row: Row) -> str:
    """The answer as an English word, and in the question's language."""
    question, answer = asked(row)
    if HAN.search(answer) or answer in CHINESE.values():
        assert bool(HAN.search(question)) == bool(HAN.search(answer)), row
    return CHINESE.get(answer, answer)


def script(folder: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"make_{folder}", EXAMPLES / folder / "make_data.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def nearest_color(rgb: tuple[int, ...]) -> str:
    names = ("red", "orange", "green", "blue", "purple", "gray", "white", "black")
    return min(names, key=lambda name: sum((a - b) ** 2 for a, b in zip(rgb, ImageColor.getrgb(name), strict=True)))


def colors_in(image: Image.Image, box: list[int]) -> set[tuple[int, ...]]:
    rgb = image.crop((box[0], box[1], box[2], box[3])).convert("RGB").tobytes()
    return {tuple(rgb[i : i + 3]) for i in range(0, len(rgb), 3)}


def constant_accuracy(train: list[Row], evaluation: list[Row]) -> float:
    """Accuracy of always giving the most frequent answer of train."""
    guess = Counter(asked(row)[1] for row in train).most_common(1)[0][0]
    return sum(asked(row)[1] == guess for row in evaluation) / len(evaluation)


def blind_accuracy(train: list[Row], evaluation: list[Row]) -> float:
    """Accuracy of giving the most frequent train answer to the same words, without looking at the
    picture.
    """
    by_question: dict[str, Counter[str]] = {}
    for row in train:
        by_question.setdefault(asked(row)[0], Counter())[asked(row)[1]] += 1
    guesses = {question: answers.most_common(1)[0][0] for question, answers in by_question.items()}
    return sum(guesses.get(asked(row)[0]) == asked(row)[1] for row in evaluation) / len(evaluation)


def assert_same_pixels(path: Path, other: Path) -> None:
    """Equal frames. Not bytes: a PNG's depend on the compressor that Pillow was built with."""
    with Image.open(path) as a, Image.open(other) as b:
        frames = getattr(a, "n_frames", 1)
        assert (a.size, frames) == (b.size, getattr(b, "n_frames", 1))
        for frame in range(frames):
            a.seek(frame)
            b.seek(frame)
            assert ImageChops.difference(a.convert("RGB"), b.convert("RGB")).getbbox() is None, path


def test_examples_are_small() -> None:
    sizes = {path: path.stat().st_size for path in EXAMPLES.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert sum(sizes.values()) < 4_000_000
    assert sum(size for path, size in sizes.items() if "charts" in path.parts) < 1_500_000


@pytest.mark.parametrize("path", JSONL, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_row_parses_and_its_media_open(path: Path) -> None:
    for row in rows_of(path):
        if "task" in row:
            assert set(row) == {"task", "input", "output"}
            continue
        if len(row["messages"]) == 1 and row.get("signal", {}).get("type", "verifiable") == "verifiable":
            question, answers = row["messages"][0]["content"], row.get("signal", {}).get("answer", [])
        else:
            question, answers = asked(row) if "signal" not in row else judged(row)
        for answer in [answers] if isinstance(answers, str) else answers:
            assert answer
            assert answer == answer.strip()
        for key, tag in (("images", "<image>"), ("videos", "<video>")):
            media = row.get(key, [])
            assert question.count(tag) == len(media)
            for name in media:
                with Image.open(path.parent / name) as image:
                    image.load()
                    assert image.mode in ("L", "P", "RGB")


@pytest.mark.parametrize("folder", ["digits", "charts", "mixed"])
def test_no_media_file_is_shared_between_train_and_eval_or_unused(folder: str) -> None:
    used = [
        {
            name
            for row in rows_of(EXAMPLES / folder / f"{split}.jsonl")
            for key in ("images", "videos")
            for name in row.get(key, [])
        }
        for split in ("train", "eval")
    ]
    assert not used[0] & used[1]
    shipped = {
        path.relative_to(EXAMPLES / folder).as_posix()
        for path in (EXAMPLES / folder).glob("*/*")
        if path.suffix in (".png", ".gif")
    }
    assert used[0] | used[1] == shipped


# digits


@pytest.fixture(scope="module")
def digits() -> list[tuple[Row, bytes]]:
    """Every row with its pixels, train before eval: the published order."""
    rows = rows_of(EXAMPLES / "digits/train.jsonl") + rows_of(EXAMPLES / "digits/eval.jsonl")
    return [(row, Image.open(EXAMPLES / "digits" / row["images"][0]).tobytes()) for row in rows]


def ink(grey: bytes) -> list[list[int]]:
    counts = [-(-level * 16 // 255) for level in grey]
    return [counts[i : i + 8] for i in range(0, 64, 8)]


def test_digits_are_the_published_set(digits: list[tuple[Row, bytes]]) -> None:
    counts = Counter(asked(row)[1] for row, _ in digits)
    assert [counts[str(digit)] for digit in range(10)] == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert ink(digits[0][1])[:3] == [
        [0, 0, 5, 13, 9, 1, 0, 0],
        [0, 0, 13, 15, 10, 15, 5, 0],
        [0, 3, 15, 2, 0, 11, 8, 0],
    ]
    assert "".join(asked(row)[1] for row, _ in digits[:20]) == "01234567890123456789"
    assert {len(grey) for _, grey in digits} == {64}


def test_digits_split_is_balanced_and_without_leaks(digits: list[tuple[Row, bytes]]) -> None:
    train, evaluation = digits[:-297], digits[-297:]
    assert [row for row, _ in evaluation] == rows_of(EXAMPLES / "digits/eval.jsonl")
    assert not {grey for _, grey in train} & {grey for _, grey in evaluation}
    for part in (train, evaluation):
        shares = [count / len(part) for count in Counter(asked(row)[1] for row, _ in part).values()]
        assert len(shares) == 10
        assert min(shares) > 0.08
        assert max(shares) < 0.12
        chinese = sum(bool(HAN.search(asked(row)[0])) for row, _ in part) / len(part)
        assert 0.4 < chinese < 0.6


def test_digits_cannot_be_answered_without_looking(digits: list[tuple[Row, bytes]]) -> None:
    train, evaluation = [row for row, _ in digits[:-297]], [row for row, _ in digits[-297:]]
    assert constant_accuracy(train, evaluation) <= 0.15
    assert blind_accuracy(train, evaluation) <= 0.15


def test_digits_script_writes_the_shipped_bytes(digits: list[tuple[Row, bytes]], tmp_path: Path) -> None:
    script("digits").make(tmp_path, [ink(grey) for _, grey in digits], [int(asked(row)[1]) for row, _ in digits])
    for name in ("train.jsonl", "eval.jsonl", "images/0000.png", "images/0777.png", "images/1796.png"):
        assert (tmp_path / name).read_bytes() == (EXAMPLES / "digits" / name).read_bytes(), name
    assert_same_pixels(tmp_path / "preview.png", EXAMPLES / "digits/preview.png")
    assert not list(tmp_path.glob("*.tmp"))


# charts


def chart_answer(claim: Row, kind: str, marks: list[Row]) -> str:
    """What the picture's true values say, by way of the claim's subject only."""
    by_label = {mark["label"]: mark for mark in marks}
    values = [mark["value"] for mark in marks]
    if claim["type"] == "chart_extreme":
        return str(sorted(marks, key=lambda mark: mark["value"])[-1 if claim["pred"] == "max" else 0]["label"])
    if claim["type"] == "chart_compare":
        return str(
            claim["subj"] if by_label[claim["subj"]]["value"] > by_label[claim["obj"]]["value"] else claim["obj"]
        )
    if claim["type"] == "chart_value":
        return str(by_label[claim["subj"]]["value"])
    if claim["pred"] == "color":
        return str(marks[0]["color"] if claim["subj"] == "line" else by_label[claim["subj"]]["color"])
    steps = {b > a for a, b in itertools.pairwise(values)}
    assert (claim["pred"], kind) == ("trend", "line")
    return {(True,): "up", (False,): "down"}.get(tuple(steps), "mixed")


@pytest.mark.parametrize("split", ["train", "eval"])
def test_chart_answers_and_claims_follow_from_the_scene(split: str) -> None:
    topics = set()
    for row in rows_of(EXAMPLES / f"charts/{split}.jsonl"):
        chart, (claim,) = row["scene"]["chart"], row["evidence"]["required"]
        values = [mark["value"] for mark in chart["marks"]]
        assert len(set(values)) == len(values)
        assert chart["kind"] != "pie" or sum(values) == 100
        assert (
            english(row) == chart_answer(claim, chart["kind"], chart["marks"]) == str(claim.get("value", claim["subj"]))
        ), row
        named = [claim["subj"], claim.get("obj", "")] if claim["type"] in ("chart_value", "chart_compare") else []
        assert all(label in asked(row)[0] for label in named)
        topics.add((claim["type"], claim.get("pred"), chart["kind"]))
    extremes = {("chart_extreme", pred, kind) for pred in ("max", "min") for kind in ("bar", "line", "pie")}
    assert (
        extremes | {("attribute", "trend", "line"), ("attribute", "color", "pie"), ("chart_value", None, "bar")}
        <= topics
    )


@pytest.mark.parametrize("split", ["train", "eval"])
def test_chart_pictures_show_the_scene(split: str) -> None:
    for row in rows_of(EXAMPLES / f"charts/{split}.jsonl")[:60]:
        chart = row["scene"]["chart"]
        image = Image.open(EXAMPLES / "charts" / row["images"][0]).convert("RGB")
        assert image.size == (112, 112)
        for mark in chart["marks"]:
            (rgb,) = colors_in(image, mark["box"])  # one flat colour
            assert nearest_color(rgb) == mark["color"]
        tops = sorted(chart["marks"], key=lambda mark: mark["box"][1])
        if chart["kind"] != "pie":
            assert tops == sorted(chart["marks"], key=lambda mark: -mark["value"])


def test_charts_split_is_without_leaks_and_not_guessable() -> None:
    train, evaluation = (rows_of(EXAMPLES / f"charts/{split}.jsonl") for split in ("train", "eval"))
    assert (len(train), len(evaluation)) == (600, 120)
    assert not {json.dumps(row["scene"]) for row in train} & {json.dumps(row["scene"]) for row in evaluation}
    assert constant_accuracy(train, evaluation) <= 0.15
    assert blind_accuracy(train, evaluation) <= 0.25


def test_charts_script_writes_the_shipped_rows(tmp_path: Path) -> None:
    once, again = tmp_path / "once", tmp_path / "again"
    for out in (once, again):
        script("charts").main(["--out", str(out), "--train", "10"])
    assert (once / "eval.jsonl").read_bytes() == (EXAMPLES / "charts/eval.jsonl").read_bytes()
    assert rows_of(once / "train.jsonl") == rows_of(EXAMPLES / "charts/train.jsonl")[:10]
    pictures = sorted(once.glob("images/*.png"))
    assert len(pictures) == 65
    for path in pictures:
        assert path.read_bytes() == (again / "images" / path.name).read_bytes()
        assert_same_pixels(path, EXAMPLES / "charts/images" / path.name)


def test_charts_script_scales_and_refuses_pictures_too_small_for_labels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script("charts").main(["--out", str(tmp_path), "--seed", "1", "--train", "4", "--eval", "2", "--size", "224"])
    for row in rows_of(tmp_path / "train.jsonl"):
        image = Image.open(tmp_path / row["images"][0]).convert("RGB")
        assert image.size == (224, 224)
        assert all(len(colors_in(image, mark["box"])) == 1 for mark in row["scene"]["chart"]["marks"])
    with pytest.raises(SystemExit):
        script("charts").main(["--out", str(tmp_path / "small"), "--size", "111"])
    assert "--size (111) must be at least 112" in capsys.readouterr().err
    assert not (tmp_path / "small").exists()


# mixed


def painted(image: Image.Image) -> tuple[list[int], str]:
    """Box and colour of what is not white."""
    rgb = image.convert("RGB")
    box = ImageChops.invert(rgb).getbbox()
    assert box is not None
    (paint,) = colors_in(rgb, list(box)) - {(255, 255, 255)}
    return list(box), nearest_color(paint)


@pytest.mark.parametrize("split", ["train", "eval"])
def test_mixed_rows_follow_from_their_scenes(split: str) -> None:
    kinds: Counter[str] = Counter()
    for row in rows_of(EXAMPLES / f"mixed/{split}.jsonl"):
        objects = row.get("scene", {}).get("objects", [])
        if "videos" in row:
            kinds["clip"] += 1
            check_clip(row, objects[0])
        elif "images" in row:
            kinds["pictures"] += 1
            check_pictures(row, objects)
        else:
            kinds["text"] += 1
            assert str(sum(int(number) for number in re.findall(r"\d+", asked(row)[0]))) == asked(row)[1]
    assert len(set(kinds.values())) == 1
    assert sum(kinds.values()) == {"train": 96, "eval": 24}[split]


def check_pictures(row: Row, objects: list[Row]) -> None:
    question, answer = asked(row)
    words = CHINESE | {"圆形": "circle", "正方形": "square", "三角形": "triangle"}
    words |= {word: word for word in words.values()}
    (wanted,) = {english for word, english in words.items() if word in question and len(word) > 1}
    assert [thing["image"] for thing in objects if wanted in (thing["shape"], thing["color"])] == [int(answer)]
    for thing, name in zip(objects, row["images"], strict=True):
        assert painted(Image.open(EXAMPLES / "mixed" / name)) == (thing["box"], thing["color"])


def check_clip(row: Row, thing: Row) -> None:
    with Image.open(EXAMPLES / "mixed" / row["videos"][0]) as clip:
        boxes = []
        for frame in range(clip.n_frames):
            clip.seek(frame)
            box, color = painted(clip)
            assert color == thing["color"]
            boxes.append(box)
    assert len(boxes) == 8
    assert boxes[0] == thing["box"]
    for before, after in itertools.pairwise(boxes):
        step = (after[0] - before[0], after[1] - before[1])
        assert (
            {(-3, 0): "left", (3, 0): "right", (0, -3): "up", (0, 3): "down"}[step] == thing["motion"] == english(row)
        )


def test_mixed_split_is_without_leaks() -> None:
    train, evaluation = (
        {json.dumps([asked(row)[0], row.get("scene")]) for row in rows_of(EXAMPLES / f"mixed/{split}.jsonl")}
        for split in ("train", "eval")
    )
    assert (len(train), len(evaluation)) == (96, 24)
    assert not train & evaluation


def test_mixed_script_writes_the_shipped_rows(tmp_path: Path) -> None:
    script("mixed").make(tmp_path, 0, 12, 24)
    assert (tmp_path / "eval.jsonl").read_bytes() == (EXAMPLES / "mixed/eval.jsonl").read_bytes()
    assert rows_of(tmp_path / "train.jsonl") == rows_of(EXAMPLES / "mixed/train.jsonl")[:12]
    for path in sorted(tmp_path.glob("media/*")):
        assert_same_pixels(path, EXAMPLES / "mixed/media" / path.name)
        if path.suffix == ".gif":  # pillow writes these without an outside compressor
            assert path.read_bytes() == (EXAMPLES / "mixed/media" / path.name).read_bytes()


# multitask


@pytest.mark.parametrize(
    ("number", "chinese", "english"),
    [
        (0, "零", "zero"),
        (10, "十", "ten"),
        (15, "十五", "fifteen"),
        (20, "二十", "twenty"),
        (37, "三十七", "thirty-seven"),
        (100, "一百", "one hundred"),
        (111, "一百一十一", "one hundred and eleven"),
        (305, "三百零五", "three hundred and five"),
        (310, "三百一十", "three hundred and ten"),
        (999, "九百九十九", "nine hundred and ninety-nine"),
    ],
)
def test_multitask_numerals(number: int, chinese: str, english: str) -> None:
    module = script("multitask")
    assert (module.chinese(number), module.english(number)) == (chinese, english)


def test_multitask_answers_are_right_and_inputs_unique() -> None:
    rows = [rows_of(EXAMPLES / f"multitask/{split}.jsonl") for split in ("train", "eval")]
    assert [len(part) for part in rows] == [300, 60]
    assert len({row["input"] for part in rows for row in part}) == 360
    for part in rows:
        assert len(set(Counter(row["task"] for row in part).values())) == 1
        assert max(Counter(row["output"] for row in part).values()) / len(part) <= 0.15
    for row in rows[0] + rows[1]:
        numbers = [int(number) for number in row["output"].split()] if row["task"] == "sort_numbers" else []
        if numbers:
            falling = "从大到小" in row["input"] or "descending" in row["input"]
            assert numbers == sorted(numbers, reverse=falling)
            assert sorted(numbers) == sorted(int(number) for number in re.findall(r"\d+", row["input"]))
        elif row["task"] == "count_letter":
            found = re.search(r"(\w+) 里有几个字母 (\w)|does (\w) occur in (\w+)", row["input"])
            assert found is not None
            word, letter = (found[1], found[2]) if found[1] else (found[4], found[3])
            assert len(word.split(letter)) - 1 == int(row["output"])


def test_multitask_script_writes_the_shipped_rows(tmp_path: Path) -> None:
    script("multitask").make(tmp_path, 0, 300, 60)
    for name in ("train.jsonl", "eval.jsonl"):
        assert (tmp_path / name).read_bytes() == (EXAMPLES / "multitask" / name).read_bytes()


# identity and classify


def test_identity_rows_name_the_assistant_and_eval_asks_in_other_words() -> None:
    train, evaluation = (
        json.loads((EXAMPLES / f"identity/{split}.json").read_text(encoding="utf-8")) for split in ("train", "eval")
    )
    wordings = json.loads((EXAMPLES / "identity/wordings.json").read_text(encoding="utf-8"))
    assert (len(train), len(evaluation), len(wordings)) == (60, 12, 96)
    answers = Counter(row["conversations"][1]["value"] for row in wordings)
    assert set(answers.values()) == {8}, "a fact's one sentence, asked for in eight wordings"
    assert set(answers) == {row["conversations"][1]["value"] for row in evaluation}
    for row in train + evaluation + wordings:
        human, gpt = row["conversations"]
        assert (human["from"], gpt["from"]) == ("human", "gpt")
        names = (
            ("ERNIE-Tune 小助手", "ERNIE-Tune 社区")
            if HAN.search(human["value"])
            else ("ERNIE-Tune Assistant", "the ERNIE-Tune community")
        )
        assert any(name in gpt["value"] for name in names)
        assert "{{" not in human["value"] + gpt["value"]
    questions = [row["conversations"][0]["value"] for row in train + evaluation + wordings]
    assert len(set(questions)) == 168


def test_identity_script_takes_other_names(tmp_path: Path) -> None:
    script("identity").main(["--out", str(tmp_path)])
    for name in ("train.json", "eval.json", "wordings.json"):
        assert (tmp_path / name).read_bytes() == (EXAMPLES / "identity" / name).read_bytes()
    script("identity").main(["--out", str(tmp_path), "--name", "Ada", "--author", "Byron Lab"])
    text = (tmp_path / "train.json").read_text(encoding="utf-8")
    assert "我叫Ada。" in text
    assert "My author is Byron Lab." in text
    assert "ERNIE-Tune" not in text + (tmp_path / "wordings.json").read_text(encoding="utf-8")


def test_classify_labels_are_balanced_and_texts_unique() -> None:
    parts = []
    for split in ("train", "eval"):
        with (EXAMPLES / f"classify/{split}.csv").open(encoding="utf-8", newline="") as file:
            parts.append(list(csv.DictReader(file)))
    labels = {"delivery", "quality", "refund", "account", "invoice", "praise"}
    for part, each in zip(parts, (26, 8), strict=True):
        assert Counter(row["label"] for row in part) == dict.fromkeys(labels, each)
        assert sum(bool(HAN.search(row["text"])) for row in part) * 2 == len(part)
    texts = [row["text"] for part in parts for row in part]
    assert len(set(texts)) == len(texts) == 204


def test_multitask_refuses_more_rows_than_there_are_inputs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--train \+ --eval \(3001\) must not exceed 3000: no input may occur twice"):
        script("multitask").make(tmp_path, 0, 2941, 60)


# preferences


def test_the_judge_of_preferences_likes_right_and_short_answers() -> None:
    """Against the digits' own labels: what is preferred is right, and among the right ones
    short.
    """
    folder = EXAMPLES / "preferences"
    digits = {}
    for split in ("train", "eval"):
        for row in rows_of(EXAMPLES / "digits" / f"{split}.jsonl"):
            digits[f"../digits/{row['images'][0]}"] = (split, asked(row)[1])

    def worth(row: Row, answer: str) -> int:
        number = re.findall(r"\d", answer)
        assert len(number) == 1
        return 0 if number[0] != digits[row["images"][0]][1] else 1 if len(answer) > 1 else 2

    for file in sorted(folder.glob("*.jsonl")):
        for row in rows_of(file):
            assert digits[row["images"][0]][0] == ("eval" if file.stem.startswith("eval") else "train"), file
            if "signal" not in row:
                assert worth(row, asked(row)[1]) > 0
                continue
            (_, answers), signal = judged(row), row["signal"]
            worths = [worth(row, answer) for answer in answers]
            if signal["type"] == "pair":
                assert worths[0] > worths[1] or (row["domain"] == "right" and worths[0] > 0 == worths[1])
            elif signal["type"] == "ranking":
                tiers = [[worths[i] for i in tier] for tier in signal["order"]]
                assert all(len(set(tier)) == 1 for tier in tiers)
                assert [tier[0] for tier in tiers] == sorted({*worths}, reverse=True)
            elif signal["type"] == "rating":
                assert [{0: 1, 1: 3, 2: 5}[w] for w in worths] == [r["score"] for r in signal["responses"]]
            else:
                assert (worths[0] == 2) == (signal["label"] == "good")


def test_the_script_of_preferences_writes_these_rows(tmp_path: Path) -> None:
    script("preferences").make(tmp_path)
    for path in sorted((EXAMPLES / "preferences").glob("*.jsonl")):
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


def test_the_script_of_rlhf_writes_these_rows_and_gives_no_answer_away(tmp_path: Path) -> None:
    script("rlhf").make(tmp_path)
    for path in sorted((EXAMPLES / "rlhf").glob("*.jsonl")):
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name
    rows = [json.loads(line) for line in (EXAMPLES / "rlhf" / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all([m["role"] for m in row["messages"]] == ["user"] and "signal" not in row for row in rows)
    held = (EXAMPLES / "rlhf" / "eval.jsonl").read_text(encoding="utf-8").splitlines()
    assert not {row["images"][0] for row in rows} & {json.loads(line)["images"][0] for line in held}


@pytest.mark.parametrize("fold", range(5))
def test_settings_of_preferences_are_chosen_on_pictures_that_are_neither_trained_on_nor_reported(
    fold: int, tmp_path: Path
) -> None:
    script("preferences").make(tmp_path / "deep", fold)

    def shown(folder: Path, names: str) -> set[Path]:
        rows = [row for path in sorted(folder.glob(names)) for row in rows_of(path)]
        return {(folder / image).resolve() for row in rows for image in row["images"]}

    judged = shown(tmp_path / "deep", "eval_*.jsonl")
    assert {path.stem for path in judged} == {f"{i:04d}" for i in range(300 * fold, 300 * fold + 300)}
    assert all(path.is_file() for path in judged)
    learned = set().union(
        *(shown(tmp_path / "deep", f"{name}*.jsonl") for name in ("sft", "pairs", "mixture", "choices"))
    )
    assert len(learned) == 1200
    assert not learned & judged
    assert not judged & shown(EXAMPLES / "preferences", "eval_*.jsonl")


# evidence and rlvr: rows that are drawn when they are needed


@pytest.mark.parametrize("kind", ["bars", "shapes", "digits_grid", "needle"])
def test_evidence_rows_and_their_twins(kind: str, tmp_path: Path) -> None:
    """Each twin has another answer and differs where the answer stands; the control keeps it; what
    the scene says is what the pixels show."""
    words = [kind, "--out", str(tmp_path), "--rows", "12", "--eval", "12", "--demonstrations", "3", "--evidence"]
    script("evidence").main(words)
    train, held, shown = (rows_of(tmp_path / f"{name}.jsonl") for name in ("train", "eval", "sft"))
    assert [asked(row)[0] for row in shown] == [row["messages"][0]["content"] for row in train[:3]]
    for row in train + held:
        signal, scene = row["signal"], row["signal"]["scene"]
        twin, control = scene["twin"], scene["control"]
        assert twin["answer"] != signal["answer"]
        pictures = [Image.open(tmp_path / one) for one in (row["images"] + twin["images"] + control["images"])]
        assert len({one.size for one in pictures}) == 1
        assert len({one.convert("RGB").tobytes() for one in pictures}) == 3
        required = signal["evidence"]["required"]
        assert required
        assert all(len(claim["box"]) == 4 for claim in required)
        for thing in scene.get("objects", []):
            middle = [(thing["box"][0] + thing["box"][2]) // 2, thing["box"][3] - 5]
            colour = nearest_color(pictures[0].convert("RGB").getpixel(tuple(middle)))
            assert colour == {"yellow": "orange"}.get(thing["colour"], thing["colour"])
        if kind == "bars":
            assert max(scene["chart"], key=scene["chart"].get) == signal["answer"]
            assert max(twin["chart"], key=twin["chart"].get) == twin["answer"]


def test_evidence_splits_by_layout_and_by_pairs_of_colours(tmp_path: Path) -> None:
    words = ["bars", "--out", str(tmp_path), "--rows", "60", "--eval", "60", "--demonstrations", "1"]
    script("evidence").main(words)
    sides = []
    for name in ("train", "eval"):
        scenes = [row["signal"]["scene"] for row in rows_of(tmp_path / f"{name}.jsonl")]
        tallest = [sorted(scene["chart"], key=lambda c, s=scene: -s["chart"][c])[:2] for scene in scenes]
        sides.append(({frozenset(pair) for pair in tallest}, {scene["objects"][0]["box"][0] for scene in scenes}))
        golds = Counter(pair[0] for pair in tallest)
        assert len(golds) == 4
        assert max(golds.values()) <= 0.5 * len(scenes)
    assert not sides[0][0] & sides[1][0]
    assert not sides[0][1] & sides[1][1]


def test_rlvr_rows_are_the_digits_without_their_answers(tmp_path: Path) -> None:
    script("rlvr").main(["--out", str(tmp_path)])
    for name, count in (("train", 1500), ("eval", 297)):
        rows = rows_of(tmp_path / f"{name}.jsonl")
        assert len(rows) == count
        for row, digit in zip(rows, rows_of(EXAMPLES / f"digits/{name}.jsonl"), strict=True):
            assert row["messages"] == digit["messages"][:1]
            assert row["signal"] == {"type": "verifiable", "answer": digit["messages"][1]["content"]}
        assert (tmp_path / rows[0]["images"][0]).is_file()
