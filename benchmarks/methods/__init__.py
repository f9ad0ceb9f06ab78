"""What each way to fine-tune gives: one model a method and seed, judged on the test split.

`python -m benchmarks.methods` works on the artifacts of a finished run and starts from its pretrained checkpoint. Every
training is a process of its own and adds a line to `results.jsonl` when it is done, so that the whole can be stopped
and goes on where it stopped. Each call renders the table of all tasks measured so far anew.
"""
