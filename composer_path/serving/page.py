"""The page to ask a model: one file without anything from elsewhere, light and dark, for keyboard and screen reader.

It talks to the same interface as every client, and keeps the conversation, pictures and key in its own memory only.
"""

from __future__ import annotations

import base64
import hashlib

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2433; --quiet: #596275; --line: #c9cfdb; --paper: #fff; --mine: #f0ebf7;
  --accent: #6b3fa0; --on-accent: #fff; --wrong: #a3142c; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8eaf0; --quiet: #a6aebf; --line: #434b5e; --paper: #161a22; --mine: #2a2438; --accent: #bd97ec;
    --on-accent: #1b1226; --wrong: #ff8d9c; }
}
* { box-sizing: border-box; }
[hidden] { display: none !important; }
html { height: 100%; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
  max-width: 46rem; min-height: 100%; padding: 0 1rem; display: flex; flex-direction: column; }
header { display: flex; flex-wrap: wrap; align-items: baseline; gap: .25rem .75rem; padding: 1rem 0 .5rem;
  border-bottom: 1px solid var(--line); }
h1 { font-size: 1.15rem; margin: 0; }
#model { color: var(--quiet); overflow-wrap: anywhere; flex: 1; }
main { flex: 1; padding: 1rem 0; }
#empty { color: var(--quiet); margin: 15vh auto 0; max-width: 26rem; text-align: center; }
.turn, .turn p { scroll-margin-bottom: 16rem; }
.turn { margin: 0 0 1rem; }
.turn h2 { font-size: .8rem; font-weight: 600; color: var(--quiet); margin: 0 0 .2rem; }
.turn p { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.mine { background: var(--mine); border-radius: .6rem; padding: .6rem .8rem; }
.writing::after { content: "\\25CF"; color: var(--accent); margin-left: .2rem; }
@media (prefers-reduced-motion: no-preference) {
  .writing::after { animation: pulse 1s infinite alternate; } @keyframes pulse { to { opacity: .2; } }
}
.pictures { display: flex; flex-wrap: wrap; gap: .5rem; margin: 0; padding: 0; list-style: none; }
.pictures:not(:empty) { margin-bottom: .5rem; }
.pictures li { position: relative; }
.pictures img { display: block; width: 6rem; height: 6rem; object-fit: cover; border-radius: .4rem;
  border: 1px solid var(--line); }
.pictures .plain { display: grid; place-items: center; width: 6rem; height: 6rem; border-radius: .4rem;
  border: 1px solid var(--line); color: var(--quiet); font-size: .85rem; }
.mine .pictures img { width: 9rem; height: 9rem; }
form { position: sticky; bottom: 0; background: var(--paper); border-top: 1px solid var(--line); padding: .75rem 0; }
label.above { display: block; font-size: .85rem; color: var(--quiet); margin-bottom: .2rem; }
textarea, input[type=password] { width: 100%; font: inherit; color: inherit; background: transparent;
  border: 1px solid var(--line); border-radius: .5rem; padding: .5rem .65rem; resize: vertical; }
#key { margin-bottom: .6rem; }
.row { display: flex; flex-wrap: wrap; gap: .5rem; margin-top: .5rem; align-items: center; }
.row .gap { flex: 1; }
button, .button { font: inherit; color: var(--ink); background: transparent; border: 1px solid var(--line);
  border-radius: .5rem; padding: .4rem .9rem; min-height: 2.75rem; cursor: pointer; display: inline-grid;
  place-items: center; }
button.main { background: var(--accent); border-color: var(--accent); color: var(--on-accent); font-weight: 600; }
button:disabled { opacity: .5; cursor: default; }
.pictures button { position: absolute; top: .2rem; right: .2rem; min-height: 0; width: 1.75rem; height: 1.75rem;
  padding: 0; border-radius: 50%; background: var(--paper); line-height: 1; }
:focus-visible, input:focus-visible + .button { outline: 3px solid var(--accent); outline-offset: 2px; }
.away { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
.dropping { outline: 3px dashed var(--accent); outline-offset: -6px; }
#problem { color: var(--wrong); margin: 0; overflow-wrap: anywhere; }
#problem:not(:empty) { margin-bottom: .5rem; }
.note { font-size: .8rem; color: var(--quiet); margin: .5rem 0 0; }
"""

_MARKUP = """
<header><h1>Ask about pictures</h1><span id="model"></span>
<button type="button" id="anew" aria-label="New conversation" disabled>New</button></header>
<main><p id="empty">Choose a picture, drop one anywhere on this page or paste one, and ask about it.</p>
<div id="talk" role="log" aria-label="Conversation"></div></main>
<form id="form" autocomplete="off">
<p id="problem" role="alert"></p>
<p id="state" class="away" role="status"></p>
<div id="locked" hidden><label class="above" for="key">Key of this server</label>
<input id="key" type="password" autocomplete="new-password"></div>
<ul id="chosen" class="pictures" aria-label="Pictures for the next question"></ul>
<div id="asking"><label class="above" for="question">Question</label>
<textarea id="question" rows="2" aria-describedby="keys"></textarea></div>
<div class="row"><input id="files" class="away" type="file" accept="image/*,.tif,.tiff,.jp2,.j2k,.bmp" multiple>
<label class="button" for="files">Add pictures</label><span class="gap"></span>
<button type="button" id="stop" hidden>Stop</button><button class="main" id="ask">Ask</button></div>
<p class="note" id="keys">Enter asks, Shift+Enter begins a new line. Answers may be wrong: they are no diagnosis.</p>
</form>
"""

_SCRIPT = """
"use strict";
const at = id => document.getElementById(id);
let model = null, messages = [], chosen = [], writing = null;
let mayHave = {takes_question: true, max_images: 8, max_image_bytes: 16 * 2 ** 20};

function made(tag, name, text) {
  const one = document.createElement(tag);
  if (name) one.className = name;
  if (text !== undefined) one.textContent = text;
  return one;
}
function say(problem) { at("problem").textContent = problem || ""; }
function headers() {
  const key = at("key").value.trim();
  return {"Content-Type": "application/json", ...(key ? {Authorization: "Bearer " + key} : {})};
}
async function problemOf(response) {
  try { return (await response.json()).error.message; } catch { return "The server answered with " + response.status; }
}
async function connect() {
  const response = await fetch("v1/models", {headers: headers()});
  at("locked").hidden = response.status !== 401 && at("locked").hidden;
  if (response.status === 401) throw new Error(at("key").value ? "This key is not the server's." : "");
  if (!response.ok) throw new Error(await problemOf(response));
  const card = (await response.json()).data[0];
  model = card.id;
  mayHave = card.composer_path;
  at("model").textContent = model;
  at("asking").hidden = !mayHave.takes_question;
  at("ask").textContent = mayHave.takes_question ? "Ask" : "Describe";
  at("locked").hidden = true;
}
function pictureOf(url, name) {
  const image = made("img");
  image.alt = name;
  image.src = url;
  image.onerror = () => { const plain = made("span", "plain", name); image.replaceWith(plain); };
  return image;
}
function showChosen() {
  at("chosen").replaceChildren(...chosen.map((url, index) => {
    const item = made("li"), name = "Picture " + (index + 1), remove = made("button", "", "\\u00d7");
    remove.type = "button";
    remove.setAttribute("aria-label", "Remove " + name.toLowerCase());
    remove.onclick = () => { chosen.splice(index, 1); showChosen(); at("files").focus(); };
    item.append(pictureOf(url, name), remove);
    return item;
  }));
}
function addPictures(files) {
  say();
  for (const file of files) {
    if (file.size > mayHave.max_image_bytes) { say("A picture is larger than this server takes."); continue; }
    const reader = new FileReader();
    reader.onload = () => {
      if (sentPictures() + chosen.length >= mayHave.max_images) {
        say("A conversation may have " + mayHave.max_images + " pictures.");
        return;
      }
      const data = reader.result.slice(reader.result.indexOf(",") + 1);
      chosen.push("data:" + (file.type.startsWith("image/") ? file.type : "image/any") + ";base64," + data);
      showChosen();
      at("state").textContent = "Picture " + chosen.length + " added";
    };
    reader.readAsDataURL(file);
  }
}
function sentPictures() {
  return messages.reduce((sum, one) => sum + (Array.isArray(one.content) ? one.content.length - 1 : 0), 0);
}
function addTurn(role, text, urls) {
  at("empty").hidden = true;
  const turn = made("section", role === "user" ? "turn mine" : "turn"), said = made("p", "", text);
  turn.append(made("h2", "", role === "user" ? "You" : "Model"));
  if (urls && urls.length) {
    const list = made("ul", "pictures");
    list.append(...urls.map((url, i) => {
      const item = made("li"); item.append(pictureOf(url, "Picture " + (i + 1))); return item; }));
    turn.append(list);
  }
  turn.append(said);
  at("talk").append(turn);
  turn.scrollIntoView({block: "nearest"});
  return said;
}
async function readStream(response, onText) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const {value, done} = await reader.read();
    if (done) throw new Error("The server ended before the answer did.");
    held += value;
    const events = held.split("\\n\\n");
    held = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const said = JSON.parse(data);
      if (said.error) throw new Error(said.error.message);
      for (const choice of said.choices) if (choice.delta.content) onText(choice.delta.content);
    }
  }
}
async function ask() {
  const question = at("question").value.trim();
  if (writing) return;
  if (mayHave.takes_question ? !question : !chosen.length) {
    say(mayHave.takes_question ? "Write a question." : "Add a picture.");
    return;
  }
  say();
  writing = new AbortController();
  at("ask").disabled = true;
  let said = null, answer = "", asked = false;
  try {
    if (!model) await connect();
    if (!mayHave.takes_question) messages = [];
    const parts = chosen.map(url => ({type: "image_url", image_url: {url}}));
    if (mayHave.takes_question) parts.push({type: "text", text: question});
    messages.push({role: "user", content: parts});
    asked = true;
    at("stop").hidden = false;
    addTurn("user", question, chosen);
    said = addTurn("assistant", "");
    said.className = "writing";
    at("talk").setAttribute("aria-busy", "true");
    at("state").textContent = "The model is answering";
    const body = JSON.stringify({model, messages, stream: true});
    const sent = {method: "POST", headers: headers(), body, signal: writing.signal};
    const response = await fetch("v1/chat/completions", sent);
    if (!response.ok) throw new Error(await problemOf(response));
    await readStream(response, text => {
      answer += text;
      said.textContent = answer;
      said.scrollIntoView({block: "nearest"});
    });
    finish(answer || "(The model said nothing.)");
  } catch (error) {
    if (error.name === "AbortError") finish(answer + " (stopped)");
    else {
      if (asked) {
        messages.pop();
        at("talk").lastChild.remove();
        at("talk").lastChild.remove();
      }
      at("empty").hidden = at("talk").childElementCount > 0;
      at("state").textContent = "";
      say(error.message || (at("locked").hidden ? "" : "This server asks for its key."));
      if (!at("locked").hidden) at("key").focus();
    }
  } finally {
    writing = null;
    at("ask").disabled = false;
    at("stop").hidden = true;
    at("anew").disabled = !messages.length;
    at("talk").removeAttribute("aria-busy");
    if (at("locked").hidden) at(mayHave.takes_question ? "question" : "ask").focus();
  }
  function finish(text) {
    said.textContent = text;
    said.className = "";
    messages.push({role: "assistant", content: answer});
    chosen = [];
    showChosen();
    at("question").value = "";
    at("state").textContent = "The model has answered";
    said.scrollIntoView({block: "nearest"});
  }
}
at("form").onsubmit = event => { event.preventDefault(); ask(); };
at("question").onkeydown = event => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); ask(); }
};
at("stop").onclick = () => writing && writing.abort();
at("anew").onclick = () => {
  if (writing) return;
  messages = [];
  chosen = [];
  showChosen();
  say();
  at("talk").replaceChildren();
  at("empty").hidden = false;
  at("anew").disabled = true;
  at("question").focus();
};
at("files").onchange = event => { addPictures([...event.target.files]); event.target.value = ""; };
document.ondragover = event => { event.preventDefault(); document.body.classList.add("dropping"); };
document.ondragleave = event => { if (!event.relatedTarget) document.body.classList.remove("dropping"); };
document.ondrop = event => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  addPictures([...event.dataTransfer.files]);
};
document.onpaste = event => {
  const files = [...event.clipboardData.files];
  if (files.length) { event.preventDefault(); addPictures(files); }
};
connect().catch(error => say(error.message || "This server asks for its key."));
at("question").focus();
"""


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


PAGE = (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Ask about pictures</title>\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">\n'
    f"<style>{_STYLE}</style></head>\n<body>{_MARKUP}<script>{_SCRIPT}</script></body></html>\n"
)
# Nothing but these two texts is run or styled by, and nothing but this server asked.
CONTENT_SECURITY_POLICY = (
    f"default-src 'none'; script-src {_hash(_SCRIPT)}; style-src {_hash(_STYLE)}; img-src data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
