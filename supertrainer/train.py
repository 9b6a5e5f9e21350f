"""`python -m supertrainer.train …`, the same as `supertrainer train …`; as a module it can be called: `train(cfg)`."""

import importlib
import sys

if __name__ == "__main__":
    sys.exit(importlib.import_module("supertrainer.cli").main(["train", *sys.argv[1:]]))
