const data = JSON.parse(byId("data").textContent);
let run = data.runs[byId("run").value];
const family = () => families[data.families[run.family]];

// All runs

function drawTradeoff(curves, id) {
  if (!byId(id)) return;
  const traces = curves.map(({ name, color: shade, symbol, connected, points }) => ({
    type: "scatter",
    name,
    mode: connected ? "lines+markers" : "markers",
    x: points.map((point) => point.multiply_adds.mean),
    y: points.map((point) => point.accuracy.mean),
    error_x: deviations(points, "multiply_adds", shade),
    error_y: deviations(points, "accuracy", shade),
    hoverinfo: "text",
    hovertext: points.map((point) => point.hover),
    marker: { color: color(shade), symbol, size: 8, line: { color: color("page"), width: 1 } },
    line: { color: color(shade), width: 1.2, dash: "dot" },
  }));
  const spent = traces.flatMap((trace) => trace.x);
  const ends = curves.flatMap(({ points }) => points.flatMap(({ accuracy: { mean, deviation } }) => [mean - deviation, mean + deviation]));
  const wide = Math.max(...spent) > 10 * Math.min(...spent);
  plot(id, 420, traces, {
    xaxis: axis("mean multiply-adds of an image", {
      tickformat: "~s",
      ...(wide ? { type: "log", dtick: "D2" } : { nticks: 6, rangemode: "tozero" }),
    }),
    yaxis: axis("accuracy", { tickformat: ".1~%", ...around(ends, 0.01, 1) }),
    showlegend: true,
  });
}

// A setting with a single seed has no deviation, and gets no bar.
function deviations(points, metric, shade) {
  return {
    type: "data",
    array: points.map((point) => point[metric].deviation ?? NaN),
    visible: points.some((point) => point[metric].deviation !== null),
    color: color(shade),
    thickness: 1.5,
    width: 4,
  };
}

// Training

function drawTraining() {
  plot("accuracy", 260, [curve(run, { name: "accuracy", shade: "empirical", dash: "solid", form: ".1%" }, (i) => run.epochs[i].accuracy)], {
    xaxis: epochAxis(run),
    yaxis: axis("test accuracy", { tickformat: ".1~%", ...around(run.epochs.map((epoch) => epoch.accuracy), 0.01, 1) }),
  });
  if (run.is_reference) return;
  plot(
    "multiply-adds",
    260,
    [
      curve(run, { name: "this run", shade: "empirical", dash: "solid", form: ".3s" }, (i) => run.epochs[i].multiply_adds),
      curve(run, { name: "reference", shade: "faint", dash: "dot", form: ".3s" }, () => run.reference),
    ],
    { xaxis: epochAxis(run), yaxis: axis("multiply-adds", { tickformat: "~s", rangemode: "tozero" }) },
  );
}

// Budgets

function drawBudgets() {
  const looks = {
    "at other budgets": { shade: "empirical", symbol: "square-open" },
    "as trained": { shade: "target", symbol: "circle" },
    "with the promise": { shade: "loss", symbol: "diamond" },
  };
  const traces = Object.entries(run.budgets).map(([name, points]) => ({
    type: "scatter",
    name,
    mode: points.length > 1 ? "lines+markers" : "markers",
    x: points.map((point) => point.x),
    y: points.map((point) => point.y),
    hoverinfo: "text",
    hovertext: points.map((point) => point.hover),
    marker: { color: color(looks[name].shade), symbol: looks[name].symbol, size: 9 },
    line: { color: color(looks[name].shade), width: 1.2 },
  }));
  plot("budgets", 340, traces, {
    xaxis: axis("mean multiply-adds of an image", { tickformat: "~s", nticks: 6, rangemode: "tozero" }),
    yaxis: axis("accuracy", { tickformat: ".1~%", ...around(traces.flatMap((trace) => trace.y), 0.01, 1) }),
    showlegend: true,
  });
}

// Time

function drawLatency() {
  const { multiply_adds: spent, seconds, dense } = run.latency;
  const most = Math.max(...spent, run.reference);
  const traces = [
    {
      type: "scatter",
      mode: "markers",
      name: "test images",
      x: spent,
      y: seconds.map((time) => 1e3 * time),
      marker: { color: color("empirical"), size: 6, opacity: 0.5 },
      hovertemplate: "%{x:.3s} multiply-adds<br>%{y:.3f} ms<extra></extra>",
    },
    {
      type: "scatter",
      mode: "lines",
      name: "without gates",
      x: [0, most],
      y: [1e3 * dense, 1e3 * dense],
      line: { color: color("target"), width: 1.5, dash: "dot" },
      hovertemplate: "without gates: %{y:.3f} ms<extra></extra>",
    },
  ];
  plot("latency", 340, run.is_reference ? traces.slice(0, 1) : traces, {
    xaxis: axis("multiply-adds of an image", { tickformat: "~s", range: [0, 1.05 * most] }),
    yaxis: axis("ms", { rangemode: "tozero" }),
  });
}

// What is chosen

function chooseRun() {
  const index = byId("run").value;
  run = data.runs[index];
  for (const part of all("[data-run]")) part.hidden = part.dataset.run !== index;
  for (const part of all("[data-family]")) part.hidden = Number(part.dataset.family) !== run.family;
  for (const part of all(".with-epochs")) part.hidden = !run.epochs.length;
  for (const part of all(".without-epochs")) part.hidden = run.epochs.length > 0;
  for (const part of all(".with-budgets")) part.hidden = !run.budgets;
  for (const part of all(".without-budgets")) part.hidden = !!run.budgets;
  for (const part of all(".with-latency")) part.hidden = !run.latency;
  for (const part of all(".without-latency")) part.hidden = !!run.latency;
  for (const part of all(".not-of-references")) part.hidden = run.is_reference;
  for (const button of all("[data-choose]")) button.closest("tr").classList.toggle("chosen", button.dataset.choose === index);
  family()?.choose(run);
}

function drawRun() {
  family()?.draw();
  if (run.budgets) drawBudgets();
  if (run.latency) drawLatency();
  if (run.epochs.length) drawTraining();
}

byId("run").addEventListener("change", () => {
  chooseRun();
  drawRun();
});
for (const button of all("[data-choose]")) {
  button.addEventListener("click", () => {
    byId("run").value = button.dataset.choose;
    byId("run").dispatchEvent(new Event("change"));
    document.querySelector(".chooser").scrollIntoView();
  });
}

// The tables

function setOpen(opener, whether) {
  opener.setAttribute("aria-expanded", whether);
  for (const row of opener.closest("tbody").querySelectorAll("tr.run")) row.hidden = !whether;
}

const isOpen = (button) => button.getAttribute("aria-expanded") === "true";

for (const opener of all(".opener")) opener.addEventListener("click", () => setOpen(opener, !isOpen(opener)));
for (const button of all(".open-all")) {
  button.addEventListener("click", () => {
    const whether = !isOpen(button);
    button.setAttribute("aria-expanded", whether);
    button.textContent = whether ? "Close all settings" : "Open all settings";
    for (const opener of button.closest("section").querySelectorAll(".opener")) setOpen(opener, whether);
  });
}

// Each body of a table is a setting with its runs; its first row says what it is sorted by.
function sortBy(head) {
  const table = head.closest("table");
  const column = head.cellIndex;
  const descending = head.getAttribute("aria-sort") === "ascending";
  const value = (body) => body.rows[0].cells[column].dataset.value;
  const compare = (one, other) =>
    column === 0 ? one.localeCompare(other, undefined, { numeric: true }) : Number(one) - Number(other);
  const bodies = [...table.tBodies].sort((one, other) => {
    const [a, b] = [value(one), value(other)];
    // What has no value comes last, whichever way the others go.
    if (a === undefined || b === undefined) return (a === undefined) - (b === undefined);
    return descending ? compare(b, a) : compare(a, b);
  });
  for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", descending ? "descending" : "ascending");
  table.append(...bodies);
}

for (const button of all(".runs thead button")) {
  button.addEventListener("click", () => sortBy(button.closest("th")));
}

// Light or dark as the reader has it, as wide as the window is; on paper light, and as wide as the paper.

const dark = matchMedia("(prefers-color-scheme: dark)");

function draw(onPaper) {
  const root = document.documentElement;
  root.classList.toggle("paper", onPaper);
  root.dataset.scheme = dark.matches && !onPaper ? "dark" : "light";
  data.comparisons.forEach((curves, i) => drawTradeoff(curves, `tradeoff-${i}`));
  drawRun();
}

let width = innerWidth;
addEventListener("resize", () => {
  // Phones change the height alone whenever the page is scrolled.
  if (innerWidth !== width) draw(false);
  width = innerWidth;
});
dark.addEventListener("change", () => draw(false));
addEventListener("beforeprint", () => draw(true));
addEventListener("afterprint", () => draw(false));

chooseRun();
draw(false);
