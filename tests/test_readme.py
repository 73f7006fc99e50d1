"""The README and the page of small runs say what is so: commands parse, links exist, numbers are those of the logs."""

import importlib
import json
import re
import shlex
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

import pytest

import common

README = (common.ROOT / "README.md").read_text()
SMALL_RUNS = (common.ROOT / "results" / "README.md").read_text()
# Both, with the links as they are in the README.
PAGES = README + re.sub(r"\]\((?!\.\./)", "](results/", SMALL_RUNS).replace("](../", "](")
COMMANDS = sorted({
    line.split("  #")[0].strip()
    for line in re.findall(r"^    ((?:python|torchrun) .*)$", PAGES, re.M)
    + re.findall(r"`((?:python|torchrun) [^`]*)`", PAGES)
})


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command of the pages is accepted by the script it names."""
    words = shlex.split(command)
    start = next(i for i, word in enumerate(words) if word.endswith(".py"))
    script, options = words[start], words[start + 1 :]
    if script == "mine.py":
        script = "npid.py"  # the README copies it
    if script == "slurm/submit.py":
        pytest.importorskip("submitit")
    monkeypatch.setattr(sys, "argv", [script, *options])
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    try:
        args = module.parse_args(options)
        if script == "slurm/submit.py":  # it parses the script's options when it submits
            for inner in [[str(args.script), *args.argv], *args.then]:
                importlib.import_module(Path(inner[0]).stem).parse_args(inner[1:])
    except SystemExit as stop:
        assert stop.code == 0 and "--help" in options


def test_there_are_commands() -> None:
    """The test above has something to test, for each script that is there."""
    for script in ("npid.py", "local_aggregation.py", "eval_knn.py", "eval_linear.py", "figures.py", "slurm/submit.py"):
        assert any(script in command for command in COMMANDS)


def test_make_targets_exist() -> None:
    """Every `make X` of the pages is a target of the Makefile."""
    makefile = (common.ROOT / "Makefile").read_text()
    targets = set(re.findall(r"(?:^    |`)make ([a-z][a-z-]*)", PAGES, re.M))
    assert targets and all(re.search(rf"^{target}:", makefile, re.M) for target in targets)


def test_links_exist() -> None:
    """Every file that the pages link or show is in the repository."""
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", PAGES) if not link.startswith("http")]
    assert [link for link in links if not (common.ROOT / link).exists()] == []


def test_no_page_is_half_merged() -> None:
    """No page has the marks that git leaves where two versions meet."""
    for page in (path for path in common.ROOT.rglob("*.md") if ".venv" not in path.parts):
        assert not re.search(r"^(<{7}|={7}|>{7})( |$)", page.read_text(), re.M), page


def rows() -> list[list[str]]:
    table = [line for line in PAGES.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def test_every_published_row_has_a_preset_that_exists() -> None:
    """The commands of the first table name presets of their scripts, and each row that was not run says so."""
    table = [row for row in rows() if len(row) == 9 and "`" in row[7]]
    assert len(table) > 8
    for row in table:
        ours, log = row[3], row[8]
        assert (ours == "not run") == (log == "")


@pytest.mark.parametrize("name", sorted({name for name in re.findall(r"results/([\w.-]+)/", PAGES)}))
def test_figures_equal_the_logs(name: str) -> None:
    """Wherever the pages give a row of results/<name>/, its figures are those in that folder's eval.jsonl, a ratio
    edge that of its eval.jsonl or log.jsonl.

    A ± B is mean and standard deviation over the seeds of a run.
    """
    folder = common.ROOT / "results" / name
    logged, seeds = set(), defaultdict(list)
    for line in (folder / "eval.jsonl").read_text().splitlines():
        result = json.loads(line)
        for entry in result.get("knn", []) + result.get("layers", []):
            logged.add(f"{entry['top1']:.1f}" if "top1" in entry else "")
        logged |= {f"{result[key]:.1f}" for key in ("ap50_voc07", "ap", "miou", "ratio_edge") if key in result}
        for entry in result.get("knn", []):
            run = re.sub(r"-seed\d+/.*", "", result["checkpoint"])
            seeds[run, entry["num_neighbors"]].append(entry["top1"])
    if (folder / "log.jsonl").exists():
        epochs = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        logged |= {f"{row['ratio_edge']:.1f}" for row in epochs if "ratio_edge" in row}
    logged |= {f"{mean(each):.1f} ± {stdev(each):.1f}" for each in seeds.values() if len(each) > 1}
    shown = [row for row in rows() if any(f"results/{name}/" in cell for cell in row)]
    for row in shown:
        papers = (2, 4) if len(row) == 9 and "`" in row[7] else ()  # columns of the papers' own rows
        for cell in (cell for place, cell in enumerate(row) if place not in papers):
            for figure in re.findall(r"^\d+\.\d(?: ± \d+\.\d)?$", cell):
                assert figure in logged or "paper" in row[0], (name, figure, sorted(logged))


def test_the_first_table_has_each_scripts_own_figures() -> None:
    """A row of all images of CIFAR-10 has the figures of the last run of its own script, or of its baseline."""
    lines = (common.ROOT / "results/cifar10-whole/eval.jsonl").read_text().splitlines()
    found = {result["checkpoint"]: [f"{entry['top1']:.1f}" for entry in result["knn"]]
             for result in map(json.loads, lines)}
    runs = {"pixels": "pixels", "untrained": "random", "npid.py --preset cifar10 ": "runs/npid/",
            "cifar10-nce4096 ": "runs/nce/", "local_aggregation.py": "runs/la/", "deepcluster.py": "runs/deepcluster-",
            "cld.py --preset cifar10 ": "runs/cld/", "cifar10-moco ": "runs/moco/",
            "cifar10-moco-cld ": "runs/moco-cld/"}
    table = [row for row in rows() if "results/cifar10-whole/eval.jsonl" in row[-1]]
    assert len(table) == len(runs)
    for word, run in runs.items():
        (row,) = (row for row in table if word in row[0])
        (figures,) = (figures for checkpoint, figures in found.items() if checkpoint.startswith(run))
        assert row[1:3] == figures, row


def test_ratios_are_the_benchmarks() -> None:
    """Every ratio of the table of speeds is that of the latest record of a case on a CPU, rounded."""
    lines = (common.ROOT / "results" / "bench.jsonl").read_text().splitlines()
    latest = {(record["benchmark"], record["case"]): record for record in map(json.loads, lines)
              if record["device"] == record["cpu"]}
    logged = [record["ratio_median"] for record in latest.values() if "ratio_median" in record]
    table = README.split("| ours | against | ratio | aim |")[1].split("\n\n")[0]
    ratios = [line.split("|")[3].strip() for line in table.splitlines()[2:]]
    assert len(ratios) > 10
    for ratio in ratios:
        digits = len(ratio.partition(".")[2])
        assert any(f"{value:.{digits}f}" == ratio for value in logged), ratio
