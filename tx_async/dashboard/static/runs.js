// Every run that the viewer may see, the most recently used first.

import { ago, count, h, keyName, pill, say, short, table, time } from "./ui.js";

export function create() {
  const search = h("input", { type: "search", placeholder: "id, name, tag, base model or key", oninput: () => show(), autocomplete: "off" });
  const empty = h("p", { class: "empty" });
  const runs = table([
    { title: "Run", class: "id", cell: (run, cell) => cell.firstChild ?? h("a", { href: `#/runs/${encodeURIComponent(run.id)}` }, run.id) },
    { title: "Name", cell: (run, cell) => labels(run, cell) },
    { title: "Base", cell: (run) => run.base_model.split("/").pop() },
    { title: "Rank", cell: (run) => run.rank, numeric: true },
    { title: "Steps", cell: (run) => count(run.steps), numeric: true },
    { title: "Loss", cell: (run) => short(run.loss), numeric: true },
    { title: "State", cell: (run, cell) => (cell.shown === run.state ? undefined : ((cell.shown = run.state), pill(run.state))) },
    { title: "Last used", cell: (run, cell) => lastUsed(run, cell) },
  ], "Training runs", 50);
  const element = h("div", { class: "stack" },
    h("div", { class: "head" }, h("h1", { tabindex: "-1" }, "Runs"), h("span", { class: "grow" }), h("label", {}, h("span", { class: "unseen" }, "Find a run"), search)),
    h("section", { class: "card", "aria-label": "Training runs" }, empty, h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Training runs, scrollable" }, runs.element)));
  let known = [], isTold = false;

  function show() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const found = known.filter((run) => { const text = [run.id, run.name, run.base_model, run.key, ...run.tags].join(" ").toLowerCase(); return words.every((word) => text.includes(word)); });
    runs.show(found, (run) => run.id);
    runs.element.hidden = !found.length;
    empty.hidden = found.length > 0;
    if (!isTold) say(empty, "Connecting…");
    else if (known.length) say(empty, "No run matches.");
    else empty.replaceChildren("No run yet. Point a training loop at this server:", h("br"), h("code", {}, `export TINKER_BASE_URL=${location.origin} TINKER_API_KEY=tml-…`));
  }

  function update(state) {
    isTold = state.runs !== undefined;
    known = Object.values(state.runs ?? {}).sort((one, other) => other.used_at - one.used_at);
    show();
  }
  return { title: "Runs", element, update };
}

function labels(run, cell) {
  const wanted = JSON.stringify([run.name, run.tags, run.key]);
  if (cell.shown === wanted) return undefined;
  cell.shown = wanted;
  return h("span", {}, run.name || h("span", { class: "muted", title: run.key }, keyName(run.key)), run.tags.length ? h("br") : null, run.tags.map((tag) => h("span", { class: "tag" }, tag)));
}

function lastUsed(run, cell) {
  if (!cell.firstChild || cell.used !== run.used_at) { cell.used = run.used_at; return time(run.used_at); }
  say(cell.firstChild, ago(run.used_at));
  return undefined;
}
