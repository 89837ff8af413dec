/* Which experts the router chose for an answer: one sentence, one table, and the same layer by layer. */

import { element } from "./dom.js";

const KINDS = {
  image: "image",
  video: "video",
  audio: "sound",
  speech: "speech",
  text: "your text",
  answer: "the answer",
};
const expertName = (name) => (name === "audio" ? "sound" : name);
let openNext = true;

/** A view of {experts: [name], load: {kind: [layer][expert] token counts}}; null where nothing was routed. */
export function expertView({ experts = [], load = {} }) {
  const kinds = Object.keys(KINDS).filter((kind) => sum(overLayers(load[kind] ?? [])) > 0);
  if (!kinds.length) return null;
  const names = experts.map(expertName);
  const view = element(
    "details",
    { class: "experts", open: openNext },
    element("summary", {}, inWords(kinds, names, load)),
    overview(kinds, names, load),
    element("details", { class: "layers" }, element("summary", {}, "Layer by layer"), byLayer(kinds, names, load)),
  );
  // Who folds it away once wants it folded in the next answers too.
  view.firstChild.addEventListener("click", () => (openNext = !view.open));
  return view;
}

function inWords(kinds, names, load) {
  const parts = kinds.map((kind, index) => {
    const all = shares(overLayers(load[kind]));
    const top = all.indexOf(Math.max(...all));
    const who = kind === "text" || kind === "answer" ? KINDS[kind] : `${KINDS[kind]} tokens`;
    return `${who} ${index ? "" : "went most often "}to ${names[top]} (${Math.round(all[top])}\u00a0%)`;
  });
  const text = new Intl.ListFormat("en").format(parts);
  return `${text[0].toUpperCase()}${text.slice(1)}.`;
}

function overview(kinds, names, load) {
  const rows = kinds.map((kind) =>
    element("tr", rowOf(kind), element("th", { scope: "row" }, KINDS[kind]), ...cells(overLayers(load[kind]))),
  );
  const caption = "Experts by kind of token, in % of what the router sent out over all layers";
  return table(caption, ["tokens of"], names, [element("tbody", {}, ...rows)]);
}

function byLayer(kinds, names, load) {
  const groups = kinds.map((kind) => {
    const rows = load[kind].map((counts, layer) => {
      const heading = layer
        ? null
        : element("th", { scope: "rowgroup", rowspan: load[kind].length }, KINDS[kind]);
      return element("tr", rowOf(kind), heading, element("th", { scope: "row" }, String(layer + 1)), ...cells(counts));
    });
    return element("tbody", {}, ...rows);
  });
  return table("The same in each layer, in %", ["tokens of", "layer"], names, groups);
}

function table(caption, headings, names, bodies) {
  const columns = [...headings, ...names].map((name) => element("th", { scope: "col" }, name));
  return element(
    "div",
    { class: "scroll" },
    element(
      "table",
      {},
      element("caption", {}, caption),
      element("thead", {}, element("tr", {}, ...columns)),
      ...bodies,
    ),
  );
}

function cells(counts) {
  const all = shares(counts);
  const top = Math.max(...all);
  return all.map((share) => {
    const cell = element("td", { class: share === top ? "top" : null }, `${Math.round(share)}`);
    cell.style.setProperty("--share", (share / 100).toFixed(3));
    return cell;
  });
}

const rowOf = (kind) => ({ class: `c-${kind}`, "data-kind": kind });
const sum = (numbers) => numbers.reduce((total, number) => total + number, 0);

function overLayers(layers) {
  return (layers[0] ?? []).map((_, expert) => sum(layers.map((counts) => counts[expert])));
}

function shares(counts) {
  const total = sum(counts) || 1;
  return counts.map((count) => (100 * count) / total);
}
