// Curves that one can zoom and read values off, by pointer, touch or keyboard. Charts of one Axis move together.

import { h, s, say, short } from "./ui.js";

const WIDTH = 640, HEIGHT = 190, LEFT = 52, RIGHT = 10, TOP = 8, BOTTOM = 22;

export class Axis {
  // steps: sizes between ticks, ascending; beyond the last one 1, 2 and 5 times powers of ten.
  constructor(format, steps) {
    this.format = format;
    this.steps = steps;
    this.charts = new Set();
    this.zoom = null;
    this.cursor = null;
  }
  set(change) {
    Object.assign(this, change);
    for (const chart of this.charts) chart.draw();
  }
  // All that there is, of every chart.
  get full() {
    const ends = [...this.charts].flatMap((chart) => chart.lines.flatMap(({ xs }) => (xs.length ? [xs[0], xs[xs.length - 1]] : [])));
    if (!ends.length) return [0, 1];
    const [low, high] = [Math.min(...ends), Math.max(...ends)];
    return low === high ? [low - 0.5, high + 0.5] : [low, high];
  }
  get shown() {
    return this.zoom ?? this.full;
  }
  zoomBy(factor) {
    const [low, high] = this.shown, middle = this.cursor ?? (low + high) / 2, [first, last] = this.full;
    const wanted = [Math.max(first, middle - (middle - low) * factor), Math.min(last, middle + (high - middle) * factor)];
    this.set({ zoom: factor > 1 && wanted[0] <= first && wanted[1] >= last ? null : wanted });
  }
}

export class Chart {
  // lines: [{name, class}] — their numbers come with `show`.
  constructor({ title, axis, lines, format = short, fromZero = false, hint = "" }) {
    this.axis = axis;
    this.format = format;
    this.fromZero = fromZero;
    this.lines = lines.map((line) => ({ ...line, xs: [], ys: [] }));
    this.title = title;
    this.read = h("output", {});
    this.svg = s("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", "aria-hidden": "true" });
    this.plot = h("div", {
      class: "plot", tabindex: "0", role: "application", "aria-roledescription": "chart",
      "aria-label": `${title}. Arrow keys read values, plus and minus zoom, 0 shows all.`,
      onkeydown: (event) => this.onKey(event), onpointermove: (event) => this.onMove(event), onpointerdown: (event) => this.onDown(event),
      onpointerup: () => this.onUp(), onpointerleave: () => { if (!this.drag) axis.set({ cursor: null }); }, ondblclick: () => axis.set({ zoom: null }),
      onwheel: (event) => { if (event.ctrlKey || event.shiftKey) { event.preventDefault(); axis.zoomBy(event.deltaY + event.deltaX > 0 ? 1.25 : 0.8); } },
    }, this.svg);
    this.reset = h("button", { hidden: true, type: "button", class: "quiet slim", onclick: () => axis.set({ zoom: null }) }, "Show all");
    this.element = h("section", { class: "card chart", "aria-label": title }, h("header", {}, h("h2", {}, title), hint ? h("span", { class: "muted small" }, hint) : null, h("span", { class: "grow" }), this.reset), this.plot, this.read);
    axis.charts.add(this);
    new ResizeObserver(() => this.draw()).observe(this.plot);
  }

  show(...numbers) {
    this.lines.forEach((line, i) => Object.assign(line, numbers[i] ?? { xs: [], ys: [] }));
    this.draw();
  }

  get isEmpty() { return this.lines.every(({ xs }) => !xs.length); }

  // ---- what pointers and keys do

  xAt(event) {
    const box = this.plot.getBoundingClientRect(), [low, high] = this.axis.shown;
    const { left } = this, inner = this.width - left - RIGHT;
    return low + (Math.min(inner, Math.max(0, event.clientX - box.left - left)) / inner) * (high - low);
  }
  onMove(event) {
    const x = this.xAt(event);
    if (this.drag) this.drag.to = x;
    this.axis.set({ cursor: this.nearest(x) });
  }
  onDown(event) {
    if (event.button !== 0) return;
    this.plot.setPointerCapture(event.pointerId);
    const x = this.xAt(event);
    this.drag = { from: x, to: x };
  }
  onUp() {
    const { drag } = this;
    this.drag = null;
    if (!drag) return;
    const [low, high] = this.axis.shown, picked = [drag.from, drag.to].sort((a, b) => a - b);
    if (picked[1] - picked[0] > (high - low) * 0.02) this.axis.set({ zoom: picked });
    else this.draw();
  }
  onKey(event) {
    const moves = { ArrowLeft: -1, ArrowRight: 1, PageUp: 10, PageDown: -10 };
    if (event.key in moves) this.step(moves[event.key]);
    else if (event.key === "+" || event.key === "=") this.axis.zoomBy(0.6);
    else if (event.key === "-") this.axis.zoomBy(1 / 0.6);
    else if (event.key === "0" || event.key === "Escape") this.axis.set({ zoom: null });
    else if (event.key === "Home" || event.key === "End") this.axis.set({ cursor: this.axis.shown[event.key === "Home" ? 0 : 1] });
    else return;
    event.preventDefault();
  }
  step(by) {
    const [low, high] = this.axis.shown, { xs } = this.longest(), seen = xs.filter((x) => x >= low && x <= high);
    if (!seen.length) return;
    const at = this.axis.cursor === null ? (by > 0 ? -1 : seen.length) : seen.indexOf(this.nearest(this.axis.cursor));
    this.axis.set({ cursor: seen[Math.min(seen.length - 1, Math.max(0, at + by))] });
  }
  longest() { return this.lines.reduce((best, line) => (line.xs.length > best.xs.length ? line : best)); }
  nearest(x) {
    const { xs } = this.longest();
    if (!xs.length) return x;
    const after = xs.findIndex((other) => other >= x);
    if (after <= 0) return xs[after === 0 ? 0 : xs.length - 1];
    return x - xs[after - 1] < xs[after] - x ? xs[after - 1] : xs[after];
  }

  // ---- drawing

  draw() {
    this.width = Math.max(200, this.plot.clientWidth || WIDTH);
    const { width } = this, [low, high] = this.axis.shown;
    const left = (this.left = LEFT);
    this.svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    const inner = width - left - RIGHT, tall = HEIGHT - TOP - BOTTOM;
    const seen = this.lines.map((line) => visible(line, low, high));
    const [bottom, top] = range(seen.flatMap(({ ys }) => ys), this.fromZero);
    const x = (value) => left + ((value - low) / (high - low)) * inner;
    const y = (value) => TOP + (1 - (value - bottom) / (top - bottom)) * tall;
    const parts = [];
    for (const tick of ticks(bottom, top, 4)) {
      parts.push(s("line", { class: "gridline", x1: left, x2: width - RIGHT, y1: y(tick), y2: y(tick) }));
      parts.push(s("text", { class: "tick", x: left - 7, y: y(tick) + 4, "text-anchor": "end" }, this.format(tick)));
    }
    for (const tick of ticks(low, high, Math.max(2, Math.floor(width / 130)), this.axis.steps)) {
      parts.push(s("text", { class: "tick", x: x(tick), y: HEIGHT - 4, "text-anchor": x(tick) > width - 40 ? "end" : "middle" }, this.axis.format(tick, high - low)));
    }
    seen.forEach(({ xs, ys }, i) => { if (xs.length) parts.push(s("path", { class: `curve ${this.lines[i].class ?? ""}`, d: path(xs, ys, x, y) })); });
    if (this.drag) {
      const [a, b] = [x(this.drag.from), x(this.drag.to)].sort((one, other) => one - other);
      parts.push(s("rect", { class: "picked", x: a, y: TOP, width: b - a, height: tall }));
    }
    parts.push(...this.drawCursor(x, y, tall));
    this.svg.replaceChildren(...parts);
    this.reset.hidden = !this.axis.zoom;
  }

  drawCursor(x, y, tall) {
    const at = this.axis.cursor;
    if (at === null || this.isEmpty) { this.sayNewest(); return []; }
    const parts = [s("line", { class: "rule", x1: x(at), x2: x(at), y1: TOP, y2: TOP + tall })], read = [];
    for (const line of this.lines) {
      if (line.quiet || !line.xs.length) continue;
      const i = indexOf(line.xs, at);
      parts.push(s("circle", { class: `dot ${line.class ?? ""}`, cx: x(line.xs[i]), cy: y(line.ys[i]), r: 4 }));
      read.push(`${line.name ? `${line.name} ` : ""}${this.format(line.ys[i])}`);
    }
    say(this.read, `${this.axis.format(at)}: ${read.join(" · ")}`);
    return parts;
  }

  sayNewest() {
    const read = this.lines.filter((line) => !line.quiet && line.xs.length).map((line) => `${line.name ? `${line.name} ` : ""}${this.format(line.ys[line.ys.length - 1])}`);
    say(this.read, read.length ? `newest: ${read.join(" · ")}` : "nothing yet");
  }
}

// One point beyond each end, so that the curve reaches the edges.
function visible({ xs, ys }, low, high) {
  let first = xs.findIndex((x) => x >= low), last = xs.length - 1;
  if (first < 0) return { xs: [], ys: [] };
  while (last > first && xs[last] > high) last -= 1;
  return { xs: xs.slice(first, last + 1), ys: ys.slice(first, last + 1) };
}

function path(xs, ys, x, y) {
  if (xs.length === 1) return `M${x(xs[0]) - 2},${y(ys[0])}h4`;
  return xs.map((value, i) => `${i ? "L" : "M"}${x(value).toFixed(1)},${y(ys[i]).toFixed(1)}`).join("");
}

function indexOf(xs, at) {
  let best = 0;
  xs.forEach((x, i) => { if (Math.abs(x - at) < Math.abs(xs[best] - at)) best = i; });
  return best;
}

function range(ys, fromZero) {
  let low = Infinity, high = -Infinity;
  for (const y of ys) { if (y < low) low = y; if (y > high) high = y; }
  if (low === Infinity) return [0, 1];
  if (fromZero) low = Math.min(0, low);
  if (low === high) { const pad = Math.abs(low) * 0.1 || 1; return [fromZero ? low : low - pad, high + pad]; }
  const pad = (high - low) * 0.06;
  return [fromZero && low === 0 ? 0 : low - pad, high + pad];
}

function ticks(low, high, number, steps = []) {
  const rough = (high - low) / number, unit = 10 ** Math.floor(Math.log10(rough));
  const step = steps.find((size) => size >= rough) ?? [1, 2, 5, 10].map((factor) => factor * unit).find((size) => size >= rough) ?? rough;
  const found = [];
  for (let tick = Math.ceil(low / step) * step; tick <= high + step * 1e-9; tick += step) found.push(Math.abs(tick) < step * 1e-9 ? 0 : tick);
  return found;
}

// A curve without its noise: what a person's eye would draw.
export function smooth(ys, weight = 0.85) {
  let mean = 0, sum = 0;
  return ys.map((y) => { mean = mean * weight + y * (1 - weight); sum = sum * weight + (1 - weight); return mean / sum; });
}
