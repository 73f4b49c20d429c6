"""The roofline's arithmetic."""

import pytest

from apr_jax.aot.peaks import Cost, Estimate
from apr_jax.bench.datasheets import PEAKS, Peaks

ROUND = Peaks(flops=100.0, memory=1, memory_bandwidth=10.0, link_bandwidth=2.0, source="made up")


@pytest.mark.parametrize(
    ("cost", "bound", "seconds"),
    [
        (Cost(flops=300.0, bytes=20.0, sent=4.0), "compute", 3.0),
        (Cost(flops=100.0, bytes=50.0, sent=4.0), "memory", 5.0),
        (Cost(flops=100.0, bytes=20.0, sent=9.0), "links", 4.5),
    ],
)
def test_the_longest_of_three_times_bounds(cost, bound, seconds):
    estimate = Estimate.of(cost, ROUND)
    assert (estimate.bound, estimate.seconds) == (bound, seconds)


def test_costs_add_up_and_repeat():
    cost = Cost(flops=1.0, bytes=2.0, sent=3.0)
    assert cost + cost * 2 == Cost(flops=3.0, bytes=6.0, sent=9.0)


def test_each_device_needs_more_work_a_byte_than_a_byte_sent_needs():
    """Units: were one of them in bits or in GiB, the order of the three rates would not hold."""
    for peaks in PEAKS.values():
        assert peaks.flops > 100 * peaks.memory_bandwidth > 100 * peaks.link_bandwidth > 1e12
        assert peaks.memory > 1e10
