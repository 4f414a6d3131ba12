// For an admin: keys and their use, health, the audit log, sessions, settings and versions.

import { get } from "./api.js";
import { bytes, count, h, keyed, keyName, pill, say, scrolled, table, when } from "./ui.js";

const READ_MS = 10_000;

export function create(_argument, { onError, who }) {
  if (who.role !== "admin") return { title: "Operator", element: closed(), update() {} };
  const health = h("dl", { class: "figures plain wide" });
  const keys = table([
    { title: "Key", class: "id", cell: (item) => item.name || keyName(item.owner) },
    { title: "Role", cell: (item) => item.role || "no registered key" },
    { title: "Expires", cell: (item) => (item.expires_at ? when(item.expires_at) : "never") },
    { title: "Sessions", cell: (item) => count(item.sessions), numeric: true },
    { title: "Runs", cell: (item) => count(item.runs), numeric: true },
    { title: "Checkpoints", cell: (item) => bytes(item.bytes), numeric: true },
    { title: "Queued", cell: (item) => `${count(item.requests)} requests, ${count(item.samples)} samples`, numeric: true },
  ], "Keys and their use", Infinity, "Nobody has used this server yet.");
  const audit = table([
    { title: "Time", cell: (item) => when(item.at) },
    { title: "By", cell: (item) => keyName(item.by) },
    { title: "Event", cell: (item) => item.event },
    { title: "What", class: "id", cell: (item) => item.subject },
    { title: "Details", cell: (item) => Object.entries(item.details).map(([name, value]) => `${name} ${value}`).join(", ") },
  ], "Audit log, newest first", 15, "No event yet.");
  const sessions = table([
    { title: "Session", class: "id", cell: (item) => item.id },
    { title: "Key", cell: (item) => keyName(item.key) },
    { title: "Begun", cell: (item) => when(item.created_at) },
    { title: "Runs", cell: (item) => count(item.runs), numeric: true },
    { title: "Name and tags", cell: (item) => [item.name, ...item.tags].filter(Boolean).join(", ") || "–" },
    { title: "SDK", cell: (item) => item.sdk || "–" },
    { title: "Status", cell: (item, cell) => (cell.shown === item.status ? undefined : ((cell.shown = item.status), pill(item.status))) },
  ], "Sessions, newest first", 10, "No session yet.");
  const settings = table([
    { title: "Setting", class: "id", cell: (item) => item.name },
    { title: "Value", class: "id", cell: (item) => shown(item.value) },
    { title: "From", cell: (item) => (item.is_default ? "default" : "set") },
  ], "Settings as resolved", Infinity, "Every setting has its default.");
  const onlySet = h("input", { type: "checkbox", checked: true, onchange: () => showSettings() });
  const place = h("dl", { class: "figures plain" });
  const section = (title, body, more = null) => {
    const name = `op-${title.toLowerCase().replaceAll(" ", "-")}`;
    return h("section", { class: "card", "aria-labelledby": name }, h("header", {}, h("h2", { id: name }, title), more), body);
  };
  const element = h("div", { class: "stack" },
    h("div", { class: "head" }, h("div", {}, h("h1", { tabindex: "-1" }, "Operator"), h("p", { class: "muted" }, "Read anew every ten seconds."))),
    section("Health", health), section("Keys", scrolled(keys.element, "Keys, scrollable")), section("Sessions", scrolled(sessions.element, "Sessions, scrollable")),
    section("Audit log", scrolled(audit.element, "Audit log, scrollable")),
    section("Settings", scrolled(settings.element, "Settings, scrollable"), h("label", { class: "check" }, onlySet, "only what is set")),
    section("Versions", place));
  let all = [], isOver = false;

  function showSettings() {
    settings.show(all.filter((item) => !onlySet.checked || !item.is_default), (item) => item.name);
  }

  async function read() {
    try {
      const report = await get("/dashboard/operator");
      if (isOver) return;
      showPairs(health, Object.entries(report.health), ([, finding]) => h("span", {}, pill(finding.state), " ", h("span", { class: "small" }, finding.text)));
      showPairs(place, Object.entries(report.versions), ([, version]) => h("span", {}, version));
      keys.show(report.keys, (item) => item.owner);
      audit.show(report.audit, (item) => `${item.at} ${item.event} ${item.subject}`);
      sessions.show(report.sessions, (item) => item.id);
      all = report.settings;
      showSettings();
    } catch (error) { if (!isOver) onError(error); }
  }
  read();
  const timer = setInterval(read, READ_MS);
  return { title: "Operator", element, update() {}, stop() { isOver = true; clearInterval(timer); } };
}

// Instead of tables that the server would refuse to fill.
function closed() {
  return h("div", { class: "stack" },
    h("div", { class: "head" }, h("h1", { tabindex: "-1" }, "Operator")),
    h("p", { class: "card" }, "This part needs an admin's key. Sign out, then sign in with one; the operator of this server makes it with ",
      h("code", {}, "tx-async keys add NAME --role admin"), "."));
}

function showPairs(list, entries, body) {
  keyed(list, entries, ([name]) => name, ([name]) => h("div", {}, h("dt", {}, name), h("dd")), (child, entry) => {
    const text = JSON.stringify(entry);
    if (child.shown !== text) { child.shown = text; child.lastChild.replaceChildren(body(entry)); }
  });
}

function shown(value) {
  if (value === "" || value === null) return "–";
  return typeof value === "object" ? JSON.stringify(value) : String(value);
}
