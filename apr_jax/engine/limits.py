"""An engine's sizes, as the host needs them. No JAX."""

import dataclasses

from apr_jax.config import ConfigError, EngineConfig
from apr_jax.engine.threads import Thread


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits(EngineConfig):
    """Sizes of each data shard, and how many shards there are."""

    num_shards: int
    max_seq_len: int
    max_workers: int = 0  # of a group on a shared cache; 0: there are none
    halves: int = 1  # 2: two parts of a shard's lanes decode in turn; not with groups

    def __post_init__(self) -> None:
        super().__post_init__()
        needed = -(-self.max_seq_len // self.page_size)
        if self.pages - 1 < needed:
            raise ConfigError(
                f"a data shard has {self.pages - 1} usable pages, and one thread of model.max_seq_len="
                f"{self.max_seq_len} tokens needs {needed} of engine.page_size={self.page_size}"
            )
        if self.max_workers > self.lanes:
            raise ConfigError(
                f"{self.max_workers} workers on a shared cache need as many lanes in a data shard, which has "
                f"{self.lanes}; raise engine.lanes"
            )

    @property
    def lanes_in_turn(self) -> int:
        """Lanes of a data shard that decode together."""
        return -(-self.lanes // self.halves)

    @property
    def max_groups(self) -> int:
        """Groups that decode together."""
        return self.lanes // self.max_workers if self.max_workers else 0

    def check_group(self, workers: int, needed: int) -> None:
        """Raise ConfigError where a data shard never has the pages that a group may need."""
        if needed > self.pages - 1:
            raise ConfigError(
                f"{workers} workers on a shared cache may need {needed} pages of engine.page_size={self.page_size}, "
                f"and a data shard has {self.pages - 1} usable ones; raise engine.pages"
            )

    def final_length(self, thread: Thread) -> int:
        """Return how many tokens the thread has at most when its Decode ends."""
        return min(len(thread.tokens) + thread.max_generated - thread.generated, thread.max_length)
