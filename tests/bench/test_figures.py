"""The page of measurements is made of the runs: nobody types a median."""

from bench import figures


def test_the_page_s_tables_are_medians_of_the_runs():
    page = figures.PAGE.read_text()
    assert figures.render(page) == page, "run: python bench/figures.py"


def test_a_cell_is_one_median_and_a_ratio_says_how_many_times_better():
    seconds = figures.Figure(
        table="t", question="a sample", script="s.py", unit="s", machine="fast", tx_async=(2, 1, 9), skyrl_tx=(8,)
    )
    assert seconds.row() == "| a sample | `s.py` | fast | 2 s | 8 s | 4.0× |  |"


def test_every_figure_names_a_script_that_is_there():
    folder = figures.PAGE.parent
    assert not [f.script for f in figures.figures() if not (folder / f.script.split()[0]).exists()]
