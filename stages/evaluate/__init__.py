"""How good and how fast an exported model is on this machine, and what that is worth.

In: the exported ONNX model, or a cascade of two; its parent, the exported model that it was made from (for the first,
the fine-tuned checkpoint); the fine-tuned PyTorch model, which is the reference of all; the tokenized data.
Out: `metrics.json` (quality, its difference to the fine-tuned model and to the parent with intervals and tests,
clusters, calibration before and after a temperature, slices, gaps between groups, speed on every runtime, size, memory,
cost, both baselines, the share of the texts that a cascade passes on), `predictions.parquet`, `confusion.csv`,
`flips.csv` (every answer that is not the parent's or the reference's), `calibration.csv` and `calibration_scaled.csv`
(the reliability curve, and that at the fitted temperature), `embeddings.parquet` (the map of the test texts),
`slices.csv`, `latency.csv`, `throughput_batch.csv`, `throughput_length.csv`, `runtime.json`.

Quality. Predictions come from ONNX Runtime on the CPU; how often OpenVINO gives the same label is reported beside
them. Differences are taken on the same texts: a paired bootstrap with BCa intervals (Koehn 2004, "Statistical
significance tests for machine translation evaluation"; Efron 1987), McNemar's exact test, a test of non-inferiority at
the quality floor (Tango 1998), and the smallest difference that so many texts could have shown (Connor 1987). What is
reported here holds for this model alone; whoever looks at several corrects for it (`stages/core/statistics.py`).

Calibration. The expected calibration error over bins of equal width (Guo et al., 1706.04599) and of equal counts
(Nguyen & O'Connor, 1508.05154), the Brier score and the log loss, as they are and at one temperature, which is fitted
on validation texts. The temperature is reported and never applied.

Clusters. What the exported model's output layer reads, taken from the ONNX file itself: how far apart the labels lie
there (silhouette, Rousseeuw 1987) and a map in the plane. A cascade has no such layer of its own, so its answers are
mapped, and `clusters.space` says `probabilities`.

Slices. Every value of the user's columns, every rule of the user's, each label, and groups by length and by rarity of
the words are compared with the fine-tuned model on their own: an interval for paired shares (Bonett & Price 2012), an
exact one-sided test (McNemar's) corrected by Holm (1979) for how many slices were looked at, those that compression
hurt most first. Rates and the gaps between groups come from fairlearn (Weerts et al., 2303.16626): accuracy,
demographic parity, equalized odds (Hardt et al., 1610.02413), with bootstrap intervals, and how much wider they became.

Choice. `runtime.json` says how to run the model on this machine, for latency and for throughput: the runtime, its
threads, how many inferences side by side, the precision of its float arithmetic, and how many tokens a batch may hold.
`headroom predict` goes by it. A precision that loses something, such as bfloat16, is chosen only if the share of
labels that it changes is within half of the quality floor.

PyTorch runs the same ONNX file, translated (`stages.core.torch_graph`), eagerly or compiled as params ask. Mostly it
cannot win, so that a short trial decides whether it takes part; `left_out` says how far it was behind.

Speed. Everything is timed from strings to predicted labels, tokenization included, with the same tokenizer for all.
Two baselines, always both, are the fine-tuned model in PyTorch float32: the *fair* one pads to the longest text in
the batch, the *naive* one pads everything to one length, as tutorials do. Each batch size (in texts of average
length, as a budget of tokens) and each way to share the processors is tried a few times; the best of each runtime
then takes turns with both baselines, in rounds of an order drawn anew. What counts is the ratio per round, with its
least and greatest: what the machine does meanwhile hits all contenders alike. Latency is that of one text at a time.

Cost. A fresh process that only serves tells its peak and resident memory, and the time from its start to its first
answer. Throughput over batch size and over length is measured on the fastest runtime. The operations of a text are
counted in the ONNX graph (products with weights; two a multiply-add). Beside them stands what this machine reaches in
products of large matrices in fp32, bf16 and int8, measured in the same minute, and the share of it that the variant
uses: the roofline's compute roof (Williams et al. 2009). Energy is told where the machine counts it, and a price where
the params have one for an hour.
"""
