// Talk to a checkpoint, beside the base model, and look at how sure it was of each token.

import { events, get, post, Refused } from "./api.js";
import { h, say, short, tell } from "./ui.js";

const kept = { mode: "completion", model: "", prompt: "", system: "", compare: false, max_tokens: "128", temperature: "0.7", top_p: "1", seed: "" };

// A token that is no text of its own, such as a part of a character, is named by its bytes.
const BYTES = /^bytes:((?:\\x[0-9a-f]{2})+)$/;

const bytesOf = (text) => BYTES.exec(text)?.[1].match(/[0-9a-f]{2}/g).map((byte) => parseInt(byte, 16));

// What the bytes say; "" where more must follow, null where they can be no text.
function textOf(bytes) {
  const decoder = new TextDecoder("utf-8", { fatal: true });
  try {
    const begun = decoder.decode(new Uint8Array(bytes), { stream: true });
    try { return begun + decoder.decode(); } catch { return ""; }
  } catch { return null; }
}

// Puts characters that came in several tokens together: the first one shows them, the others nothing.
function joiner() {
  let bytes = [], places = [];
  return (text, place) => {
    const more = bytesOf(text);
    if (!more) { bytes = []; places = []; return text; }
    if (textOf([...bytes, ...more]) === null) { bytes = []; places = []; }
    bytes.push(...more);
    places.push(place);
    const whole = textOf(bytes);
    if (whole === "") return "�";
    const [first, ...others] = places;
    bytes = [];
    places = [];
    if (whole === null) return "�";
    for (const other of others) if (other !== place) say(other, "");
    if (first === place) return whole;
    say(first, whole);
    return "";
  };
}

const quoted = (text) => (BYTES.test(text) ? text : JSON.stringify(text));

export function create(_argument, { onError }) {
  const field = (name, label, props = {}) => h("label", {}, label, h("input", { name, value: kept[name], oninput: (event) => { kept[name] = event.target.value; }, ...props }));
  const model = h("select", { name: "model", onchange: () => { kept.model = model.value; } });
  const mode = h("select", { name: "mode", onchange: () => { kept.mode = mode.value; arrange(); } }, h("option", { value: "completion" }, "Plain prompt"), h("option", { value: "chat" }, "Chat"));
  mode.value = kept.mode;
  const prompt = h("textarea", { name: "prompt", required: true, oninput: () => { kept.prompt = prompt.value; }, onkeydown: (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit(); } });
  prompt.value = kept.prompt;
  const system = field("system", "System message (optional)");
  const compare = h("input", { type: "checkbox", name: "compare", onchange: () => { kept.compare = compare.checked; arrange(); } });
  compare.checked = kept.compare;
  const promptName = h("span");
  const send = h("button", { class: "main" }, "Sample"), stop = h("button", { type: "button", onclick: () => running?.abort(), disabled: true }, "Stop");
  const form = h("form", { class: "stack", onsubmit: (event) => { event.preventDefault(); run(); } },
    h("div", { class: "fields" }, h("label", {}, "Checkpoint", model), h("label", {}, "As", mode)),
    system, h("label", {}, promptName, prompt),
    h("div", { class: "fields" },
      field("max_tokens", "Max tokens", { type: "number", min: 1, required: true }), field("temperature", "Temperature", { type: "number", min: 0, max: 2, step: 0.1 }),
      field("top_p", "Top p", { type: "number", min: 0, max: 1, step: 0.05 }), field("seed", "Seed", { type: "number", placeholder: "any" })),
    h("div", { class: "row" }, send, stop, h("label", { class: "check" }, compare, "beside the base model"), h("span", { class: "grow" }), h("span", { class: "muted small" }, "Ctrl+Enter samples")));
  const answers = h("div", { class: "answers" });
  const element = h("div", { class: "stack" },
    h("div", { class: "head" }, h("div", {}, h("h1", { tabindex: "-1" }, "Playground"), h("p", { class: "muted" }, "Each token is shaded by how unlikely it was. Point at one, or move with the arrow keys, to read its log-probability."))),
    h("section", { class: "card", "aria-label": "Prompt and parameters" }, form), answers);
  let running = null, base = "", owned = new Map(), isOver = false;

  function arrange() {
    system.hidden = mode.value !== "chat";
    say(promptName, mode.value === "chat" ? "Message" : "Prompt");
    answers.className = compare.checked ? "answers two" : "answers";
  }

  async function list() {
    try {
      const { base_model: name, checkpoints } = await get("/dashboard/checkpoints");
      if (isOver) return;
      base = name;
      owned = new Map(checkpoints.map((item) => [item.path, item.is_own]));
      model.replaceChildren(h("option", { value: name }, `${name} (base model)`), ...checkpoints.map((item) => h("option", { value: item.path }, optionOf(item))));
      const wanted = kept.model || checkpoints[0]?.path || name;
      model.value = [...model.options].some((option) => option.value === wanted) ? wanted : name;
      kept.model = model.value;
    } catch (error) { if (!isOver) onError(error); }
  }

  async function run() {
    running?.abort();
    const mine = (running = new AbortController());
    const models = [...new Set(compare.checked ? [model.value, base] : [model.value])];
    const places = models.map((name) => answerPlace(name === base ? "Base model" : name.replace("tinker://", "")));
    answers.replaceChildren(...places.map((place) => place.element));
    stop.disabled = false;
    await Promise.all(models.map((name, i) => sample(name, places[i], mine.signal)));
    if (running === mine) { stop.disabled = true; tell("Done."); }
  }

  async function sample(name, place, signal) {
    const isChat = mode.value === "chat", number = (text) => (text === "" ? undefined : Number(text));
    const body = { model: name, stream: true, max_tokens: number(kept.max_tokens), temperature: number(kept.temperature), top_p: number(kept.top_p), seed: number(kept.seed) };
    if (isChat) Object.assign(body, { messages: [...(kept.system ? [{ role: "system", content: kept.system }] : []), { role: "user", content: prompt.value }], logprobs: true, top_logprobs: 5 });
    else Object.assign(body, { prompt: prompt.value, logprobs: 5 });
    const path = isChat ? "chat/completions" : "completions";
    const road = owned.get(name) === false ? `/dashboard/playground/${path}?checkpoint=${encodeURIComponent(name)}` : `/oai/api/v1/${path}`;
    try {
      const response = await post(road, body, signal);
      for await (const { data } of events(response)) {
        if (data === "[DONE]") break;
        const piece = JSON.parse(data);
        if (piece.error) throw new Refused(500, piece.error.message ?? "The sample failed.");
        const choice = piece.choices?.[0];
        if (choice) place.add(isChat ? chatTokens(choice) : plainTokens(choice), choice.finish_reason);
      }
    } catch (error) {
      if (error.name !== "AbortError") place.fail(error instanceof Refused ? error.message : "The connection broke.");
    }
  }

  arrange();
  list();
  return { title: "Playground", element, update() {}, stop() { isOver = true; running?.abort(); } };
}

// What tells checkpoints apart comes first: a narrow window cuts the rest off.
function optionOf({ path, name, kind }) {
  return `${name} (${kind}) of ${path.replace("tinker://", "").split("/")[0]}`;
}

// {text, logprob, likely: [[text, logprob]]} of what has come; without log-probabilities one piece of text. An object's keys
// come in no order that says anything (digits first), so the likeliest are sorted here.

function plainTokens(choice) {
  const scored = choice.logprobs;
  if (!scored?.tokens?.length) return choice.text ? [{ text: choice.text }] : [];
  return scored.tokens.map((text, i) => ({ text, logprob: scored.token_logprobs[i], likely: Object.entries(scored.top_logprobs?.[i] ?? {}).sort((a, b) => b[1] - a[1]) }));
}

function chatTokens(choice) {
  const scored = choice.logprobs?.content, text = choice.delta?.content ?? choice.delta?.reasoning_content ?? "";
  if (!scored?.length) return text ? [{ text }] : [];
  return scored.map((token) => ({ text: token.token, logprob: token.logprob, likely: (token.top_logprobs ?? []).map((other) => [other.token, other.logprob]) }));
}

function answerPlace(title) {
  const id = `answer-${Math.random().toString(36).slice(2)}`;
  const text = h("div", { class: "text", tabindex: "0", role: "textbox", "aria-readonly": "true", "aria-multiline": "true", "aria-label": `${title}: sampled text. Arrow keys read tokens.`, onkeydown: (event) => onKey(event) });
  const read = h("p", { class: "read", role: "status" }), end = h("span", { class: "muted small" }, "waiting…");
  const element = h("section", { class: "card answer", "aria-labelledby": id }, h("header", {}, h("h2", { id, class: "mono" }, title), h("span", { class: "grow" }), end), text, read);
  const join = joiner();
  let tokens = [], picked = -1, sum = 0, scored = 0;

  function pick(i) {
    text.children[picked]?.classList.remove("picked");
    picked = i;
    const token = tokens[i];
    if (!token) return;
    text.children[i].classList.add("picked");
    if (token.logprob === undefined || token.logprob === null) { say(read, "no log-probability"); return; }
    const likely = token.likely.map(([name, logprob]) => `${quoted(name)} ${(100 * Math.exp(logprob)).toFixed(1)} %`).join("  ");
    say(read, `${quoted(token.text)}  logprob ${short(token.logprob)}  p ${(100 * Math.exp(token.logprob)).toFixed(2)} %\n${likely}`);
  }
  function onKey(event) {
    const moves = { ArrowLeft: -1, ArrowRight: 1 };
    if (!(event.key in moves) || !tokens.length) return;
    event.preventDefault();
    pick(Math.min(tokens.length - 1, Math.max(0, picked + moves[event.key])));
  }
  function add(arrived, finished) {
    for (const token of arrived) {
      const i = tokens.push(token) - 1, probability = Math.exp(token.logprob ?? 0);
      const shade = probability < 0.05 ? "p0" : probability < 0.2 ? "p1" : probability < 0.5 ? "p2" : probability < 0.8 ? "p3" : "";
      const title = token.logprob === undefined || token.logprob === null ? null : `logprob ${short(token.logprob)}`;
      const place = h("span", { class: `token ${shade}`, title, onpointerenter: () => pick(i) });
      text.append(place);
      say(place, join(token.text, place));
      if (token.logprob !== undefined && token.logprob !== null) { sum += token.logprob; scored += 1; }
    }
    say(end, finished ? `${tokens.length} tokens, ended by ${finished}${scored ? `, mean logprob ${short(sum / scored)}` : ""}` : `${tokens.length} tokens…`);
  }
  function fail(message) {
    say(end, "failed");
    text.append(h("span", { class: "failed" }, message));
  }
  return { element, add, fail };
}
