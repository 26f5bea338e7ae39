"""A trial on the nodes of its Slurm job: one of these on each node, started by srun, with train.py as its child.

What asks a job to stop, and what the trainer hears of it (it finishes its step, saves, and exits with 75):

    the time limit is near     Slurm sends SIGUSR2      -> SIGUSR1
    scontrol requeue, scancel, preemption               -> SIGTERM, which Slurm sends to the trainer, too
    somebody signals the trainer itself

After each of them the job requeues itself, unless Slurm is ending or has requeued it already, and continues by
`--resume auto` when it starts again. The trial's folder is locked meanwhile as it is without Slurm (run.py).
"""
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import submitit
from submitit.core.utils import DelayedSubmission

from harness.checkpoint import step_of
from harness.processes import EXIT_REQUEUE
from harness.rundir import ResumeError, hold, is_held, state_of
from scripts.sweep.pack import Slot
from scripts.sweep.plan import Trial
from scripts.sweep.results import FINAL, note_failure, run_of, status_of
from scripts.sweep.run import tell, train_command

IDLE_STARTS = 3                         # as often a job may stop without a further checkpoint before it gives up
REQUEUES, BETWEEN_S = 100, 3.0          # tries while slurmctld is away; scontrol itself waits for it for seconds
FIRST_PORT, PORTS = 12000, 20000        # of rendezvous: below Linux's own choices, which begin at 32768
PREEMPT = getattr(signal, f"SIG{submitit.JobEnvironment.USR_SIG}")
PLACES = Path(tempfile.gettempdir()) / f"sweep-{os.getuid()}"         # this node's: one for each of our jobs on it


@dataclass
class Job:
    trial: Trial
    config: Path
    gpus: int                           # processes on each node
    attempt: int
    saved: int = -1                     # the newest checkpoint's step when it stopped last
    idle: int = 0                       # stops since with no newer one

    def __call__(self) -> None:
        self.process, self.stopping = None, False
        job, requeue = submitit.JobEnvironment(), signal.getsignal(PREEMPT)
        for number in (PREEMPT, signal.SIGTERM):
            signal.signal(number, self._stop)
        if status_of(self.trial) in FINAL:                            # the node failed after the trial's end, say
            return
        summary = self._summary_written()
        code = self._train(job)
        if job.global_rank:                                           # the first node's judges
            return
        if status_of(self.trial) in FINAL:
            return
        stopped = code == EXIT_REQUEUE or (self._summary_written() != summary             # torchrun's is 1
                                           and state_of(run_of(self.trial)) == "stopped")
        if not (stopped or self.stopping):
            self._fail(code)
        for _ in range(REQUEUES):
            if not _is_running(job.job_id):
                return
            with suppress(subprocess.SubprocessError):
                requeue(PREEMPT, None)            # submitit's: checkpoint() below, scontrol requeue; does not return
            time.sleep(BETWEEN_S)

    def checkpoint(self) -> DelayedSubmission | None:
        """What the job does at its next start; None, and a failure.json, where starting again leads nowhere."""
        saved = max(map(step_of, self.trial.folder.glob("*/checkpoints/step_*.pt")), default=-1)
        idle = 0 if saved > self.saved else self.idle + 1
        if idle >= IDLE_STARTS:
            error = f"stopped {idle} times without a newer checkpoint; give it more time="
            note_failure(self.trial, EXIT_REQUEUE, error)
            return None
        return DelayedSubmission(replace(self, saved=saved, idle=idle))

    def _train(self, job: submitit.JobEnvironment) -> int:
        """Run train.py, under torchrun where there are several processes; its exit code."""
        each = f".{job.node}" if job.node else ""
        with _slot(self.gpus) as slot, open(self.trial.folder / f"output{each}.txt", "a") as output, \
                (hold(self.trial.folder) if job.node == 0 else open(os.devnull)) as lock:
            if self.attempt > 1:                                      # a damaged cache may be why it crashed
                shutil.rmtree(slot.caches(PLACES), ignore_errors=True)
            self.process = subprocess.Popen(
                train_command(self._launcher(job), self.config), stdin=lock, stdout=output, stderr=subprocess.STDOUT,
                env={**os.environ, **slot.environment(PLACES)}, preexec_fn=_ignore)
            if self.stopping:
                tell(self.process, signal.SIGTERM)
            code, self.process = self.process.wait(), None            # that number may be another's from now on
            return code

    def _launcher(self, job: submitit.JobEnvironment) -> list[str]:
        if self.gpus * job.num_nodes == 1:
            return []
        number = int(job.raw_job_id)
        return ["-m", "torch.distributed.run", f"--nnodes={job.num_nodes}", f"--nproc_per_node={self.gpus}",
                "--rdzv_backend=c10d", f"--rdzv_endpoint={job.hostnames[0]}:{FIRST_PORT + number % PORTS}",
                f"--rdzv_id={number}-{os.environ.get('SLURM_RESTART_COUNT', 0)}"]

    def _stop(self, number: int, frame) -> None:
        self.stopping = True
        if self.process is not None:
            tell(self.process, signal.SIGUSR1 if number == PREEMPT else signal.SIGTERM)

    def _summary_written(self) -> int | None:
        run = run_of(self.trial)
        summary = run and run / "summary.json"
        return summary.stat().st_mtime_ns if summary and summary.exists() else None

    def _fail(self, code: int) -> None:
        note_failure(self.trial, code)
        sys.exit(1)                                                   # for srun: it ends the other nodes' tasks


def _ignore() -> None:
    """Slurm signals every process of a step, and this one would end those that do not know it."""
    signal.signal(PREEMPT, signal.SIG_IGN)


def _is_running(job: str) -> bool:
    """Whether Slurm means to let this job go on: no one cancelled it or had it requeued.

    Args:
        job: 12, or 12_3: the last one of an array has SLURM_JOB_ID=12, which to squeue is the whole array.
    """
    done = subprocess.run(["squeue", "--noheader", f"--jobs={job}", "--format=%T"], capture_output=True, text=True)
    return done.stdout.strip() in ("RUNNING", "") if done.returncode == 0 else True


@contextmanager
def _slot(processes: int) -> Iterator[Slot]:
    """The first place on this node that no other job of ours has, so that compile caches, which are the node's own,
    are warm and nobody else's."""
    cores = int(os.environ.get("SLURM_CPUS_PER_TASK", 0)) or len(os.sched_getaffinity(0))
    for number in range(10_000):
        place = PLACES / str(number)
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        if is_held(place):
            continue
        try:
            lock = hold(place)
        except ResumeError:                                           # another job was faster
            continue
        with lock:
            yield Slot(number, (), (), max(1, cores // processes))
        return
