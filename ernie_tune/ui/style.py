"""The page's own style and script: one language of two, light and dark as the system asks, narrow
screens, keys of the judge.

Refuses to know: rooms, data.
"""

from __future__ import annotations

from ernie_tune.report import html

# gradio puts a prefix before every selector, part by part between commas: no :is(a, b), and what
# depends on light and dark stands in a media rule.
CSS = (
    html.STYLE
    + """
.ernie-tune.inside { max-width: none; padding: 0; background: none; font-size: 14px }
html[data-tongue=zh] .ernie-tune .zh { display: inline !important } html[data-tongue=zh] .ernie-tune .en { display: none !important }
.ernie-tune.inside .src, .ernie-tune.inside .zero { color: var(--soft) } .ernie-tune.inside table, .ernie-tune.inside tr, .ernie-tune.inside th, .ernie-tune.inside td { border-color: var(--line) !important }
.ernie-tune.inside tr.ok td { color: var(--ok) !important }
.gradio-container { max-width: 1280px !important; width: 100% !important; margin: 0 auto !important }
.gradio-container main, .gradio-container main > .wrap { width: 100% !important; max-width: none !important }
html:not([data-tongue=zh]) .zh { display: none }
html[data-tongue=zh] .en { display: none }
p.note, p.bad, p.good { margin: .3em 0 }
p.note, p.note span { color: var(--body-text-color-subdued) !important }
p.bad, p.bad span { color: #b91c1c !important } p.good, p.good span { color: #047857 !important }
.text { white-space: pre-wrap; overflow-wrap: anywhere }
.turn { border-left: 3px solid var(--border-color-primary); padding: .2em .8em; margin: .4em 0 }
.turn.user { border-color: #2563eb } .turn.assistant { border-color: #059669 }
.pictures { display: flex; flex-wrap: wrap; gap: 8px; margin: .4em 0 }
.pictures img { max-width: min(320px, 100%); max-height: 320px; image-rendering: auto; border-radius: 6px }
#compare-picture img, #serve-picture img { min-width: 96px; min-height: 96px; object-fit: contain }
p.who { margin: .4em 0; overflow-wrap: anywhere }
.pictures img.tiny, .pictures img[width] { min-width: 96px; image-rendering: pixelated }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(260px, 100%), 1fr)); gap: 12px }
.answer { border: 2px solid var(--border-color-primary); border-radius: 8px; padding: .6em .8em }
.answer.marked { border-color: #2563eb; box-shadow: 0 0 0 2px #2563eb55 }
.answer { cursor: pointer }
.desk .keys { display: flex; flex-wrap: wrap; gap: 8px; margin-top: 12px }
.desk .keys button { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 6px 12px; height: 40px; margin: 0 !important; cursor: pointer;
  background: var(--background-fill-primary); color: var(--body-text-color) }
.desk .keys button:hover { border-color: #2563eb } .desk .keys button.primary { background: #1d4ed8; color: #fff; border-color: #1d4ed8 }
.desk .keys button, .desk .keys button span { font-weight: 500 !important; font-size: 14px !important; color: inherit !important; line-height: 1.4 }
.desk .keys button.primary, .desk .keys button.primary span { color: #fff !important }
.card { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: .6em .8em; margin: .4em 0; overflow-wrap: anywhere }
.state { font-weight: 600 } .state[data-state=ready], .state[data-state=done] { color: #047857 } .state[data-state=failed] { color: #b91c1c }
@media (prefers-color-scheme: dark) {
  p.bad, p.bad span, .state[data-state=failed] { color: #fca5a5 !important }
  p.good, p.good span, .state[data-state=ready], .state[data-state=done] { color: #6ee7b7 !important }
}
.desk kbd { font: 600 12px ui-monospace, monospace; background: none; color: inherit; border: 0; padding: 0; margin-right: 2px; box-shadow: none }
.answer header { display: flex; justify-content: space-between; gap: 8px; margin-bottom: .3em }
.meter { height: 8px; border-radius: 4px; background: var(--border-color-primary); overflow: hidden }
.meter i { display: block; height: 100%; background: #2563eb }
.numbers i { display: inline-block; width: 1.1em; height: .28em; border-radius: 2px; margin-right: .5em; vertical-align: middle }
.numbers { display: flex; flex-wrap: wrap; gap: .2em 1.2em; margin: .3em 0 } .scroll { overflow-x: auto } .scroll table { border-collapse: collapse; width: 100% }
.scroll td, .scroll th { padding: .3em .6em; text-align: left; border-bottom: 1px solid var(--border-color-primary); vertical-align: top }
.curves { border-radius: 8px; overflow-x: auto } .curves svg { width: 100%; min-width: 720px; height: auto }
#train-yaml textarea { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: 13px }
details summary { cursor: pointer } details summary:focus-visible { outline: 3px solid #2563eb }
pre.log { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 320px; overflow-y: auto; font-size: 12px; margin: 0 }
dl.facts { display: grid; grid-template-columns: max-content 1fr; gap: .2em 1em } dl.facts dd { margin: 0 }
button:focus-visible, input:focus-visible, textarea:focus-visible { outline: 3px solid #2563eb !important; outline-offset: 1px }
@media (max-width: 640px) {
  .gradio-container, .gradio-container main { padding: 4px !important; min-width: 0 !important }
  .row { flex-direction: column !important } .row > *, .form > * { min-width: 0 !important; width: 100% !important }
  .ernie-tune.inside td:nth-child(n+2):not(:nth-child(2):last-child) { min-width: 4.5em; white-space: nowrap }
  .ernie-tune.inside td:first-child:nth-last-child(n+3) { min-width: 11em }
  .answers { grid-template-columns: 1fr } #train-form { order: 2 }
}
@media (prefers-reduced-motion: reduce) { * { animation: none !important; transition: none !important } }
"""
)

# The tongue of the page is that of the browser; `?lang=zh` overrides.
HEAD = """
<meta name="color-scheme" content="light dark">
<script>
(() => {
  const asked = new URLSearchParams(location.search).get("lang");
  const tongue = (asked || navigator.language || "en").toLowerCase().startsWith("zh") ? "zh" : "en";
  document.documentElement.dataset.tongue = tongue;
  document.documentElement.lang = tongue;
})();
</script>
"""

# Keys of the judge, and taps on answers and buttons: each is sent with the place of the question
# that was seen when it was pressed, one batch after the other has been heard, so that none is lost,
# overtakes another, or judges a question that nobody has read. Letters are left alone while
# somebody writes; there Ctrl-Enter writes the judgement and Escape leaves the field.
DESK_SCRIPT = """
const KEYS = /^([0-9]|[gbresu]|Enter|ArrowLeft|ArrowRight)$/;
const PATIENCE_MS = 60000;
const FIELDS = { e: "#judge-corrected textarea", r: "#judge-reason textarea" };
const desk = () => element.querySelector(".desk");
let waiting = [], since = 0, turn = "", goal = "";
const send = () => {
  if (!waiting.length || (since && Date.now() - since < PATIENCE_MS)) return;
  since = Date.now();
  const keys = waiting.splice(0);
  goal = FIELDS[keys[keys.length - 1][0]] || "";  // entered once these keys have been heard
  trigger("select", { keys });
};
const press = key => {
  if (!desk()) return;
  waiting.push([key, Number(desk().dataset.at)]);
  send();
};
new MutationObserver(() => {
  if (!desk() || desk().dataset.turn === turn) return;
  turn = desk().dataset.turn;
  since = 0;
  const field = goal && document.querySelector(goal);
  goal = "";
  if (field) setTimeout(() => { field.focus(); field.setSelectionRange(field.value.length, field.value.length); }, 50);
  send();
}).observe(element, { subtree: true, childList: true, attributes: true });
element.addEventListener("click", event => {
  const at = event.target.closest("[data-key]");
  if (at) press(at.dataset.key);
});
document.addEventListener("keydown", event => {
  if (element.offsetParent === null || !desk()) return;
  const at = event.target, closest = what => at.closest && at.closest(what);
  const writes = closest("input, textarea, select, [contenteditable=true], [role=listbox]");
  if (writes && closest("#judge-fields")) {
    if (event.key === "Escape") at.blur();
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    event.preventDefault();
    at.blur();
    press("Enter");
    return;
  }
  if (writes || event.ctrlKey || event.altKey || event.metaKey || !KEYS.test(event.key)) return;
  if (event.key === "Enter" && closest("button, a, [role=tab]")) return;
  if (event.key.startsWith("Arrow") && closest("[role=tablist], [role=slider]")) return;
  event.preventDefault();
  press(event.key);
});
"""
