"use strict";
// Charts as SVG. Each has a label in words; what they show is in the page's tables too.

const SIZE = { width: 360, height: 200, left: 46, right: 12, top: 12, bottom: 30 };
const N_COLOURS = 6;

function ticks(low, high, most) {
  const rough = (high - low) / most;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough);
  const found = [];
  for (let at = Math.ceil(low / step - 1e-9) * step; at <= high + step * 1e-6; at += step)
    found.push(at);
  return found;
}

function scale(low, high, from, to) {
  return (value) => from + ((value - low) / (high - low)) * (to - from);
}

// Axes of a chart; xTicks are [value, text], x and y map values to places.
function axes(svg, x, y, xTicks, yTicks) {
  for (const value of yTicks) {
    svg.append(
      drawn("line", {
        class: "grid",
        x1: SIZE.left,
        x2: SIZE.width - SIZE.right,
        y1: y(value),
        y2: y(value),
      }),
      drawn("text", { x: SIZE.left - 6, y: y(value) + 4, "text-anchor": "end" }, number(value)),
    );
  }
  for (const [value, text] of xTicks) {
    svg.append(drawn("text", { x: x(value), y: SIZE.height - 10, "text-anchor": "middle" }, text));
  }
}

function figure(title, label, svg, note = "") {
  build(svg, { role: "img", "aria-label": label, viewBox: `0 0 ${SIZE.width} ${SIZE.height}` }, []);
  return element(
    "figure",
    {},
    element("figcaption", {}, title),
    svg,
    ...(note ? [element("p", { class: "note" }, note)] : []),
  );
}

function marker(series, x, y, text) {
  const r = 3.5;
  const shapes = [
    `M${x - r} ${y}a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0Z`,
    `M${x - r} ${y - r}h${2 * r}v${2 * r}h${-2 * r}Z`,
    `M${x} ${y - r - 1}L${x + r + 1} ${y + r}H${x - r - 1}Z`,
  ];
  const path = drawn("path", {
    class: `mark c${series % N_COLOURS}`,
    d: shapes[series % shapes.length],
  });
  if (text) path.append(drawn("title", {}, text));
  return path;
}

// series: {name, index, points: [{x, y, low, high, text}]}; points of one x are joined at their mean.
function lineChart(title, series, { xTicks, xRange, rule }) {
  const points = series.flatMap((one) => one.points);
  if (!points.length) return null;
  const values = points
    .flatMap((p) => [p.y, p.low ?? p.y, p.high ?? p.y])
    .concat(rule ? [rule.y] : []);
  let [low, high] = [Math.min(0, ...values), Math.max(...values)];
  if (high === low) high = low + 1;
  high += (high - low) * 0.05;
  const x = scale(xRange[0], xRange[1], SIZE.left + 10, SIZE.width - SIZE.right - 10);
  const y = scale(low, high, SIZE.height - SIZE.bottom, SIZE.top);
  const svg = drawn("svg");
  axes(svg, x, y, xTicks, ticks(low, high, 4));
  if (rule) {
    svg.append(
      drawn("line", {
        class: "rule",
        x1: SIZE.left,
        x2: SIZE.width - SIZE.right,
        y1: y(rule.y),
        y2: y(rule.y),
      }),
      drawn(
        "text",
        { class: "rule", x: SIZE.width - SIZE.right, y: y(rule.y) - 5, "text-anchor": "end" },
        rule.text,
      ),
    );
  }
  for (const one of series) {
    const at = new Map();
    for (const p of one.points) at.set(p.x, [...(at.get(p.x) ?? []), p.y]);
    const joined = [...at].sort((a, b) => a[0] - b[0]);
    const mean = (ys) => ys.reduce((a, b) => a + b) / ys.length;
    const path = joined
      .map(([at, ys], i) => `${i ? "L" : "M"}${x(at).toFixed(1)} ${y(mean(ys)).toFixed(1)}`)
      .join("");
    svg.append(drawn("path", { class: `line c${one.index % N_COLOURS}`, d: path }));
    for (const p of one.points) {
      if (p.low !== undefined) {
        const end = p.high ?? high;
        svg.append(
          drawn("line", {
            class: `whisker c${one.index % N_COLOURS}${p.high === null ? " open" : ""}`,
            x1: x(p.x),
            x2: x(p.x),
            y1: y(p.low),
            y2: y(end),
          }),
        );
      }
      svg.append(marker(one.index, x(p.x), y(p.y), `${p.text}: ${number(p.y)}`));
    }
  }
  const spans = series
    .filter((one) => one.points.length)
    .map((one) => {
      const ordered = [...one.points].sort((a, b) => a.y - b.y);
      const [least, most] = [ordered[0], ordered[ordered.length - 1]];
      return `${one.name}: lowest ${number(least.y)} (${least.text}), highest ${number(most.y)} (${most.text})`;
    });
  const chart = figure(title, `${title}. ${spans.join("; ")}.`, svg);
  chart.append(
    legend(series.filter((one) => one.points.length).map((one) => [one.name, one.index])),
  );
  return chart;
}

function legend(names) {
  const keys = names.map(([name, index]) => {
    const key = drawn("svg", { width: 16, height: 12, "aria-hidden": "true" });
    key.append(marker(index, 8, 6));
    return element("span", {}, key, name);
  });
  return element("div", { class: "legend" }, ...(names.length > 1 ? keys : []));
}

function put(id, charts) {
  document.getElementById(id).append(...charts.filter((chart) => chart !== null));
}

// Layers stand by number where every dictionary has one, else in their order.
const hooks = [...new Set(data.dictionaries.map((row) => row.hook_name))];
const numbered = data.dictionaries.every((row) => row.layer !== null);
const layerOf = new Map(
  data.dictionaries.map((row) => [
    row.hook_name,
    numbered ? row.layer : hooks.indexOf(row.hook_name),
  ]),
);
// Hooks of one kind are one line; those that no number tells apart stand side by side.
const kindOf = (one) => (numbered ? one.hook_name.replace(/\d+/, "*") : "all hooks");
const recipeOf = (row) => `${row.architecture} x${number(row.expansion_factor)}`;
const titleOf = (row) => `${row.hook_name}, ${recipeOf(row)}, seed ${row.seed}`;
const seriesName = (row) =>
  new Set(hooks.map((hook_name) => kindOf({ hook_name }))).size > 1
    ? `${kindOf(row)}, ${recipeOf(row)}`
    : recipeOf(row);

function drawLayers() {
  const places = [...new Set(layerOf.values())].sort((a, b) => a - b);
  const every = Math.ceil(places.length / 10);
  const named = (place) =>
    numbered
      ? String(place)
      : hooks[place].length > 12
        ? `${hooks[place].slice(0, 11)}…`
        : hooks[place];
  const xTicks = places.filter((_, i) => i % every === 0).map((place) => [place, named(place)]);
  const [first, last] = [places[0], places[places.length - 1]];
  const xRange = first === last ? [first - 1, last + 1] : [first, last];
  const names = [...new Set(data.dictionaries.map(seriesName))];
  const ofRows = (measure) =>
    names.map((name, index) => ({
      name,
      index,
      points: data.dictionaries
        .filter((row) => seriesName(row) === name && measure(row) !== null)
        .map((row) => ({
          x: layerOf.get(row.hook_name),
          y: measure(row),
          text: `${row.hook_name}, seed ${row.seed}`,
        })),
    }));
  const kinds = [...new Set(data.layers.map(kindOf))];
  const ofLayers = (point) =>
    kinds.map((name, index) => ({
      name,
      index,
      points: data.layers
        .filter((layer) => kindOf(layer) === name)
        .map((layer) => ({
          x: layerOf.get(layer.hook_name),
          text: layer.hook_name,
          ...point(layer),
        })),
    }));
  const counted = data.layers.some((layer) => layer.coverage !== null);
  put("layer-charts", [
    lineChart(
      counted
        ? "Features per neuron, with their interval"
        : "Latents alive per neuron (not a count)",
      ofLayers((layer) => ({
        y: layer.features_per_neuron,
        low: layer.n_features.low / layer.n_neurons,
        high: layer.n_features.high === null ? null : layer.n_features.high / layer.n_neurons,
      })),
      { xTicks, xRange },
    ),
    lineChart(
      "2 × load, against its bound",
      ofLayers((layer) => ({ y: 2 * layer.load })),
      { xTicks, xRange, rule: { y: 1, text: "bound" } },
    ),
    lineChart(
      "L0: latents on for a token",
      ofRows((row) => row.l0),
      { xTicks, xRange },
    ),
    lineChart(
      "FVU: share of variance left over",
      ofRows((row) => row.fvu),
      { xTicks, xRange },
    ),
    lineChart(
      "Loss recovered",
      ofRows((row) => row.ce_loss_recovered),
      { xTicks, xRange },
    ),
    lineChart(
      "Share of latents that never fired",
      ofRows((row) => row.dead_fraction),
      { xTicks, xRange },
    ),
  ]);
}

function drawDensities() {
  const nameOf = (row) => `${recipeOf(row)}, seed ${row.seed}`;
  const names = [...new Set(data.dictionaries.map(nameOf))];
  document
    .getElementById("densities-legend")
    .append(legend(names.map((name, index) => [name, index])));
  const [low, high] = data.bins.density;
  put(
    "density-charts",
    hooks.map((hook) => {
      const rows = data.dictionaries.filter((row) => row.hook_name === hook);
      const most = Math.max(1, ...rows.flatMap((row) => row.histogram));
      const x = scale(low, high, SIZE.left, SIZE.width - SIZE.right);
      const y = scale(0, most * 1.05, SIZE.height - SIZE.bottom, SIZE.top);
      const svg = drawn("svg");
      const decades = ticks(low, high, 5).filter((at) =>
        Number.isInteger(Math.round(at * 1e6) / 1e6),
      );
      axes(
        svg,
        x,
        y,
        decades.map((at) => [at, at > -0.5 ? "1" : `1e${Math.round(at)}`]),
        ticks(0, most, 4),
      );
      for (const row of rows) {
        const width = (high - low) / row.histogram.length;
        const steps = row.histogram
          .map((n, i) => `V${y(n).toFixed(1)}H${x(low + (i + 1) * width).toFixed(1)}`)
          .join("");
        svg.append(
          drawn("path", {
            class: `line c${names.indexOf(nameOf(row)) % N_COLOURS}`,
            d: `M${x(low)} ${y(0)}${steps}V${y(0)}`,
          }),
        );
      }
      const dead = rows
        .map((row) => `${number(row.d_sae - row.n_alive)} of ${number(row.d_sae)}`)
        .join(", ");
      const middle = rows
        .map((row) => number(10 ** (row.density_quantiles["0.5"] ?? NaN)))
        .join(", ");
      return figure(
        hook,
        `Density of the latents of ${hook}: median of those that fired ${middle}; never fired ${dead}.`,
        svg,
        `never fired: ${dead}`,
      );
    }),
  );
}

function drawWidths() {
  const charts = [];
  for (const hook of hooks) {
    const rows = data.dictionaries.filter((row) => row.hook_name === hook);
    const layer = data.layers.find((one) => one.hook_name === hook);
    const neurons = rows[0].n_neurons;
    const steps = layer ? layer.width_curve : [];
    if (new Set(rows.map((row) => row.d_sae)).size < 2 && steps.length < 2) continue;
    const widths = [...new Set([...rows, ...steps].map((one) => one.d_sae))].sort((a, b) => a - b);
    const ofRows = (value) =>
      rows.map((row) => ({
        x: Math.log2(row.d_sae),
        y: value(row) / neurons,
        text: `${number(row.d_sae)} latents, seed ${row.seed}`,
      }));
    const series = [
      { name: "alive latents", index: 0, points: ofRows((row) => row.n_alive) },
      { name: "effective features", index: 1, points: ofRows((row) => row.effective_features) },
      {
        name: "features counted",
        index: 2,
        points: steps.map((s) => ({
          x: Math.log2(s.d_sae),
          y: s.n_features / neurons,
          text: `${number(s.d_sae)} atoms`,
        })),
      },
    ];
    charts.push(
      lineChart(`${hook}: per neuron, by latents`, series, {
        xTicks: widths.map((width) => [Math.log2(width), number(width)]),
        xRange: [Math.log2(widths[0]), Math.log2(widths[widths.length - 1])],
      }),
    );
  }
  if (!charts.length)
    charts.push(
      element(
        "p",
        {},
        "Each layer has dictionaries of one width. Train with several expansion factors for a curve.",
      ),
    );
  put("width-charts", charts);
}

drawLayers();
drawDensities();
drawWidths();
