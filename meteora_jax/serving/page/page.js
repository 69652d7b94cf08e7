// A chat with `/v1/chat/completions`, `"routing": true`. Text that comes from the server is set as text, never as HTML.

const COLOURS = 7, LINES = 5; // classes c0..c6 and l0..l4 of style.css: 35 pairs, then they repeat; letters never do
const KEY = "meteora-key", THEME = "meteora-theme";
const MIXTURE = "\0mixture"; // no model's name has it

const one = (selector, root = document) => root.querySelector(selector);
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const make = (tag, className = "", text = "") => Object.assign(document.createElement(tag), { className, textContent: text });
const percent = (x) => (x > 0 && x < 0.005 ? "<1 %" : `${Math.round(100 * x)} %`);

const form = one("#ask"), prompt = one("#prompt"), send = one("#send"), stop = one("#stop"), tip = one("#tip");
const turns = one("#turns"), spoken = one("#spoken");
let models = []; // of /v1/models
let running = null; // the AbortController of the answers under way
let shown = null; // {name} of the adapter whose tokens alone are coloured; null: all are

// Adapters

const places = new Map(); // name: its place, in the order of /v1/models; later ones as they come

/** A, B, ..., Z, AA, AB, ... */
function letters(place) {
  return (place >= 26 ? letters(Math.floor(place / 26) - 1) : "") + String.fromCharCode(65 + (place % 26));
}

/** Class and letters of an adapter; null is the base alone. */
function look(name) {
  if (name === null) return { className: "base", tag: "–" };
  if (!places.has(name)) {
    places.set(name, places.size);
    addToLegend(name);
  }
  const place = places.get(name);
  return { className: `c${place % COLOURS} l${Math.floor(place / COLOURS) % LINES}`, tag: letters(place) };
}

const called = (name) => name ?? "base alone";

function swatch(name) {
  const { className, tag } = look(name);
  const mark = make("b", `swatch ${className}`, tag);
  mark.setAttribute("aria-hidden", "true");
  return mark;
}

function addToLegend(name) {
  const chip = make("button", "chip");
  chip.type = "button";
  chip.setAttribute("aria-pressed", "false");
  chip.append(swatch(name), make("span", "", called(name)));
  chip.addEventListener("click", () => {
    const on = chip.getAttribute("aria-pressed") !== "true";
    for (const other of all(".chip")) other.setAttribute("aria-pressed", "false");
    chip.setAttribute("aria-pressed", String(on));
    shown = on ? { name } : null;
    for (const span of all(".token")) fade(span);
  });
  one("#adapters").append(chip);
  one("#count").textContent = `(${places.size})`;
}

const fade = (span) => span.classList.toggle("faded", shown !== null && span.routing?.[0]?.adapter !== shown.name);

// The server

function headers() {
  const key = one("#key").value.trim();
  return { "content-type": "application/json", ...(key && { authorization: `Bearer ${key}` }) };
}

/** fetch, whose refusals are Errors in the server's own words. */
async function ask(path, options = {}) {
  let reply;
  try {
    reply = await fetch(path, { ...options, headers: headers() });
  } catch (e) {
    if (e.name === "AbortError") throw e;
    throw new Error("The server cannot be reached.");
  }
  if (reply.ok) return reply;
  let said = "";
  try {
    said = (await reply.json()).error?.message ?? "";
  } catch { /* no JSON: the status must do */ }
  if (reply.status === 401) said ||= "an API key is needed";
  const wait = reply.headers.get("retry-after");
  const again = wait ? ` Try again in ${wait} s.` : "";
  throw Object.assign(new Error(`${said || "The server refused."} (status ${reply.status})${again}`), { status: reply.status });
}

/** The events of a stream, as objects, to its [DONE]. */
async function* events(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let read;
    try {
      read = await reader.read();
    } catch (e) {
      if (e.name === "AbortError") throw e;
      throw new Error("The connection broke before the end of the answer.");
    }
    if (read.done) throw new Error("The server closed the connection before the end of the answer.");
    const parts = (rest + read.value).split(/\r?\n\r?\n/);
    rest = parts.pop();
    for (const part of parts) {
      const data = part.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trim()).join("\n");
      if (data === "[DONE]") return;
      if (!data) continue;
      const found = JSON.parse(data);
      if (found.error) throw new Error(found.error.message);
      yield found;
    }
  }
}

function complain(error) {
  const box = one("#problem");
  box.hidden = !error;
  box.textContent = error ? error.message : "";
  if (error?.status === 401) one("#key").focus();
}

async function load() {
  const status = one("#status");
  try {
    models = (await (await ask("v1/models")).json()).data;
    const template = (await (await ask("tokenizer_info")).json()).chat_template;
    one("#plain").checked ||= !template;
    one("#plain").disabled = !template;
  } catch (e) {
    complain(e);
    status.textContent = "not connected";
    return;
  }
  complain(null);
  for (const { id, kind } of models) if (kind === "adapter") look(id);
  if (!one(".chip.none")) {
    addToLegend(null);
    one("#adapters").lastChild.classList.add("none");
  }
  one("#count").textContent = `(${places.size})`;
  one("#legend").open &&= places.size <= 60;
  sides.forEach((side, i) => side.fill(i));
  one("#most").max = models[0].max_model_len;
  one("#most").value = Math.min(one("#most").value, one("#most").max);
  send.disabled = running !== null;
  status.textContent = "ready";
}

// Routers to choose

class Side {
  constructor(root) {
    this.root = root;
    this.select = one("select", root);
    this.k = one(".k", root);
    this.mixture = one(".mixture", root);
    this.messages = [];
    this.select.addEventListener("change", () => this.changed());
  }

  /** The models as options; the first side begins with the best router there is, the second with another. */
  fill(nth) {
    const before = this.select.value;
    const groups = { router: "Routers", base: "Base", adapter: "Adapters" };
    this.select.replaceChildren();
    for (const [kind, title] of Object.entries(groups)) {
      const group = Object.assign(document.createElement("optgroup"), { label: title });
      for (const { id } of models.filter((m) => m.kind === kind)) {
        const option = make("option", "", kind === "base" ? `${id} (no adapter)` : kind === "adapter" ? `${look(id).tag} · ${id}` : id);
        option.value = id;
        group.append(option);
      }
      if (kind === "router" && places.size) {
        const option = make("option", "", "mixture by weights");
        option.value = MIXTURE;
        group.append(option);
      }
      if (group.childElementCount) this.select.append(group);
    }
    const named = [...models.filter((m) => m.kind === "router"), ...models.filter((m) => m.kind !== "router")].map((m) => m.id);
    const base = models.find((m) => m.kind === "base").id;
    this.select.value = before || (nth ? base : named[0]);
    if (this.select.selectedIndex < 0) this.select.value = base;
    this.changed();
  }

  changed() {
    const model = models.find((m) => m.id === this.select.value);
    this.k.hidden = !model?.most_k;
    if (model?.most_k) {
      const input = one("input", this.k);
      input.max = model.most_k;
      input.value = Math.min(input.value, model.most_k);
    }
    this.mixture.hidden = this.select.value !== MIXTURE;
    const there = new Set(all("input", this.mixture).map((input) => input.name));
    for (const name of this.mixture.hidden ? [] : places.keys()) {
      if (there.has(name)) continue;
      const input = Object.assign(document.createElement("input"), { type: "number", step: "any", value: "0", name });
      const label = make("label");
      label.append(swatch(name), make("span", "", name), input);
      this.mixture.append(label);
    }
  }

  /** What a request says about its router, and how the answer is headed. */
  asked() {
    const base = models.find((m) => m.kind === "base").id;
    if (this.select.value === MIXTURE) {
      const chosen = all("input", this.mixture).map((input) => [input.name, Number(input.value)]).filter(([, w]) => w !== 0);
      if (!chosen.length) throw new Error("Give at least one adapter of the mixture a weight.");
      return { title: chosen.map(([name, w]) => `${w} ${name}`).join(" + "), body: { model: base, router: Object.fromEntries(chosen) } };
    }
    const model = this.k.hidden ? this.select.value : `${this.select.value}:${one("input", this.k).value}`;
    return { title: model, body: { model } };
  }
}

const sides = all(".side").map((root) => new Side(root));

// Answers

/** One answer as it comes: tokens, who acted, and what is said aloud. */
class Answer {
  constructor(title) {
    this.title = title;
    this.text = "";
    this.waiting = []; // tokens whose text has not come
    this.led = new Map();
    this.count = 0;
    this.unspoken = "";
    this.root = make("section", "answer");
    this.root.setAttribute("aria-label", `Answer of ${title}`);
    this.state = make("span", "state", "waiting");
    const head = make("h2", "", title);
    head.append(this.state);
    this.tokens = make("div", "tokens");
    this.bar = make("div", "bar");
    this.bar.setAttribute("role", "img");
    this.acted = make("ul", "acted");
    this.acted.setAttribute("aria-label", "Who acted");
    this.note = make("p", "note");
    this.root.append(head, this.tokens, this.bar, this.acted, this.note);
  }

  /** A choice of a chunk: text that is certain, and the tokens drawn, of which some may wait for theirs. */
  take(choice) {
    const text = choice.delta?.content ?? choice.text ?? "";
    const routing = choice.meteora ?? {};
    for (const token of routing.tokens ?? []) {
      this.count += 1;
      this.led.set(token.adapter, (this.led.get(token.adapter) ?? 0) + 1);
      this.waiting.push(token);
    }
    this.text += text;
    if (text) this.spread(text);
    if (choice.finish_reason && this.waiting.length) this.add("", this.waiting.splice(0)); // the token that ended it
    this.speak(text);
    if (routing.tokens?.length) this.draw([...this.led].map(([name, n]) => [name, n / this.count]));
    this.state.textContent = `${this.count} tokens`;
    if (routing.led) this.draw(routing.led.map((x) => [x.adapter, x.share]));
    if (routing.retrieved?.length) {
      this.note.textContent = `Retrieved: ${routing.retrieved.map((x) => `${x.adapter} (${x.similarity.toFixed(2)})`).join(", ")}`;
    }
  }

  /** Gives each waiting token its part of the text. One whose own text is not in it (half a character) shares a part with
   * those after it; one that has no part yet waits on. */
  spread(text) {
    const tokens = this.waiting.splice(0);
    let group = [];
    tokens.forEach((token, i) => {
      group.push(token);
      const at = token.text && !token.text.includes("\ufffd") ? text.indexOf(token.text) : -1;
      const fits = at >= 0 && (group.length > 1 || !text.slice(0, at).trim());
      if (!text || (!fits && i < tokens.length - 1)) return;
      const end = fits ? at + token.text.length : text.length;
      this.add(text.slice(0, end), group);
      text = text.slice(end);
      group = [];
    });
    this.waiting = group;
    if (!text) return;
    const last = this.tokens.lastChild;
    if (last) last.textContent += text; // released late: the end of a text that a stop might have cut
    else this.add(text, []);
  }

  add(text, routing) {
    const leader = routing.length ? routing[0].adapter : null;
    const { className, tag } = look(leader);
    const span = make("span", `token ${className}`, text || "∎");
    span.classList.toggle("newline", text.includes("\n"));
    span.classList.toggle("end", !text);
    span.routing = routing;
    span.tabIndex = this.tokens.childElementCount ? -1 : 0;
    span.style.setProperty("--s", routing[0]?.weights[0]?.[1] ?? 0);
    if (leader !== null && this.leader !== leader) span.dataset.tag = tag;
    this.leader = leader;
    fade(span);
    this.tokens.append(span);
  }

  draw(shares) {
    shares.sort((a, b) => b[1] - a[1]);
    const parts = [], items = [];
    for (const [name, share] of shares) {
      const part = make("i", look(name).className);
      part.style.flexGrow = share;
      parts.push(part);
      const item = make("li");
      item.append(swatch(name), make("span", "", `${called(name)} ${percent(share)}`));
      items.push(item);
    }
    this.bar.replaceChildren(...parts);
    this.acted.replaceChildren(...items);
    this.bar.setAttribute("aria-label", `Share of tokens led: ${shares.map(([name, x]) => `${called(name)} ${percent(x)}`).join(", ")}`);
  }

  /** Whole sentences to the live region: single tokens would be read as noise. */
  speak(text, end = false) {
    this.unspoken += text;
    const whole = end ? this.unspoken : /^[^]*[.!?:;\n](?=\s)/.exec(this.unspoken)?.[0] ?? "";
    this.unspoken = this.unspoken.slice(whole.length);
    const who = one("#compare").checked ? `${this.title}: ` : "";
    if (whole.trim()) spoken.append(make("p", "", who + whole.trim()));
  }

  finish(state, error) {
    this.speak("", true);
    this.state.textContent = `${state}, ${this.count} tokens`;
    if (!this.tokens.childElementCount) this.tokens.append(make("em", "", error ? "no answer" : "empty answer"));
    if (error) {
      const box = make("p", "problem", error.message);
      box.setAttribute("role", "alert");
      this.root.append(box);
    } else {
      spoken.append(make("p", "", `${this.title} ${state}. ${this.bar.getAttribute("aria-label") ?? ""}`));
    }
  }
}

const REASONS = { stop: "ended", length: "cut at the most tokens", tool_calls: "called a tool" };

async function answer(side, { title, body }, text, slot) {
  const mine = new Answer(title);
  slot.append(mine.root);
  const plain = one("#plain").checked;
  const messages = [...side.messages, { role: "user", content: text }];
  const how = { ...body, stream: true, routing: true, temperature: Number(one("#temperature").value), max_tokens: Number(one("#most").value) };
  const request = plain ? { ...how, prompt: text } : { ...how, messages };
  let reason = "ended";
  try {
    const reply = await ask(`v1/${plain ? "" : "chat/"}completions`, { method: "POST", body: JSON.stringify(request), signal: running.signal });
    for await (const chunk of events(reply)) {
      for (const choice of chunk.choices) {
        const atEnd = window.innerHeight + window.scrollY >= document.body.scrollHeight - 40;
        mine.take(choice);
        if (choice.finish_reason) reason = REASONS[choice.finish_reason] ?? choice.finish_reason;
        if (atEnd) window.scrollTo(0, document.body.scrollHeight);
      }
    }
  } catch (e) {
    if (e.name !== "AbortError") {
      mine.finish("failed", e);
      if (e.status === 401) one("#key").focus();
      return false;
    }
    reason = "stopped";
  }
  mine.finish(reason);
  if (!plain && mine.text) side.messages = [...messages, { role: "assistant", content: mine.text }];
  return true;
}

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  const text = prompt.value;
  if (running || !text.trim() || !models.length) return;
  const active = sides.filter((side) => !side.root.hidden);
  let asked;
  try {
    asked = active.map((side) => side.asked());
  } catch (e) {
    complain(e);
    return;
  }
  complain(null);
  spoken.replaceChildren();
  const turn = make("li", "turn"), slot = make("div", "answers");
  turn.append(make("p", "asked", text), slot);
  turns.append(turn);
  one("#empty").hidden = true;
  prompt.value = "";
  running = new AbortController();
  busy(true);
  turn.scrollIntoView({ block: "nearest" });
  const well = await Promise.all(active.map((side, i) => answer(side, asked[i], text, slot)));
  running = null;
  busy(false);
  if (!well.some(Boolean) && !prompt.value) prompt.value = text; // nothing was answered: to be sent again
});

function busy(on) {
  const hadFocus = document.activeElement === stop || document.activeElement === send;
  send.disabled = on;
  stop.disabled = !on;
  one("#clear").disabled = on;
  one("#status").textContent = on ? "answering" : "ready";
  if (hadFocus) (on ? stop : prompt).focus();
}

stop.addEventListener("click", () => running?.abort());
prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    form.requestSubmit();
  }
});
one("#clear").addEventListener("click", () => {
  turns.replaceChildren();
  spoken.replaceChildren();
  for (const side of sides) side.messages = [];
  one("#empty").hidden = false;
  prompt.focus();
});
one("#compare").addEventListener("change", (event) => {
  sides[1].root.hidden = !event.target.checked;
  if (event.target.checked) sides[1].messages = [...sides[0].messages]; // both know the same conversation
});
one("#theme").value = localStorage.getItem(THEME) ?? "light dark";
const setTheme = () => (document.documentElement.style.colorScheme = one("#theme").value);
setTheme();
one("#theme").addEventListener("change", () => {
  localStorage.setItem(THEME, one("#theme").value);
  setTheme();
});
one("#key").value = sessionStorage.getItem(KEY) ?? "";
one("#key").addEventListener("change", (event) => {
  sessionStorage.setItem(KEY, event.target.value.trim());
  load();
});

// Weights of a token

function rowOf(mark, name, share) {
  const row = make("div");
  row.append(mark, make("span", "", name), make("span", "share", percent(share)));
  return row;
}

function showTip(span) {
  const rows = [];
  for (const { text, adapter, weights } of span.routing ?? []) {
    rows.push(make("strong", "", `“${text.replaceAll("\n", "↵").replaceAll("\t", "⇥")}” by ${called(adapter)}`));
    for (const [name, share] of weights) rows.push(rowOf(swatch(name), name, share));
    const rest = 1 - weights.reduce((sum, [, share]) => sum + share, 0);
    if (rest > 0.005) rows.push(rowOf(swatch(null), weights.length < 4 ? "base" : "base and others", rest));
  }
  if (!rows.length) rows.push(make("strong", "", "nothing is known of this text"));
  tip.replaceChildren(...rows);
  tip.hidden = false;
  all("[aria-describedby=tip]").forEach((other) => other.removeAttribute("aria-describedby"));
  span.setAttribute("aria-describedby", "tip");
  const at = span.getClientRects()[0] ?? span.getBoundingClientRect();
  const left = Math.max(8, Math.min(at.left, window.innerWidth - tip.offsetWidth - 8));
  const below = at.bottom + 6 + tip.offsetHeight <= window.innerHeight;
  tip.style.left = `${left}px`;
  tip.style.top = `${below ? at.bottom + 6 : Math.max(8, at.top - tip.offsetHeight - 6)}px`;
}

const hideTip = () => (tip.hidden = true);
turns.addEventListener("pointerover", (event) => (event.target.classList.contains("token") ? showTip(event.target) : hideTip()));
turns.addEventListener("pointerleave", hideTip);
turns.addEventListener("focusin", (event) => event.target.classList.contains("token") && showTip(event.target));
turns.addEventListener("focusout", hideTip);
window.addEventListener("scroll", hideTip, { passive: true });
document.addEventListener("keydown", (event) => event.key === "Escape" && hideTip());

// One stop of Tab an answer; the arrow keys go through its tokens.
turns.addEventListener("keydown", (event) => {
  if (!event.target.classList.contains("token")) return;
  const spans = all(".token", event.target.parentNode), at = spans.indexOf(event.target);
  const to = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: spans.length - 1 }[event.key];
  if (to === undefined) return;
  event.preventDefault();
  const next = spans[Math.max(0, Math.min(to, spans.length - 1))];
  event.target.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
});

load();
