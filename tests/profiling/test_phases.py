import mmap
import time

import pytest

from dreambooth_lab.profiling.phases import Phases


def test_nested_phase_is_not_counted_twice():
    phases = Phases()
    begun = time.perf_counter()
    with phases("training"):
        time.sleep(0.02)
        with phases.profile("[Callback]Validation.on_train_batch_end"):
            time.sleep(0.06)
            with phases.profile("[Callback]StepMetrics.on_train_batch_end"):
                time.sleep(0.02)
        with phases.profile("[Callback]Ema.on_train_batch_end"), phases.profile("[Strategy]X.training_step"):
            time.sleep(0.02)
    whole = time.perf_counter() - begun
    assert list(phases.of) == ["training", "images"]
    assert sum(phase.seconds for phase in phases.of.values()) == pytest.approx(whole, abs=0.06)
    assert phases.of["images"].seconds > phases.of["training"].seconds - 0.03
    assert phases.open == []


def test_peak_memory_is_assigned_to_its_phase():
    phases = Phases()
    with phases("small"):
        time.sleep(0.01)
    with phases("large"):
        buffer = mmap.mmap(-1, 300 * 2**20)  # not by malloc, which may hand out memory that is resident already
        for page in range(0, len(buffer), mmap.PAGESIZE):
            buffer[page] = 1
        until = time.monotonic() + 10  # the sampling thread may be late on a busy machine
        while phases.of["large"].memory < phases.of["small"].memory + 250 * 2**20 and time.monotonic() < until:
            time.sleep(0.02)
        buffer.close()
    small, large = phases.of["small"].memory, phases.of["large"].memory
    assert large - small > 250 * 2**20


def test_error_closes_its_phase():
    phases = Phases()
    with pytest.raises(ValueError), phases("training"):
        raise ValueError
    assert phases.open == [] and phases.cost()["training"]["memory_mib"] > 0
