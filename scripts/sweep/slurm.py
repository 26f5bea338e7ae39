"""Trials as jobs of a Slurm cluster: an array for each batch of waiting ones, submitted through submitit.

Here is what runs where the sweep was started: submit, follow, tell. What runs on the nodes is in slurm_job.py, and
docs/slurm.md is for users. Jobs outlive this process: job.json in a trial's folder says which job has the trial, so
that the next call of the sweep follows it instead of submitting it again. Without accounting (`sacct`) the state of a
job is what squeue says, and that of a trial what its own files say.
"""
import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
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
PROGRAMS = ("sbatch", "srun", "squeue", "scontrol")
OVER = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED",
        "TIMEOUT")                      # states of jobs that do not run again by themselves


class Cluster(NamedTuple):
    parameters: dict                    # submitit's

    @property
    def parallel(self) -> int:
        return self.parameters["slurm_array_parallelism"]

    def __str__(self) -> str:
        words = {key: self.parameters[name] for key, (name, _) in KEYS.items() if name in self.parameters}
        return "Slurm (" + ", ".join(f"{key}={value}" for key, value in words.items()) + ")"


@dataclass
class Queued:
    """A trial with a job; `slot` is where it is, in words."""
    trial: Trial
    job: str                            # 12, or 12_3 of an array
    attempt: int
    state: str = "PENDING"
    slot: str = "queue"
    since: float = 0.0                  # when it was last seen in the queue, time.monotonic()


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
        ConfigError: sbatch refuses, or squeue cannot be asked before anything was submitted.
    """
    waiting, queued = [], []
    states = ask(out)                                                 # before anything is submitted twice
    if states is None:
        raise ConfigError("--slurm: squeue does not answer (sinfo says whether the cluster is up); nothing was "
                          "submitted")
    for trial in [trial for trial in trials if status_of(trial) not in FINAL]:
        job = _remembered(trial)
        if job and states.get(job, ("COMPLETED", ""))[0] not in OVER:
            queued.append(Queued(trial, job, 1, since=time.monotonic()))
            changed(trial, f"in the queue already, job {job}")
        else:
            waiting.append((trial, 1))
    signals, asked_at = Signals(), float("-inf")
    try:
        while not signals.count:
            if not waiting and len(queued) < cluster.parallel:
                waiting += [(trial, 1) for trial in more()]
            if not waiting and not queued:
                return True
            room = cluster.parallel - len(queued) if queued else len(waiting)      # an array keeps to it by itself
            if waiting and room > 0:
                batch, waiting = waiting[:room], waiting[room:]
                for each in submit(batch, cluster, out):
                    queued.append(each)
                    changed(each.trial, f"submitted, job {each.job}" + (", once more" if each.attempt > 1 else ""))
            time.sleep(LOOK_EVERY_S)
            if time.monotonic() - asked_at >= ASK_EVERY_S:
                asked_at, states = time.monotonic(), ask(out)
                for each in list(queued) if states is not None else ():
                    again = _follow(each, states, changed)
                    if again is not None:
                        queued.remove(each)
                        waiting += [(each.trial, each.attempt + 1)] if again else []
            going = [each for each in queued if each.state == "RUNNING"]
            look(going, len(waiting) + len(queued) - len(going))
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


def ask(out: Path) -> dict[str, tuple[str, str]] | None:
    """Job -> (state, nodes) of our jobs of this sweep, with those that ended lately; None without an answer."""
    done = subprocess.run(["squeue", "--me", "--states=all", "--array", "--noheader", "--format=%i|%T|%N|%j"],
                          capture_output=True, text=True)
    if done.returncode:
        return None
    lines = [line.split("|", 3) for line in done.stdout.splitlines() if line.count("|") >= 3]
    return {job: (state, nodes) for job, state, nodes, name in lines if name == job_name(out)}


def job_name(out: Path) -> str:
    return f"sweep-{out.resolve().name}".replace(" ", "_")


def submit(batch: list[tuple[Trial, int]], cluster: Cluster, out: Path) -> list[Queued]:
    """One array of all of them. Raises ConfigError when sbatch refuses."""
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    from scripts.sweep.slurm_job import Job
    parameters, cpus = dict(cluster.parameters), cluster.parameters.get("cpus_per_task")
    if "slurm_setup" in parameters:
        parameters["slurm_setup"] = [parameters["slurm_setup"]]
    executor = submitit.AutoExecutor((out / "slurm").resolve(), cluster="slurm",
                                     slurm_max_num_timeout=10**6)     # Job has a bound of its own
    executor.update_parameters(
        name=job_name(out), tasks_per_node=1, slurm_additional_parameters={"requeue": True},
        # from 22.05 on srun takes the processors of a task not from sbatch; one task that ends badly ends all
        slurm_srun_args=[*([f"--cpus-per-task={cpus}"] if cpus else []), "--kill-on-bad-exit=1"], **parameters)
    jobs = []
    for trial, attempt in batch:
        path = write(trial)
        (trial.folder / "failure.json").unlink(missing_ok=True)
        jobs.append(Job(trial._replace(folder=trial.folder.resolve()), path.resolve(),
                        cluster.parameters.get("gpus_per_node", 1), attempt))
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})           # Ctrl-C would reach sbatch, too
    try:
        submitted = executor.submit_array(jobs)
        for (trial, _), job in zip(batch, submitted):
            write_text(trial.folder / "job.json", json.dumps(dict(job=job.job_id)) + "\n")
    except (FailedJobError, FailedSubmissionError) as error:
        raise ConfigError("--slurm: sbatch refuses: " + " ".join(str(error).split())) from None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    return [Queued(trial, job.job_id, attempt, since=time.monotonic())
            for (trial, attempt), job in zip(batch, submitted)]


def _remembered(trial: Trial) -> str | None:
    try:
        return json.loads((trial.folder / "job.json").read_text())["job"]
    except (OSError, KeyError, json.JSONDecodeError):
        return None


def _follow(each: Queued, states: dict[str, tuple[str, str]], changed: Callable[[Trial, str], None]) -> bool | None:
    """Note what squeue says of a job; None while it goes on, at its end whether to submit the trial again."""
    state, nodes = states.get(each.job, (None, ""))
    if state is not None and state not in OVER:
        before, each.state, each.since = each.state, state, time.monotonic()
        if state == "RUNNING" != before:
            each.slot = nodes
            changed(each.trial, f"started on {nodes}, job {each.job}")
        elif state == "PENDING" != before:
            changed(each.trial, f"stopped, in the queue again, job {each.job}")
        return None
    status = status_of(each.trial)
    if status == "running" or (state is None and status not in FINAL and time.monotonic() - each.since < MISSING_S):
        return None                                                   # shared file systems tell late
    if status in FINAL:
        changed(each.trial, status.replace("_", " "))
        return False
    if state == "CANCELLED":
        changed(each.trial, f"cancelled, job {each.job}")
        return False
    failure = failure_of(each.trial)
    if failure is None:
        failure = note_failure(each.trial, None, f"job {each.job} ended: {state or 'gone from the queue'}")
    changed(each.trial, f"{failure['status']}, {failure['error']} ({each.trial.folder / 'output.txt'})")
    return failure["status"] == "crashed" and each.attempt < ATTEMPTS
