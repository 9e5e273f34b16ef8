/** The page of the API: what /openapi.json says, for people. */

import { read } from "./api.js";
import { definitions, element, find, say, scrollable, wideTable } from "./dom.js";

const METHODS = ["get", "post", "put", "patch", "delete", "head", "options"];

let api;

/** Reads the description of the API, and shows it by its tags. */
async function start() {
  try {
    api = await read("/openapi.json");
  } catch (failure) {
    say(find("docs-problem"), failure.message);
    return;
  }
  say(find("server"), [api.info?.title, api.info?.version].filter(Boolean).join(" "));
  const groups = groupOperations();
  const errors = api.components?.responses;
  const links = [...groups.keys()].map((tag) => element("a", { href: `#${getId(tag)}` }, tag));
  find("tags").append(...links, ...(errors ? [element("a", { href: "#errors" }, "Errors")] : []));
  find("operations").append(...[...groups].map(([tag, operations]) => renderGroup(tag, operations)));
  if (errors) find("operations").append(renderErrors(errors));
  if (api.security?.length) say(find("docs-token"), "Callers need a token, as the header Authorization: Bearer TOKEN.");
  find(decodeURIComponent(location.hash.slice(1)))?.scrollIntoView(); // it was not there when the browser looked
}

const getId = (tag) => `tag-${tag.toLowerCase().replace(/[^a-z0-9]+/g, "-")}`;

/** Returns the operations by their first tag, in the order of the description. */
function groupOperations() {
  const groups = new Map((api.tags ?? []).map(({ name }) => [name, []]));
  for (const [path, item] of Object.entries(api.paths ?? {})) {
    for (const method of METHODS.filter((name) => item[name])) {
      const operation = { ...item[method], path, method, shared: item.parameters ?? [] };
      const tag = operation.tags?.[0] ?? "Other";
      groups.set(tag, [...(groups.get(tag) ?? []), operation]);
    }
  }
  return new Map([...groups].filter(([, operations]) => operations.length));
}

function renderGroup(tag, operations) {
  const text = api.tags?.find(({ name }) => name === tag)?.description;
  const title = element("h2", { id: `${getId(tag)}-title` }, tag);
  return element(
    "section",
    { id: getId(tag), "aria-labelledby": `${getId(tag)}-title` },
    title,
    text && element("p", { class: "prose" }, text),
    operations.map(renderOperation),
  );
}

function renderOperation({ method, path, summary, description, parameters = [], shared, ...operation }) {
  const name = `${method.toUpperCase()} ${path}`;
  const all = [...shared, ...parameters].map(resolve);
  const body = resolve(operation.requestBody);
  const example = operation["x-curl"];
  const rows = all.map((parameter) => [
    element("code", {}, parameter.name),
    `${parameter.in}${parameter.required ? ", required" : ""}`,
    describeType(parameter.schema),
    parameter.description ?? "",
  ]);
  return element(
    "section",
    { class: "card operation", "aria-label": name },
    element(
      "details",
      {},
      element("summary", {}, element("code", {}, element("b", {}, method.toUpperCase()), ` ${path} `), summary),
      description && element("p", { class: "prose" }, description),
      example && scrollable(`Example of ${name}`, element("pre", {}, example.replace("localhost:8080", location.host))),
      rows.length > 0 && wideTable("Parameters", ["Name", "In", "Type", "Description"], rows, `Parameters of ${name}`),
      body && [element("h3", {}, "Body"), body.description && element("p", {}, body.description), renderContent(body)],
      element("h3", {}, "Answers"),
      Object.entries(operation.responses ?? {}).map(renderResponse),
    ),
  );
}

/** Returns the errors by name; the `type` of a problem refers to these. */
function renderErrors(errors) {
  const rows = Object.entries(errors).map(([name, error]) => [element("code", { id: name }, name), error.description]);
  const title = element("h2", { id: "errors-title" }, "Errors");
  const problem = api.components.schemas?.Problem;
  const list = element(
    "div",
    { class: "card" },
    wideTable("Errors by name", ["Name", "Meaning"], rows),
    problem && [element("h3", {}, "What each has"), renderSchema(problem, [])],
  );
  return element("section", { id: "errors", "aria-labelledby": "errors-title" }, title, list);
}

function renderResponse([code, found]) {
  const response = resolve(found);
  const name = definitions([[code === "default" ? "otherwise" : code, response.description ?? "\u2013"]]);
  return element("div", {}, name, code.startsWith("2") && renderContent(response)); // those of errors are all alike
}

function renderContent({ content = {} }) {
  return Object.entries(content).map(([type, { schema }]) =>
    element(
      "div",
      { class: "content" },
      element("code", {}, type),
      schema && ` ${describeType(schema)}`,
      schema && renderSchema(schema, []),
    ),
  );
}

/** Returns the list of a schema's properties, each with its own; a schema inside itself is only named. */
function renderSchema(schema, above) {
  const found = getItems(resolve(schema));
  const properties = Object.entries(found.properties ?? {});
  if (!properties.length || above.includes(found)) return null;
  const items = properties.map(([name, property]) => {
    const text = resolve(property).description ?? property.description;
    return element(
      "li",
      {},
      element("code", {}, name),
      element("span", { class: "muted" }, ` ${describeType(property)}`),
      text && ` ${text}`,
      renderSchema(property, [...above, found]),
    );
  });
  return element("ul", { class: "schema" }, items);
}

/** Returns the schema of the items of an array, or of what a schema that may be null is otherwise. */
function getItems(schema) {
  const choice = (schema.anyOf ?? schema.oneOf ?? schema.allOf)?.find(({ type }) => type !== "null");
  const inner = schema.items ?? choice ?? schema.additionalProperties;
  return typeof inner === "object" && !schema.properties ? getItems(resolve(inner)) : schema;
}

/** Returns the type of a schema in words, as "list of Version". */
function describeType(schema = {}) {
  if (schema.$ref) return schema.$ref.split("/").at(-1);
  const choices = schema.anyOf ?? schema.oneOf ?? schema.allOf;
  if (choices) return choices.map(describeType).join(" or ");
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" or ");
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.format === "binary") return "file";
  if (schema.items) return `list of ${describeType(schema.items)}`;
  return [schema.type ?? (schema.properties ? "object" : "any")].flat().join(" or ");
}

/** Returns what a reference inside the description points to. */
function resolve(value) {
  if (!value?.$ref) return value;
  const keys = value.$ref.slice(2).split("/").map((key) => key.replaceAll("~1", "/").replaceAll("~0", "~"));
  return resolve(keys.reduce((found, key) => found[key], api));
}

start();
