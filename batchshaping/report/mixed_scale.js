families.mixed_scale = (() => {
  let run;
  let pictures;

  function drawMaps() {
    const maps = pictures.maps;
    const gap = 0.06;
    const width = (1 - gap * (maps.length - 1)) / maps.length;
    const layout = { annotations: [], margin: { l: 8, r: 8, t: 28, b: 8 } };
    const traces = maps.map(({ name, rows }, i) => {
      const [x, y] = i ? [`x${i + 1}`, `y${i + 1}`] : ["x", "y"];
      const from = i * (width + gap);
      const plain = { showgrid: false, zeroline: false, showticklabels: false, ticks: "" };
      layout[x.replace("x", "xaxis")] = { ...plain, domain: [from, from + width], constrain: "domain" };
      layout[y.replace("y", "yaxis")] = { ...plain, autorange: "reversed", scaleanchor: x, anchor: x };
      layout.annotations.push({
        text: name, showarrow: false, x: from + width / 2, y: 1, xref: "paper", yref: "paper", yanchor: "bottom",
      });
      return {
        type: "heatmap",
        z: rows,
        zmin: 0,
        xaxis: x,
        yaxis: y,
        colorscale: [[0, color("coarse")], [0.5, color("between")], [1, color("fine")]],
        xgap: 1,
        ygap: 1,
        texttemplate: rows.length * rows[0].length <= 64 ? "%{z:.0%}" : "",
        hovertemplate: `row %{y}, column %{x}<br>${name.toLowerCase()}: %{z:.1%}<extra></extra>`,
        showscale: false,
      };
    });
    plot("region-maps", 300, traces, { ...layout, showlegend: false });
  }

  function drawEpochs() {
    const epochs = pictures.epochs;
    plot("fine", 260, [curve(run, { name: "fine", shade: "empirical", dash: "solid", form: ".1%" }, (i) => epochs[i].fine)], {
      xaxis: epochAxis(run),
      yaxis: shares("share of regions", { range: [0, 1.02] }),
    });
    plotWeights("scale-weights", run, epochs, "penalty");
  }

  function choose(chosen) {
    run = chosen;
    pictures = run.pictures;
    const scales = pictures.maps.length > 0;
    for (const part of all(".two-scales")) part.hidden = !scales;
    for (const part of all(".all-fine")) part.hidden = scales;
  }

  function draw() {
    if (!pictures.maps.length) return;
    drawMaps();
    if (pictures.epochs.length) drawEpochs();
  }

  return { choose, draw };
})();
