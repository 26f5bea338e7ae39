"""A command line whose mistakes are one line: what argparse finds, and the exit code 2."""
import argparse
import sys


class Parser(argparse.ArgumentParser):
    """argparse, without the usage before an error and with its text as it is written."""

    def __init__(self, prog: str, description: str):
        super().__init__(prog=prog, description=description, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str):
        print(f"error: {message} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(2)


def at_least(least: int):
    """An argparse type: a whole number from `least` on."""
    def number(word: str) -> int:
        if not word.isdecimal() or int(word) < least:
            raise argparse.ArgumentTypeError(f"{word!r} is not a whole number from {least} on")
        return int(word)
    return number
