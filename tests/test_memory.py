"""tests/memory.py: what it says without taking memory is what torch's profiler measures."""
import pytest
from conftest import ROOT  # noqa: F401  (its path makes the line below work)
from memory import step_bytes, take_steps
from torch.profiler import ProfilerActivity, profile

import pretrain
from configurator import LOOP

CONFIG = {**{key: value for key, value in vars(pretrain).items() if type(value) in (bool, int, float, str)},
          **{key: default for key, (default, _) in LOOP.items()}, 'n_layer': 3, 'n_head': 4, 'n_embd': 128,
          'batch_size': 4, 'block_size': 128, 'dtype': 'bfloat16'}


def measured(config):
    """The most bytes that the allocator had given out at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        take_steps(config, 1000)
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == '[memory]']
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


@pytest.mark.parametrize('changes', [
    dict(model='gpt2', optimizer='adamw'), dict(model='gpt2', activation_checkpointing=True),
    dict(dtype='float32'), dict(optimizer='adamw', dropout=0.1),
    dict(use_moe=True, activation_checkpointing=True)], ids=str)
def test_it_is_what_a_profiler_measures(changes):
    config = {**CONFIG, **changes}
    parts = step_bytes(config, 1000)
    assert sum(parts.values()) == pytest.approx(measured(config), rel=0.01)
    least = 1 if config['optimizer'] == 'muon' else 2            # moments, each as large as the weights
    assert least <= parts['moments'] / parts['weights'] < least + 0.5
