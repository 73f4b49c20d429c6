"""Results of the paper (Pan et al. 2025, arXiv 2504.15466), to stand beside ours. Its scale and task size are others.

The numbers are those that its text and figures give; none are guessed. Intervals are Wilson's for its 1,000 problems.
"""

from collections.abc import Mapping
from types import MappingProxyType

from apr_jax.evaluation.metrics import wilson_interval
from apr_jax.evaluation.report.curves import Curve, Point

ABOUT = "The paper's (arXiv 2504.15466): 228M parameters, four numbers up to 99, 4,096 tokens of context"
_PROBLEMS = 1000

# Before and after RL, of the adaptive policy (section 5.4).
BEHAVIOUR = (
    ("solved at 4k context, greedy", "75.5 %", "83.4 %", "+7.9 points"),
    ("solved by serial search", "57.3 %", "60.0 %", "+2.7 points"),
    ("tokens per sequence", "1,471", "1,796", "+22.1 %"),
    ("children per parent", "6.1", "8.2", "+34.4 %"),
    ("tokens, all threads", "10,964", "16,720", "+52.5 %"),
    ("tokens, all threads, of serial search", "2,201", "2,660", "+20.9 %"),
    ("solved with 10 children enforced", "83.2 %", "83.3 %", "+0.1 points"),
)

NOTES: Mapping[str, str] = MappingProxyType(
    {
        "context_window": "The paper's points are the ends of its curves, at 4,096 tokens.",
        "total_tokens": "In the paper the adaptive policy reached pass@8's level with 57.4 % fewer tokens.",
        "sequential_tokens": "The paper gives no accuracy here: serial search took about 3,000 tokens one after the "
        "other, the adaptive policy rarely more than 2,500.",
        "latency_ms": "The paper's latency is of its own serving system.",
        "num_samples": "The paper's samples are of serial search.",
    }
)


def _curve(label: str, x: float, accuracy: float) -> Curve:
    low, high = wilson_interval(round(_PROBLEMS * accuracy), _PROBLEMS)
    return Curve(label, (Point(x, accuracy, low, high, label),))


CURVES: Mapping[str, tuple[Curve, ...]] = MappingProxyType(
    {
        "context_window": (
            _curve("adaptive, SFT", 4096, 0.755),
            _curve("adaptive, after RL", 4096, 0.834),
            _curve("serial, SFT", 4096, 0.573),
            _curve("serial, after RL", 4096, 0.600),
        ),
        "total_tokens": (
            _curve("adaptive", 20_000, 0.801),
            _curve("cons@7 of serial", 20_000, 0.666),
            _curve("pass@8 of serial", 24_000, 0.684),
        ),
        "latency_ms": (_curve("adaptive", 5000, 0.752), _curve("serial", 5000, 0.573)),
        "num_samples": (_curve("cons@n of serial", 7, 0.666), _curve("pass@n of serial", 8, 0.684)),
    }
)
