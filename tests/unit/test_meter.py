"""The meter counts what can be worked out by hand, and what torch's own counters say."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from effnlp_lab.notebook.meter import Meter, measure


def test_peak_bytes_of_temporaries():
    def three_live():
        a = torch.zeros(1000)
        b = a + 1
        c = b + 1
        del a, b
        return c

    assert measure(three_live)[1].peak_bytes == 3 * 4000


def test_freed_memory_is_not_counted():
    def one_at_a_time():
        for _ in range(10):
            torch.zeros(1000)

    assert measure(one_at_a_time)[1].peak_bytes == 4000


def test_views_and_inputs_cost_nothing():
    x = torch.zeros(1000, 10)
    usage = measure(lambda: x.t()[2:5].reshape(-1)[:1])[1]
    assert usage.peak_bytes <= 3 * 1000 * 4
    assert measure(lambda: x.t()[2:5])[1].peak_bytes == 0


def test_flops_are_torchs_own():
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
    x = torch.randn(5, 32)
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    assert measure(lambda: model(x).sum().backward())[1].flops == counter.get_total_flops() > 0


def test_products_in_place_count_as_others_do():
    x, a, b = torch.zeros(5, 7), torch.randn(5, 3), torch.randn(3, 7)
    assert measure(lambda: x.addmm_(a, b))[1].flops == measure(lambda: torch.addmm(x, a, b))[1].flops == 2 * 5 * 3 * 7
    batch = [torch.randn(2, *t.shape) for t in (x, a, b)]
    assert measure(lambda: batch[0].baddbmm_(*batch[1:]))[1].flops == 2 * 2 * 5 * 3 * 7


def test_saved_activations_are_live_until_backward():
    x = torch.randn(100, 100, requires_grad=True)
    with torch.no_grad():
        without = measure(lambda: x.exp().exp().exp())[1].peak_bytes
    kept = measure(lambda: x.exp().exp().exp())[1].peak_bytes
    assert (without, kept) == (2 * 40_000, 3 * 40_000)


def test_paused_work_is_not_counted():
    with Meter() as meter:
        with meter.paused():
            torch.zeros(1000)
    assert meter.usage.peak_bytes == 0 and meter.usage.launches == 0


def test_quadratic_memory_shows():
    def scores(n):
        q = torch.zeros(n, 8)
        return (q @ q.t()).softmax(-1) @ q

    small, large = (measure(scores, n)[1].peak_bytes for n in (128, 512))
    assert large > 12 * small
