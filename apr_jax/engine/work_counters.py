"""The work that a device does for a thread, in tokens, keys and floating-point operations. No JAX."""

import dataclasses

from apr_jax.config import ModelConfig


@dataclasses.dataclass(frozen=True, slots=True)
class Work:
    """Tokens that went through the model, and the keys that they attended to.

    It is measured: what is shared (forks, published pages) is not computed and not counted; what was computed again
    after a preemption, or written past a cutoff or a stop string, or in place of a refused token, and then dropped, is
    counted.
    """

    prefilled: int = 0  # tokens computed by prefill
    decoded: int = 0  # tokens computed by decode; each gives one distribution over the vocabulary, and one draw
    attended: int = 0  # keys, summed over all these tokens; a token at position p attends to p + 1, its own included

    def with_prefill(self, start: int, count: int) -> "Work":
        """Return this and the work of prefilling the positions `[start, start + count)`."""
        return Work(self.prefilled + count, self.decoded, self.attended + _attended(start, count))

    def with_decode(self, start: int, count: int) -> "Work":
        """Return this and the work of `count` draws, the first with the token at position `start` as its input."""
        return Work(self.prefilled, self.decoded + count, self.attended + _attended(start, count))

    def __add__(self, other: "Work") -> "Work":
        return Work(self.prefilled + other.prefilled, self.decoded + other.decoded, self.attended + other.attended)

    @property
    def computed(self) -> int:
        """The tokens that went through the layers."""
        return self.prefilled + self.decoded

    def flops(self, model: ModelConfig) -> int:
        """Count the FLOPs of all matrix products, 2 a multiply-add; norms, softmax and rotations are bound by bytes.

        With L layers, width D, N query and K key/value heads of size H, MLP width F and vocabulary V: a computed token
        takes 2 L D (2 N H + 2 K H + 3 F), a decoded one 2 D V more for its logits, and an attended key 4 L N H, for its
        score and its part of the sum. As Kaplan et al. 2020 (arXiv 2001.08361, table 1), with gated MLPs and grouped
        heads, and attention summed over what each token really saw.
        """
        query_dim, kv_dim = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
        layer = 2 * model.embed_dim * (2 * query_dim + 2 * kv_dim + 3 * model.mlp_dim)
        logits = 2 * model.embed_dim * model.vocab_size
        key = 4 * model.num_layers * query_dim
        return self.computed * model.num_layers * layer + self.decoded * logits + self.attended * key


def _attended(start: int, count: int) -> int:
    """Return the sum of p + 1 over p in `[start, start + count)`."""
    return count * (2 * start + count + 1) // 2
