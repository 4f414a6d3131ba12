// The frame: who looks, what the server says, and which view shows it.

import { follow, isKey, key, Refused, setKey, viewer } from "./api.js";
import * as now from "./now.js";
import * as operator from "./operator.js";
import * as playground from "./playground.js";
import * as run from "./run.js";
import * as runs from "./runs.js";
import { h, say, tell } from "./ui.js";

const VIEWS = { now, runs, playground, operator };
const main = document.getElementById("main");
const status = document.getElementById("status");
// `state` has no runs until the server has told them; a newer `attempt` to begin makes the older ones void.
let state = {}, view = null, who = null, stream = null, attempt = 0, retry = 0;

// ---- views

function place() {
  const [name = "now", ...rest] = location.hash.replace(/^#\/?/, "").split("/");
  return { name: Object.hasOwn(VIEWS, name) ? name : "now", argument: decoded(rest.join("/")) };
}

function decoded(text) {
  try { return decodeURIComponent(text); } catch { return text; }
}

function show(isFirst = false) {
  view?.stop?.();
  const { name, argument } = place();
  const module = name === "runs" && argument ? run : VIEWS[name];
  view = module.create(argument, { onError, who });
  main.replaceChildren(view.element);
  document.title = `${view.title} · tx_async`;
  for (const link of document.querySelectorAll("#views a")) {
    if (link.getAttribute("href") === `#/${name}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  view.update(state);
  if (!isFirst) { window.scrollTo(0, 0); view.element.querySelector("h1")?.focus({ preventScroll: true }); }
}

function onError(error) {
  if (error instanceof Refused && error.status === 401) { signIn(error.message); return; }
  const old = main.querySelector(".problem.card");
  const card = h("p", { class: "card problem", role: "alert" }, error instanceof Refused ? error.message : "The server cannot be reached.");
  old?.remove();
  main.prepend(card);
  setTimeout(() => card.remove(), 12_000);
}

// ---- what the server says

function receive(event, data) {
  if (event === "state") state = data;
  else {
    const { runs: moved = {}, ...sections } = data, known = { ...state.runs };
    for (const [id, entry] of Object.entries(moved)) { if (entry) known[id] = entry; else delete known[id]; }
    state = { ...state, ...sections, runs: known };
  }
  showStatus();
  view?.update(state);
}

function showStatus(text = "", kind = "") {
  const isReady = state.ready?.is_ready;
  status.className = `pill ${kind || (isReady ? "good" : "warn")}`;
  say(status, text || (isReady ? "Ready" : "Starting"));
  say(document.getElementById("model"), state.base_model?.name ?? "");
}

async function listen() {
  stream?.abort();
  stream = new AbortController();
  const lost = (text, refusal) => {
    showStatus("Reconnecting…", "bad");
    if (refusal) onError(refusal); else tell(text);
  };
  try {
    await follow(receive, lost, stream.signal);
  } catch (error) { onError(error); }
}

// ---- who looks

async function begin() {
  clearTimeout(retry);
  const mine = ++attempt;
  if (!key() && "wantsKey" in document.body.dataset) { signIn(""); return; }
  document.getElementById("leave").hidden = !key();
  try {
    const answer = await viewer();
    if (mine !== attempt) return;
    who = answer;
  } catch (error) {
    if (mine !== attempt) return;
    if (error instanceof Refused && error.status === 401) { signIn(key() ? error.message : ""); return; }
    showStatus("Not reachable", "bad");
    complain(`${error instanceof Refused ? error.message : "The server cannot be reached."} Trying again…`);
    retry = setTimeout(begin, 3000);
    return;
  }
  document.getElementById("operator-link").hidden = who.role !== "admin";
  say(document.getElementById("version"), `tx_async ${who.version}${who.name ? ` · signed in as ${who.name} (${who.role})` : ""}`);
  show(true);
  listen();
}

// Says what is wrong in the sign-in form, which stays as it is, or in its place when there is none yet.
function complain(text) {
  const form = main.querySelector(".signin form"), old = main.querySelector(".problem");
  if (old) { say(old, text); return; }
  const line = h("p", { class: form ? "problem" : "card problem", role: "alert" }, text);
  if (form) form.querySelector(".row").before(line);
  else main.replaceChildren(line);
}

function signIn(problem) {
  clearTimeout(retry);
  attempt += 1;
  stream?.abort();
  view?.stop?.();
  view = null;
  state = {};
  setKey("");
  showStatus("Signed out", "warn");
  document.getElementById("leave").hidden = true;
  document.getElementById("operator-link").hidden = true;
  const input = h("input", { type: "password", name: "key", required: true, autocomplete: "off", placeholder: "tml-…", spellcheck: "false" });
  const form = h("form", { class: "stack", onsubmit: (event) => { event.preventDefault(); submit(input.value.trim()); } },
    h("h1", {}, "Sign in"), h("p", { class: "muted" }, "With an API key of this server. It stays in this tab, and is gone when the tab is closed."),
    h("label", {}, "API key", input), problem ? h("p", { class: "problem", role: "alert" }, problem) : null, h("div", { class: "row" }, h("button", { class: "main" }, "Sign in")));
  main.replaceChildren(h("section", { class: "card signin", "aria-label": "Sign in" }, form));
  document.title = "Sign in · tx_async";
  input.focus();
}

function submit(value) {
  if (isKey(value)) { setKey(value); begin(); } else complain("This is not a key: keys have no spaces and no letters beyond ASCII.");
}

document.getElementById("leave").addEventListener("click", () => { setKey(""); signIn(""); });

// ---- light and dark

const dark = window.matchMedia("(prefers-color-scheme: dark)");
function paint() {
  const chosen = localStorage.getItem("tx_async.theme") ?? (dark.matches ? "dark" : "light");
  document.documentElement.dataset.theme = chosen;
  document.getElementById("theme").setAttribute("aria-label", `Change to the ${chosen === "dark" ? "light" : "dark"} theme`);
}
document.getElementById("theme").addEventListener("click", () => {
  localStorage.setItem("tx_async.theme", document.documentElement.dataset.theme === "dark" ? "light" : "dark");
  paint();
});
dark.addEventListener("change", paint);
paint();

document.querySelector(".skip").addEventListener("click", (event) => { event.preventDefault(); main.focus(); });
window.addEventListener("hashchange", () => { if (who && !main.querySelector(".signin")) show(); });
begin();
