"use strict";
// The page of `veneer serve`: one message goes to every column, each the base, an adapter or a weighted stack.
// Text from the server is only ever put into the page as text.

const MOST_COLUMNS = 4;
const $ = (id) => document.getElementById(id);
const DOUBLE_CLICK = 500; // ms
const state = { base: "", loaded: [], columns: [], running: new Set(), asked: 0 };

$("key").value = sessionStorage.getItem("key") || "";

function headers() {
  const key = $("key").value;
  return key ? { "Content-Type": "application/json", Authorization: `Bearer ${key}` } : { "Content-Type": "application/json" };
}

async function call(path, body, signal) {
  const options = body ? { method: "POST", body: JSON.stringify(body) } : {};
  const response = await fetch(path, { ...options, headers: headers(), signal });
  if (response.ok) return response;
  let said = `${response.status} ${response.statusText}`;
  try { said = (await response.json()).error.message; } catch { /* no JSON: the status says it */ }
  if (response.status === 401) show("settings", true), $("key").focus();
  if (response.status === 429) said += ` (again in ${response.headers.get("Retry-After") || "a few"} s)`;
  throw new Error(said);
}

// Adapters

async function refresh() {
  try {
    const found = await (await call("/v1/adapters")).json();
    state.base = found.base;
    state.loaded = found.loaded;
    const names = new Set(found.loaded.map((one) => one.name));
    for (const column of state.columns) column.stack = column.stack.filter((part) => names.has(part.name));
    $("status").className = "soft";
    $("status").textContent = `${found.base} · ${names.size} adapter${names.size === 1 ? "" : "s"} loaded`;
    $("loaded").replaceChildren(...found.loaded.map(loadedRow));
    $("offered").replaceChildren(...found.offered.map((one) => new Option(one.name, one.path)));
    if (!found.loaded.length) $("loaded").append(element("tr", "", [element("td", "soft", "none yet", { colSpan: 5 })]));
    if (!state.columns.length) start(found.context);
    state.columns.forEach(drawColumn);
  } catch (error) {
    $("status").className = "error";
    $("status").textContent = error.message;
  }
}

function loadedRow(one) {
  const unload = element("button", "", "Unload", { type: "button", title: `Unload ${one.name}` });
  unload.addEventListener("click", () => change("/v1/unload_lora_adapter", { lora_name: one.name }));
  const size = one.bytes < 1e6 ? `${(one.bytes / 1e3).toFixed(0)} kB` : `${(one.bytes / 1e6).toFixed(1)} MB`;
  const name = element("td", "", one.name, { title: one.path });
  return element("tr", "", [name, ...[one.rank, size, one.tier].map((text) => element("td", "", `${text}`)), element("td", "", [unload])]);
}

async function change(path, body) {
  $("load-said").className = "wide soft";
  $("load-said").textContent = "…";
  try {
    $("load-said").textContent = (await (await call(path, body)).text()).replace(/^"|"$/g, "");
  } catch (error) {
    $("load-said").className = "wide error";
    $("load-said").textContent = error.message;
  }
  await refresh();
  $("load-said").scrollIntoView({ block: "nearest" });
}

$("load").addEventListener("submit", (event) => {
  event.preventDefault();
  change("/v1/load_lora_adapter", {
    lora_name: $("load-name").value.trim(), lora_path: $("load-path").value.trim(), load_inplace: $("load-replace").checked,
  });
});
$("load-path").addEventListener("change", () => {
  const parts = $("load-path").value.split("/").filter((part) => part && part !== "adapter");
  if (!$("load-name").value && parts.length) $("load-name").value = parts.pop().replace(/[^A-Za-z0-9._-]+/g, "-");
});

// Columns

function start(context) {
  const most = $("max-tokens");
  most.value = Math.max(1, Math.min(+most.value, Math.floor(context / 2)));
  addColumn([]);
  for (const one of state.loaded.slice(0, 1)) addColumn([{ name: one.name, weight: 1 }]);
}

function addColumn(stack) {
  const node = $("pane").content.firstElementChild.cloneNode(true);
  const column = { node, stack, history: [], abort: null };
  node.querySelector(".remove").addEventListener("click", () => {
    column.abort?.abort();
    state.columns.splice(state.columns.indexOf(column), 1);
    node.remove();
    state.columns.forEach(drawColumn);
  });
  node.querySelector(".more").addEventListener("change", (event) => {
    if (event.target.value) column.stack.push({ name: event.target.value, weight: 1 });
    drawColumn(column);
  });
  state.columns.push(column);
  $("panes").append(node);
  forget(column);
  state.columns.forEach(drawColumn);
}

function modelOf(column) {
  const parts = column.stack.filter((part) => part.weight !== 0);
  if (!parts.length) return state.base;
  if (parts.length === 1 && parts[0].weight === 1) return parts[0].name;
  return `${state.base}:${parts.map((part) => `${part.name}*${part.weight}`).join("+")}`;
}

function title(column) {
  if (!column.stack.length) return `${state.base} (base)`;
  return column.stack.map((part) => (part.weight === 1 ? part.name : `${part.name} × ${part.weight}`)).join(" + ");
}

function drawColumn(column) {
  const { node } = column;
  node.querySelector("h2").textContent = title(column);
  node.querySelector(".remove").hidden = state.columns.length < 2;
  node.querySelector(".stack").replaceChildren(...column.stack.map((part) => partRow(column, part)));
  const free = state.loaded.filter((one) => !column.stack.some((part) => part.name === one.name));
  const select = node.querySelector(".more");
  const first = column.stack.length ? "+ stack another adapter" : "+ put an adapter on the base";
  select.replaceChildren(new Option(free.length ? first : "no further adapter is loaded", ""), ...free.map((one) => new Option(one.name, one.name)));
  select.disabled = !free.length;
  $("add").disabled = state.columns.length >= MOST_COLUMNS;
}

function partRow(column, part) {
  const row = $("part").content.firstElementChild.cloneNode(true);
  const [range, number] = [row.querySelector(".weight"), row.querySelector(".number")];
  row.querySelector(".name").textContent = row.querySelector(".name").title = part.name;
  for (const input of [range, number]) {
    input.value = part.weight;
    input.setAttribute("aria-label", `Weight of ${part.name}`);
    input.addEventListener("input", () => {
      if (input.value === "" || !Number.isFinite(+input.value)) return;
      part.weight = +input.value;
      (input === range ? number : range).value = part.weight;
      column.node.querySelector("h2").textContent = title(column);
    });
  }
  row.querySelector(".off").setAttribute("aria-label", `Take ${part.name} out`);
  row.querySelector(".off").addEventListener("click", () => {
    column.stack = column.stack.filter((one) => one !== part);
    drawColumn(column);
  });
  return row;
}

function forget(column) {
  column.history = [];
  column.node.querySelector(".talk").replaceChildren(element("p", "empty", "Nothing said yet."));
  column.node.querySelector(".speed").textContent = "";
}

// Talking

async function ask(text) {
  const system = $("system").value.trim();
  state.asked = performance.now();
  await Promise.all(state.columns.map((column) => answer(column, text, system)));
}

async function answer(column, text, system) {
  const talk = column.node.querySelector(".talk");
  const speed = column.node.querySelector(".speed");
  if (!column.history.length) talk.replaceChildren();
  const mine = turn(talk, "user", text);
  const theirs = turn(talk, "assistant", "");
  const messages = [...(system ? [{ role: "system", content: system }] : []), ...column.history, { role: "user", content: text }];
  column.abort = new AbortController();
  state.running.add(column);
  busy();
  const clock = { start: performance.now(), first: 0, tokens: 0 };
  let said = "";
  try {
    const response = await call("/v1/chat/completions", { model: modelOf(column), messages, ...options() }, column.abort.signal);
    for await (const event of eventsOf(response)) {
      if (event.error) throw new Error(event.error.message);
      const piece = event.choices[0]?.delta?.content;
      if (piece) {
        clock.first ||= performance.now();
        clock.tokens += 1;
        said += piece;
        const atEnd = talk.scrollHeight - talk.scrollTop - talk.clientHeight < 60;
        theirs.append(piece);
        if (atEnd) talk.scrollTop = talk.scrollHeight;
      }
      if (event.usage) clock.tokens = event.usage.completion_tokens;
      speed.textContent = speedText(clock);
    }
    column.history.push({ role: "user", content: text }, { role: "assistant", content: said });
  } catch (error) {
    if (!theirs.isConnected) return; // the column was cleared meanwhile
    const stopped = error.name === "AbortError";
    if (said) column.history.push({ role: "user", content: text }, { role: "assistant", content: said });
    if (stopped && said) {
      speed.textContent += " · stopped";
    } else if (stopped) {
      mine.remove(), theirs.remove();
      $("prompt").value ||= text;
    } else {
      if (!said) theirs.remove();
      turn(talk, "assistant error", error.message);
      refresh(); // an adapter may be gone, or the server another one
    }
  } finally {
    state.running.delete(column);
    busy();
  }
}

function options() {
  const seed = $("seed").value;
  return {
    temperature: +$("temperature").value || 0, top_p: +$("top-p").value || 1, max_tokens: +$("max-tokens").value || 256,
    ...(seed === "" ? {} : { seed: Math.trunc(+seed) }), stream: true, stream_options: { include_usage: true },
  };
}

function speedText(clock) {
  const now = performance.now();
  const seconds = (now - clock.first) / 1000;
  const rate = clock.tokens > 1 && seconds > 0 ? `${((clock.tokens - 1) / seconds).toFixed(1)} tokens/s · ` : "";
  return clock.first ? `${rate}${clock.tokens} tokens · first after ${((clock.first - clock.start) / 1000).toFixed(2)} s` : "";
}

async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n\n");
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
  }
}

function turn(talk, role, text) {
  const node = element("div", `turn ${role}`, text);
  talk.append(node);
  talk.scrollTop = talk.scrollHeight;
  return node;
}

function busy() {
  $("send").disabled = state.running.size > 0;
  $("stop").hidden = $("send").hidden = false;
  $("stop").hidden = state.running.size === 0;
  $("send").hidden = state.running.size > 0;
}

// The page

function element(tag, className, content, more = {}) {
  const node = Object.assign(document.createElement(tag), more);
  if (className) node.className = className;
  Array.isArray(content) ? node.append(...content) : (node.textContent = content);
  return node;
}

function show(name, open) {
  for (const one of ["settings", "adapters"]) {
    $(one).hidden = !(open && one === name);
    $(`open-${one}`).setAttribute("aria-expanded", String(open && one === name));
  }
}

for (const name of ["settings", "adapters"]) $(`open-${name}`).addEventListener("click", () => show(name, $(name).hidden));
$("settings").addEventListener("submit", (event) => event.preventDefault());
$("key").addEventListener("change", () => { sessionStorage.setItem("key", $("key").value); refresh(); });
$("add").addEventListener("click", () => addColumn(state.loaded.length ? [{ name: nextName(), weight: 1 }] : []));
$("clear").addEventListener("click", () => state.columns.forEach((column) => { column.abort?.abort(); forget(column); }));
$("stop").addEventListener("click", () => {
  if (performance.now() - state.asked < DOUBLE_CLICK) return; // it took the place of Send under a double click
  state.columns.forEach((column) => column.abort?.abort());
});
$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("prompt").value.trim();
  if (!text || state.running.size) return;
  $("prompt").value = "";
  ask(text);
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) event.preventDefault(), $("ask").requestSubmit();
});

function nextName() {
  const used = new Set(state.columns.flatMap((column) => column.stack.map((part) => part.name)));
  return (state.loaded.find((one) => !used.has(one.name)) || state.loaded[0]).name;
}

refresh();
