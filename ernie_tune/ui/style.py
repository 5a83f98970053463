"""The page's own style and script: one language of two, light and dark as the system asks, narrow
screens, keys of the judge.

Refuses to know: rooms, data.
"""

from __future__ import annotations

CSS = """
.gradio-container { max-width: 1280px !important; width: 100% !important; margin: 0 auto !important }
.gradio-container main, .gradio-container main > .wrap { width: 100% !important; max-width: none !important }
html:not([data-tongue=zh]) .zh { display: none }
html[data-tongue=zh] .en { display: none }
.note { color: var(--body-text-color-subdued); margin: .3em 0 }
.bad { color: #b91c1c; margin: .3em 0 } .good { color: #047857; margin: .3em 0 }
.dark .bad { color: #fca5a5 } .dark .good { color: #6ee7b7 }
.text { white-space: pre-wrap; overflow-wrap: anywhere }
.turn { border-left: 3px solid var(--border-color-primary); padding: .2em .8em; margin: .4em 0 }
.turn.user { border-color: #2563eb } .turn.assistant { border-color: #059669 }
.pictures { display: flex; flex-wrap: wrap; gap: 8px; margin: .4em 0 }
.pictures img { max-width: min(320px, 100%); max-height: 320px; image-rendering: auto; border-radius: 6px }
.pictures img.tiny, .pictures img[width] { min-width: 96px; image-rendering: pixelated }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(260px, 100%), 1fr)); gap: 12px }
.answer { border: 2px solid var(--border-color-primary); border-radius: 8px; padding: .6em .8em }
.answer.marked { border-color: #2563eb; box-shadow: 0 0 0 2px #2563eb55 }
.answer header { display: flex; justify-content: space-between; gap: 8px; margin-bottom: .3em }
.meter { height: 8px; border-radius: 4px; background: var(--border-color-primary); overflow: hidden }
.meter i { display: block; height: 100%; background: #2563eb }
.scroll { overflow-x: auto } .scroll table { border-collapse: collapse; width: 100% }
.scroll td, .scroll th { padding: .3em .6em; text-align: left; border-bottom: 1px solid var(--border-color-primary); vertical-align: top }
.curves { background: #fff; border-radius: 8px; overflow-x: auto } .curves svg { width: 100%; height: auto }
pre.log { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 320px; overflow-y: auto; font-size: 12px; margin: 0 }
dl.facts { display: grid; grid-template-columns: max-content 1fr; gap: .2em 1em } dl.facts dd { margin: 0 }
.offscreen { position: absolute !important; left: -9999px !important; width: 1px !important; height: 1px !important; overflow: hidden }
button:focus-visible, input:focus-visible, textarea:focus-visible { outline: 3px solid #2563eb !important; outline-offset: 1px }
@media (max-width: 640px) {
  .gradio-container, .gradio-container main { padding: 4px !important; min-width: 0 !important }
  .row:not(.keys) { flex-direction: column !important } .row:not(.keys) > *, .form > * { min-width: 0 !important; width: 100% !important }
  .answers { grid-template-columns: 1fr }
}
@media (prefers-reduced-motion: reduce) { * { animation: none !important; transition: none !important } }
"""

# The tongue of the page is that of the browser; `?lang=zh` overrides. Keys of the judge go to a
# field that cannot be seen, but never while somebody writes.
HEAD = """
<meta name="color-scheme" content="light dark">
<script>
(() => {
  const asked = new URLSearchParams(location.search).get("lang");
  const tongue = (asked || navigator.language || "en").toLowerCase().startsWith("zh") ? "zh" : "en";
  document.documentElement.dataset.tongue = tongue;
  document.documentElement.lang = tongue;
  const KEYS = /^([0-9]|g|b|s|u|Enter|ArrowLeft|ArrowRight)$/;
  let count = 0;
  document.addEventListener("keydown", event => {
    const field = document.querySelector("#judge-key textarea, #judge-key input");
    const room = document.querySelector("#judge-desk");
    if (!field || !room || room.offsetParent === null || !KEYS.test(event.key)) return;
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    const at = event.target;
    const writes = at.closest && at.closest("input, textarea, select, [contenteditable=true], [role=listbox]");
    if (writes && at !== field) return;
    if (event.key === "Enter" && at.closest && at.closest("button, a")) return;
    if (event.key.startsWith("Arrow") && at.closest && at.closest("[role=tablist]")) return;
    event.preventDefault();
    field.value = event.key + " " + (++count);
    field.dispatchEvent(new Event("input", { bubbles: true }));
  });
})();
</script>
"""
