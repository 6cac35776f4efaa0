"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const all = (selector) => [...document.querySelectorAll(selector)];
const sum = (numbers) => numbers.reduce((total, number) => total + number, 0);
const ALL_LAYERS = "";

let run = data.runs[byId("run").value];

// How a figure looks

const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const axis = (title, more) => ({
  title: { text: title, standoff: 6 },
  gridcolor: color("grid"),
  linecolor: color("grid"),
  zeroline: false,
  automargin: true,
  ...more,
});
const shares = (title, more) => axis(title, { tickformat: ".0%", ...more });

function plot(id, height, traces, layout) {
  const everywhere = {
    height,
    width: byId(id).clientWidth,
    font: { family: "inherit", size: 12, color: color("text") },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    margin: { l: 8, r: 16, t: 8, b: 8 },
    legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" },
    showlegend: traces.length > 1,
    // A finger that moves over a figure scrolls the page.
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
    hoverlabel: { align: "left", namelength: -1 },
  };
  Plotly.react(id, traces, { ...everywhere, ...layout }, { displayModeBar: false });
}

// All runs

function drawTradeoff() {
  if (!byId("tradeoff")) return;
  const line = (kind) => (kind === 0 ? "lines+markers" : "markers");
  const means = (groups) => ({
    x: groups.map((group) => group?.multiply_adds.mean ?? null),
    y: groups.map((group) => group?.accuracy.mean ?? null),
    error_x: deviations(groups, "multiply_adds"),
    error_y: deviations(groups, "accuracy"),
    hovertext: groups.map((group) => group?.hover ?? ""),
  });
  const deviations = (groups, figure) => ({
    type: "data",
    array: groups.map((group) => group?.[figure].deviation ?? 0),
    visible: groups.some((group) => group?.[figure].deviation > 0),
    thickness: 1.2,
    width: 4,
  });
  const style = (kind) => ({
    type: "scatter",
    hoverinfo: "text",
    legendgroup: data.kinds[kind],
    line: { color: color(`kind${kind}`), width: 1.5, dash: "dot" },
  });
  const marker = (kind) => ({ color: color(`kind${kind}`), symbol: ["circle", "diamond", "square"][kind] });
  const traces = data.kinds.flatMap((name, kind) => {
    const groups = data.groups.filter((group) => group.kind === kind);
    const single = groups.filter((group) => group.runs.length > 1).flatMap((group) => group.runs);
    const mean = { ...style(kind), ...means(kind === 0 ? lines(groups) : groups), name, mode: line(kind), marker: { ...marker(kind), size: 10 } };
    const faint = {
      ...style(kind),
      x: single.map((one) => one.multiply_adds),
      y: single.map((one) => one.accuracy),
      hovertext: single.map((one) => one.hover),
      mode: "markers",
      marker: { ...marker(kind), size: 7, opacity: 0.35 },
      showlegend: false,
    };
    return [...(single.length ? [faint] : []), ...(groups.length ? [mean] : [])];
  });
  const spent = data.groups.flatMap((group) => group.runs.map((one) => one.multiply_adds));
  const wide = Math.max(...spent) > 10 * Math.min(...spent);
  plot("tradeoff", 420, traces, {
    xaxis: axis("mean multiply-adds of an image", wide ? { type: "log", dtick: "D2", tickformat: "~s" } : { tickformat: "~s", nticks: 6 }),
    yaxis: axis("accuracy", { tickformat: ".1~%" }),
    showlegend: true,
  });
}

// Groups in the order of their multiply-adds, with a gap where the data is another.
function lines(groups) {
  const bySize = [...groups].sort((one, other) => one.multiply_adds.mean - other.multiply_adds.mean);
  const sets = [...new Set(groups.map((group) => group.data))];
  return sets.flatMap((set, i) => [...(i ? [null] : []), ...bySize.filter((group) => group.data === set)]);
}

// Gates

function drawLayers() {
  const layers = run.layers;
  const y = layers.map((_, i) => i);
  const bars = [["always_on", "always on"], ["conditional", "conditional"], ["always_off", "always off"]].map(
    ([share, name]) => ({
      type: "bar",
      orientation: "h",
      name,
      y,
      x: layers.map((layer) => layer[share]),
      marker: { color: color(share.replace("_", "-")) },
      customdata: layers.map((layer) => [layer.hover, layer.gates]),
      hovertemplate: `%{customdata[0]}<br>%{x:.1%} of %{customdata[1]} gates ${name}<extra></extra>`,
    }),
  );
  const open = {
    type: "scatter",
    mode: "markers",
    name: "open on average",
    y,
    x: layers.map((layer) => layer.mean_open),
    xaxis: "x2",
    marker: { color: color("text"), symbol: "line-ns-open", size: 12, line: { width: 3 } },
    showlegend: false,
    customdata: bars[0].customdata,
    hovertemplate: "%{customdata[0]}<br>%{x:.1%} of gates open on average<extra></extra>",
  };
  const whole = { range: [0, 1], tickvals: [0, 0.5, 1], ticktext: ["0", "", "100%"] };
  plot("layers", 110 + 26 * layers.length, [...bars, open], {
    barmode: "stack",
    bargap: 0.25,
    xaxis: axis("gates", { ...whole, domain: [0, 0.58], showgrid: false }),
    xaxis2: axis("mean open", { ...whole, domain: [0.72, 1] }),
    yaxis: axis("", { tickvals: y, ticktext: layers.map((layer) => layer.label), range: [layers.length - 0.4, -0.6], showgrid: false }),
    legend: { orientation: "h", x: 0, y: 1, yanchor: "bottom", traceorder: "normal" },
  });
}

function histogramOf(layers, chosen) {
  const some = chosen === ALL_LAYERS ? layers : [layers[chosen]];
  const counts = some[0].map((_, bin) => sum(some.map((layer) => layer[bin])));
  const total = sum(counts) || 1;
  return counts.map((count) => count / total);
}

function drawHistogram() {
  const chosen = byId("histogram-layer").value;
  const epoch = run.epochs[byId("epoch").value];
  const layers = epoch ? epoch.histograms : run.layers.map((layer) => layer.histogram);
  byId("epoch-shown").textContent = epoch ? `${epoch.epoch} of ${run.epochs.at(-1).epoch}` : "last";
  const width = 1 / run.prior.length;
  const middles = run.prior.map((_, bin) => (bin + 0.5) * width);
  const x = middles.map((middle) => `${(middle - width / 2).toFixed(2)} to ${(middle + width / 2).toFixed(2)}`);
  // The same for all epochs, so that what moves is the histogram.
  const epochs = run.epochs.map((each) => Math.max(...histogramOf(each.histograms, chosen)));
  const highest = Math.max(...run.prior, ...epochs, ...histogramOf(layers, chosen));
  plot(
    "histogram",
    320,
    [
      {
        type: "bar",
        name: "gates",
        x: middles,
        y: histogramOf(layers, chosen),
        width,
        marker: { color: color("values"), line: { color: color("page"), width: 1 } },
        customdata: x,
        hovertemplate: "%{y:.1%} of probabilities are from %{customdata}<extra></extra>",
      },
      {
        type: "scatter",
        mode: "lines",
        name: "prior",
        x: [0, ...middles, 1],
        y: [run.prior[0], ...run.prior, run.prior.at(-1)],
        line: { color: color("target"), width: 2, shape: "hvh" },
        customdata: [x[0], ...x, x.at(-1)],
        hovertemplate: "prior: %{y:.1%} from %{customdata}<extra></extra>",
      },
    ],
    {
      xaxis: axis("probability that a gate is open", { range: [0, 1] }),
      yaxis: shares("share", { range: [0, 1.05 * highest] }),
    },
  );
}

// Training

function drawTraining() {
  const curve = (name, shade, figure, dash, form) => ({
    type: "scatter",
    mode: run.epochs.length > 1 ? "lines" : "markers",
    name,
    x: run.epochs.map((epoch) => epoch.epoch),
    y: run.epochs.map(figure),
    line: { color: color(shade), width: 2, dash },
    hovertemplate: `epoch %{x}<br>${name} %{y:${form}}<extra></extra>`,
  });
  const epochs = axis("epoch", { rangemode: "tozero" });
  plot("accuracy", 260, [curve("accuracy", "empirical", (epoch) => epoch.accuracy, "solid", ".1%")], {
    xaxis: epochs,
    yaxis: axis("test accuracy", { tickformat: ".1~%" }),
  });
  if (!run.layers.length) return;
  plot(
    "multiply-adds",
    260,
    [
      curve("gated", "empirical", (epoch) => epoch.multiply_adds, "solid", ".3s"),
      curve("ungated", "kind0", () => run.dense, "dot", ".3s"),
    ],
    { xaxis: epochs, yaxis: axis("multiply-adds", { tickformat: "~s", rangemode: "tozero" }) },
  );
  plot(
    "open",
    260,
    [
      curve("open on average", "empirical", (epoch) => epoch.gates.mean_open ?? null, "solid", ".1%"),
      curve("conditional", "loss", (epoch) => epoch.gates.conditional ?? null, "dash", ".1%"),
    ],
    { xaxis: epochs, yaxis: shares("share of gates", { range: [0, 1.02] }) },
  );
  plot(
    "weights",
    260,
    [
      curve("batch-shaping", "empirical", (epoch) => epoch.shaping, "solid", ".3"),
      curve("penalty on cost", "loss", (epoch) => epoch.penalty, "dash", ".3"),
      curve("noise", "green", (epoch) => epoch.noise, "dot", ".3"),
    ],
    { xaxis: epochs, yaxis: axis("weight", { rangemode: "tozero" }) },
  );
}

// Classes

// Every class has its place; where there are too many to name, some are.
function classAxis() {
  const step = Math.ceil(run.classes.length / 60);
  const named = run.classes.map((_, i) => i).filter((i) => i % step === 0);
  return axis("", {
    tickvals: named,
    ticktext: named.map((i) => run.classes[i].label),
    range: [run.classes.length - 0.5, -0.5],
    showgrid: false,
  });
}

const heightOfClasses = (each) => 70 + Math.min(each * run.classes.length, 900);

function drawHeatmap() {
  const chosen = byId("heatmap-layer").value;
  const z = run.classes.map((each) => (chosen === ALL_LAYERS ? each.open.flat() : each.open[chosen]));
  plot(
    "heatmap",
    heightOfClasses(24),
    [
      {
        type: "heatmap",
        z,
        zmin: 0,
        zmax: 1,
        colorscale: [[0, color("closed")], [0.5, color("half")], [1, color("opened")]],
        xgap: z[0].length > 100 ? 0 : 1,
        ygap: run.classes.length > 60 ? 0 : 1,
        text: run.classes.map((each) => z[0].map(() => each.hover)),
        hovertemplate: "gate %{x}: open for %{z:.1%} of %{text}<extra></extra>",
        showscale: false,
      },
    ],
    { xaxis: axis("gate", { showgrid: false }), yaxis: classAxis() },
  );
}

function drawClasses() {
  const dots = (id, name, figure, marker, form, scale) =>
    plot(
      id,
      heightOfClasses(24),
      [
        {
          type: "scatter",
          mode: "markers",
          x: run.classes.map((each) => each[figure]),
          y: run.classes.map((_, i) => i),
          marker: { size: 10, ...marker },
          text: run.classes.map((each) => each.hover),
          customdata: run.classes.map((each) => each.examples),
          hovertemplate: `%{text}: ${name} %{x:${form}}, %{customdata} images<extra></extra>`,
        },
      ],
      { xaxis: axis(name, { tickformat: scale, nticks: 5 }), yaxis: { ...classAxis(), showgrid: run.classes.length <= 60 } },
    );
  dots("class-accuracy", "accuracy", "accuracy", { color: color("empirical") }, ".1%", ".1~%");
  if (!run.layers.length) return;
  dots("class-multiply-adds", "mean multiply-adds", "multiply_adds", { color: color("loss"), symbol: "diamond" }, ".3s", "~s");
}

// What is chosen

function offerLayers(select) {
  const before = select.selectedOptions[0]?.textContent;
  select.replaceChildren(new Option("all layers", ALL_LAYERS), ...run.layers.map((layer, i) => new Option(layer.name, i)));
  const same = [...select.options].find((option) => option.textContent === before);
  if (same) same.selected = true;
}

function chooseRun() {
  const index = byId("run").value;
  run = data.runs[index];
  const gated = run.layers.length > 0;
  for (const part of all("[data-run]")) part.hidden = part.dataset.run !== index;
  for (const part of all(".with-gates")) part.hidden = !gated;
  for (const part of all(".without-gates")) part.hidden = gated;
  for (const part of all(".with-epochs")) part.hidden = !run.epochs.length;
  for (const part of all(".without-epochs")) part.hidden = run.epochs.length > 0;
  for (const button of all("[data-choose]")) button.closest("tr").classList.toggle("chosen", button.dataset.choose === index);
  all("select.layer").forEach(offerLayers);
  byId("epoch").max = Math.max(run.epochs.length - 1, 0);
  byId("epoch").value = byId("epoch").max;
}

function showRun() {
  chooseRun();
  drawRun();
}

function drawRun() {
  if (run.layers.length) {
    drawLayers();
    drawHistogram();
    drawHeatmap();
  }
  if (run.epochs.length) drawTraining();
  drawClasses();
}

function sortBy(head) {
  const rows = [...head.closest("table").tBodies[0].rows];
  const column = head.cellIndex;
  const descending = head.getAttribute("aria-sort") === "ascending";
  const value = (row) => row.cells[column].dataset.value;
  const compare = (one, other) =>
    column === 0 ? one.localeCompare(other, undefined, { numeric: true }) : Number(one) - Number(other);
  rows.sort((one, other) => {
    const [a, b] = [value(one), value(other)];
    // What has no value comes last, whichever way the others go.
    if (a === undefined || b === undefined) return (a === undefined) - (b === undefined);
    return descending ? compare(b, a) : compare(a, b);
  });
  for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", descending ? "descending" : "ascending");
  head.closest("table").tBodies[0].append(...rows);
}

byId("run").addEventListener("change", showRun);
byId("histogram-layer").addEventListener("change", drawHistogram);
byId("heatmap-layer").addEventListener("change", drawHeatmap);
byId("epoch").addEventListener("input", drawHistogram);
for (const button of all(".sortable thead button")) {
  button.addEventListener("click", () => sortBy(button.closest("th")));
}
for (const button of all("[data-choose]")) {
  button.addEventListener("click", () => {
    byId("run").value = button.dataset.choose;
    showRun();
    document.querySelector(".chooser").scrollIntoView();
  });
}

// Light or dark as the reader has it, as wide as the window is; on paper light, and as wide as the paper.

const dark = matchMedia("(prefers-color-scheme: dark)");

function draw(onPaper) {
  const root = document.documentElement;
  root.classList.toggle("paper", onPaper);
  root.dataset.scheme = dark.matches && !onPaper ? "dark" : "light";
  drawTradeoff();
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
