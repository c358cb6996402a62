"use strict";
// Whatever runs say becomes text nodes and numbers, never HTML.
const NEWEST = "newest";
const runs = new Map(); // name → what is known of it, and its elements
const stale = new Set(); // runs to draw anew in the next frame

function make(tag, parent, text, className) {
  const element = parent.appendChild(document.createElement(tag));
  if (text !== undefined) element.textContent = text;
  if (className) element.className = className;
  return element;
}

function runOf(name) {
  if (runs.has(name)) return runs.get(name);
  const section = make("section", document.getElementById("runs"));
  make("h2", section, name);
  const run = {name, step: 0, series: new Map(), finals: new Map(), previews: new Map(), chosen: NEWEST, section};
  run.about = make("p", section, "", "about");
  run.forming = make("div", section, undefined, "prompts");
  const head = make("h3", section, "Pictures at step ");
  run.select = make("select", head);
  run.select.setAttribute("aria-label", "training step");
  run.select.addEventListener("change", () => { run.chosen = run.select.value; draw(run); });
  run.grid = make("div", section, undefined, "prompts");
  make("h3", section, "Numbers");
  run.curves = make("div", section, undefined, "curves");
  runs.set(name, run);
  document.getElementById("none").hidden = true;
  return run;
}

const take = {
  gone(event) {
    const run = runs.get(event.run);
    if (run) { run.section.remove(); runs.delete(event.run); }
  },
  numbers(event) {
    const run = runOf(event.run);
    for (const [step, name, value] of event.lines) {
      if (!run.series.has(name)) run.series.set(name, []);
      const points = run.series.get(name);
      while (points.length && points[points.length - 1][0] >= step) points.pop(); // told anew after a resume
      points.push([step, value]);
      run.step = Math.max(run.step, step);
    }
    stale.add(run);
  },
  picture(event) {
    const run = runOf(event.run);
    const place = JSON.stringify([event.weights, event.prompt, event.image_index]);
    run.previews.delete(place);
    run.step = Math.max(run.step, event.training_step);
    if (!event.final) run.previews.set(place, event);
    else {
      if (!run.finals.has(event.training_step)) run.finals.set(event.training_step, new Map());
      run.finals.get(event.training_step).set(place, event);
    }
    stale.add(run);
  },
};

function figure(parent, event, caption) {
  const made = make("figure", parent);
  const image = make("img", made);
  image.alt = event.prompt;
  image.src = "picture/" + Number(event.number);
  make("figcaption", made, caption);
}

function byPrompt(events) {
  const rows = new Map();
  for (const event of events) {
    const key = event.weights === "live" ? event.prompt : event.prompt + " (" + event.weights + ")";
    if (!rows.has(key)) rows.set(key, []);
    rows.get(key).push(event);
  }
  for (const row of rows.values()) row.sort((a, b) => a.image_index - b.image_index);
  return rows;
}

function strips(parent, events, caption) {
  parent.replaceChildren();
  for (const [prompt, row] of byPrompt(events)) {
    const item = make("div", parent);
    make("p", item, prompt, "prompt");
    const strip = make("div", item, undefined, "row");
    for (const event of row) figure(strip, event, caption(event));
  }
}

function draw(run) {
  run.about.textContent = "step " + run.step.toLocaleString("en");
  strips(run.forming, run.previews.values(), (e) => "forming: " + e.sampler_step + " of " + e.total_steps);
  const steps = [...run.finals.keys()].sort((a, b) => b - a);
  run.select.replaceChildren();
  for (const step of [NEWEST, ...steps]) {
    const option = make("option", run.select, step === 0 ? "0 (the base model)" : String(step));
    option.value = String(step);
  }
  run.select.value = run.chosen;
  const shown = run.finals.get(run.chosen === NEWEST ? steps[0] : Number(run.chosen));
  strips(run.grid, shown ? shown.values() : [], (e) => "step " + e.training_step + ", seed " + e.seed);
  run.curves.replaceChildren();
  for (const name of [...run.series.keys()].sort(byWeight)) curve(run.curves, name, run.series.get(name));
}

function byWeight(a, b) {
  const weight = (name) => name.includes("eval/loss_") ? 2 : ["train/loss", "eval/loss"].includes(name) ? 0 : 1;
  return weight(a) - weight(b) || a.localeCompare(b);
}

function curve(parent, name, points) {
  const known = points.filter(([, value]) => value !== null);
  if (!known.length) return;
  const [left, right] = [known[0][0], known[known.length - 1][0]];
  let [low, high] = [Infinity, -Infinity];
  for (const [, value] of known) { low = Math.min(low, value); high = Math.max(high, value); }
  const at = ([x, y]) => (400 * (x - left) / (right - left || 1)).toFixed(1) + " " + (115 - 110 * (y - low) / (high - low || 1)).toFixed(1);
  const made = make("figure", parent);
  const svg = made.appendChild(document.createElementNS("http://www.w3.org/2000/svg", "svg"));
  svg.setAttribute("viewBox", "0 0 400 120");
  const path = svg.appendChild(document.createElementNS("http://www.w3.org/2000/svg", "path"));
  path.setAttribute("d", "M" + known.map(at).join("L") + (known.length === 1 ? "l8 0" : ""));
  const last = known[known.length - 1][1];
  make("figcaption", made, name + ": " + last.toPrecision(4) + " (" + low.toPrecision(3) + " to " + high.toPrecision(3) + ")");
}

function frame() {
  for (const run of stale) draw(run);
  stale.clear();
}
setInterval(frame, 250);

function connect() {
  const state = document.getElementById("state");
  const source = new EventSource(location.origin + "/events");
  source.onopen = () => {
    for (const run of runs.values()) run.section.remove(); // what comes first is everything
    runs.clear();
    state.textContent = "live";
    state.className = "";
  };
  source.onerror = () => { state.textContent = "connection lost; trying again"; state.className = "lost"; };
  source.onmessage = (message) => {
    const event = JSON.parse(message.data);
    take[event.kind](event);
  };
}
connect();
