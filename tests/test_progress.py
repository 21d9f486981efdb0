"""Progress bars: drawn over and over at a terminal, a line now and then in a log."""

import io
import logging
import sys

import pytest

from flows import progress
from flows.progress import new_bar
from flows.training.loggers import ProgressBar, warnings_above_bars


class Terminal(io.StringIO):
    def isatty(self):
        return True


def counted(stream, monkeypatch, seconds=0.1, steps=3000, **settings):
    """What a bar of `steps` steps, each of so many seconds, writes to the stream."""
    now = [0.0]
    bar = new_bar(total=steps, desc="samples", file=stream, mininterval=0.1, **settings)
    bar._time, bar.start_t, bar.last_print_t = lambda: now[0], 0.0, 0.0
    for _ in range(steps):
        now[0] += seconds
        bar.update()
    bar.close()
    return stream.getvalue()


def test_a_log_gets_a_line_every_half_a_minute(monkeypatch):
    """300 seconds: ten lines, the last of which is whole, and nothing that moves a cursor."""
    lines = counted(io.StringIO(), monkeypatch).splitlines()
    assert 9 <= len(lines) <= 11
    assert lines[0].startswith("samples:  10%")
    assert lines[-1].startswith("samples: 100%")
    assert not any(sign in "".join(lines) for sign in ("\r", "\x1b"))
    assert counted(io.StringIO(), monkeypatch, 1e-5, 20).count("\n") == 1  # a short one has the last alone


def test_a_bar_that_is_not_left_leaves_a_log_alone(monkeypatch):
    assert counted(io.StringIO(), monkeypatch, 1e-5, 20, leave=False) == ""


def test_a_terminal_is_drawn_over(monkeypatch):
    drawn = counted(Terminal(), monkeypatch)
    assert drawn.count("\r") > 1000
    assert drawn.count("\n") == 1


def test_a_notebook_is_live():
    kernel = type("OutStream", (io.StringIO,), {"__module__": "ipykernel.iostream"})
    assert progress._is_live(kernel())
    assert not progress._is_live(io.StringIO())


def test_warnings_stand_in_lines_of_their_own(capsys):
    with warnings_above_bars():
        bar = new_bar(total=10, desc="test")
        bar.update(10)
        logging.getLogger("flows").warning("the loss is large")
        bar.close()
    lines = capsys.readouterr().err.splitlines()
    assert "Warning: the loss is large" in lines
    assert lines[-1].startswith("test: 100%")


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_no_bar_is_no_bar(stream):
    written = stream()
    assert list(new_bar(range(3), file=written, disable=True)) == [0, 1, 2]
    assert written.getvalue() == ""


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_a_bar_says_what_goes_on_between_two_steps(stream, monkeypatch):
    """At a terminal; in a log it would be a line for each validation."""
    written = stream()
    monkeypatch.setattr(sys, "stderr", written)
    bar = ProgressBar({"matching": 10})
    bar.advance("matching", 3, 0.3)
    bar.pause("validation")
    assert ("validation:" in written.getvalue()) == (stream is Terminal)
    bar.close()
