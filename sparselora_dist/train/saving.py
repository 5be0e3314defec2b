"""Saving a run while it goes on, and continuing one: what a checkpoint holds is taken and put back here."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ..config.train import TrainSection
from ..engines import Engine
from ..engines.optimizers import EIGHT_BIT, under
from ..io.adapter import save_adapter, saved_names
from ..io.background import BackgroundWriter
from ..io.checkpoint import Checkpoint, RunState, save_checkpoint
from ..io.manifest import saving
from ..io.run_folder import note_checkpoint
from ..io.start_adapter import StartAdapter
from ..layers.context import SparseContext
from .rank_state import gather_rank_state, own_rank_state, set_rank_state
from .stopping import on_disk

log = logging.getLogger(__name__)
# A run that ends with an error lets a checkpoint that is half written become whole, for so many seconds.
_PATIENCE = 30.0


def start_from(start: StartAdapter, engine: Engine) -> None:
    """Give a prepared engine's masters the values of an adapter, in fp32 whatever the parameters are. A collective."""
    names = saved_names(engine.module, engine.trainable())
    engine.load_state({names[name]: value for name, value in start.tensors.items()}, {}, 0)


def start_at(parameters: dict[str, Tensor], engine: Engine) -> None:
    """The same of some parameters, by the model's own names; the others keep what they are."""
    engine.load_state(engine.full_parameters() | parameters, {}, 0)


class Saver:
    """Takes copies on all ranks, in the step; rank 0 writes them in the background.

    Args:
        train: names the folder, and says how many checkpoints are kept.
        engine: whose state is saved.
        context: the masks.
    """

    def __init__(self, train: TrainSection, engine: Engine, context: SparseContext) -> None:
        self.train, self.engine, self.context = train, engine, context
        self.folder = Path(train.output_dir)
        self.saved = -1
        """The step of the last checkpoint."""
        self._writer = BackgroundWriter(train.save_in_background)
        engine.heartbeat.before_end.append(self.close)
        engine.heartbeat.remedy = partial(on_disk, self.folder)

    @property
    def failed(self) -> bool:
        """Whether a checkpoint could not be written, on this rank."""
        return self._writer.failed

    def save(self, step: int, **state: Any) -> None:
        """Save ``checkpoint-<step>``; ``state`` completes :class:`RunState`. A collective.

        Raises:
            OSError: the one before could not be written.
        """
        engine = self.engine
        engine.heartbeat.at(f"saving of checkpoint-{step}")
        moments, optimizer_steps = engine.full_moments()
        parameters = engine.full_parameters()
        per_rank = gather_rank_state(engine, self.context)
        self.saved = step
        if not engine.is_main:
            return
        known = RunState(
            step=step,
            optimizer_steps=optimizer_steps,
            world_size=engine.ranks.world_size,
            engine=engine.config.engine.name,
            optim=engine.optim,
            **state,
        )
        self._writer.write(partial(self._write, Checkpoint(known, parameters, moments, per_rank)))

    def _write(self, checkpoint: Checkpoint) -> None:
        save_checkpoint(self.engine.module, checkpoint, self.folder, self.train.save_total_limit)
        note_checkpoint(self.folder, checkpoint.state.step)

    def save_adapter(self) -> None:
        """``adapter/`` as the parameters are now. A collective."""
        self.engine.heartbeat.at("saving of the adapter")
        parameters = self.engine.full_parameters()
        if self.engine.is_main:
            folder = self.folder / "adapter"
            with saving(folder, sum(tensor.nbytes for tensor in parameters.values())):
                save_adapter(self.engine.module, parameters, folder)

    def wait(self) -> None:
        """Until all is written.

        Raises:
            OSError: it could not be.
        """
        self._writer.wait()

    def close(self) -> None:
        """Let what is being written become whole; an error that nobody has seen yet is said."""
        self._writer.join(_PATIENCE)
        if self._writer.failed:
            try:
                self._writer.wait()
            except Exception as error:
                log.error("%s", error)

    def restore(self, resumed: Checkpoint) -> None:
        """Put back the parameters, the optimizer's state, the random states and the masks."""
        state = resumed.state
        names = saved_names(self.engine.module, self.engine.trainable())
        parameters = {names[name]: tensor for name, tensor in resumed.parameters.items()}
        mine = own_rank_state(resumed, self.engine, self.context)
        codes = under("optim/", mine)
        exact = self.engine.load_state(parameters, resumed.moments, state.optimizer_steps, codes)
        if not exact or (state.optim in EIGHT_BIT and self.engine.optim not in EIGHT_BIT):
            log.warning(
                "resuming a run of '%s' on '%s': its moments are %s, the run goes on close to it, not bit for bit",
                state.optim,
                self.engine.optim,
                "decoded from 8 bits" if exact else "coded in 8 bits anew",
            )
        set_rank_state(mine, self.engine, self.context)
