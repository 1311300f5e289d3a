"""The display of progress, with a clock and a console of the test's own."""

import io
import logging

import pytest
import tiny
import torch
from compressing import awq, rtn, token_ids
from rich.console import Console

from bitpress import DistillationModifier, oneshot
from bitpress.pipelines.solving import Progress as Step
from bitpress.report import progress as progress_module
from bitpress.report.progress import SELDOM, live_lines, plain_line, preparing, progress_display
from bitpress.report.tally import Tally


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


def console(*, terminal):
    return Console(file=io.StringIO(), force_terminal=terminal, width=100, color_system=None, legacy_windows=False)


def block(tally, clock, index, seconds, phases=("calibrate", "AWQ", "Quantization", "propagate", "write")):
    """One block, whose phases take so long together."""
    for phase in phases:
        tally.take(Step(index, tally.total, f"layers.{index}", phase))
        clock.now += seconds / len(phases)


def test_time_left_is_that_of_the_finished_blocks(clock):
    tally = Tally(5, tokens=600, clock=clock)
    block(tally, clock, 0, 10)
    assert tally.left is tally.tokens_per_second is None
    block(tally, clock, 1, 20)
    tally.take(Step(2, 5, "layers.2", "calibrate"))
    assert tally.done == 2
    assert tally.left == pytest.approx(3 * 15)
    assert tally.tokens_per_second == pytest.approx(2 * 600 / 30)
    clock.now += 9
    assert tally.left == pytest.approx(3 * 15 - 9)
    clock.now += 900
    assert tally.left == 0
    assert tally.elapsed == pytest.approx(939)


def test_blocks_of_an_earlier_run_say_nothing_about_the_time_left(clock):
    tally = Tally(10, clock=clock)
    for index in range(4):
        block(tally, clock, index, 0.1, phases=["propagate"])
    block(tally, clock, 4, 30)
    tally.take(Step(5, 10, "layers.5", "calibrate"))
    assert tally.left == pytest.approx(5 * 30)


def test_draws_and_batches_are_counted_by_themselves(clock):
    tally = Tally(2, tokens=800, clock=clock)
    for index in range(8):
        tally.take(Step(index, 8, "", "measure", "draws"))
        clock.now += 100
    assert (tally.done, tally.total, tally.unit, tally.phase) == (7, 8, "draws", "measuring")
    assert tally.tokens_per_second is None
    for index in range(4):
        tally.take(Step(index, 4, "", "calibrate", "batches"))
        clock.now += 2
    assert tally.tokens_per_second == pytest.approx(200 / 2)
    block(tally, clock, 0, 10)
    assert tally.left is None
    tally.take(Step(1, 2, "layers.1", "solve"))
    assert tally.left == pytest.approx(10)
    tally.take(Step(3, 6, "epoch 1 of 2", "distill", "steps"))
    tally.end()
    assert (tally.done, tally.total, tally.unit, tally.phase) == (2, 2, "blocks", "done")


def test_tensors_stay_tensors(clock):
    tally = Tally(2, clock=clock)
    tally.take(Step(1, 40, "model.norm.weight", "solve", "tensors"))
    tally.end()
    assert plain_line(tally).startswith("40/40 tensors, done, 0:00 gone")


def test_without_a_terminal_a_line_now_and_then(clock):
    out = console(terminal=False)
    tally = Tally(8, tokens=1000, clock=clock)
    with progress_display(8, ["needs much"], tally=tally, console=out, show=True) as on_progress:
        for index in range(8):
            for phase in ("calibrate", "AWQ"):
                on_progress(Step(index, 8, f"layers.{index}", phase))
                clock.now += 0.2 * SELDOM
    lines = out.file.getvalue().splitlines()
    assert lines[0] == "needs much"
    # One for every third block, each of which takes 4 seconds, and the end.
    assert [line.split(",")[0] for line in lines[1:]] == ["3/8 blocks", "6/8 blocks", "8/8 blocks"]
    assert lines[1].startswith("3/8 blocks, layers.3: calibrating, 0:12 gone, 0:20 left, 250 tokens/s, ")
    assert lines[1].endswith(" GB")
    assert "done" in lines[-1]


def test_a_long_block_is_heard_of_before_it_is_done(clock):
    out = console(terminal=False)
    with progress_display(2, tally=Tally(2, clock=clock), console=out) as on_progress:
        on_progress(Step(0, 2, "layers.0", "calibrate"))
        clock.now += 70
        on_progress(Step(0, 2, "layers.0", "GPTQ"))
        said = out.file.getvalue()
    assert said.startswith("0/2 blocks, layers.0: GPTQ, 1:10 gone, ")
    assert "left" not in said


def test_a_short_run_says_nothing_where_there_is_no_terminal(clock, caplog):
    out = console(terminal=False)
    with (
        caplog.at_level(logging.INFO, "bitpress"),
        progress_display(2, ["needs"], tally=Tally(2, clock=clock), console=out) as on_progress,
    ):
        block(progress_display_of(on_progress), clock, 0, 1)
    assert out.file.getvalue() == ""
    assert caplog.messages == ["needs"]


def progress_display_of(on_progress):
    """As a tally, for :func:`block`."""
    tally = Tally(2)
    tally.take = on_progress
    return tally


def test_a_terminal_has_two_lines_that_change(clock):
    out = console(terminal=True)
    tally = Tally(4, tokens=1200, clock=clock)
    with progress_display(4, ["needs"], tally=tally, console=out) as on_progress:
        block(tally, clock, 0, 4)
        on_progress(Step(1, 4, "layers.1", "GPTQ"))
        seen = Console(file=io.StringIO(), width=100)
        seen.print(live_lines(tally))
    first, second = seen.file.getvalue().splitlines()
    assert first.split()[1:] == ["1/4", "blocks", "0:04,", "0:12", "left"]
    assert second.startswith("GPTQ")
    assert "layers.1 · 300 tokens/s · " in second
    said = out.file.getvalue()
    assert said.startswith("needs\n")
    assert "4/4 blocks" in said
    assert "\ndone " in said


def test_progress_false_shows_nothing(clock, caplog):
    for terminal in (False, True):
        out = console(terminal=terminal)
        with (
            preparing(show=False, console=out),
            progress_display(2, ["needs"], tally=Tally(2, clock=clock), console=out, show=False) as on_progress,
        ):
            clock.now += 1000
            on_progress(Step(1, 2, "layers.1", "solve"))
        assert out.file.getvalue() == ""


def test_an_error_leaves_the_terminal_as_it_was(clock):
    out = console(terminal=True)

    def fail():
        with progress_display(2, tally=Tally(2, clock=clock), console=out) as on_progress:
            on_progress(Step(0, 2, "layers.0", "solve"))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert out.file.getvalue().endswith("\x1b[?25h")  # the cursor is back
    assert "done" not in out.file.getvalue()


def steps_of(monkeypatch, *args, **options):
    """What a run tells its display."""
    steps = []
    monkeypatch.setattr(Tally, "take", lambda self, step: steps.append(step))
    monkeypatch.setattr(progress_module, "stderr", lambda: console(terminal=False))
    oneshot(*args, **options)
    return steps


def test_a_run_names_blocks_phases_and_modifiers_in_their_order(monkeypatch):
    model = tiny.llama()
    steps = steps_of(monkeypatch, model, token_ids(2), awq())
    assert all(step.total == 2 and step.unit == "blocks" for step in steps)
    assert [step.done for step in steps] == sorted(step.done for step in steps)
    of_first = [step.phase for step in steps if step.block == "model.layers.0"]
    assert of_first == ["calibrate", "solve", "AWQ", "Quantization", "propagate", "write"]
    assert (steps[-1].done, steps[-1].phase) == (2, "write")


def test_a_run_of_all_at_once_counts_batches_then_blocks_then_steps(monkeypatch):
    recipe = [*rtn(symmetric=False), DistillationModifier(epochs=1)]
    steps = steps_of(monkeypatch, tiny.llama(), token_ids(4), recipe, pipeline="basic")
    units = list(dict.fromkeys(step.unit for step in steps[:-1]))
    assert units == ["batches", "blocks", "steps"]
    batches = [step for step in steps if step.unit == "batches"]
    assert [(step.done, step.total) for step in batches] == [(i, 4) for i in range(4)]


def test_progress_changes_nothing(monkeypatch):
    monkeypatch.setattr(progress_module, "stderr", lambda: console(terminal=True))
    shown = oneshot(tiny.llama(), token_ids(2), awq(), progress=True)
    silent = oneshot(tiny.llama(), token_ids(2), awq(), progress=False)
    assert torch.equal(tiny.logits(shown), tiny.logits(silent))
