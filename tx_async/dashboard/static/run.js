// One run: its curves, checkpoints and requests.

import { get, post, Refused } from "./api.js";
import { Axis, Chart, smooth } from "./chart.js";
import { ago, ask, bytes, count, figures, h, keyName, pill, say, scrolled, span, table, tell, time, took, when } from "./ui.js";

const READ_S = 2.5;

export function create(id, { onError }) {
  const axis = new Axis((step) => `step ${count(step)}`, [1, 2, 5]);
  const curves = [
    { title: "Loss per token", of: meanLoss, smooth: true },
    { title: "Learning rate", of: (row) => row.learning_rate },
    { title: "Gradient norm", of: (row) => row.grad_norm, fromZero: true },
    { title: "Tokens per second", of: speed, fromZero: true },
    { title: "Rollout–trainer gap (KL, nats)", of: (row) => row["kl_sample_train:mean"], mayLack: true },
    { title: "Trained tokens per step", of: (row) => row.tokens, fromZero: true },
  ].map((curve) => ({ ...curve, chart: new Chart({ title: curve.title, axis, fromZero: curve.fromZero, lines: curve.smooth ? [{ class: "faint", quiet: true }, {}] : [{}] }) }));
  const state = h("span"), name = h("p", { class: "muted" });
  const facts = figures(["Base model", "Rank", "Optimizer steps", "Created", "Last used", "Session", "Began from"], "plain wide");
  const checkpoints = table([
    { title: "Checkpoint", class: "id", cell: (item) => item.path.replace(`tinker://${id}/`, "") },
    { title: "Size", cell: (item) => bytes(item.size_bytes), numeric: true },
    { title: "Saved", cell: (item) => ago(item.created_at) },
    { title: "Time to live", cell: (item) => (item.expires_at ? span(item.expires_at - Date.now() / 1000) : "for ever") },
    { title: "Visible to", cell: (item) => (item.public ? "everybody" : "its key") },
    { title: "Actions", cell: (item, cell) => actions(item, cell) },
  ], "Checkpoints of this run", 20);
  const noCheckpoints = h("p", { class: "empty" }, "No checkpoint was saved yet.");
  const requests = table([
    { title: "No.", cell: (item) => item.seq_id, numeric: true },
    { title: "Request", class: "id", cell: (item) => item.request_id },
    { title: "What", cell: (item) => item.kind.replace(/(?<=[a-z])[A-Z]/g, "_$&").toLowerCase() },
    { title: "Stations", cell: (item, cell) => stations(item, cell) },
    { title: "Accepted", cell: (item) => when(item.accepted_at) },
    { title: "Queued", cell: (item, cell) => after(item, item.queued_at, cell), numeric: true },
    { title: "Sent", cell: (item, cell) => after(item, item.sent_at, cell), numeric: true },
    { title: "Finished", cell: (item, cell) => after(item, item.finished_at, cell), numeric: true },
  ], "Newest requests of this run", 12, "None that the server still remembers.");
  const csv = h("button", { type: "button", onclick: () => save() }, "Download CSV");
  const element = h("div", { class: "stack" },
    h("div", { class: "head" }, h("div", {}, h("h1", { class: "mono", tabindex: "-1" }, id), name), h("span", { class: "grow" }), state, csv),
    h("section", { class: "card", "aria-label": "About this run" }, facts.element),
    h("div", { class: "charts" }, curves.map((curve) => curve.chart.element)),
    h("section", { class: "card", "aria-labelledby": "checkpoints-title" }, h("header", {}, h("h2", { id: "checkpoints-title" }, "Checkpoints")), noCheckpoints, scrolled(checkpoints.element, "Checkpoints, scrollable")),
    h("section", { class: "card", "aria-labelledby": "requests-title" }, h("header", {}, h("h2", { id: "requests-title" }, "Newest requests"), h("span", { class: "muted small" }, "accepted → queued → sent → finished; times after the first")), scrolled(requests.element, "Requests, scrollable")));
  let rows = [], shown = null, readAt = 0, isReading = false, isOver = false, timer = 0, readS = READ_S;

  async function read(force = false) {
    if (isOver || isReading || (!force && Date.now() - readAt < readS * 1000)) return;
    isReading = true;
    try {
      const since = rows.length ? rows[rows.length - 1].index + 1 : 0;
      const answer = await get(`/dashboard/runs/${encodeURIComponent(id)}?since=${since}`);
      if (isOver) return;
      rows.push(...answer.steps);
      readAt = Date.now();
      show(answer, answer.steps.length > 0 || since === 0);
    } catch (error) {
      if (isOver) return;
      if (error instanceof Refused && error.status === 404 && !readAt) showMissing(error.message);
      else onError(error);
    } finally {
      isReading = false;
    }
  }

  function show({ run, checkpoints: saved, requests: asked }, isNew) {
    state.replaceChildren(pill(run.state));
    say(name, [run.name, keyName(run.key), ...run.tags].filter(Boolean).join(" · "));
    facts.show([run.base_model, run.rank, count(run.steps), when(run.created_at), time(run.used_at), run.session, run.created_from ?? "a fresh adapter"]);
    if (isNew) for (const curve of curves) showCurve(curve);
    checkpoints.show(saved, (item) => item.path + item.created_at + item.public + item.expires_at);
    checkpoints.element.hidden = !saved.length;
    noCheckpoints.hidden = saved.length > 0;
    requests.show(asked, (item) => item.request_id);
  }

  function showMissing(problem) {
    isOver = true;
    element.replaceChildren(
      h("div", { class: "head" }, h("h1", { class: "mono", tabindex: "-1" }, id)),
      h("p", { class: "card" }, problem, " ", h("a", { href: "#/runs" }, "All runs")));
  }

  function showCurve({ of, chart, smooth: isSmoothed, mayLack }) {
    const known = rows.map((row) => [row.index + 1, of(row)]).filter(([, value]) => value !== undefined && value !== null);
    const xs = known.map(([x]) => x), ys = known.map(([, y]) => y);
    if (isSmoothed) chart.show({ xs, ys }, { xs, ys: ys.length > 20 ? smooth(ys) : ys });
    else chart.show({ xs, ys });
    chart.element.hidden = Boolean(mayLack) && !xs.length;
  }

  function actions(item, cell) {
    if (cell.firstChild) return undefined;
    const act = (title, run, kind = "") => h("button", { type: "button", class: `slim ${kind}`, "aria-label": `${title}: ${item.kind}/${item.name}`, onclick: run }, title);
    return h("div", { class: "row" },
      act("Download", () => download(item)),
      act(item.public ? "Unpublish" : "Publish", () => publish(item)),
      act("Time to live", () => limit(item)),
      act("Delete", () => remove(item), "danger"));
  }

  async function change(body, done) {
    try {
      await post("/dashboard/checkpoints", body);
      tell(done);
      await read(true);
    } catch (error) { onError(error); }
  }
  async function publish(item) {
    const [title, text, action] = item.public
      ? ["Unpublish this checkpoint?", "Only its own key can read it then.", "unpublish"]
      : ["Publish this checkpoint?", "Everybody with a key of this server can read and sample it then.", "publish"];
    if (await ask({ title, text: `${item.path}. ${text}`, confirm: item.public ? "Unpublish" : "Publish" })) await change({ path: item.path, action }, `${title.split(" ")[0]}ed.`);
  }
  async function limit(item) {
    const answer = await ask({ title: "Set time to live", text: `${item.path} is deleted when the time is over. Leave it empty to keep the checkpoint for ever.`, confirm: "Set", fields: [{ name: "hours", label: "Hours from now", type: "number", min: 1 }] });
    if (answer) await change({ path: item.path, action: "ttl", ttl_seconds: answer.hours ? Math.round(Number(answer.hours) * 3600) : null }, "The time to live is set.");
  }
  async function remove(item) {
    if (await ask({ title: "Delete this checkpoint?", text: `${item.path}, ${bytes(item.size_bytes)}. Its files are gone for good.`, confirm: "Delete", danger: true })) await change({ path: item.path, action: "delete" }, "The checkpoint is deleted.");
  }
  async function download(item) {
    try {
      const { url } = await (await post("/dashboard/downloads", { path: item.path })).json();
      h("a", { href: new URL(url).pathname, download: `${item.name}.tar` }).click();
    } catch (error) { onError(error); }
  }
  function save() {
    const columns = [...new Set(rows.flatMap((row) => Object.keys(row)))];
    const lines = [columns, ...rows.map((row) => columns.map((column) => row[column] ?? ""))];
    const url = URL.createObjectURL(new Blob([`${lines.map((line) => line.join(",")).join("\n")}\n`], { type: "text/csv" }));
    h("a", { href: url, download: `${id.replaceAll(":", "-")}.csv` }).click();
    setTimeout(() => URL.revokeObjectURL(url), 10_000);
  }

  function update(all) {
    readS = all.read_every_s ?? READ_S;
    const run = all.runs?.[id], wanted = JSON.stringify([run?.steps, run?.state, run?.used_at]);
    if (wanted === shown) return;
    shown = wanted;
    clearTimeout(timer);
    timer = setTimeout(() => read(true), Math.max(0, readS * 1000 - (Date.now() - readAt)));
  }
  read(true);
  return { title: id, element, update, stop: () => { isOver = true; clearTimeout(timer); } };
}

function meanLoss(row) {
  const number = row["weights:sum"] ?? row.tokens;
  return number && row["loss:sum"] !== undefined ? row["loss:sum"] / number : undefined;
}

function speed(row) {
  const seconds = row.finished_at - row.started_at;
  return row.tokens && seconds > 0 ? row.tokens / seconds : undefined;
}

// How long after it was accepted a request got somewhere; the time of day is its title.
function after(item, at, cell) {
  const text = at ? `+${took(Math.max(0, at - item.accepted_at))}` : "–";
  if (cell.textContent === text) return undefined;
  return at ? h("time", { title: when(at), datetime: new Date(at * 1000).toISOString() }, text) : h("span", {}, text);
}

const STATIONS = ["accepted", "queued", "sent", "finished"];

function stations(item, cell) {
  if (cell.shown === item.station) return undefined;
  cell.shown = item.station;
  const at = item.station === "failed" ? 3 : STATIONS.indexOf(item.station);
  const marks = h("span", { class: `stations ${item.station}`, "aria-hidden": "true" }, STATIONS.map((station, i) => h("i", { class: i <= at ? "done" : null })));
  return h("span", {}, marks, " ", item.station);
}
