"""Values that each configuration refuses: a table of fields and values for every class.

Adapters have their table in `tests/lab/adapters/test_every_method.py`, and models theirs in
`tests/lab/llama/test_config.py`.
"""

import re
from typing import Any

import pytest

from rora_theory.errors import InputError
from rora_theory.lab.data.records import DataConfig
from rora_theory.lab.evaluate.scoring import Scoring
from rora_theory.lab.finetune import FinetuneConfig
from rora_theory.lab.sweep.controlled import ProblemConfig
from rora_theory.lab.sweep.controlled_grid import ControlledGrid
from rora_theory.lab.sweep.grid import SweepGrid
from rora_theory.lab.sweep.plan import SweepConfig
from rora_theory.measure.rank_check.rules import CheckConfig
from rora_theory.measure.regimes.module_regime import RegimeConfig
from rora_theory.measure.transfer_request import TransferConfig
from rora_theory.paper.simulation import SimulationConfig
from rora_theory.runs.cluster import ClusterConfig
from rora_theory.validation import ranges
from sims.common.record_batches import BatchConfig, PairConfig
from sims.lr_transfer import RateGrid
from sims.tune import TuneOptions

NAN = float("nan")


def same_values(names: str, *values: Any) -> dict[str, tuple]:
    """Return the same values for several fields."""
    return dict.fromkeys(names.split(), values)


COST = same_values("rank batch_size accumulation epochs steps", 0)
BATCHES = same_values("batch_size held_out", 0) | same_values("cutoff", 1)
REQUIRED: dict[type, dict[str, Any]] = {
    SweepConfig: {"data": ("train.json",)},
    Scoring: {"protocol": "generate"},
}
"""Required fields of a class."""
INVALID: dict[type, dict[str, tuple]] = {
    FinetuneConfig: COST
    | same_values("widths evaluate_every checkpoint_every", 0)
    | same_values("held_out warmup seed", -1)
    | same_values("cutoff", 1)
    | same_values("alpha lr lr_multiplier_A epsilon", 0.0)
    | same_values("weight_decay", -0.1)
    | same_values("clip", 0.0, NAN)
    | same_values("dropout", 1.0, -0.1)
    | {"method": ("ia3",), "schedule": ("step",), "loss_on": ("none",), "dtype": ("int8",), "template": ("eval",)}
    | {"quantization": ("nf4",), "remat": ("attention",), "rule": ("lore",), "init": ("pissa",)}
    | {"betas": ((0.9, 1.0),)},
    SweepConfig: same_values("limit score_batch_size", 0),
    SweepGrid: {"methods": (("qlora",), (), ("lora", "lora")), "seeds": ((3, 3), (-1,)), "model": ((), ("a", "a"))}
    | {"ranks": ((), (4, 4), (0,)), "lrs": ((), (1e-3, -1.0)), "read_at": ((2, 1), (0, 1))}
    | same_values("gains full_lrs", (1.0, 1.0), (0.0,)),
    TuneOptions: same_values("steps rank batch_size parameters", 0)
    | {"alpha": (0.0,), "rule": ("none",), "targets": ((),)},
    RegimeConfig: {"ranks": ((), (4, 4), (0,)), "rules": ((), ("lore",), ("rora", 0.5))}
    | {"optimizers": ((), ("lion",)), "inits": (("pissa",), ("gaussian", "gaussian"))}
    | same_values("alpha lr", 0.0)
    | {"rows": (-1, 32, 1_000_000_000), "tokens": (0,), "seed": (-1,)},
    CheckConfig: {"ranks": ((2,), (4, 4), (0, 2)), "rules": ((), ("lora", "lora")), "seeds": ((1,), (1, -1))}
    | {"optimizers": (("lion",),), "inits": (("pissa",),), "steps": ((2, 1),), "reference_rank": (0,)}
    | same_values("adam_lr sgd_lr band gamma", 0.0),
    BatchConfig: BATCHES,
    PairConfig: BATCHES,
    TransferConfig: same_values("from_rank to_rank steps to_steps batch_size to_batch_size", 0)
    | same_values("lr to_alpha", 0.0)
    | same_values("displacement_constant", -1.0)
    | {"rule": ("lore",), "to_rule": (NAN,), "optimizer": ("muon",)},
    DataConfig: {"show": (-1,), "format": ("csv",), "fields": ({"question": "q"},)},
    SimulationConfig: {"p_in": (0,), "p_out": (0,), "overlaps": ((1.5,), ())}
    | {"ranks": ((),), "rules": (("loar",),), "optimizers": (("lion",),), "inits": (("xavier",),)}
    | {"alpha": (-1.0, 0.0), "lr": (0.0,), "draws": (1, 2_000_000_000), "relative_error": (0.0, -0.1, 1e-9)}
    | {"seed": (-1,)},
    ProblemConfig: same_values("p_in hidden p_out samples held_out teacher_rank", 0)
    | {"noise": (-1.0,), "overlap": (-0.1, 1.5)},
    RateGrid: {"adam_lrs": ((1.0, 2.0),), "sgd_lrs": ((1.0, 2.0),)},
    ControlledGrid: {
        "ranks": ((4,), (4, 4)),
        "methods": ((), ("lora", "1"), ("best",), ("nan",), ("rora", "0.5"), ("rora", "rslora")),
    }
    | {"optimizers": (("lion",),), "model": ((), ("cnn",))}
    | {"adam_lrs": ((), (1.0, 1.0)), "sgd_lrs": ((1.0, -1.0),), "read_at": ((), (2, 1), (0,))}
    | {"seeds": ((1,), (0, 2**32)), "gamma": (0.0,), "reference_rank": (0,), "seed": (-1,)},
    ClusterConfig: {"workers": (0,), "cell_cpus": (0.0,), "cell_gpus": (-1.0,), "cell_memory": (0.0, NAN)}
    | {"address": ("ray://head:10001", "head")},
    Scoring: same_values("num_beams max_new_tokens", 0) | {"template": ("alpaca",), "protocol": ("acc",)},
}

COMBINATIONS = [
    (FinetuneConfig, {"accumulation": 3}, "accumulation .* batch_size, 16, got 3"),
    (FinetuneConfig, {"method": "prefix", "rank": 8}, "rank .*method prefix, got 8.*lora or dora"),
    (FinetuneConfig, {"method": "prefix", "targets": ("q_proj",)}, "targets .*method prefix"),
    (FinetuneConfig, {"method": "prefix", "virtual_tokens": 0}, "virtual_tokens .*0"),
    (FinetuneConfig, {"method": "series", "rule": "lora"}, "rule .*method series, got 'lora'"),
    (FinetuneConfig, {"method": "parallel", "bottleneck": 0}, "bottleneck width .*0"),
    (FinetuneConfig, {"method": "parallel", "dropout": 1.0}, "dropout .*1.0"),
    (FinetuneConfig, {"method": "full", "rank": 8}, "rank .*method full, got 8"),
    (FinetuneConfig, {"method": "full", "quantization": "q8_0"}, "quantization .*method full, got 'q8_0'"),
    (FinetuneConfig, {"method": "dora", "bottleneck": 8}, "bottleneck .*method dora, got 8"),
    (FinetuneConfig, {"virtual_tokens": 3}, "virtual_tokens .*method lora, got 3.*prefix"),
    (TransferConfig, {"split": "train"}, "split train .* regime"),
    (TransferConfig, {"per": "one", "regime": "cross-talk"}, "per one .* regime"),
    (
        SimulationConfig,
        {"sampler": "reduced", "inits": ("rademacher",)},
        "sampler reduced.* rademacher",
    ),
    (SimulationConfig, {"rules": (-40.0,)}, "1e-18 to 1e18"),
    (SimulationConfig, {"alpha": 1e300}, r"alpha 1e\+300 and lr 0.0001 give gamma 1.0e\+300"),
    (SimulationConfig, {"draws": 64, "relative_error": 0.1}, "relative_error 0.1 .* draws"),
    (RateGrid, {"ranks": (2, 8)}, "teacher_rank.* 4"),
    (RateGrid, {"model": ("linear", "mlp")}, "model .*linear mlp"),
    (ControlledGrid, {"methods": ("lora", "dora")}, "methods .*, got dora"),
    (ControlledGrid, {"methods": ("400",)}, "positive float .*, got 400.0"),
    (ControlledGrid, {"ranks": (2, 8)}, "teacher_rank.* 4"),
    (ClusterConfig, {"workers": 2, "address": "auto"}, "workers 2 .* address"),
    (Scoring, {"protocol": "harness", "template": "train"}, "template .*harness, got 'train'"),
]


def name_and_value(field: str, value: Any) -> str:
    """Return a pattern of the field's name and the value; of several, all, the wrong one or their number."""
    several = isinstance(value, tuple | dict)
    texts = [" ".join(map(str, value)), *map(str, value), str(len(value))] if several else [str(value)]
    name = field.removesuffix("s").replace("_", "[-_]")
    return rf"\b{name}s?\b.*(?<![\w.-])({'|'.join(map(re.escape, texts))})(?!\w|\.\d)"


ROWS = [
    (config, {field: value}, name_and_value(field, value))
    for config, table in INVALID.items()
    for field, values in table.items()
    for value in values
] + COMBINATIONS


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("config", "settings", "message"), ROWS, ids=[f"{config.__name__} {' '.join(names)}" for config, names, _ in ROWS]
)
def test_invalid_values_are_refused_by_name(config, settings, message) -> None:
    with pytest.raises(InputError, match=message):
        config(**REQUIRED.get(config, {}) | settings)


@pytest.mark.parametrize("config", INVALID)
def test_every_field_with_a_range_is_tested(config) -> None:
    assert set(ranges._ranges(config)) <= set(INVALID[config])
