"""Configuration of a fine-tuning run, with the published protocol as defaults."""

from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, Literal, get_args

from rora_theory.defaults import TRAIN_BATCH_SIZE
from rora_theory.errors import InputError
from rora_theory.lab.adapters import AdapterConfig, BottleneckConfig, FullConfig, LoraConfig, PrefixConfig
from rora_theory.lab.adapters import bottleneck as bottlenecks
from rora_theory.lab.adapters.lora import PAPER_TARGETS
from rora_theory.lab.data.formats import TrainTemplate
from rora_theory.lab.llama.model import REMAT_CHOICES
from rora_theory.lab.llama.quantised import QUANTIZATIONS, Quantization
from rora_theory.laws.random.seeds import check_seed
from rora_theory.optimizers import Schedule
from rora_theory.scaling import Rule, check_between, check_choice
from rora_theory.validation.ranges import AtLeastTwo, Count, Natural, NotNegative, Positive, check_ranges

Method = Literal["lora", "dora", "prefix", "series", "parallel", "full"]
LossOn = Literal["all", "answer"]
BaseDtype = Literal["float32", "bfloat16"]

LEARNING_RATES = {"lora": 3e-4, "dora": 2e-4, "prefix": 3e-2, "series": 3e-4, "parallel": 3e-4, "full": 2e-5}
"""Peak learning rates of the published LLaMA-7B runs, by method. RoRA's is not recorded, so it uses LoRA's. Full
fine-tuning is not among those runs; its rate is that of Stanford Alpaca's recorded command (Taori et al. 2023)."""

TARGETS: dict[str, tuple[str, ...]] = {
    "lora": PAPER_TARGETS,
    "dora": PAPER_TARGETS,
    "prefix": (),
    "full": PAPER_TARGETS,
    **bottlenecks.TARGETS,
}
"""Adapted modules in the published runs, by method."""

_LOW_RANK, _BOTTLENECK = ("lora", "dora"), ("series", "parallel")
_ONLY: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("rule", "rank", "alpha", "rank_pattern", "alpha_pattern", "init", "lr_multiplier_A"), _LOW_RANK),
    "bottleneck": _BOTTLENECK,
    "targets": (*_LOW_RANK, *_BOTTLENECK, "full"),
    "virtual_tokens": ("prefix",),
}
"""Settings that apply to some methods only, with those methods."""


@dataclass(frozen=True)
class FinetuneConfig:
    """Settings that determine a run's numbers, apart from the model and the data.

    The defaults are the protocol of LLM-Adapters and of DoRA's `commonsense_reasoning`, on which the paper builds, with
    the paper's scaling rule. Where that protocol records nothing for RoRA, the default is LoRA's value. Settings that
    are real numbers are converted to float.

    Raises:
      InputError: If a value is out of range, or a setting does not apply to the method. Settings that depend on the
        model are checked when the adapter is initialised.
    """

    method: Method = "lora"
    """Fine-tuning method: lora; dora (adds a trained magnitude per row; works with any rule); prefix (trained keys and
    values); series or parallel (bottlenecks in sequence with a module or in parallel to it); full (the weights of the
    targets)"""
    rank: Count = 32
    """Rank of the adapter, the number of rows of lora_A; not used by prefix, series, parallel and full"""
    rule: Rule = "rora"
    """Scaling rule, alpha / rank**kappa: lora (kappa 1), rora or rslora (kappa 1/2), or a number for kappa"""
    alpha: float = 64.0
    """Numerator of the scaling factor"""
    targets: tuple[str, ...] | None = None
    """Adapted modules, or all-linear; by default those of the published scripts: q, k, v, up and down_proj (lora, dora,
    full), up and gate_proj (series), up and down_proj (parallel)"""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Ranks of modules that match a regular expression, in place of rank"""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Alphas of modules that match a regular expression, in place of alpha"""
    init: Literal["kaiming_uniform", "gaussian"] = "kaiming_uniform"
    """Initialisation of lora_A; lora_B is initialised to zero"""
    dropout: float = 0.05
    """Dropout probability of the adapter's input; not used by prefix and full. LLM-Adapters runs series and parallel
    adapters with 0"""
    virtual_tokens: int = 10
    """Number of trained keys and values per layer of a prefix"""
    bottleneck: int = 256
    """Width of a series or parallel adapter"""

    template: TrainTemplate | None = None
    """Prompt template: train (the published one, byte for byte), clean, chat (the model's chat template) or plain (the
    prompt followed directly by the response); by default train for alpaca, chat for chats, and
    plain for other formats"""
    cutoff: AtLeastTwo = 256
    """Maximum length of an example in tokens; longer examples are truncated at the end"""
    loss_on: LossOn = "all"
    """Tokens in the loss: all (the protocol), or answer (in chats, every turn of the assistant)"""
    held_out: Natural = 120
    """Number of records held out for the validation loss; 0 disables validation"""
    widths: Count = 6
    """Maximum number of padded batch lengths; the step is compiled once for each"""

    batch_size: Count = TRAIN_BATCH_SIZE
    """Number of records per step"""
    accumulation: Count = 1
    """Number of microbatches that a batch is processed in, to save memory"""
    epochs: Count = 3
    """Number of passes over the training records"""
    steps: Count | None = None
    """Number of steps after which training and the learning-rate schedule end, in place of epochs"""
    lr: Positive | None = None
    """Peak learning rate; by default that of the protocol: 3e-4, for dora 2e-4, for prefix 3e-2, for full 2e-5"""
    warmup: Natural = 100
    """Number of steps of linear warm-up from 0"""
    schedule: Schedule = "linear"
    """Learning rate after the warm-up: linear (the protocol) or cosine decay to 0 after the last step, or constant"""
    lr_multiplier_A: Positive = 1.0
    """Learning rate of lora_A divided by lr; values below 1 are LoRA+, which trains lora_B at a higher rate"""
    weight_decay: NotNegative = 0.0
    """Decoupled weight decay of AdamW"""
    clip: float = 1.0
    """Maximum norm of the gradient; inf disables clipping"""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of AdamW's two moments"""
    epsilon: Positive = 1e-8
    """Epsilon of AdamW"""

    dtype: BaseDtype = "float32"
    """Dtype of the frozen base weights; trained parameters and optimizer state are always float32"""
    quantization: Quantization = "none"
    """Storage of the frozen base's linear weights, to save memory as QLoRA does: none, or GGUF's block formats q8_0,
    q4_0 or q4_1 (8.5, 4.5 or 5 bits per weight), dequantized to dtype one layer at a time; a .gguf file of the same
    type keeps its blocks"""
    remat: bool | Literal["mlp"] = False
    """Rematerialisation in the backward pass, to save memory: False (elementwise operations only), mlp (also the
    feed-forward module) or True (everything)"""

    evaluate_every: Count = 80
    """Number of steps between two validations"""
    checkpoint_every: Count = 80
    """Number of steps between two checkpoints; every validation also saves one"""
    seed: int = 42
    """Seed of the validation split, the order of the records, the initialisation and the dropout"""

    def __post_init__(self) -> None:
        # Settings with a fixed list of choices.
        for name, kind in (("method", Method), ("loss_on", LossOn), ("schedule", Schedule), ("dtype", BaseDtype)):
            check_choice(name, getattr(self, name), get_args(kind))
        if self.template is not None:
            check_choice("template", self.template, get_args(TrainTemplate))
        check_choice("quantization", self.quantization, QUANTIZATIONS)
        if self.method == "full" and self.quantization != "none":
            raise InputError(f"quantization must be none with method full, got {self.quantization!r}")
        check_choice("remat", self.remat, REMAT_CHOICES)
        # A setting that the method does not use must keep its default.
        for name, methods in _ONLY.items():
            if self.method not in methods and getattr(self, name) != _default(name):
                raise InputError(
                    f"{name} has no effect with method {self.method}, got {getattr(self, name)!r}. Remove it, or use "
                    f"method {' or '.join(methods)}."
                )
        # Construct the adapter's configuration once, because it validates the adapter's fields.
        self.adapter()
        check_ranges(self)
        check_seed("seed", self.seed)
        if self.batch_size % self.accumulation:
            raise InputError(f"accumulation must divide batch_size, {self.batch_size}, got {self.accumulation}")
        check_between("clip", self.clip, 0, closed="right")
        for beta in self.betas:
            check_between("betas", beta, 0, 1, closed="left")
        # Runs are compared by their settings as text: without the conversion, alpha 4 and alpha 4.0 would differ.
        # The dataclass is frozen, so the converted values are set through object.
        for name in _REAL:
            if not isinstance(value := getattr(self, name), (str, type(None))):
                object.__setattr__(self, name, float(value))
        object.__setattr__(self, "betas", tuple(map(float, self.betas)))
        alphas = {pattern: float(alpha) for pattern, alpha in self.alpha_pattern.items()}
        object.__setattr__(self, "alpha_pattern", alphas)

    @property
    def peak_learning_rate(self) -> float:
        """Learning rate at the end of the warm-up."""
        return LEARNING_RATES[self.method] if self.lr is None else self.lr

    @property
    def modules(self) -> tuple[str, ...]:
        """Adapted modules: ``targets``, or the method's default."""
        return TARGETS[self.method] if self.targets is None else self.targets

    def settings(self) -> dict[str, Any]:
        """Return the settings that determine the run by name, without those of other methods.

        Patterns are lists of entries, because the first match wins and JSON objects have no order.
        """
        settings = asdict(self) | {"targets": self.modules}
        for name in ("rank_pattern", "alpha_pattern"):
            if settings[name]:
                settings[name] = [list(entry) for entry in settings[name].items()]
        return {name: value for name, value in settings.items() if self.method in _ONLY.get(name, (self.method,))}

    def with_method(self, method: Method, **changes: Any) -> "FinetuneConfig":
        """Return the configuration with another method.

        Args:
          method: New method. Settings that it does not use return to their defaults.
          **changes: Settings to replace.

        Raises:
          InputError: If a value is out of range.
        """
        unused = {name: _default(name) for name, methods in _ONLY.items() if method not in methods}
        return FinetuneConfig(**vars(self) | unused | {"method": method} | changes)

    def adapter(self) -> AdapterConfig:
        """Return the configuration of the method's adapter."""
        if self.method == "prefix":
            return PrefixConfig(self.virtual_tokens)
        if self.method == "full":
            return FullConfig(self.modules)
        if self.method in ("series", "parallel"):
            return BottleneckConfig(
                self.method,
                width=self.bottleneck,
                target_modules=self.modules,
                dropout=self.dropout,
            )
        return LoraConfig(
            rank=self.rank,
            alpha=self.alpha,
            rule=self.rule,
            target_modules=self.modules,
            dropout=self.dropout,
            init=self.init,
            rank_pattern=self.rank_pattern,
            alpha_pattern=self.alpha_pattern,
            use_dora=self.method == "dora",
        )


_REAL = ("alpha", "dropout", "lr", "lr_multiplier_A", "weight_decay", "clip", "epsilon", "rule")
"""Settings that are converted to float unless they are None or text."""


def _default(name: str) -> Any:
    setting = next(entry for entry in fields(FinetuneConfig) if entry.name == name)
    return setting.default if setting.default_factory is MISSING else setting.default_factory()
