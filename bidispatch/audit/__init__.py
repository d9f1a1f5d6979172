"""Audits: every op a forward runs, and whether anything proves that its bits do not follow the batch.

trace: seeing every op of a run, and its verdict (by `bidispatch.rowlocal`). models: the forwards that can be audited.
"""
