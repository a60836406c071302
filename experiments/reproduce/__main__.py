"""The command line: words are claims, or hh; the rest is --key=value."""
import itertools
import sys

from experiments.reproduce import hh, report
from support import cli


def command():
    arguments = sys.argv[1:]
    words = list(itertools.takewhile(lambda word: not word.startswith("-"), arguments))
    options = arguments[len(words):]
    if words == ["hh"]:
        sys.argv[1:] = options
        cli.run(hh.main, hh.Settings)
    else:
        sys.argv[1:] = [*([f"--claims={','.join(words)}"] if words else []), *options]
        cli.run(report.main, report.Settings)


if __name__ == "__main__":
    command()
