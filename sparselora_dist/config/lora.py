"""The ``lora`` section: PEFT's ``LoraConfig`` names, passed on as they are."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from .parse import ConfigError, coerce, refuse_code, require, show, unknown_key

if TYPE_CHECKING:
    from peft import LoraConfig

__all__ = ["LoraSection"]

_DEFAULTS: dict[str, Any] = {
    "task_type": "CAUSAL_LM",
    "r": 16,
    "lora_alpha": 32,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
}
_VARIANT = (
    "it changes the adapter's forward, which the sparse layers compute themselves: plain LoRA only; remove the key"
)
_IMPORT = "it names a module to import, and a config holds values only; remove the key"
# Options that are refused when they are set to anything but false or null, with the reason.
_REFUSED = {
    "use_dora": "DoRA rescales by the norm of the full weight, which a sparse layer does not compute: use plain LoRA",
    "use_qalora": _VARIANT,
    "use_bdlora": _VARIANT,
    "arrow_config": _VARIANT,
    "kasa_config": _VARIANT,
    "monteclora_config": _VARIANT,
    "velora_config": _VARIANT,
    "alora_invocation_tokens": _VARIANT,
    "layer_replication": "it changes the number of layers under the sparsity ranges; remove the key",
    "trainable_token_indices": "it trains rows of an embedding that is sharded as it is loaded: use modules_to_save",
    "target_parameters": "it adapts bare parameters, and frozen matrices are stored in parts: use target_modules",
    "auto_mapping": _IMPORT,
    "megatron_config": _IMPORT,
    "megatron_core": _IMPORT,
    "inference_mode": "it freezes the adapter, so that nothing trains; remove the key",
}
# These start from a rewritten base weight, so that the saved adapter would not fit the plain base model.
_INIT_ALLOWED = (True, False, "gaussian", "orthogonal")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraSection:
    """PEFT's options by their own names, with defaults where they are silent."""

    PATH: ClassVar[str] = "lora"

    values: dict[str, Any] = field(default_factory=dict)
    """``LoraConfig`` keyword arguments, defaults filled in (r 16, lora_alpha 32, q/k/v/o, CAUSAL_LM)."""

    def __post_init__(self) -> None:
        refuse_code(self.values, self.PATH)
        given = coerce(dict[str, Any], self.values, self.PATH)
        object.__setattr__(self, "values", {**copy.deepcopy(_DEFAULTS), **given})
        self._check_names()
        self._check_values()

    def _check_names(self) -> None:
        import peft

        known = [item.name for item in dataclasses.fields(peft.LoraConfig)]
        for key, value in self.values.items():
            at = f"{self.PATH}.{key}"
            if key in _REFUSED and value not in (None, False):
                raise ConfigError(f"'{at}' is refused ({show(value)}): {_REFUSED[key]}")
            if key not in known and key not in _REFUSED:
                raise unknown_key(self.PATH, key, (name for name in known if name not in _REFUSED))

    def _check_values(self) -> None:
        values, at = self.values, self.PATH
        require(_is(int, values["r"]) and values["r"] >= 1, f"{at}.r", values["r"], "integers from 1")
        alpha, dropout = values["lora_alpha"], values.get("lora_dropout", 0.0)
        require(_is((int, float), alpha) and alpha > 0, f"{at}.lora_alpha", alpha, "numbers above 0")
        require(_is((int, float), dropout) and 0 <= dropout < 1, f"{at}.lora_dropout", dropout, "numbers in [0, 1)")
        require(values["task_type"] == "CAUSAL_LM", f"{at}.task_type", values["task_type"], '"CAUSAL_LM"')
        require(values.get("peft_type", "LORA") == "LORA", f"{at}.peft_type", values.get("peft_type"), '"LORA"')
        bias = values.get("bias", "none")
        require(bias == "none", f"{at}.bias", bias, '"none": the biases of the base model are frozen with its weights')
        init = values.get("init_lora_weights", True)
        require(
            any(init == item and type(init) is type(item) for item in _INIT_ALLOWED),
            f"{at}.init_lora_weights",
            init,
            'true, false, "gaussian" or "orthogonal" (other starts rewrite or need more than the base weights)',
        )
        for key in ("target_modules", "exclude_modules", "modules_to_save"):
            names = values.get(key)
            texts = isinstance(names, list) and all(isinstance(name, str) and name for name in names)
            ok = texts and bool(names) if key == "target_modules" else texts or names is None
            if key != "modules_to_save":
                ok = ok or (isinstance(names, str) and bool(names))
            require(ok, f"{at}.{key}", names, 'a list of module names, such as ["q_proj", "v_proj"]')

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> LoraSection:
        require(isinstance(data, dict), cls.PATH, data, "an object with the names of PEFT's LoraConfig")
        return cls(values=data)

    def to_dict(self) -> dict[str, Any]:
        return copy.deepcopy(self.values)

    def build(self) -> LoraConfig:
        """The ``peft.LoraConfig``. What PEFT itself refuses is a ConfigError here."""
        import peft

        values = {key: value for key, value in copy.deepcopy(self.values).items() if key not in _REFUSED}
        try:
            return peft.LoraConfig(**values)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"'{self.PATH}' is refused by PEFT: {error}") from error


def _is(kind: type | tuple[type, ...], value: object) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)
