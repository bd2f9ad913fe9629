"""A run of ``sims.regime`` that is read for advice: the linear term of every module, and what the run leaves open."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rora_theory.advice.lora_config import ALL_LINEAR
from rora_theory.advice.setting import REGIMES
from rora_theory.errors import InputError
from rora_theory.inits import Init
from rora_theory.io import frames
from rora_theory.io.files import read_json
from rora_theory.measure.layers.layer_data import Split
from rora_theory.measure.regimes import thin
from rora_theory.measure.regimes.tables import CROSSING_COLUMNS, CROSSINGS
from rora_theory.optimizers import FAMILY, OptimizerName
from rora_theory.runs import seals
from rora_theory.runs.reading import check_manifest


@dataclass(frozen=True)
class RegimeRun:
    """What a run says of one optimizer, law of A and split, see `read_regime_run`.

    Attributes:
      folder: of the run.
      linear_terms: by the modules' full names.
      manifest: the run's.
      few_tokens: `thin.of_tokens`.
    """

    folder: Path
    linear_terms: Mapping[str, float]
    manifest: Mapping[str, Any]
    few_tokens: tuple[str, ...] = ()

    @property
    def kinds(self) -> list[str]:
        """Types of module (``q_proj``, ...)."""
        return _kinds(self.linear_terms)

    def terms_of(self, targets: str | list[str] | None) -> dict[str, float]:
        """The linear terms of the modules that a list of ``target_modules`` names; all of them for None or a word.

        Raises:
          InputError: a target that was not measured.
        """
        if not isinstance(targets, list):
            return dict(self.linear_terms)
        kept = {name: c for name, c in self.linear_terms.items() if any(_ends_with(name, one) for one in targets)}
        for target in targets:
            if not any(_ends_with(name, target) for name in kept):
                raise InputError(
                    f"--targets has {target}, which {self.folder} did not measure; accepted are {' '.join(self.kinds)}"
                )
        return kept

    def gaps(self, targets: str | list[str] | None) -> str:
        """What the run did not measure of the targets, or measured badly; empty where it measured all well."""
        terms, settings = self.terms_of(targets), self.manifest.get("config", {})
        layers = sorted({int(name.split(".layers.")[1].split(".")[0]) for name in terms if ".layers." in name})
        of_all = self.manifest.get("model_layers")
        missing = []
        if of_all is not None and len(layers) < of_all:
            missing.append(f"it has {len(layers)} of the model's {of_all} layers ({' '.join(map(str, layers))})")
        elif of_all is None and settings.get("layers") is not None:
            missing.append(f"it was made for layers {' '.join(map(str, layers))} alone")
        if self.manifest.get("status") != "complete":
            missing.append("it has not ended")
        if targets == ALL_LINEAR and settings.get("targets") != [ALL_LINEAR]:
            missing.append(f"{ALL_LINEAR} adapts more than the modules that it has ({' '.join(_kinds(terms))})")
        said = list(self.few_tokens)
        if missing:
            said.append(
                f"This regime is thin: {', and '.join(missing)}. What it has not measured gets the mean of what it "
                "has; nothing here says how far that is off."
            )
        return " ".join(said)


def read_regime_run(folder: Path, *, optimizer: OptimizerName, init: Init, split: Split) -> RegimeRun:
    """The linear terms of a run.

    Args:
      folder: of the run.
      optimizer, init: whose first step, from which A.
      split: tokens at which the stepped model is read.

    Raises:
      InputError: no such run, one that was changed, or one that did not measure this optimizer and init.
    """
    path = folder / CROSSINGS
    if not path.is_file():
        raise InputError(
            f"{folder}: has no {CROSSINGS}; accepted are {', '.join(REGIMES)} or a run folder of sims.regime"
        )
    problem = seals.problem(folder)
    if problem is not None:
        raise InputError(f"{problem}; accepted is the run as sims.regime wrote it")
    wanted = {"optimizer": FAMILY[optimizer], "init": init, "split": split}
    rows = frames.where(frames.read_csv(path, CROSSING_COLUMNS), wanted)
    found = {}
    for index, module, term in rows[["module", "linear_term"]].itertuples():
        try:
            found[module] = float(term)
        except ValueError:
            found[module] = float("nan")
        if found[module] != found[module]:
            raise InputError(f"{path}: line {index + 2} has linear_term {term!r}; accepted is a number")
    if not found:
        said = ", ".join(f"{name} {value}" for name, value in wanted.items())
        raise InputError(f"{path}: has no row of {said}; accepted is a run that measured them")
    manifest = read_json(folder / "manifest.json", accepted="the manifest of a run of sims.regime")
    check_manifest(folder / "manifest.json", manifest)
    few_tokens = tuple(thin.of_tokens(rows))
    return RegimeRun(folder, found, manifest, few_tokens)


def _kinds(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))


def _ends_with(name: str, target: str) -> bool:
    """As PEFT matches a name in a list."""
    return name == target or name.endswith(f".{target}")
