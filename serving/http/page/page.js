/** Starts the page: its three sections, the token, and the line that says whether the server answers. */

import { events, getState, hasToken, read, repeat, useToken } from "./api.js";
import * as classify from "./classify.js";
import { find, say } from "./dom.js";
import { duration } from "./format.js";
import * as live from "./live.js";
import * as models from "./models.js";

const STATUS_SECONDS = 5;

/** Asks what the server runs, and tells every section. */
async function refresh() {
  try {
    const status = await read("/status");
    const ready = status.ready ? "ready" : "not ready";
    const { version, transport, uptime_seconds } = status;
    const server = [`version ${version}`, `${transport} transport`, `up ${duration(uptime_seconds)}`, ready];
    say(find("server"), server.join(" \u00b7 "));
    say(find("models-problem"), "");
    classify.showStatus(status);
    models.showStatus(status);
  } catch (failure) {
    say(find("models-problem"), failure.note);
  }
}

/** Shows what the state of the server asks of the person in front of it. */
function showState() {
  const state = getState();
  say(find("gone"), state === "gone" ? "The server does not answer; trying again." : "");
  if (state === "gone") say(find("server"), "");
  const form = find("token-form");
  if (form.hidden === (state !== "locked")) return;
  form.hidden = state !== "locked";
  if (form.hidden) return;
  say(find("token-problem"), hasToken() ? "The server does not accept this token." : "");
  find("token").focus();
}

async function submitToken(event) {
  event.preventDefault();
  const field = find("token");
  try {
    await useToken(field.value.trim());
    field.value = "";
  } catch (failure) {
    say(find("token-problem"), failure.status === 401 ? "The server does not accept this token." : failure.message);
    field.select();
  }
}

find("token-form").addEventListener("submit", submitToken);
events.addEventListener("state", showState);
classify.start();
models.start(classify.showExample);
live.start();
repeat(refresh, STATUS_SECONDS);
