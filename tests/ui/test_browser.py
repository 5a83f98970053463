"""The studio in a real browser: the whole loop in one walk (look at rows, see a finding, train with
the curve moving, close and reopen, compare before and after on a picture, judge by keys, learn from
the judgements, serve, ask); languages, colours, narrow screens; what axe-core finds; two tabs at
once.

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
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
DIGITS = ROOT / "examples" / "digits"
NANO = "ernie-4.5-vl-nano"
WAIT_MS = 240_000  # what a busy machine may take; nothing is measured by it
YAML = f"""stage: SFT
fine_tuning: LoRA
model_name_or_path: {NANO}
train_dataset_path: train.jsonl
eval_dataset_path: held_out.jsonl
output_dir: output/sft
max_steps: 40
learning_rate: 5.0e-3
per_device_train_batch_size: 2
logging_steps: 1
eval_strategy: steps
eval_steps: 20
eval_max_new_tokens: 4
save_strategy: "no"
max_seq_len: 256
plot_loss: false
"""


def chromium() -> str | None:
    """A Chromium: $CHROMIUM, the system's, or playwright's own."""
    names = (os.environ.get("CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next((found for name in names if name and (found := shutil.which(name))), None) or _of_playwright()


def _of_playwright() -> str | None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
    return own if Path(own).exists() else None


def missing() -> str:
    try:
        import gradio  # noqa: F401
        from playwright import sync_api  # noqa: F401
    except ImportError as error:
        return f"{error}; pip install gradio playwright"
    return "" if chromium() else "no Chromium on this machine; apt-get install chromium, or playwright install chromium"


WHY = missing()
if WHY:
    warnings.warn(f"THE STUDIO WAS NOT TRIED IN A BROWSER: {WHY}", stacklevel=1)
pytestmark = pytest.mark.skipif(bool(WHY), reason=f"THE STUDIO WAS NOT TRIED IN A BROWSER: {WHY}")


def write(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("studio")
    (folder / "images").mkdir()
    rows = [json.loads(line) for line in (DIGITS / "train.jsonl").read_text(encoding="utf-8").splitlines()[:60]]
    for row in rows:
        shutil.copy(DIGITS / row["images"][0], folder / row["images"][0])
    rows[3]["messages"][1]["content"] = ""  # the finding
    rows[4]["messages"][0]["content"] += " <script>window.broken = 1</script> ${window.broken = 2}"
    write(folder / "train.jsonl", rows[:40])
    write(folder / "held_out.jsonl", rows[50:54])
    write(folder / "questions.jsonl", [{**row, "messages": row["messages"][:1]} for row in rows[40:50]])
    said = [{"content": "<img src=x onerror='window.broken = 3'>"}, {"content": "two"}, {"content": "three"}]
    asked = {"messages": [{"role": "user", "content": "<b>which</b>"}], "answers": said}
    write(folder / "predicted.jsonl", [{"row": n, **asked} for n in (1, 2, 3)])
    return folder


@pytest.fixture(scope="module")
def address(workspace: Path) -> Iterator[str]:
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "ernie_tune", "ui", str(workspace), "--port", str(free_port())]
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
        opened = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


def visit(browser: Any, address: str, **context: Any) -> Any:
    page = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, "locale": "en-US", **context}).new_page()
    page.set_default_timeout(WAIT_MS)
    page.outside, page.broken = [], []
    page.on(
        "request", lambda r: page.outside.append(r.url) if not r.url.startswith((address, "data:", "blob:")) else None
    )
    page.on("pageerror", lambda error: page.broken.append(str(error)))
    page.goto(address)
    page.wait_for_selector("#data-check")
    return page


def choose(page: Any, where: str, what: str) -> None:
    """Pick an entry of a list as people do: open it, write, take what it offers."""
    box = page.locator(f"#{where} input").first
    box.click()
    box.fill(what)
    page.get_by_role("option", name=what, exact=True).click()
    page.get_by_role("option").first.wait_for(state="detached")  # the list fades: two open ones offer the same
    page.wait_for_function("([id, what]) => document.querySelector(`#${id} input`).value === what", arg=[where, what])


def room(page: Any, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()


def says(page: Any, where: str, what: str) -> None:
    page.wait_for_function(
        "([at, what]) => document.querySelector(at)?.innerText.includes(what)", arg=[f"#{where}", what]
    )


def field(page: Any, name: str) -> Any:
    return page.locator(f"#{name} textarea, #{name} input").first


def start(page: Any, name: str) -> None:
    field(page, "train-name").fill(name)
    page.locator("#train-start").click()
    page.wait_for_selector("#train-told .good")


def ended(page: Any, title: str) -> None:
    """Wait for the end of a job that the room Train shows; it must have gone well."""
    shown = page.locator("#train-output .state", has_text=title)
    shown.and_(page.locator("[data-state=done], [data-state=failed]")).wait_for()
    assert shown.get_attribute("data-state") == "done", page.locator("#train-output").inner_text()


def test_the_loop(workspace: Path, address: str, browser: Any) -> None:
    page = visit(browser, address)
    look_at_rows(page)
    settings_both_ways(page)
    start(page, "sft.yaml")
    # the page is closed while it trains, and opened again
    page.context.close()
    page = visit(browser, address)
    watch(page, workspace)
    compare(page, workspace)
    judge(page, workspace)
    learn(page, workspace)
    serve_and_ask(page, workspace)
    for path in ("/etc/passwd", str(workspace / "train.jsonl"), str(workspace / ".ernie_tune_ui" / "jobs")):
        assert page.request.get(f"{address}gradio_api/file={path}").status in (403, 404)
    assert page.outside == [], "nothing is fetched from elsewhere"
    assert page.evaluate("window.broken") is None
    page.context.close()


def look_at_rows(page: Any) -> None:
    choose(page, "data-file", "train.jsonl")
    page.locator("#data-check").click()
    says(page, "data-found", "train.jsonl:4")
    page.wait_for_selector("#data-found article img")
    page.locator("#data-show").click()
    page.wait_for_selector("#data-rows img")
    assert "<script>window.broken" in page.locator("#data-rows").inner_text(), "shown as text"
    assert page.evaluate("window.broken") is None


def settings_both_ways(page: Any) -> None:
    room(page, "Train")
    yaml, steps = page.locator("#train-yaml textarea"), field(page, "set-max_steps")
    yaml.fill(YAML.replace("max_steps: 40", "max_steps: 39"))
    yaml.blur()
    page.wait_for_function("document.querySelector('#set-max_steps :is(input, textarea)').value == '39'")
    steps.fill("40")
    steps.blur()
    page.wait_for_function("document.querySelector('#train-yaml textarea').value.includes('max_steps: 40')")
    page.locator("#train-estimate").click()
    says(page, "train-told", "parameters")


def watch(page: Any, workspace: Path) -> None:
    """The curve is drawn while the run goes on, and grows; answers to held-out rows change."""
    room(page, "Watch")
    points = (
        "Math.max(0, ...[...document.querySelectorAll('#watch-curves svg path')].map(p => p.getAttribute('d').length))"
    )
    page.wait_for_function(f"{points} > 0")
    before = page.evaluate(points)
    page.wait_for_function(f"{points} > {before}")
    page.wait_for_selector("#watch-samples article tr:nth-child(4)")  # before, at 20 and 40 steps
    room(page, "Train")
    ended(page, "SFT output/sft")


def compare(page: Any, workspace: Path) -> None:
    """The model before and after, on the same picture."""
    room(page, "Compare")
    choose(page, "compare-left", NANO)
    choose(page, "compare-right", "output/sft")
    page.locator("#compare-picture input[type=file]").set_input_files(str(workspace / "images" / "0003.png"))
    page.wait_for_selector("#compare-picture img")
    page.locator("#compare-question textarea").fill("What number does the picture show? Answer with the digit only.")
    page.locator("#compare-ask").click()
    for side in ("left", "right"):
        page.wait_for_selector(f"#compare-said-{side} .text")
    page.wait_for_function("/^\\d$/.test(document.querySelector('#compare-said-right .text').innerText.trim())")


def judge(page: Any, workspace: Path) -> None:
    """Ten questions by keys alone; what cannot be preferred is corrected."""
    room(page, "Judge")
    choose(page, "judge-rows", "questions.jsonl")
    choose(page, "judge-model", "output/sft")
    field(page, "judge-name").fill("ann")
    page.locator("#judge-begin").click()
    for i in range(10):
        page.wait_for_selector(f"#judge-answers .desk[data-at='{i}'] article")
        if i == 0:
            page.locator("h1").click()  # out of the button; from here on keys alone
        if i == 4 or page.locator("#judge-answers article").count() == 1:
            page.keyboard.press("e")
            page.wait_for_function("document.activeElement.closest('#judge-corrected')")
            page.keyboard.type(f" (it is {i})")
            page.keyboard.press("Control+Enter")
        else:
            page.keyboard.press("1")
            page.keyboard.press("2")  # too early for the next question: it must not judge it
    says(page, "judge-question", "all questions are judged")
    lines = (workspace / "judgements" / "judgements.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 10
    assert len((workspace / "judgements" / "pairs.jsonl").read_text(encoding="utf-8").splitlines()) >= 9


def learn(page: Any, workspace: Path) -> None:
    """DPO on the judgements, with the settings that the room Judge hands to the room Train."""
    page.locator("#judge-learn").click()
    page.wait_for_function("document.querySelector('#train-yaml textarea')?.value.includes('stage: DPO')")
    yaml = page.locator("#train-yaml textarea")
    text = yaml.input_value()
    assert "lora_path: output/sft" in text
    yaml.fill(text.replace("max_steps: 40", "max_steps: 4") + 'save_strategy: "no"\nplot_loss: false\n')
    start(page, "dpo.yaml")
    ended(page, "DPO output/dpo-judgements")
    assert (workspace / "output" / "dpo-judgements" / "README.md").exists()


def serve_and_ask(page: Any, workspace: Path) -> None:
    room(page, "Export and serve")
    choose(page, "serve-model", "output/dpo-judgements")
    page.locator("#serve-start").click()
    page.wait_for_selector("#serve-running .state[data-state=ready]")
    page.locator("#serve-picture input[type=file]").set_input_files(str(workspace / "images" / "0003.png"))
    page.wait_for_selector("#serve-picture img")
    field(page, "serve-question").fill("What number does the picture show? Answer with the digit only.")
    page.locator("#serve-ask").click()
    page.wait_for_function("/\\d/.test(document.querySelector('#serve-said .text')?.innerText || '')")
    page.locator("#serve-end").click()
    page.wait_for_selector("#serve-running .state[data-state=stopped]")


@pytest.mark.parametrize(
    ("width", "scheme", "locale"), [(1280, "dark", "zh-CN"), (390, "light", "en-US"), (390, "dark", "zh-CN")]
)
def test_languages_colours_and_narrow_screens(browser: Any, address: str, width: int, scheme: str, locale: str) -> None:
    page = visit(browser, address, viewport={"width": width, "height": 844}, color_scheme=scheme, locale=locale)
    chinese = locale == "zh-CN"
    assert page.get_by_role("tab", name="数据" if chinese else "Data", exact=True).count() == 1
    page.locator("#data-check").click()
    page.wait_for_selector("#data-found .bad")
    told = page.locator("#data-found").inner_text()
    assert ("不能为空" in told) == chinese
    assert ("must not be empty" in told) != chinese
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 200) == (scheme == "dark")
    page.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_names_and_the_order_of_focus(browser: Any, address: str, scheme: str) -> None:
    """What axe-core finds of WCAG 2 A and AA in every room; the tab key goes as the eye does."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="pip install axe-playwright-python")
    page = visit(browser, address, color_scheme=scheme)
    rules = {"runOnly": {"type": "tag", "values": ["wcag2a", "wcag2aa"]}, "resultTypes": ["violations"]}
    for name in ("Data", "Train", "Watch", "Compare", "Export and serve", "Judge"):
        room(page, name)
        if name == "Data":
            choose(page, "data-file", "train.jsonl")
            page.locator("#data-check").click()
            page.wait_for_selector("#data-found article img")
        if name == "Export and serve":
            page.locator("#serve-start").click()
            page.wait_for_selector("#serve-told .bad")  # an error is to be read too
        if name == "Judge":
            begin(page, f"axe {scheme}")
        found = axe.Axe().run(page, options=rules).response["violations"]
        assert not found, (name, [(v["id"], [node["target"] for node in v["nodes"]]) for v in found])
    page.locator("#judge-name :is(input, textarea)").focus()
    seen: list[str] = []
    while "judge-learn" not in seen:
        page.keyboard.press("Tab")
        seen.append(page.evaluate("(a => a.dataset.key || a.closest('[id^=judge]')?.id || '')(document.activeElement)"))
        assert len(seen) < 40, seen
    order = ["judge-mode", "judge-begin", "1", "2", "3", "0", "e", "Enter", "s", "u", "judge-reason", "judge-corrected"]
    assert [name for name in seen if name in order] == order
    page.context.close()


def test_written_pages_fit_and_can_be_read(browser: Any, workspace: Path, tmp_path: Path) -> None:
    """The doctor's page and that of all settings: contrast, names, nothing cut off when narrow."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="pip install axe-playwright-python")
    from ernie_tune.cli import settings_help
    from ernie_tune.data.doctor.scan import Scan
    from ernie_tune.data.processor import Processor
    from ernie_tune.data.sources import DatasetEntry
    from ernie_tune.report.check_page import check_page

    settings_help.run(["--all", f"--html={tmp_path / 'settings.html'}"])
    report = Scan(Processor.bundled("small")).run([DatasetEntry(str(workspace / "train.jsonl"))], [])
    (tmp_path / "check.html").write_text(check_page(report), encoding="utf-8")
    rules = {"runOnly": ["color-contrast", "image-alt", "button-name", "svg-img-alt"], "resultTypes": ["violations"]}
    for name, scheme in (("check", "light"), ("check", "dark"), ("settings", "dark")):
        viewport = {"width": 390, "height": 844}
        page = browser.new_context(viewport=viewport, color_scheme=scheme, locale="zh-CN").new_page()
        page.goto((tmp_path / f"{name}.html").as_uri())
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing runs out of the screen"
        if name == "check":
            found = axe.Axe().run(page, options=rules).response["violations"]
            assert not found, [(v["id"], [node["target"] for node in v["nodes"]]) for v in found]
        page.context.close()


def begin(page: Any, who: str, rows: str = "predicted.jsonl") -> None:
    """Judge the answers that rows bring along."""
    choose(page, "judge-rows", rows)
    field(page, "judge-name").fill(who)
    page.locator("#judge-begin").click()
    page.wait_for_selector("#judge-answers .desk[data-at='0'] article")


def test_two_judges_at_once_and_their_agreement(browser: Any, address: str, workspace: Path) -> None:
    """Two tabs, keys in turns, then taps; answers that are scripts stay text."""
    tabs = [visit(browser, address), visit(browser, address, viewport={"width": 390, "height": 844}, has_touch=True)]
    for tab, who in zip(tabs, ("cleo", "dan"), strict=True):
        if tab is tabs[0]:
            room(tab, "Judge")
        else:  # on a narrow screen the last rooms wait behind a button
            tab.locator("button:has-text('…'), .overflow-menu > button").first.click()
            tab.locator(".overflow-dropdown button", has_text="Judge").click()
        begin(tab, who)
    for at in (0, 1, 2):
        for tab in tabs:
            tab.wait_for_selector(f"#judge-answers .desk[data-at='{at}'] article")
            if tab is tabs[0]:
                tab.locator("h1").click()
                tab.keyboard.press("2")
            else:
                tab.locator("#judge-answers button[data-key='1']").tap()
    for tab in tabs:
        says(tab, "judge-question", "all questions are judged")
        assert tab.evaluate("window.broken") is None
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth + 1"), "nothing runs out of the screen"
    lines = [json.loads(x) for x in (workspace / "judgements" / "judgements.jsonl").read_text().splitlines()]
    assert sorted(x["judge"] for x in lines if x["judge"] in ("cleo", "dan")) == ["cleo"] * 3 + ["dan"] * 3
    tabs[0].get_by_role("button", name="two judges").click()
    for name, who in (("first", "cleo"), ("second", "dan")):
        choose(tabs[0], f"judge-{name}", who)
    tabs[0].locator("#judge-compare").click()
    says(tabs[0], "judge-agreement", "pairs of answers")
    for tab in tabs:
        tab.context.close()
