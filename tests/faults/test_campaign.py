"""The short form of the fault campaign: every fault once, every script at least once. `make faults` is the long one."""

from collections.abc import Iterator
from pathlib import Path

import campaign
import pytest

# The scripts take turns; what costs two starts of Python, or seconds of waiting, is left to the long form.
SHORT = {
    "kill -9 at a random moment": ["local_aggregation", "cld"],
    "kill -9 inside a write": ["deepcluster", "eval_linear"],
    "SIGTERM, SIGINT, SIGINT twice": ["eval_knn"],
    "full disk": ["eval_segmentation"],
    "no right to write": ["eval_detection"],
    "truncated, flipped bits, zeros in any file": ["eval_knn", "eval_linear"],
    "hostile checkpoint": ["deepcluster", "figures gallery"],
    "strange and bad images": ["eval_knn"],
    "data that change between runs": ["npid"],
    "strange names": ["eval_linear", "figures curves"],
    "odd clock": ["eval_knn"],
    "two runs on one folder": ["npid"],
    "loss not finite": ["eval_segmentation"],
    "out of memory": ["eval_knn"],
    "any number for any numeric option": ["eval_knn", "eval_linear"],
    "output closed": ["eval_knn"],
}
LONG_ONLY = {"a submission attacked", "no HOME, locale, read-only installation", "a rank killed"}
PAIRS = [(fault, script) for fault in campaign.FAULTS for script in SHORT.get(fault.name, [])]


@pytest.fixture(scope="module")
def world() -> Iterator[campaign.World]:
    with campaign.world() as place:
        yield place


@pytest.mark.parametrize(("fault", "script"), PAIRS, ids=[f"{fault.name}-{script}" for fault, script in PAIRS])
def test_promise_holds(fault: campaign.Fault, script: str, world: campaign.World) -> None:
    """What the table promises for this fault is so."""
    try:
        campaign.attempt(world, fault, script, seed=0)
    except campaign.Unable as reason:
        pytest.skip(str(reason))


def test_nothing_is_forgotten() -> None:
    """Every fault is in the short form or named as one of the long form; every script has a trial."""
    assert {fault.name for fault in campaign.FAULTS} == SHORT.keys() | LONG_ONLY
    assert all(script in fault.scripts for fault, script in PAIRS)
    assert {script.split()[0] for _, script in PAIRS} == {script.split()[0] for script in campaign.EVERY}


def test_the_table_is_of_the_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of tests/README.md holds the faults, promises and counts as they are."""
    copy = tmp_path / "README.md"
    copy.write_text(campaign.TABLE.read_text())
    monkeypatch.setattr(campaign, "TABLE", copy)
    campaign.write_table(campaign.json.loads(campaign.COUNTS.read_text()))
    assert copy.read_text() == (campaign.HERE.parent / "README.md").read_text()
