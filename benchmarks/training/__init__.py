"""The training engine beside the transformers Trainer: one machine, one run, the same model, texts and batches.

`python -m benchmarks.training` (or `make bench-training`) trains a masked language model and a classifier with both,
each run in a process of its own, in turns. Read in this order: `settings` says what is trained, `prepare` makes the
folder that all share, `engine` runs Headroom's own stages in it and `peer` the Trainer, `watch` holds the clock of
both, `summary` and `page` tell what came out. What runs in a contender's process starts in `worker`.

Headroom is called as a user calls it: the stage's command as `dvc.yaml` has it, with a `params.yaml`. Only
`stages.core.training.loop.train` is wrapped, to start the clock and to stop it while the stage evaluates.
"""
