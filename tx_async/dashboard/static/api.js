// What the page asks of its server. The key, where one is needed, stays in this tab and goes out as a header.

const KEY = "tx_async.key";
let token = "";

export class Refused extends Error {
  constructor(status, message) { super(message); this.status = status; }
}

// A header takes nothing else, and no key has anything else in it.
export const isKey = (value) => /^[\x21-\x7e]+$/.test(value);

export function key() {
  const value = sessionStorage.getItem(KEY) ?? "";
  return isKey(value) ? value : "";
}

export const setKey = (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY));

export function headers(more = {}) {
  return key() ? { "X-API-Key": key(), ...more } : more;
}

async function answered(response) {
  if (response.ok) return response;
  let message = `The server answers ${response.status}.`;
  try {
    const body = await response.json();
    message = body.detail ?? body.error?.message ?? message;
  } catch { /* what is no JSON says nothing */ }
  throw new Refused(response.status, String(message));
}

export async function get(path) {
  return (await answered(await fetch(path, { headers: headers(), cache: "no-store" }))).json();
}

// A server that has started again knows no token from before: it gives a new one, and is asked once more.
export async function post(path, body, signal) {
  const old = token;
  try {
    return await sent(path, body, signal);
  } catch (error) {
    if (!(error instanceof Refused && error.status === 403)) throw error;
    await viewer();
    if (token === old) throw error;
    return sent(path, body, signal);
  }
}

async function sent(path, body, signal) {
  const more = { "Content-Type": "application/json", "X-Dashboard-Token": token };
  return answered(await fetch(path, { method: "POST", headers: headers(more), body: JSON.stringify(body), signal }));
}

export async function viewer() {
  const answer = await get("/dashboard/viewer");
  token = answer.token;
  return answer;
}

// Server-sent events from a body that is read as it comes: {event, data} of each.
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const blocks = (rest + value.replaceAll("\r", "")).split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        const event = { event: "message", data: [] };
        for (const line of block.split("\n")) {
          if (line.startsWith("event: ")) event.event = line.slice(7);
          else if (line.startsWith("data:")) event.data.push(line.slice(5).trimStart());
        }
        if (event.data.length) yield { event: event.event, data: event.data.join("\n") };
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

const SILENCE_MS = 40_000;

// The page's stream, for ever: it comes back when it breaks. `show` gets (event, data), `lost` how it stands,
// and the server's refusal where it was one.
export async function follow(show, lost, stop) {
  let wait = 500;
  while (!stop.aborted) {
    const one = new AbortController();
    const end = () => one.abort();
    stop.addEventListener("abort", end);
    let alarm = setTimeout(end, SILENCE_MS);
    try {
      const response = await answered(await fetch("/dashboard/events", { headers: headers({ Accept: "text/event-stream" }), signal: one.signal, cache: "no-store" }));
      for await (const { event, data } of events(watched(response, () => { clearTimeout(alarm); alarm = setTimeout(end, SILENCE_MS); }))) {
        wait = 500;
        show(event, JSON.parse(data));
      }
      lost("The server has ended the stream.");
    } catch (error) {
      if (error instanceof Refused && (error.status === 401 || error.status === 403)) throw error;
      if (stop.aborted) return;
      if (error instanceof Refused) lost(error.message, error);
      else lost("The server cannot be reached.");
    } finally {
      clearTimeout(alarm);
      stop.removeEventListener("abort", end);
    }
    if (!stop.aborted) await new Promise((resolve) => setTimeout(resolve, wait));
    wait = Math.min(wait * 2, 10_000);
  }
}

function watched(response, heard) {
  const body = response.body.pipeThrough(new TransformStream({ transform(piece, to) { heard(); to.enqueue(piece); } }));
  return { body };
}
