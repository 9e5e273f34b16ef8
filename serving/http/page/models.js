/** The third section: the versions of each model, their certificates, shadows and rollouts. */

import { Images, getPath, read } from "./api.js";
import { definitions, element, find, update, wideTable } from "./dom.js";
import { count, difference, duration, percent, plural, points, variant } from "./format.js";

const images = new Images();
const certificates = new Map(); // what was read of a version, by its path, until the page is loaded again
let status = { models: [] };

const CERTIFICATE = [
  "Variant", "Batch sizes", "Largest difference", "Same class", "Accuracy", "Newly wrong / right",
  "Accuracy lost, at most", "Speedup",
];
const CHECKS = { agreement: "same class", p50: "usual time", p99: "slowest 1\u00a0%" };
const OUTCOMES = {
  OK: "answered", INVALID_ARGUMENT: "invalid", RESOURCE_EXHAUSTED: "refused by a full queue", UNAVAILABLE: "refused",
  DEADLINE_EXCEEDED: "too late", CANCELLED: "cancelled by the caller", INTERNAL: "failed",
};

/** Listens for opened versions, and for examples to be classified by `onexample`. */
export function start(onexample) {
  const list = find("model-list");
  list.addEventListener("toggle", show, true);
  list.addEventListener("click", ({ target }) => {
    const { model, version } = target.closest("button[data-model]")?.dataset ?? {};
    if (!model) return;
    find("classify").scrollIntoView();
    onexample({ model, version }, certificates.get(getPath({ model, version }, "")).worst);
  });
}

/** Shows what a status says. */
export function showStatus(fresh) {
  status = fresh;
  show();
}

function show() {
  const cards = status.models.map(renderModel);
  update(find("model-list"), cards.length ? cards : [element("p", {}, "The server has no models.")]);
  const paths = status.models.flatMap(({ name, versions }) =>
    versions.map(({ version }) => getWorstPath({ model: name, version })),
  );
  images.keep(paths);
}

function renderModel(model) {
  return element(
    "article",
    { class: "card", "data-key": model.name },
    element("h3", {}, model.name),
    model.rollout && renderRollout(model.name, model.rollout),
    model.shadow && renderShadow(model.shadow),
    model.versions.map((version) => renderVersion({ ...version, model: model.name })),
  );
}

function renderRollout(model, { version, stable, state, step, step_seconds, settings, reason, checks, shadow }) {
  const share = settings?.steps?.[step];
  const steps = settings?.steps?.length;
  const part = share === undefined ? "" : `, ${share}\u00a0% of requests`;
  const where = `step ${step + 1}${steps ? ` of ${steps}` : ""}${part}`;
  const running = state === "RUNNING" ? ` ${where}, for ${duration(step_seconds)}` : "";
  const rows = checks.map(({ name, verdict, detail }) => [CHECKS[name] ?? name, badge(verdict.toLowerCase()), detail]);
  const isListed = checks.some(({ detail }) => state === "RUNNING" && reason.includes(detail));
  const why = isListed ? "waits for the checks that are undecided" : reason;
  return element(
    "div",
    { "data-key": "rollout" },
    element(
      "p",
      {},
      element("b", {}, `Rollout of version ${version} in place of ${stable}: `),
      badge(state.toLowerCase().replace("_", " ")),
      `${running}${why ? `; ${why}` : ""}.`,
    ),
    rows.length > 0 && wideTable("Checks of this step", ["Check", "Verdict", "Figures"], rows, `Checks of ${model}`),
    shadow && element("p", {}, element("b", {}, "Answers of both: "), describeShadow(shadow)),
  );
}

function renderShadow(shadow) {
  const who = shadow.other === "original" ? "the Keras original" : `version ${shadow.other}`;
  const title = `Shadow, ${shadow.percent}\u00a0% of requests computed by ${who}, too: `;
  return element("p", {}, element("b", {}, title), describeShadow(shadow));
}

function describeShadow({ agreement, dropped, failed, problem }) {
  const { images = 0, same = 0, max_difference = 0 } = agreement ?? {};
  const figures = Number(images)
    ? [`${percent(same / images, 2)} with the same class`, `the largest difference is ${points(max_difference)}`]
    : [];
  const counts = [
    Number(dropped) && `${count(dropped)} not compared, as the server was busy`,
    Number(failed) && `${count(failed)} not compared, as the other failed`,
  ];
  const parts = [`${plural(images, "image")} compared`, ...figures, ...counts.filter(Boolean)];
  return `${parts.join(", ")}${problem ? `; ${problem}` : ""}.`;
}

function renderVersion(version) {
  const path = getPath(version, "");
  const isOpen = find("model-list").querySelector(`[data-key="${CSS.escape(path)}"]`)?.open ?? version.is_default;
  if (isOpen && version.served) load(version, path);
  const badges = [version.served ? "served" : "refused", version.is_default && "default", ...version.labels];
  return element(
    "details",
    { "data-key": path, open: version.is_default },
    element(
      "summary",
      {},
      element("b", {}, `Version ${version.version}`),
      badges.filter(Boolean).map((name) => [" ", badge(name)]),
      element("span", { class: "muted" }, ` ${variant(version)}`),
    ),
    renderFacts(version),
    certificates.has(path) && renderCertificate(version, certificates.get(path)),
  );
}

function renderFacts({ reason, plan, proof, images, requests, queued, served }) {
  const outcomes = Object.entries(requests ?? {})
    .sort(([, a], [, b]) => b - a)
    .map(([name, number]) => `${count(number)} ${OUTCOMES[name] ?? name.toLowerCase().replaceAll("_", " ")}`);
  return definitions([
    [served ? "Rollout" : "Reason", reason],
    ["Threads", plan],
    ["Proof", proof],
    ["Requests", outcomes.join(", ")],
    ["Images", served && `${count(images)}, and ${count(queued)} in the queue`],
  ]);
}

/** Reads the certificate of a version and its worst example, once. */
async function load(version, path) {
  if (certificates.has(path)) return;
  certificates.set(path, {});
  try {
    const [manifest, { worst }] = await Promise.all([
      read(getPath(version, "manifest")),
      read(getPath(version, "examples")).catch((failure) => (failure.note ? {} : Promise.reject(failure))),
    ]);
    certificates.set(path, { ...manifest, worst });
    show();
  } catch (failure) {
    if (failure.note) certificates.set(path, { problem: failure.message });
    else certificates.delete(path); // asked again with the next status
  }
}

function renderCertificate(version, { manifest, signed, worst, problem }) {
  if (problem) return element("p", { class: "problem" }, problem);
  if (!manifest) return null;
  const { certificate, created, labels } = manifest;
  const about = [
    ["Exported", `${created.slice(0, 16).replace("T", " ")} UTC, ${signed ? "signed" : "not signed"}`],
    ["Classes", `${count(labels.length)}: ${labels.slice(0, 20).join(", ")}${labels.length > 20 ? ", \u2026" : ""}`],
    ["Keras original", `${percent(certificate.accuracy, 2)} right on ${plural(certificate.images, "held-out image")}`],
  ];
  const rows = certificate.variants.map(describeVariant);
  return element(
    "div",
    {},
    definitions(about),
    wideTable(`Certificate of ${version.model}/${version.version}`, CERTIFICATE, rows),
    worst && renderWorst(version, worst),
  );
}

/** Returns the cells of a variant: of all batch sizes, the worst figures. */
function describeVariant({ name, rows, speedup }) {
  const most = (field) => Math.max(...rows.map((row) => row[field]));
  const least = (field) => Math.min(...rows.map((row) => row[field]));
  const speeds = Object.entries(speedup).map(([size, factor]) => `${factor.toFixed(2)}\u00d7 at ${size}`);
  return [
    name,
    rows.map(({ batch_size }) => batch_size).join(", "),
    difference(most("max_difference")),
    percent(least("top1_agreement"), 2),
    percent(least("accuracy"), 2),
    `${most("lost")} / ${most("gained")}`,
    `${(100 * most("drop_bound")).toFixed(2)} points`,
    speeds.join(", ") || "\u2013",
  ];
}

/** Returns the path of the image of a version that its served variant answers most differently. */
const getWorstPath = (version) => getPath(version, `examples/${certificates.get(getPath(version, ""))?.worst?.index}`);

function renderWorst({ model, version }, { index, label, answer, probability }) {
  const src = images.get(getWorstPath({ model, version }), show);
  const button = element(
    "button",
    { "data-model": model, "data-version": version, class: "thumbnail" },
    element("img", { src: src || null, alt: `Classify example ${index}, ${label}` }),
  );
  const original = `the original answers ${answer}, with ${percent(probability)}`;
  const text = `It differs most from the original in example ${index}, which is ${label}: ${original}.`;
  return element("div", { class: "worst" }, button, element("p", {}, text));
}

const badge = (name) => element("span", { class: `badge ${name.replaceAll(" ", "-")}` }, name);
