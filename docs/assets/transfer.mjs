// The arithmetic of `rora transfer` for AdamW and PEFT's default initialisation. Constants come from the package.

import constants from "./constants.json" with { type: "json" };

const KAPPAS = { lora: 1, rslora: 0.5 };
export const SCHEDULES = ["constant", "linear", "cosine"];
const LABELS = {
  "from-rank": "Tuned rank", alpha: "Alpha", lr: "Learning rate", "to-rank": "New rank", "to-alpha": "New alpha",
  rule: "Rule", "to-rule": "New rule", steps: "Steps", "to-steps": "New steps", "batch-size": "Batch size", "to-batch-size": "New batch size",
  schedule: "Schedule", "to-schedule": "New schedule",
};

/** Invalid input: a message of one line, and the name of the field. */
export class InputError extends Error {
  constructor(field, message) {
    super(`${LABELS[field]} ${message}.`);
    this.field = field;
  }
}

function check(inputs) {
  for (const [field, isRequired] of [["from-rank", true], ["to-rank", true], ["steps", false], ["to-steps", false], ["batch-size", false], ["to-batch-size", false]]) {
    const value = inputs[field] ?? null;
    if (value === null && !isRequired) continue;
    if (!Number.isInteger(value) || value < 1 || value >= 2 ** 31) throw new InputError(field, `must be an integer of at least 1, got ${value ?? "nothing"}`);
  }
  for (const [field, isRequired] of [["alpha", true], ["lr", true], ["to-alpha", false]]) {
    const value = inputs[field] ?? null;
    if (value === null && !isRequired) continue;
    if (!(Number.isFinite(value) && value > 0)) throw new InputError(field, `must be a number above 0, got ${value ?? "nothing"}`);
  }
  for (const [field, choices] of [["rule", Object.keys(KAPPAS)], ["to-rule", Object.keys(KAPPAS)], ["schedule", SCHEDULES], ["to-schedule", SCHEDULES]]) {
    const value = inputs[field] ?? null;
    if (value !== null && !choices.includes(value)) throw new InputError(field, `must be one of ${choices.join(", ")}, got ${value}`);
  }
  for (const field of ["steps", "batch-size", "schedule"]) {
    if (inputs[`to-${field}`] != null && inputs[field] == null) throw new InputError(field, "of the tuned run must be given together with that of the new run");
  }
}

/** Mean and standard deviation of the logarithm of a power of a ratio; a missing value counts as unchanged. */
function power([exponent, spread], old, next) {
  if (old == null || next == null) return [0, 0];
  const growth = Math.log(next / old);
  return [exponent * growth, spread * Math.abs(growth)];
}

/** Effect of one step at a gain, by the displacement law, relative to the learning rate. */
function stepSize(gain) {
  const share = constants.laws.displacement_constant[0] / gain;
  return gain * (1 + (2 * share) / (1 + Math.sqrt(1 + 4 * share)));
}

function scheduleChange(old, next) {
  const [before, after] = [constants.schedules[old], constants.schedules[next]];
  if (old === next || !before || !after) return [0, 0];
  return [Math.log(after[0] / before[0]), Math.hypot(before[1], after[1])];
}

/** Return the alpha under `alpha / r`, the learning rate and its range for the new rank. */
export function advise(inputs) {
  check(inputs);
  const rule = inputs.rule ?? "lora";
  const rank = inputs["to-rank"];
  const oldGain = inputs.alpha * inputs["from-rank"] ** (1 - KAPPAS[rule]);
  const gain = inputs["to-alpha"] == null ? oldGain : inputs["to-alpha"] * rank ** (1 - KAPPAS[inputs["to-rule"] ?? rule]);
  const { laws } = constants;
  const newOf = (name) => inputs[`to-${name}`] ?? inputs[name];
  const terms = [
    [Math.log(stepSize(oldGain) / stepSize(gain)), 0],
    power(laws.gain_exponent, oldGain, gain),
    power(laws.rank_exponent, inputs["from-rank"], rank),
    power(laws.steps_exponent, inputs.steps, newOf("steps")),
    power(laws.batch_exponent, inputs["batch-size"], newOf("batch-size")),
    scheduleChange(inputs.schedule, newOf("schedule")),
  ];
  const spread = Math.hypot(...terms.map((term) => term[1]));
  const rate = inputs.lr * Math.exp(terms.reduce((sum, term) => sum + term[0], 0));
  const factor = spread > 0 ? Math.exp(constants.quantile * Math.hypot(spread, laws.pair[1])) : 1;
  const hasUnmeasuredSchedule = inputs.schedule !== newOf("schedule") && !(inputs.schedule in constants.schedules && newOf("schedule") in constants.schedules);
  return { rank, loraAlpha: gain, rate, low: rate / factor, high: rate * factor, hasUnmeasuredSchedule };
}

/** Common choices at a rank: a name, the alpha and rule to pass to `advise`. */
export function choices(alpha, rank) {
  return [
    { name: `alpha = ${Number(alpha.toPrecision(6))}`, "to-alpha": alpha, "to-rule": "lora" },
    { name: `alpha = ${Number(alpha.toPrecision(6))}, use_rslora`, "to-alpha": alpha, "to-rule": "rslora" },
    { name: "alpha = r", "to-alpha": rank, "to-rule": "lora" },
    { name: "alpha = 2r", "to-alpha": 2 * rank, "to-rule": "lora" },
  ];
}

/** Best rates of the common choices against the rank, from 1 to 512 or the largest rank asked. */
export function curves(inputs) {
  const top = Math.max(512, inputs["from-rank"], inputs["to-rank"]);
  const ranks = [...Array(Math.ceil(Math.log2(top)) + 1).keys()].map((power) => 2 ** power);
  return choices(inputs.alpha, 1).map(({ name }, i) => ({
    name,
    ranks,
    rates: ranks.map((rank) => advise({ ...inputs, ...choices(inputs.alpha, rank)[i], "to-rank": rank }).rate),
  }));
}
