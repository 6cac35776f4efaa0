/* What the scripts of the page and of the families share. */

const byId = (id) => document.getElementById(id);
const all = (selector) => [...document.querySelectorAll(selector)];
const sum = (numbers) => numbers.reduce((total, number) => total + number, 0);

// What a family draws, by its name: {choose(run), draw(run)}.
const families = {};

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

// A range with a margin. Plotly's own would span 0.98 ± 1 where all values are 0.98.
function around(values, margin, most = Infinity) {
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const pad = Math.max(margin, 0.08 * (high - low));
  return { range: [low - pad, Math.min(high + pad, Math.max(high, most) + 0.2 * pad)] };
}

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

// A metric after each epoch of a run.
function curve(run, { name, shade, dash, form }, metric) {
  return {
    type: "scatter",
    mode: run.epochs.length > 1 ? "lines" : "markers",
    name,
    x: run.epochs.map((epoch) => epoch.epoch),
    y: run.epochs.map((_, i) => metric(i)),
    line: { color: color(shade), width: 2, dash },
    hovertemplate: `epoch %{x}<br>${name} %{y:${form}}<extra></extra>`,
  };
}

// There is no half of an epoch.
const epochAxis = (run) => axis("epoch", { rangemode: "tozero", ...(run.epochs.at(-1).epoch < 10 && { dtick: 1 }) });

// Weights of the losses and of the noise after each epoch of a run.
function plotWeights(id, run, epochs, penalty) {
  plot(
    id,
    260,
    [
      curve(run, { name: "batch-shaping", shade: "empirical", dash: "solid", form: ".3" }, (i) => epochs[i].shaping),
      curve(run, { name: penalty, shade: "loss", dash: "dash", form: ".3" }, (i) => epochs[i].penalty),
      curve(run, { name: "noise", shade: "green", dash: "dot", form: ".3" }, (i) => epochs[i].noise),
    ],
    { xaxis: epochAxis(run), yaxis: axis("weight", { rangemode: "tozero" }) },
  );
}
