"""The whole loop of the studio in a real browser: look at rows, see a finding, train with the curve
moving, close and reopen, compare on a picture, judge by keys, learn from the judgements, ask the
result.

Needs gradio, playwright and a Chromium; where one is missing a line says so, and nothing is tested
here.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
DIGITS = ROOT / "examples" / "digits"
CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
SECONDS = 240  # for what a busy machine may take; nothing is measured by it
YAML = """stage: {stage}
fine_tuning: Full
model_name_or_path: {model}
train_dataset_path: {rows}
output_dir: {out}
max_steps: {steps}
learning_rate: 2.0e-3
per_device_train_batch_size: 2
logging_steps: 1
save_strategy: "no"
max_seq_len: 256
max_prompt_len: 200
plot_loss: false
"""


def missing() -> str:
    try:
        import gradio  # noqa: F401
        from playwright import sync_api  # noqa: F401
    except ImportError as error:
        return f"{error}; pip install gradio playwright"
    return "" if CHROMIUM else "no Chromium on this machine; apt install chromium, or playwright install chromium"


WHY = missing()
if WHY:
    warnings.warn(f"THE STUDIO WAS NOT TRIED IN A BROWSER: {WHY}", stacklevel=1)
pytestmark = pytest.mark.skipif(bool(WHY), reason=f"THE STUDIO WAS NOT TRIED IN A BROWSER: {WHY}")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("studio")
    (folder / "images").mkdir()
    rows = [json.loads(line) for line in (DIGITS / "train.jsonl").read_text(encoding="utf-8").splitlines()[:40]]
    for row in rows:
        shutil.copy(DIGITS / row["images"][0], folder / row["images"][0])
    rows[3]["messages"][1]["content"] = ""  # the finding
    rows[4]["messages"][0]["content"] += " <script>window.broken = 1</script> ${window.broken = 2}"
    write(folder / "train.jsonl", rows)
    write(folder / "questions.jsonl", [{**row, "messages": row["messages"][:1]} for row in rows[10:20]])
    return folder


def write(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def address(workspace: Path) -> Iterator[str]:
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "ernie_tune", "ui", str(workspace), "--port", "0"]
    command[-1] = str(free_port())
    studio = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True)
    try:
        assert studio.stdout is not None
        line = studio.stdout.readline()
        yield re.search(r"http://\S+", line)[0]  # type: ignore[index]
    finally:
        studio.send_signal(signal.SIGINT)
        studio.wait(60)


def free_port() -> int:
    from ernie_tune.ui.asking import free_port

    return free_port()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


def visit(browser: Any, address: str, **context: Any) -> Any:
    page = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, "locale": "en-US", **context}).new_page()
    page.set_default_timeout(60_000)
    page.outside = []
    page.on(
        "request", lambda r: page.outside.append(r.url) if not r.url.startswith((address, "data:", "blob:")) else None
    )
    page.goto(address)
    page.wait_for_selector("#data-check", timeout=SECONDS * 1000)
    return page


def until(look: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + SECONDS
    while not look():
        assert time.monotonic() < end, f"never: {what}"
        time.sleep(0.2)


def choose(page: Any, where: str, what: str) -> None:
    box = page.locator(f"#{where} input").first
    box.click()
    box.fill(what)
    page.locator(f"#{where} [role=option]", has_text=what).or_(
        page.locator("[role=listbox] [role=option]", has_text=what)
    ).first.click()
    page.keyboard.press("Tab")


def room(page: Any, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()


def train(page: Any, text: str, name: str) -> None:
    room(page, "Train")
    page.locator("#train-name textarea, #train-name input").first.fill(name)
    page.locator("#train-yaml textarea").fill(text)
    page.locator("#train-yaml textarea").blur()
    page.locator("#train-start").click()
    page.wait_for_selector("#train-told .good")


def test_the_loop(workspace: Path, address: str, browser: Any, tmp_path: Path) -> None:
    page = visit(browser, address)
    # look at rows, see a finding
    choose(page, "data-file", "train.jsonl")
    page.locator("#data-check").click()
    page.wait_for_function("document.querySelector('#data-found').innerText.includes('train.jsonl:4')")
    page.locator("#data-show").click()
    page.wait_for_selector("#data-rows img")
    assert "<script>window.broken" in page.locator("#data-rows").inner_text(), "shown as text"
    assert page.evaluate("window.broken") is None
    # form and YAML, each from the other
    room(page, "Train")
    page.locator("#train-yaml textarea").fill(
        YAML.format(stage="SFT", model="tiny-a", rows="train.jsonl", out="output/sft", steps=40)
    )
    page.locator("#train-yaml textarea").blur()
    page.wait_for_function("document.querySelector('#set-max_steps textarea, #set-max_steps input').value == '40'")
    steps = page.locator("#set-max_steps textarea, #set-max_steps input").first
    steps.fill("41")
    steps.blur()
    page.wait_for_function("document.querySelector('#train-yaml textarea').value.includes('max_steps: 41')")
    page.locator("#train-estimate").click()
    page.wait_for_function("document.querySelector('#train-told').innerText.includes('parameters')")
    # train, with the curve moving; the page is closed and opened again meanwhile
    train(page, YAML.format(stage="SFT", model="tiny-a", rows="train.jsonl", out="output/sft", steps=40), "sft.yaml")
    until((workspace / "output/sft/trainer_log.jsonl").exists, "the run writes its log")
    page.context.close()
    page = visit(browser, address)
    room(page, "Watch")
    page.locator("#watch-again").click()
    seen: set[str] = set()

    def moving() -> bool:
        seen.add(page.locator("#watch-curves").inner_html())
        return len([s for s in seen if "<svg" in s]) > 1 or (
            (workspace / "output/sft/ledger.json").exists() and any("<svg" in s for s in seen)
        )

    until(moving, "a curve is drawn")
    until((workspace / "output/sft/README.md").exists, "the run ends")
    # compare before and after on a picture
    room(page, "Judge")
    judge_and_learn(page, workspace)
    for path in ("/etc/passwd", str(workspace / "train.jsonl"), str(workspace / ".ernie_tune_ui" / "jobs")):
        assert page.request.get(f"{address}gradio_api/file={path}").status == 403
    assert page.outside == [], "nothing is fetched from elsewhere"
    page.context.close()


def judge_and_learn(page: Any, workspace: Path) -> None:
    """Ten questions by keys, the corrected ones too, then DPO on them, then the result is asked on
    a picture."""
    choose(page, "judge-rows", "questions.jsonl")
    choose(page, "judge-model", "output/sft")
    page.locator("#judge-name textarea, #judge-name input").first.fill("ann")
    page.locator("#judge-begin").click()
    page.wait_for_selector("#judge-answers article", timeout=SECONDS * 1000)
    source = workspace / "judgements" / "judgements.jsonl"
    for i in range(10):
        page.wait_for_function(f"document.querySelector('#judge-progress').innerText.includes('{i} / 10')")
        page.wait_for_selector("#judge-answers article")
        if page.locator("#judge-answers article").count() < 2:  # both samples said the same
            field = page.locator("#judge-corrected textarea")
            field.fill(f"it is {i}")
            field.blur()
        page.locator("h1").click()
        page.keyboard.press("1" if page.locator("#judge-answers article").count() > 1 else "Enter")
        until(
            lambda i=i: source.exists() and source.read_bytes().count(b"\n") == i + 1, f"judgement {i + 1} is written"
        )
    page.wait_for_function("document.querySelector('#judge-question').innerText.includes('all questions are judged')")
    text = YAML.format(stage="DPO", model="output/sft", rows="judgements/pairs.jsonl", out="output/dpo", steps=2)
    train(page, text, "dpo.yaml")
    until((workspace / "output/dpo/README.md").exists, "DPO on the judgements ends")
    room(page, "Compare")
    choose(page, "compare-left", "output/sft")
    choose(page, "compare-right", "output/dpo")
    page.locator("input[type=file]").last.set_input_files(str(workspace / "images" / "0003.png"))
    page.locator("#compare-question textarea").fill("What number does the picture show?")
    page.locator("#compare-ask").click()
    for side in ("left", "right"):
        page.wait_for_selector(f"#compare-said-{side} .text", timeout=SECONDS * 1000)


@pytest.mark.parametrize(
    ("width", "scheme", "locale"), [(1280, "dark", "zh-CN"), (390, "light", "en-US"), (390, "dark", "zh-CN")]
)
def test_languages_colours_and_narrow_screens(browser: Any, address: str, width: int, scheme: str, locale: str) -> None:
    page = visit(browser, address, viewport={"width": width, "height": 844}, color_scheme=scheme, locale=locale)
    chinese = locale == "zh-CN"
    assert page.get_by_role("tab", name="数据" if chinese else "Data", exact=True).count() == 1
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth + 1"), "nothing runs out of the screen"
    page.locator("#data-check").click()
    page.wait_for_selector("#data-found .bad")
    told = page.locator("#data-found").inner_text()
    assert ("不能为空" in told) == chinese
    assert ("must not be empty" in told) != chinese
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 200) == (scheme == "dark")
    page.context.close()
