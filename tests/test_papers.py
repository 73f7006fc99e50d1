"""PAPERS.md: every table and figure of the four papers stands there, its commands parse, its figures are logged."""

import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

import common

PAGE = (common.ROOT / "PAPERS.md").read_text()
# All that the papers number, in order.
ITEMS = {
    "NPID": ["Figure 1", "Figure 2", "Figure 3", "Table 1", "Table 2", "Table 3", "Figure 4", "Figure 5", "Table 4",
             "Table 5", "Figure 6", "Table 6"],
    "Local Aggregation": ["Figure 1", "Table 1", "Table 2", "Table 3", "Figure 2", "Figure 3", "Figure 4", "Table 4",
                          "Table 5", "supplement, Figure 1", *(f"supplement, Table {i}" for i in (1, 2, 3))],
    "DeepCluster": ["Figure 3.1", "Figure 4.1", "Figure 4.2", "Table 4.1", *(f"Figure 4.{i}" for i in range(3, 9)),
                    "Table 4.2", "Table 4.3", "Figure 4.9", "Figure 4.10", *(f"Table 5.{i}" for i in range(1, 6)),
                    *(f"Figure 5.{i}" for i in range(1, 5))],
    "CLD": ["Figure A.1", *(f"Table A.{i}" for i in range(1, 5)), "Figure A.2", "Figure A.3", "main paper"],
}
STATUS = ("*Run*", "*In miniature*", "*Needs data", "*Drawing*")


def unrolled(line: str) -> list[str]:
    """A line of shell: a command, or those of `for x in a b; do command $x; done`."""
    loop = re.fullmatch(r"for (\w+) in (.+?); do (.+); done", line)
    if loop is None:
        return [line]
    name, values, command = loop.groups()
    return [re.sub(rf"\${name}\b|\${{{name}}}", value, command) for value in values.split()]


def sections() -> dict[str, str]:
    """What stands below each heading of a table or figure."""
    parts = re.split(r"^### (.+)$", PAGE, flags=re.M)[1:]
    texts = [re.split(r"^## ", text, flags=re.M)[0] for text in parts[1::2]]
    return dict(zip(parts[::2], texts, strict=True))


def commands(text: str) -> list[str]:
    lines = re.findall(r"^    (.+)$", text, re.M) + re.findall(r"`((?:python|torchrun) [^`]*\.py [^`.]+[^`]*)`", text)
    return [command for line in lines for command in unrolled(line)]


def test_every_table_and_figure_is_there() -> None:
    """The headings are those of the papers, in their order."""
    expected = [f"{paper}, {item}" for paper, items in ITEMS.items() for item in items]
    assert [heading.split(":")[0] for heading in sections()] == expected


@pytest.mark.parametrize("heading", sections())
def test_each_has_a_command_its_needs_and_its_status(heading: str) -> None:
    """Nothing is without a command; what it needs and how far it was run stand below it, a miniature with its log."""
    text = sections()[heading]
    assert commands(text) and "Needs " in text and sum(text.count(word) for word in STATUS) >= 1
    if "*In miniature*" in text or "*Run*" in text:
        assert re.search(r"\]\((results/|#)", text)


@pytest.mark.parametrize("command", sorted(set(commands(PAGE))))
def test_commands_parse(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command is accepted by the script it names."""
    if "RUN" in command.split():
        return
    words = shlex.split(command)
    start = next(i for i, word in enumerate(words) if word.endswith(".py"))
    script, options = Path(words[start]), words[start + 1 :]
    if script.name == "submit.py":
        pytest.importorskip("submitit")
    monkeypatch.setattr(sys, "argv", words[start:])
    monkeypatch.syspath_prepend(str(common.ROOT / script.parent))
    importlib.import_module(script.stem).parse_args(options)


def test_loops_are_unrolled() -> None:
    """`for` lines become one command for each value, also where the name is in braces."""
    assert unrolled("for m in 1 10; do a --x$m; done") == ["a --x1", "a --x10"]
    assert unrolled("for s in 1; do a ${s}percent; done") == ["a 1percent"]


def test_links_and_pictures() -> None:
    """Every file that the page links is there, and no picture is larger than 200 kB."""
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", PAGE) if not link.startswith("http")]
    assert links and [link for link in links if not (common.ROOT / link).exists()] == []
    assert all((common.ROOT / link).stat().st_size < 200_000 for link in links if link.endswith(".png"))


FORMER = dict(H="num_clusterings", m="num_clusters", k="num_neighbors")  # names in older logs
LOGGED = re.findall(r"^\|.*`python (\w+)\.py ([^`]+)`.*\((results/[\w./-]+/log\.jsonl)\) \|$", PAGE, re.M)


@pytest.mark.parametrize(("script", "options", "log"), LOGGED)
def test_commands_are_those_of_the_logs(script: str, options: str, log: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command in a row of a table sets all that is learnt as the options in the log beside it."""
    monkeypatch.setattr(sys, "argv", [f"{script}.py"])
    args = common.plain_options(importlib.import_module(script).parse_args(options.split()))
    logged = json.loads((common.ROOT / log).read_text().splitlines()[0])["options"]
    logged = {FORMER.get(key, key): value for key, value in logged.items()}
    learnt = args.keys() - common.FREE_OPTIONS | {"data", "epochs"}
    assert {key: args[key] for key in learnt if args[key] != logged.get(key)} == {}  # options newer than the log: None


def test_there_are_commands_with_a_log() -> None:
    """The test above has something to test."""
    assert len(LOGGED) == 5


def numbers(value: object) -> set[str]:
    """All numbers in a nest of results, to one decimal."""
    if isinstance(value, dict | list):
        return set[str]().union(*map(numbers, value.values() if isinstance(value, dict) else value))
    return {f"{value:.1f}"} if isinstance(value, int | float) else set()


def test_figures_are_logged() -> None:
    """Each figure in a row of a table with a link to a folder's log is in that folder's logs."""
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and "(results/" in line]
    assert rows
    for row in rows:
        folder = (common.ROOT / re.findall(r"\((results/[^)]+)\)", row)[-1]).parent
        lines = [line for name in ("log.jsonl", "eval.jsonl", "sweep.jsonl") if (folder / name).exists()
                 for line in (folder / name).read_text().splitlines()]
        known = set[str]().union(*(numbers(json.loads(line)) for line in lines))
        for cell in row.strip("|").split("|")[1:]:
            for figure in re.findall(r"^ (\d+\.\d) $", cell):
                assert figure in known, (row, figure)
