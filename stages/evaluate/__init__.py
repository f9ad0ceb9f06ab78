"""How good and how fast an exported model is on this machine, and what that is worth.

In: the exported ONNX model, or a cascade of two, the fine-tuned PyTorch model it descends from, the tokenized data
(test split).
Out: `metrics.json` (quality, its difference to the fine-tuned model with an interval, speed on ONNX Runtime and
OpenVINO, size, peak memory, both baselines, the share of the texts that a cascade passes on), `predictions.parquet`,
`confusion.csv`, `calibration.csv`.

Quality. Predictions come from ONNX Runtime on the CPU; how often OpenVINO gives the same label is reported beside
them. The difference to the fine-tuned model is taken on the same texts, with a paired bootstrap interval (Koehn 2004,
"Statistical significance tests for machine translation evaluation"; Efron & Tibshirani 1993). Calibration error is
the expected one (Guo et al., 1706.04599).

Choice. `runtime.json` says how to run the model on this machine, for latency and for throughput: the runtime, its
threads, how many inferences side by side, the precision of its float arithmetic, and how many tokens a batch may hold.
`headroom predict` goes by it. A precision that loses something, such as bfloat16, is chosen only if the share of
labels that it changes is within half of the quality floor.

PyTorch runs the same ONNX file, translated (`stages.core.torch_graph`), eagerly or compiled as params ask. Mostly it
cannot win, so that a short trial decides whether it takes part; `left_out` says how far it was behind.

Speed. Everything is timed from strings to predicted labels, tokenization included, with the same tokenizer for all.
Two baselines, always both, are the fine-tuned model in PyTorch float32: the *fair* one pads to the longest text in
the batch, the *naive* one pads everything to one length, as tutorials do. Each batch size (in texts of average length,
as a budget of tokens) and each way to share the processors is tried once; the best of each runtime then takes turns
with both baselines, in rounds of an order drawn anew. What counts is the ratio per round, with its least and greatest:
what the machine does meanwhile hits all contenders alike. Latency is that of one text at a time. Peak memory is that
of a fresh process that only serves.
"""
