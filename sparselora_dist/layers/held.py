"""Masks that are kept for some optimizer steps (``interval`` > 1)."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

Key = tuple[int, str]
"""(layer, group)."""


class HeldMasks:
    """The masks of each (layer, group), and when they were chosen.

    Args:
        interval: for how many steps a mask is kept; 1 keeps none.
    """

    def __init__(self, interval: int) -> None:
        self.interval = interval
        self._held: dict[Key, tuple[int, Tensor]] = {}

    def find(self, keys: Iterable[Key], now: int) -> dict[Key, Tensor] | None:
        """The masks of ``keys``, if all are still kept at step ``now``."""
        found = {key: self._held.get(key) for key in keys}
        kept = {key: entry[1] for key, entry in found.items() if entry is not None and self._kept(entry[0], now)}
        return kept if len(kept) == len(found) else None

    def put(self, masks: dict[Key, Tensor], now: int, over: bool = True) -> None:
        """Keep ``masks`` from step ``now`` on; those that are still kept stay unless ``over``."""
        if self.interval > 1:
            for key, mask in masks.items():
                if over or key not in self._held or not self._kept(self._held[key][0], now):
                    self._held[key] = now, mask

    def _kept(self, since: int, now: int) -> bool:
        return self.interval > 1 and 0 <= now - since < self.interval

    def state_dict(self) -> dict[str, Tensor]:
        """``{"layer.group.step": mask}``."""
        return {f"{layer}.{group}.{step}": mask for (layer, group), (step, mask) in self._held.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._held.clear()
        for key, mask in state.items():
            layer, group, step = key.split(".")
            self._held[int(layer), group] = (int(step), mask)
