"use strict";
const DATA = JSON.parse(document.getElementById("data").textContent);
const FONT = {family: getComputedStyle(document.body).fontFamily, size: 13, color: "#1a1a1a"};
const AXIS = {gridcolor: "#ebebeb", zeroline: false, linecolor: "#999", ticks: "outside", tickcolor: "#999"};
const LAYOUT = {font: FONT, margin: {l: 64, r: 16, t: 34, b: 52}, hovermode: "closest", plot_bgcolor: "#fff",
                paper_bgcolor: "#fff",
                hoverlabel: {align: "left", bgcolor: "#fff", bordercolor: "#999", font: {...FONT, size: 12}}};
const CONFIG = {displaylogo: false, responsive: true, showSendToCloud: false, plotlyServerURL: "",   // nothing leaves
                modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"]};
const escaped = text => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const number = (value, digits = 4) => value === undefined || value === null ? "" : value.toFixed(digits);

// ---- curves

const state = {loss: DATA.curves.losses.length ? DATA.curves.losses[0][0] : null, x: "step", seeds: false,
               tuning: !DATA.curves.groups.some(group => !group.tuning), logx: false, logy: false};

// What is beside a point: every loss there is at its step.
function others(curveOf, step, which) {
  return DATA.curves.losses.filter(([loss]) => loss !== which).map(([loss, name]) => {
    const at = curveOf(loss), i = at ? at.step.indexOf(step) : -1;
    return i < 0 ? "" : `<br>${name} ${number(at.loss[i])}`;
  }).join("");
}

function traces() {
  const found = [], groups = DATA.curves.groups.filter(group => state.tuning || !group.tuning);
  const crowded = groups.length > 4;
  for (const group of groups) {
    const band = group.band[state.loss], many = group.seeds.length;
    const common = {type: "scatter", legendgroup: group.key + group.tuning, name: escaped(group.label)};
    const head = `<b>${escaped(group.label)}</b>` + (group.tuning ? " (search)" : "");
    const tail = group.words.map(each => `<br>${escaped(each)}`).join("");
    const name = escaped(DATA.curves.losses.find(([loss]) => loss === state.loss)[1]);
    let named = false;
    if (band && !state.seeds) {
      const x = band[state.x];
      if (band.low) {
        found.push({...common, x: [...x, ...[...x].reverse()], y: [...band.high, ...[...band.low].reverse()],
                    fill: "toself", fillcolor: group.colour + (crowded ? "14" : "29"), line: {width: 0}, mode: "lines",
                    hoverinfo: "skip", showlegend: false, meta: "band"});
      }
      found.push({...common, x, y: band.loss, meta: "mean", mode: x.length > 40 ? "lines" : "lines+markers",
                  line: {color: group.colour, dash: group.dash, width: group.tuning ? 1.2 : 2}, marker: {size: 5},
                  hovertemplate: "%{text}<extra></extra>", text: band.step.map((step, i) =>
                    `${head}<br>step ${step}, ${number(band.seconds[i], 1)} s<br>${name} ${number(band.loss[i])}` +
                    (band.low ? ` (95%: ${number(band.low[i])} to ${number(band.high[i])})` : "") + `, n = ${band.n}` +
                    others(loss => group.band[loss], step, state.loss) + tail)});
      continue;
    }
    for (const seed of group.seeds) {
      const line = seed[state.loss];
      if (!line.step.length) continue;
      found.push({...common, x: line[state.x], y: line.loss, mode: "lines", meta: "seed", showlegend: !named,
                  line: {color: group.colour, dash: group.dash, width: 1}, opacity: many > 1 ? .8 : 1,
                  hovertemplate: "%{text}<extra></extra>", text: line.step.map((step, i) =>
                    `${head}, seed ${seed.seed}<br>step ${step}, ${number(line.seconds[i], 1)} s<br>` +
                    `${name} ${number(line.loss[i])}` + others(loss => seed[loss], step, state.loss) +
                    `<br>trial ${escaped(seed.trial.slice(0, 8))}, ${escaped(seed.status)}` + tail)});
      named = true;
    }
  }
  return found;
}

// Losses after the first fifth of the run, from whose start all fall; undefined where that leaves nothing.
function later(drawn) {
  const end = Math.max(...drawn.map(trace => trace.x.at(-1)).filter(Number.isFinite));
  const losses = drawn.filter(trace => trace.meta !== "band")
    .flatMap(trace => trace.y.filter((_, i) => trace.x[i] >= .2 * end));
  const low = losses.reduce((a, b) => Math.min(a, b), Infinity);
  const high = losses.reduce((a, b) => Math.max(a, b), -Infinity);
  return high > low ? [low - .08 * (high - low), high + .05 * (high - low)].map(y => Math.max(y, low / 2)) : undefined;
}

function curves() {
  const name = DATA.curves.losses.find(([loss]) => loss === state.loss)[1];
  const count = DATA.curves.groups.filter(group => state.tuning || !group.tuning).length;
  const drawn = traces(), range = state.logx ? undefined : later(drawn);
  Plotly.react("curves", drawn, {
    ...LAYOUT, height: 520,
    uirevision: state.x + state.loss + state.logx + state.logy, showlegend: true,
    legend: {itemsizing: "constant", font: {size: count > 14 ? 11 : 12}, traceorder: "normal"},
    xaxis: {...AXIS, title: {text: state.x === "step" ? "step" : "seconds on the clock"},
            type: state.logx ? "log" : "linear"},
    yaxis: {...AXIS, title: {text: `${name} (nats per token)`}, type: state.logy ? "log" : "linear",
            range: state.logy && range ? range.map(Math.log10) : range}}, CONFIG);
}

// Buttons: [key of the state, value or null for on and off, label]
function controls() {
  const rows = [DATA.curves.losses.map(([loss, name]) => ["loss", loss, name]),
                [["x", "step", "steps"], ["x", "seconds", "seconds"]],
                [["seeds", false, "mean and interval"], ["seeds", true, "every seed"]],
                [["logx", null, "log x"], ["logy", null, "log y"]]];
  if (new Set(DATA.curves.groups.map(group => group.tuning)).size > 1) rows.push([["tuning", null, "search trials"]]);
  const place = document.getElementById("controls"), all = [];
  const mark = () => all.forEach(([button, key, value]) =>
    button.setAttribute("aria-pressed", value === null ? state[key] : state[key] === value));
  for (const row of rows) {
    const set = place.appendChild(document.createElement("div"));
    set.setAttribute("role", "group");
    for (const [key, value, label] of row) {
      const button = set.appendChild(document.createElement("button"));
      button.type = "button";
      button.id = `set-${key}` + (value === null ? "" : `-${value}`);
      button.textContent = label;
      button.addEventListener("click", () => { state[key] = value === null ? !state[key] : value; mark(); curves(); });
      all.push([button, key, value]);
    }
  }
  mark();
}

if (state.loss) {
  controls();
  curves();
} else {
  document.getElementById("curves").textContent = "No trial has a log yet.";
}
for (const figure of DATA.figures) {
  const {xaxis = {}, yaxis = {}, ...more} = figure.layout;
  Plotly.newPlot(figure.id, figure.data, {
    ...LAYOUT, height: figure.height || 440,
    xaxis: {...AXIS, ...xaxis}, yaxis: {...AXIS, ...yaxis}, ...more}, CONFIG);
}

// ---- tables: a click on a column's head sorts by it, another the other way; what has no value stays last

function sortBy(head) {
  const table = head.closest("table"), body = table.tBodies[0], column = head.cellIndex;
  const up = head.getAttribute("aria-sort") !== "ascending";
  for (const each of table.tHead.rows[0].cells) each.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const value = row => {
    const {value, text} = row.cells[column].dataset;
    if (value === undefined) return text || null;
    return value === "" || Number.isNaN(Number(value)) ? null : Number(value);
  };
  const compare = (a, b) => typeof a === "number" && typeof b === "number" ? a - b
    : typeof a !== typeof b ? (typeof a === "number" ? -1 : 1) : a.localeCompare(b, undefined, {numeric: true});
  const rows = [...body.rows].map(row => [value(row), row]);              // sort() is stable
  rows.sort(([a], [b]) => a === null || b === null ? (a === null) - (b === null) : (up ? 1 : -1) * compare(a, b));
  body.append(...rows.map(([, row]) => row));
}
document.querySelectorAll("table.sortable th").forEach(head => head.addEventListener("click", () => sortBy(head)));

const filter = document.getElementById("filter");
filter.addEventListener("input", () => {
  const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
  const rows = [...document.querySelector("#trials").tBodies[0].rows];
  for (const row of rows) row.hidden = !words.every(word => row.textContent.toLowerCase().includes(word));
  const left = rows.filter(row => !row.hidden).length;
  document.getElementById("count").textContent = words.length ? `${left} of ${rows.length}` : "";
});
