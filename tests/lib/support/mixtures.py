"""Tiny mixtures of experts with adapters on the experts' parameters, and their experts with channels left out."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from support.every_type import tiny_model

PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ATTENTION = ["q_proj", "v_proj"]


class NarrowExperts:
    """Takes the place of the experts' ``forward``: twice the family's own, once with the dropped channels at zero.

    With adapters on the parameters, PEFT makes the parameters that are seen here, updates added. Of a branch that is
    ``kept`` a dropped channel is dropped whole; of a ``dense`` one the frozen part alone.
    """

    def __init__(self, experts: Any, kept: Tensor, context: Tensor, lora_branch: str = "kept") -> None:
        self.module, self.family, self.context = experts.module, type(experts.module), context.flatten()[:, None]
        mask = torch.zeros(experts.count * experts.width)
        mask[kept] = 1
        self.down = experts.down_family(mask[:, None].expand(-1, experts.hidden))
        both = mask.view(experts.count, 1, -1).expand(-1, 2, -1).reshape(-1, 1)
        self.gate_up = experts.gate_up_family(both.expand(-1, experts.hidden))
        self.lora_branch = lora_branch

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        whole = {"gate_up_proj": self.module.gate_up_proj, "down_proj": self.module.down_proj}
        narrow = {**whole, "down_proj": whole["down_proj"] * self.down}
        if self.lora_branch == "dense":
            for name, mask in (("gate_up_proj", self.gate_up), ("down_proj", self.down)):
                frozen = self.module.parametrizations[name].original
                narrow[name] = whole[name] - frozen * (1 - mask)
        outputs = []
        for values in (narrow, whole):
            stand_in = self.family.__new__(self.family)
            own = {name: p for name, p in self.module._parameters.items() if name not in values}
            stand_in.__dict__ = {**self.module.__dict__, "_parameters": own, **values}
            outputs.append(self.family.forward(stand_in, x, *args, **kwargs))
        return torch.where(self.context, *outputs)


def mixture(
    model_type: str = "qwen3_moe",
    parameters: list[str] | None = None,
    targets: list[str] | None = None,
    layers: int = 4,
    **options: Any,
) -> PeftModel:
    """With LoRA on q and v, and on the experts' ``parameters``, by default both; B matrices are not zero."""
    base = tiny_model(model_type)
    base.model.layers, base.config.num_hidden_layers = base.model.layers[:layers], layers
    for name, value in options.items():
        setattr(base.config, name, value)
    torch.manual_seed(1)
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=ATTENTION if targets is None else targets,
        target_parameters=PARAMETERS if parameters is None else parameters,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return model.train()
