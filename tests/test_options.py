"""Every option of the commands that measure and train has its default, and a test in which another value changes it.

The options are those of the dataclasses. An option that is new, or that has another default, fails here until it is
listed with the test of its effect.
"""

import ast
import inspect
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest

from rora_theory.advice.adapter_config import PAPER_TARGETS
from rora_theory.lab.data.records import DataConfig
from rora_theory.lab.finetune import FinetuneConfig
from rora_theory.lab.finetune.distributed import ProcessConfig
from rora_theory.lab.finetune.outputs import OutputConfig
from rora_theory.measure.rank_check.rules import CheckConfig
from rora_theory.measure.regimes.module_regime import RegimeConfig
from sims.common.record_batches import BatchConfig, PairConfig
from sims.coordinate_check import CoordinateCheckOptions
from sims.finetune import FinetuneOptions
from sims.regime import RegimeOptions
from sims.tune import TuneOptions

TESTS = Path(__file__).parent
REQUIRED = MISSING

REACHES = "sims/test_options.py::test_an_option_reaches_the_library"
CONTENT = "sims/test_identities.py::test_a_run_is_identified_by_the_content_of_its_inputs"
BRANCH = "sims/test_identities.py::test_a_moved_branch_is_another_run"
OWN_DATA = "sims/test_own_data.py::test_measurements_on_chats"
REGIME = "measure/regimes/test_options.py::test_a_setting_changes_what_it_should"
RULES = "measure/rank_check/test_rules.py::test_a_setting_changes_what_it_should_alone"
SETTINGS = "lab/finetune/test_settings.py::test_settings_of_the_"
ADAPTER, RECORDS, OPTIMIZER, LOOP = (SETTINGS + what for what in ("adapter", "data", "optimizer", "loop"))
JAX_OPTIONS = "lab/finetune/test_distributed.py::test_options_are_those_of_jax"

MODEL = {"model": ("smollm2-135m", CONTENT), "revision": (None, BRANCH), "out": (None, REACHES)}
OPTIONS: dict[type, dict[str, tuple[Any, str]]] = {
    TuneOptions: {
        "model": (None, "sims/test_tune.py::test_the_configuration_alone_is_read"),
        "revision": (None, "sims/test_tune.py::test_the_configuration_alone_is_read"),
        "parameters": (None, "sims/test_tune.py::test_a_number_of_parameters_stands_for_a_model"),
        **{
            name: (default, REACHES)
            for name, default in {
                "rank": 128, "alpha": 16.0, "rule": "lora", "steps": 2000, "batch_size": 16, "schedule": "cosine",
                "family": None, "targets": PAPER_TARGETS,
            }.items()
        },
    },
    RegimeOptions: MODEL
    | {
        "data": (REQUIRED, CONTENT),
        "adapter": (None, "sims/test_regime.py::test_a_trained_adapter_is_measured_in_the_weights"),
        "template": (None, REACHES), "dtype": ("float32", REACHES), "targets": (PAPER_TARGETS, REACHES),
        "layers": (None, REACHES),
    },
    PairConfig: {
        "batch_size": (8, REACHES), "held_out": (8, REACHES), "cutoff": (256, REACHES), "loss_on": ("all", REACHES),
    },
    RegimeConfig: {
        "ranks": ((1, 2, 4, 8, 16, 32, 64, 128, 256), REGIME), "rules": (("lora", "rora", 0.25), REGIME),
        "optimizers": (("sgd", "adam"), REGIME), "inits": (("kaiming_uniform", "gaussian"), REGIME),
        "alpha": (16.0, REGIME), "lr": (3e-4, REGIME), "tokens": (64, REGIME), "mask": (True, REGIME),
        "seed": (0, REGIME), "exact": (False, REGIME), "rows": (4096, "sims/test_regime.py::test_verdict"),
    },
    CoordinateCheckOptions: MODEL | {"data": (REQUIRED, CONTENT), "targets": (PAPER_TARGETS, REACHES)},
    CheckConfig: {
        name: (default, RULES)
        for name, default in {
            "ranks": (2, 8, 32, 128), "rules": ("lora", "rora"), "optimizers": ("adamw", "sgd"),
            "inits": ("kaiming_uniform",), "controls": True, "steps": (1, 2, 5, 10), "seeds": (0, 1, 2, 3),
            "gamma": 2.0, "reference_rank": 8, "adam_lr": 1e-4, "sgd_lr": 0.01, "band": 0.1,
        }.items()
    },
    BatchConfig: {
        "batches": ("fixed", REACHES), "batch_size": (4, REACHES), "held_out": (64, REACHES), "cutoff": (64, REACHES),
        "template": (None, REACHES),
    },
    DataConfig: {
        "format": (None, "lab/data/test_formats.py::test_a_named_format_is_read_where_several_would_match"),
        "fields": ({}, "lab/data/test_formats.py::test_renamed_fields"),
        "chat_template": (None, "lab/finetune/test_training_data.py::test_a_record_set_has_its_chat_template"),
        "chat_date": (None, "lab/data/test_formats.py::test_the_chat_template_sees_noon_of_the_date"),
        "show": (0, OWN_DATA),
    },
    FinetuneOptions: MODEL
    | {
        "data": (REQUIRED, CONTENT), "fsdp": (False, REACHES),
        "log_to": (None, "sims/test_finetune.py::test_the_curves_in_tensorboard_are_those_of_the_run"),
    },
    FinetuneConfig: {
        **{
            name: (default, ADAPTER)
            for name, default in {
                "method": "lora", "rank": 32, "rule": "rora", "alpha": 64.0, "targets": None, "rank_pattern": {},
                "alpha_pattern": {}, "init": "kaiming_uniform", "dropout": 0.05, "virtual_tokens": 10,
                "bottleneck": 256,
            }.items()
        },
        **{
            name: (default, RECORDS)
            for name, default in {
                "template": None, "cutoff": 256, "loss_on": "all", "held_out": 120, "widths": 6, "batch_size": 16,
                "epochs": 3, "steps": None, "seed": 42,
            }.items()
        },
        **{
            name: (default, OPTIMIZER)
            for name, default in {
                "lr": None, "warmup": 100, "schedule": "linear", "weight_decay": 0.0, "clip": 1.0,
                "betas": (0.9, 0.999), "epsilon": 1e-8,
            }.items()
        },
        "lr_multiplier_A": (1.0, "lab/finetune/test_settings.py::test_the_rate_of_lora_A"),
        "accumulation": (1, LOOP), "remat": (False, LOOP), "evaluate_every": (80, LOOP), "checkpoint_every": (80, LOOP),
        "dtype": ("float32", REACHES), "quantization": ("none", REACHES),
    },
    OutputConfig: {
        "keep": ("best", "sims/test_finetune.py::test_the_best_or_the_last_adapter_is_written"),
        "merge": (False, "sims/test_finetune.py::test_a_run_writes_metrics_adapter_and_merged_model"),
        "serve_as": ("peft", "sims/test_finetune.py::test_serve_as_decides_which_entries_the_adapter_has"),
    },
    ProcessConfig: {
        "distributed": (False, JAX_OPTIONS),
        "coordinator": (None, JAX_OPTIONS),
        "num_processes": (None, JAX_OPTIONS),
        "process_id": (None, JAX_OPTIONS),
    },
}  # fmt: skip
"""Default of each option, and the test in which another value changes the result."""

PARTS = {"reading", "batches", "measured", "judged", "check", "records", "training", "output", "processes"}
"""Fields that hold the options of another class."""


@pytest.mark.parametrize("config", OPTIONS, ids=lambda config: config.__name__)
def test_every_option_is_listed_with_its_default(config) -> None:
    defaults = {}
    for field in fields(config):
        if field.name not in PARTS or not hasattr(field.default_factory, "__dataclass_fields__"):
            defaults[field.name] = field.default if field.default_factory is MISSING else field.default_factory()
    assert defaults == {name: default for name, (default, _) in OPTIONS[config].items()}


def test_the_test_of_every_option_exists() -> None:
    """A test of several options that is parametrised by them names each in its table."""
    sources = {test.partition("::")[0] for table in OPTIONS.values() for _, test in table.values()}
    functions = {
        source: {node.name for node in ast.walk(ast.parse((TESTS / source).read_text())) if hasattr(node, "name")}
        for source in sources
    }
    missing = [
        (config.__name__, name, test)
        for config, table in OPTIONS.items()
        for name, (_, test) in table.items()
        if test.partition("::")[2] not in functions[test.partition("::")[0]]
    ]
    assert not missing
    unnamed = [
        (config.__name__, name)
        for config, table in OPTIONS.items()
        for name, (_, test) in table.items()
        if test in (REACHES, REGIME, RULES, RECORDS, ADAPTER, OPTIMIZER, LOOP)
        and f'"{name}"' not in (TESTS / test.partition("::")[0]).read_text()
        and f"{name}=" not in (TESTS / test.partition("::")[0]).read_text()
    ]
    assert not unnamed


def test_every_argument_of_the_measurements_has_its_default() -> None:
    measure = pytest.importorskip("rora_theory.measure")
    pytest.importorskip("peft", reason="the bridge: the extra torch")
    for function, expected in (
        (
            measure.regime,
            {
                "target_modules": None, "loss": None, "config": None, "layers": None, "adapters": "off",
                "progress": False,
            },
        ),
        (
            measure.coordinate_check,
            {
                "ranks": (2, 8, 32, 128), "held_out": None, "learning_rate": 1e-4, "make_optimizer": None,
                "loss": None, "steps": (1, 2, 5, 10), "seeds": 3, "band": 0.1, "seed": 0, "progress": False,
            },
        ),
        (measure.tune, {"schedule": "cosine", "family": None}),
    ):  # fmt: skip
        arguments = inspect.signature(function).parameters
        assert {name: item.default for name, item in arguments.items() if item.default is not item.empty} == expected
