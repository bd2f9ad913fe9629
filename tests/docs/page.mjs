// Runs the calculator's page without a browser and prints the text of its tables: node page.mjs < {module, fields, query, file}

import { readFileSync } from "fs";

class Element {
  constructor(name, properties = {}) {
    Object.assign(this, { name, attributes: {}, children: [], listeners: {}, classList: { toggle() {} } }, properties);
  }
  setAttribute(key, value) { this.attributes[key] = value; }
  removeAttribute(key) { delete this.attributes[key]; }
  append(...children) { this.children.push(...children); }
  replaceChildren(...children) { this.children = children; }
  addEventListener(kind, listener) { this.listeners[kind] = listener; }
  all(name) { return this.children.flatMap((child) => [...(child.name === name ? [child] : []), ...(child.all?.(name) ?? [])]); }
  get text() { return this.children.map((child) => child.text ?? child).join(""); }
}

const { module, fields, query, file } = JSON.parse(readFileSync(0));
const form = new Element("form", { elements: fields.map((field) => new Element(field.name, field)) });
for (const field of form.elements) form.elements[field.name] = field;
const parts = { "calculator-form": form };
globalThis.document = {
  createElementNS: (_, name) => new Element(name),
  getElementById: (id) => (parts[id] ??= new Element(id, { clientWidth: 720 })),
};
globalThis.window = new Element("window");
globalThis.location = { search: query, pathname: "/" };
globalThis.history = { replaceState() {} };

await import(module);
if (file) await form.elements.file.listeners.change({ target: { files: [{ size: file.length, name: "run.csv", text: async () => file }] } });
const texts = (nodes) => nodes.map((node) => node.text);
const tables = parts["calculator-result"].all("table").map((table) => ({
  caption: table.all("caption")[0].text,
  heads: texts(table.all("thead")[0].all("th")),
  rows: table.all("tbody")[0].all("tr").map((row) => texts(row.children)),
  named: table.all("tbody")[0].all("tr").map((row) => row.children.slice(1).map((cell) => cell.attributes["data-head"])),
}));
console.log(JSON.stringify({ status: parts["calculator-status"].textContent, tables }));
