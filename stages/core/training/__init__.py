"""The training engine of every stage that trains: pretraining, fine-tuning, distillation, recovery, rounding.

Read in this order: `recipe` says what is trained, `loop` trains it, and each further module is one thing the loop asks
for: `optimizers`, `schedules`, `precision`, `averaging`, `prefetch`, `generators`, `state`, `faults`, `memory`; for its
speed `processors` (attention, dropout), `embeddings`, `compiling` and `throughput`; `devices` where there are several.
"""
