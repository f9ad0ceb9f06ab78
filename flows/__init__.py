"""Orchestration: the only code that knows Prefect, DVC's graph and the model registry."""
