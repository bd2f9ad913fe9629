"""Reader of a run of ``sims.regime`` for advice: linear terms by module, and what was not measured."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rora_theory.advice.adapter_config import ALL_LINEAR
from rora_theory.advice.setting import REGIMES
from rora_theory.errors import InputError
from rora_theory.inits import Init
from rora_theory.measure.regimes import thin
from rora_theory.measure.regimes.layer import Split
from rora_theory.measure.regimes.tables import CROSSING_COLUMNS, CROSSINGS
from rora_theory.optimizers import FAMILY, OptimizerName
from rora_theory.runs import frames
from rora_theory.runs.files import read_json
from rora_theory.runs.reading import check_manifest


@dataclass(frozen=True)
class RegimeRun:
    """Results of a run for one optimizer, initialisation and split, see `read_regime_run`.

    Attributes:
      folder: Folder of the run.
      linear_terms: Linear terms by full module name.
      manifest: Manifest of the run.
      few_tokens: Warnings of `thin.token_warnings`.
    """

    folder: Path
    linear_terms: Mapping[str, float]
    manifest: Mapping[str, Any]
    few_tokens: tuple[str, ...] = ()

    @property
    def module_types(self) -> list[str]:
        """Types of the measured modules (``q_proj``, ...)."""
        return _module_types(self.linear_terms)

    def terms_of(self, targets: str | list[str] | None) -> dict[str, float]:
        """Return the linear terms of the modules that a list of ``target_modules`` selects.

        Args:
          targets: Names of modules. None or a string such as ``"all-linear"`` selects all measured modules.

        Raises:
          InputError: If a target was not measured.
        """
        if not isinstance(targets, list):
            return dict(self.linear_terms)
        terms = {
            name: term for name, term in self.linear_terms.items() if any(_matches(name, target) for target in targets)
        }
        # A target without a measured module would silently get no advice.
        for target in targets:
            if not any(_matches(name, target) for name in terms):
                raise InputError(
                    f"targets has {target}, which {self.folder} did not measure; "
                    f"measured: {' '.join(self.module_types)}"
                )
        return terms

    def describe_gaps(self, targets: str | list[str] | None) -> str:
        """Describe which of the targets the run did not measure, or measured with a large error.

        Args:
          targets: Target modules, see `terms_of`.

        Returns:
          Sentences, or an empty string if all targets were measured well.
        """
        terms, settings = self.terms_of(targets), self.manifest.get("config", {})
        # What the run did not measure: layers, settings and kinds of modules.
        layers = sorted({int(name.split(".layers.")[1].split(".")[0]) for name in terms if ".layers." in name})
        model_layers = self.manifest.get("model_layers")
        missing = []
        if model_layers is not None and len(layers) < model_layers:
            missing.append(f"it has {len(layers)} of the model's {model_layers} layers ({' '.join(map(str, layers))})")
        elif model_layers is None and settings.get("layers") is not None:
            missing.append(f"it has layers {' '.join(map(str, layers))} only")
        if self.manifest.get("status") != "complete":
            missing.append("the run is not complete")
        if targets == ALL_LINEAR and settings.get("targets") != [ALL_LINEAR]:
            missing.append(f"{ALL_LINEAR} adapts more modules than it has ({' '.join(_module_types(terms))})")
        # Together with the warnings about few tokens.
        sentences = list(self.few_tokens)
        if missing:
            sentences.append(
                f"This regime is thin: {', and '.join(missing)}. Modules that were not measured get the mean of those "
                "that were; the error of this estimate is unknown."
            )
        return " ".join(sentences)


def read_regime_run(folder: Path, *, optimizer: OptimizerName, init: Init, split: Split) -> RegimeRun:
    """Read the linear terms of a run.

    Args:
      optimizer: Optimizer of the first step.
      split: Split at which the change is measured.

    Returns:
      The linear terms with the manifest of the run.

    Raises:
      InputError: If there is no such run, or it did not measure this optimizer and initialisation.
    """
    # Check the files before reading them.
    path = folder / CROSSINGS
    if not path.is_file():
        raise InputError(
            f"{folder} has no {CROSSINGS}. Use a run folder of sims.regime, or one of {', '.join(REGIMES)}."
        )
    # Linear terms of the rows for this optimizer, initialisation and split.
    selection = {"optimizer": FAMILY[optimizer], "init": init, "split": split}
    rows = frames.where(frames.read_csv(path, CROSSING_COLUMNS), selection)
    terms = {}
    for index, module, text in rows[["module", "linear_term"]].itertuples():
        try:
            terms[module] = float(text)
        except ValueError:
            terms[module] = float("nan")
        if math.isnan(terms[module]):
            raise InputError(f"{path}: line {index + 2}: linear_term must be a number, got {text!r}")
    if not terms:
        described = ", ".join(f"{name} {value}" for name, value in selection.items())
        raise InputError(f"{path} has no row for {described}. Use a run that measured them.")
    # The manifest gives the layers of the model and the settings, the rows the number of tokens.
    manifest = read_json(folder / "manifest.json", accepted="the manifest of a run of sims.regime")
    check_manifest(folder / "manifest.json", manifest)
    few_tokens = tuple(thin.token_warnings(rows))
    return RegimeRun(folder, terms, manifest, few_tokens)


def _module_types(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))


def _matches(name: str, target: str) -> bool:
    """Return whether PEFT matches a module name with an entry of a list of targets."""
    return name == target or name.endswith(f".{target}")
