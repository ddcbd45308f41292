import io

import pytest

from nunchaku_py.progress import Progress, wanted


def test_unasked_it_is_quiet_where_nobody_watches(monkeypatch):
    monkeypatch.setattr("sys.stderr", io.StringIO())
    monkeypatch.delitem(__import__("sys").modules, "ipykernel", raising=False)
    with Progress(10, "work") as progress:
        progress.say("first")
        progress.advance(5)
    assert not wanted()
    assert wanted(True) and not wanted(False)


def test_the_bar_counts_cost_and_names_what_is_done():
    screen = io.StringIO()
    with Progress(200, "quantize", show=True, file=screen, mininterval=0) as progress:
        progress.advance(50)
        progress.say("blocks.1")
    assert "quantize:  25%" in screen.getvalue()
    assert "left, blocks.1" in screen.getvalue()


def test_more_cost_than_announced_ends_at_100_percent():
    screen = io.StringIO()
    with Progress(1.0, "quantize", show=True, file=screen, mininterval=0) as progress:
        progress.advance(0.7)
        progress.advance(0.7)
    assert "100%" in screen.getvalue() and "140%" not in screen.getvalue()


def test_time_left_follows_the_cost_done(monkeypatch):
    clock = iter([0.0] + [30.0] * 20)
    progress = Progress(100, "quantize", show=True, file=io.StringIO(), mininterval=0)
    monkeypatch.setattr(progress.bar, "_time", lambda: next(clock))
    progress.bar.start_t = progress.bar.last_print_t = next(clock)
    progress.advance(75)
    assert progress.bar.format_dict["elapsed"] == pytest.approx(30.0)
    assert "00:10 left" in str(progress.bar)
