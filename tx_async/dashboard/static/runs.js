// Every run that the viewer may see, the most recently used first.
// The events tell of the newest as they change; the server is asked for the others, and searches among all.

import { get } from "./api.js";
import { ago, count, h, keyName, pill, say, short, table, time } from "./ui.js";

const SEARCH_MS = 250;

export function create(_argument, { onError }) {
  const search = h("input", { type: "search", placeholder: "id, name, tag, base model or key", oninput: () => { show(); look(); }, autocomplete: "off" });
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
  const older = h("button", { type: "button", class: "slim more", hidden: true, onclick: () => fetchOlder() });
  const element = h("div", { class: "stack" },
    h("div", { class: "head" }, h("h1", { tabindex: "-1" }, "Runs"), h("span", { class: "grow" }), h("label", {}, h("span", { class: "unseen" }, "Find a run"), search)),
    h("section", { class: "card", "aria-label": "Training runs" }, empty, h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Training runs, scrollable" }, runs.element, older)));
  // `told` are the runs of the events; `asked` those that the server was asked for. `answers` has, for each search, how
  // many runs match in all, and how many of them it has sent.
  const asked = new Map(), answers = new Map();
  let told = {}, numRuns = 0, isTold = false, isOver = false, timer = 0;

  const words = () => search.value.toLowerCase().split(/\s+/).filter(Boolean);
  const hasAll = () => numRuns <= Object.keys(told).length;

  function known(wanted) {
    return [...new Map([...asked, ...Object.entries(told)]).values()]
      .filter((run) => { const text = [run.id, run.name, run.base_model, run.key, ...run.tags].join(" ").toLowerCase(); return wanted.every((word) => text.includes(word)); })
      .sort((one, other) => other.used_at - one.used_at || (other.id > one.id ? 1 : -1));
  }

  function show() {
    const wanted = words(), isSearch = wanted.length > 0, found = known(wanted);
    const total = hasAll() ? found.length : isSearch ? answers.get(wanted.join(" "))?.total : numRuns;
    runs.show(found, (run) => run.id);
    runs.element.hidden = !found.length;
    older.hidden = total === undefined || found.length >= total;
    say(older, `Load older runs: ${count(found.length)} of ${count(total)} are here`);
    empty.hidden = found.length > 0;
    if (!isTold) say(empty, "Connecting…");
    else if (isSearch) say(empty, total === undefined ? "Searching…" : "No run matches.");
    else if (!found.length) empty.replaceChildren("No run yet. Point a training loop at this server:", h("br"), h("code", {}, `export TINKER_BASE_URL=${location.origin} TINKER_API_KEY=tml-…`));
  }

  // Searches among all runs, where the events do not tell of all.
  function look() {
    clearTimeout(timer);
    const find = words().join(" ");
    if (find && !hasAll() && !answers.has(find)) timer = setTimeout(() => ask(find, 0), SEARCH_MS);
  }

  async function fetchOlder() {
    const find = words().join(" ");
    older.disabled = true;
    await ask(find, answers.get(find)?.sent ?? Object.keys(told).length);
    older.disabled = false;
  }

  async function ask(find, offset) {
    try {
      const answer = await get(`/dashboard/runs?find=${encodeURIComponent(find)}&offset=${offset}`);
      if (isOver) return;
      for (const run of answer.runs) asked.set(run.id, run);
      answers.set(find, { total: answer.total, sent: offset + answer.runs.length });
      show();
    } catch (error) { if (!isOver) onError(error); }
  }

  function update(state) {
    isTold = state.runs !== undefined;
    const before = told;
    told = state.runs ?? {};
    numRuns = state.num_runs ?? 0;
    // What others have pushed out of the newest is still a run.
    if (!hasAll()) for (const [id, run] of Object.entries(before)) if (!told[id]) asked.set(id, run);
    show();
  }
  return { title: "Runs", element, update, stop() { isOver = true; clearTimeout(timer); } };
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
