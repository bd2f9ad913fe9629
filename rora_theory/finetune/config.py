"""What a fine-tuning run is made of: one frozen dataclass whose defaults are the published protocol."""

from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, Literal, get_args

from rora_theory.adapters import AdapterConfig, BottleneckConfig, FullConfig, LoraConfig, PrefixConfig
from rora_theory.adapters import bottleneck as bottlenecks
from rora_theory.adapters.bottleneck import NonLinearity
from rora_theory.adapters.lora import PAPER_TARGETS
from rora_theory.data.formats import TrainTemplate
from rora_theory.errors import InputError
from rora_theory.llama.model import REMATS
from rora_theory.llama.quantised import Quantization, check_quantization
from rora_theory.random.seeds import check_seed
from rora_theory.runs.reading import LATER, as_json
from rora_theory.scaling import Rule
from rora_theory.validation.ranges import Count, Natural, NotNegative, Plural, Positive, check_ranges

Method = Literal["lora", "dora", "prefix", "series", "parallel", "full"]
LossOn = Literal["all", "answer"]
BaseDtype = Literal["float32", "bfloat16"]
Schedule = Literal["linear", "cosine", "constant"]

LEARNING_RATES = {"lora": 3e-4, "dora": 2e-4, "prefix": 3e-2, "series": 3e-4, "parallel": 3e-4, "full": 2e-5}
"""Peak learning rates of the published LLaMA-7B runs, by method. RoRA's is not recorded: LoRA's stands for it. Full
fine-tuning is not among those runs: its rate is that of Stanford Alpaca's recorded command (Taori et al. 2023)."""

TARGETS: dict[str, tuple[str, ...]] = {
    "lora": PAPER_TARGETS,
    "dora": PAPER_TARGETS,
    "prefix": (),
    "full": PAPER_TARGETS,
    **bottlenecks.TARGETS,
}
"""Published modules, by method."""

_LOW_RANK, _BOTTLENECK = ("lora", "dora"), ("series", "parallel")
_ONLY: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("rule", "rank", "alpha", "rank_pattern", "alpha_pattern", "init", "lr_multiplier_A"), _LOW_RANK),
    **dict.fromkeys(("bottleneck", "non_linearity"), _BOTTLENECK),
    "targets": (*_LOW_RANK, *_BOTTLENECK, "full"),
    "virtual_tokens": ("prefix",),
}
"""Settings that not all methods have, and the methods that do."""


@dataclass(frozen=True)
class FinetuneConfig:
    """Everything that determines a run's numbers, apart from the model and the data.

    The defaults are the protocol of LLM-Adapters and DoRA's `commonsense_reasoning`, on which the paper
    builds, with the paper's scaling rule. Where that protocol records nothing for RoRA, LoRA's value stands.
    Integers and numbers of NumPy become floats where a setting is one.
    """

    method: Method = "lora"
    """lora, or dora: a trained magnitude a row beside the low-rank update; either goes with either rule. prefix:
    trained keys and values; series, parallel: bottlenecks in line with a module or beside it; full: the targets'
    own weights"""
    rule: Rule = "rora"
    """scaling alpha / rank**kappa: lora (kappa 1), rora (1/2; rslora is the same) or kappa itself"""
    rank: int = 32
    """rows of lora_A"""
    alpha: float = 64.0
    """strength of the adapter, before the rule divides it"""
    targets: tuple[str, ...] | None = None
    """adapted modules; none is the published scripts': q, k, v, up and down_proj (lora, dora, full), up and gate_proj
    (series), up and down_proj (parallel)"""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """rank of the modules a regular expression matches, where it differs"""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """alpha of the modules a regular expression matches, where it differs"""
    dropout: float = 0.05
    """dropout of the adapter's input; a prefix and full have none, LLM-Adapters' series and parallel adapters are run
    at 0"""
    init: Literal["kaiming_uniform", "gaussian"] = "kaiming_uniform"
    """initialisation of lora_A; lora_B begins at zero"""
    virtual_tokens: int = 10
    """keys and values a layer that a prefix has"""
    bottleneck: int = 256
    """width of a series or parallel adapter"""
    non_linearity: NonLinearity = "tanh"
    """function inside a series or parallel adapter"""

    template: TrainTemplate | None = None
    """prompt: train (published, to the byte), clean, chat (the model's chat template) or plain (the response at once
    behind the prompt); none is the data format's: train for alpaca, chat for chats and prompt-response, else plain"""
    cutoff: Plural = 256
    """longest example in tokens; a longer one keeps its start and loses its end"""
    loss_on: LossOn = "all"
    """tokens in the loss: all (the protocol), or the answer alone: of a chat every turn of the assistant's"""
    held_out: Natural = 120
    """records set aside for the validation loss; 0 is none"""
    widths: Count = 6
    """padded lengths that batches come in, each compiled once"""

    epochs: Count = 3
    """passes over the training records"""
    steps: Count | None = None
    """stop after so many steps; the schedule ends there too"""
    batch_size: Count = 16
    """records a step"""
    accumulation: Count = 1
    """parts a batch is worked in, one after another, to save memory"""
    lr: Positive | None = None
    """peak learning rate; none is the protocol's: 3e-4, for dora 2e-4, for prefix 3e-2, for full 2e-5"""
    warmup: Natural = 100
    """steps of linear warm-up from 0"""
    schedule: Schedule = "linear"
    """learning rate after the warm-up: linear (the protocol) or cosine decay to 0 after the last step, or constant"""
    lr_multiplier_A: Positive = field(default=1.0, metadata={LATER: True})
    """learning rate of lora_A divided by lr; below 1 it is LoRA+, which trains lora_B at a higher rate"""
    weight_decay: NotNegative = 0.0
    """AdamW's decoupled weight decay"""
    clip: float = 1.0
    """largest norm of the gradient; inf leaves it alone"""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the two moments"""
    epsilon: Positive = 1e-8
    """AdamW's epsilon"""

    evaluate_every: Count = 80
    """steps between two validation losses"""
    checkpoint_every: Count = 80
    """steps between two checkpoints; each validation makes one too"""
    seed: int = 42
    """seed of the validation split, the order, the initialisation and the dropout"""
    dtype: BaseDtype = "float32"
    """type of the frozen base weights; what is trained and the optimizer state are always float32"""
    quantization: Quantization = field(default="none", metadata={LATER: True})
    """how the frozen base's linear weights are held, to save memory as QLoRA does: none, or GGUF's blocks q8_0, q4_0 or
    q4_1 (8.5, 4.5, 5 bits a weight), made dense in dtype a layer at a time; a .gguf file of that type keeps its own"""
    remat: bool | Literal["mlp"] = False
    """made again in the backward pass, to save memory: False elementwise work, mlp the feed-forward too, True all"""

    def __post_init__(self) -> None:
        """Raise `InputError` for a value out of range. What depends on the model is checked when there is one."""
        for name, kind in (
            ("method", Method),
            ("loss_on", LossOn),
            ("schedule", Schedule),
        ):
            _check(name, getattr(self, name), get_args(kind), getattr(self, name) in get_args(kind))
        accepted = get_args(TrainTemplate)
        _check("template", self.template, accepted, self.template is None or self.template in accepted)
        _check("dtype", self.dtype, get_args(BaseDtype), self.dtype in get_args(BaseDtype))
        check_quantization(self.quantization)
        if self.method == "full" and self.quantization != "none":
            raise InputError(f"quantization is {self.quantization!r} with method full; accepted is none")
        _check("remat", self.remat, REMATS, self.remat in REMATS)
        for name, methods in _ONLY.items():
            if self.method not in methods and getattr(self, name) != _default(name):
                raise InputError(
                    f"{name} is {getattr(self, name)!r} with method {self.method}, which has none; accepted are "
                    f"methods {', '.join(methods)}"
                )
        self.adapter()
        check_ranges(self, str)
        check_seed(self.seed)
        if self.batch_size % self.accumulation:
            raise InputError(
                f"accumulation is {self.accumulation}; accepted is a divisor of batch_size, {self.batch_size}"
            )
        _check("clip", self.clip, "a number above 0", self.clip > 0)
        _check("betas", self.betas, "two numbers from 0 to below 1", all(0 <= beta < 1 for beta in self.betas))
        # 4 and 4.0 are one alpha, and what is kept of a run tells its numbers by how they are written.
        for name in _REAL:
            if not isinstance(value := getattr(self, name), (str, type(None))):
                object.__setattr__(self, name, float(value))
        object.__setattr__(self, "betas", tuple(map(float, self.betas)))
        alphas = {pattern: float(alpha) for pattern, alpha in self.alpha_pattern.items()}
        object.__setattr__(self, "alpha_pattern", alphas)

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate at the end of the warm-up."""
        return LEARNING_RATES[self.method] if self.lr is None else self.lr

    @property
    def modules(self) -> tuple[str, ...]:
        """The adapted modules: ``targets``, or the method's own."""
        return TARGETS[self.method] if self.targets is None else self.targets

    def settings(self) -> dict[str, Any]:
        """What determines the run, by name: without the settings of other methods.

        A pattern is a list of its entries, whose order decides which comes first; an object has none in JSON. What
        `as_json` leaves out is no entry.
        """
        kept = as_json(self)
        plain = {name: value for name, value in asdict(self).items() if name in kept} | {"targets": self.modules}
        for name in ("rank_pattern", "alpha_pattern"):
            if plain[name]:
                plain[name] = [list(entry) for entry in plain[name].items()]
        return {name: value for name, value in plain.items() if self.method in _ONLY.get(name, (self.method,))}

    def of_method(self, method: Method, **own: Any) -> "FinetuneConfig":
        """The run of another method with settings of its ``own``; what it has none of is as by default.

        Raises:
          InputError: a value out of range.
        """
        lacking = {name: _default(name) for name, methods in _ONLY.items() if method not in methods}
        return FinetuneConfig(**vars(self) | lacking | {"method": method} | own)

    def adapter(self) -> AdapterConfig:
        """The adapter's own configuration."""
        if self.method == "prefix":
            return PrefixConfig(self.virtual_tokens)
        if self.method == "full":
            return FullConfig(self.modules)
        if self.method in ("series", "parallel"):
            return BottleneckConfig(
                self.method,
                width=self.bottleneck,
                target_modules=self.modules,
                non_linearity=self.non_linearity,
                dropout=self.dropout,
            )
        return self.lora()

    def lora(self) -> LoraConfig:
        """The adapter's own configuration, of methods lora and dora."""
        if self.method not in _LOW_RANK:
            raise InputError(f"method is {self.method!r}; accepted are {', '.join(_LOW_RANK)}")
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
"""Settings that are real numbers, where they are numbers."""


def _default(name: str) -> Any:
    found = next(one for one in fields(FinetuneConfig) if one.name == name)
    return found.default if found.default_factory is MISSING else found.default_factory()


def _check(name: str, value: object, accepted: object, holds: bool) -> None:
    if not holds:
        text = ", ".join(map(str, accepted)) if isinstance(accepted, tuple) else accepted
        raise InputError(f"{name} is {value!r}; accepted is {text}")
