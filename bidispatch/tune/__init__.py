"""Tuning: the fastest rungs of one numerics class for a shape on this GPU, each compared bit by bit before it is kept.

models: a model's shapes. ladder: winners become rungs. search: what is tried and timed for one shape. proof: how
winners are compared. runner: all shapes, with a budget, into a file that a profile rule names under `tuned`.
"""
