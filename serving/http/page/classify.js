/** The first section: an image, and what one version or two answer to it. */

import { Images, classify, events, getPath, getState, read, readBlob } from "./api.js";
import { element, fillSelect, find, say, table, update } from "./dom.js";
import { milliseconds, percent, plural, points, signed, variant } from "./format.js";

const LISTED = 5;
const ALL = 1_000_000; // classes, for a comparison
const EXAMPLES = 24;
const SMALL = 100; // pixels, of images whose pixels are shown as they are
const TIMES = [["decode", "reading it"], ["queue", "waiting"], ["compute", "computing"]];

const thumbnails = new Images();
let versions = []; // those that are served, each with the name of its model
let examples = [];
let examplesOf = ""; // the version that they belong to
let input = null; // the image, its name, and for an example what is known of it
let request = 0; // number of the latest
let failed = false;

const getName = ({ model, version }) => `${model}/${version}`;
const findVersion = (name) => versions.find((version) => getName(version) === name);
const getChoice = () => `${find("model").value}/${find("version").value}`;
const getChosen = () => findVersion(getChoice());
const getOther = () => findVersion(find("other").value);

/** Listens to everything that brings an image or chooses a version. */
export function start() {
  find("file").addEventListener("change", ({ target }) => showFile(target.files[0]));
  find("model").addEventListener("change", showChoice);
  for (const id of ["version", "other"]) find(id).addEventListener("change", showChoice);
  find("examples").addEventListener("click", ({ target }) => {
    const index = target.closest("button")?.dataset.index;
    if (index) showExample(getChosen(), examples.find((example) => String(example.index) === index));
  });
  document.addEventListener("paste", ({ clipboardData }) => showFile(clipboardData.files[0]));
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    document.body.classList.add("dragging");
  });
  document.addEventListener("dragleave", ({ relatedTarget }) => {
    if (!relatedTarget) document.body.classList.remove("dragging");
  });
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    document.body.classList.remove("dragging");
    showFile(event.dataTransfer.files[0]);
  });
  find("picture").addEventListener("load", ({ target }) => {
    target.classList.toggle("small", target.naturalHeight < SMALL);
  });
  events.addEventListener("state", () => getState() === "fine" && failed && ask());
}

/** Offers the versions that a status names. */
export function showStatus({ models }) {
  const before = getChoice();
  versions = models.flatMap(({ name, versions }) =>
    versions.filter(({ served }) => served).map((version) => ({ ...version, model: name })),
  );
  offerVersions();
  if (getChoice() !== before) ask();
  loadExamples();
}

function offerVersions() {
  const names = [...new Set(versions.map(({ model }) => model))];
  fillSelect(find("model"), names.map((name) => [name, name]), names[0]);
  const own = versions.filter(({ model }) => model === find("model").value);
  const options = own.map(({ version, is_default, labels }) => {
    const notes = [...(is_default ? ["default"] : []), ...labels].join(", ");
    return [String(version), notes ? `${version} (${notes})` : String(version)];
  });
  const fallback = own.find(({ is_default }) => is_default) ?? own.at(-1);
  fillSelect(find("version"), options, String(fallback?.version));
  fillSelect(find("other"), [["", "nothing"], ...versions.map(getName).map((name) => [name, name])], "");
}

function showChoice() {
  offerVersions();
  loadExamples();
  ask();
}

async function loadExamples() {
  const version = getChosen();
  const name = version ? getName(version) : "";
  if (name === examplesOf) return;
  examplesOf = name;
  examples = [];
  try {
    const found = version ? (await read(getPath(version, "examples"))).examples : [];
    if (name !== examplesOf) return;
    examples = found.slice(0, EXAMPLES);
    say(find("examples-problem"), examples.length ? "" : "There are none.");
  } catch (failure) {
    if (name !== examplesOf) return;
    if (!failure.note) examplesOf = ""; // asked again with the next status
    say(find("examples-problem"), failure.note);
  }
  thumbnails.keep([]);
  showExamples();
}

function showExamples() {
  const version = findVersion(examplesOf);
  const items = examples.map(({ index, label }) => {
    const src = version && thumbnails.get(getPath(version, `examples/${index}`), showExamples);
    const image = element("img", { src: src || null, alt: `Example ${index}, ${label}` });
    return element("li", {}, element("button", { "data-index": index, title: label }, image));
  });
  update(find("examples"), items);
}

function showFile(file) {
  if (file) showImage({ blob: file, name: file.name });
}

/** Classifies a held-out example of a version. */
export async function showExample(version, example) {
  find("model").value = version.model;
  offerVersions();
  find("version").value = version.version;
  loadExamples();
  try {
    const blob = await readBlob(getPath(version, `examples/${example.index}`));
    await showImage({ blob, name: `example ${example.index}`, example, original: getName(version) });
  } catch (failure) {
    showFailure(failure);
  }
}

async function showImage(image) {
  input = image;
  const picture = find("picture");
  URL.revokeObjectURL(picture.src);
  picture.src = URL.createObjectURL(image.blob);
  picture.alt = `The image: ${image.name}`;
  picture.hidden = false;
  find("file").value = ""; // the same file may be chosen again
  await ask();
}

/** Asks one version or two about the image, and shows what they answer. */
async function ask() {
  const asked = [getChosen(), getOther()].filter(Boolean);
  if (!asked.length) find("verdict").textContent = "The server has no model to ask.";
  if (!input || !asked.length) return;
  const number = ++request;
  const image = input;
  find("answers").setAttribute("aria-busy", "true");
  try {
    const topK = asked.length > 1 ? ALL : LISTED;
    const answers = await Promise.all(asked.map((version) => classify(version, image.blob, topK)));
    if (number === request) showAnswers(answers, image);
  } catch (failure) {
    if (number === request) showFailure(failure);
  }
  if (number === request) find("answers").setAttribute("aria-busy", "false");
}

function showFailure(failure) {
  failed = true;
  find("verdict").textContent = failure.note ? "There is no answer." : "The answer comes when the server gives one.";
  find("answers").replaceChildren();
  const again = element("button", { type: "button" }, "Try again");
  again.addEventListener("click", ask);
  find("classify-problem").replaceChildren(...(failure.note ? [`${failure.note} `, again] : []));
}

function showAnswers(answers, image) {
  failed = false;
  find("classify-problem").replaceChildren();
  const comparison = answers.length > 1 && compare(...answers);
  const verdicts = answers.map((answer) => {
    const [best] = getClasses(answer);
    return `${getName(answer)} answers ${best.label}, with ${percent(best.probability)}`;
  });
  find("verdict").textContent = `${[...verdicts, comparison && comparison.sentence].filter(Boolean).join("; ")}.`;
  find("answers").replaceChildren(
    ...(image.example ? [describeExample(image)] : []),
    element("div", { class: "pair" }, answers.map(renderAnswer)),
    ...(comparison.rows ? [renderDifferences(comparison.rows, answers.map(getName))] : []),
  );
}

const getClasses = (answer) => answer.classifications[0].classes;

function describeExample({ example, original }) {
  const { index, label, answer, probability } = example;
  const text = `Example ${index} is ${label}; the Keras model that ${original} was made of answers ${answer}`;
  return element("p", {}, `${text}, with ${percent(probability)}.`);
}

function renderAnswer(answer) {
  const version = findVersion(getName(answer));
  const listed = getClasses(answer).slice(0, LISTED);
  const isLong = listed.some(({ label }) => label.length > 12);
  const rows = listed.map(({ label, probability }) => [label, renderBar("bar", probability), percent(probability)]);
  return element(
    "article",
    { class: "answer" },
    element("h3", {}, getName(answer), " ", element("span", { class: "muted" }, version && variant(version))),
    table({ class: isLong ? "bars long" : "bars" }, `Most probable classes of ${getName(answer)}`, [], rows),
    renderTiming(answer.timing),
  );
}

function renderBar(name, share) {
  const bar = element("div", { class: name });
  bar.style.width = `${100 * share}%`;
  return bar;
}

function renderTiming({ batch_size, ...times }) {
  const parts = TIMES.map(([name, words]) => ({ name, words, time: times[`${name}_ns`] }));
  const total = parts.reduce((sum, { time }) => sum + time, 0);
  const bars = parts.map(({ name, time }) => renderBar(name, time / (total || 1)));
  const legend = parts.map(({ name, words, time }) =>
    element("li", { class: `key ${name}` }, `${words} ${milliseconds(time)}`),
  );
  return element(
    "div",
    { class: "timing" },
    element("div", { class: "stack", "aria-hidden": "true" }, bars),
    element("ul", { class: "legend" }, legend, element("li", {}, `in a batch of ${plural(batch_size, "image")}`)),
  );
}

/** Returns how two answers differ: a sentence, and the classes listed in either, the most different first. */
function compare(first, second) {
  const others = new Map(getClasses(second).map((item) => [item.index, item]));
  const classes = getClasses(first);
  if (others.size !== classes.length || classes.some(({ index, label }) => others.get(index)?.label !== label)) {
    return { sentence: "the two have other labels, so their probabilities are not compared" };
  }
  const rows = classes
    .map(({ index, label, probability }) => {
      const other = others.get(index).probability;
      return { index, label, probability, other, difference: other - probability };
    })
    .sort((a, b) => Math.abs(b.difference) - Math.abs(a.difference));
  const [largest] = rows;
  const listed = new Set([first, second].flatMap((answer) => getClasses(answer).slice(0, LISTED).map((c) => c.index)));
  const sentence = largest.difference
    ? `the largest difference is ${points(largest.difference)}, of class ${largest.label}`
    : "both give the same probabilities";
  return { sentence, rows: rows.filter(({ index }) => listed.has(index)) };
}

function renderDifferences(rows, names) {
  const cells = rows.map((row) => [row.label, percent(row.probability), percent(row.other), signed(row.difference)]);
  const head = ["Class", ...names, "Points"];
  return table({ class: "differences" }, "Differences in percentage points", head, cells);
}
