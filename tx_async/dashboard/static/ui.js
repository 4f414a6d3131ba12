// Elements are made of text and attributes only: nothing that comes from the server is ever read as markup.

const SVG = "http://www.w3.org/2000/svg";

export function h(name, props = {}, ...children) {
  return fill(document.createElement(name), props, children);
}

export function s(name, props = {}, ...children) {
  return fill(document.createElementNS(SVG, name), props, children);
}

function fill(element, props, children) {
  for (const [key, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (key === "value") element.value = value;
    else element.setAttribute(key, value === true ? "" : String(value));
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

// Sets text only when it is another, so that nothing flickers, and nothing is read aloud twice.
export function say(element, text) {
  const wanted = String(text);
  if (element.textContent !== wanted) element.textContent = wanted;
}

// Children by key: what stays is kept as it is, with its focus; `update(child, item)` brings it up to date.
export function keyed(parent, items, keyOf, create, update) {
  const known = parent.known ?? (parent.known = new Map());
  const wanted = new Set(items.map(keyOf));
  for (const [key, child] of known) if (!wanted.has(key)) { child.remove(); known.delete(key); }
  let before = parent.firstElementChild;
  for (const item of items) {
    const key = keyOf(item);
    let child = known.get(key);
    if (!child) known.set(key, (child = create(item)));
    update(child, item);
    if (child === before) before = before.nextElementSibling;
    else parent.insertBefore(child, before);
  }
}

// limit: rows that are shown before somebody asks for more.
export function table(columns, caption, limit = Infinity, none = "") {
  const body = h("tbody");
  const head = h("tr", {}, columns.map((column) => h("th", { scope: "col", class: column.numeric ? "num" : null }, column.title)));
  const element = h("table", { class: "stacked" }, h("caption", { class: "unseen" }, caption), h("thead", {}, head), body);
  const create = () => h("tr", {}, columns.map((column) => h("td", { class: column.class ?? (column.numeric ? "num" : null), "data-label": column.title })));
  const update = (row, item) => columns.forEach((column, i) => {
    const cell = row.children[i], value = column.cell(item, cell);
    if (value instanceof Node) { if (cell.firstChild !== value) cell.replaceChildren(value); } else if (value !== undefined) say(cell, value);
  });
  const more = h("button", { type: "button", class: "slim more", onclick: () => { shown = Infinity; again(); } });
  let shown = limit, again = () => {};
  const empty = h("p", { class: "muted small", hidden: true }, none);
  const place = h("div", {}, element, empty, more);
  const show = (items, keyOf) => {
    again = () => show(items, keyOf);
    keyed(body, items.slice(0, shown), keyOf, create, update);
    more.hidden = items.length <= shown;
    element.hidden = !items.length;
    empty.hidden = Boolean(items.length) || !none;
    say(more, `Show all ${items.length}`);
  };
  return { element: place, show };
}

export const scrolled = (element, label) => h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": label }, element);

export function figures(names, kind = "") {
  const places = names.map(() => h("dd", {}, "–"));
  const element = h("dl", { class: `figures ${kind}` }, names.map((name, i) => h("div", {}, h("dt", {}, name), places[i])));
  return { element, show: (values) => values.forEach((value, i) => (value instanceof Node ? places[i].replaceChildren(value) : say(places[i], value))) };
}

// ---- numbers and times

export const count = (value) => (value ?? 0).toLocaleString("en", { maximumFractionDigits: 0 });

export function short(value) {
  if (value === undefined || value === null || Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2);
  return String(Number(value.toPrecision(4)));
}

export function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0, size = value ?? 0;
  while (size >= 1024 && unit < units.length - 1) { size /= 1024; unit += 1; }
  return `${size >= 100 || unit === 0 ? Math.round(size) : size.toFixed(1)} ${units[unit]}`;
}

export function ago(seconds, now = Date.now() / 1000) {
  if (!seconds) return "–";
  const gone = now - seconds;
  if (gone < 5) return "just now";
  return `${span(gone)} ago`;
}

export function span(seconds) {
  const steps = [[86400 * 2, 86400, "d"], [7200, 3600, "h"], [120, 60, "min"], [0, 1, "s"]];
  const [, unit, name] = steps.find(([least]) => seconds >= least) ?? steps[3];
  return `${Math.max(0, Math.floor(seconds / unit))} ${name}`;
}

const DATE = { year: "numeric", month: "short", day: "numeric", hour: "2-digit", minute: "2-digit", second: "2-digit", hour12: false };

export const when = (seconds) => (seconds ? new Date(seconds * 1000).toLocaleString([], DATE) : "–");

export const took = (seconds) => (seconds < 1 ? `${Math.round(seconds * 1000)} ms` : `${short(seconds)} s`);

// Without a registered name a key is known by a hash, of which some digits will do.
export const keyName = (key) => (key.startsWith("owner-") ? key.slice(0, 14) : key);

export function time(seconds) {
  const element = h("time", { title: when(seconds), datetime: seconds ? new Date(seconds * 1000).toISOString() : null });
  say(element, ago(seconds));
  return element;
}

const KINDS = {
  running: "info", queued: "warn", sent: "info", idle: "", finished: "good", failed: "bad", unloaded: "", corrupted: "bad",
  copy: "", ok: "good", warning: "warn", problem: "bad", active: "good", success: "good", errored: "bad",
};

export function pill(text) {
  return h("span", { class: `pill ${KINDS[text] ?? ""}` }, text);
}

// ---- dialogs of the page's own

// Asks in the page. Resolves to null when it was left, else to what the fields hold.
export function ask({ title, text, fields = [], confirm, danger = false }) {
  return new Promise((resolve) => {
    const inputs = fields.map((field) => h("input", { name: field.name, type: field.type ?? "text", value: field.value ?? "", min: field.min, required: field.required, autocomplete: "off" }));
    const form = h("form", { method: "dialog" },
      h("h2", { id: "ask-title" }, title), h("p", { class: "muted", id: "ask-text" }, text),
      fields.map((field, i) => h("label", {}, field.label, inputs[i])),
      h("div", { class: "row" },
        h("button", { type: "button", onclick: () => dialog.close("") }, "Cancel"),
        h("button", { class: danger ? "main danger" : "main", value: "yes" }, confirm)));
    const dialog = h("dialog", { "aria-labelledby": "ask-title", "aria-describedby": "ask-text" }, form);
    dialog.addEventListener("close", () => {
      const answer = dialog.returnValue === "yes" ? Object.fromEntries(inputs.map((input) => [input.name, input.value])) : null;
      dialog.remove();
      resolve(answer);
    });
    document.body.append(dialog);
    dialog.showModal();
  });
}

export function tell(text) {
  say(document.getElementById("news"), text);
}
