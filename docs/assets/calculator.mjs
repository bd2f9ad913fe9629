// The calculator's page: a form, a sentence with what to set, tables and charts. The address holds the form's state.

import { FAMILY, InputError, RUN_FIELDS, advise, curves, g, range, readCrossings, ruleInWords, stepRatio } from "./transfer.mjs";

const NUMBERS = ["from-rank", "to-rank", "alpha", "to-alpha", "lr", "steps", "to-steps", "displacement-constant"];
const OPTIONAL = ["to-rule", "schedule", "to-schedule"]; // lists with an empty entry
const NUMBER = /^[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$/i;
const LARGEST_FILE = 20e6; // bytes

function make(space, name, attributes, children) {
  const node = document.createElementNS(`http://www.w3.org/${space}`, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}
const html = (name, attributes = {}, ...children) => make("1999/xhtml", name, attributes, children);
const svg = (name, attributes = {}, ...children) => make("2000/svg", name, attributes, children);

/** Build a table. On a phone a row's cells stand under each other, which removes the table's implicit roles: name them. */
function table(caption, heads, rows) {
  const head = heads.map((text) => html("th", { role: "columnheader", scope: "col" }, text));
  const body = rows.map((cells) =>
    html("tr", { role: "row" }, ...cells.map((cell, i) =>
      i ? html("td", { role: "cell", "data-head": heads[i] }, cell) : html("th", { role: "rowheader", scope: "row" }, cell))));
  return html("table", { role: "table", class: "calculator-table" }, html("caption", {}, caption),
    html("thead", { role: "rowgroup" }, html("tr", { role: "row" }, ...head)), html("tbody", { role: "rowgroup" }, ...body));
}

/** Build a chart with two logarithmic axes. The caption states its content in words. */
function chart(id, caption, ranks, lines, marks, width) {
  const [left, right, bottom, row] = [52, 10, 38, 18];
  const top = 10 + row * lines.length;
  const height = top + 210 + bottom;
  const values = lines.flatMap((line) => line.values).map(Math.log10);
  const [low, high] = [Math.min(...values) - 0.08, Math.max(...values) + 0.08];
  const x = (rank) => left + ((width - left - right) * Math.log2(rank)) / Math.log2(ranks.at(-1));
  const y = (value) => height - bottom - ((height - bottom - top) * (Math.log10(value) - low)) / (high - low);
  const text = (position, attributes, content) => svg("text", { x: position[0], y: position[1], ...attributes }, content);
  const parts = [];
  const labelSpacing = Math.ceil((34 * ranks.length) / (width - left - right));
  for (const rank of ranks.filter((_, i) => i % labelSpacing === 0)) parts.push(text([x(rank), height - bottom + 16], { "text-anchor": "middle" }, `${rank}`));
  parts.push(text([(left + width - right) / 2, height - 6], { "text-anchor": "middle" }, "rank"));
  const factors = high - low < 0.9 ? [1, 1.5, 2, 3, 5, 7] : high - low < 2 ? [1, 2, 5] : [1];
  for (let power = Math.floor(low); power <= high; power++) {
    const ticks = factors.map((factor) => factor * 10 ** power);
    for (const value of ticks.filter((tick) => Math.log10(tick) >= low && Math.log10(tick) <= high)) {
      parts.push(svg("line", { class: "grid", x1: left, x2: width - right, y1: y(value), y2: y(value) }));
      parts.push(text([left - 6, y(value) + 4], { "text-anchor": "end" }, g(value, 3)));
    }
  }
  for (const rank of marks) parts.push(svg("line", { class: "mark", x1: x(rank), x2: x(rank), y1: top, y2: height - bottom }));
  lines.forEach((line, i) => {
    const points = line.values.map((value, j) => `${x(ranks[j]).toFixed(1)},${y(value).toFixed(1)}`).join(" ");
    parts.push(svg("polyline", { class: `line line-${i}`, points }));
    parts.push(svg("line", { class: `line line-${i}`, x1: left, x2: left + 30, y1: row * i + 10, y2: row * i + 10 }));
    parts.push(text([left + 38, row * i + 14], {}, line.name));
  });
  const drawing = svg("svg", { role: "img", "aria-labelledby": id, viewBox: `0 0 ${width} ${height}`, width, height }, ...parts);
  return html("figure", {}, drawing, html("figcaption", { id }, caption));
}

/** Build the charts of the growth of the first step and of the learning rate against the rank. */
function charts(inputs, advice, width) {
  const rows = curves(inputs);
  const ranks = rows.map((row) => row.rank);
  const { old, unchanged } = advice;
  const growth = (crossing) => `${g(stepRatio({ ...unchanged, lr: old.lr }, old, crossing), 3)} times`;
  const lines = [{ name: "signal alone", key: "signal" }, { name: "cross-talk alone", key: "cross_talk" }];
  if (rows[0].measured !== null) lines.push({ name: "measured, mean over modules", key: "measured" });
  const filledLines = lines.map((line) => ({ ...line, values: rows.map((row) => row[line.key]) }));
  const setting = `alpha ${g(unchanged.alpha, 6)} under ${ruleInWords(unchanged.rule)} and the learning rate ${g(old.lr, 3)}`;
  const measured = rows[0].measured === null ? "" : `, and as measured ${g(advice.stepsOf(unchanged).mean, 3)} times`;
  const caption = `Growth of the first step with the rank, with ${setting}: at rank ${unchanged.rank} it is ${growth(0)} the tuned ` +
    `one if the signal dominates, ${growth(Infinity)} if cross-talk does${measured}. Dotted: the two ranks.`;
  const marks = [old.rank, unchanged.rank];
  const figures = [chart("calculator-growth", caption, ranks, filledLines, marks, width)];
  // The learning rate against the rank: its range by the displacement law, or the two limits.
  const column = advice.followsDisplacementLaw ? "rate_range" : "rate_limits";
  const keys = advice.followsDisplacementLaw
    ? [["rate to use", "best"], ["lowest", "low"], ["highest", "high"]]
    : [["first step", "first_step"], ["long run", "long_run"]];
  if (rows[0][column] !== null) {
    const rateLines = keys.map(([name, key]) => ({ name, values: rows.map((row) => row[column][key]) }));
    const rates = advice.followsDisplacementLaw ? advice.rateRangeOf(unchanged) : advice.rate_limits;
    const values = keys.map(([name, key]) => `${g(rates[key], 3)} (${name})`).join(", ");
    const rateCaption = `Learning rate at alpha ${g(unchanged.alpha, 6)} under ${ruleInWords(unchanged.rule)}: at rank ${unchanged.rank} ${values}.`;
    figures.push(chart("calculator-rates", rateCaption, ranks, rateLines, marks, width));
  }
  return figures;
}

/** Build the tables of common choices and of the types of modules. */
function tables(advice) {
  const { followsDisplacementLaw, rate_limits: limits } = advice;
  const heads = followsDisplacementLaw
    ? ["choice", "scaling", "divide the rate by (range)", "rate"]
    : ["choice", "scaling", "first step", "rate that preserves it"];
  if (limits) heads.push("in a long run");
  const rows = advice.choices.map((choice) => [
    choice.name, g(choice.scaling, 4), followsDisplacementLaw ? range(choice.divisor, 3) : `${range(choice.step, 4)} x`,
    g(choice.learning_rate, 3), ...(limits ? [g(choice.rate_limits.long_run, 3)] : []),
  ]);
  const caption = `Learning rate for common choices at rank ${advice.unchanged.rank}, under ${ruleInWords(advice.old.rule)} unless stated`;
  const result = [table(caption, heads, rows)];
  if (advice.groups.length > 1) {
    const groups = advice.groups.map((group) => [group.name, range(group.alpha, 6), range(group.learning_rate, 4), range(group.step_ratio, 4)]);
    result.push(table("Alpha and rate that preserve the first step of each type of module: mean (range over modules)",
      ["modules", `alpha at rate ${g(advice.old.lr, 6)}`, `rate at alpha ${g(advice.unchanged.alpha, 6)}`, "step if neither changes"], groups));
  }
  return result;
}

/** Connect the form to the sentence, the tables and the charts. */
function mount(form) {
  const [status, result] = ["calculator-status", "calculator-result"].map((id) => document.getElementById(id));
  const fields = [...form.elements].filter((field) => field.name && field.type !== "file");
  const defaults = Object.fromEntries(fields.map((field) => [field.name, field.value]));
  let file = null;

  function setField(name, value) {
    const field = fields.find((candidate) => candidate.name === name);
    if (!field) return;
    if (field.options && ![...field.options].some((option) => option.value === value)) field.add(new Option(value, value));
    field.value = value;
  }

  function readForm() {
    const inputs = {};
    for (const { name, value, disabled } of fields) {
      const text = value.trim();
      if (!NUMBERS.includes(name)) inputs[name] = text;
      else inputs[name] = text === "" || disabled ? null : NUMBER.test(text) ? Number(text) : text;
    }
    for (const name of OPTIONAL) inputs[name] = inputs[name] || null;
    for (const name of RUN_FIELDS) if (form.elements[name].disabled) inputs[name] = null;
    if (inputs.regime === "measured" && file !== null) inputs.regime = readCrossings(file.text, inputs);
    return inputs;
  }

  function update() {
    const { optimizer, init, regime, split } = form.elements;
    const hasLaw = FAMILY[optimizer.value] === "adam" && init.value === "kaiming_uniform" && regime.value === "signal";
    for (const name of RUN_FIELDS) form.elements[name].disabled = !hasLaw;
    split.disabled = regime.value !== "measured";
    const changed = fields.filter((field) => !field.disabled && field.value.trim() !== defaults[field.name]);
    const query = new URLSearchParams(changed.map((field) => [field.name, field.value.trim()])).toString();
    history.replaceState(null, "", query ? `?${query}` : location.pathname);
    for (const field of form.elements) field.removeAttribute("aria-invalid");
    let text, parts = [];
    try {
      const inputs = readForm();
      const advice = advise(inputs);
      const width = Math.max(280, Math.min(result.clientWidth, 720));
      const stated = fields.filter((field) => !field.disabled && field.value.trim() !== (field.options ? defaults[field.name] : ""));
      const options = stated.map((field) => `--${field.name} ${field.value.trim()}`);
      const command = `rora transfer ${options.join(" ").replace("--regime measured", "--regime RUN")}`;
      parts = [...tables(advice), ...charts(inputs, advice, width)];
      for (const code of [advice.config, command]) parts.push(html("pre", { tabindex: "0" }, html("code", {}, code)));
      text = advice.sentence;
    } catch (error) {
      if (!(error instanceof InputError)) throw error;
      text = error.message.replace(/\.?$/, ".");
      form.elements[error.field]?.setAttribute("aria-invalid", "true");
    }
    status.classList.toggle("calculator-refused", !parts.length);
    if (status.textContent !== text) status.textContent = text;
    result.replaceChildren(...parts);
  }

  async function readFile(chosen) {
    if (!chosen) return;
    file = { text: chosen.size > LARGEST_FILE ? "" : await chosen.text() };
    document.getElementById("calculator-file").textContent = chosen.name;
    setField("regime", "measured");
    update();
  }

  for (const [name, value] of new URLSearchParams(location.search)) setField(name, value);
  form.addEventListener("input", (event) => event.target.type !== "file" && update());
  form.addEventListener("submit", (event) => event.preventDefault());
  form.elements.file.addEventListener("change", (event) => readFile(event.target.files[0]));
  for (const name of ["dragover", "drop"]) {
    form.addEventListener(name, (event) => {
      event.preventDefault();
      form.classList.toggle("calculator-over", name === "dragover");
      if (name === "drop") readFile(event.dataTransfer.files[0]);
    });
  }
  form.addEventListener("dragleave", () => form.classList.remove("calculator-over"));
  window.addEventListener("resize", update);
  update();
}

mount(document.getElementById("calculator-form"));
