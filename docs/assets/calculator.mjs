// The calculator: what `rora transfer` answers, in the browser. The formulas are those of rora_theory.advice,
// rora_theory.theory.horizon and rora_theory.scaling; tests/docs/test_calculator.py holds every figure against them.

const KAPPAS = { lora: 1, rora: 0.5, rslora: 0.5 };
const FAMILY = { sgd: "sgd", momentum: "sgd", adam: "adam", adamw: "adam" };
const WORDS = { sgd: "SGD", momentum: "SGD with momentum", adam: "Adam", adamw: "AdamW" };
const DEVIATION = { kaiming_uniform: () => Math.sqrt(1 / 3), gaussian: (r) => 1 / r, normal: () => 1, rademacher: () => 1 };
const PEFT_INITS = { kaiming_uniform: "True", gaussian: "'gaussian'" };
const REGIMES = { signal: 0, "cross-talk": Infinity };
const TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"];
const LARGEST = 2 ** 31 - 1;
const MOST_STEPS = 10_000_000; // more than a browser counts through while one types
export const FILE = "crossing_ranks.csv";
export const LABELS = {
  "from-rank": "Tuned rank", alpha: "Tuned alpha", lr: "Learning rate", rule: "Tuned rule", optimizer: "Optimizer",
  init: "Start of A", "to-rank": "New rank", "to-rule": "New rule", "to-alpha": "New alpha", regime: "Regime",
  steps: "Planned steps", "p-in": "Width", takeover: "Takeover distance", split: "Tokens", file: FILE,
};

/** Bad input: one line, and the field that it is about. */
export class InputError extends Error {
  constructor(field, said, accepted) {
    super(`${LABELS[field]} ${said}; accepted is ${accepted}`);
    this.field = field;
  }
}

/** A number as Python's format(value, ".{digits}g") writes it: ties go to the even digit. */
export function g(value, digits) {
  if (!Number.isFinite(value)) return value > 0 ? "inf" : "-inf";
  let [mantissa, exponent] = Math.abs(value).toExponential(digits - 1).split("e");
  const exact = Math.abs(value).toExponential(60).split("e")[0].replace(".", "");
  if (/^50*$/.test(exact.slice(digits)) && exact[digits - 1] % 2 === 0) {
    mantissa = exact.slice(0, digits).replace(/^(.)(.+)/, "$1.$2");
    exponent = Math.abs(value).toExponential(60).split("e")[1];
  }
  const power = Number(exponent);
  const sign = value < 0 ? "-" : "";
  const trim = (text) => (text.includes(".") ? text.replace(/\.?0+$/, "") : text);
  if (power >= -4 && power < digits) return sign + trim(Number(`${mantissa}e${power}`).toFixed(Math.max(0, digits - 1 - power)));
  return `${sign}${trim(mantissa)}e${power < 0 ? "-" : "+"}${String(Math.abs(power)).padStart(2, "0")}`;
}

/** Mean, smallest and largest, as one cell. */
const range = ({ mean, smallest, largest }, digits) =>
  g(mean, digits) + (largest - smallest < 1e-9 * largest ? "" : ` (${g(smallest, 3)} to ${g(largest, 3)})`);
function rangeOf(values) {
  const [smallest, largest] = [values.reduce((a, b) => Math.min(a, b)), values.reduce((a, b) => Math.max(a, b))];
  const logs = values.reduce((sum, each) => sum + Math.log(each), 0);
  return { mean: smallest === largest ? smallest : Math.exp(logs / values.length), smallest, largest };
}

const kappaOf = (rule) => KAPPAS[rule] ?? Number(rule);
const scaling = (setting) => setting.alpha / setting.rank ** kappaOf(setting.rule);
const alphaFor = (rule, gamma, rank) => gamma / (1 / rank ** kappaOf(rule));
const deviation = (setting) => DEVIATION[setting.init](setting.rank);
const isClose = (a, b) => Math.abs(a - b) <= 1e-9 * Math.max(Math.abs(a), Math.abs(b));

/** What the rank alone does to the rms of the first step; c is 0 where the signal leads, Infinity where cross-talk does. */
export function growth(from, to, c) {
  return c === Infinity ? Math.sqrt(to / from) : Math.sqrt((to * (to + c)) / (from * (from + c)));
}

/** How many times larger the first step is under `next` than under `old`. */
function stepRatio(next, old, c) {
  const strength = (scaling(next) * deviation(next)) / (scaling(old) * deviation(old));
  const power = FAMILY[old.optimizer] === "sgd" ? 2 : 1;
  return (next.lr / old.lr) * strength ** power * growth(old.rank, next.rank, c);
}

/** Distance that A moves in so many steps at a constant gradient and rate under Adam, B's gradient growing with it. */
export function distanceOfA(lr, steps, takeover) {
  const [beta1, beta2] = [0.9, 0.999];
  const pace = () => {
    let first = 0, second = 0, count = 0;
    return (gradient) => {
      count += 1;
      first = beta1 * first + (1 - beta1) * gradient;
      second = beta2 * second + (1 - beta2) * gradient ** 2;
      return second === 0 ? 0 : first / (1 - beta1 ** count) / Math.sqrt(second / (1 - beta2 ** count));
    };
  };
  const [paceB, paceA] = [pace(), pace()];
  let a = 0, b = 0;
  for (let step = 0; step < steps; step++) {
    const before = b;
    b += lr * paceB(1 + a / takeover);
    a += lr * paceA(before);
  }
  return a;
}

/** Factor of the rate that keeps the change where gamma r grows `strength` times and A's part is rho times B's. */
function rateFactor(strength, rho) {
  if (rho === Infinity) return strength ** -0.5;
  const target = (1 + rho) / strength;
  return (2 * target) / (1 + Math.sqrt(1 + 4 * rho * target));
}

function checkInteger(asked, field) {
  const value = asked[field];
  if (!Number.isInteger(value) || value < 1) throw new InputError(field, `is ${value ?? "empty"}`, "an integer of 1 or more");
  if (value > LARGEST) throw new InputError(field, `is ${value}`, "an integer of at most 2,147,483,647");
}

function checkPositive(asked, field) {
  const value = asked[field];
  if (!(Number.isFinite(value) && value > 0)) throw new InputError(field, `is ${value ?? "empty"}`, "a finite number above 0");
}

function check(asked) {
  for (const field of ["from-rank", "to-rank"]) checkInteger(asked, field);
  for (const field of ["alpha", "lr"]) checkPositive(asked, field);
  if (asked["to-alpha"] != null) checkPositive(asked, "to-alpha");
  for (const [field, known] of [["optimizer", FAMILY], ["init", DEVIATION]]) {
    if (!Object.hasOwn(known, asked[field])) {
      throw new InputError(field, `is ${asked[field]}`, `one of ${Object.keys(known).join(", ")}`);
    }
  }
  for (const [field, rule] of [["rule", asked.rule], ["to-rule", asked["to-rule"] ?? asked.rule]]) {
    if (!Number.isFinite(kappaOf(rule)) || rule === "") {
      throw new InputError(field, `is ${rule}`, "lora, rora, rslora or a finite exponent kappa");
    }
  }
  if (typeof asked.regime === "string" && !Object.hasOwn(REGIMES, asked.regime)) {
    const missing = asked.regime === "measured";
    throw missing
      ? new InputError("regime", "is measured and no file is here", `a ${FILE}: an address does not carry it`)
      : new InputError("regime", `is ${asked.regime}`, "signal, cross-talk or measured");
  }
  if (typeof asked.regime !== "string" && !Object.keys(asked.regime).length) {
    throw new InputError("regime", "has no module", "one linear term or more");
  }
}

/** A over B at the end of the planned run, and the takeover distance; null where no run is planned. */
function planOf(asked, old) {
  const given = ["steps", "takeover", "p-in"].filter((field) => asked[field] != null);
  if (!given.length) return null;
  if (FAMILY[old.optimizer] !== "adam" || asked.regime !== "signal") {
    throw new InputError(given[0], `is ${asked[given[0]]}`, "none but with Adam or AdamW and the regime signal");
  }
  if (asked.steps == null) throw new InputError(given[0], `is ${asked[given[0]]} without steps`, "planned steps beside it");
  checkInteger(asked, "steps");
  if (asked.steps > MOST_STEPS) throw new InputError("steps", `is ${asked.steps}`, "an integer of at most 10,000,000");
  if (given.length === 3) throw new InputError("takeover", "is there and so is the width", "one of the two");
  let takeover = asked.takeover ?? null;
  if (takeover !== null) checkPositive(asked, "takeover");
  if (asked["p-in"] != null) {
    checkInteger(asked, "p-in");
    const wide = old.init === "kaiming_uniform" ? Math.sqrt(1 / (3 * asked["p-in"])) : deviation(old);
    takeover = wide / Math.sqrt(asked["p-in"]);
  }
  const rho = takeover === null ? null : distanceOfA(old.lr, asked.steps, takeover) / takeover;
  return { steps: asked.steps, takeover, isAssumed: asked["p-in"] != null, rho };
}

/** What to set; `asked` has the options of `rora transfer` by name, and a regime is a name or linear terms by module. */
export function advise(asked) {
  check(asked);
  const { optimizer, init } = asked;
  const old = { rank: asked["from-rank"], alpha: asked.alpha, lr: asked.lr, rule: asked.rule, optimizer, init };
  const fixesAlpha = asked["to-alpha"] != null;
  const kept = { ...old, rank: asked["to-rank"], rule: asked["to-rule"] ?? old.rule, alpha: asked["to-alpha"] ?? old.alpha };
  for (const [field, setting] of [["rule", old], ["to-rule", kept]]) {
    if (!(scaling(setting) > 0 && scaling(setting) < Infinity)) {
      throw new InputError(field, `is ${setting.rule}: gamma is not a float above 0`, "an exponent nearer to 0");
    }
  }
  const isMeasured = typeof asked.regime !== "string";
  const terms = isMeasured ? asked.regime : { "all modules": REGIMES[asked.regime] };
  const family = FAMILY[optimizer];
  const modules = Object.entries(terms).map(([name, c]) => {
    const unchanged = stepRatio(kept, old, c);
    const gamma = scaling(kept) * unchanged ** (family === "sgd" ? -1 / 2 : -1);
    return { name, c, alpha: alphaFor(kept.rule, gamma, kept.rank), learning_rate: old.lr / unchanged, unchanged };
  });
  const plan = planOf(asked, old);
  const hasHorizon = family === "adam" && asked.regime === "signal";
  const span = (value) =>
    hasHorizon ? { first_step: value(0), planned: plan?.rho == null ? null : value(plan.rho), A_led: value(Infinity) } : null;
  const ratio = (next) => deviation(old) / deviation(next);
  const strength = (next, rho) => {
    const first = stepRatio({ ...next, lr: old.lr }, old, 0);
    return rho === Infinity ? first * ratio(next) : (first * (1 + rho * ratio(next))) / (1 + rho);
  };
  const ratesOf = (next) => span((rho) => old.lr * rateFactor(strength(next, rho), rho * ratio(next)));
  const stepsOf = (next) => rangeOf(modules.map((module) => stepRatio(next, old, module.c)));
  const alphas = span((rho) => alphaFor(kept.rule, scaling(kept) / strength(kept, rho), kept.rank));
  const rates = ratesOf(kept);
  const best = (ends) => ends.planned ?? ends.first_step;
  const mean = (name) => rangeOf(modules.map((module) => module[name])).mean;
  const alpha = fixesAlpha ? kept.alpha : alphas ? best(alphas) : mean("alpha");
  const learningRate = !fixesAlpha ? old.lr : rates ? best(rates) : mean("learning_rate");
  const found = { old, kept, alpha, learning_rate: learningRate, alphas, rates, plan, modules, fixesAlpha, ratesOf, stepsOf };
  const kinds = { "all modules": modules };
  if (isMeasured) for (const each of modules) (kinds[each.name.split(".").at(-1)] ??= []).push(each);
  found.groups = Object.entries(kinds).map(([name, own]) => ({
    name,
    ...Object.fromEntries(["alpha", "learning_rate", "unchanged"].map((part) => [part, rangeOf(own.map((m) => m[part]))])),
  }));
  found.choices = choicesOf(found);
  found.sentence = sentenceOf(found, isMeasured ? `measured at ${modules.length} modules` : `assumed: ${asked.regime}`, asked.regime);
  found.config = configOf(found);
  return found;
}

function choicesOf({ old, kept, ratesOf, stepsOf }) {
  const flags = { ", without use_rslora": "lora", ", use_rslora": "rslora" };
  const rules = [["", old.rule], ...Object.entries(flags).filter(([, rule]) => kappaOf(rule) !== kappaOf(old.rule))];
  const alphas = [[`alpha = ${g(old.alpha, 6)}, as it was`, old.alpha], ["alpha = r", kept.rank], ["alpha = 2r", 2 * kept.rank]];
  return alphas.flatMap(([name, alpha]) =>
    rules.map(([flag, rule]) => {
      const next = { ...kept, alpha, rule };
      const step = stepsOf(next);
      return { name: name + flag, scaling: scaling(next), step, learning_rate: next.lr / step.mean, rates: ratesOf(next) };
    }),
  );
}

function ruleInWords(rule) {
  const kappa = kappaOf(rule);
  return { 1: "alpha / r", 0.5: "alpha / sqrt(r) (use_rslora)" }[kappa] ?? `alpha / r^${g(kappa, 6)}`;
}

function sentenceOf(found, regime, named) {
  const { old, kept, alpha, learning_rate: rate } = found;
  const alphaKept = kappaOf(kept.rule) === kappaOf(old.rule) && isClose(alpha, old.alpha);
  const verb = (isKept) => (isKept ? "keep" : "set");
  const what = `${verb(alphaKept)} alpha ${g(alpha, 6)} under ${ruleInWords(kept.rule)} and ${verb(isClose(rate, old.lr))}`;
  const said = [`Going from rank ${old.rank} to ${kept.rank} with ${WORDS[old.optimizer]}: ${what} the learning rate ${g(rate, 3)}.`];
  const span = found.fixesAlpha ? found.rates : found.alphas;
  const took = "It takes the signal to lead and the gradient to keep its direction.";
  if (FAMILY[old.optimizer] !== "adam") {
    said.push("That keeps the first step, and later ones as long as gamma times the sum of the rates times the " +
      "gradient's largest singular value is far below 1; beyond that A matters too.");
    said.push(`${named === "signal" ? "It takes the signal to lead" : `The regime is ${regime}`}; clipping of the gradient changes the law.`);
  } else if (!span) {
    said.push(`That keeps the rms of each module's first step; the regime is ${regime}.`);
    said.push("It is not known what keeps later steps in this regime: for the model as a whole, ask with the regime signal.");
  } else if (Math.abs(span.first_step - span.A_led) < 1e-9 * span.A_led) {
    said.push(`The law has the model change as much as before, at the first step and later. ${took}`);
  } else {
    const ends = `the first step asks for the ${found.fixesAlpha ? "learning rate" : "alpha"} ${g(span.first_step, 3)}, a long run, ` +
      `where A's motion leads, for ${g(span.A_led, 3)}.`;
    if (span.planned === null) {
      said.push(`This is the first step's: ${ends} The planned steps and a takeover distance give the value between.`);
    } else {
      const { steps, takeover, isAssumed, rho } = found.plan;
      said.push(`This is the law's at ${steps} steps: ${ends} The takeover distance, ${g(takeover, 2)}, is ` +
        `${isAssumed ? "assumed from one sample" : "given as measured"}, so that A's part is ${g(rho, 3)} times B's in the end; ` +
        "the rate is taken as constant.");
    }
    said.push(took);
  }
  return said.join(" ");
}

/** PEFT's LoraConfig; null where PEFT does not have the init. */
function configOf({ kept, alpha, learning_rate: rate, fixesAlpha, groups }) {
  if (!(kept.init in PEFT_INITS)) return null;
  const kappa = kappaOf(kept.rule);
  const carried = (value) => g(alphaFor(kappa === 0.5 ? "rslora" : "lora", value / kept.rank ** kappa, kept.rank), 6);
  const remark = kappa === 1 || kappa === 0.5 ? "" : `  # alpha / r with the gamma of ${g(alpha, 6)} / r^${g(kappa, 6)}`;
  const kinds = groups.slice(1);
  const targets = kinds.length ? kinds.map((group) => group.name) : TARGETS;
  const pattern = fixesAlpha ? [] : kinds.map((group) => `        '${group.name}': ${carried(group.alpha.mean)},`);
  return [
    "from peft import LoraConfig", "", `config = LoraConfig(  # learning rate ${g(rate, 6)}`, "    task_type='CAUSAL_LM',",
    `    r=${kept.rank},`, `    lora_alpha=${carried(alpha)},${remark}`, `    use_rslora=${kappa === 0.5 ? "True" : "False"},`,
    `    init_lora_weights=${PEFT_INITS[kept.init]},`, `    target_modules=[${targets.map((name) => `'${name}'`).join(", ")}],`,
    ...(pattern.length ? ["    alpha_pattern={", ...pattern, "    },"] : []), ")",
  ].join("\n");
}

/** Linear terms by module of a crossing_ranks.csv, for one optimizer, init and split. */
export function readCrossings(text, { optimizer, init, split }) {
  const lines = text.replace(/^\uFEFF/, "").split(/\r?\n/).filter((line) => line);
  const heads = (lines[0] ?? "").split(",");
  const columns = Object.fromEntries(["module", "split", "optimizer", "init", "linear_term"].map((name) => [name, heads.indexOf(name)]));
  for (const [name, place] of Object.entries(columns)) {
    if (place < 0) throw new InputError("file", `has no column ${name}`, "the file that rora regime writes");
  }
  const wanted = { optimizer: FAMILY[optimizer], init, split };
  const found = {};
  lines.slice(1).forEach((line, index) => {
    const cells = line.split(",");
    if (Object.entries(wanted).some(([name, value]) => cells[columns[name]] !== value)) return;
    const cell = (cells[columns.linear_term] ?? "").trim();
    const term = cell === "inf" ? Infinity : cell === "" ? NaN : Number(cell);
    if (!(term > -1)) throw new InputError("file", `line ${index + 2} has linear_term ${cell || "nothing"}`, "a number above -1, or inf");
    found[cells[columns.module]] = term;
  });
  if (!Object.keys(found).length) {
    const said = Object.entries(wanted).map((pair) => pair.join(" ")).join(", ");
    throw new InputError("file", `has no row of ${said}`, "a file that has them");
  }
  return found;
}

/** Against the rank, alpha and rate left as they are: the first step at both ends of the law and as measured, and rates. */
export function curves(asked) {
  const top = Math.max(512, asked["from-rank"], asked["to-rank"]);
  const ranks = [...Array(Math.ceil(Math.log2(top)) + 1).keys()].map((power) => 2 ** power);
  return ranks.map((rank) => {
    const { kept, old, stepsOf, rates } = advise({ ...asked, "to-rank": rank });
    const own = typeof asked.regime === "string" ? null : stepsOf(kept).mean;
    return { rank, signal: stepRatio(kept, old, 0), cross_talk: stepRatio(kept, old, Infinity), measured: own, rates };
  });
}

// The page.

const NUMBERS = ["from-rank", "to-rank", "alpha", "to-alpha", "lr", "steps", "p-in", "takeover"];
const NUMBER = /^[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$/i;
const LATER = ["steps", "p-in", "takeover"];
const LARGEST_FILE = 20e6; // bytes

function make(space, name, attributes, children) {
  const node = document.createElementNS(`http://www.w3.org/${space}`, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}
const html = (name, attributes = {}, ...children) => make("1999/xhtml", name, attributes, children);
const svg = (name, attributes = {}, ...children) => make("2000/svg", name, attributes, children);

/** Roles are named because a phone shows the cells of a row under each other, which takes the table's own away. */
function table(caption, heads, rows) {
  const head = heads.map((text) => html("th", { role: "columnheader", scope: "col" }, text));
  const body = rows.map((cells) =>
    html("tr", { role: "row" }, ...cells.map((cell, i) =>
      i ? html("td", { role: "cell", "data-head": heads[i] }, cell) : html("th", { role: "rowheader", scope: "row" }, cell))));
  return html("table", { role: "table", class: "calculator-table" }, html("caption", {}, caption),
    html("thead", { role: "rowgroup" }, html("tr", { role: "row" }, ...head)), html("tbody", { role: "rowgroup" }, ...body));
}

/** A drawing on two logarithmic axes; its caption is what it says in words. */
function chart(id, caption, ranks, lines, marks, width) {
  const [left, right, bottom, row] = [52, 10, 38, 18];
  const top = 10 + row * lines.length;
  const height = top + 210 + bottom;
  const values = lines.flatMap((line) => line.values).map(Math.log10);
  const [low, high] = [Math.min(...values) - 0.08, Math.max(...values) + 0.08];
  const x = (rank) => left + ((width - left - right) * Math.log2(rank)) / Math.log2(ranks.at(-1));
  const y = (value) => height - bottom - ((height - bottom - top) * (Math.log10(value) - low)) / (high - low);
  const text = (at, attributes, said) => svg("text", { x: at[0], y: at[1], ...attributes }, said);
  const parts = [];
  const thin = Math.ceil((34 * ranks.length) / (width - left - right));
  for (const rank of ranks.filter((_, i) => i % thin === 0)) parts.push(text([x(rank), height - bottom + 16], { "text-anchor": "middle" }, `${rank}`));
  parts.push(text([(left + width - right) / 2, height - 6], { "text-anchor": "middle" }, "rank"));
  const every = high - low < 0.9 ? [1, 1.5, 2, 3, 5, 7] : high - low < 2 ? [1, 2, 5] : [1];
  for (let power = Math.floor(low); power <= high; power++) {
    for (const value of every.map((each) => each * 10 ** power).filter((each) => Math.log10(each) >= low && Math.log10(each) <= high)) {
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

function drawings(asked, found, width) {
  const rows = curves(asked);
  const ranks = rows.map((row) => row.rank);
  const { old, kept } = found;
  const at = (c) => `${g(stepRatio({ ...kept, lr: old.lr }, old, c), 3)} times`;
  const lines = [{ name: "signal alone", key: "signal" }, { name: "cross-talk alone", key: "cross_talk" }];
  if (rows[0].measured !== null) lines.push({ name: "measured, mean over modules", key: "measured" });
  const drawn = lines.map((line) => ({ ...line, values: rows.map((row) => row[line.key]) }));
  const left = `alpha ${g(kept.alpha, 6)} under ${ruleInWords(kept.rule)} and the learning rate ${g(old.lr, 3)}`;
  const measured = rows[0].measured === null ? "" : `, and as measured ${g(found.stepsOf(kept).mean, 3)} times`;
  const caption = `Growth of the first step against the rank, with ${left}: at rank ${kept.rank} it is ${at(0)} the tuned ` +
    `one's where the signal leads, ${at(Infinity)} where cross-talk does${measured}. Dotted: the two ranks.`;
  const marks = [old.rank, kept.rank];
  const figures = [chart("calculator-growth", caption, ranks, drawn, marks, width)];
  const ends = [["first step", "first_step"], ["long run", "A_led"]];
  if (found.plan?.rho != null) ends.push([`${found.plan.steps} steps`, "planned"]);
  if (found.rates) {
    const rateLines = ends.map(([name, key]) => ({ name: `${name}`, values: rows.map((row) => row.rates[key]) }));
    const said = ends.map(([name, key]) => `${g(found.rates[key], 3)} (${name})`).join(", ");
    const words = `Learning rate that keeps the change, at alpha ${g(kept.alpha, 6)} under ${ruleInWords(kept.rule)}: at rank ${kept.rank} ${said}.`;
    figures.push(chart("calculator-rates", words, ranks, rateLines, marks, width));
  }
  const heads = ["rank", ...lines.map((line) => line.name), ...(found.rates ? ends.map(([name]) => `rate, ${name}`) : [])];
  const cells = rows.map((row) => [`${row.rank}`, ...lines.map((line) => `${g(row[line.key], 4)} x`),
    ...(found.rates ? ends.map(([, key]) => g(row.rates[key], 3)) : [])]);
  figures.push(html("details", {}, html("summary", {}, "The drawing as a table"), table("First step against the tuned one's", heads, cells)));
  return figures;
}

function tables(found) {
  const planned = found.rates?.planned != null;
  const heads = ["choice", "gamma", "first step", "rate that undoes it"];
  if (planned) heads.push(`at ${found.plan.steps} steps`);
  if (found.rates) heads.push("in a long run");
  const rows = found.choices.map((choice) => {
    const later = choice.rates === null ? [] : [...(planned ? [choice.rates.planned] : []), choice.rates.A_led];
    return [choice.name, g(choice.scaling, 4), `${range(choice.step, 4)} x`, g(choice.learning_rate, 3), ...later.map((rate) => g(rate, 3))];
  });
  const about = `What common choices do at rank ${found.kept.rank}: the first step against the tuned one's (${ruleInWords(found.old.rule)} where nothing else is said)`;
  const made = [table(about, heads, rows)];
  if (found.groups.length > 1) {
    const kinds = found.groups.map((group) => [group.name, range(group.alpha, 6), range(group.learning_rate, 4), range(group.unchanged, 4)]);
    made.push(table("What keeps each type of module's own first step: mean (range over modules)",
      ["modules", `alpha at rate ${g(found.old.lr, 6)}`, `rate at alpha ${g(found.kept.alpha, 6)}`, "step if neither changes"], kinds));
  }
  return made;
}

function mount(form) {
  const [said, result] = ["calculator-said", "calculator-result"].map((id) => document.getElementById(id));
  const fields = [...form.elements].filter((field) => field.name && field.type !== "file");
  const plain = Object.fromEntries(fields.map((field) => [field.name, field.value]));
  let file = null;

  function put(name, value) {
    const field = fields.find((each) => each.name === name);
    if (!field) return;
    if (field.options && ![...field.options].some((option) => option.value === value)) field.add(new Option(value, value));
    field.value = value;
  }

  function asked() {
    const found = {};
    for (const { name, value, disabled } of fields) {
      const text = value.trim();
      if (!NUMBERS.includes(name)) found[name] = text;
      else found[name] = text === "" || disabled ? null : NUMBER.test(text) ? Number(text) : text;
    }
    found["to-rule"] ||= null;
    if (found.regime === "measured" && file !== null) found.regime = readCrossings(file.text, found);
    return found;
  }

  function update() {
    const { optimizer, regime, split } = form.elements;
    const hasHorizon = FAMILY[optimizer.value] === "adam" && regime.value === "signal";
    for (const name of LATER) form.elements[name].disabled = !hasHorizon;
    split.disabled = regime.value !== "measured";
    const given = fields.filter((field) => !field.disabled && field.value.trim() !== plain[field.name]);
    const query = new URLSearchParams(given.map((field) => [field.name, field.value.trim()])).toString();
    history.replaceState(null, "", query ? `?${query}` : location.pathname);
    for (const field of form.elements) field.removeAttribute("aria-invalid");
    let text, parts = [];
    try {
      const found = advise(asked());
      const width = Math.max(280, Math.min(result.clientWidth, 720));
      const options = fields.filter((field) => !field.disabled && field.value.trim()).map((field) => `--${field.name} ${field.value.trim()}`);
      const command = `rora transfer ${options.join(" ").replace("--regime measured", "--regime RUN")}`;
      parts = [...tables(found), ...drawings(asked(), found, width)];
      for (const code of [found.config ?? `# PEFT has no init ${found.kept.init}`, command]) parts.push(html("pre", { tabindex: "0" }, html("code", {}, code)));
      text = found.sentence;
    } catch (error) {
      if (!(error instanceof InputError)) throw error;
      text = `${error.message}.`;
      form.elements[error.field]?.setAttribute("aria-invalid", "true");
    }
    said.classList.toggle("calculator-refused", !parts.length);
    if (said.textContent !== text) said.textContent = text;
    result.replaceChildren(...parts);
  }

  async function take(dropped) {
    if (!dropped) return;
    file = { text: dropped.size > LARGEST_FILE ? "" : await dropped.text() };
    document.getElementById("calculator-file").textContent = dropped.name;
    put("regime", "measured");
    update();
  }

  for (const [name, value] of new URLSearchParams(location.search)) put(name, value);
  form.addEventListener("input", (event) => event.target.type !== "file" && update());
  form.addEventListener("submit", (event) => event.preventDefault());
  form.elements.file.addEventListener("change", (event) => take(event.target.files[0]));
  for (const name of ["dragover", "drop"]) {
    form.addEventListener(name, (event) => {
      event.preventDefault();
      form.classList.toggle("calculator-over", name === "dragover");
      if (name === "drop") take(event.dataTransfer.files[0]);
    });
  }
  form.addEventListener("dragleave", () => form.classList.remove("calculator-over"));
  window.addEventListener("resize", update);
  update();
}

const form = typeof document === "undefined" ? null : document.getElementById("calculator");
if (form) mount(form);
