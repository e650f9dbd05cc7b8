"""A few seconds of ``server_storm``: killed once or twice, nothing acknowledged is lost."""

from tests.crash.server_storm import main


def test_what_a_server_acknowledged_outlives_it():
    assert main(["--seconds", "6", "--readers", "8", "--pushers", "6", "--dawdlers", "60"]) == 0
