"""Trials as processes: one to a slot, retried once, stopped and continued by the trainer's own exit code.

Each has its folder's lock as standard input, from before it exists, so that the lock is held exactly as long as one of
its processes is there, torchrun's workers too, to whom standard input is all that it hands on; and nobody needs to
have read, written or imported anything yet for the next call of a killed sweep to see it.
"""
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from harness.processes import EXIT_REQUEUE
from harness.rundir import PROJECT, hold
from scripts.sweep.pack import Slot
from scripts.sweep.plan import Trial, write
from scripts.sweep.results import FINAL, note_failure, status_of

ATTEMPTS = 2                            # of a trial that crashes, in one call of the sweep
LOOK_EVERY_S = 0.2
PR_SET_PDEATHSIG = 1                    # <sys/prctl.h>


@dataclass
class Going:
    trial: Trial
    slot: Slot
    attempt: int
    process: subprocess.Popen


class Signals:
    """SIGINT, SIGTERM and SIGUSR1 ask every trial to save and end; a second one ends them at once."""

    def __init__(self):
        self.count = 0
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        self.before = {number: signal.signal(number, self._note) for number in numbers}

    def _note(self, number, frame) -> None:
        self.count += 1

    def close(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def run(trials: list[Trial], slots: list[Slot], out: Path, changed: Callable[[Trial, str], None],
        look: Callable[[list[Going], int], None], more: Callable[[], list[Trial]]) -> bool:
    """Run what is not finished yet; whether all of it was tried (False: a signal came first).

    Args:
        changed: called with a trial and what became of it, in words, whenever its status changes.
        look: called with the running trials and the number of waiting ones, five times a second; it may `end` some.
        more: called when there is room and nothing waits; trials to add, or none.
    """
    waiting = [(trial, 1) for trial in trials if status_of(trial) not in FINAL]
    going, told, free, asked, left = [], 0, list(slots), False, set()
    signals = Signals()
    try:
        while True:
            if free and not waiting and not signals.count and not asked:
                waiting += [(trial, 1) for trial in more()]
                asked = not waiting                                   # there are more when another trial has ended
            if not going and (signals.count or not waiting):
                break
            for trial, attempt in list(waiting) if free and not signals.count else ():
                status = status_of(trial)
                if status == "running" and trial.name not in left:
                    left.add(trial.name)
                    changed(trial, "still running, left over from an earlier call; waiting for its end")
                if status == "running" or not free:
                    continue
                waiting.remove((trial, attempt))
                if status in FINAL:
                    asked = False
                    changed(trial, status.replace("_", " "))
                    continue
                going.append(_start(trial, free.pop(0), attempt, out))
                changed(trial, f"started on {going[-1].slot}" + (", once more" if attempt > 1 else ""))
            time.sleep(LOOK_EVERY_S)
            if signals.count > told:
                told = signals.count
                for each in going:
                    tell(each.process, signal.SIGTERM if told == 1 else signal.SIGKILL)
            for each in [each for each in going if each.process.poll() is not None]:
                going.remove(each)
                asked = False
                free = sorted([*free, each.slot])
                status, again = _ended(each, bool(signals.count))
                if again:
                    waiting.insert(0, (each.trial, each.attempt + 1))
                changed(each.trial, status)
            look(going, len(waiting))
    finally:
        for each in going:                                            # an error of our own: nobody is left alone
            end(each)
        signals.close()
    return not signals.count


def end(going: Going) -> None:
    """Ask a trial to save and end."""
    tell(going.process, signal.SIGTERM)


def tell(process: subprocess.Popen, number: int) -> None:
    """Signal the trainer, or those under torchrun: itself it would give them 30 s to save, and its death no notice."""
    pids, several = [process.pid], "torch.distributed.run" in process.args
    try:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split() if several else []
    except OSError:                                                   # it has just ended, or this is no Linux
        children = []
    for pid in [*children, *pids] if number == signal.SIGKILL else children or pids:
        try:
            os.kill(int(pid), number)
        except ProcessLookupError:
            pass


def _start(trial: Trial, slot: Slot, attempt: int, out: Path) -> Going:
    trial.folder.mkdir(parents=True, exist_ok=True)
    with hold(trial.folder) as lock, open(trial.folder / "output.txt", "a") as output:
        config = write(trial)
        (trial.folder / "failure.json").unlink(missing_ok=True)
        if attempt > 1:                                               # a damaged cache may be why it crashed
            shutil.rmtree(slot.caches(out), ignore_errors=True)
        process = subprocess.Popen(
            train_command(slot.launcher(), config), stdin=lock, stdout=output, stderr=subprocess.STDOUT,
            env={**os.environ, **slot.environment(out)}, start_new_session=True, preexec_fn=settle(slot))
    return Going(trial, slot, attempt, process)


def train_command(launcher: list[str], config: Path) -> list[str]:
    return [sys.executable, *launcher, str(PROJECT / "train.py"), "--config", str(config), "--resume", "auto"]


def settle(slot: Slot) -> Callable[[], None]:
    """For the new process, before it becomes the trial: its cores, and SIGTERM should we be killed."""
    parent = os.getpid()
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None

    def in_child():
        if slot.cores:
            os.sched_setaffinity(0, slot.cores)
        if libc is not None:
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:                                # killed already
                os._exit(EXIT_REQUEUE)
    return in_child


def _ended(going: Going, stopping: bool) -> tuple[str, bool]:
    """(What became of it, whether to try again.) Under torchrun every exit code of a failure is 1: its files say."""
    trial, code, status = going.trial, going.process.returncode, status_of(going.trial)
    if status in FINAL:
        return status.replace("_", " "), False
    if stopping or code == EXIT_REQUEUE:
        return "stopped", not stopping and going.attempt < ATTEMPTS
    failure = note_failure(trial, code)
    again = failure["status"] == "crashed" and going.attempt < ATTEMPTS
    return f"{failure['status']}, {failure['error']} ({trial.folder / 'output.txt'})", again
