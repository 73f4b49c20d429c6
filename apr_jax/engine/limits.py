"""An engine's sizes, as the host needs them. No JAX."""

import dataclasses
import sys

from apr_jax.config import ConfigError
from apr_jax.engine.threads import Thread


@dataclasses.dataclass(frozen=True)
class Limits:
    """Sizes of each data shard, and how many shards there are."""

    num_shards: int
    lanes: int  # threads decoded together
    pages: int
    page_size: int
    max_seq_len: int
    steps_per_visit: int
    prefill_lanes: int
    prefix_reuse: bool
    block_size: int = 1  # positions that a decode step reads at once
    row_blocks: int = sys.maxsize  # blocks that the running threads may fill together
    max_workers: int = 0  # of a group on a shared cache; 0: there are none

    def __post_init__(self) -> None:
        needed = -(-self.max_seq_len // self.page_size)
        if self.pages - 1 < needed:
            raise ConfigError(
                f"a data shard has {self.pages - 1} usable pages, and one thread of model.max_seq_len="
                f"{self.max_seq_len} tokens needs {needed} of engine.page_size={self.page_size}"
            )

        if self.row_blocks * self.block_size < self.max_seq_len:
            raise ConfigError(
                f"row_blocks={self.row_blocks} of {self.block_size} positions don't hold one thread of "
                f"model.max_seq_len={self.max_seq_len} tokens"
            )

        if self.max_workers > self.lanes:
            raise ConfigError(
                f"{self.max_workers} workers on a shared cache need as many lanes in a data shard, which has "
                f"{self.lanes}; raise engine.lanes"
            )

    @property
    def max_groups(self) -> int:
        """Groups that decode together."""
        return self.lanes // self.max_workers if self.max_workers else 0

    @property
    def blocks_can_run_out(self) -> bool:
        """True where threads in all lanes could fill more than `row_blocks`."""
        return self.lanes * -(-self.max_seq_len // self.block_size) > self.row_blocks

    def blocks_for(self, thread: Thread) -> int:
        """Count the blocks that a decode step reads of the thread: all its tokens but the last."""
        return -(-(len(thread.tokens) - 1) // self.block_size)

    def final_length(self, thread: Thread) -> int:
        """Return how many tokens the thread has at most when its Decode ends."""
        return min(len(thread.tokens) + thread.max_generated - thread.generated, thread.max_length)
