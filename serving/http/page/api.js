/** How the page asks the server: the token, errors, and whether it answers at all. */

const TOKEN = "resnet-token";
const TIMEOUT_MS = 30_000;
const GONE = "the server does not answer; trying again";

/** Dispatches "state" when the state changes. */
export const events = new EventTarget();

/** "fine"; "gone" without an answer; "locked" until there is another token. */
let state = "fine";

/** An answer that is an error, or none at all; its message is a sentence for people. */
export class Failure extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }

  /** What a section says of it: nothing where the page itself says so above. */
  get note() {
    return this.status === 0 || this.status === 401 ? "" : this.message;
  }
}

/** Returns the state. */
export const getState = () => state;

function setState(next) {
  if (next === state) return;
  state = next;
  events.dispatchEvent(new Event("state"));
}

/** Returns the response of the server; throws a `Failure`. */
async function ask(path, options = {}) {
  const token = sessionStorage.getItem(TOKEN);
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  let response;
  try {
    response = await fetch(path, { ...options, headers, signal: AbortSignal.timeout(TIMEOUT_MS) });
  } catch {
    if (state !== "locked") setState("gone");
    throw new Failure(GONE);
  }
  if (response.status === 401) setState("locked");
  else if (state === "gone") setState("fine");
  if (!response.ok) throw await readFailure(response);
  return response;
}

/** Returns the failure that a response with problem details describes. */
async function readFailure(response) {
  const problem = await response.json().catch(() => ({}));
  const id = response.headers.get("x-request-id") ?? problem.request_id;
  const seconds = response.headers.get("retry-after");
  let text = problem.detail || problem.title || `the server answers ${response.status}`;
  if (seconds) text += `; try again in ${seconds} s`;
  if (id) text += ` (request ${id})`;
  return new Failure(text, response.status);
}

/** Returns the JSON at a path. */
export const read = async (path) => (await ask(path)).json();

/** Returns the file at a path. */
export const readBlob = async (path) => (await ask(path)).blob();

/** Returns the answer of a version to an image. */
export async function classify({ model, version }, image, topK) {
  const path = `/classify/${encodeURIComponent(model)}?version=${version}&top_k=${topK}`;
  return (await ask(path, { method: "POST", body: image })).json();
}

/** Returns the path of what belongs to a version. */
export const getPath = ({ model, version }, rest) =>
  `/models/${encodeURIComponent(model)}/versions/${version}/${rest}`;

/** Keeps a token until the tab is closed; throws a `Failure` unless the server accepts it. */
export async function useToken(token) {
  sessionStorage.setItem(TOKEN, token);
  await ask("/status");
  setState("fine");
}

/** Returns whether a token was given before. */
export const hasToken = () => sessionStorage.getItem(TOKEN) !== null;

/** Images of the server as blob: URLs, because <img src> would send no token. */
export class Images {
  #urls = new Map();

  /** Returns the URL of an image, or an empty one until it is here; then calls `onload`. */
  get(path, onload) {
    if (!this.#urls.has(path)) {
      this.#urls.set(path, "");
      readBlob(path)
        .then((blob) => {
          if (!this.#urls.has(path)) return;
          this.#urls.set(path, URL.createObjectURL(blob));
          onload();
        })
        .catch(() => this.#urls.delete(path));
    }
    return this.#urls.get(path);
  }

  /** Releases all images but those at these paths. */
  keep(paths) {
    for (const [path, url] of this.#urls) {
      if (paths.includes(path)) continue;
      URL.revokeObjectURL(url);
      this.#urls.delete(path);
    }
  }
}

/** Calls `work` now and every so many seconds, but not while nobody looks or the server asks for a token. */
export function repeat(work, seconds) {
  let timer;
  const run = async () => {
    clearTimeout(timer);
    if (document.hidden || state === "locked") return;
    await work();
    clearTimeout(timer);
    timer = setTimeout(run, 1000 * seconds);
  };
  document.addEventListener("visibilitychange", run);
  events.addEventListener("state", () => state === "fine" && run());
  run();
}
