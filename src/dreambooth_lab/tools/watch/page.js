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
  const run = {name, step: 0, series: new Map(), plots: new Map(), finals: new Map(), previews: new Map(), chosen: NEWEST, section};
  run.about = make("p", section, "", "about");
  run.forming = make("div", section, undefined, "prompts");
  const head = make("h3", section, "Images at step ");
  run.select = make("select", head);
  run.select.setAttribute("aria-label", "training step");
  run.select.addEventListener("change", () => { run.chosen = run.select.value; draw(run); });
  run.grid = make("div", section, undefined, "prompts");
  make("h3", section, "Metrics");
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
  for (const name of [...run.series.keys()].sort(byWeight)) curve(run, name, run.series.get(name));
}

function byWeight(a, b) {
  const weight = (name) => name.includes("eval/loss_") ? 2 : ["train/loss", "eval/loss"].includes(name) ? 0 : 1;
  return weight(a) - weight(b) || a.localeCompare(b);
}

const dark = matchMedia("(prefers-color-scheme: dark)");

function curve(run, name, points) {
  const known = points.filter(([, value]) => value !== null);
  if (!known.length) return;
  if (!run.plots.has(name)) {
    const figure = make("figure", run.curves);
    run.plots.set(name, {figure, plot: make("div", figure, undefined, "plot"), caption: make("figcaption", figure), type: "linear"});
  }
  const shown = run.plots.get(name), {figure, plot, caption} = shown;
  run.curves.append(figure); // in the order of the names
  const values = known.map(([, value]) => value);
  const [last, low, high] = [values[values.length - 1], Math.min(...values), Math.max(...values)];
  caption.textContent = name + ": " + last.toPrecision(4) + " (" + low.toPrecision(3) + " to " + high.toPrecision(3) + ")";
  plot.setAttribute("role", "img");
  plot.setAttribute("aria-label", caption.textContent);
  const few = known.length < 30;
  const line = {x: known.map(([step]) => step), y: values, mode: few ? "lines+markers" : "lines", line: {color: "#0072b2", width: 2},
                hovertemplate: "%{y:.5g}<br>step %{x:,}<extra></extra>"};
  const [text, grid] = dark.matches ? ["#ddd", "#444"] : ["#333", "#ddd"];
  const axis = {gridcolor: grid, linecolor: grid, zeroline: false, automargin: true, exponentformat: "power"};
  const layout = {
    margin: {l: 48, r: 8, t: 26, b: 40}, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: {size: 11, color: text},
    xaxis: {...axis, title: {text: "optimiser steps", standoff: 4}}, yaxis: {...axis, type: shown.type}, uirevision: name, hovermode: "closest",
    updatemenus: low > 0 ? [scales()] : [],
  };
  const fresh = !plot.on;
  Plotly.react(plot, [line], layout, {responsive: true, displaylogo: false, displayModeBar: false});
  if (!fresh) return;
  new ResizeObserver(() => Plotly.Plots.resize(plot)).observe(plot);
  plot.on("plotly_relayout", (changed) => { shown.type = changed["yaxis.type"] ?? shown.type; });
}

function scales() { // the switch of the y axis
  const button = (type) => ({label: type, method: "relayout", args: [{"yaxis.type": type}]});
  return {type: "buttons", direction: "left", buttons: [button("linear"), button("log")], x: 1, xanchor: "right", y: 1.02,
          yanchor: "bottom", pad: {t: 0, b: 2}, font: {size: 10, color: "#333"}, bgcolor: "#ddd"};
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
dark.addEventListener("change", () => { for (const run of runs.values()) stale.add(run); });
connect();
