"""The part of a training loop that SFT and GRPO share: going on from a checkpoint, saving, and ending early."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import optax
from jax.sharding import Mesh

from apr_jax.checkpoints.identity import POLICY
from apr_jax.checkpoints.manager import Checkpoints
from apr_jax.checkpoints.policy import check_finite
from apr_jax.config import LoraConfig, ModelConfig
from apr_jax.model.lora import ALL_WEIGHTS
from apr_jax.model.params import Params
from apr_jax.parallel import hosts
from apr_jax.progress import busy
from apr_jax.stopping import StoppedError, StopSignal
from apr_jax.train.metrics import MetricsWriter
from apr_jax.train.skipping import SkippedSteps
from apr_jax.train.state import TrainState, abstract_state, create_state

METRICS_CRC = "metrics_crc"  # the note of a checkpoint on metrics.jsonl
_OPTIMIZER = "optimizer"  # the item of a checkpoint that holds the step and the optimiser's state


@dataclasses.dataclass(frozen=True)
class Phase:
    """A phase of a run, as its training loop sees it."""

    checkpoints: Checkpoints
    writer: MetricsWriter
    stop: StopSignal
    skipped: SkippedSteps

    def start(
        self,
        mesh: Mesh,
        model: ModelConfig,
        optimizer: optax.GradientTransformation,
        params: Params | None = None,
        seed: int = 0,
        lora: LoraConfig = ALL_WEIGHTS,
    ) -> tuple[TrainState, Any]:
        """Return the state to go on from and the position in the data that was saved with it.

        Without a checkpoint these are a new state (`create_state`) and None.
        """
        if self.checkpoints.latest_step() is None:
            with busy("Making the optimiser's state", hosts.messages()):
                return create_state(mesh, model, optimizer, params, seed, lora), None
        with busy("Reading the checkpoint", hosts.messages()):
            abstract = abstract_state(mesh, model, optimizer, lora)
            trees, position, meta = self.checkpoints.restore(_trees(abstract))
        check_finite(trees[POLICY], self.checkpoints.directory)
        self.skipped.in_a_row = meta.get("skipped_in_a_row", 0)
        step, opt_state = trees[_OPTIMIZER]
        return TrainState(step, trees[POLICY], opt_state), position

    def save(self, step: int, state: TrainState, position: Any) -> None:
        """Save a finished step. The metrics up to it reach the disk first, because the checkpoint counts on them."""
        self.writer.sync()
        notes = {"skipped_in_a_row": self.skipped.in_a_row, METRICS_CRC: self.writer.crc}
        self.checkpoints.save(step, _trees(state), position, **notes)

    def stopping(self) -> bool:
        """Return True when all hosts agree to stop. Raise OSError if a checkpoint could not be written."""
        self.checkpoints.check()
        return self.stop.agreed()

    @contextlib.contextmanager
    def interruptible(self, step: int, state: TrainState, position: Any) -> Iterator[None]:
        """Let a signal end the block at once, with `step` saved: for long work that a restart repeats anyway."""
        try:
            with self.stop.interrupting():
                yield
        except StoppedError:
            if step and step != self.checkpoints.latest_step():
                self.save(step, state, position)
            raise


def _trees(state: TrainState) -> dict[str, Any]:
    return {POLICY: state.params, _OPTIMIZER: (state.step, state.opt_state)}
