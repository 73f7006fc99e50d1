"""A soak: NPID, then Local Aggregation on shapes, in one process each, with memory, open files and log size watched.

    PYTHONPATH=.:tests python tests/faults/soak.py --minutes 30

The tiny network makes the steps short, so that there are many epochs, clusterings and checkpoints. Samples stand in
soak.jsonl; the last line says how memory grew between the second and the last quarter of each half, how many files
were open, and how much the log took for an epoch. It fails where memory grew by more than 5 %, or the number of open
files varied by more than two.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from helpers import ROOT

COMMON = ["--preset", "smoke", "--width", "2", "--subset", "256", "--test-subset", "64", "--batch-size", "32",
          "--image-size", "16", "--feature-dim", "16", "--device", "cpu", "--epochs", "1000000", "--schedule",
          "constant", "--knn-every", "10", "--save-minutes", "0.05", "--workers", "1"]
SCRIPTS = {"npid": COMMON, "local_aggregation": [*COMMON, "--warmup-epochs", "2"]}


def sample(pid: int, output: Path) -> dict[str, Any]:
    """Memory held now in MB, open files, threads, and the size of the output."""
    status = Path(f"/proc/{pid}/status").read_text()
    held = {line.split(":")[0]: int(line.split()[1]) for line in status.splitlines() if line.split(":")[0] in
            ("VmRSS", "Threads")}
    log = output / "log.jsonl"
    return dict(memory_mb=round(held["VmRSS"] / 1024, 1), threads=held["Threads"],
                files=len(list(Path(f"/proc/{pid}/fd").iterdir())),
                log_bytes=log.stat().st_size if log.exists() else 0,
                epochs=log.read_bytes().count(b'{"epoch"') if log.exists() else 0,
                output_files=len(list(output.rglob("*"))))


def soak(script: str, minutes: float, place: Path, every: float) -> dict[str, Any]:
    """Run a script for so long: the samples are printed, their summary returned."""
    output = place / script
    command = [sys.executable, str(ROOT / f"{script}.py"), *SCRIPTS[script], "--output", str(output)]
    with (place / f"{script}.out").open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT,
                                   env=os.environ | dict(OMP_NUM_THREADS="1"))
    rows, began = list[dict[str, Any]](), time.monotonic()
    while time.monotonic() < began + 60 * minutes:
        time.sleep(every)
        assert process.poll() is None, (place / f"{script}.out").read_text()[-2000:]
        rows.append(dict(script=script, seconds=round(time.monotonic() - began), **sample(process.pid, output)))
        print(json.dumps(rows[-1]), flush=True)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 143, (place / f"{script}.out").read_text()[-2000:]
    rows = [row for row in rows if row["epochs"]]
    second, last = rows[len(rows) // 4 : len(rows) // 2], rows[3 * len(rows) // 4 :]
    before, after = (statistics.median(row["memory_mb"] for row in part) for part in (second, last))
    return dict(script=script, minutes=round(minutes, 1), epochs=rows[-1]["epochs"], samples=len(rows),
                memory_mb=[before, after], growth_percent=round(100 * (after / before - 1), 2),
                files=sorted({row["files"] for row in second + last}),
                output_files=sorted({row["output_files"] for row in second + last}),
                bytes_per_epoch=round(rows[-1]["log_bytes"] / rows[-1]["epochs"]))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--minutes", type=float, default=30, help="of both together")
    options.add_argument("--every", type=float, default=10, help="seconds between samples")
    args = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = [soak(script, args.minutes / 2, Path(folder), args.every) for script in SCRIPTS]
    bad = [row for row in found if row["growth_percent"] > 5 or row["files"][-1] - row["files"][0] > 2]
    print(json.dumps(found), flush=True)
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
