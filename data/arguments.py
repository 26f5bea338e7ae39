"""A command line whose mistakes are one line."""
import argparse
import os
import sys


class Parser(argparse.ArgumentParser):
    """argparse, with the description as it is written, and of a mistake one line and exit code 2."""

    def __init__(self, prog: str, description: str):
        super().__init__(prog=prog, description=description, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str):
        print(f"error: {message} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(2)


def exit_with(main) -> None:
    """End the process with the code that main() returns, and with 130 and one line on Ctrl-C."""
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:
        code = _reader_gone()
    except KeyboardInterrupt:
        print("interrupted; nothing was left half-written", file=sys.stderr)
        code = 130
    sys.exit(code)


def or_refused(main, argv: list[str]) -> int:
    """The code that main(argv) returns; 2 and a line for each problem where our own code refuses its input."""
    try:
        code = main(argv)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        return _reader_gone()
    except ValueError as error:                 # refusals are subclasses of it: ConfigError, ShardError, ...
        if type(error).__module__.split(".")[0] not in ("scripts", "harness", "data", "optim", "model"):
            raise
        print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return 2


def _reader_gone() -> int:
    """What reads our output has had enough, as `head` does: nobody is told, and the code is the shell's own for it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())    # nor when Python flushes at its end
    return 141


def line_of(error: Exception) -> str:
    """What an exception says, on one line; of the system's errors the file and the reason."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


def at_least(least: int):
    """An argparse type: a whole number from `least` on."""
    def number(word: str) -> int:
        if not word.isdecimal() or int(word) < least:
            raise argparse.ArgumentTypeError(f"{word!r} is not a whole number from {least} on")
        return int(word)
    return number
