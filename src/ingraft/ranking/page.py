"""The page: one prompt at a time, its answers as cards, a place for each. Everything that comes from a model is set as text, never as markup."""

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Which answer is better?</title>
<style nonce="{nonce}">
:root { color-scheme: light dark; --ink: #1c2127; --soft: #5c6670; --line: #dde2e7; --paper: #ffffff; --card: #f6f8fa; --mark: #2f6fb3; --on: #ffffff; --bad: #b3372f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ec; --soft: #98a3ad; --line: #323a42; --paper: #14181c; --card: #1c2228; --mark: #6fa8dc; --on: #14181c; --bad: #e57f77; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1.25rem 6rem; max-width: 60rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Noto Sans CJK SC", sans-serif; }
header { display: flex; align-items: center; gap: 1rem; color: var(--soft); font-size: .9rem; }
progress { flex: 1; height: .5rem; accent-color: var(--mark); }
.turn { white-space: pre-wrap; overflow-wrap: anywhere; margin: .75rem 0; padding-left: .9rem; border-left: 3px solid var(--line); }
.turn b { display: block; color: var(--soft); font-size: .8rem; font-weight: 600; }
h1 { font-size: 1.05rem; margin: 1.25rem 0 .25rem; }
fieldset { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; margin: .75rem 0; padding: .8rem 1rem; min-width: 0; }
fieldset:focus-within { border-color: var(--mark); }
fieldset p { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0 0 .6rem; }
legend { color: var(--soft); font-size: .8rem; padding: 0 .4rem; }
label { display: inline-block; margin-right: .4rem; cursor: pointer; }
label input { position: absolute; opacity: 0; }
label span { display: inline-block; min-width: 2.4rem; padding: .25rem .6rem; text-align: center; border: 1px solid var(--line); border-radius: .4rem; background: var(--paper); }
label input:checked + span { background: var(--mark); border-color: var(--mark); color: var(--on); font-weight: 600; }
label input:focus-visible + span { outline: 2px solid var(--mark); outline-offset: 2px; }
footer { position: fixed; inset: auto 0 0 0; background: var(--paper); border-top: 1px solid var(--line); }
footer div { max-width: 60rem; margin: 0 auto; padding: .7rem 1.25rem; display: flex; gap: .6rem; align-items: center; flex-wrap: wrap; }
button { font: inherit; padding: .4rem 1rem; border-radius: .4rem; border: 1px solid var(--line); background: var(--card); color: var(--ink); cursor: pointer; }
button.main { background: var(--mark); border-color: var(--mark); color: var(--on); font-weight: 600; }
button:disabled { opacity: .45; cursor: default; }
#hint { color: var(--soft); font-size: .85rem; margin-left: auto; } #problem { color: var(--bad); }
</style></head>
<body>
<header><span id="count"></span><progress id="bar" max="1" value="0"></progress><button id="undo">Undo</button></header>
<main id="main" aria-live="polite"></main>
<footer><div><button id="save" class="main">Save</button><button id="skip">Skip</button><span id="problem" role="alert"></span>
<span id="hint">Keys: a digit gives the answer in focus its place, Enter saves. 1 is the best; equal places are a tie.</span></div></footer>
<script nonce="{nonce}">
"use strict";
const $ = id => document.getElementById(id);
let asked = null, timer = 0;
const make = (tag, text, parent) => { const e = document.createElement(tag); if (text) e.textContent = text; parent.append(e); return e; };
const places = () => asked.responses.map((_, i) => Number((document.querySelector(`input[name="r${i}"]:checked`) || {}).value || 0));
const ready = () => asked && places().every(Boolean) && new Set(places()).size > 1;
const look = () => { $("save").disabled = !ready(); };
async function call(what, told) {
  $("problem").textContent = "";
  try {
    const answer = await fetch(what, told === undefined ? {} : { method: "POST", body: JSON.stringify(told) });
    const state = await answer.json();
    if (state.error) $("problem").textContent = state.error;
    if (state.total !== undefined) show(state);
  } catch { $("problem").textContent = "The program behind this page has ended. What was saved is in its file."; }
}
function show(state) {
  clearTimeout(timer);
  $("count").textContent = `${state.ranked} of ${state.total} ranked` + (state.skipped ? `, ${state.skipped} skipped` : "");
  $("bar").max = Math.max(1, state.total); $("bar").value = state.ranked + state.skipped;
  $("undo").disabled = !state.undo; $("skip").disabled = !state.question;
  if (asked && state.question && asked.number === state.question.number) return;
  asked = state.question;
  const main = $("main"); main.replaceChildren();
  if (!asked) {
    make("h1", state.more ? "The next answers are being written\\u2026" : "All done. This page can be closed.", main);
    if (state.more) timer = setTimeout(() => call("state"), 1500);
    look(); return;
  }
  for (const turn of asked.prompt) { const box = make("div", "", main); box.className = "turn"; make("b", turn.role, box); box.append(turn.content); }
  make("h1", "Which answer is better?", main);
  asked.responses.forEach((text, i) => {
    const set = make("fieldset", "", main); make("legend", `answer ${String.fromCharCode(65 + i)}`, set); make("p", text, set);
    asked.responses.forEach((_, j) => {
      const label = make("label", "", set), input = make("input", "", label);
      input.type = "radio"; input.name = `r${i}`; input.value = j + 1; input.setAttribute("aria-label", `place ${j + 1}`);
      input.addEventListener("change", look); make("span", String(j + 1), label);
    });
  });
  focus(0); look();
}
const focus = i => { const first = document.querySelector(`input[name="r${i}"]`); if (first) first.focus(); };
document.addEventListener("keydown", event => {
  if (!asked || event.ctrlKey || event.metaKey || event.altKey) return;
  const at = document.activeElement, card = at && at.name ? Number(at.name.slice(1)) : places().findIndex(p => !p);
  if (event.key >= "1" && event.key <= String(asked.responses.length) && card >= 0) {
    document.querySelector(`input[name="r${card}"][value="${event.key}"]`).checked = true; look(); focus(card + 1 < asked.responses.length ? card + 1 : card);
    event.preventDefault();
  } else if (event.key === "Enter" && ready() && at.tagName !== "BUTTON") { $("save").click(); event.preventDefault(); }
});
$("save").addEventListener("click", () => { if (ready()) call("rank", { number: asked.number, places: places() }); });
$("skip").addEventListener("click", () => asked && call("skip", { number: asked.number }));
$("undo").addEventListener("click", () => call("undo", {}));
call("state");
</script></body></html>
"""
