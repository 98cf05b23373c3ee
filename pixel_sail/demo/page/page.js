// The page: load an image, ask about it, show the answers. marks.js draws marks and masks.

import { ImageView, maskLayer } from "./marks.js";

const at = (id) => document.getElementById(id);
const view = new ImageView(at("canvas"), refresh);
const state = { info: null, session: null, imageName: "", loading: false, asking: null, colours: 0, turns: 0 };

// Return a new element. Texts are inserted as text, never as HTML.
function make(tag, { text, ...properties } = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  if (text !== undefined) element.textContent = text;
  element.append(...children);
  return element;
}

// Send a request and return the response, or throw an error with the server's message.
async function call(address, options = {}) {
  let response;
  try {
    response = await fetch(address, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer. Is it still running?");
  }
  if (response.ok) return response;
  const said = await response.json().catch(() => ({}));
  throw new Error(said.error ?? `The server rejected the request (${response.status}). Try again in a moment.`);
}

const asJson = (value, more = {}) => ({
  method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(value), ...more,
});

function complain(message) {
  at("error").textContent = message ?? "";
  at("error").hidden = !message;
}

// Update buttons and hints from the state.
function refresh() {
  const ready = state.session !== null && !state.loading;
  const marks = view.marks.length;
  at("text").disabled = !ready;
  at("ask").disabled = !ready;
  at("ask").textContent = state.asking ? "Stop" : "Ask";
  at("restart").disabled = !ready || Boolean(state.asking) || at("history").childElementCount === 0;
  at("undo").disabled = !ready || marks === 0;
  at("hint").hidden = at("history").childElementCount > 0;
  at("names").replaceChildren(...view.marks.map((_, index) => {
    const button = make("button", { type: "button", text: `<Prompt${index}>`, disabled: !ready });
    button.title = "Put this mark into the question";
    button.addEventListener("click", () => insert(`<Prompt${index}>`));
    return button;
  }));
  const most = state.info?.prompts ?? 0;
  if (marks > most) complain(`This model knows at most ${most} marks. Remove some.`);
}

function insert(name) {
  const box = at("text");
  const before = box.value.slice(0, box.selectionStart);
  const blank = before && !/\s$/.test(before) ? " " : "";
  box.setRangeText(blank + name, box.selectionStart, box.selectionEnd, "end");
  box.focus();
}

// --- images ---

async function openImage(name, request, text = "") {
  if (state.loading) return;
  state.asking?.abort();
  state.loading = true;
  complain();
  refresh();
  at("status").textContent = "Loading...";
  try {
    const { session } = await (await request()).json();
    const image = new Image();
    image.src = `api/images/${session}`;
    await image.decode().catch(() => { throw new Error("The image cannot be shown. Load it again."); });
    Object.assign(state, { session, imageName: name, colours: 0, turns: 0 });
    at("history").replaceChildren();
    at("text").value = text;
    at("drop").hidden = true;
    at("canvas").hidden = at("tools").hidden = false;
    view.show(image);
  } catch (error) {
    complain(error.message);
  }
  state.loading = false;
  at("status").textContent = "";
  refresh();
}

// Return the address with the session of the replaced image, so that the server can drop it.
const replacing = (address) => (state.session ? `${address}?replaces=${state.session}` : address);

function openFile(file) {
  const most = state.info?.limits.upload_mb ?? Infinity;
  const type = file.type.startsWith("image/") ? file.type : "application/octet-stream";
  openImage(file.name, () => {
    // Checked here, because few browsers show the response of a server that stops reading a body.
    if (file.size > most * 1e6) throw new Error(`The file has more than ${most} MB. Choose a smaller one.`);
    return call(replacing("api/images"), { method: "POST", headers: { "content-type": type }, body: file });
  });
}

// --- questions ---

async function ask() {
  const text = at("text").value;
  const stop = new AbortController();
  state.asking = stop;
  complain();
  refresh();
  at("status").textContent = "Thinking...";
  const answer = make("p", { className: "answer" });
  const turn = make("li", {}, make("p", { className: "question", text }), answer);
  const body = { session: state.session, text, regions: view.regions() };
  try {
    const response = await call("api/ask", asJson(body, { signal: stop.signal }));
    at("history").append(turn);
    at("text").value = "";
    let result = null;
    for await (const line of lines(response)) {
      if (line.error) throw new Error(line.error);
      if (line.piece) answer.textContent += line.piece;
      result = line.result ?? result;
    }
    if (!result) throw new Error("The answer ended too early. Ask again.");
    await finish(turn, answer, result, stop.signal);
  } catch (error) {
    turn.remove();
    // Keep the question.
    if (!at("text").value) at("text").value = text;
    if (error.name !== "AbortError") complain(error.message);
  }
  state.asking = null;
  at("status").textContent = "";
  refresh();
}

// Yield the values of a response that holds one line of JSON each.
async function* lines(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n");
      rest = parts.pop();
      for (const part of parts) yield JSON.parse(part);
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The connection broke. Ask again.");
  }
}

async function finish(turn, answer, result, signal) {
  if (!result.goes_on && state.turns > 0) {
    turn.before(make("li", { className: "break", text: "New conversation: the marks have changed." }));
  }
  state.turns += 1;
  const palette = state.info.colours;
  const colours = result.pngs.map(() => palette[state.colours++ % palette.length]);
  const layers = await Promise.all(result.pngs.map((png, index) => maskLayer(png, colours[index])));
  // Another image may have been opened meanwhile.
  signal.throwIfAborted();
  answer.replaceChildren(...colouredPhrases(result, colours));
  if (!/[\p{L}\p{N}]/u.test(result.text)) {
    answer.replaceChildren(make("span", { className: "empty", text: result.pngs.length ? "(no words)" : "(no answer)" }));
  }
  // Show only the newest masks. Older ones can be switched on again.
  for (const box of at("history").querySelectorAll("input:checked")) box.checked = false;
  for (const mask of view.masks) mask.visible = false;
  const list = make("ul", { className: "masks" });
  layers.forEach((layer, index) => {
    const mask = { layer, visible: true };
    view.masks.push(mask);
    list.append(maskRow(mask, index, colours[index], result));
  });
  if (layers.length) turn.append(list);
  turn.append(make("p", { className: "timing", text: spent(result) }));
  view.render();
  turn.scrollIntoView({ block: "nearest" });
}

// Return the answer with every phrase that has a mask in the color of its mask.
function colouredPhrases(result, colours) {
  const parts = [];
  let rest = result.text;
  result.phrases.forEach((phrase, index) => {
    const place = phrase ? rest.indexOf(phrase) : -1;
    if (place < 0) return;
    const mark = make("mark", { text: phrase });
    mark.style.setProperty("--colour", colours[index]);
    parts.push(rest.slice(0, place), mark);
    rest = rest.slice(place + phrase.length);
  });
  return [...parts, rest];
}

function maskRow(mask, index, colour, result) {
  const box = make("input", { type: "checkbox", checked: true });
  box.addEventListener("change", () => { mask.visible = box.checked; view.render(); });
  const swatch = make("span", { className: "swatch" });
  swatch.style.background = colour;
  const name = result.phrases[index] || `Mask ${index + 1}`;
  const isEmpty = result.boxes[index] === null;
  const about = isEmpty ? `${name} (nothing found)` : `${name} (${Math.round(100 * result.scores[index])} %)`;
  const file = `${state.imageName.replace(/\.[^.]*$/, "") || "image"}_${state.turns}_${index + 1}`;
  const bytes = Uint8Array.from(atob(result.pngs[index]), (character) => character.charCodeAt(0));
  return make(
    "li", {}, make("label", { className: "name" }, box, swatch, make("span", { text: about })),
    download("PNG", `${file}.png`, new Blob([bytes], { type: "image/png" })),
    download("RLE", `${file}.json`, new Blob([JSON.stringify(result.masks[index])], { type: "application/json" })),
  );
}

function download(kind, file, blob) {
  const button = make("button", { type: "button", text: kind, title: `Save as ${file}` });
  button.setAttribute("aria-label", `Save mask as ${kind}`);
  button.addEventListener("click", () => {
    const address = URL.createObjectURL(blob);
    make("a", { href: address, download: file }).click();
    // Delayed, because some browsers read after this has returned.
    setTimeout(() => URL.revokeObjectURL(address), 60_000);
  });
  return button;
}

function spent(result) {
  const { encode_s, generate_s, mask_s } = result.timing;
  const encoded = encode_s > 0 ? `image ${encode_s.toFixed(2)} s` : "image kept";
  const parts = [encoded, `answer ${generate_s.toFixed(2)} s`, `masks ${mask_s.toFixed(2)} s`];
  if (result.wait_s >= 0.01) parts.unshift(`waited ${result.wait_s.toFixed(2)} s`);
  return parts.join(" \u00b7 ");
}

async function restart() {
  complain();
  try {
    await call("api/forget", asJson({ session: state.session }));
    at("history").replaceChildren();
    view.masks = [];
    Object.assign(state, { colours: 0, turns: 0 });
    view.render();
  } catch (error) {
    complain(error.message);
  }
  refresh();
}

// --- event handlers ---

at("file").addEventListener("change", (event) => {
  const [file] = event.target.files;
  // The same file can be chosen again.
  if (file) { openFile(file); event.target.value = ""; }
});
for (const kind of ["dragover", "dragleave", "drop"]) {
  at("stage").addEventListener(kind, (event) => {
    event.preventDefault();
    at("stage").classList.toggle("over", kind === "dragover");
    if (kind === "drop" && event.dataTransfer.files.length) openFile(event.dataTransfer.files[0]);
  });
}
for (const button of document.querySelectorAll("[data-tool]")) {
  button.addEventListener("click", () => {
    view.tool = button.dataset.tool;
    for (const other of document.querySelectorAll("[data-tool]")) other.setAttribute("aria-pressed", other === button);
  });
}
at("undo").addEventListener("click", () => { complain(); view.removeLast(); });
at("restart").addEventListener("click", restart);
at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (state.asking) state.asking.abort();
  else ask();
});
at("text").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!state.asking && !at("ask").disabled) ask();
});

async function begin() {
  try {
    state.info = await (await call("api/info")).json();
  } catch (error) {
    complain(error.message);
    return;
  }
  at("model").textContent = state.info.model;
  at("examples").replaceChildren(...state.info.examples.map((text, index) => {
    const image = make("img", { src: `api/examples/${index}`, alt: "" });
    const button = make("button", { type: "button" }, image, make("span", { text }));
    button.addEventListener("click", () =>
      openImage(`example_${index + 1}`, () => call(replacing(`api/examples/${index}`), asJson({})), text));
    return button;
  }));
  if (state.info.examples.length) at("text").placeholder = state.info.examples[0];
}

begin();
