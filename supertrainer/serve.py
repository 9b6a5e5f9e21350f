"""`python -m supertrainer.serve …`, the same as `supertrainer serve …`; as a module it can be called: `serve(cfg)`."""

import importlib
import sys

if __name__ == "__main__":
    sys.exit(importlib.import_module("supertrainer.cli").main(["serve", *sys.argv[1:]]))
