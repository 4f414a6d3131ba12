// What the server does now, and what it waits for.

import { Axis, Chart } from "./chart.js";
import { bytes, count, figures, h, keyed, keyName, say, short, table } from "./ui.js";

export function create() {
  const axis = new Axis(clock, [10, 30, 60, 120, 300, 600, 900, 1800]);
  const waits = h("ul", { class: "waits" });
  const readiness = h("p", { class: "muted" });
  const numbers = figures(["Training", "Sampling", "Waiting requests", "Active runs"]);
  const hour = new Chart({ title: "Tokens per second, last hour", axis, fromZero: true, lines: [{ name: "training", class: "train" }, { name: "sampling", class: "sample" }] });
  const shares = deviceTime();
  const workers = h("div", { class: "stack" });
  const queues = table([
    { title: "Key", cell: (queue) => keyName(queue.key), class: "id" },
    { title: "Requests", cell: (queue) => count(queue.requests), numeric: true },
    { title: "Samples", cell: (queue) => count(queue.samples), numeric: true },
  ], "Unfinished requests by key");
  const noQueue = h("p", { class: "empty" }, "Nothing waits.");
  const noWorkers = h("p", { class: "empty" }, "No worker is attached.");
  const server = [
    hour.element,
    h("section", { class: "card half", "aria-labelledby": "share-title" }, h("header", {}, h("h2", { id: "share-title" }, "Device time, last minute")), shares.element),
    h("section", { class: "card half", "aria-labelledby": "workers-title" }, h("header", {}, h("h2", { id: "workers-title" }, "Workers")), noWorkers, workers),
  ];
  const element = h("div", { class: "stack" },
    h("div", { class: "head" }, h("div", {}, h("h1", { tabindex: "-1" }, "Now"), readiness, waits)),
    h("section", { class: "card", "aria-label": "Summary" }, numbers.element),
    h("div", { class: "grid" }, server, h("section", { class: "card", "aria-labelledby": "queue-title" }, h("header", {}, h("h2", { id: "queue-title" }, "Queues by key")), noQueue, queues.element)));

  function update(state) {
    const { ready, hour: rates, runs = {} } = state;
    const active = Object.values(runs).filter((run) => run.state === "running" || run.state === "queued");
    const waiting = (state.queues ?? []).reduce((sum, queue) => sum + queue.requests, 0);
    say(readiness, ready?.is_ready ? "The server is ready: requests run at once." : "Not ready yet. It waits for:");
    if (ready?.operations_to_replay) {
      const again = `${count(ready.operations_lost - ready.operations_to_replay)} of ${count(ready.operations_lost)} operations have run again after a restart.`;
      say(readiness, ready.is_ready ? `Ready; ${again}` : `Not ready yet: ${again} It waits for:`);
    }
    keyed(waits, ready?.waiting_for ?? [], (line) => line, () => h("li"), say);
    numbers.show([rate(rates?.train), rate(rates?.sample), count(waiting), count(active.length)]);
    for (const part of server) part.hidden = !state.workers;
    if (rates) hour.show({ xs: rates.at, ys: rates.train }, { xs: rates.at, ys: rates.sample });
    if (state.shares) shares.show(state.shares);
    keyed(workers, state.workers ?? [], (worker) => worker.worker_id, createWorker, (child, worker) => child.show(worker));
    noWorkers.hidden = Boolean(state.workers?.length);
    const queued = state.queues ?? [];
    queues.show(queued, (queue) => queue.key);
    queues.element.hidden = !queued.length;
    noQueue.hidden = queued.length > 0;
  }
  return { title: "Now", element, update };
}

function clock(at, range = 0) {
  const second = range > 600 ? undefined : "2-digit";
  return new Date(at * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second, hour12: false });
}

function rate(series) {
  const newest = series?.length ? series[series.length - 1] : null;
  return newest === null ? "–" : h("span", {}, short(Math.round(newest)), h("small", {}, " tokens/s"));
}

function deviceTime() {
  const bar = ["train", "sample"].map((kind) => h("span", { class: kind }));
  const texts = ["train", "sample", "idle"].map(() => h("b", {}, "–"));
  const names = ["Training", "Sampling", "Idle"];
  const legend = h("ul", { class: "legend" }, ["train", "sample", "idle"].map((kind, i) => h("li", { class: kind }, h("i"), `${names[i]} `, texts[i])));
  const element = h("div", {}, h("div", { class: "share", "aria-hidden": "true" }, bar), legend);
  function show({ train, sample }) {
    const sum = Math.max(1, train + sample), parts = [train / sum, sample / sum];
    bar.forEach((part, i) => { part.style.width = `${(parts[i] * 100).toFixed(1)}%`; });
    [...parts, Math.max(0, 1 - parts[0] - parts[1])].forEach((part, i) => say(texts[i], `${Math.round(part * 100)} %`));
  }
  return { element, show };
}

function createWorker() {
  const name = h("b"), what = h("span", { class: "muted small" });
  const numbers = figures(["Training slots", "Sampler slots", "Sequences", "Commands"], "plain");
  const memory = h("ul", { class: "legend" });
  const element = h("div", { class: "stack" }, h("div", { class: "row" }, name, what), numbers.element, memory);
  element.show = (worker) => {
    say(name, worker.worker_id);
    const devices = worker.num_devices === 1 ? "one device" : `${worker.num_devices} devices`;
    say(what, `${worker.platform}, ${devices} · ${worker.capabilities.join(", ")}${worker.is_on_trial ? " · on trial" : ""}`);
    numbers.show([`${worker.training_slots} of ${worker.training_slots_max}`, `${worker.sampler_slots} of ${worker.sampler_slots_max}`, `${worker.sequences} of ${worker.sequences_max}`, count(worker.commands_in_flight)]);
    const plan = worker.memory.length ? worker.memory : [["", 0, "This device does not say how much memory it has: there is no plan."]];
    keyed(memory, plan, ([part]) => part, () => h("li"), (item, [part, size, note]) => {
      say(item, part ? `${part}: ${bytes(size)}` : note);
      if (part && note) item.setAttribute("title", note);
    });
  };
  return element;
}
