// The answer of `rora transfer` in the browser, by the formulas of rora_theory.advice, rora_theory.laws.displacement
// and rora_theory.scaling. tests/docs/test_calculator.py compares every number and text with theirs.

import measured from "./measured.json" with { type: "json" };

const KAPPAS = { lora: 1, rora: 0.5, rslora: 0.5 };
export const FAMILY = { sgd: "sgd", momentum: "sgd", adam: "adam", adamw: "adam" };
const WORDS = { sgd: "SGD", momentum: "SGD with momentum", adam: "Adam", adamw: "AdamW" };
const DEVIATION = { kaiming_uniform: () => Math.sqrt(1 / 3), gaussian: (r) => 1 / r }; // those that PEFT has
const PEFT_INITS = { kaiming_uniform: "True", gaussian: "'gaussian'" };
const REGIMES = { signal: 0, "cross-talk": Infinity };
const SCHEDULES = ["constant", "linear", "cosine"];
const COHERENCE_RANGE = [1, 2];
const TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"];
const LARGEST = 2 ** 31 - 1;

/** Sorted models of the entries whose names begin with a prefix. */
const modelsOf = (prefix) => [
  ...new Set(Object.entries(measured).filter(([name]) => name.startsWith(prefix)).map(([, entry]) => entry.model)),
].sort();
const COST_MODELS = modelsOf("cost_");
const CONSTANT_MODELS = modelsOf("displacement_constant_");
const SETTINGS = measured.measured_settings.ranges;
const MEASURED_STEPS = {}; // lowest and highest number of steps by schedule
const STEPS_EXPONENTS = {}; // range of the exponent in the steps by schedule
const USE_RSLORA = measured.cost_of_use_rslora_at_the_tuned_rate.columns;
const CONSTANTS = {}; // range of K by model and number of steps
const SCHEDULE_FACTORS = { constant: [1, 1] };
for (const [name, entry] of Object.entries(measured)) {
  if (name.startsWith("displacement_constant_")) (CONSTANTS[entry.model] ??= []).push([entry.steps, entry.ranges.constant]);
  if (name.startsWith("measured_steps_")) MEASURED_STEPS[entry.schedule] = entry.ranges.step;
  if (name.startsWith("schedule_factor_")) SCHEDULE_FACTORS[entry.schedule] = entry.ranges.ratio;
  if (name.startsWith("steps_exponents_")) STEPS_EXPONENTS[entry.schedule] = entry.ranges.exponent;
}
for (const rows of Object.values(CONSTANTS)) rows.sort(([a], [b]) => a - b);

export const FILE = "crossing_ranks.csv";
export const RUN_FIELDS = ["steps", "to-steps", "schedule", "to-schedule", "displacement-constant"];
export const LABELS = {
  "from-rank": "Tuned rank", alpha: "Tuned alpha", lr: "Learning rate", rule: "Tuned rule", optimizer: "Optimizer",
  init: "Initialisation", "to-rank": "New rank", "to-rule": "New rule", "to-alpha": "New alpha", regime: "Regime",
  steps: "Steps of the tuned run", "to-steps": "Steps of the new run", schedule: "Schedule of the tuned run",
  "to-schedule": "Schedule of the new run", "displacement-constant": "Displacement constant", split: "Tokens", file: FILE,
};

/** Invalid input: a message of one line, and the name of the field. */
export class InputError extends Error {
  constructor(field, message) {
    super(`${LABELS[field]} ${message}`);
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

/** Format mean, smallest and largest value for one cell. */
export const range = ({ mean, smallest, largest }, digits) =>
  g(mean, digits) + (largest - smallest < 1e-9 * largest ? "" : ` (${g(smallest, 3)} to ${g(largest, 3)})`);
function rangeOf(values) {
  const [smallest, largest] = [values.reduce((a, b) => Math.min(a, b)), values.reduce((a, b) => Math.max(a, b))];
  const logs = values.reduce((sum, value) => sum + Math.log(value), 0);
  return { mean: smallest === largest ? smallest : Math.exp(logs / values.length), smallest, largest };
}

const kappaOf = (rule) => KAPPAS[rule] ?? Number(rule);
const scaling = (setting) => setting.alpha / setting.rank ** kappaOf(setting.rule);
const alphaFor = (rule, gamma, rank) => gamma / (1 / rank ** kappaOf(rule));
const deviation = (setting) => DEVIATION[setting.init](setting.rank);
const isClose = (a, b) => Math.abs(a - b) <= 1e-9 * Math.max(Math.abs(a), Math.abs(b));

/** Return the factor of the rank in the rms of the first step; c is 0 where the signal leads, Infinity where cross-talk does. */
export function growth(from, to, c) {
  return c === Infinity ? Math.sqrt(to / from) : Math.sqrt((to * (to + c)) / (from * (from + c)));
}

/** Return the ratio of the first step under `next` to that under `old`. */
export function stepRatio(next, old, c) {
  const strength = (scaling(next) * deviation(next)) / (scaling(old) * deviation(old));
  const power = FAMILY[old.optimizer] === "sgd" ? 2 : 1;
  return (next.lr / old.lr) * strength ** power * growth(old.rank, next.rank, c);
}

/** Lowest and highest displacement constant K after a number of steps; null covers all measured numbers. */
export function defaultConstants(steps) {
  const ranges = Object.values(CONSTANTS).map((rows) => [0, 1].map((end) => constantOf(rows, steps, end)));
  return [Math.min(...ranges.map(([low]) => low)), Math.max(...ranges.map(([, high]) => high))];
}

/** Interpolate one end of the range, log K in log steps; outside of the measured numbers of steps, the nearest. */
function constantOf(rows, steps, end) {
  const values = rows.map(([, constants]) => constants[end]);
  if (steps == null) return end ? Math.max(...values) : Math.min(...values);
  const above = rows.findIndex(([count]) => count >= steps);
  if (above === -1) return values.at(-1);
  if (above === 0) return values[0];
  const [[before], [after]] = [rows[above - 1], rows[above]];
  const share = Math.log(steps / before) / Math.log(after / before);
  return Math.exp((1 - share) * Math.log(values[above - 1]) + share * Math.log(values[above]));
}

/** Ratio of the A-led to the B-led change at one strength, rho (1 + rho) = K / strength. */
function displacementRatio(strength, constant) {
  const share = constant / strength;
  return (2 * share) / (1 + Math.sqrt(1 + 4 * share));
}

/** Best learning rate at another strength (scaling times rank) and number of steps, with its range. */
export function carryRate(rate, oldStrength, newStrength, run) {
  const size = (strength, constant, coherence) => strength * (1 + coherence * displacementRatio(strength, constant));
  const carried = (constant, coherence, exponent) =>
    rate * (size(oldStrength, constant, coherence) / size(newStrength, constant, coherence)) * run.growthOfSteps ** exponent;
  const [lowConstant, highConstant] = run.constants;
  const [lowExponent, highExponent] = run.stepsExponents;
  const best = carried(Math.sqrt(lowConstant * highConstant), COHERENCE_RANGE[0], (lowExponent + highExponent) / 2);
  const ends = run.constants.flatMap((constant) =>
    COHERENCE_RANGE.flatMap((coherence) => run.stepsExponents.map((exponent) => carried(constant, coherence, exponent))));
  const [low, high] = run.scheduleFactors ?? [1, 1];
  return { low: Math.min(best, ...ends) * low, best: best * Math.sqrt(low * high), high: Math.max(best, ...ends) * high };
}

function checkInteger(inputs, field) {
  const value = inputs[field];
  if (!Number.isInteger(value) || value < 1) throw new InputError(field, `must be an integer of at least 1, got ${value ?? "nothing"}`);
  if (value > LARGEST) throw new InputError(field, `must be an integer of at most 2,147,483,647, got ${value}`);
}

function checkPositive(inputs, field) {
  const value = inputs[field];
  if (!(Number.isFinite(value) && value > 0)) throw new InputError(field, `must be a finite number above 0, got ${value ?? "nothing"}`);
}

function check(inputs) {
  for (const field of ["from-rank", "to-rank"]) checkInteger(inputs, field);
  for (const field of ["alpha", "lr"]) checkPositive(inputs, field);
  if (inputs["to-alpha"] != null) checkPositive(inputs, "to-alpha");
  for (const [field, known] of [["optimizer", FAMILY], ["init", DEVIATION]]) {
    if (!Object.hasOwn(known, inputs[field])) {
      throw new InputError(field, `must be one of ${Object.keys(known).join(", ")}, got ${inputs[field]}`);
    }
  }
  for (const [field, rule] of [["rule", inputs.rule], ["to-rule", inputs["to-rule"] ?? inputs.rule]]) {
    if (!Number.isFinite(kappaOf(rule)) || rule === "") {
      throw new InputError(field, `must be lora, rora, rslora or a finite exponent kappa, got ${rule}`);
    }
  }
  if (typeof inputs.regime === "string" && !Object.hasOwn(REGIMES, inputs.regime)) {
    const isMissing = inputs.regime === "measured";
    throw new InputError("regime", isMissing
      ? `must come with a ${FILE} if it is measured, got no file: an address does not carry it`
      : `must be signal, cross-talk or measured, got ${inputs.regime}`);
  }
  if (typeof inputs.regime !== "string" && !Object.keys(inputs.regime).length) {
    throw new InputError("regime", "must have at least one module, got none");
  }
}

/** Number of steps and schedule of the two runs, and the displacement constants. */
function runOf(inputs, old) {
  const setFields = RUN_FIELDS.filter((field) => inputs[field] != null);
  for (const field of ["steps", "to-steps"]) if (inputs[field] != null) checkInteger(inputs, field);
  for (const field of ["schedule", "to-schedule"]) {
    if (inputs[field] != null && !SCHEDULES.includes(inputs[field])) {
      throw new InputError(field, `must be one of ${SCHEDULES.join(", ")}, got ${inputs[field]}`);
    }
  }
  const ownConstant = inputs["displacement-constant"] ?? null;
  if (ownConstant !== null && !(Number.isFinite(ownConstant) && ownConstant >= 0)) {
    throw new InputError("displacement-constant", `must be a finite number of at least 0, got ${ownConstant}`);
  }
  for (const field of ["steps", "schedule"]) {
    if (inputs[field] == null && inputs[`to-${field}`] != null) {
      throw new InputError(field, `must be given together with that of the new run, got ${inputs[`to-${field}`]} alone`);
    }
  }
  if (setFields.length && !(inputs.regime === "signal" && usesDisplacementLaw(old))) {
    throw new InputError(setFields[0], `must be left out except with Adam or AdamW, the default initialisation and the regime signal, got ${inputs[setFields[0]]}`);
  }
  const [steps, schedule] = [inputs.steps ?? null, inputs.schedule ?? null];
  const [toSteps, toSchedule] = [inputs["to-steps"] ?? steps, inputs["to-schedule"] ?? schedule];
  const ranges = [defaultConstants(steps), defaultConstants(toSteps)];
  return {
    steps, toSteps, schedule, toSchedule, ownConstant,
    constants: ownConstant !== null ? [ownConstant, ownConstant] : [Math.min(ranges[0][0], ranges[1][0]), Math.max(ranges[0][1], ranges[1][1])],
    growthOfSteps: steps === null ? 1 : toSteps / steps,
    stepsExponents: stepsExponents([schedule, toSchedule]),
    changesSteps: steps !== toSteps,
    changesSchedule: schedule !== toSchedule,
    scheduleFactors: scheduleFactors(schedule, toSchedule),
    hasUnmeasuredSchedule: [schedule, toSchedule].some((name) => name !== null && !(name in SCHEDULE_FACTORS)),
    otherSchedules: [...new Set([schedule, toSchedule].filter(isOther))],
  };
}

const isOther = (schedule) => schedule !== null && schedule !== "constant";

/** Lowest and highest exponent of the best rate in the steps: those of a constant rate, or of all measured schedules. */
function stepsExponents(schedules) {
  const ranges = schedules.some(isOther) ? Object.values(STEPS_EXPONENTS) : [STEPS_EXPONENTS.constant];
  const ends = [Math.min(...ranges.map(([low]) => low)), Math.max(...ranges.map(([, high]) => high))];
  return ends.map((value) => Math.round(value * 10) / 10);
}

/** Lowest and highest factor of the best rate due to the schedule; null if it was not measured. */
function scheduleFactors(old, next) {
  if (old === next) return [1, 1];
  const [before, after] = [SCHEDULE_FACTORS[old], SCHEDULE_FACTORS[next]];
  return before && after ? [after[0] / before[1], after[1] / before[0]] : null;
}

const usesDisplacementLaw = ({ optimizer, init }) => FAMILY[optimizer] === "adam" && init === "kaiming_uniform";
const strengthOf = (setting) => scaling(setting) * setting.rank;

/** Return the advice. `inputs` has the options of `rora transfer` by name; a regime is a name, or linear terms by module. */
export function advise(inputs) {
  check(inputs);
  const { optimizer, init } = inputs;
  const old = { rank: inputs["from-rank"], alpha: inputs.alpha, lr: inputs.lr, rule: inputs.rule, optimizer, init };
  const fixesAlpha = inputs["to-alpha"] != null;
  const unchanged = { ...old, rank: inputs["to-rank"], rule: inputs["to-rule"] ?? old.rule, alpha: inputs["to-alpha"] ?? old.alpha };
  for (const [field, setting] of [["rule", old], ["to-rule", unchanged]]) {
    if (!(scaling(setting) > 0 && scaling(setting) < Infinity)) {
      throw new InputError(field, `must be an exponent nearer to 0, got ${setting.rule}: gamma is not a float above 0`);
    }
  }
  const isMeasured = typeof inputs.regime !== "string";
  const run = runOf(inputs, old);
  const isSgd = FAMILY[optimizer] === "sgd";
  const followsDisplacementLaw = inputs.regime === "signal" && usesDisplacementLaw(old);
  const hasLimits = inputs.regime === "signal" && !followsDisplacementLaw;

  // Alpha and rate that preserve each module's first step.
  const terms = isMeasured ? inputs.regime : { "all modules": REGIMES[inputs.regime] };
  const modules = Object.entries(terms).map(([name, c]) => {
    const ratio = stepRatio(unchanged, old, c);
    const gamma = scaling(unchanged) * ratio ** (isSgd ? -1 / 2 : -1);
    return { name, c, alpha: alphaFor(unchanged.rule, gamma, unchanged.rank), learning_rate: old.lr / ratio, step_ratio: ratio };
  });
  const mean = (name) => rangeOf(modules.map((module) => module[name])).mean;
  const stepsOf = (next) => rangeOf(modules.map((module) => stepRatio(next, old, module.c)));

  // The learning rate by the displacement law, or the limits of the first step and of a long run.
  const rateRangeOf = (next) => {
    if (!followsDisplacementLaw) return null;
    const strength = strengthOf(next);
    // The law divides its constant by the strength, which a tiny alpha lets overflow.
    for (const setting of [old, next]) {
      if (!Number.isFinite(4 * (run.constants[1] / strengthOf(setting)))) {
        throw new InputError("alpha", `must not be as small as ${setting.alpha}: use a larger one`);
      }
    }
    return carryRate(old.lr, strengthOf(old), isClose(strength, strengthOf(old)) ? strengthOf(old) : strength, run);
  };
  const rateLimitsOf = (next) => {
    if (!hasLimits) return null;
    const first_step = old.lr / stepRatio({ ...next, lr: old.lr }, old, 0);
    const long_run = isSgd
      ? (old.lr * scaling(old)) / scaling(next)
      : old.lr * (strengthOf(next) / strengthOf(old)) ** -0.5;
    return { first_step, long_run };
  };
  const longRunScaling = isSgd ? scaling(old) : strengthOf(old) / unchanged.rank;
  const alphaLimits = hasLimits
    ? { first_step: mean("alpha"), long_run: alphaFor(unchanged.rule, longRunScaling, unchanged.rank) } : null;
  const alpha = fixesAlpha ? unchanged.alpha : mean("alpha");
  const rateRange = rateRangeOf({ ...unchanged, alpha });
  const learningRate = rateRange ? rateRange.best : fixesAlpha ? mean("learning_rate") : old.lr;

  const loraAlphaOf = (value) => alphaFor("lora", scaling({ ...unchanged, alpha: value }), unchanged.rank);
  const found = {
    old, unchanged, alpha, learning_rate: learningRate, rate_range: rateRange, rate_limits: rateLimitsOf(unchanged),
    alpha_limits: alphaLimits, run, modules, fixesAlpha, isSgd, followsDisplacementLaw, stepsOf, rateRangeOf, rateLimitsOf,
    isRslora: kappaOf(unchanged.rule) === 0.5, loraAlphaOf, loraAlpha: loraAlphaOf(alpha),
    regime: isMeasured ? `measured at ${modules.length} module${modules.length > 1 ? "s" : ""}` : `assumed: ${inputs.regime}`,
  };
  const kinds = { "all modules": modules };
  if (isMeasured) for (const each of modules) (kinds[each.name.split(".").at(-1)] ??= []).push(each);
  found.groups = Object.entries(kinds).map(([name, members]) => ({
    name,
    ...Object.fromEntries(["alpha", "learning_rate", "step_ratio"].map((part) => [part, rangeOf(members.map((m) => m[part]))])),
  }));
  found.changed = {
    rank: old.rank !== unchanged.rank,
    strength: !isClose(strengthOf(old), strengthOf({ ...unchanged, alpha })),
    steps: run.changesSteps,
  };
  found.choices = choicesOf(found);
  found.answer = answerOf(found);
  found.sentence = [found.answer, ...sameAdapter(found), ...scopeOf(found)].join(" ");
  found.config = configOf(found);
  return found;
}

function choicesOf({ old, unchanged, rateRangeOf, rateLimitsOf, stepsOf }) {
  const flags = { ", without use_rslora": "lora", ", use_rslora": "rslora" };
  const rules = [["", old.rule], ...Object.entries(flags).filter(([, rule]) => kappaOf(rule) !== kappaOf(old.rule))];
  const alphas = [
    [`alpha = ${g(old.alpha, 6)}, unchanged`, old.alpha], ["alpha = r", unchanged.rank], ["alpha = 2r", 2 * unchanged.rank],
  ];
  return alphas.flatMap(([name, alpha]) =>
    rules.map(([flag, rule]) => {
      const next = { ...unchanged, alpha, rule };
      const step = stepsOf(next);
      const rateRange = rateRangeOf(next);
      const rate = rateRange ? rateRange.best : next.lr / step.mean;
      const { low, high } = rateRange ?? { low: rate, high: rate };
      const divisor = { mean: next.lr / rate, smallest: next.lr / high, largest: next.lr / low };
      return {
        name: name + flag, scaling: scaling(next), step, learning_rate: rate, rate_range: rateRange, divisor,
        rate_limits: rateLimitsOf(next),
      };
    }),
  );
}

export function ruleInWords(rule) {
  const kappa = kappaOf(rule);
  return { 1: "alpha / r", 0.5: "alpha / sqrt(r) (use_rslora)" }[kappa] ?? `alpha / r^${g(kappa, 6)}`;
}

/** The lora_alpha and the learning rate to set, in PEFT's terms. */
function answerOf(found) {
  const { old, unchanged, run, isRslora, loraAlpha, learning_rate: rate } = found;
  const steps = run.changesSteps ? ` and from ${run.steps} to ${run.toSteps} steps` : "";
  const keepsAlpha = kappaOf(old.rule) === 1 && isClose(loraAlpha, old.alpha);
  const flag = isRslora ? " without use_rslora" : "";
  const alpha = `lora_alpha=${g(loraAlpha, 6)}${flag}`;
  const action = keepsAlpha && isClose(rate, old.lr)
    ? `keep ${alpha} and the learning rate ${g(old.lr, 3)}`
    : `${keepsAlpha ? "keep" : "set"} ${alpha} and ${rateInWords(found)}`;
  return `From rank ${old.rank} to ${unchanged.rank}${steps} with ${WORDS[old.optimizer]}: ${action}.`;
}

function rateInWords({ old, learning_rate: rate, rate_range: range_ }) {
  if (isClose(rate, old.lr)) return `keep the learning rate ${g(old.lr, 3)}`;
  const divides = rate < old.lr;
  const factor = divides ? old.lr / rate : rate / old.lr;
  const ends = range_ ? ` (range ${g(range_.low, 2)} to ${g(range_.high, 2)})` : "";
  return `${divides ? "divide" : "multiply"} the learning rate by ${g(factor, 3)}, to ${g(rate, 3)}${ends}`;
}

function sameAdapter({ unchanged, alpha, isRslora }) {
  const kappa = kappaOf(unchanged.rule);
  if (isRslora) {
    return [`This is the same adapter as lora_alpha=${g(alpha, 6)} with use_rslora, which SGLang, llama.cpp and Ollama ` +
      `serve ${g(Math.sqrt(unchanged.rank), 3)} times too weak; \`rora portable\` converts one that is already trained.`];
  }
  return kappa === 1 ? [] : [`This is the same adapter as alpha ${g(alpha, 6)} under alpha / r^${g(kappa, 6)}.`];
}

/** Sentences on the evidence, the cost in the measured runs and the limits. */
function scopeOf(found) {
  if (found.followsDisplacementLaw) return [...costOf(found), ...lawOf(found), ...limitsOf(found)];
  const limits = found.fixesAlpha ? found.rate_limits : found.alpha_limits;
  if (limits === null) {
    return [`This preserves the root mean square of each module's first update; the regime is ${found.regime}.`,
      "Later steps are not covered: for the whole model, use the regime signal."];
  }
  return horizonOf(found, limits);
}

function costOf({ changed, run }) {
  const entry = measured[["cost", ...["rank", "strength", "steps"].filter((name) => changed[name])].join("_")];
  if (!entry || (changed.strength && run.ownConstant !== null)) return [];
  const { largest, pairs } = entry.columns;
  const sentences = ["In runs at a constant learning rate the held-out loss of this choice exceeded the lowest by at most " +
    `${largest.toFixed(4)} nats per token (${pairs} pairs of settings of ${COST_MODELS.join(" and ")}); from rank ` +
    `${USE_RSLORA.old_rank} to ${USE_RSLORA.rank}, switching on use_rslora and keeping the rate cost ${USE_RSLORA.regret.toFixed(2)}.`];
  if (run.changesSchedule) sentences.push("This cost does not include the change of the schedule.");
  return sentences;
}

function lawOf({ old, unchanged, alpha, run, changed }) {
  const sentences = [];
  if (changed.strength) {
    const [low, high] = run.constants;
    const constant = low === high ? `K = ${g(low, 3)}` : `K = ${g(low, 3)} to ${g(high, 3)}`;
    const origin = run.ownConstant !== null ? `given ${constant}` : `measured ${constant} (${CONSTANT_MODELS.join(" and ")})`;
    sentences.push(`The rate follows the displacement law with the ${origin}, as scaling times rank ` +
      `goes from ${g(strengthOf(old), 4)} to ${g(strengthOf({ ...unchanged, alpha }), 4)}.`);
    if (run.steps === null && run.ownConstant === null) sentences.push("The range is narrower if the number of steps is given.");
  }
  if (run.changesSteps) {
    const [low, high] = run.stepsExponents;
    sentences.push(`The best rate is assumed to change as the number of steps to the power ${g(low, 6)} to ${g(high, 6)}, ` +
      "as in the measured runs.");
  }
  if (run.changesSchedule) {
    const change = `from ${run.schedule} to ${run.toSchedule}`;
    sentences.push(run.scheduleFactors === null
      ? `The change of schedule ${change} was not measured and is left out of the rate.`
      : `The rate includes the measured change of schedule ${change}.`);
  }
  return sentences;
}

function limitsOf({ old, unchanged, alpha, changed, run }) {
  const sentences = [];
  const outside = [];
  // The measured steps depend on the schedule; one that was not measured has those of a constant rate.
  const limitsOfSteps = (schedule) => MEASURED_STEPS[schedule ?? "constant"] ?? MEASURED_STEPS.constant;
  const oldLimits = limitsOfSteps(run.schedule), newLimits = limitsOfSteps(run.toSchedule);
  const steps = oldLimits === newLimits
    ? [["steps", [run.steps, run.toSteps], oldLimits]]
    : [["steps", [run.steps], oldLimits], ["steps", [run.toSteps], newLimits]];
  for (const [label, values, [low, high]] of [
    ["rank", [old.rank, unchanged.rank], SETTINGS.rank],
    ["scaling times rank", [strengthOf(old), strengthOf({ ...unchanged, alpha })], SETTINGS.strength],
    ...steps,
  ]) {
    const beyond = [...new Set(values)].filter((value) => value !== null && !(low * (1 - 1e-3) <= value && value <= high * (1 + 1e-3)));
    beyond.sort((a, b) => a - b);
    const numbers = [...new Set(beyond.map((value) => g(value, 4)))].join(" and ");
    if (beyond.length) outside.push(`${label} ${numbers} (measured: ${g(low, 4)} to ${g(high, 4)})`);
  }
  if (outside.length) sentences.push(`Outside the measured range: ${outside.join("; ")}.`);
  const decreases = [[unchanged.rank < old.rank, "a lower rank"], [run.steps !== null && run.toSteps < run.steps, "fewer steps"]];
  const lower = decreases.filter(([isLower]) => isLower).map(([, name]) => name);
  if (lower.length) sentences.push(`Runs with ${lower.join(" and ")} than the tuned one were not compared.`);
  const stepsOf = (schedule) => MEASURED_STEPS[schedule].map((value) => g(value, 6)).join(" to ");
  let runs = `${stepsOf("constant")} steps at a constant rate`;
  if (run.hasUnmeasuredSchedule) runs += ", not with this schedule";
  // Schedules other than a constant rate were measured with one seed.
  else for (const schedule of run.otherSchedules) runs += `, and ${stepsOf(schedule)} with ${schedule} decay (one seed)`;
  // The measured constant of the displacement law comes from more models than the rest.
  const usesMeasuredConstant = changed.strength && run.ownConstant === null;
  const otherModels = CONSTANT_MODELS.filter((model) => !COST_MODELS.includes(model));
  const constant = otherModels.length && usesMeasuredConstant ? ` (K also from ${otherModels.join(" and ")})` : "";
  sentences.push(`The measurements are from ${COST_MODELS.join(" and ")}${constant}, with AdamW: ${runs}.`);
  return sentences;
}

/** Sentences on the first step and a long run, where the displacement law does not apply. */
function horizonOf({ old, unchanged, fixesAlpha, isSgd, loraAlphaOf }, limits) {
  const [first, last] = [limits.first_step, limits.long_run].map(fixesAlpha ? (rate) => rate : loraAlphaOf);
  const value = fixesAlpha ? `the learning rate ${g(last, 3)}` : `lora_alpha=${g(last, 6)}`;
  const sentences = isClose(first, last)
    ? ["This preserves the first update, and the change in a long run."]
    : [`This preserves the first update; in a long run, where the motion of A dominates, ${value} preserves the change.`];
  if (isSgd) {
    // The first step preserves lr (gamma deviation)^2 rank, and a long run lr gamma.
    const growthOfRate = (unchanged.rank * deviation(unchanged) ** 2) / (old.rank * deviation(old) ** 2);
    sentences.push(
      "A run is long if the scaling times the sum of the learning rates times the gradient's singular values exceeds 1.",
      `lora_alpha=${g((scaling(old) / growthOfRate) * unchanged.rank, 6)} and the learning rate ${g(old.lr * growthOfRate, 3)} suit both.`,
      "Clipping of the gradient changes the law. The page on SGD in the documentation has what was measured.",
    );
  } else {
    sentences.push(`Best rates with the initialisation ${old.init} were not measured.`);
  }
  return [...sentences, "Both ranks are assumed to be above the crossing rank."];
}

/** PEFT's LoraConfig, always under alpha / r: several servers ignore use_rslora. */
function configOf({ unchanged, alpha, learning_rate: rate, fixesAlpha, groups, isRslora, loraAlpha, loraAlphaOf }) {
  const kappa = kappaOf(unchanged.rule);
  let remark = kappa === 1 ? "" : `  # alpha / r with the gamma of ${g(alpha, 6)} / r^${g(kappa, 6)}`;
  if (isRslora) remark = `  # the same adapter as ${g(alpha, 6)} with use_rslora=True`;
  const kinds = groups.slice(1);
  const targets = kinds.length ? kinds.map((group) => group.name) : TARGETS;
  const pattern = fixesAlpha ? [] : kinds.map((group) => `        '${group.name}': ${g(loraAlphaOf(group.alpha.mean), 6)},`);
  return [
    "from peft import LoraConfig", "", `config = LoraConfig(  # learning rate ${g(rate, 6)}`, "    task_type='CAUSAL_LM',",
    `    r=${unchanged.rank},`, `    lora_alpha=${g(loraAlpha, 6)},${remark}`, "    use_rslora=False,",
    `    init_lora_weights=${PEFT_INITS[unchanged.init]},`, `    target_modules=[${targets.map((name) => `'${name}'`).join(", ")}],`,
    ...(pattern.length ? ["    alpha_pattern={", ...pattern, "    },"] : []), ")",
  ].join("\n");
}

/** Linear terms by module of a crossing_ranks.csv, for one optimizer, init and split. */
export function readCrossings(text, { optimizer, init, split }) {
  const lines = text.replace(/^\uFEFF/, "").split(/\r?\n/).filter((line) => line);
  const heads = (lines[0] ?? "").split(",");
  const columns = Object.fromEntries(["module", "split", "optimizer", "init", "linear_term"].map((name) => [name, heads.indexOf(name)]));
  for (const [name, place] of Object.entries(columns)) {
    if (place < 0) throw new InputError("file", `has no column ${name}. Choose the file that rora regime writes.`);
  }
  const wanted = { optimizer: FAMILY[optimizer], init, split };
  const found = {};
  lines.slice(1).forEach((line, index) => {
    const cells = line.split(",");
    if (Object.entries(wanted).some(([name, value]) => cells[columns[name]] !== value)) return;
    const cell = (cells[columns.linear_term] ?? "").trim();
    const term = cell === "inf" ? Infinity : cell === "" ? NaN : Number(cell);
    if (!(term > -1)) throw new InputError("file", `must have a number above -1, or inf, as linear_term, got ${cell || "nothing"} in line ${index + 2}`);
    found[cells[columns.module]] = term;
  });
  if (!Object.keys(found).length) {
    const conditions = Object.entries(wanted).map((pair) => pair.join(" ")).join(", ");
    throw new InputError("file", `has no row of ${conditions}. Choose a file that has them.`);
  }
  return found;
}

/** Against the rank, with alpha and rate as they are: the first step at both ends of the law and as measured, and rates. */
export function curves(inputs) {
  const top = Math.max(512, inputs["from-rank"], inputs["to-rank"]);
  const ranks = [...Array(Math.ceil(Math.log2(top)) + 1).keys()].map((power) => 2 ** power);
  return ranks.map((rank) => {
    const { unchanged, old, stepsOf, rateRangeOf, rateLimitsOf } = advise({ ...inputs, "to-rank": rank });
    return {
      rank, signal: stepRatio(unchanged, old, 0), cross_talk: stepRatio(unchanged, old, Infinity),
      measured: typeof inputs.regime === "string" ? null : stepsOf(unchanged).mean,
      rate_range: rateRangeOf(unchanged), rate_limits: rateLimitsOf(unchanged),
    };
  });
}
