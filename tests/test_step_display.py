"""What a person sees of the steps."""

import logging

import pytest

from glide_finetune import step_display
from glide_finetune.step_display import StepDisplay


def metrics(loss=0.5):
    return {"epoch": 0, "loss": loss, "grad_norm": 0.25, "lr": 1e-3, "images_per_second": 8.0}


def show_steps(first, last, total):
    with StepDisplay(first, total) as display:
        for step in range(first + 1, last + 1):
            display.show(step, metrics(), is_last=step == total)


@pytest.fixture
def clock(monkeypatch):
    """Ten seconds pass between two looks at the clock."""
    times = iter(range(0, 10_000, 10))
    monkeypatch.setattr(step_display.time, "monotonic", lambda: float(next(times)))


def test_without_a_terminal_there_is_a_line_now_and_then_and_for_the_last_step(
    clock, caplog, capsys
):
    caplog.set_level(logging.INFO)
    show_steps(100, 108, 108)
    assert [line.split()[1] for line in caplog.messages] == [
        f"{step}/108" for step in (101, 104, 107, 108)
    ]
    assert caplog.messages[0] == (
        "step     101/108  loss 0.5000    grad_norm 0.25      lr 1.00e-03  images/s 8.0     "
        "left 01:10"
    )
    assert len({line.index("left") for line in caplog.messages}) == 1
    assert capsys.readouterr().err == ""


def test_a_run_of_unknown_length_has_no_time_left(clock, caplog):
    caplog.set_level(logging.INFO)
    show_steps(0, 1, None)
    assert caplog.messages[0].startswith("step       1  loss")
    assert "left" not in caplog.text


def test_where_lines_are_not_shown_there_is_a_bar(caplog, capsys):
    caplog.set_level(logging.WARNING, "glide_finetune")
    show_steps(0, 3, 3)
    assert caplog.messages == []
    assert "3/3" in capsys.readouterr().err


def test_in_a_terminal_there_is_a_bar(monkeypatch, caplog, capsys):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(step_display.sys.stderr, "isatty", lambda: True)
    show_steps(0, 3, 3)
    assert caplog.messages == []
    assert "3/3" in capsys.readouterr().err


def test_much_waiting_for_data_is_told_but_for_the_first_step(clock, caplog):
    caplog.set_level(logging.INFO)
    with StepDisplay(0, 2) as display:
        for step in (1, 2):
            display.show(step, metrics() | {"data/wait_share": 0.25}, is_last=step == 2)
    first, second = caplog.messages
    assert "waiting" not in first
    assert "waiting for data 25%" in second
