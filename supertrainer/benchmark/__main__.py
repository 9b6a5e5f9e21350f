"""`python -m supertrainer.benchmark …`, the same as `supertrainer benchmark …`."""

import importlib
import sys

if __name__ == "__main__":
    # by name: the command line stands on a higher floor, and only the interpreter's -m comes this way
    sys.exit(importlib.import_module("supertrainer.cli").main(["benchmark", *sys.argv[1:]]))
