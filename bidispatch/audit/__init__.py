"""Audits: every op a forward runs, and whether anything proves that its bits do not follow the batch.

rowlocal: which plain torch ops are exact or row-local, and why. trace: seeing every op of a run, and its verdict.
models: the forwards that can be audited.
"""
