"""Counting steps whose update the device left out, because the loss, the gradient or its result was not finite.

`state.apply_gradients` decides. The host learns of it with the step's other metrics, in SFT one step late. By then the
device has gone on from the weights that the skipped step left as they were.
"""

import io
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from apr_jax.files import write


class SkippedSteps:
    """The count of skipped steps in a row. Too many end the run, with the last one's batch saved.

    Attributes:
      in_a_row: steps, up to the last one noted, with an update that was left out.
    """

    def __init__(self, workdir: pathlib.Path, limit: int) -> None:
        self.in_a_row = 0
        self._workdir, self._limit = workdir, limit

    def note(self, phase: str, step: int, skipped_rate: float, batch: Callable[[], Mapping[str, np.ndarray]]) -> None:
        """Count a step with its share of updates that were left out. `batch` makes the rows that it trained on.

        Raises FloatingPointError at the `limit`-th step in a row with a share above 0.
        """
        self.in_a_row = self.in_a_row + 1 if skipped_rate > 0 else 0
        if self.in_a_row < self._limit:
            return
        path = self._workdir / "skipped" / f"{phase}_{step}_process_{jax.process_index()}.npz"
        arrays: dict[str, Any] = {name: np.asarray(array) for name, array in batch().items()}
        packed = io.BytesIO()
        np.savez_compressed(packed, **arrays)
        write(path, packed.getvalue())
        raise FloatingPointError(
            f"{phase} step {step}: the loss, the gradient or the update was not finite, in {self.in_a_row} steps in a "
            f"row (faults.max_skipped_steps={self._limit}). The weights are as they were before these steps, and the "
            f"batch of step {step} is in {path}. Starting again repeats the steps since the last checkpoint."
        )
