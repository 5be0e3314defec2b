"""The ``lora`` section: PEFT's ``LoraConfig`` names, passed on as they are, and what the adapter starts from."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import MinLen
from pydantic import ConfigDict, TypeAdapter, model_serializer, with_config
from typing_extensions import TypedDict

from .errors import ConfigError, require, show, unknown_key
from .limits import ALLOWED, AboveZero, BelowOne, Path, Positive, Says
from .model import CONFIG, Section, parse, section

if TYPE_CHECKING:
    from peft import LoraConfig

_DEFAULTS: dict[str, Any] = {
    "task_type": "CAUSAL_LM",
    "r": 16,
    "lora_alpha": 32,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
}
_START = "init_from"
LOFTQ = "loftq"
_VARIANT = (
    "it changes the adapter's forward, which the sparse layers compute themselves: plain LoRA only; remove the key"
)
_IMPORT = "it names a module to import, and a config holds values only; remove the key"
# Options that are refused when they are set to anything but false or null, with the reason.
_REFUSED = {
    "use_dora": "DoRA rescales by the norm of the full weight, which a sparse layer does not compute: use plain LoRA",
    **dict.fromkeys(("use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config"), _VARIANT),
    **dict.fromkeys(("velora_config", "alora_invocation_tokens"), _VARIANT),
    "layer_replication": "it changes the number of layers under the sparsity ranges; remove the key",
    "trainable_token_indices": "it trains rows of an embedding that is sharded as it is loaded: use modules_to_save",
    **dict.fromkeys(("auto_mapping", "megatron_config", "megatron_core"), _IMPORT),
    "inference_mode": "it freezes the adapter, so that nothing trains; remove the key",
}

_Name = Annotated[str, MinLen(1)]
_NAMES = Says('a list of module names, such as ["q_proj", "v_proj"]')
_PARAMETERS = Says('a list of parameters of routed experts, such as ["mlp.experts.gate_up_proj"]')
_BIAS = Says('"none": the biases of the base model are frozen with its weights')
# Other starts rewrite the base weight, so that the saved adapter would not fit the plain base model; LoftQ's weights are
# those of a quantised base, which is another one in any case.
_INIT = Says(
    'true, false, "gaussian", "orthogonal" or "loftq" (other starts rewrite or need more than the base weights)'
)


@with_config(ConfigDict(**CONFIG))
class LoftQValues(TypedDict, total=False):
    """PEFT's ``LoftQConfig``."""

    loftq_iter: Annotated[Positive, ALLOWED]
    """Rounds."""
    loftq_bits: Annotated[Positive, ALLOWED]


@with_config(ConfigDict(**{**CONFIG, "extra": "allow"}))
class LoraValues(TypedDict, total=False):
    """Those of PEFT's names that are checked here; PEFT itself checks the others."""

    r: Annotated[Positive, ALLOWED]
    lora_alpha: Annotated[Positive | AboveZero, ALLOWED, Says("numbers above 0")]
    lora_dropout: Annotated[BelowOne, ALLOWED]
    task_type: Annotated[Literal["CAUSAL_LM"], ALLOWED]
    peft_type: Annotated[Literal["LORA"], ALLOWED]
    bias: Annotated[Literal["none"], ALLOWED, _BIAS]
    init_lora_weights: Annotated[bool | Literal["gaussian", "orthogonal", "loftq"], ALLOWED, _INIT]
    loftq_config: LoftQValues
    target_modules: Annotated[Annotated[list[_Name], MinLen(1)] | _Name, ALLOWED, _NAMES]
    exclude_modules: Annotated[list[_Name] | _Name | None, ALLOWED, _NAMES]
    modules_to_save: Annotated[list[_Name] | None, ALLOWED, _NAMES]
    target_parameters: Annotated[list[_Name] | None, ALLOWED, _PARAMETERS]


@section
class LoraSection(Section):
    """PEFT's options by their own names, with defaults where they are silent."""

    PATH: ClassVar[str] = "lora"

    values: dict[str, Any] = field(default_factory=dict)
    """``LoraConfig`` keyword arguments, defaults filled in (r 16, lora_alpha 32, q/k/v/o, CAUSAL_LM).

    With ``init_from`` they are what the run says itself, until :meth:`completed` has filled in the adapter's.
    """

    init_from: Path | None = None
    """An adapter to start from: a folder that PEFT wrote, or a safetensors file. Not PEFT's; a resumed run reads on."""

    def __post_init__(self) -> None:
        known = [*_known(), _START]
        for key, value in self.values.items():
            if key in _REFUSED and value not in (None, False):
                raise ConfigError(f"'{self.PATH}.{key}' is refused ({show(value)}): {_REFUSED[key]}")
            if key not in known and key not in _REFUSED:
                raise unknown_key(self.PATH, key, known)
        defaults = {} if self.init_from else _DEFAULTS
        object.__setattr__(self, "values", parse(LoraValues, {**defaults, **self.values}, self.PATH))
        initial = self.values.get("init_lora_weights", True)
        if self.init_from and initial is not True:
            raise ConfigError(
                f"'{self.PATH}.init_lora_weights' is {show(initial)}, and '{self.PATH}.{_START}' is "
                f"{show(self.init_from)}: both say what the adapter starts from; remove one"
            )
        if initial == LOFTQ:
            self.values["loftq_config"] = {"loftq_iter": 1} | self.values.get("loftq_config", {})
            if self.values.get("target_parameters"):
                raise ConfigError(
                    f"'{self.PATH}.target_parameters' is {show(self.values['target_parameters'])} with "
                    f"'{self.PATH}.init_lora_weights' \"loftq\", which decomposes matrices, not banks of experts: remove one"
                )
        elif self.values.get("loftq_config"):
            raise ConfigError(
                f"'{self.PATH}.loftq_config' is {show(self.values['loftq_config'])}, but '{self.PATH}.init_lora_weights' is "
                f'{show(initial)}, not "loftq": remove it, or start with LoftQ'
            )

    @property
    def loftq_rounds(self) -> int:
        """Of LoftQ's alternation; 0 of an adapter that starts otherwise."""
        return self.values["loftq_config"]["loftq_iter"] if self.values.get("init_lora_weights") == LOFTQ else 0

    def check_bits(self, what: str, bits: int) -> None:
        """Raises ConfigError where a section that starts by LoftQ says other bits than those of the codes."""
        said = self.values["loftq_config"].get("loftq_bits", bits)
        if said != bits:
            raise ConfigError(
                f"'{self.PATH}.loftq_config.loftq_bits' is {said}, but {what} in {bits} bits: leave the first out"
            )

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> LoraSection:
        require(isinstance(data, dict), cls.PATH, data, "an object with the names of PEFT's LoraConfig")
        return cls(values={key: value for key, value in data.items() if key != _START}, init_from=data.get(_START))

    @model_serializer
    def to_dict(self) -> dict[str, Any]:
        return copy.deepcopy(self.values) | ({_START: self.init_from} if self.init_from else {})

    def completed(self, adapter: dict[str, Any]) -> LoraSection:
        """With what the run does not say itself taken from ``adapter``, PEFT's names again, and then from the defaults."""
        return LoraSection(values={**_DEFAULTS, **adapter, **self.values}, init_from=self.init_from)

    def is_default(self, key: str) -> bool:
        """Whether an option is what it is where nothing is said."""
        return key in _DEFAULTS and self.values[key] == _DEFAULTS[key]

    def started_at(self, folder: str) -> LoraSection:
        """The same adapter, begun at one in a folder instead of as LoftQ begins."""
        values = {key: value for key, value in self.values.items() if key not in ("init_lora_weights", "loftq_config")}
        return LoraSection(values=values, init_from=folder)

    @classmethod
    def __get_pydantic_json_schema__(cls, *_: Any) -> dict[str, Any]:
        """PEFT's names instead of ``values``."""
        schema = TypeAdapter(LoraValues).json_schema()
        schema["properties"]["loftq_config"] = schema.pop("$defs")[LoftQValues.__name__]
        names = {name: schema["properties"].get(name, {}) for name in _known()}
        for name, value in _DEFAULTS.items():
            names[name]["default"] = value
        words = "An adapter to start from: a folder that PEFT wrote, or a safetensors file. Not one of PEFT's names."
        names[_START] = {
            "anyOf": [{"type": "string", "minLength": 1}, {"type": "null"}], "default": None, "description": words
        }  # fmt: skip
        return schema | {"description": cls.__doc__, "properties": names, "additionalProperties": False}

    def build(self) -> LoraConfig:
        """The ``peft.LoraConfig``. What PEFT itself refuses is a ConfigError here.

        Also a section that starts from an adapter which nobody has read yet (:meth:`completed`).
        """
        import peft

        if missing := sorted(_DEFAULTS.keys() - self.values.keys()):
            raise ConfigError(
                f"'{self.PATH}.{_START}' is {show(self.init_from)}, not read yet: '{self.PATH}.{missing[0]}' is not known"
            )
        values = {key: value for key, value in copy.deepcopy(self.values).items() if key not in _REFUSED}
        if (
            self.loftq_rounds
        ):  # Ours: PEFT would decompose a matrix that it takes for whole, and quantise it its own way.
            values["init_lora_weights"] = True
            del values["loftq_config"]
        try:
            return peft.LoraConfig(**values)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"'{self.PATH}' is refused by PEFT: {error}") from error


def _known() -> list[str]:
    """PEFT's names, without those that are refused."""
    import peft

    return [item.name for item in dataclasses.fields(peft.LoraConfig) if item.name not in _REFUSED]
