// What `rora transfer` answers, in the browser: the formulas of rora_theory.advice, rora_theory.theory.horizon and
// rora_theory.scaling. tests/docs/test_calculator.py holds every figure against theirs.

const KAPPAS = { lora: 1, rora: 0.5, rslora: 0.5 };
export const FAMILY = { sgd: "sgd", momentum: "sgd", adam: "adam", adamw: "adam" };
const WORDS = { sgd: "SGD", momentum: "SGD with momentum", adam: "Adam", adamw: "AdamW" };
const DEVIATION = { kaiming_uniform: () => Math.sqrt(1 / 3), gaussian: (r) => 1 / r }; // those that PEFT has
const MEASURED_IN = "in SmolLM2-135M, the one model that was measured (AdamW, batches of 4, constant rate),";
const MEASURED_RANKS = `Measured, ${MEASURED_IN} over 64 steps: the best rate was 1.2 (0.8 to 1.9) times as high at rank 128 as at ` +
  "rank 8, where the law allows 1 to 2.4, and 1.3 (1.1 to 1.5) times as high as at rank 32, where it allows 1 to 1.4.";
const MEASURED_STRENGTHS = `Measured, ${MEASURED_IN} where gamma r grew 11.3 times: the best rate fell 6.8 (4.9 to 9.4) times after 64 ` +
  "steps and 5.8 (4.4 to 7.6) times after 256.";
const MEASURED_POWERS = [-0.79, -0.73]; // exponents of the best rate in gamma r
const MEASURED_GROWTH = 12; // largest change in gamma r, or its inverse, for which a rate from them is advised
const MEASURED_STEPS = 16; // least number of planned steps for which it is
const LONGEST = "No run was longer than 256 steps.";
const PEFT_INITS = { kaiming_uniform: "True", gaussian: "'gaussian'" };
const REGIMES = { signal: 0, "cross-talk": Infinity };
const TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"];
const LARGEST = 2 ** 31 - 1;
const GROWTH = 1e100; // the most that B's gradient may grow
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
export const range = ({ mean, smallest, largest }, digits) =>
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
export function stepRatio(next, old, c) {
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
  if (given.length === 1) throw new InputError("steps", `is ${asked.steps} without a takeover distance or a width`, "one of the two beside it");
  if (given.length === 3) throw new InputError("takeover", "is there and so is the width", "one of the two");
  let takeover = asked.takeover ?? null;
  if (takeover !== null) checkPositive(asked, "takeover");
  if (asked["p-in"] != null) {
    checkInteger(asked, "p-in");
    const wide = old.init === "kaiming_uniform" ? Math.sqrt(1 / (3 * asked["p-in"])) : deviation(old);
    takeover = wide / Math.sqrt(asked["p-in"]);
  }
  const reach = old.lr * asked.steps;
  if (reach / takeover > GROWTH) {
    throw new InputError("takeover", `is ${takeover} where A's rates add up to ${g(reach, 3)}`, `${1 / GROWTH} of that or more`);
  }
  return { steps: asked.steps, takeover, isAssumed: asked["p-in"] != null, rho: distanceOfA(old.lr, asked.steps, takeover) / takeover };
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
  const hasHorizon = asked.regime === "signal";
  // Under SGD only the product of gamma and the rate counts in a long run.
  const spanOf = (first, last) => (hasHorizon ? { first_step: first, planned: null, A_led: last } : null);
  const span = (value) =>
    hasHorizon ? { first_step: value(0), planned: plan === null ? null : value(plan.rho), A_led: value(Infinity) } : null;
  const ratio = (next) => deviation(old) / deviation(next);
  const strength = (next, rho) => {
    const first = stepRatio({ ...next, lr: old.lr }, old, 0);
    return rho === Infinity ? first * ratio(next) : (first * (1 + rho * ratio(next))) / (1 + rho);
  };
  const ratesOf = (next) =>
    family === "sgd"
      ? spanOf(old.lr / stepRatio({ ...next, lr: old.lr }, old, 0), (old.lr * scaling(old)) / scaling(next))
      : span((rho) => old.lr * rateFactor(strength(next, rho), rho * ratio(next)));
  const stepsOf = (next) => rangeOf(modules.map((module) => stepRatio(next, old, module.c)));
  const mean = (name) => rangeOf(modules.map((module) => module[name])).mean;
  const alphas =
    family === "sgd"
      ? spanOf(mean("alpha"), alphaFor(kept.rule, scaling(old), kept.rank))
      : span((rho) => alphaFor(kept.rule, scaling(kept) / strength(kept, rho), kept.rank));
  const rates = ratesOf(kept);
  const best = (ends) => ends.planned ?? ends.first_step;
  const alpha = fixesAlpha ? kept.alpha : alphas ? best(alphas) : mean("alpha");
  const grown = stepRatio({ ...kept, lr: old.lr }, old, 0);
  const wasMeasured = hasHorizon && family === "adam" && init === "kaiming_uniform";
  const isCovered = wasMeasured && 1 / MEASURED_GROWTH < grown && grown < MEASURED_GROWTH && !isClose(grown, 1);
  const measuredRates = isCovered && !(plan?.steps < MEASURED_STEPS)
    ? MEASURED_POWERS.map((power) => old.lr * grown ** power).sort((a, b) => a - b) : null;
  const learningRate = !fixesAlpha ? old.lr
    : measuredRates ? rangeOf(measuredRates).mean : rates ? best(rates) : mean("learning_rate");
  const found = {
    old, kept, alpha, learning_rate: learningRate, alphas, rates, plan, modules, fixesAlpha, ratesOf, stepsOf,
    grown, wasMeasured, measuredRates, isRslora: kappaOf(kept.rule) === 0.5, loraAlpha: alphaFor("lora", scaling({ ...kept, alpha }), kept.rank),
  };
  const kinds = { "all modules": modules };
  if (isMeasured) for (const each of modules) (kinds[each.name.split(".").at(-1)] ??= []).push(each);
  found.groups = Object.entries(kinds).map(([name, own]) => ({
    name,
    ...Object.fromEntries(["alpha", "learning_rate", "unchanged"].map((part) => [part, rangeOf(own.map((m) => m[part]))])),
  }));
  found.choices = choicesOf(found);
  found.sentence = sentenceOf(found, isMeasured ? `measured at ${modules.length} module${modules.length > 1 ? "s" : ""}` : `assumed: ${asked.regime}`);
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

export function ruleInWords(rule) {
  const kappa = kappaOf(rule);
  return { 1: "alpha / r", 0.5: "alpha / sqrt(r) (use_rslora)" }[kappa] ?? `alpha / r^${g(kappa, 6)}`;
}

function sentenceOf(found, regime) {
  const { old, kept, alpha, learning_rate: rate, isRslora } = found;
  const [rule, value] = isRslora ? ["lora", found.loraAlpha] : [kept.rule, alpha];
  const alphaKept = kappaOf(rule) === kappaOf(old.rule) && isClose(value, old.alpha);
  const verb = (isKept) => (isKept ? "keep" : "set");
  const under = isRslora ? "alpha / r, without use_rslora," : ruleInWords(rule);
  const what = `${verb(alphaKept)} alpha ${g(value, 6)} under ${under} and ${verb(isClose(rate, old.lr))}`;
  const said = [`Going from rank ${old.rank} to ${kept.rank} with ${WORDS[old.optimizer]}: ${what} the learning rate ${g(rate, 3)}.`];
  if (isRslora) {
    said.push(`This is the same adapter as alpha ${g(alpha, 6)} with use_rslora, which SGLang, llama.cpp and Ollama serve ` +
      `${g(Math.sqrt(kept.rank), 3)} times too weak; \`rora portable\` rewrites one that is trained.`);
  }
  const span = found.fixesAlpha ? found.rates : found.alphas;
  const isMeasured = found.fixesAlpha && found.measuredRates !== null;
  const isSgd = FAMILY[old.optimizer] === "sgd";
  const clipping = isSgd ? "; clipping of the gradient changes the law." : ".";
  const took = `This takes both ranks to be above the crossing rank, and the gradient to keep its direction${clipping}`;
  if (!span) {
    said.push(`That keeps the rms of each module's first step; the regime is ${regime}.`);
    said.push(`It is not known what keeps later steps in this regime: for the model as a whole, ask with the regime signal${clipping}`);
  } else if (Math.abs(span.first_step - span.A_led) < 1e-9 * span.A_led) {
    said.push("By the law the model then changes as much as before, in short and in long runs.", took, ...seen(found));
  } else {
    if (isMeasured) said.push(...seen(found));
    const thing = found.fixesAlpha ? "learning rate" : "alpha";
    const longRun = "a long run, where A's motion leads,";
    const first = isMeasured
      ? `By the law the first step asks for ${g(span.first_step, 3)}, and ${longRun} for ${g(span.A_led, 3)}.`
      : `The first step asks for this ${thing}; ${longRun} asks for ${g(span.A_led, 3)}.`;
    if (isSgd) {
      said.push(`${first} A run is long where gamma times the sum of the rates times the ` +
        `gradient's singular values is above 1. Alpha ${g(scaling(old) * old.rank, 6)} under alpha / r and the rate ` +
        `${g((old.lr * kept.rank) / old.rank, 3)} serve both.`);
    } else if (span.planned === null) {
      said.push(first, ...(isMeasured ? [] : ["The planned steps and a takeover distance give the value between."]));
    } else {
      const { steps, takeover, isAssumed, rho } = found.plan;
      const some = `${steps} step${steps > 1 ? "s" : ""}`;
      const start = isMeasured ? `By the law ${some} ask for ${g(span.planned, 3)}` : `This is the law's at ${some}`;
      said.push(`${start}: the first step asks for the ${thing} ${g(span.first_step, 3)}, ` +
        `${longRun} for ${g(span.A_led, 3)}. The takeover distance, ${g(takeover, 2)}, is ` +
        `${isAssumed ? "assumed from one sample" : "given as measured"}, so that A's part is ${g(rho, 3)} times B's in the end; ` +
        "the rate is taken as constant.");
    }
    said.push(took, ...(isMeasured ? [LONGEST] : seen(found)));
  }
  return said.join(" ");
}

/** What was measured of such a change, beside the law. */
function seen({ old, kept, fixesAlpha, grown, wasMeasured, measuredRates }) {
  if (!wasMeasured) return [];
  if (!fixesAlpha || isClose(grown, 1)) return kept.rank === old.rank ? [] : [MEASURED_RANKS, LONGEST];
  if (measuredRates === null) return [MEASURED_STRENGTHS, LONGEST];
  const [low, high] = measuredRates;
  return [`Measured runs put the rate at ${g(low, 2)} to ${g(high, 2)}; this is the middle.`, MEASURED_STRENGTHS];
}

/** PEFT's LoraConfig, always under alpha / r: several servers ignore use_rslora. */
function configOf({ kept, alpha, learning_rate: rate, fixesAlpha, groups, isRslora, loraAlpha }) {
  const kappa = kappaOf(kept.rule);
  const carried = (value) => g(alphaFor("lora", scaling({ ...kept, alpha: value }), kept.rank), 6);
  let remark = kappa === 1 ? "" : `  # alpha / r with the gamma of ${g(alpha, 6)} / r^${g(kappa, 6)}`;
  if (isRslora) remark = `  # the same adapter as ${g(alpha, 6)} with use_rslora=True`;
  const kinds = groups.slice(1);
  const targets = kinds.length ? kinds.map((group) => group.name) : TARGETS;
  const pattern = fixesAlpha ? [] : kinds.map((group) => `        '${group.name}': ${carried(group.alpha.mean)},`);
  return [
    "from peft import LoraConfig", "", `config = LoraConfig(  # learning rate ${g(rate, 6)}`, "    task_type='CAUSAL_LM',",
    `    r=${kept.rank},`, `    lora_alpha=${g(loraAlpha, 6)},${remark}`, "    use_rslora=False,",
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
