/** The second section: what the server did in the last ten minutes. */

import { read, repeat } from "./api.js";
import { Chart, SECONDS } from "./chart.js";
import { find, say } from "./dom.js";

const POLL_SECONDS = 2;

const charts = [
  new Chart("Requests a second", [["requests_per_second"]]),
  new Chart("Time to answer in ms", [["p50_ms", "half within"], ["p99_ms", "99\u00a0% within"]]),
  new Chart("Images a batch", [["batch_images"]]),
  new Chart("Images in the queue", [["queued"]]),
  new Chart("Refusals a second", [["refused_per_second"]]),
];

let samples = [];

/** Shows the charts, and keeps them up to date. */
export function start() {
  find("charts").append(...charts.map((chart) => chart.element));
  repeat(refresh, POLL_SECONDS);
}

async function refresh() {
  try {
    const last = samples.at(-1)?.time;
    const history = await read(last === undefined ? "/history" : `/history?since=${last}`);
    add(history.samples);
    for (const chart of charts) chart.show(samples, history.interval_seconds);
    say(find("live-problem"), "");
  } catch (failure) {
    say(find("live-problem"), failure.note);
  }
}

/** Adds the samples that are new, and drops those older than ten minutes. */
function add(fresh) {
  const last = samples.at(-1)?.time ?? 0;
  samples.push(...fresh.filter((sample) => sample.time > last));
  const end = samples.at(-1)?.time ?? 0;
  samples = samples.filter((sample) => sample.time >= end - SECONDS);
}
