"use strict";
// The report's page. Everything it shows is in #data (see report.py, collect) and in the chunks.

const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const NUMBER = new Intl.NumberFormat("en", { maximumSignificantDigits: 4 });
const TICK = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });
const percent = (share) => (share == null ? "–" : `${(100 * share).toFixed(1)}%`);
const format = (value) =>
  value == null ? "–"
  : typeof value !== "number" ? String(value)
  : Number.isInteger(value) ? value.toLocaleString("en")
  : value !== 0 && Math.abs(value) < 1e-3 ? value.toExponential(1) : NUMBER.format(value);
const duration = (s) => (s < 120 ? `${Math.round(s)} s` : s < 7200 ? `${Math.round(s / 60)} min` : `${(s / 3600).toFixed(1)} h`);

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child != null));
  return node;
}

function table(columns, rows) {
  const head = make("tr", {}, ...columns.map((column) => make("th", { scope: "col" }, column)));
  const body = rows.map((cells) =>
    make("tr", {}, ...cells.map((cell) =>
      cell instanceof Node || typeof cell !== "object" || cell === null
        ? make("td", {}, cell ?? "–")
        : make("td", { class: "text" }, cell.text))));
  return make("table", {}, make("thead", {}, head), make("tbody", {}, ...body));
}

// --- State that survives a reload: filters and the chosen rollout, in the address ---------------

const state = new URLSearchParams(location.hash.slice(1));
function remember(name, value) {
  if (value) state.set(name, value);
  else state.delete(name);
  history.replaceState(null, "", `#${state}`);
}

// --- Header, recipe, tables ---------------------------------------------------------------------

function showHeader() {
  $("name").textContent = data.name;
  $("state").textContent = data.written ? `${data.running ? "running, " : ""}written ${data.written}` : "the first run in full lines, the second (B) in dashes";
  for (const section of document.querySelectorAll("main > section")) {
    if (section.hidden) continue;
    const title = section.querySelector("h2").textContent.split(" ")[0];
    $("sections").append(make("a", { href: "#", onclick: (event) => {
      event.preventDefault();
      section.scrollIntoView();
    } }, title));
  }
  const read = () => { try { return localStorage.getItem("r1pipe-theme"); } catch { return null; } };
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const apply = () => {
    document.documentElement.dataset.theme = read() ?? (dark.matches ? "dark" : "light");
  };
  dark.addEventListener("change", apply);
  apply();
  $("theme").addEventListener("click", () => {
    const other = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
    try { localStorage.setItem("r1pipe-theme", other); } catch { /* not kept, then */ }
    document.documentElement.dataset.theme = other;
  });
}

function showDifferences() {
  if (!data.differences?.rows.length) return hide("differences");
  const { columns, rows } = data.differences;
  $("differences-table").append(table(columns, rows.map(([stage, ...rest]) => [stage, ...rest.map((text) => ({ text }))])));
}

function showRecipe() {
  if (!data.stages.length) return hide("recipe");
  const measured = new Map(data.summary.map((entry) => [entry.stage, entry]));
  for (const stage of data.stages) {
    const entry = measured.get(stage.name);
    const from = stage.parents.length ? `from ${[...new Set(stage.parents)].join(", ")}` : "";
    const wall = stage.facts.wall_s == null ? stage.state : duration(stage.facts.wall_s);
    $("flow").append(make("li", { class: stage.state },
      make("b", {}, stage.name, stage.name === stage.kind ? "" : ` (${stage.kind})`),
      entry && make("span", { class: "score" }, percent(entry.pass_at_1)),
      entry && interval(entry),
      entry && make("span", { class: "note" }, `${percent(entry.ci_low)} – ${percent(entry.ci_high)}`),
      make("div", { class: "note" }, [wall, from].filter(Boolean).join("; "))));
  }
}

function interval(entry) {
  const low = 100 * entry.ci_low, width = 100 * (entry.ci_high - entry.ci_low);
  return make("div", { class: "interval", role: "img",
    "aria-label": `95% interval ${percent(entry.ci_low)} to ${percent(entry.ci_high)}` },
    make("i", { style: `left:${low}%;width:${width}%` }));
}

function showAccuracy() {
  if (!data.summary.length) return hide("accuracy");
  const calls = data.summary.some((e) => e.tool_calls || e.malformed_calls) ? ["calls", "calling", "malformed"] : [];
  const columns = ["checkpoint", "data", "pass@1", "95% interval", "pass@k", "maj@k", "format", "tokens", "truncated", ...calls, "overlap", "difference (paired 95% interval)"];
  $("accuracy-table").append(table(columns, data.summary.map((e) => [
    e.stage, e.dataset, percent(e.pass_at_1), `${percent(e.ci_low)} – ${percent(e.ci_high)}`,
    percent(e.pass_at_k), percent(e.maj_at_k), percent(e.format_rate), format(e.mean_tokens),
    percent(e.truncated), ...(calls.length ? [format(e.tool_calls), percent(e.calling), format(e.malformed_calls)] : []),
    e.overlap == null ? "unknown" : percent(e.overlap), difference(e.compared_with)])));
  const e = data.summary[0];
  $("protocol").textContent = `${e.num_problems} problems × ${e.num_samples} samples, T = ${e.temperature}, ` +
    `top-p = ${e.top_p}, k = ${e.k}; interval clustered by problem; overlap with training data`;
}

function difference(compared) {
  if (!compared) return "–";
  const points = (share) => `${share > 0 ? "+" : ""}${(100 * share).toFixed(1)}`;
  return `${points(compared.difference)} (${points(compared.ci_low)} – ${points(compared.ci_high)}) to ${compared.stage}`;
}

function showEvents() {
  if (!data.events.length) return hide("events");
  $("events-table").append(table(["stage", "step", "check", "value", "limit", "action", "what"],
    data.events.map((e) => [e.stage, stepLink(e.stage, e.step), e.check, format(e.value), format(e.limit), e.action,
      { text: [e.says, e.hint].filter(Boolean).join("; ") }])));
}

function stepLink(stage, step) {
  if (!data.rollouts.sources.includes(stage)) return String(step);
  return make("a", { href: "#rollouts", onclick: (event) => {
    event.preventDefault();
    fill({ source: stage, step_from: step, step_to: step });
    $("rollouts").scrollIntoView();
  } }, String(step));
}

function showCost() {
  const rows = Array.isArray(data.cost) ? data.cost : data.cost?.stages;
  if (!rows?.length) return hide("cost");
  const columns = { stage: "stage", wall_s: "wall, s", lost_s: "lost, s", device_hours: "device-hours", idle_share: "idle",
    tokens_sampled: "tokens sampled", tokens_trained: "tokens trained", cost: "cost", judge: "judge",
    points_gained: "points of pass@1", cost_per_point: "cost a point" };
  const shown = Object.keys(columns).filter((key) => rows.some((row) => row[key] != null));
  const cell = (row, key) =>
    key === "device_hours" && row.unit ? `${format(row[key])} ${row.unit}`
    : key.startsWith("cost") && row[key] != null ? `${format(row[key])} ${row.currency ?? ""}`
    : key === "judge" && row.judge ? `${format(row.judge.requests)} requests, ${format(row.judge.cost)} ${row.currency ?? ""}`
    : key === "idle_share" ? percent(row[key]) : format(row[key]);
  $("cost-table").append(table(shown.map((key) => columns[key]), rows.map((row) => shown.map((key) => cell(row, key)))));
}

function hide(section) { $(section).hidden = true; }

// --- Curves -------------------------------------------------------------------------------------

const CHARTS = [
  ["reward", (n) => n === "reward" || (n.startsWith("rewards/") && n.endsWith("/mean"))],
  ["divergence from the teacher, nats per token", (n) => n === "divergence" || n.startsWith("divergence/")],
  ["tokens per completion", (n) => n === "completions/mean_length"],
  ["tool calls per episode; share of episodes that call", (n) => ["tool_calls", "malformed_calls", "calling"].includes(n.replace("episodes/", ""))],
  ["share of episodes that a limit or an error ended", (n) => n.startsWith("episodes/ended_by_")],
  ["entropy, nats", (n) => n === "entropy"],
  ["KL to the reference", (n) => n === "kl"],
  ["|log-prob difference|, sampler and trainer", (n) => n.startsWith("sampler/logprob_diff") || n === "sync/logprob_diff_mean", { log: true }],
  ["clipped share", (n) => n.startsWith("clip_ratio/")],
  ["share of rollouts", (n) => ["completions/truncated", "reward_unjudged", "groups_without_spread"].includes(n)],
  ["steps that tokens are behind the trainer; batches waiting", (n) => n.startsWith("staleness/")],
  ["tokens a second", (n) => n.startsWith("tokens_per_s/")],
  ["MFU: share of the GPUs' peak", (n) => n === "mfu"],
  ["seconds", (n) => n.startsWith("seconds/")],
  ["idle share of the step", (n) => n.startsWith("idle/")],
  ["loss", (n) => n === "loss"],
  ["gradient norm", (n) => n === "grad_norm"],
  ["expert load: max / mean − 1", (n) => n === "experts/max_violation"],
];

function showCurves() {
  if (!data.curves.length) return hide("curves");
  for (const curves of data.curves) {
    const names = Object.keys(curves.series);
    const box = make("div", { class: "charts" });
    const shown = new Set(["experts/entropy"]);
    for (const [title, wanted, options] of CHARTS) {
      const chosen = names.filter((name) => wanted(name.replace(/^B: /, "")) && curves.series[name].some((v) => v != null));
      chosen.forEach((name) => shown.add(name));
      if (chosen.length) box.append(chart(title, curves, chosen, options));
    }
    const rest = names.filter((name) => !shown.has(name) && new Set(curves.series[name].filter((v) => v != null)).size > 1);
    const more = make("div", { class: "charts" });
    const others = rest.length && make("details", { ontoggle: () => {
      if (!more.children.length) rest.forEach((name) => more.append(chart(name, curves, [name])));
    } }, make("summary", {}, `${rest.length} more`), more);
    $("charts").append(make("h3", {}, `${curves.stage}, ${curves.steps.at(-1)} steps`), box);
    if (others) $("charts").append(others);
  }
}

const SVG = "http://www.w3.org/2000/svg";
function draw(tag, attributes, text) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text != null) node.textContent = text;
  return node;
}

const formatTick = (value) => (value !== 0 && Math.abs(value) < 1e-2 ? value.toExponential(1) : TICK.format(value));

// The last part of each name; all of it where two would be the same.
function shortNames(names) {
  const short = names.map((name) => name.replace(/^(.*)rewards\/(.*)\/mean$/, (_, before, path) => before + path.split(".").at(-1)).replace(/^(B: )?.*\//, "$1"));
  return short.map((name, i) => (short.indexOf(name) === short.lastIndexOf(name) ? name : names[i]));
}

function chart(title, curves, names, { log = false } = {}) {
  const width = 320, height = 150, left = 44, right = 6, top = 8, bottom = 18;
  const steps = curves.steps;
  const scale = log ? (v) => (v > 0 ? Math.log10(v) : null) : (v) => v;
  const points = names.map((name) => curves.series[name].map((v) => (v == null ? null : scale(v))));
  const values = points.flat().filter((v) => v != null);
  let low = Math.min(...values), high = Math.max(...values);
  if (!values.length) [low, high] = [0, 1];
  if (low === high) [low, high] = [low - (Math.abs(low) || 1) / 2, high + (Math.abs(high) || 1) / 2];
  const last = Math.max(steps.at(-1), steps[0] + 1);
  const x = (step) => left + ((step - steps[0]) / (last - steps[0])) * (width - left - right);
  const y = (v) => height - bottom - ((v - low) / (high - low)) * (height - top - bottom);
  const labels = shortNames(names);
  const ends = names.map((name, i) => `${labels[i]} from ${format(curves.series[name].find((v) => v != null))} to ${format(curves.series[name].findLast((v) => v != null))}`);
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${title}: ${ends.join(", ")}`, preserveAspectRatio: "none" });
  for (const value of [low, (low + high) / 2, high]) {
    svg.append(draw("line", { x1: left, x2: width - right, y1: y(value), y2: y(value), stroke: "var(--line)" }));
    svg.append(draw("text", { x: left - 4, y: y(value) + 3, "text-anchor": "end" }, formatTick(log ? 10 ** value : value)));
  }
  svg.append(draw("text", { x: left, y: height - 4 }, steps[0]), draw("text", { x: width - right, y: height - 4, "text-anchor": "end" }, `step ${steps.at(-1)}`));
  for (const event of data.events.filter((e) => e.stage === curves.stage && e.step >= steps[0])) {
    const mark = draw("line", { x1: x(event.step), x2: x(event.step), y1: top, y2: height - bottom, stroke: "var(--wrong)", "stroke-dasharray": "2 3" });
    mark.append(draw("title", {}, `step ${event.step}: ${event.check}`));
    svg.append(mark);
  }
  points.forEach((series, number) => {
    let pen = false;
    const path = series.map((v, i) => {
      if (v == null) return "";
      const command = `${pen ? "L" : "M"}${x(steps[i]).toFixed(1)} ${y(v).toFixed(1)}`;
      pen = true;
      return command;
    }).join("");
    svg.append(draw("path", { d: path, fill: "none", stroke: colorOf(names, number), "stroke-width": 1.6, "stroke-linejoin": "round", "vector-effect": "non-scaling-stroke", ...(dashed(names, number) && { "stroke-dasharray": "5 3" }) }));
    if (series.filter((v) => v != null).length === 1) {
      const i = series.findIndex((v) => v != null);
      svg.append(draw("circle", { cx: x(steps[i]), cy: y(series[i]), r: 2.5, fill: colorOf(names, number) }));
    }
  });
  const cursor = draw("line", { y1: top, y2: height - bottom, stroke: "var(--quiet)", visibility: "hidden" });
  svg.append(cursor);
  const legend = make("div", { class: "legend" });
  const tell = (i) => {
    legend.replaceChildren(...names.map((name, number) => make("span",
      { style: `--c: ${colorOf(names, number)}`, class: dashed(names, number) ? "dashed" : null },
      `${labels[number]} ${i == null ? "" : format(curves.series[name][i])}`)),
      ...(i == null ? [] : [`step ${steps[i]}`]));
  };
  tell(null);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const step = steps[0] + (((event.clientX - box.left) / box.width) * width - left) / (width - left - right) * (last - steps[0]);
    let i = steps.findIndex((s) => s >= step);
    if (i < 0) i = steps.length - 1;
    if (i > 0 && step - steps[i - 1] < steps[i] - step) i -= 1;
    cursor.setAttribute("x1", x(steps[i]));
    cursor.setAttribute("x2", x(steps[i]));
    cursor.setAttribute("visibility", "visible");
    tell(i);
  });
  svg.addEventListener("pointerleave", () => { cursor.setAttribute("visibility", "hidden"); tell(null); });
  return make("figure", {}, make("figcaption", {}, title), svg, legend);
}

// A second run beside the first is drawn in dashes, in the first one's colours.
const dashed = (names, number) => names[number].startsWith("B: ");
function colorOf(names, number) {
  const first = names.indexOf(names[number].replace(/^B: /, ""));
  return `var(--c${(first < 0 ? number : first) % 7})`;
}

// --- Timeline of a step ------------------------------------------------------------------------

const WORK = ["sampling", "scoring", "update", "sync"];

function showTimelines() {
  if (!data.timelines.length) return hide("timeline");
  for (const { stage, steps } of data.timelines) {
    const number = make("input", { type: "range", min: 0, max: steps.length - 1, value: steps.length - 1, "aria-label": `step of ${stage}` });
    const caption = make("figcaption"), drawing = make("div");
    const show = () => {
      const step = steps[Number(number.value)];
      caption.textContent = `${stage}, step ${step.step}: ${format(step.seconds)} s`;
      drawing.replaceChildren(drawTimeline(step), ...(step.behind ? [drawStaleness(step.behind)] : []));
    };
    number.addEventListener("input", show);
    show();
    const legend = make("div", { class: "legend" }, ...WORK.map((what, i) => make("span", { style: `--c: var(--c${i})` }, what)));
    $("timelines").append(make("figure", {}, caption, drawing, legend, steps.length > 1 ? number : null));
  }
}

function drawTimeline({ seconds, idle, rows }) {
  const lanes = Object.keys(idle), left = 80, right = 70, width = 900, high = 24, height = high * lanes.length + 18;
  const x = (s) => left + (Math.max(0, Math.min(s, seconds)) / seconds) * (width - left - right);
  const svg = draw("svg", { class: "timeline", viewBox: `0 0 ${width} ${height}`, role: "img",
    "aria-label": lanes.map((lane) => `${lane} idle ${percent(idle[lane])}`).join(", ") });
  lanes.forEach((lane, i) => svg.append(
    draw("text", { x: left - 6, y: i * high + 15, "text-anchor": "end" }, lane.replace("_", " ")),
    draw("rect", { x: left, y: i * high + 3, width: width - left - right, height: high - 6, fill: "var(--line)", opacity: 0.5 }),
    draw("text", { x: width - right + 6, y: i * high + 15 }, `idle ${percent(idle[lane])}`)));
  for (const [lane, what, begin, end] of rows) {
    const span = draw("rect", { x: x(begin).toFixed(1), y: lanes.indexOf(lane) * high + 3, width: Math.max(0.5, x(end) - x(begin)).toFixed(1),
      height: high - 6, fill: `var(--c${WORK.indexOf(what)})` });
    span.append(draw("title", {}, `${lane.replace("_", " ")}: ${what}, ${format(begin)} to ${format(end)} s`));
    svg.append(span);
  }
  for (const part of [0, 0.25, 0.5, 0.75, 1])
    svg.append(draw("text", { x: x(part * seconds), y: height - 3, "text-anchor": "middle" }, `${formatTick(part * seconds)} s`));
  return svg;
}

function drawStaleness(behind) {
  const tokens = behind.reduce((sum, n) => sum + n, 0), shares = behind.map((n) => n / tokens);
  const left = 170, right = 70, width = 900, high = 18, long = (share) => share * (width - left - right);
  const svg = draw("svg", { class: "timeline", viewBox: `0 0 ${width} ${high * behind.length + 6}`, role: "img",
    "aria-label": `tokens by steps behind the trainer: ${shares.map((share, steps) => `${steps} behind: ${percent(share)}`).join(", ")}` });
  shares.forEach((share, steps) => svg.append(
    draw("text", { x: left - 6, y: steps * high + 15, "text-anchor": "end" }, `tokens ${steps} step${steps === 1 ? "" : "s"} behind`),
    draw("rect", { x: left, y: steps * high + 4, width: long(share), height: high - 5, fill: "var(--c0)" }),
    draw("text", { x: left + 6 + long(share), y: steps * high + 15 }, percent(share))));
  return svg;
}

// --- Expert load --------------------------------------------------------------------------------

function heat(share) {
  // Blue for idle, white for even, red for twice the load or more.
  const t = Math.min(2, share) - 1, fade = 1 - Math.abs(t);
  return t < 0 ? [60 + 185 * fade, 105 + 140 * fade, 215 + 30 * fade] : [205 + 40 * fade, 60 + 185 * fade, 45 + 200 * fade];
}

function paint(canvas, columns, rows, share) {
  canvas.width = columns;
  canvas.height = rows;
  const context = canvas.getContext("2d"), image = context.createImageData(columns, rows);
  for (let row = 0; row < rows; row += 1)
    for (let column = 0; column < columns; column += 1)
      image.data.set([...heat(share(row, column)), 255], 4 * (row * columns + column));
  context.putImageData(image, 0, 0);
}

function showExperts() {
  if (!data.experts.length) return hide("experts");
  paint($("scale"), 60, 1, (_, column) => column / 29.5);
  $("scale").style.cssText = "width:120px;height:12px;margin:0 .4em";
  for (const { stage, steps, layers, load } of data.experts)
    layers.forEach((layer, number) => {
      const canvas = make("canvas", { role: "img", "aria-label": `${stage}, layer ${layer}: load of ${load[number].length} experts over ${steps.length} steps` });
      paint(canvas, steps.length, load[number].length, (row, column) => load[number][row][column]);
      canvas.style.height = `${Math.max(60, Math.min(260, 12 * load[number].length))}px`;
      const caption = make("figcaption", {}, `${stage}, layer ${layer}`);
      const note = make("div", { class: "legend" }, `steps ${steps[0]} to ${steps.at(-1)}`);
      canvas.addEventListener("pointermove", (event) => {
        const box = canvas.getBoundingClientRect();
        const column = Math.min(steps.length - 1, Math.floor(((event.clientX - box.left) / box.width) * steps.length));
        const row = Math.min(load[number].length - 1, Math.floor(((event.clientY - box.top) / box.height) * load[number].length));
        if (row >= 0 && column >= 0) note.textContent = `step ${steps[column]}, expert ${row}: ${format(load[number][row][column])}`;
      });
      $("heatmaps").append(make("figure", {}, caption, canvas, note));
    });
}

// --- Rollouts -----------------------------------------------------------------------------------

const PAGE_SIZE = 100;
const store = data.rollouts;
let problems = [], column = {}, found = [], page = 0, chosen = -1, beside = -1, thinkingOpen = false;
const opened = new Map();

async function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

async function readText(number) {
  const chunk = Math.floor(number / store.chunk);
  if (!opened.has(chunk)) opened.set(chunk, unpack($(`chunk-${chunk}`).textContent));
  return (await opened.get(chunk))[number % store.chunk];
}

const outcomeOf = (i) => (column.right[i] == null ? "unjudged" : column.right[i] >= 1 ? "right" : "wrong");
const placeOf = (i) => `${store.sources[column.source[i]]}${column.step[i] ? `, step ${column.step[i]}` : ""}`;

async function showRollouts() {
  if (!store.kept) return hide("rollouts");
  const index = await unpack(store.index);
  problems = index.problems;
  column = index.columns;
  const form = $("filters");
  form.source.append(make("option", { value: "" }, "everywhere"), ...store.sources.map((name) => make("option", { value: name }, name)));
  for (const field of form.elements) if (field.name && state.has(field.name)) field.value = state.get(field.name);
  form.addEventListener("input", () => filter(0));
  form.addEventListener("reset", () => setTimeout(() => filter(0)));
  form.addEventListener("submit", (event) => event.preventDefault());
  $("previous").addEventListener("click", () => turn(page - 1));
  $("next").addEventListener("click", () => turn(page + 1));
  $("list").addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1, j: 1, k: -1 }[event.key];
    if (step) { event.preventDefault(); move(step); }
  });
  document.addEventListener("keydown", (event) => {
    if (event.target.matches("input, select, textarea") || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "/") { event.preventDefault(); form.search.focus(); }
    if (event.key === "t") { thinkingOpen = !thinkingOpen; document.querySelectorAll("details.thinking").forEach((d) => { d.open = thinkingOpen; }); }
  });
  filter(Number(state.get("page") ?? 0), Number(state.get("rollout") ?? -1));
}

function fill(values) {
  const form = $("filters");
  form.reset();
  for (const [name, value] of Object.entries(values)) form.elements[name].value = value;
  filter(0);
}

function filter(toPage, keep = -1) {
  const form = $("filters");
  for (const field of form.elements) if (field.name) remember(field.name, field.value);
  const number = (name) => (form.elements[name].value === "" ? null : Number(form.elements[name].value));
  const [stepFrom, stepTo, rewardFrom, rewardTo] = ["step_from", "step_to", "reward_from", "reward_to"].map(number);
  const source = store.sources.indexOf(form.source.value), outcome = form.outcome.value;
  const words = form.search.value.trim().toLowerCase();
  const matching = words && new Set(problems.flatMap((parts, p) => (parts.some((part) => String(part ?? "").toLowerCase().includes(words)) ? [p] : [])));
  found = [];
  for (let i = 0; i < store.kept; i += 1) {
    if (source >= 0 && column.source[i] !== source) continue;
    if (stepFrom != null && column.step[i] < stepFrom) continue;
    if (stepTo != null && column.step[i] > stepTo) continue;
    if (rewardFrom != null && !(column.reward[i] >= rewardFrom)) continue;
    if (rewardTo != null && !(column.reward[i] <= rewardTo && column.reward[i] != null)) continue;
    if (outcome === "truncated" ? !column.truncated[i] : outcome && outcomeOf(i) !== outcome) continue;
    if (matching && !matching.has(column.problem[i])) continue;
    found.push(i);
  }
  const order = form.order.value, key = order.replace("-", ""), sign = order.startsWith("-") ? -1 : 1;
  if (order) found.sort((a, b) => (column[key][a] == null) - (column[key][b] == null) || sign * (column[key][a] - column[key][b]) || a - b);
  turn(toPage, found.includes(keep) ? keep : found[toPage * PAGE_SIZE] ?? -1);
}

function turn(to, choice) {
  page = Math.max(0, Math.min(to, Math.ceil(found.length / PAGE_SIZE) - 1));
  remember("page", page);
  const shown = found.slice(page * PAGE_SIZE, (page + 1) * PAGE_SIZE);
  const dropped = store.total > store.kept ? `; ${store.total.toLocaleString("en")} were sampled, evenly thinned here` : "";
  const range = shown.length ? `${page * PAGE_SIZE + 1}–${page * PAGE_SIZE + shown.length} of ` : "";
  $("count").textContent = `${range}${found.length.toLocaleString("en")} rollouts${dropped}`;
  $("previous").disabled = page === 0;
  $("next").disabled = (page + 1) * PAGE_SIZE >= found.length;
  $("list").replaceChildren(...shown.map((i) => make("li", { role: "option", id: `rollout-${i}`, "aria-selected": "false", onclick: () => choose(i) },
    make("span", {}, make("b", { class: outcomeOf(i) }, `${outcomeOf(i)} `), `reward ${format(column.reward[i])}, ${column.tokens[i]} tokens${column.truncated[i] ? ", cut" : ""}`),
    make("span", { class: "quiet" }, `${placeOf(i)}: ${problems[column.problem[i]][1]}`))));
  $("list").scrollTop = 0;
  choose(choice ?? shown[0] ?? -1);
}

function move(by) {
  const place = found.indexOf(chosen) + by;
  if (place < 0 || place >= found.length) return;
  if (Math.floor(place / PAGE_SIZE) !== page) turn(Math.floor(place / PAGE_SIZE), found[place]);
  else choose(found[place]);
}

async function choose(i, other = -1) {
  $(`rollout-${chosen}`)?.setAttribute("aria-selected", "false");
  [chosen, beside] = [i, other];
  remember("rollout", i >= 0 ? String(i) : "");
  if (i < 0) { $("detail").replaceChildren(make("p", { class: "note" }, "No rollout matches.")); return; }
  const item = $(`rollout-${i}`);
  item?.setAttribute("aria-selected", "true");
  if (item) {
    const list = $("list");
    list.setAttribute("aria-activedescendant", item.id);
    if (item.offsetTop < list.scrollTop || item.offsetTop + item.offsetHeight > list.scrollTop + list.clientHeight)
      list.scrollTop = item.offsetTop - list.clientHeight / 2;
  }
  const panes = [await pane(i)];
  if (other >= 0) panes.push(await pane(other));
  if (chosen !== i || beside !== other) return;
  const [id, prompt, answer] = problems[column.problem[i]];
  $("detail").replaceChildren(
    make("div", { class: "prompt" }, make("pre", {}, prompt), make("div", { class: "note" }, `answer ${answer ?? "–"}; problem ${id}`)),
    others(i), make("div", { class: "panes" }, ...panes));
}

// All samples of the problem, in the order of the run; one of them can stand beside the chosen one.
function others(i) {
  const same = [];
  for (let k = 0; k < store.kept; k += 1) if (column.problem[k] === column.problem[i]) same.push(k);
  const box = make("div", { class: "others" });
  if (same.length < 2) return box;
  const pick = (label, a, b) => a != null && b != null && a !== b && box.append(make("button", { type: "button", onclick: () => choose(a, b) }, label));
  const near = (wanted) => same.filter((k) => outcomeOf(k) === wanted).sort((a, b) => Math.abs(a - i) - Math.abs(b - i))[0];
  pick("right beside wrong", near("right"), near("wrong"));
  pick("first beside last", same[0], same.at(-1));
  box.append(make("span", { class: "note" }, `${same.length} samples of this problem:`));
  let place = "";
  for (const k of same.length > 200 ? same.slice(-200) : same) {
    if (placeOf(k) !== place) box.append(make("span", { class: "note" }, (place = placeOf(k))));
    const mark = { right: "✓", wrong: "✗", unjudged: "?" }[outcomeOf(k)];
    box.append(make("button", { type: "button", class: outcomeOf(k), "aria-pressed": String(k === i || k === beside),
      "aria-label": `${outcomeOf(k)}, ${placeOf(k)}, sample ${column.sample[k]}`, onclick: () => choose(i, k === i ? -1 : k) }, mark));
  }
  return box;
}

function fold(label, text) {
  return make("details", { class: "thinking", open: thinkingOpen }, make("summary", {}, `${label}, ${text.length.toLocaleString("en")} characters`), make("pre", {}, text));
}

// A turn of an episode, as the policy or the environment gave it.
function showMessage(message) {
  const calls = (message.tool_calls ?? []).map((call) => call.function.name);
  const name = message.name ? `${message.role} ${message.name}` : message.role;
  return fold(calls.length ? `${name} calls ${calls.join(", ")}` : name, String(message.content ?? ""));
}

async function pane(i) {
  const [whole, rewards, [messages, ended] = [[], ""]] = await readText(i);
  const completion = messages.length ? messages.findLast((m) => m.role === "assistant")?.content ?? "" : whole;
  const last = messages.findLastIndex((m) => m.role === "assistant");
  const end = completion.lastIndexOf("</think>");
  const thinking = end >= 0 ? completion.slice(0, end).replace(/^\s*<think>\s*/, "") : column.truncated[i] ? completion : "";
  const answer = end >= 0 ? completion.slice(end + "</think>".length) : thinking ? "" : completion;
  return make("article", { class: "rollout" },
    make("h4", {}, make("span", { class: outcomeOf(i) }, outcomeOf(i)), `, ${placeOf(i)}, sample ${column.sample[i]}`),
    ...messages.slice(0, Math.max(0, last)).map(showMessage),
    thinking && fold("thinking", thinking),
    make("pre", { class: "answer" }, answer.trim() || (column.truncated[i] ? "cut off while thinking" : "")),
    ...messages.slice(last + 1).map(showMessage),
    make("div", { class: "note" },
      [...rewards.map(([f, value]) => `${store.functions[f].split(".").at(-1)} ${format(value)}`),
        column.advantage[i] == null ? "" : `advantage ${format(column.advantage[i])}`,
        messages.length && `${messages.filter((m) => m.role === "assistant").length} turns, ended: ${ended}`,
        `${column.tokens[i]} tokens${column.truncated[i] ? ", cut" : ""}`].filter(Boolean).join(" · ")));
}

// --- A running run ------------------------------------------------------------------------------

function followRun() {
  if (!data.running) return;
  $("follow-label").hidden = false;
  $("follow").checked = state.get("follow") !== "no";
  $("follow").addEventListener("change", () => remember("follow", $("follow").checked ? "" : "no"));
  const place = sessionStorage.getItem("r1pipe-scroll");
  if (place) { scrollTo(0, Number(place)); sessionStorage.removeItem("r1pipe-scroll"); }
  setInterval(() => {
    if (!$("follow").checked || document.hidden || document.activeElement?.matches("input[type=search], input[type=number]")) return;
    sessionStorage.setItem("r1pipe-scroll", String(scrollY));
    location.reload();
  }, 10000);
}

showRecipe();
showDifferences();
showAccuracy();
showCurves();
showTimelines();
showExperts();
showEvents();
showCost();
showRollouts().then(() => { showHeader(); followRun(); document.body.dataset.ready = "yes"; });
