"""Submit any of the scripts, or your own copy of one, to SLURM; a job that is pre-empted or out of time resumes.

    python slurm/submit.py --nodes 2 --gpus 8 local_aggregation.py --preset imagenet-resnet50
    python slurm/submit.py --gpus 8 --partition long --account vision --slurm qos=high mem=400G npid.py --data imagenet
    python slurm/submit.py --sweep lr=0.01,0.03 seed=0,1,2 npid.py --data cifar10                 # a job array of six
    python slurm/submit.py --then "eval_knn.py --k 200 20" npid.py --data cifar10                 # after each success
    python slurm/submit.py --cluster local --gpus 2 npid.py --data cifar10                        # without SLURM

Options of the submission stand before the script, those of the script after it; the latter are parsed before anything
is submitted. The modules and packages beside the script are copied to the job's folder, and the job runs that copy:
what you edit while it waits, or between two of its attempts, does not reach it. The working directory stays yours.

At the time limit (--grace seconds before it) and at pre-emption (USR2, or TERM while SLURM calls the job running) the
run saves at the next step, requeues itself, and resumes from that step. scancel makes it save as well, and ends the
run. Submitting the same command again continues a run that has ended for any reason.

Evaluations named by --then run on one GPU of one node. {output} in them is the run's folder; without it
{output}/checkpoint.pth is the first argument. --sweep adds --KEY VALUE to the script's options for each combination;
each has an output of its own.
"""

import argparse
import contextlib
import datetime
import importlib
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch

try:
    import submitit
    import submitit.helpers
except ImportError:
    print("submit.py: error: submitit is missing: pip install submitit", file=sys.stderr)
    sys.exit(2)

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import common  # noqa: E402

GRACE = 300  # seconds: an epoch's clustering on a large set has to end within it
OWN = {  # what --slurm must not set: ranks are counted and jobs requeued by these
    "time": "--hours", "nodes": "--nodes", "ntasks": "--tasks", "ntasks_per_node": "--tasks", "gpus": "--gpus",
    "gpus_per_node": "--gpus", "num_gpus": "--gpus", "gpus_per_task": "--gpus", "tasks_per_node": "--tasks",
    "array": "--sweep", "signal": "--grace", "signal_delay_s": "--grace", "additional_parameters": "--slurm KEY=VALUE",
    "teardown": "setup='trap COMMAND EXIT'",  # its exit code would be the job's, and --then follow a failure
}


# ---- options ---------------------------------------------------------------------------------------------------------


def pair(text: str) -> tuple[str, str]:
    """An argparse type: KEY=VALUE, dashes of the key as underscores."""
    key, equals, value = text.partition("=")
    if not (key and equals and value):
        raise argparse.ArgumentTypeError(f"{text} is not KEY=VALUE")
    key = key.replace("-", "_")
    if key == "srun_args":
        shlex.split(value)  # quotes that are no pair are a ValueError, which argparse reports
    if key == "array_parallelism" and not (value.isdecimal() and int(value)):
        raise argparse.ArgumentTypeError(f"{key} takes how many jobs of the array run at once, such as 4, not {value}")
    return key, value


def follower(text: str) -> list[str]:
    """An argparse type: the words of a --then command, with {output} in them."""
    try:
        script, *argv = shlex.split(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no command: a script and its options, quotes in pairs") from None
    return [Path(script).name, *(argv if "{output}" in text else ["{output}/checkpoint.pth", *argv])]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    words = list(sys.argv[1:] if argv is None else argv)
    parser = common.parser(__doc__)
    parser.usage = "submit.py [options] SCRIPT [its options]"
    parser.add_argument("--cluster", choices=["slurm", "local", "debug"], default="slurm",
                        help="local: processes of this machine, in the foreground; debug: in this process")
    parser.add_argument("--nodes", type=common.COUNT, default=1, metavar="N", help="machines")
    parser.add_argument("--gpus", type=common.COUNT_OR_ZERO, metavar="N", help="GPUs of each node, each with a task, "
                        "all visible to all its tasks; of one type: with --slurm gres=gpu:TYPE:N; default: 1, and on a "
                        "local machine all that it has")
    parser.add_argument("--tasks", type=common.COUNT, metavar="N", help="tasks of each node; default: its GPUs, or 1")
    parser.add_argument("--hours", type=common.number(float, 0, 10_000, open_low=True), default=24, help="time limit "
                        "of one attempt, not above the partition's; on SLURM rounded up to minutes")
    parser.add_argument("--grace", type=common.COUNT, metavar="SECONDS", help=f"a job is told to save this long before "
                        f"its time is over; default: {GRACE}, or a quarter of the time if that is less")
    parser.add_argument("--requeues", type=common.COUNT_OR_ZERO, default=100, metavar="N", help="how many times a job "
                        "that is out of time is requeued, locally five at most; pre-emptions do not count")
    parser.add_argument("--partition", help="SLURM's")
    parser.add_argument("--account", help="SLURM's")
    parser.add_argument("--constraint", help="SLURM's: features that the nodes must have")
    parser.add_argument("--slurm", type=pair, nargs="+", action="extend", default=[], metavar="KEY=VALUE",
                        help="any other option of sbatch, such as qos=high mem=400G cpus_per_task=12 exclusive=true; "
                             "also setup=COMMAND, before the tasks start, and array_parallelism=N")
    parser.add_argument("--sweep", type=pair, nargs="+", action="extend", default=[], metavar="KEY=V1,V2",
                        help="all combinations as a job array")
    parser.add_argument("--then", type=follower, action="append", default=[], metavar="COMMAND", help="a script and "
                        "its options, to run once the run has succeeded; may be repeated")
    # The first word that is a script ends the options: --sweep and --slurm take as many words as there are. None of
    # theirs is a script, be it setup=python fetch.py.
    before = ["", *words]
    script = re.compile(r"(?!-|[\w-]+=).+\.py")
    end = next((i for i, word in enumerate(words) if script.fullmatch(word) and before[i] != "--then"), len(words))
    if end == len(words) and not {"-h", "--help"} & set(words):
        parser.error("which script? name one, such as npid.py")
    args = parser.parse_args(words[:end])
    args.script, args.argv, args.typed = Path(words[end]), words[end + 1 :], common.typed(parser, words[:end])
    slurms = dict.fromkeys(("partition", "account", "constraint", "slurm"), (args.cluster == "slurm", "SLURM"))
    limits = dict.fromkeys(("hours", "grace", "requeues"), (args.cluster != "debug", "a job of its own"))
    common.note_idle(args, slurms | limits)
    if taken := next((key for key, _ in args.slurm if key in OWN), None):
        parser.error(f"--slurm {taken}: use {OWN[taken]}")
    seconds = 3600 * args.hours
    if args.grace and args.grace >= seconds:
        parser.error(f"--grace {args.grace} is not less than the {seconds:.0f} s of --hours {args.hours:g}")
    args.grace = args.grace or max(1, min(GRACE, int(seconds / 4)))
    return args


# ---- what is submitted -----------------------------------------------------------------------------------------------


class Command(NamedTuple):
    """Options of a script, and the folder that they give its output."""

    argv: list[str]
    output: str | None  # None: wherever its checkpoint is


def combinations(sweep: Sequence[tuple[str, str]]) -> list[list[str]]:
    """The words that each run of a sweep adds: lr=1,2 and seed=0 -> --lr 1 --seed 0, --lr 2 --seed 0."""
    axes = [[[f"--{key.replace('_', '-')}", value] for value in values.split(",")] for key, values in sweep]
    return [[word for option in choice for word in option] for choice in itertools.product(*axes)]


def snapshot(folder: Path, place: Path) -> None:
    """Copy what a script in `folder` can import from there, and say of which commit it is."""
    place.mkdir(parents=True)
    for path in sorted(folder.iterdir()):
        if path.suffix == ".py" and path.is_file():  # not an editor's lock, a link that leads nowhere
            shutil.copy2(path, place)
        elif (path / "__init__.py").is_file():
            shutil.copytree(path, place / path.name, ignore=shutil.ignore_patterns("__pycache__"),
                            ignore_dangling_symlinks=True)
    (place / "COMMIT").write_text(common.git_commit(folder))


# Runs in a process of its own, from the snapshot: what is missing there, or mistyped, shows before the job waits.
CHECK = """
import importlib, json, os, sys
sys.path[0], found = sys.argv[1], []
for script, tasks, commands in json.loads(sys.argv[2]):
    os.environ["WORLD_SIZE"] = str(tasks)
    try:
        module, _ = importlib.import_module(script[:-3]), importlib.import_module("common")  # which runs it in the job
    except ImportError as error:
        sys.exit(f"submit.py: error: {script}: {error}; only modules and packages beside the script go with it")
    if not hasattr(module, "parse_args") or not hasattr(module, "main"):
        sys.exit(f"submit.py: error: {script} has no parse_args(argv) and main(args)")
    for argv in commands:
        sys.argv = [script, *argv]
        try:
            args = module.parse_args(argv)
        except sys.modules["common"].Fault as fault:
            sys.exit(f"{script}: error: {fault}")
        output = getattr(args, "output", None)
        own = output and not hasattr(module, "folder_of")  # which names a folder for each setting there
        found.append([str(output) if own else None, getattr(args, "batch_size", None) or 0,
                      getattr(args, "accumulate", 0)])
print("\\n" + json.dumps(found))  # after whatever the script has printed
"""


class Facts(NamedTuple):
    """What a script makes of its options."""

    output: str | None  # of what trains; None: wherever its checkpoint is
    batch_size: int  # 0: not fixed
    parts: int  # of a batch; 0: the script runs as one task


def check(code: Path, scripts: list[tuple[str, int, list[list[str]]]]) -> list[Facts]:
    """Facts of each command of (script, tasks, commands); options that are wrong end the submission."""
    done = subprocess.run([sys.executable, "-c", CHECK, str(code), json.dumps(scripts)], stdout=subprocess.PIPE,
                          text=True, check=False)
    last = [line for line in done.stdout.splitlines() if line.startswith("[[")][-1:]
    if done.returncode or not last:  # what is wrong has been said; or --help
        print(done.stdout, end="", flush=True)
        sys.exit(2 if done.returncode else 0)
    return [Facts(*row) for row in json.loads(last[0])]


def runs_of(code: Path, args: argparse.Namespace, ranks: int) -> list[tuple[str, list[Command]]]:
    """What is to run: the script, once or once for each combination of the sweep, then each --then command for each."""
    script, added = args.script.name, combinations(args.sweep)
    tried = []  # {output} does not exist yet: this folder stands in for it
    for name, *argv in args.then:
        if not (code / name).is_file():
            raise common.Fault(f"--then {name}: there is no such script beside {script}")
        tried.append((name, 1, [[word.replace("{output}", str(code)) for word in argv]]))
    found = check(code, [(script, ranks, [args.argv + words for words in added]), *tried])
    runs = []
    for words, facts in zip(added, found[: len(added)], strict=True):
        argv, output = args.argv + words, facts.output
        if args.then and not output:
            raise common.Fault(f"--then is for what comes after training, and {script} does not train")
        if ranks > 1 and not facts.parts:
            raise common.Fault(f"{script} runs as one task, not as {ranks}: use --nodes 1 --tasks 1 --gpus "
                               f"{min(args.gpus, 1)}")
        if facts.parts and facts.batch_size % (ranks * facts.parts):
            raise common.Fault(f"--batch-size {facts.batch_size} must divide by ranks x accumulate = "
                               f"{ranks} x {facts.parts}")
        if words and output:
            typed = any(word.split("=")[0] == "--output" for word in args.argv)
            told = () if typed else ("--preset", "--seed")  # default names tell these already
            options = zip(words[::2], words[1::2], strict=True)
            names = [f"{key[2:]}={value}" for key, value in options if key not in told]
            if not Path(output).name:
                raise common.Fault(f"--output {output} has no name that each run of the sweep could add to")
            output = str(Path(output).with_name("-".join([Path(output).name, *names]).replace("/", "_")))
            argv = [*argv, "--output", output]
        runs.append(Command(argv, output))
    named = [run.output for run in runs if run.output]
    if len(set(named)) < len(named) or len({tuple(run.argv) for run in runs}) < len(runs):
        raise common.Fault("two runs of the sweep have the same output: is there a value twice, or --output swept?")
    groups = [(script, runs)]
    for name, *argv in args.then:
        some = [Command([word.replace("{output}", run.output or "") for word in argv], None) for run in runs]
        groups.append((name, some))
    return groups


# ---- in the job ------------------------------------------------------------------------------------------------------
# Job is pickled with its code, so that the job does not depend on this file; it must not use `common` from here.


def state() -> str:
    """What SLURM calls this job: RUNNING, CANCELLED, ...; "" if it cannot be asked."""
    command = ["scontrol", "show", "job", "-o", os.environ.get("SLURM_JOB_ID", "")]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        found = re.search(r"JobState=(\w+)", subprocess.run(command, capture_output=True, text=True, timeout=60).stdout)
        return found[1] if found else ""
    return ""


def ending(cluster: str, script: str, again: str, rank: int, requeue: Any) -> Callable[[int, FrameType | None], None]:
    """The handler of a signal; a script calls it too, after its checkpoint, with None as the frame.

    TERM is a pre-emption only on SLURM: a local job within an allocation of SLURM's is not that allocation's job.
    """
    owner = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a worker that inherited this; SLURM signals them too
            return
        if rank and frame is not None:  # before training: rank 0 decides
            return
        for other in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(other, signal.SIG_IGN)
        if number == signal.SIGTERM and (cluster != "slurm" or state() != "RUNNING"):  # cancelled
            raise SystemExit(128 + number)
        if rank:  # an error code would end rank 0 before it requeues
            raise SystemExit(0)
        try:
            requeue(signal.SIGUSR2, frame)
        except (OSError, subprocess.SubprocessError, submitit.core.utils.UncompletedJobError) as error:
            print(f"{script}: error: not requeued ({error}); this continues: {again}", file=sys.stderr)
            raise SystemExit(1) from None

    return end


class Job(submitit.helpers.Checkpointable):
    """A script and its options, run from a snapshot. Back from the queue the script itself finds its checkpoint."""

    def __init__(self, code: Path, script: str, run: Command, again: str) -> None:
        self.code, self.script, self.run, self.again = str(code), script, run, again
        self.attempt = 1

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        self.attempt += 1
        return submitit.helpers.DelayedSubmission(self)

    def __call__(self) -> None:
        env = submitit.JobEnvironment()
        attempt = max(self.attempt, int(os.environ.get("SLURM_RESTART_COUNT", "0")) + 1)
        # All GPUs of the node stay visible: LOCAL_RANK then names the device, as under torchrun.
        world = submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        # Processes of the last attempt may linger: each has another port, below those that systems hand out.
        os.environ["MASTER_PORT"] = str(20_000 + zlib.crc32(f"{env.job_id} {attempt}".encode()) % 12_000)
        try:
            socket.getaddrinfo(world.master_addr, None)
        except OSError:  # a node whose name only SLURM knows; srun starts the tasks from the first
            os.environ["MASTER_ADDR"] = os.environ.get("SLURM_LAUNCH_NODE_IPADDR", world.master_addr)
        if env.cluster != "debug":
            requeue = signal.getsignal(env._usr_sig())
            end = ending(env.cluster, self.script, self.again, world.rank, requeue)
            if env._usr_sig() != signal.SIGUSR2:  # $SUBMITIT_PREEMPT_SIGNAL; scripts listen to USR2
                signal.signal(env._usr_sig(), lambda *_: os.kill(os.getpid(), signal.SIGUSR2))
            signal.signal(signal.SIGTERM, end)
            signal.signal(signal.SIGUSR2, end)
        sys.argv = [self.script, *self.run.argv]
        sys.path.insert(0, self.code)
        sys.modules.pop("common", None)  # --cluster debug: the one of this file
        script, shared = importlib.import_module(Path(self.script).stem), importlib.import_module("common")
        if attempt > 1 and "--overwrite" in sys.argv and self.has_begun(script.parse_args):
            sys.argv = [word for word in sys.argv if word != "--overwrite"]
        if world.rank == 0:
            print(f"job {env.job_id}, attempt {attempt}: {shlex.join(sys.argv)}", flush=True)
        try:
            shared.launch(script.main, script.parse_args)
        except SystemExit as stop:
            if stop.code == 2 and world.rank == 0 and env.num_nodes > 1:
                # If the other nodes live, their ranks end too, and srun ends this one within the sleep. If one has
                # died, srun would wait for minutes, until SLURM notices.
                time.sleep(5)
                subprocess.run(["scancel", "--batch", "--signal=KILL", env.raw_job_id], check=False)
            raise

    def has_begun(self, parse_args: Callable[[list[str]], argparse.Namespace]) -> bool:
        """Whether an earlier attempt may have saved a checkpoint, which --overwrite must not remove."""
        with contextlib.redirect_stderr(io.StringIO()):  # the script says its notes itself
            output = getattr(parse_args(self.run.argv), "output", None)
        start = Path(self.code).stat().st_mtime
        return not output or any(file.stat().st_mtime > start for file in Path(output).rglob("checkpoint.pth"))


# ---- submission ------------------------------------------------------------------------------------------------------


def make_executor(args: argparse.Namespace, folder: Path) -> Any:
    """submitit's executor of jobs of this size."""
    if args.cluster == "debug":
        return submitit.DebugExecutor(folder)
    if args.cluster == "local":
        local = submitit.LocalExecutor(folder, max_num_timeout=args.requeues)
        local.update_parameters(gpus_per_node=args.gpus, tasks_per_node=args.tasks, timeout_min=60 * args.hours,
                                signal_delay_s=args.grace)
        if seen := os.environ.get("CUDA_VISIBLE_DEVICES"):
            local.parameters["visible_gpus"] = seen.split(",")  # update_parameters refuses names, such as MIG's
            if args.gpus > seen.count(",") + 1:
                raise common.Fault(f"--gpus {args.gpus}: $CUDA_VISIBLE_DEVICES is {seen}")
        return local
    if "SLURM_JOB_ID" in os.environ:  # the memory and tasks of an interactive job are not the new job's
        for name in [name for name in os.environ if name.startswith("SLURM_") and name != "SLURM_CONF"]:
            del os.environ[name]
    try:
        slurm = submitit.SlurmExecutor(folder, max_num_timeout=args.requeues)
    except RuntimeError:
        raise common.Fault("no SLURM here, srun is missing: use --cluster local") from None
    typed = re.search(r"\bgpu\b", dict(args.slurm).get("gres", ""))  # type and number of GPUs; not so nvme:100
    own: dict[str, Any] = dict(
        time=max(1, math.ceil(60 * args.hours)), nodes=args.nodes, ntasks_per_node=args.tasks,
        gpus_per_node=None if typed else args.gpus or None,
        partition=args.partition, account=args.account, constraint=args.constraint,
        signal_delay_s=args.grace, srun_args=["--kill-on-bad-exit=1"],  # a rank that dies ends the job
    )
    rest: dict[str, Any] = dict(requeue=True)
    values = [value for key, value in args.slurm if key != "setup"]  # which may have several lines
    for word in (folder, args.partition, args.account, args.constraint, *values):
        if re.search("[\n\ud800-\udfff]", str(word)):
            raise common.Fault(f"{str(word)!r} cannot stand in sbatch's file: a line break, or no UTF-8")
    for key, value in args.slurm:
        if key == "cpus_per_task":  # which srun, unlike sbatch, would have to be told again
            own["srun_args"].append(f"--cpus-per-task={value}")
        if key == "setup":
            own[key] = [*own.get(key, []), value]
        elif key == "srun_args":
            own[key] = [*own[key], *shlex.split(value)]
        else:
            where = own if key in submitit.SlurmExecutor._valid_parameters() else rest
            where[key] = True if value == "true" else int(value) if key == "array_parallelism" else value
    slurm.update_parameters(additional_parameters=rest, **own)
    return slurm


def of_one_gpu(args: argparse.Namespace) -> argparse.Namespace:
    """The options of the jobs that follow: those of the first, but one task, and one GPU where it has some."""
    rest = [(key, re.sub(r"\b(gpu(:[^:,]+)?):\d+", r"\1:1", value) if key == "gres" else value)
            for key, value in args.slurm]  # gpu:TYPE:N and gpu:N
    return argparse.Namespace(**vars(args) | dict(nodes=1, gpus=min(1, args.gpus), tasks=1, slurm=rest))


def main(args: argparse.Namespace) -> None:
    if not args.script.is_file():
        raise common.Fault(f"no script {args.script}")
    if args.cluster != "slurm" and args.nodes > 1:
        raise common.Fault(f"--cluster {args.cluster} has one node: leave --nodes out")
    if args.gpus is None:
        args.gpus = 1 if args.cluster == "slurm" else torch.cuda.device_count()
    tasks = args.tasks = 1 if args.cluster == "debug" else args.tasks or max(1, args.gpus)
    if 0 < args.gpus < tasks:
        raise common.Fault(f"--tasks {tasks} on --gpus {args.gpus}: each task takes a GPU of its own, or all --gpus 0")
    with tempfile.TemporaryDirectory() as temporary:
        code = Path(temporary) / "code"
        snapshot(args.script.resolve().parent, code)
        shutil.copy2(args.script, code)  # a link may have another name than the file
        groups = runs_of(code, args, args.nodes * tasks)
        stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        place = Path(groups[0][1][0].output or "runs/evaluation").parent / "slurm"
        folder = (place / f"{args.script.stem}-{stamp}-{os.getpid()}").resolve()
        try:
            shutil.copytree(code, folder / "code")
            first, then = make_executor(args, folder), make_executor(of_one_gpu(args), folder)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    again = shlex.join(["python", *(word for word in sys.argv if word != "--overwrite")])
    jobs = [[Job(folder / "code", name, run, again) for run in some] for name, some in groups]
    if args.cluster == "slurm":
        submit(folder, first, then, jobs)
        return
    failed = False
    for some in zip(*jobs, strict=True):
        for i, job in enumerate(some):
            try:
                run_here(folder, then if i else first, job)
            except common.Fault as fault:  # the rest has its turn, as in a job array; not what follows a failed run
                common.say(f"submit.py: error: {fault}")
                failed = True
                if i == 0:
                    break
    if failed:
        raise SystemExit(2)


def submit(folder: Path, first: Any, then: Any, jobs: list[list[Job]]) -> None:
    """The training runs as a job or an array, and after each success its evaluations."""
    numbers, training, named = list[str](), list[Any](), first.parameters.get("job_name")
    try:
        for executor, some in zip([first] + [then] * (len(jobs) - 1), jobs, strict=True):
            name: dict[str, Any] = dict(job_name=named or Path(some[0].script).stem)
            if numbers:  # each run of an array has its own evaluation, which waits for it alone
                name["dependency"] = f"{'aftercorr' if len(some) > 1 else 'afterok'}:{numbers[0]}"
                more = then.parameters["additional_parameters"] | dict(kill_on_invalid_dep="yes")
                name["additional_parameters"] = more
            executor.update_parameters(**name)
            with contextlib.redirect_stderr(io.StringIO()):  # submitit shows sbatch's, and raises with it
                submitted = executor.submit_array(some)
            numbers.append(submitted[0].job_id.split("_")[0])
            training = training or submitted
    except BaseException as error:
        if isinstance(error, submitit.core.utils.FailedJobError) and numbers:
            subprocess.run(["scancel", *numbers], check=False)
            numbers.clear()
        if not numbers:  # else the folder holds what a job in the queue will run
            shutil.rmtree(folder)
        if not isinstance(error, submitit.core.utils.FailedJobError):
            raise
        reason = "; ".join(re.sub("^sbatch: (error: |fatal: )?", "", line) for line in str(error).splitlines())
        raise common.Fault(f"sbatch refuses: {reason}") from None
    for job, one in zip(training, jobs[0], strict=True):
        print(f"job {job.job_id}: {shlex.join([one.script, *one.run.argv])}")
        if one.run.output:
            print(f"    output {one.run.output}")
        print(f"    log    tail -F {shlex.quote(str(job.paths.stdout))}")
    for number, some in zip(numbers[1:], jobs[1:], strict=True):
        print(f"job {number}, once {'each' if len(some) > 1 else 'that'} has succeeded: {some[0].script}")
    print(f"folder {folder}\nstate  squeue -j {','.join(numbers)}\nstop   scancel {' '.join(numbers)}  (saves first)\n"
          "The same command, submitted again, continues.", flush=True)


def run_here(folder: Path, executor: Any, job: Job) -> None:
    """Run a job on this machine to its end, which Ctrl-C and TERM bring about after a checkpoint."""
    print(shlex.join([job.script, *job.run.argv]))
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited by what starts now
    started = executor.submit(job)
    signal.signal(signal.SIGINT, handler)
    if isinstance(started, submitit.DebugJob):
        started.results()
        return
    print(f"    log    tail -F {shlex.quote(str(started.paths.stdout))}\nfolder {folder}", flush=True)
    process, stopped = started._process, list[int]()

    def stop(number: int, frame: FrameType | None) -> None:
        stopped.append(number)
        process.terminate()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    process.wait()
    for number, handler in before.items():  # between this job and the next a signal ends submit.py itself
        signal.signal(number, handler)
    if stopped:
        print(f"submit.py: error: stopped, {started.paths.stderr} says where; the same command continues",
              file=sys.stderr)
        raise SystemExit(128 + stopped[0])
    results = [started.task(i).paths.result_pickle for i in range(started.num_tasks)]
    if not all(path.exists() and submitit.core.utils.pickle_load(path)[0] == "success" for path in results):
        error = started.paths.stderr
        text = error.read_text(errors="replace") if error.exists() else ""
        lines = [line for line in text.splitlines() if "error: " in line]
        reason = f" ({lines[-1]})" if lines else ""
        raise common.Fault(f"{job.script} did not finish{reason}: see {error}; the same command continues")


if __name__ == "__main__":
    common.launch(main, parse_args)
