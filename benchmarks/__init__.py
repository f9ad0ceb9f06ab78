"""Headroom beside the tools that people use today: one run, one machine, one checkpoint, the same texts.

`python -m benchmarks` (or `make bench`) builds an environment for each peer, lets each compress the fine-tuned
checkpoint, and measures all of them and Headroom's own models in turns. What runs inside a peer's environment is in
`benchmarks.peers` and imports nothing of Headroom.

A task is a finished run: `--name reviews --task-artifacts FOLDER` measures another one, adds its section to the page
and keeps those of the tasks measured before.
"""
