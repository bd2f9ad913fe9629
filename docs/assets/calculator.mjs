// The calculator's page: a form, a sentence with what to set, a chart and a table. The address holds the form's state.

import { InputError, advise, choices, curves } from "./transfer.mjs";

const TEXTS = ["rule", "to-rule", "schedule", "to-schedule"];
const NUMBER = /^[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$/i;

function make(space, name, attributes, children) {
  const node = document.createElementNS(`http://www.w3.org/${space}`, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}
const html = (name, attributes = {}, ...children) => make("1999/xhtml", name, attributes, children);
const svg = (name, attributes = {}, ...children) => make("2000/svg", name, attributes, children);

/** A number in at most three digits, as trainers accept it. */
const short = (value) => (value >= 1e-3 && value < 1e6 ? `${Number(value.toPrecision(3))}` : value.toExponential(2).replace(/\.?0+e/, "e"));
const rangeOf = ({ low, high }) => (high / low < 1 + 1e-9 ? "" : ` (${short(low)} to ${short(high)})`);

/** What to do with the rate, in words. */
function changeOf(rate, old) {
  const ratio = rate / old;
  if (Math.abs(ratio - 1) < 1e-9) return `keep the learning rate ${short(old)}`;
  return ratio < 1 ? `divide the learning rate by ${short(1 / ratio)}` : `multiply the learning rate by ${short(ratio)}`;
}

function sentenceOf(inputs, advice) {
  const isSame = inputs["to-alpha"] == null && inputs.rule === "lora";
  const alpha = `${isSame ? "keep" : "set"} lora_alpha=${Number(advice.loraAlpha.toPrecision(6))}${inputs.rule === "lora" && inputs["to-rule"] == null ? "" : " without use_rslora"}`;
  const change = changeOf(advice.rate, inputs.lr);
  const rate = change.startsWith("keep") ? "" : `, to ${short(advice.rate)}${rangeOf(advice)}`;
  const schedule = advice.hasUnmeasuredSchedule ? " The effect of this change of schedule was not measured." : "";
  return `At rank ${advice.rank}, ${alpha} and ${change}${rate}.${schedule}`;
}

/** A chart of best rates against the rank, on two logarithmic axes. */
function chart(lines, marks, width) {
  const [left, right, bottom, row] = [46, 14, 34, 17];
  const columns = width < 340 ? 1 : 2;
  const top = 8 + row * Math.ceil(lines.length / columns);
  const height = top + 170 + bottom;
  const { ranks } = lines[0];
  const logs = lines.flatMap((line) => line.rates).map(Math.log10);
  const [low, high] = [Math.min(...logs) - 0.08, Math.max(...logs) + 0.08];
  const x = (rank) => left + ((width - left - right) * Math.log2(rank)) / Math.log2(ranks.at(-1));
  const y = (rate) => height - bottom - ((height - bottom - top) * (Math.log10(rate) - low)) / (high - low);
  const text = (place, attributes, content) => svg("text", { x: place[0], y: place[1], ...attributes }, content);
  const parts = [];
  const spacing = Math.ceil((34 * ranks.length) / (width - left - right));
  for (const rank of ranks.filter((_, i) => i % spacing === 0)) parts.push(text([x(rank), height - bottom + 15], { "text-anchor": "middle" }, `${rank}`));
  parts.push(text([(left + width - right) / 2, height - 4], { "text-anchor": "middle" }, "rank"));
  const factors = high - low < 1.5 ? [1, 2, 5] : [1, 3];
  for (let power = Math.floor(low); power <= high; power++) {
    for (const tick of factors.map((factor) => factor * 10 ** power)) {
      if (Math.log10(tick) < low || Math.log10(tick) > high) continue;
      parts.push(svg("line", { class: "grid", x1: left, x2: width - right, y1: y(tick), y2: y(tick) }));
      parts.push(text([left - 5, y(tick) + 4], { "text-anchor": "end" }, tick.toExponential(0)));
    }
  }
  for (const rank of marks) parts.push(svg("line", { class: "mark", x1: x(rank), x2: x(rank), y1: top, y2: height - bottom }));
  lines.forEach((line, i) => {
    const points = line.rates.map((rate, j) => `${x(ranks[j]).toFixed(1)},${y(rate).toFixed(1)}`).join(" ");
    parts.push(svg("polyline", { class: `line line-${i}`, points }));
    const [column, place] = [left + (i % columns) * ((width - left) / 2), row * Math.floor(i / columns) + 8];
    parts.push(svg("line", { class: `line line-${i}`, x1: column, x2: column + 22, y1: place, y2: place }));
    parts.push(text([column + 27, place + 4], {}, line.name));
  });
  const drawing = svg("svg", { role: "img", "aria-labelledby": "calculator-chart", viewBox: `0 0 ${width} ${height}`, width, height }, ...parts);
  const values = lines.map((line) => `${short(line.atNewRank)} with ${line.name}`).join(", ");
  const caption = `Best learning rate against the rank. At rank ${marks[1]}: ${values}. Dotted: the two ranks.`;
  return html("figure", {}, drawing, html("figcaption", { id: "calculator-chart" }, caption));
}

function table(inputs) {
  const heads = ["at the new rank", "learning rate (range)", "divide by"];
  const rows = choices(inputs.alpha, inputs["to-rank"]).map(({ name, ...change }) => {
    const advice = advise({ ...inputs, ...change });
    return [name, short(advice.rate) + rangeOf(advice), short(inputs.lr / advice.rate)];
  });
  const body = rows.map(([name, ...cells]) => html("tr", {}, html("th", { scope: "row" }, name), ...cells.map((cell) => html("td", {}, cell))));
  return html("table", { class: "calculator-table" }, html("caption", {}, "Other choices, with the same tuned setting"),
    html("thead", {}, html("tr", {}, ...heads.map((head) => html("th", { scope: "col" }, head)))), html("tbody", {}, ...body));
}

/** Connect the form to the sentence, the chart and the table. */
function mount(form) {
  const [status, result] = ["calculator-status", "calculator-result"].map((id) => document.getElementById(id));
  const fields = [...form.elements].filter((field) => field.name);
  const defaults = Object.fromEntries(fields.map((field) => [field.name, field.value]));

  function readForm() {
    return Object.fromEntries(fields.map(({ name, value }) => {
      const text = value.trim();
      if (text === "") return [name, null];
      return [name, !TEXTS.includes(name) && NUMBER.test(text) ? Number(text) : text];
    }));
  }

  function update() {
    const changed = fields.filter((field) => field.value.trim() !== defaults[field.name]);
    const query = new URLSearchParams(changed.map((field) => [field.name, field.value.trim()])).toString();
    history.replaceState(null, "", query ? `?${query}` : location.pathname);
    for (const field of fields) field.removeAttribute("aria-invalid");
    let text, parts = [];
    try {
      const inputs = readForm();
      const advice = advise(inputs);
      text = sentenceOf(inputs, advice);
      const width = Math.max(280, Math.min(result.clientWidth, 640));
      const others = choices(inputs.alpha, inputs["to-rank"]);
      const lines = curves(inputs).map((line, i) => ({ ...line, atNewRank: advise({ ...inputs, ...others[i] }).rate }));
      const stated = fields.filter((field) => field.value.trim() !== "");
      const command = `rora transfer ${stated.map((field) => `--${field.name} ${field.value.trim()}`).join(" ")}`;
      const config = `LoraConfig(r=${advice.rank}, lora_alpha=${Number(advice.loraAlpha.toPrecision(6))}, ...)  # learning rate ${short(advice.rate)}`;
      const code = [config, command].map((line) => html("pre", { tabindex: "0" }, html("code", {}, line)));
      parts = [chart(lines, [inputs["from-rank"], inputs["to-rank"]], width), table(inputs), ...code];
    } catch (error) {
      if (!(error instanceof InputError)) throw error;
      text = error.message;
      const field = form.elements[error.field];
      field?.setAttribute("aria-invalid", "true");
      const folded = field?.closest("details");
      if (folded) folded.open = true;
    }
    status.classList.toggle("calculator-refused", !parts.length);
    if (status.textContent !== text) status.textContent = text;
    result.replaceChildren(...parts);
  }

  for (const [name, value] of new URLSearchParams(location.search)) {
    const field = fields.find((candidate) => candidate.name === name);
    if (!field) continue;
    if (field.options && ![...field.options].some((option) => option.value === value)) field.add(new Option(value, value));
    field.value = value;
    const folded = field.closest("details");
    if (folded) folded.open = true;
  }
  form.addEventListener("input", update);
  form.addEventListener("submit", (event) => event.preventDefault());
  window.addEventListener("resize", update);
  update();
}

mount(document.getElementById("calculator-form"));
