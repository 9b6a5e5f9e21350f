"""Workloads, and a trainer for each library that is measured on them; used by `train_step.py`."""
