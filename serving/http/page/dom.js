/** Elements, made and updated. Text comes in as text nodes only: a label that looks like HTML stays text. */

const SVG = "http://www.w3.org/2000/svg";

/** Returns an element; attributes that are null or false are left out, as are such children. */
export function element(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** The same in SVG. */
export function shape(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

/** Returns the element with an id. */
export const find = (id) => document.getElementById(id);

/** Shows a text, or hides the element if there is none. */
export function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
  node.hidden = !text;
}

/** Returns a table; the first cell of each row is its heading. */
export function table(attributes, caption, head, rows) {
  const columns = head.map((name) => element("th", { scope: "col" }, name));
  const body = rows.map(([first, ...cells]) =>
    element("tr", {}, element("th", { scope: "row" }, first), cells.map((cell) => element("td", {}, cell))),
  );
  return element(
    "table",
    attributes,
    element("caption", {}, caption),
    columns.length > 0 && element("thead", {}, element("tr", {}, columns)),
    element("tbody", {}, body),
  );
}

/** Returns a table that may be wider than a phone; no other place on the page has its name. */
export const wideTable = (caption, head, rows, name = caption) => scrollable(name, table({}, caption, head, rows));

/** Returns an element that scrolls sideways by itself where it is too wide, by keyboard too. */
export function scrollable(name, child) {
  return element("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": name }, child);
}

/** Returns a list of names and values; those without a value are left out. */
export function definitions(pairs) {
  const kept = pairs.filter(([, value]) => value);
  return element("dl", {}, kept.map(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]));
}

/** Puts options into a select, given as [value, text], and keeps what is chosen if it is still there. */
export function fillSelect(select, options, fallback) {
  const content = JSON.stringify(options);
  if (select.dataset.content === content) return;
  const wanted = options.some(([value]) => value === select.value) ? select.value : fallback;
  select.replaceChildren(...options.map(([value, text]) => element("option", { value }, text)));
  select.value = wanted;
  select.dataset.content = content;
}

/** Makes the children of `parent` like `nodes`; what is the same stays, with focus and open details. */
export function update(parent, nodes) {
  const keys = new Set(nodes.map(getKey));
  nodes.forEach((node, index) => {
    while (parent.childNodes[index] && !keys.has(getKey(parent.childNodes[index]))) parent.childNodes[index].remove();
    const found = parent.childNodes[index];
    if (found && getKey(found) === getKey(node)) updateNode(found, node);
    else parent.insertBefore(node, found ?? null);
  });
  while (parent.childNodes.length > nodes.length) parent.lastChild.remove();
}

function updateNode(old, fresh) {
  if (old.nodeType === Node.TEXT_NODE) {
    if (old.data !== fresh.data) old.data = fresh.data;
    return;
  }
  for (const { name, value } of fresh.attributes) {
    if (name !== "open" && old.getAttribute(name) !== value) old.setAttribute(name, value);
  }
  for (const { name } of [...old.attributes]) {
    if (name !== "open" && !fresh.hasAttribute(name)) old.removeAttribute(name);
  }
  update(old, [...fresh.childNodes]);
}

const getKey = (node) => node.dataset?.key ?? node.nodeName;
