/** A small line chart of the last minutes. */

import { element, shape } from "./dom.js";

export const SECONDS = 600;
const SPANS = [60, 120, 300, SECONDS]; // the first that has room for what there is: a new server has little
const WIDTH = 300;
const HEIGHT = 72;

/** A chart of one or more figures of the history. */
export class Chart {
  #values;
  #title = shape("title");
  #top = element("span", { class: "top", "aria-hidden": "true" });
  #start = element("span");
  #paths;

  /** `lines` are [field, name] pairs; a single line needs no name. */
  constructor(name, lines) {
    Object.assign(this, { name, lines });
    this.#values = lines.map(() => element("b"));
    this.#paths = lines.map((_, index) => shape("path", { class: `line line-${index}` }));
    const figures = lines.map(([, label], index) =>
      element("span", { class: label && `key line-${index}` }, label && `${label} `, this.#values[index]),
    );
    const grid = shape("path", { class: "grid", d: `M0 0H${WIDTH}M0 ${HEIGHT / 2}H${WIDTH}M0 ${HEIGHT}H${WIDTH}` });
    const box = { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img" };
    this.element = element(
      "figure",
      { class: "card chart" },
      element("figcaption", {}, element("span", {}, name), element("span", {}, figures)),
      element("div", { class: "plot" }, shape("svg", box, this.#title, grid, this.#paths), this.#top),
      element("div", { class: "axis", "aria-hidden": "true" }, this.#start, element("span", {}, "now")),
    );
  }

  /** Draws the samples of the history, oldest first. */
  show(samples, interval) {
    const limit = roundUp(Math.max(0, ...samples.flatMap((sample) => this.lines.map(([field]) => sample[field] ?? 0))));
    const end = samples.at(-1)?.time ?? 0;
    const span = SPANS.find((seconds) => end - (samples[0]?.time ?? end) <= seconds) ?? SECONDS;
    const minutes = span / 60;
    const texts = this.lines.map(([field, label], index) => {
      const values = samples.map((sample) => sample[field]).filter((value) => value !== null);
      const last = samples.at(-1)?.[field] ?? null;
      const now = last === null ? "none" : format(last);
      this.#values[index].textContent = last === null ? "\u2013" : now;
      this.#paths[index].setAttribute("d", drawLine(samples, field, { end, span, limit, pause: 3 * interval }));
      const most = values.length ? `, at most ${format(Math.max(...values))}` : "";
      return `${label ? `${label} ` : ""}${now} now${most}`;
    });
    this.#top.textContent = format(limit);
    this.#start.textContent = `${minutes} min ago`;
    const period = minutes === 1 ? "minute" : `${minutes} minutes`;
    const title = `${this.name} in the last ${period}: ${texts.join("; ")}`;
    if (this.#title.textContent !== title) this.#title.textContent = title;
  }
}

const format = (value) => value.toFixed(value >= 100 || Number.isInteger(value) ? 0 : value >= 10 ? 1 : 2);

/** Returns the smallest of 1, 2, 5, 10, 20, ... that is at least a value. */
function roundUp(value) {
  const power = 10 ** Math.floor(Math.log10(value || 1));
  return [1, 2, 5, 10].map((step) => step * power).find((step) => step >= value);
}

/** Returns the path of a line; it has a gap where there was no value, or no sample for longer than `pause` seconds. */
function drawLine(samples, field, { end, span, limit, pause }) {
  let path = "";
  let before = -Infinity;
  for (const { time, [field]: value } of samples) {
    if (value === null) continue;
    const x = (WIDTH * (1 - (end - time) / span)).toFixed(1);
    const y = (HEIGHT * (1 - value / limit)).toFixed(1);
    path += time - before > pause ? `M${x} ${y}h0` : `L${x} ${y}`;
    before = time;
  }
  return path;
}
