families.channel_gating = (() => {
  const ALL_LAYERS = "";
  let run;
  let pictures;

  // Gates

  function drawLayers() {
    const layers = pictures.layers;
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
    const epoch = pictures.epochs[byId("epoch").value];
    const layers = epoch ? epoch.histograms : pictures.layers.map((layer) => layer.histogram);
    byId("epoch-shown").textContent = epoch ? `${epoch.epoch} of ${pictures.epochs.at(-1).epoch}` : "last";
    const width = 1 / pictures.prior.length;
    const middles = pictures.prior.map((_, bin) => (bin + 0.5) * width);
    const x = middles.map((middle) => `${(middle - width / 2).toFixed(2)} to ${(middle + width / 2).toFixed(2)}`);
    // The same for all epochs, so that what moves is the histogram.
    const epochs = pictures.epochs.map((each) => Math.max(...histogramOf(each.histograms, chosen)));
    const highest = Math.max(...pictures.prior, ...epochs, ...histogramOf(layers, chosen));
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
          y: [pictures.prior[0], ...pictures.prior, pictures.prior.at(-1)],
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

  function drawEpochs() {
    const epochs = pictures.epochs;
    plot(
      "open",
      260,
      [
        curve(run, { name: "open on average", shade: "empirical", dash: "solid", form: ".1%" }, (i) => epochs[i].gates.mean_open ?? null),
        curve(run, { name: "conditional", shade: "loss", dash: "dash", form: ".1%" }, (i) => epochs[i].gates.conditional ?? null),
      ],
      { xaxis: epochAxis(run), yaxis: shares("share of gates", { range: [0, 1.02] }) },
    );
    plotWeights("weights", run, epochs, "penalty on cost");
  }

  // Classes

  // Every class has its place; where there are too many to name, some are.
  function classAxis() {
    const step = Math.ceil(pictures.classes.length / 60);
    const named = pictures.classes.map((_, i) => i).filter((i) => i % step === 0);
    return axis("", {
      tickvals: named,
      ticktext: named.map((i) => pictures.classes[i].label),
      range: [pictures.classes.length - 0.5, -0.5],
      showgrid: false,
    });
  }

  const heightOfClasses = (each) => 70 + Math.min(each * pictures.classes.length, 900);

  function drawHeatmap() {
    const chosen = byId("heatmap-layer").value;
    const z = pictures.classes.map((each) => (chosen === ALL_LAYERS ? each.open.flat() : each.open[chosen]));
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
          ygap: pictures.classes.length > 60 ? 0 : 1,
          text: pictures.classes.map((each) => z[0].map(() => each.hover)),
          hovertemplate: "gate %{x}: open for %{z:.1%} of %{text}<extra></extra>",
          showscale: false,
        },
      ],
      { xaxis: axis("gate", { showgrid: false }), yaxis: classAxis() },
    );
  }

  function drawClasses() {
    const dots = (id, metric, marker, form, scale) =>
      plot(
        id,
        heightOfClasses(24),
        [
          {
            type: "scatter",
            mode: "markers",
            x: pictures.classes.map((each) => each[metric]),
            y: pictures.classes.map((_, i) => i),
            marker: { size: 10, ...marker },
            text: pictures.classes.map((each) => each.hover),
            customdata: pictures.classes.map((each) => each.examples),
            hovertemplate: `%{text}: %{x:${form}}, %{customdata} images<extra></extra>`,
          },
        ],
        { xaxis: scale, yaxis: { ...classAxis(), showgrid: pictures.classes.length <= 60 } },
      );
    const accuracies = pictures.classes.map((each) => each.accuracy);
    const spent = pictures.classes.map((each) => each.multiply_adds);
    dots("class-accuracy", "accuracy", { color: color("empirical") }, ".1%",
      axis("accuracy", { tickformat: ".1~%", nticks: 5, ...around(accuracies, 0.01, 1) }));
    if (!pictures.layers.length) return;
    dots("class-multiply-adds", "multiply_adds", { color: color("loss"), symbol: "diamond" }, ".3s",
      axis("mean multiply-adds", { tickformat: "~s", nticks: 5, ...around(spent, 0.01 * Math.max(...spent)) }));
  }

  // What is chosen

  function offerLayers(select) {
    const before = select.selectedOptions[0]?.textContent;
    select.replaceChildren(new Option("all layers", ALL_LAYERS), ...pictures.layers.map((layer, i) => new Option(layer.name, i)));
    const same = [...select.options].find((option) => option.textContent === before);
    if (same) same.selected = true;
  }

  function choose(chosen) {
    run = chosen;
    pictures = run.pictures;
    const gated = pictures.layers.length > 0;
    for (const part of all(".with-gates")) part.hidden = !gated;
    for (const part of all(".without-gates")) part.hidden = gated;
    all("select.layer").forEach(offerLayers);
    byId("epoch").max = Math.max(pictures.epochs.length - 1, 0);
    byId("epoch").value = byId("epoch").max;
  }

  function draw() {
    if (pictures.layers.length) {
      drawLayers();
      drawHistogram();
      drawHeatmap();
      if (pictures.epochs.length) drawEpochs();
    }
    drawClasses();
  }

  byId("histogram-layer").addEventListener("change", drawHistogram);
  byId("heatmap-layer").addEventListener("change", drawHeatmap);
  byId("epoch").addEventListener("input", drawHistogram);

  return { choose, draw };
})();
