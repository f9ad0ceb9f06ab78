"""How good and how fast an exported model is on this machine, and what that is worth.

In: the exported ONNX model, or a cascade of two, the fine-tuned PyTorch model it descends from, the tokenized data
(test split).
Out: `metrics.json` (quality, its difference to the fine-tuned model with an interval, speed on ONNX Runtime and
OpenVINO, size, memory, cost, slices, gaps between groups, both baselines, the share of the texts that a cascade passes
on), `predictions.parquet`, `confusion.csv`, `calibration.csv`, `slices.csv`, `latency.csv`,
`throughput_batch.csv`, `throughput_length.csv`.

Quality. Predictions come from ONNX Runtime on the CPU; how often OpenVINO gives the same label is reported beside
them. The difference to the fine-tuned model is taken on the same texts, with a paired bootstrap interval (Koehn 2004,
"Statistical significance tests for machine translation evaluation"; Efron & Tibshirani 1993). Calibration error is
the expected one (Guo et al., 1706.04599).

Slices. Every value of the user's columns, every rule of the user's, each label, and groups by length and by rarity of
the words are compared with the fine-tuned model on their own: an interval for paired shares (Bonett & Price 2012), an
exact one-sided test (McNemar's) corrected by Holm (1979) for how many slices were looked at, those that compression
hurt most first. Rates and the gaps between groups come from fairlearn (Weerts et al., 2303.16626): accuracy,
demographic parity, equalized odds (Hardt et al., 1610.02413), with bootstrap intervals, and how much wider they became.

Choice. `runtime.json` says how to run the model on this machine, for latency and for throughput: the runtime, its
threads, how many inferences side by side, and how many tokens a batch may hold. `headroom predict` goes by it.

Speed. Everything is timed from strings to predicted labels, tokenization included, with the same tokenizer for all.
Two baselines, always both, are the fine-tuned model in PyTorch float32: the *fair* one pads to the longest text in
the batch, the *naive* one pads everything to one length, as tutorials do. Each batch size (in texts of average length,
as a budget of tokens) and each way to share the processors is tried once; the best of each runtime then takes turns
with both baselines, in rounds of an order drawn anew. What counts is the ratio per round, with its least and greatest:
what the machine does meanwhile hits all contenders alike. Latency is that of one text at a time.

Cost. A fresh process that only serves tells its peak and resident memory, and the time from its start to its first
answer. Throughput over batch size and over length is measured on the fastest runtime. The operations of a text are
counted in the ONNX graph (products with weights; two a multiply-add). Beside them stands what this machine reaches in
products of large matrices in fp32, bf16 and int8, measured in the same minute, and the share of it that the variant
uses: the roofline's compute roof (Williams et al. 2009). Energy is told where the machine counts it, and a price where
the params have one for an hour.
"""
