"""Trials as jobs of a Slurm cluster: an array for each batch of waiting ones, submitted through submitit.

Here is what runs where the sweep was started: submit, follow, tell. What runs on the nodes is in slurm_job.py, and
docs/slurm.md is for users. Jobs outlive this process: job.json in a trial's folder says which job has the trial, so
that the next call of the sweep follows it instead of submitting it again. Without accounting (`sacct`) the state of a
job is what squeue says, and that of a trial what its own files say. slurmctld may be busy or away for a while: once
there are jobs, what fails is told and tried again.
"""
import io
import json
import re
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from harness.rundir import write_text
from harness.yaml_tree import ConfigError
from scripts.sweep.plan import Trial, write
from scripts.sweep.results import FINAL, failure_of, note_failure, status_of
from scripts.sweep.run import ATTEMPTS, Signals

ASK_EVERY_S = 10.0                      # squeue: every controller on a cluster asks the one slurmctld
LOOK_EVERY_S = 1.0                      # at the files of running trials
MISSING_S = 60.0                        # a job that squeue leaves out may be new, or about to be requeued

# What may stand after --slurm -> submitit's parameter, and how to read the value.
KEYS = {"partition": ("slurm_partition", str), "account": ("slurm_account", str), "qos": ("slurm_qos", str),
        "time": ("timeout_min", int), "nodes": ("nodes", int), "gpus_per_node": ("gpus_per_node", int),
        "cpus_per_task": ("cpus_per_task", int), "mem_gb": ("mem_gb", int), "gres": ("slurm_gres", str),
        "constraint": ("slurm_constraint", str), "nodelist": ("slurm_nodelist", str),
        "exclude": ("slurm_exclude", str), "setup": ("slurm_setup", str),
        "signal_delay_s": ("slurm_signal_delay_s", int), "parallel": ("slurm_array_parallelism", int)}
DEFAULTS = {"timeout_min": 60, "nodes": 1, "slurm_array_parallelism": 256}
PROGRAMS = ("sbatch", "srun", "squeue", "scontrol", "scancel")
OVER = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED",
        "TIMEOUT")                      # states of jobs that do not run again by themselves
PASSING = ("COMPLETING", "CONFIGURING")                 # between two states that are told


class Cluster(NamedTuple):
    parameters: dict                    # submitit's

    @property
    def parallel(self) -> int:
        return self.parameters["slurm_array_parallelism"]

    def __str__(self) -> str:
        words = {key: self.parameters[name] for key, (name, _) in KEYS.items() if name in self.parameters}
        return "Slurm (" + ", ".join(f"{key}={value}" for key, value in words.items()) + ")"


class Seen(NamedTuple):
    """What squeue says of a job."""
    name: str
    state: str
    reason: str                         # why it waits
    nodes: str


@dataclass
class Queued:
    """A trial with a job; `slot` is where it is, in words."""
    trial: Trial
    job: str                            # 12, or 12_3 of an array
    attempt: int
    state: str = "PENDING"              # as squeue has it, or HELD
    slot: str = "queue"
    since: float = 0.0                  # when it was last seen in the queue, time.monotonic()


class SlurmError(ConfigError):
    """Slurm refuses, or does not answer."""


def cluster(words: list[str], jobs: int | None) -> Cluster:
    """What `--slurm KEY=VALUE ...` asks for; `jobs` is --jobs, another name for `parallel`.

    Raises:
        ConfigError: an unknown key or a value that is none, no Slurm here, no submitit.
    """
    said = {}
    for word in words:
        key, _, value = word.partition("=")
        if key not in KEYS or not value:
            raise ConfigError(f"--slurm {word}: expected KEY=VALUE with a key of {', '.join(KEYS)}")
        name, kind = KEYS[key]
        if kind is int and not (value.isdecimal() and int(value) >= 1):
            raise ConfigError(f"--slurm {word}: expected a whole number from 1 on")
        said[name] = kind(value)
    if jobs is not None and said.setdefault("slurm_array_parallelism", jobs) != jobs:
        raise ConfigError("--jobs and --slurm parallel=N say the same; leave one out")
    if missing := [name for name in PROGRAMS if shutil.which(name) is None]:
        raise ConfigError(f"--slurm: no {missing[0]} in PATH; run this on a login node of a Slurm cluster, or leave "
                          "--slurm out")
    try:
        import submitit  # noqa: F401
    except ImportError:
        raise ConfigError("--slurm needs submitit: python -m pip install submitit") from None
    return Cluster({**DEFAULTS, **said})


def run(trials: list[Trial], cluster: Cluster, out: Path, changed: Callable[[Trial, str], None],
        look: Callable[[list[Queued], int], None], more: Callable[[], list[Trial]], say: Callable[[str], None]) -> bool:
    """Like run.run, with jobs of `cluster` for processes; a signal leaves them in the queue.

    Raises:
        SlurmError: squeue does not answer, or sbatch refuses, and nothing was in the queue yet.
    """
    waiting, queued = [], []
    jobs = ask()                                                      # before anything is submitted twice
    for trial in [trial for trial in trials if status_of(trial) not in FINAL]:
        if job := _job_of(trial, jobs):
            queued.append(Queued(trial, job, 1, since=time.monotonic()))
            changed(trial, f"in the queue already, job {job}")
        else:
            waiting.append((trial, 1))
    largest, begun, trouble, asked_at, signals = largest_array(), bool(queued), "", float("-inf"), Signals()
    try:
        while not signals.count:
            if time.monotonic() - asked_at >= ASK_EVERY_S:
                asked_at = time.monotonic()
                try:
                    jobs = ask()
                    waiting += _ended(queued, jobs, changed)
                    if not waiting and len(queued) < cluster.parallel:
                        waiting += [(trial, 1) for trial in more()]
                    if not waiting and not queued:
                        return True
                    while (batch := waiting[:_room(queued, cluster, largest)]) and not signals.count:
                        for each in submit(batch, cluster, out, jobs):
                            queued.append(each)
                            changed(each.trial, f"submitted, job {each.job}" + ", once more" * (each.attempt > 1))
                        waiting, begun = waiting[len(batch):], True
                    if trouble:
                        say("Slurm answers again")
                    trouble = ""
                except SlurmError as error:
                    if not begun:
                        raise
                    if str(error) != trouble and not signals.count:   # Ctrl-C reaches squeue, too
                        trouble = str(error)
                        say(f"{trouble}; jobs go on, asking again every {ASK_EVERY_S:g} s")
                    for each in queued:                               # nobody said that they are gone
                        each.since = time.monotonic()
            going = [each for each in queued if each.state == "RUNNING"]
            look(going, len(waiting) + len(queued) - len(going))
            time.sleep(LOOK_EVERY_S)
    finally:
        signals.close()
        if queued:
            arrays = " ".join(dict.fromkeys(each.job.partition("_")[0] for each in queued))
            say(f"{len(queued)} trials stay in Slurm's queue, and the same command follows them again; to cancel them: "
                f"scancel {arrays}")
    return False


def end(each: Queued) -> None:
    """Ask a running trial to save and end."""
    subprocess.run(["scancel", "--signal=TERM", each.job], capture_output=True)


def ask() -> dict[str, Seen]:
    """Our jobs, also those that ended lately, by their numbers. Raises SlurmError."""
    lines = _asked("squeue", "--me", "--states=all", "--array", "--noheader", "--format=%i|%T|%r|%N|%j").splitlines()
    return {job: Seen(name, state, reason, nodes)
            for job, state, reason, nodes, name in (line.split("|", 4) for line in lines if line.count("|") >= 4)}


def largest_array() -> int:
    """Jobs that one array may have."""
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", _asked("scontrol", "show", "config"), re.MULTILINE)
    return max(1, int(found[1])) if found else 1


def _asked(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise SlurmError(f"{command[0]} does not answer: {said} (sinfo says whether the cluster is up)")
    return done.stdout


def _room(queued: list[Queued], cluster: Cluster, largest: int) -> int:
    """How many trials the next array takes: the first one all that it can, since it keeps to `parallel` by itself."""
    return max(0, min(cluster.parallel - len(queued), largest)) if queued else largest


def submit(batch: list[tuple[Trial, int]], cluster: Cluster, out: Path, jobs: dict[str, Seen]) -> list[Queued]:
    """One array of all of them. Which job has a trial is noted in two steps: under what name before it is submitted,
    for a call that does not live to see its number, then that. `jobs` is what squeue said last.

    Raises:
        SlurmError: sbatch refuses.
    """
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    from scripts.sweep.slurm_job import Job
    if lost := [job for trial, _ in batch if (job := _job_of(trial, jobs))]:
        _asked("scancel", *lost)                  # sbatch failed, but they are there: submitit left them nothing to do
    parameters, cpus = dict(cluster.parameters), cluster.parameters.get("cpus_per_task")
    if "slurm_setup" in parameters:
        parameters["slurm_setup"] = [parameters["slurm_setup"]]
    name = f"sweep-{out.resolve().name}-{uuid.uuid4().hex[:8]}".replace(" ", "_")
    executor = submitit.AutoExecutor((out / "slurm").resolve(), cluster="slurm",
                                     slurm_max_num_timeout=10**6)     # Job has a bound of its own
    executor.update_parameters(
        name=name, tasks_per_node=1, slurm_additional_parameters={"requeue": True},
        # from 22.05 on srun takes the processors of a task not from sbatch; one task that ends badly ends all
        slurm_srun_args=[*([f"--cpus-per-task={cpus}"] if cpus else []), "--kill-on-bad-exit=1"], **parameters)
    started = []
    for number, (trial, attempt) in enumerate(batch):
        path = write(trial)
        (trial.folder / "failure.json").unlink(missing_ok=True)
        _note(trial, name=name, task=str(number) if len(batch) > 1 else "")
        started.append(Job(trial._replace(folder=trial.folder.resolve()), path.resolve(),
                           cluster.parameters.get("gpus_per_node", 1), attempt))
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})           # Ctrl-C would reach sbatch, too
    try:
        with redirect_stderr(io.StringIO()):                          # where submitit repeats what it raises
            submitted = executor.submit_array(started)
    except (FailedJobError, FailedSubmissionError) as error:
        raise SlurmError("sbatch refuses: " + " ".join(str(error).split())) from None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    for (trial, _), job in zip(batch, submitted):
        _note(trial, job=job.job_id)
    return [Queued(trial, job.job_id, attempt, since=time.monotonic())
            for (trial, attempt), job in zip(batch, submitted)]


def _note(trial: Trial, **which: str) -> None:
    write_text(trial.folder / "job.json", json.dumps(which) + "\n")


def _job_of(trial: Trial, jobs: dict[str, Seen]) -> str | None:
    """The job that has the trial and is not over."""
    try:
        noted = json.loads((trial.folder / "job.json").read_text())
    except (OSError, json.JSONDecodeError):
        return None
    for job, seen in jobs.items():
        if (job == noted.get("job") or (seen.name, job.partition("_")[2]) == (noted.get("name"), noted.get("task"))) \
                and seen.state not in OVER:
            return job
    return None


def _ended(queued: list[Queued], jobs: dict[str, Seen],
           changed: Callable[[Trial, str], None]) -> list[tuple[Trial, int]]:
    """Take out those whose jobs ended; (trial, attempt) of what is to be submitted again."""
    again = []
    for each in list(queued):
        once_more = _follow(each, jobs.get(each.job), changed)
        if once_more is not None:
            queued.remove(each)
            again += [(each.trial, each.attempt + 1)] if once_more else []
    return again


def _follow(each: Queued, seen: Seen | None, changed: Callable[[Trial, str], None]) -> bool | None:
    """Note what squeue says of a job; None while it goes on, at its end whether to submit the trial again."""
    if seen and seen.state not in OVER:
        before, each.since = each.state, time.monotonic()
        each.state = "HELD" if "held" in seen.reason.lower() and seen.state != "RUNNING" else seen.state
        if each.state == before or each.state in PASSING:
            return None
        if each.state == "RUNNING":
            each.slot = seen.nodes
            changed(each.trial, f"started on {seen.nodes}, job {each.job}")
        elif each.state == "PENDING":
            changed(each.trial, f"in the queue again, job {each.job}")
        elif each.state == "HELD":
            changed(each.trial, f"held in the queue ({seen.reason}); to let it go on: scontrol release {each.job}")
        else:
            changed(each.trial, f"{each.state.lower().replace('_', ' ')}, job {each.job}")
        return None
    status = status_of(each.trial)
    if status == "running" or (seen is None and status not in FINAL and time.monotonic() - each.since < MISSING_S):
        return None                                                   # shared file systems tell late
    if status in FINAL:
        changed(each.trial, status.replace("_", " "))
        return False
    if seen and seen.state == "CANCELLED":
        changed(each.trial, f"cancelled, job {each.job}")
        return False
    failure = failure_of(each.trial)
    if failure is None:
        ended = f"job {each.job} ended: {seen.state if seen else 'gone from the queue'}"
        failure = note_failure(each.trial, None, ended)
    changed(each.trial, f"{failure['status']}, {failure['error']} ({each.trial.folder / 'output.txt'})")
    return failure["status"] == "crashed" and each.attempt < ATTEMPTS
