"""What crosses a stage boundary: table contracts, the run configuration, partition identities.

Imports no engine, so that Spark, Ray, PyTorch and a scheduler can all read the same contracts.
"""
