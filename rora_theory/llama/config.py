"""Configuration of a LLaMA, Mistral, Qwen2, Qwen3 or Gemma 3 model, read from Hugging Face's `config.json`.

Every key of the file is used, known to change nothing, or refused by name.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rora_theory.errors import InputError, shown
from rora_theory.llama.families import FAMILIES, Family

MODULES = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
"""The linear modules of one layer, by the names Hugging Face and PEFT give them."""

OTHER_MODELS = "any PyTorch model can be measured with rora_theory.measure.torch"
"""What a refusal of another architecture names as the way out."""


@dataclass(frozen=True)
class LinearRope:
    """Every rotary frequency divided by ``factor``, a number of 1 or more."""

    factor: float

    def __post_init__(self) -> None:
        _factor(self.factor)


@dataclass(frozen=True)
class Llama3Rope:
    """Long rotary wavelengths stretched by ``factor``, short ones kept, as in LLaMA 3.1.

    Frequencies whose wavelength exceeds ``original_max_position_embeddings / low_freq_factor`` are divided by
    ``factor``, those whose wavelength is below ``original_max_position_embeddings / high_freq_factor`` are
    kept, and those between interpolated.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        _factor(self.factor)
        _positive("rope low_freq_factor", self.low_freq_factor, float)
        _positive("rope high_freq_factor", self.high_freq_factor, float)
        _positive("rope original_max_position_embeddings", self.original_max_position_embeddings, int)
        if self.low_freq_factor >= self.high_freq_factor:
            raise InputError(
                f"rope low_freq_factor is {self.low_freq_factor!r}; accepted is a number below "
                f"high_freq_factor {self.high_freq_factor!r}"
            )


RopeScaling = LinearRope | Llama3Rope
ROPE_KINDS: dict[str, type[LinearRope | Llama3Rope]] = {"linear": LinearRope, "llama3": Llama3Rope}
"""Hugging Face's names of the scalings; ``"default"`` is none."""


@dataclass(frozen=True)
class LlamaConfig:
    """What determines the function a model computes, apart from its weights. Hashable: static in jit.

    One model serves LLaMA and the families that differ from it in few points, see `families`. In a layer with a
    sliding window, a query attends to the last ``sliding_window`` positions, its own included.

    Attributes:
      vocab_size, hidden_size, intermediate_size, num_hidden_layers: sizes.
      num_attention_heads, num_key_value_heads, head_dim: the query heads are a multiple of the key/value
        heads, and ``head_dim`` is even. ``hidden_size`` need not be ``num_attention_heads * head_dim``.
      rms_norm_eps: added to the mean square.
      rope_theta: base of the rotary frequencies.
      rope_scaling: None is the default rotary embedding.
      tie_word_embeddings: the output projection is the embedding matrix.
      attention_bias, mlp_bias: whether q, k, v, o (gate, up, down) have biases. False for Qwen2, see `has_bias`.
      max_position_embeddings: longest sequence; longer ones are refused.
      bos_token_id, eos_token_id, pad_token_id: for tokenization and generation; several end tokens are a
        tuple.
      model_type: one of `families.FAMILIES`, and what the model is saved as.
      sliding_window: how many positions a query attends to; None is all. Not for LLaMA.
      full_attention_layers: Indices, in increasing order, of the layers without sliding window in a model that has
        one. The first ones for Qwen, any for Gemma 3.
      query_pre_attn_scalar: Number by whose square root attention scores are divided; None is ``head_dim``. For
        Gemma 3.
      rope_local_base_freq: Base of the rotary frequencies in layers with a sliding window, which have no
        ``rope_scaling``; None is ``rope_theta`` in all layers. For Gemma 3.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    max_position_embeddings: int = 2048
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    pad_token_id: int | None = None
    model_type: str = "llama"
    sliding_window: int | None = None
    full_attention_layers: tuple[int, ...] = ()
    query_pre_attn_scalar: int | None = None
    rope_local_base_freq: float | None = None

    def __post_init__(self) -> None:
        _check(vars(self))

    @property
    def family(self) -> Family:
        """Properties that all models of this ``model_type`` share."""
        return FAMILIES[self.model_type]

    def module_shape(self, name: str) -> tuple[int, int]:
        """Shape ``(p_out, p_in)`` of a module's weight.

        Raises:
          InputError: ``name`` is not one of `MODULES`.
        """
        queries, keys = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        shapes = {
            "self_attn.q_proj": (queries, self.hidden_size),
            "self_attn.k_proj": (keys, self.hidden_size),
            "self_attn.v_proj": (keys, self.hidden_size),
            "self_attn.o_proj": (self.hidden_size, queries),
            "mlp.gate_proj": (self.intermediate_size, self.hidden_size),
            "mlp.up_proj": (self.intermediate_size, self.hidden_size),
            "mlp.down_proj": (self.hidden_size, self.intermediate_size),
        }
        if name not in shapes:
            raise InputError(f"module is {name!r}; accepted are {', '.join(MODULES)}")
        return shapes[name]

    def has_bias(self, name: str) -> bool:
        """Whether a module has a bias vector of length ``p_out``."""
        if self.family.has_qkv_bias:
            return name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        return self.attention_bias if name.startswith("self_attn.") else self.mlp_bias

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "LlamaConfig":
        """The configuration of a Hugging Face ``config.json``, in the older or the newer key names.

        The rotary embedding is read from ``rope_theta`` and ``rope_scaling`` or from ``rope_parameters``;
        both may be there if they agree. Keys that do not touch the function computed (precision on disk,
        initialisation, library versions, habits of generation, nulls) are passed over; those that someone may
        have meant are named by `ignored_keys`. Every other key must be one this model implements.

        Raises:
          InputError: a key that is unknown, or known with an unsupported value; a missing size; another
          architecture.
        """
        if not isinstance(hf, Mapping):
            raise InputError(f"config is {type(hf).__name__}; accepted is a JSON object")
        found = {key: value for key, value in hf.items() if key in _KEYS or not _says_nothing(key, value)}
        try:
            model_type = _model_type(found.pop("model_type", "llama"))
        except InputError as error:
            raise InputError(f"config: {error}") from None
        family = FAMILIES[model_type]
        for key, values in _ONLY.items():
            accepted = (family.activation, *values) if key in ("hidden_act", "hidden_activation") else values
            if key in found and (value := found.pop(key)) not in accepted:
                raise InputError(f"config: {key} is {shown(value)}; accepted is {' or '.join(map(repr, accepted))}")
        missing = [name for name in _REQUIRED if found.get(name) is None]
        if missing:
            raise InputError(
                f"config: {', '.join(missing)} missing; accepted is the config.json of a model of type {model_type}"
            )
        for name in _REQUIRED:
            _positive(f"config: {name}", found[name], int)
        check_layers("config: num_hidden_layers", found["num_hidden_layers"])  # before layers are listed
        for name in _NULL_IS_DEFAULT:
            if found.get(name, ...) is None:
                del found[name]
        found = {**family.defaults, **found}
        window, full = _window(found, family)
        local_theta = _local_rope(found, family)
        theta, scaling = _rope(found, family)
        heads, hidden = found["num_attention_heads"], found["hidden_size"]
        head_dim = found.pop("head_dim", None)
        if head_dim is None:
            if hidden % heads:
                raise InputError(f"config: hidden_size is {hidden}; accepted is a multiple of {heads} attention heads")
            head_dim = hidden // heads
        unknown = sorted(set(found) - _KEYS)
        if unknown:
            key, value = unknown[0], found[unknown[0]]
            key = key if key.isidentifier() and len(key) < 80 else shown(key)
            raise InputError(f"config: {key} is {shown(value)}; no such field is supported")
        kv_heads = found.pop("num_key_value_heads", None)
        eos = found.pop("eos_token_id", 2)
        fields = {
            **{field.name: field.default for field in dataclasses.fields(cls)},
            **found,
            "num_key_value_heads": heads if kv_heads is None else kv_heads,
            "head_dim": head_dim,
            "rope_theta": theta,
            "rope_scaling": scaling,
            "eos_token_id": tuple(eos) if isinstance(eos, list) else eos,
            "model_type": model_type,
            "sliding_window": window,
            "full_attention_layers": full,
            "rope_local_base_freq": local_theta,
        }
        try:
            _check(fields)
        except InputError as error:
            raise InputError(f"config: {error}") from None
        return cls(**fields)

    def to_hf(self) -> dict[str, Any]:
        """The ``config.json`` that transformers, old or new, reads back to the same function.

        ``LlamaConfig.from_hf(config.to_hf()) == config``.
        """
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        scaling = plain.pop("rope_scaling")
        full = plain.pop("full_attention_layers")
        for name in _NOT_ALL_HAVE:
            if name not in self.family.fields:
                del plain[name]
        if self.family.full_layers == "first":
            plain |= {"max_window_layers": len(full), "use_sliding_window": self.sliding_window is not None}
        elif self.family.full_layers == "any":
            has_window = [self.sliding_window is not None and i not in full for i in range(self.num_hidden_layers)]
            plain["layer_types"] = [_SLIDING if windowed else _FULL for windowed in has_window]
        if isinstance(plain["eos_token_id"], tuple):
            plain["eos_token_id"] = list(plain["eos_token_id"])
        rope: dict[str, Any] = {"rope_type": "default"}
        if self.rope_scaling is not None:
            kind = "linear" if isinstance(self.rope_scaling, LinearRope) else "llama3"
            rope = {"rope_type": kind, **dataclasses.asdict(self.rope_scaling)}
        parameters: dict[str, Any] = {"rope_theta": self.rope_theta, **rope}
        if self.rope_local_base_freq is not None:
            local = {"rope_theta": self.rope_local_base_freq, "rope_type": "default"}
            parameters = {_FULL: parameters, _SLIDING: local}
        return {
            "architectures": [self.family.architecture],
            "hidden_act": self.family.activation,
            **({"hidden_activation": self.family.activation} if self.family.activation != "silu" else {}),
            **plain,
            "rope_scaling": None if scaling is None else dict(rope),
            "rope_parameters": parameters,
        }


_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_NULL_IS_DEFAULT = (
    "rms_norm_eps",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "max_position_embeddings",
)

_NOT_ALL_HAVE = {
    "attention_bias": False,
    "mlp_bias": False,
    "sliding_window": None,
    "query_pre_attn_scalar": None,
    "rope_local_base_freq": None,
}
"""Fields that not all families have, and their values in a family without them."""

_KEYS = {field.name for field in dataclasses.fields(LlamaConfig)} - {"full_attention_layers"}
"""Keys of `config.json` that become fields under their own names."""

_MOST_LAYERS = 10_000  # every layer's tensors are named before any is looked for
_LARGEST = 2**31 - 1  # sizes and ids are int32 on the device
_SMALLEST_FLOAT, _LARGEST_FLOAT = 1e-37, 1e37  # float32 holds what lies between, and a tenth and ten times it

# What says nothing about the function computed: bookkeeping and initialisation, as every saved model has it,
_PASSED_OVER = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _attn_implementation_internal _commit_hash _name_or_path
    architectures attn_implementation base_model_pp_plan base_model_tp_plan cache_implementation
    chunk_size_feed_forward dtype finetuning_task gradient_checkpointing id2label initializer_range
    is_composition is_llama_config keys_to_ignore_at_inference label2id max_sequence_length num_labels
    output_attentions output_hidden_states
    problem_type return_dict tf_legacy_loss tokenizer_class torch_dtype torchscript transformers.js_config
    transformers_version use_bfloat16 use_cache use_return_dict
    """.split()  # noqa: SIM905
)
# and habits of generation and of tokenization, which whoever wrote them may expect to be followed.
_HABITS = frozenset(
    """
    bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    exponential_decay_length_penalty length_penalty max_length max_new_tokens min_length no_repeat_ngram_size
    num_beam_groups num_beams num_return_sequences output_scores prefix remove_invalid_values repetition_penalty
    return_dict_in_generate suppress_tokens task_specific_params temperature top_k top_p typical_p
    unsloth_fixed
    """.split()  # noqa: SIM905
)
# Keys with one meaning this model implements; any other value is refused by name.
_ONLY: dict[str, tuple[Any, ...]] = {
    "pretraining_tp": (1, None),
    "attention_dropout": (0, None),
    "rope_interleaved": (False, None),
    "is_decoder": (False, True),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({},),
    "use_mrope": (False, None),
    "partial_rotary_factor": (1, None),
    "embd_pdrop": (0, None),
    "resid_pdrop": (0, None),
    "hidden_dropout": (0, None),
    "cross_attention_hidden_size": (None,),
    "quantization_config": (None,),
    "auto_map": (None,),  # another program, which may compute anything
    "hidden_act": (),  # and the family's activation
    "hidden_activation": (None,),  # and the family's activation
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "use_bidirectional_attention": (False, None),
}


def ignored_keys(hf: Mapping[str, Any]) -> tuple[str, ...]:
    """The keys of a `config.json` that `LlamaConfig.from_hf` passes over though someone may have meant them.

    Examples:
      >>> ignored_keys({"hidden_size": 64, "dtype": "float32", "temperature": 0.7, "unsloth_version": "2024.9"})
      ('temperature', 'unsloth_version')
    """
    return tuple(
        sorted(
            key
            for key, value in hf.items()
            if key not in _KEYS and key not in _PASSED_OVER and key not in _ONLY and _says_nothing(key, value)
        )
    )


def _says_nothing(key: str, value: Any) -> bool:
    """Whether a key that is no field of `LlamaConfig` leaves the function computed as it is, whatever its value."""
    if key in _PASSED_OVER or key in _HABITS:
        return True
    # Private notes of a library, versions of libraries, ids for other purposes than those this model has.
    private = key.startswith("_") or key.endswith(("_version", "_token_id"))
    return private or (value is None and key not in _ONLY and key not in _TAKEN_APART)


_FULL, _SLIDING = "full_attention", "sliding_attention"
_TAKEN_APART = (  # keys that are no fields, but become some
    "rope_parameters",
    "layer_types",
    "use_sliding_window",
    "max_window_layers",
    "sliding_window_pattern",
)


def _model_type(value: Any) -> str:
    """The value, a key of `FAMILIES`."""
    if not isinstance(value, str) or value not in FAMILIES:
        raise InputError(f"model_type is {shown(value)}; accepted are {', '.join(FAMILIES)}; {OTHER_MODELS}")
    return value


def _window(found: dict[str, Any], family: Family) -> tuple[int | None, tuple[int, ...]]:
    """Remove the keys of the sliding window from ``found``.

    Returns:
      Length of the window, or None if no layer has one; indices of the layers without window if others have one.
    """
    window, used = found.pop("sliding_window", None), found.pop("use_sliding_window", None)
    kinds, layers = found.pop("layer_types", None), found["num_hidden_layers"]

    # Whether there is a window: Qwen has a switch beside the length, elsewhere the length decides.
    accepted = (True, False, None) if family.full_layers == "first" else (window is not None, None)
    if not any(used is one for one in accepted):
        raise InputError(f"config: use_sliding_window is {shown(used)}; accepted is {' or '.join(map(repr, accepted))}")
    if family.full_layers == "first" and not used:
        window = None
    if window is not None:
        _positive("config: sliding_window", window, int)

    # The layers without window: all, or those of Qwen's count or Gemma's period, or those that layer_types lists.
    count = found.pop("max_window_layers", None) or 0
    period = found.pop("sliding_window_pattern") if family.full_layers == "any" else layers + 1
    _count("config: max_window_layers", count)
    _positive("config: sliding_window_pattern", period, int)
    full = [*range(layers)] if window is None else [*range(min(count, layers)), *range(period - 1, layers, period)]
    if full and window is not None and family.full_layers == "none":
        raise InputError(f"config: max_window_layers is {count}; accepted for {family.architecture} is 0")
    if isinstance(kinds, list) and window is not None and family.full_layers != "none":
        full = [layer for layer, kind in enumerate(kinds) if kind == _FULL]
        full = full if family.full_layers == "any" else [*range(len(full))]
    if kinds is not None and kinds != [_FULL if layer in full else _SLIDING for layer in range(layers)]:
        order = "in any order" if family.full_layers == "any" else f"{_FULL!r} first"
        one = f"{_FULL!r}" if window is None else f"{_FULL!r} or {_SLIDING!r}, {order},"
        raise InputError(f"config: layer_types is {shown(kinds)}; accepted is {one} for each of {layers} layers")
    return (window, tuple(full)) if len(full) < layers else (None, ())


def _local_rope(found: dict[str, Any], family: Family) -> float | None:
    """Remove the rotary keys of layers with a sliding window from ``found``; leave those of the others, ungrouped.

    Returns:
      Base of the rotary frequencies of layers with a sliding window; None for families with one base.
    """
    if "rope_local_base_freq" not in family.fields:
        return found.pop("rope_local_base_freq", None)
    base, groups = found.pop("rope_local_base_freq", None), found.get("rope_parameters")
    if groups is None:
        return base
    if not isinstance(groups, Mapping) or not set(groups) <= {_FULL, _SLIDING}:
        raise InputError(f"config: rope_parameters is {shown(groups)}; accepted is an object of {_FULL}, {_SLIDING}")
    found["rope_parameters"], local = groups.get(_FULL), groups.get(_SLIDING)
    if local is None:
        return base
    if not isinstance(local, Mapping):
        raise InputError(f"config: rope_parameters of {_SLIDING} is {shown(local)}; accepted is an object or null")
    theta, scaling = _rope_object(f"rope_parameters of {_SLIDING}", dict(local))
    if scaling is not None:
        raise InputError(f"config: rope_parameters of {_SLIDING} has a scaling; accepted is type 'default'")
    return base if theta is None else theta


def _rope(found: dict[str, Any], family: Family) -> tuple[float, RopeScaling | None]:
    """Take the rotary keys out of ``found``: base and scaling."""
    theta = found.pop("rope_theta", None)
    readings = []
    for source in ("rope_scaling", "rope_parameters"):
        given = found.pop(source, None)
        if given is None:
            continue
        if not isinstance(given, Mapping):
            raise InputError(f"config: {source} is {shown(given)}; accepted is an object or null")
        readings.append((source, *_rope_object(source, dict(given))))
    thetas = [theta, *(reading[1] for reading in readings)]
    stated = [value for value in thetas if value is not None]
    for value in stated:
        _positive("config: rope_theta", value, float)
    if len(set(stated)) > 1:
        raise InputError(f"config: rope_theta is {shown(stated)}; accepted is one number")
    scalings = {reading[2] for reading in readings}
    if len(scalings) > 1:
        raise InputError("config: rope_scaling and rope_parameters disagree; accepted is one of them, or both alike")
    return (float(stated[0]) if stated else family.rope_theta), (scalings.pop() if scalings else None)


def _rope_object(source: str, given: dict[str, Any]) -> tuple[float | None, RopeScaling | None]:
    """Base (or None) and scaling of one ``rope_scaling`` or ``rope_parameters`` object."""
    theta = given.pop("rope_theta", None)
    kinds = [kind for kind in (given.pop("rope_type", None), given.pop("type", None)) if kind is not None]
    kind = kinds[0] if kinds else "default"
    if kinds[1:] not in ([], [kind]):
        raise InputError(f"config: {source} has types {shown(kinds[0])} and {shown(kinds[1])}; accepted is one")
    if given.get("partial_rotary_factor") == 1:
        del given["partial_rotary_factor"]
    if kind not in ("default", *ROPE_KINDS):
        raise InputError(f"config: {source} type is {shown(kind)}; accepted are default, {', '.join(ROPE_KINDS)}")
    fields = [] if kind == "default" else [field.name for field in dataclasses.fields(ROPE_KINDS[kind])]
    unknown = sorted(set(given) - set(fields))
    if unknown:
        raise InputError(
            f"config: {source} has {unknown[0]} {shown(given[unknown[0]])}; "
            f"type {kind} takes {', '.join(fields) or 'nothing else'}"
        )
    missing = [name for name in fields if given.get(name) is None]
    if missing:
        raise InputError(f"config: {source} of type {kind} lacks {', '.join(missing)}")
    try:
        return theta, None if kind == "default" else ROPE_KINDS[kind](**given)
    except InputError as error:
        raise InputError(f"config: {source}: {error}") from None


def _check(fields: Mapping[str, Any]) -> None:
    """Refuse values of a `LlamaConfig` that are of the wrong type, out of range, or contradict one another."""
    for name in (*_SIZES, "max_position_embeddings"):
        _positive(name, fields[name], int)
    check_layers("num_hidden_layers", fields["num_hidden_layers"])
    for name in ("rms_norm_eps", "rope_theta"):
        _positive(name, fields[name], float)
    for name in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
        if not isinstance(fields[name], bool):
            raise InputError(f"{name} is {shown(fields[name])}; accepted is true or false")
    model_type = _model_type(fields["model_type"])
    family = FAMILIES[model_type]
    for name, without in _NOT_ALL_HAVE.items():
        if name not in family.fields and fields[name] != without:
            raise InputError(f"{name} is {shown(fields[name])}; accepted for model_type {model_type} is {without}")
    if fields["sliding_window"] is not None:
        _positive("sliding_window", fields["sliding_window"], int)
    if "query_pre_attn_scalar" in family.fields:
        _positive("query_pre_attn_scalar", fields["query_pre_attn_scalar"], int)
    if "rope_local_base_freq" in family.fields:
        _positive("rope_local_base_freq", fields["rope_local_base_freq"], float)
    _check_full_layers(fields["full_attention_layers"], fields, family)
    heads, kv_heads = fields["num_attention_heads"], fields["num_key_value_heads"]
    if heads % kv_heads:
        raise InputError(f"num_key_value_heads is {kv_heads}; accepted is a divisor of num_attention_heads {heads}")
    if fields["head_dim"] % 2:
        raise InputError(f"head_dim is {fields['head_dim']}; accepted is an even number (the rotary pairs)")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = fields[name]
        for token in value if name == "eos_token_id" and isinstance(value, tuple) else (value,):
            if token is not None and (isinstance(token, bool) or not isinstance(token, int) or token > _LARGEST):
                raise InputError(f"{name} is {shown(value)}; accepted is an integer up to {_LARGEST}, or null")


def check_layers(name: str, layers: int) -> None:
    """Raise `InputError` for more layers than are listed one by one."""
    if layers > _MOST_LAYERS:
        raise InputError(f"{name} is {layers}; accepted is at most {_MOST_LAYERS}")


def _check_full_layers(full: Any, fields: Mapping[str, Any], family: Family) -> None:
    """Refuse layers without sliding window that the family or the model does not have."""
    layers, what = fields["num_hidden_layers"], f"full_attention_layers is {shown(full)}"
    if not isinstance(full, tuple) or not all(type(layer) is int and 0 <= layer < layers for layer in full):
        raise InputError(f"{what}; accepted is a tuple of integers from 0 to {layers - 1}")
    if list(full) != sorted(set(full)) or len(full) == layers:
        raise InputError(f"{what}; accepted are some of {layers} layers, in increasing order")
    if full and fields["sliding_window"] is None:
        raise InputError(f"{what}; accepted without a sliding_window is ()")
    if full and (family.full_layers == "none" or (family.full_layers == "first" and full != tuple(range(len(full))))):
        accepted = "()" if family.full_layers == "none" else "the first layers"
        raise InputError(f"{what}; accepted for {family.architecture} is {accepted}")


def _factor(value: Any) -> None:
    if not _is_number(value) or not 1 <= value <= _LARGEST_FLOAT:
        raise InputError(f"rope factor is {shown(value)}; accepted is a number from 1 to {_LARGEST_FLOAT:g}")


def _is_number(value: Any) -> bool:
    # An integer may have hundreds of digits; math.isfinite would make it a float, and fail.
    return (isinstance(value, int) and not isinstance(value, bool)) or (
        isinstance(value, float) and math.isfinite(value)
    )


def _count(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise InputError(f"{name} is {shown(value)}; accepted is an integer of 0 or more")


def _positive(name: str, value: Any, kind: type) -> None:
    """Refuse what is not a number (an integer, for ``int``) above 0 that the device's 32 bits hold."""
    least, most = (1, _LARGEST) if kind is int else (_SMALLEST_FLOAT, _LARGEST_FLOAT)
    if not _is_number(value) or not least <= value <= most or (kind is int and not isinstance(value, int)):
        what = "an integer of 1 or more" if kind is int else "a finite number above 0"
        limit = f", up to {most}" if _is_number(value) and value > most else ""
        raise InputError(f"{name} is {shown(value)}; accepted is {what}{limit}")
