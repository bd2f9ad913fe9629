"""Configuration of a LLaMA, Mistral, Qwen2, Qwen3 or Gemma 3 model, read from Hugging Face's `config.json`.

Keys that transformers' class of the model does not read have no effect there, and are ignored here too. A key with a
value that would change the function computed in a way that `model` does not implement is refused by name.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rora_theory.errors import InputError, shown
from rora_theory.lab.llama.families import FAMILIES, Family
from rora_theory.scaling import check_between, check_integer

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

OTHER_MODELS = "any PyTorch model can be measured with rora_theory.measure"
"""Alternative that the error for an unsupported architecture names."""


@dataclass(frozen=True)
class LinearRope:
    """Rotary scaling that divides every frequency by the same factor.

    Attributes:
      factor: Divisor of the frequencies, at least 1.
    """

    factor: float

    def __post_init__(self) -> None:
        check_between("rope factor", self.factor, 1, closed="left")


@dataclass(frozen=True)
class Llama3Rope:
    """Rotary scaling of LLaMA 3.1, which stretches long wavelengths and keeps short ones.

    Frequencies whose wavelength exceeds ``original_max_position_embeddings / low_freq_factor`` are divided by
    ``factor``. Those whose wavelength is below ``original_max_position_embeddings / high_freq_factor`` are kept, and
    those between are interpolated.

    Attributes:
      factor: Divisor of the low frequencies, at least 1.
      low_freq_factor: Number of turns over the original context below which a frequency is divided.
      high_freq_factor: Number of turns over the original context above which a frequency is kept.
      original_max_position_embeddings: Context length of the model before it was extended.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        check_between("rope factor", self.factor, 1, closed="left")
        check_between("rope low_freq_factor", self.low_freq_factor, 0, closed="neither")
        check_between("rope high_freq_factor", self.high_freq_factor, 0, closed="neither")
        check_integer("rope original_max_position_embeddings", self.original_max_position_embeddings)
        if self.low_freq_factor >= self.high_freq_factor:
            raise InputError(
                f"rope low_freq_factor must be below high_freq_factor {self.high_freq_factor!r}, "
                f"got {self.low_freq_factor!r}"
            )


RopeScaling = LinearRope | Llama3Rope
ROPE_KINDS: dict[str, type[LinearRope | Llama3Rope]] = {"linear": LinearRope, "llama3": Llama3Rope}
"""Rotary scalings by Hugging Face's names; ``"default"`` means none."""


@dataclass(frozen=True)
class LlamaConfig:
    """Configuration of a model: with the weights, it determines the function computed. Hashable, static under jit.

    The class serves LLaMA and the families that differ from it in few points, see `families`. In a layer with a sliding
    window, a query attends to the last ``sliding_window`` positions, its own included.

    Attributes:
      vocab_size: Number of embeddings.
      hidden_size: Width of the residual stream; need not be ``num_attention_heads * head_dim``.
      intermediate_size: Number of feed-forward features.
      num_hidden_layers: Number of layers.
      num_attention_heads: Number of query heads, a multiple of ``num_key_value_heads``.
      num_key_value_heads: Number of key/value heads.
      head_dim: Width of a head, an even number.
      rms_norm_eps: Number added to the mean square in a norm.
      rope_theta: Base of the rotary frequencies.
      rope_scaling: Scaling of the rotary frequencies; None for the default rotary embedding.
      tie_word_embeddings: Whether the output projection is the embedding matrix.
      attention_bias: Whether q, k, v and o have biases. False for Qwen2, see `has_bias`.
      mlp_bias: Whether gate, up and down have biases.
      max_position_embeddings: Maximum length of a sequence; longer ones raise an error.
      bos_token_id: Id of the beginning of a text.
      eos_token_id: Id of the end of a text; a tuple if there are several.
      pad_token_id: Id of the padding.
      model_type: Family of the model, a key of `families.FAMILIES`; the model is saved under it.
      sliding_window: Number of positions a query attends to; None for all. Not for LLaMA.
      full_attention_layers: Indices, in increasing order, of the layers without a sliding window in a model that has
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
        _validate(vars(self))

    @property
    def family(self) -> Family:
        """Properties that all models of this ``model_type`` share."""
        return FAMILIES[self.model_type]

    def module_shape(self, name: str) -> tuple[int, int]:
        """Return the shape ``(p_out, p_in)`` of a module's weight.

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
            raise InputError(f"module must be one of {', '.join(MODULES)}, got {name!r}")
        return shapes[name]

    def has_bias(self, name: str) -> bool:
        """Return whether a module has a bias vector of length ``p_out``."""
        if self.family.has_qkv_bias:
            return name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        return self.attention_bias if name.startswith("self_attn.") else self.mlp_bias

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "LlamaConfig":
        """Parse a Hugging Face ``config.json``, with the older or the newer key names.

        The rotary embedding comes from ``rope_theta`` and ``rope_scaling`` or from ``rope_parameters``; both may be
        present if they agree. Other keys are ignored, as transformers does: precision on disk, initialisation, library
        versions, defaults of generation.

        Raises:
          InputError: A key has an unsupported value, a size is missing, or the architecture is not supported.
        """
        if not isinstance(hf, Mapping):
            raise InputError(f"config must be a JSON object, got {type(hf).__name__}")
        # Keys with an effect. Each of the following steps removes or converts some of them.
        values = {key: value for key, value in hf.items() if key in (*_KEYS, *_CONVERTED_KEYS, *_FIXED_VALUES)}

        # Family, and the keys that have one supported value.
        try:
            model_type = _supported_model_type(values.pop("model_type", "llama"))
        except InputError as error:
            raise InputError(f"config: {error}") from None
        family = FAMILIES[model_type]
        for key, supported in _FIXED_VALUES.items():
            if key in ("hidden_act", "hidden_activation"):
                supported = (family.activation, *supported)
            if key in values and (value := values.pop(key)) not in supported:
                raise InputError(f"config: {key} must be {' or '.join(map(repr, supported))}, got {shown(value)}")

        # Sizes, which the defaults depend on.
        missing = [name for name in _REQUIRED if values.get(name) is None]
        if missing:
            raise InputError(
                f"config: lacks {', '.join(missing)}. Use the config.json of a model of type {model_type}."
            )
        for name in _REQUIRED:
            check_integer(f"config: {name}", values[name])

        # Defaults of the family, the sliding window and the rotary embedding.
        for name in _NULL_IS_DEFAULT:
            if values.get(name, ...) is None:
                del values[name]
        values = {**family.defaults, **values}
        window, full = _pop_window(values, family)
        local_theta = _pop_local_theta(values, family)
        theta, scaling = _pop_rope(values, family)
        heads, hidden = values["num_attention_heads"], values["hidden_size"]
        # Width of a head: older files imply it by the hidden size.
        head_dim = values.pop("head_dim", None)
        if head_dim is None:
            if hidden % heads:
                raise InputError(f"config: hidden_size must be a multiple of {heads} attention heads, got {hidden}")
            head_dim = hidden // heads

        # Defaults of transformers: as many key/value heads as query heads, and 2 as the end token.
        kv_heads = values.pop("num_key_value_heads", None)
        eos = values.pop("eos_token_id", 2)
        fields = {
            **{field.name: field.default for field in dataclasses.fields(cls)},
            **values,
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
            _validate(fields)
        except InputError as error:
            raise InputError(f"config: {error}") from None
        return cls(**fields)

    def to_hf(self) -> dict[str, Any]:
        """Return the ``config.json`` of the model for old and new versions of transformers.

        ``LlamaConfig.from_hf(config.to_hf()) == config``.
        """
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        scaling = plain.pop("rope_scaling")
        full = plain.pop("full_attention_layers")
        # Fields that the family has, with the layers without window in the family's own keys.
        for name in _OPTIONAL_FIELDS:
            if name not in self.family.fields:
                del plain[name]
        if self.family.full_layers == "first":
            plain |= {"max_window_layers": len(full), "use_sliding_window": self.sliding_window is not None}
        elif self.family.full_layers == "any":
            has_window = [self.sliding_window is not None and i not in full for i in range(self.num_hidden_layers)]
            plain["layer_types"] = [_SLIDING if windowed else _FULL for windowed in has_window]
            # transformers needs a window even if no layer has one.
            if self.sliding_window is None:
                plain["sliding_window"] = self.family.defaults["sliding_window"]
        # JSON has lists, where the dataclass has hashable tuples.
        if isinstance(plain["eos_token_id"], tuple):
            plain["eos_token_id"] = list(plain["eos_token_id"])
        # The rotary embedding, in the older keys and in rope_parameters.
        rope: dict[str, Any] = {"rope_type": "default"}
        if self.rope_scaling is not None:
            kind = "linear" if isinstance(self.rope_scaling, LinearRope) else "llama3"
            rope = {"rope_type": kind, **dataclasses.asdict(self.rope_scaling)}
        parameters: dict[str, Any] = {"rope_theta": self.rope_theta, **rope}
        # Gemma 3 has a second base, for the layers with a window.
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

_OPTIONAL_FIELDS = {
    "attention_bias": False,
    "mlp_bias": False,
    "sliding_window": None,
    "query_pre_attn_scalar": None,
    "rope_local_base_freq": None,
}
"""Fields that not all families have, and their values in a family without them."""

_KEYS = {field.name for field in dataclasses.fields(LlamaConfig)} - {"full_attention_layers"}
"""Keys of `config.json` that become fields under their own names."""

_MAX_INT = 2**31 - 1  # sizes and ids are int32 on the device

# Keys with the values that this model implements; any other value raises an error.
_FIXED_VALUES: dict[str, tuple[Any, ...]] = {
    "attention_dropout": (0, None),
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
    "auto_map": (None,),  # names a program, which may compute anything
    "hidden_act": (),  # the family's activation is added
    "hidden_activation": (None,),  # the family's activation is added
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "use_bidirectional_attention": (False, None),
}

_FULL, _SLIDING = "full_attention", "sliding_attention"
_CONVERTED_KEYS = (  # keys that are not fields but determine some
    "rope_parameters",
    "layer_types",
    "use_sliding_window",
    "max_window_layers",
    "sliding_window_pattern",
)


def _supported_model_type(value: Any) -> str:
    if not isinstance(value, str) or value not in FAMILIES:
        raise InputError(f"model_type must be one of {', '.join(FAMILIES)}, got {shown(value)}; {OTHER_MODELS}")
    return value


def _pop_window(values: dict[str, Any], family: Family) -> tuple[int | None, tuple[int, ...]]:
    """Remove the keys of the sliding window from a configuration.

    Returns:
      Length of the window, or None if no layer has one; indices of the layers without window if others have one.
    """
    window, is_used = values.pop("sliding_window", None), values.pop("use_sliding_window", None)
    layer_types, layers = values.pop("layer_types", None), values["num_hidden_layers"]

    # Whether there is a window: Qwen has a switch beside the length, in other families the length decides.
    if family.full_layers == "first" and not is_used:
        window = None
    if window is not None:
        check_integer("config: sliding_window", window)

    # The layers without window: all if there is no window, otherwise by Qwen's count or Gemma's period.
    first_layers = values.pop("max_window_layers", None) or 0
    count = first_layers if family.full_layers == "first" else 0
    pattern = values.pop("sliding_window_pattern", None)
    period = pattern if family.full_layers == "any" else layers + 1
    check_integer("config: max_window_layers", count, minimum=0)
    check_integer("config: sliding_window_pattern", period)
    full = [*range(layers)] if window is None else [*range(min(count, layers)), *range(period - 1, layers, period)]

    # layer_types, if present, takes precedence where the family allows it, and must otherwise agree.
    if isinstance(layer_types, list) and window is not None and family.full_layers != "none":
        full = [layer for layer, layer_type in enumerate(layer_types) if layer_type == _FULL]
        full = full if family.full_layers == "any" else [*range(len(full))]
    if layer_types is not None and layer_types != [_FULL if layer in full else _SLIDING for layer in range(layers)]:
        order = "in any order" if family.full_layers == "any" else f"{_FULL!r} first"
        entries = f"{_FULL!r}" if window is None else f"{_FULL!r} or {_SLIDING!r}, {order},"
        raise InputError(
            f"config: layer_types must list {entries} for each of {layers} layers, got {shown(layer_types)}"
        )
    # A window that no layer has is none.
    return (window, tuple(full)) if len(full) < layers else (None, ())


def _pop_local_theta(values: dict[str, Any], family: Family) -> float | None:
    """Remove the rotary keys of the layers with a sliding window; leave those of the other layers, ungrouped.

    Returns:
      Base of the rotary frequencies of layers with a sliding window; None for families with one base.
    """
    if "rope_local_base_freq" not in family.fields:
        # With one base for all layers the key has no place: `_validate` rejects it unless it is null.
        return values.pop("rope_local_base_freq", None)
    base, groups = values.pop("rope_local_base_freq", None), values.get("rope_parameters")
    if groups is None:
        return base
    # Newer files group rope_parameters by the type of the layer.
    if not isinstance(groups, Mapping) or not set(groups) <= {_FULL, _SLIDING}:
        raise InputError(f"config: rope_parameters must be an object of {_FULL} and {_SLIDING}, got {shown(groups)}")
    values["rope_parameters"], local = groups.get(_FULL), groups.get(_SLIDING)
    if local is None:
        return base
    if not isinstance(local, Mapping):
        raise InputError(f"config: rope_parameters of {_SLIDING} must be an object or null, got {shown(local)}")
    theta, scaling = _parse_rope_object(f"rope_parameters of {_SLIDING}", dict(local))
    if scaling is not None:
        kind = shown(local.get("rope_type") or local.get("type"))
        raise InputError(f"config: rope_parameters of {_SLIDING} must have the type 'default', got a scaling of {kind}")
    return base if theta is None else theta


def _pop_rope(values: dict[str, Any], family: Family) -> tuple[float, RopeScaling | None]:
    """Remove the rotary keys from a configuration; return base and scaling."""
    # Base of the frequencies: by its own key, inside an object, or the family's default.
    theta = values.pop("rope_theta", None)
    # Older and newer files have different keys; a file may have both if they agree.
    parsed = []
    for source in ("rope_scaling", "rope_parameters"):
        rope = values.pop(source, None)
        if rope is None:
            continue
        if not isinstance(rope, Mapping):
            raise InputError(f"config: {source} must be an object or null, got {shown(rope)}")
        parsed.append(_parse_rope_object(source, dict(rope)))
    thetas = [value for value in (theta, *(base for base, _ in parsed)) if value is not None]
    # A file may repeat the base, but not contradict itself.
    for value in thetas:
        check_between("config: rope_theta", value, 0, closed="neither")
    if len(set(thetas)) > 1:
        raise InputError(f"config: rope_theta must be the same wherever it is given, got {shown(thetas)}")
    # Equal scalings collapse in the set: two that remain contradict each other.
    scalings = {scaling for _, scaling in parsed}
    if len(scalings) > 1:
        raise InputError("config: rope_scaling and rope_parameters must agree, or one of them be absent")
    return (float(thetas[0]) if thetas else family.rope_theta), (scalings.pop() if scalings else None)


def _parse_rope_object(source: str, rope: dict[str, Any]) -> tuple[float | None, RopeScaling | None]:
    """Parse the value of ``rope_scaling`` or ``rope_parameters``; return base (or None) and scaling."""
    theta = rope.pop("rope_theta", None)
    # The type, which older and newer files name differently.
    types = [value for value in (rope.pop("rope_type", None), rope.pop("type", None)) if value is not None]
    rope_type = types[0] if types else "default"
    if types[1:] not in ([], [rope_type]):
        raise InputError(f"config: {source} must have one type, got {shown(types[0])} and {shown(types[1])}")
    if rope_type not in ("default", *ROPE_KINDS):
        choices = ", ".join(ROPE_KINDS)
        raise InputError(f"config: {source} type must be default or one of {choices}, got {shown(rope_type)}")
    # The parameters of that type, no more and no fewer. A rotary factor of 1 rotates whole heads, as every model here.
    if rope.get("partial_rotary_factor") == 1:
        del rope["partial_rotary_factor"]
    names = [] if rope_type == "default" else [field.name for field in dataclasses.fields(ROPE_KINDS[rope_type])]
    unknown = sorted(set(rope) - set(names))
    if unknown:
        raise InputError(
            f"config: {source} of type {rope_type} must have {', '.join(names) or 'no further keys'}, "
            f"got {unknown[0]} {shown(rope[unknown[0]])}"
        )
    missing = [name for name in names if rope.get(name) is None]
    if missing:
        raise InputError(f"config: {source} of type {rope_type} lacks {', '.join(missing)}")
    # The dataclass of the scaling validates the values.
    try:
        return theta, None if rope_type == "default" else ROPE_KINDS[rope_type](**rope)
    except InputError as error:
        raise InputError(f"config: {source}: {error}") from None


def _validate(fields: Mapping[str, Any]) -> None:
    """Raise `InputError` for fields of a `LlamaConfig` that have a wrong type, are out of range or contradictory."""
    # Types and ranges.
    for name in (*_SIZES, "max_position_embeddings"):
        check_integer(name, fields[name])
    for name in ("rms_norm_eps", "rope_theta"):
        check_between(name, fields[name], 0, closed="neither")
    for name in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
        if not isinstance(fields[name], bool):
            raise InputError(f"{name} must be true or false, got {shown(fields[name])}")

    # Fields that only some families have.
    model_type = _supported_model_type(fields["model_type"])
    family = FAMILIES[model_type]
    for name, absent_value in _OPTIONAL_FIELDS.items():
        if name not in family.fields and fields[name] != absent_value:
            raise InputError(f"{name} must be {absent_value} for model_type {model_type}, got {shown(fields[name])}")
    if fields["sliding_window"] is not None:
        check_integer("sliding_window", fields["sliding_window"])
    if "query_pre_attn_scalar" in family.fields:
        check_integer("query_pre_attn_scalar", fields["query_pre_attn_scalar"])
    if "rope_local_base_freq" in family.fields:
        check_between("rope_local_base_freq", fields["rope_local_base_freq"], 0, closed="neither")
    _check_full_layers(fields["full_attention_layers"], fields, family)

    # Heads and special tokens.
    heads, kv_heads = fields["num_attention_heads"], fields["num_key_value_heads"]
    if heads % kv_heads:
        raise InputError(f"num_key_value_heads must divide num_attention_heads {heads}, got {kv_heads}")
    if fields["head_dim"] % 2:
        raise InputError(f"head_dim must be even, because rotary pairs are, got {fields['head_dim']}")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = fields[name]
        for token in value if name == "eos_token_id" and isinstance(value, tuple) else (value,):
            if token is not None and (isinstance(token, bool) or not isinstance(token, int) or token > _MAX_INT):
                raise InputError(f"{name} must be an integer of at most {_MAX_INT}, or null, got {shown(value)}")


def _check_full_layers(full: Any, fields: Mapping[str, Any], family: Family) -> None:
    """Raise `InputError` for layers without a sliding window that the model or the family cannot have."""
    layers, value = fields["num_hidden_layers"], shown(full)
    if not isinstance(full, tuple) or not all(type(layer) is int and 0 <= layer < layers for layer in full):
        raise InputError(f"full_attention_layers must be a tuple of integers from 0 to {layers - 1}, got {value}")
    if list(full) != sorted(set(full)) or len(full) == layers:
        raise InputError(f"full_attention_layers must be some of {layers} layers in increasing order, got {value}")
    if full and fields["sliding_window"] is None:
        raise InputError(f"full_attention_layers must be () without a sliding_window, got {value}")
    # The family decides whether, and where, layers without a window may be.
    if full and (family.full_layers == "none" or (family.full_layers == "first" and full != tuple(range(len(full))))):
        supported = "()" if family.full_layers == "none" else "the first layers"
        raise InputError(f"full_attention_layers must be {supported} for {family.architecture}, got {value}")
