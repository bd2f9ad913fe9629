// The arithmetic of `rora transfer` for AdamW and PEFT's default initialisation. Constants come from the package.

import constants from "./constants.json" with { type: "json" };

const KAPPAS = { lora: 1, rslora: 0.5 };
export const SCHEDULES = ["constant", "linear", "cosine"];
const LABELS = {
  "from-rank": "Tuned rank", alpha: "Alpha", lr: "Learning rate", "to-rank": "New rank", "to-alpha": "New alpha",
  rule: "Rule", "to-rule": "New rule", steps: "Steps", "to-steps": "New steps", schedule: "Schedule", "to-schedule": "New schedule",
};

/** Invalid input: a message of one line, and the name of the field. */
export class InputError extends Error {
  constructor(field, message) {
    super(`${LABELS[field]} ${message}.`);
    this.field = field;
  }
}

function check(inputs) {
  for (const [field, isRequired] of [["from-rank", true], ["to-rank", true], ["steps", false], ["to-steps", false]]) {
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
  for (const field of ["steps", "schedule"]) {
    if (inputs[`to-${field}`] != null && inputs[field] == null) throw new InputError(field, "of the tuned run must be given together with that of the new run");
  }
}

/** Lowest and highest displacement constant K: between measured numbers of steps, interpolated in logarithms. */
function displacementConstants(steps) {
  const ranges = Object.values(constants.displacement_constants).map((rows) => {
    if (steps === null) return [Math.min(...rows.map((row) => row.low)), Math.max(...rows.map((row) => row.high))];
    const above = rows.findIndex((row) => row.steps >= steps);
    if (above <= 0) return [rows.at(above).low, rows.at(above).high];
    const share = Math.log(steps / rows[above - 1].steps) / Math.log(rows[above].steps / rows[above - 1].steps);
    return ["low", "high"].map((end) => rows[above - 1][end] ** (1 - share) * rows[above][end] ** share);
  });
  return [Math.min(...ranges.map(([low]) => low)), Math.max(...ranges.map(([, high]) => high))];
}

/** Size of one step's effect at a given G, relative to the learning rate. */
function stepSize(strength, constant, coherence) {
  const share = constant / strength;
  return strength * (1 + (coherence * 2 * share) / (1 + Math.sqrt(1 + 4 * share)));
}

/** Lowest and highest factor of the best rate due to the schedule; null if it was not measured. */
function scheduleFactors(old, next) {
  if (old === next) return [1, 1];
  const [before, after] = [constants.schedule_factors[old], constants.schedule_factors[next]];
  return before && after ? [after[0] / before[1], after[1] / before[0]] : null;
}

/** Return the alpha under `alpha / r`, the learning rate and its range for the new rank. */
export function advise(inputs) {
  check(inputs);
  const rule = inputs.rule ?? "lora";
  const rank = inputs["to-rank"];
  const oldStrength = inputs.alpha * inputs["from-rank"] ** (1 - KAPPAS[rule]);
  const strength = inputs["to-alpha"] == null ? oldStrength : inputs["to-alpha"] * rank ** (1 - KAPPAS[inputs["to-rule"] ?? rule]);
  const [steps, schedule] = [inputs.steps ?? null, inputs.schedule ?? null];
  const [newSteps, newSchedule] = [inputs["to-steps"] ?? steps, inputs["to-schedule"] ?? schedule];
  const ranges = [displacementConstants(steps), displacementConstants(newSteps)];
  const [lowest, highest] = [Math.min(ranges[0][0], ranges[1][0]), Math.max(ranges[0][1], ranges[1][1])];
  const isConstant = [schedule, newSchedule].every((name) => name === null || name === "constant");
  const exponents = constants.steps_exponents[isConstant ? "constant" : "any"];
  const moreSteps = steps === null ? 1 : newSteps / steps;
  const rate = (constant, coherence, exponent) =>
    inputs.lr * (stepSize(oldStrength, constant, coherence) / stepSize(strength, constant, coherence)) * moreSteps ** exponent;
  const best = rate(Math.sqrt(lowest * highest), constants.coherence[0], (exponents[0] + exponents[1]) / 2);
  const ends = [lowest, highest].flatMap((constant) =>
    constants.coherence.flatMap((coherence) => exponents.map((exponent) => rate(constant, coherence, exponent))));
  const factors = scheduleFactors(schedule, newSchedule);
  const [low, high] = factors ?? [1, 1];
  return {
    rank, loraAlpha: strength, rate: best * Math.sqrt(low * high), low: Math.min(best, ...ends) * low,
    high: Math.max(best, ...ends) * high, hasUnmeasuredSchedule: factors === null,
  };
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
