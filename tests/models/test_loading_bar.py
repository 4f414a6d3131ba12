"""The log while weights load."""

import logging

from tx_async.models import loading_bar


def test_a_line_a_second_with_bar_share_and_rate_and_one_at_the_end(caplog):
    bar = loading_bar.LoadingBar(4_000_000_000, clock=iter([10.0, 10.5, 11.0, 11.2, 12.0, 12.5]).__next__)
    with caplog.at_level(logging.INFO, loading_bar.log.name):
        for gigabytes in (1, 2, 2.2, 3, 4):
            bar.report(int(gigabytes * 10**9))
    # Of this logger alone: a thread that an earlier test left may say something just now.
    assert [record.getMessage() for record in caplog.records if record.name == loading_bar.log.name] == [
        "Loading weights: ██████████░░░░░░░░░░ 50 % of 4.00 GB, 2.00 GB/s",
        "Loading weights: ███████████████░░░░░ 75 % of 4.00 GB, 1.50 GB/s",
        "Loaded weights: 4.00 GB in 2.5 s, 1.60 GB/s",
    ]
