"use strict";
// The browser of features. An address such as #hook/x4/seed0/feature12 opens one, and stays valid.

const FINEST = 255;
const ROWS_AT_ONCE = 200;
const ARRAYS = { u1: Uint8Array, u2: Uint16Array, u4: Uint32Array, f4: Float32Array };
const shownDictionaries = data.dictionaries.filter(
  (row) => row.views !== null && row.views.n_shown,
);
const byId = (id) => document.getElementById(id);
const state = {
  dictionary: null,
  features: [],
  ordered: [],
  column: "density",
  descending: true,
  limit: ROWS_AT_ONCE,
};

function decoded([kind, text]) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  return new ARRAYS[kind](bytes.buffer);
}

// Newlines and tabs as signs, so that a window stays on its lines.
function visible(token) {
  const text = data.vocabulary[token];
  return text === undefined ? "·" : text.replace(/\n/g, "↵").replace(/\t/g, "⇥");
}

// As `visible`, of a token on its own: one of spaces alone would be seen nowhere.
function named(token) {
  const text = visible(token);
  return text.trim() ? text : text.replace(/ /g, "␣");
}

function featuresOf(row) {
  const { n_contexts: k, window: w, n_shown: m } = row.views;
  const arrays = Object.fromEntries(
    Object.entries(row.views)
      .filter(([, value]) => Array.isArray(value))
      .map(([name, value]) => [name, decoded(value)]),
  );
  const part = (name, i) =>
    arrays[name].subarray((i * arrays[name].length) / m, ((i + 1) * arrays[name].length) / m);
  return Array.from({ length: m }, (_, i) => {
    const [tokens, shares] = [part("tokens", i), part("shares", i)];
    const contexts = Array.from({ length: k }, (_, c) => ({
      tokens: tokens.subarray(c * w, (c + 1) * w),
      shares: shares.subarray(c * w, (c + 1) * w),
    })).filter((one) => one.tokens.some((token) => token < data.vocabulary.length));
    const peaks = contexts.map((one) =>
      named(one.tokens[one.shares.indexOf(Math.max(...one.shares))]),
    );
    const promoted = [...part("promoted", i)];
    return {
      latent: arrays.latents[i],
      density: arrays.densities[i],
      mean: arrays.means[i],
      highest: arrays.highest[i],
      histogram: part("histogram", i),
      contexts,
      promoted,
      logits: part("logits", i),
      neighbours: part("neighbours", i),
      cosines: part("cosines", i),
      peaks: [...new Set(peaks)].join(" "),
      promotes: promoted.slice(0, 4).map(named).join(" "),
    };
  });
}

const COLUMNS = [
  ["latent", "Feature", (f) => String(f.latent)],
  ["density", "Density", (f) => number(f.density)],
  ["mean", "Mean", (f) => number(f.mean)],
  ["highest", "Highest", (f) => number(f.highest)],
  ["peaks", "Peaks at", (f) => f.peaks],
  ["promotes", "Promotes", (f) => f.promotes],
];
// Activations without tokens have nothing to say in columns of tokens.
const columns = () =>
  COLUMNS.filter(([column]) => !isText(column) || state.features.some((f) => f[column]));
const isText = (column) => column === "peaks" || column === "promotes";
const addressOf = (row, latent) => {
  const dictionary = `#${row.address.split("/").map(encodeURIComponent).join("/")}`;
  return latent === undefined ? dictionary : `${dictionary}/feature${latent}`;
};

function drawHead() {
  byId("feature-table").tHead.rows[0].replaceChildren(
    ...columns().map(([column, title]) => {
      const button = element("button", { type: "button" }, title);
      button.addEventListener("click", () => {
        state.descending =
          state.column === column ? !state.descending : !isText(column) && column !== "latent";
        state.column = column;
        drawTable();
      });
      return element(
        "th",
        { scope: "col", "data-column": column, class: isText(column) ? "words" : "" },
        button,
      );
    }),
  );
}

function drawTable() {
  const wanted = byId("filter").value.toLowerCase();
  const matches = (f) =>
    !wanted ||
    String(f.latent) === wanted ||
    `${f.peaks} ${f.promotes}`.toLowerCase().includes(wanted);
  const { column, descending } = state;
  const order = isText(column)
    ? (a, b) => a[column].localeCompare(b[column])
    : (a, b) => a[column] - b[column];
  state.ordered = state.features
    .filter(matches)
    .sort((a, b) => (descending ? -order(a, b) : order(a, b)));
  for (const th of byId("feature-table").tHead.rows[0].cells) {
    if (th.dataset.column === column)
      th.setAttribute("aria-sort", descending ? "descending" : "ascending");
    else th.removeAttribute("aria-sort");
  }
  byId("feature-table").tBodies[0].replaceChildren(
    ...state.ordered.slice(0, state.limit).map((f) => {
      const link = element("a", { href: addressOf(state.dictionary, f.latent) }, String(f.latent));
      const cells = columns()
        .slice(1)
        .map(([name, , text]) =>
          element("td", { class: isText(name) ? "words tokens" : "" }, text(f)),
        );
      return element("tr", {}, element("th", { scope: "row" }, link), ...cells);
    }),
  );
  byId("matches").textContent = `${state.ordered.length} of ${state.features.length} features`;
  byId("more").hidden = state.ordered.length <= state.limit;
  byId("more").textContent = `Show all ${state.ordered.length}`;
}

function drawActivations(feature) {
  const counts = [...feature.histogram];
  const first = counts.findIndex((n) => n > 0);
  const last = counts.length - 1 - [...counts].reverse().findIndex((n) => n > 0);
  const edge = (bin) => 2 ** (data.bins.lowest_log2 + bin / data.bins.per_octave);
  const most = Math.max(...counts);
  const x = scale(first, last + 1, SIZE.left, SIZE.width - SIZE.right);
  const y = scale(0, most * 1.05, SIZE.height - SIZE.bottom, SIZE.top);
  const svg = drawn("svg");
  const every = Math.ceil((last + 1 - first) / 6);
  const edges = Array.from({ length: last + 2 - first }, (_, i) => first + i).filter(
    (bin) => (bin - first) % every === 0,
  );
  axes(
    svg,
    x,
    y,
    edges.map((bin) => [bin, number(edge(bin), 2)]),
    ticks(0, most, 4).filter(Number.isInteger),
  );
  for (let bin = first; bin <= last; bin += 1) {
    const text = `${number(edge(bin))} to ${number(edge(bin + 1))}: ${number(counts[bin])} tokens`;
    svg.append(
      drawn(
        "rect",
        {
          class: "bar",
          x: x(bin) + 1,
          width: Math.max(1, x(bin + 1) - x(bin) - 2),
          y: y(counts[bin]),
          height: y(0) - y(counts[bin]),
        },
        drawn("title", {}, text),
      ),
    );
  }
  const top = counts.indexOf(most);
  return figure(
    "Tokens by activation",
    `Histogram of activations from ${number(edge(first))} to ${number(edge(last + 1))}; most, ${number(most)} tokens, between ${number(edge(top))} and ${number(edge(top + 1))}.`,
    svg,
  );
}

function drawContext(context, highest) {
  const peak = context.shares.indexOf(Math.max(...context.shares));
  const value = (i) => number((context.shares[i] / FINEST) * highest);
  const inside = [...context.tokens.keys()].filter(
    (i) => context.tokens[i] < data.vocabulary.length,
  );
  const spans = inside.map((i) => {
    const token = element(i === peak ? "mark" : "span", {}, visible(context.tokens[i]));
    if (context.shares[i]) {
      token.classList.add("on");
      // Set by script, since the policy of the page allows no styles in attributes.
      token.style.setProperty("--share", context.shares[i] / FINEST);
      token.title = `activation ${value(i)}`;
    }
    return token;
  });
  return element(
    "li",
    {},
    element("p", { class: "tokens" }, ...spans),
    element("p", { class: "note" }, `peak ${value(peak)} at “${named(context.tokens[peak])}”`),
  );
}

function section(title, ...content) {
  return element("section", {}, element("h4", {}, title), ...content);
}

function drawFeature(feature) {
  const row = state.dictionary;
  const place = state.ordered.indexOf(feature);
  const step = (name, to) =>
    to
      ? element(
          "a",
          { href: addressOf(row, to.latent), rel: name === "Previous" ? "prev" : "next" },
          name,
        )
      : element("span", { class: "off" }, name);
  const fact = (name, value) =>
    element("div", {}, element("dt", {}, name), element("dd", {}, value));
  const neighbours = [...feature.neighbours].map((latent, i) => {
    const known = state.features.some((one) => one.latent === latent);
    return element(
      "li",
      {},
      known ? element("a", { href: addressOf(row, latent) }, String(latent)) : String(latent),
      element("span", { class: "value" }, number(feature.cosines[i])),
    );
  });
  const promoted = feature.promoted.map((token, i) =>
    element(
      "li",
      {},
      element("span", { class: "tokens" }, named(token)),
      element("span", { class: "value" }, number(feature.logits[i])),
    ),
  );
  const title = element("h3", { id: "feature-title", tabindex: "-1" }, `Feature ${feature.latent}`);
  byId("feature").replaceChildren(
    title,
    element("p", { class: "note" }, titleOf(row)),
    element(
      "p",
      { class: "steps" },
      step("Previous", state.ordered[place - 1]),
      step("Next", place < 0 ? undefined : state.ordered[place + 1]),
      element("a", { href: addressOf(row, feature.latent), id: "link" }, "Link to this feature"),
    ),
    element(
      "dl",
      {},
      fact(
        "Density",
        `${number(feature.density)} (${number(feature.density * data.n_tokens)} tokens)`,
      ),
      fact("Mean where on", number(feature.mean)),
      fact("Highest", number(feature.highest)),
    ),
    drawActivations(feature),
    section(
      "Where it is most active",
      feature.contexts.length
        ? element(
            "ol",
            { class: "contexts" },
            ...feature.contexts.map((one) => drawContext(one, feature.highest)),
          )
        : element("p", {}, "These activations came without tokens, so there are no contexts."),
    ),
    section(
      "Tokens that it promotes",
      promoted.length
        ? element("ol", { class: "pairs" }, ...promoted)
        : element(
            "p",
            {},
            "Not known: no model was given, or the hook does not lead straight to its unembedding.",
          ),
    ),
    section("Nearest decoder directions", element("ol", { class: "pairs" }, ...neighbours)),
  );
  byId("feature").hidden = false;
  byId("browser").classList.add("open");
  title.focus({ preventScroll: true });
  byId("feature").scrollIntoView({ block: "start" });
}

function choose(row) {
  if (state.dictionary === row) return;
  Object.assign(state, { dictionary: row, features: featuresOf(row), limit: ROWS_AT_ONCE });
  byId("dictionary").value = row.address;
  byId("filter").value = "";
  byId("feature").hidden = true;
  byId("browser").classList.remove("open");
  const [shown, all] = [state.features.length, number(row.d_sae)];
  byId("rule").textContent =
    shown === row.n_alive
      ? `All ${number(shown)} latents that fired, of ${all}.`
      : `${number(shown)} of ${all} latents, at even ranks of density among an even sample of those that fired.`;
  byId("feature-caption").textContent = `Features of ${titleOf(row)}`;
  drawHead();
  drawTable();
}

// Opens what the address names; addresses of sections are the browser's own to follow.
function follow() {
  let address;
  try {
    address = decodeURIComponent(location.hash.slice(1));
  } catch {
    address = location.hash.slice(1);
  }
  byId("unknown").textContent = "";
  if (!address || byId(address)) return;
  const [, name, latent] = address.match(/^(.*?)(?:\/feature(\d+))?$/s);
  const row = shownDictionaries.find((one) => one.address === name);
  if (row) choose(row);
  const feature =
    row && latent !== undefined && state.features.find((one) => one.latent === Number(latent));
  if (feature) drawFeature(feature);
  else {
    if (!row || latent !== undefined)
      byId("unknown").textContent = `This page shows no ${address}.`;
    byId("features").scrollIntoView();
    byId("features").focus({ preventScroll: true });
  }
}

if (shownDictionaries.length) {
  byId("browser").hidden = false;
  byId("dictionary").append(
    ...shownDictionaries.map((row) => element("option", { value: row.address }, titleOf(row))),
  );
  byId("dictionary").addEventListener("change", () => {
    const row = shownDictionaries.find((one) => one.address === byId("dictionary").value);
    choose(row);
    // The address follows, so that it never names a feature that is no longer open.
    history.replaceState(null, "", addressOf(row));
  });
  byId("filter").addEventListener("input", drawTable);
  byId("more").addEventListener("click", () => {
    state.limit = Infinity;
    drawTable();
  });
  choose(shownDictionaries[0]);
} else {
  byId("no-features").hidden = false;
}
window.addEventListener("hashchange", follow);
follow();
