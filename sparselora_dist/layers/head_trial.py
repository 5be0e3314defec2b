"""What a model makes of its LM head's output before the loss reads it: nothing, a factor, a softcap.

That is not read from a list of families but tried: the family's own ``forward`` runs once, with a decoder that gives three
rows of four numbers and a head of a few words, and what its loss function is given is compared with what the head gave.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init
from transformers.modeling_outputs import MoeModelOutputWithPast

SMALL = 2.0**-30
"""Sums of losses pass the family's own function times this, where that function is no more than its slope at zero."""


@dataclass(frozen=True, slots=True)
class Shaping:
    """Logits as the loss reads them: ``scale * head(x)``, with a cap ``cap * tanh(scale * head(x) / cap)``."""

    scale: float = 1.0
    cap: float | None = None

    @property
    def plain(self) -> bool:
        return self.scale == 1.0 and self.cap is None

    @property
    def unit(self) -> float:
        """What a number that :meth:`reduced` was given has become behind the family's own function, as a factor."""
        return 1.0 if self.plain else SMALL * self.scale

    def __call__(self, logits: Tensor) -> Tensor:
        logits = logits * self.scale
        return logits if self.cap is None else self.cap * (logits / self.cap).tanh()

    def reduced(self, value: Tensor) -> Tensor:
        """A loss or a score in the place of logits, so small that the function only multiplies it: :attr:`unit` in all."""
        return value if self.plain else value * SMALL


class _Seen(Exception):
    """The loss function has been called."""


class _Decoder(nn.Module):
    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states

    def forward(self, *args: Any, **kwargs: Any) -> MoeModelOutputWithPast:
        return MoeModelOutputWithPast(last_hidden_state=self.states)


@torch.no_grad()
def logits_shaping(model: Any) -> Shaping | None:
    """Of a causal LM whose forward asks ``loss_function``; ``None`` where it is none of these."""
    head, decoder = model.get_output_embeddings(), getattr(model, model.base_model_prefix, None)
    names = {id(child): name for name, child in model.named_children()}
    if decoder is None or id(head) not in names or id(decoder) not in names or decoder is model:
        return None
    generator = torch.Generator().manual_seed(0)
    small = skip_init(nn.Linear, 4, 6, bias=False, dtype=torch.float64)
    small.weight.copy_(8 * torch.randn(6, 4, generator=generator, dtype=torch.float64))
    states = torch.randn(1, 3, 4, generator=generator, dtype=torch.float64)
    given: list[Tensor] = []
    read: list[Tensor] = []
    small.register_forward_hook(lambda module, args, output: given.append(output))

    def loss(logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        read.append(logits)
        raise _Seen

    stand_in = object.__new__(type(model))
    stand_in.__dict__ = {**model.__dict__, "_modules": {**model._modules}, "_loss_function": loss}
    stand_in._modules[names[id(head)]] = small
    stand_in._modules[names[id(decoder)]] = _Decoder(states)
    try:
        type(model).forward(stand_in, input_ids=torch.zeros(1, 3, dtype=torch.long), labels=torch.zeros(1, 3).long())
    except _Seen:
        return _fit(given[0].double(), read[0].double())
    except Exception:
        return None
    return None


def _fit(given: Tensor, read: Tensor) -> Shaping | None:
    if given.shape != read.shape:
        return None
    slope = float((given * read).sum() / (given * given).sum())
    for shaping in (Shaping(), Shaping(scale=slope), Shaping(cap=_cap(given, read))):
        if torch.allclose(shaping(given), read, rtol=1e-6, atol=0.0):
            return shaping
    return None


def _cap(given: Tensor, read: Tensor) -> float:
    """By the largest logit: ``cap * tanh(x / cap)`` grows with the cap, from the cap itself to ``x``."""
    x, y = float(given.abs().max()), float(read.abs().max())
    low, high = y, 1e6
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if middle * math.tanh(x / middle) < y else (low, middle)
    return high
