"""The model gets fewer bits, by the first of the recipes in params that keeps its quality.

In: a checkpoint and the tokenized splits. Out: the same model quantized; its quality before and after; which recipe
was taken and why those before it failed; and, in `layers.json`, what was chosen and measured for every layer.

- `int8_static`: int8 weights with one scale an output channel; activations in 8 bits with one scale and zero point a
  layer, fixed by calibration on the user's texts (min-max, percentile, entropy or least squared error, as surveyed in
  2004.09602). Padding never counts. SmoothQuant (2211.10438) first moves what makes activations hard to round into
  the weights, as strongly as each layer's own error says. Where params ask for it, the model is then trained with
  rounding simulated (LSQ, 1902.08153) on the float model's answers.
- `int8_packed`: the same, stored in 4 bits: the int8 weights of each group of inputs are whole multiples, -7 to 7, of
  one whole step, chosen to err least, by GPTQ where `weight_only.method` says so. Half the file, coarser weights, and
  the speed of int8, as the file's weights become int8 when they are loaded. Tables too.
- `int8_mixed`: as `int8_static`, with layers left in float until the gate is passed, the most sensitive on the user's
  texts first, and given back where they were not needed: none of those left can go back without failing.
- `int8_dynamic`: the range of activations is taken from each input.
- `int8_weights`, `int4_weights`: weights alone, in groups of inputs with a scale and zero point each: rounded to
  nearest, by half-quadratic quantization (HQQ, Badri & Shaji 2023) or by GPTQ (2210.17323).
- `bf16`, `fp16`: weights in 16 bits; see `stages.core.quantized` for which precision multiplies.

Embeddings become int8 with one scale a row. The output layer always stays in float: it is tiny, and every error there
is an error of the answer.

The gate holds the loss of score on validation texts, paired with the float model's, against what params tolerate.
Answers that are not numbers, or little better than independent of the float model's, never pass. Where every recipe
fails the model stays in float.

x86 CPUs without VNNI add two products of bytes in 16 bits and saturate (onnxruntime#6004). 7-bit weights halve the
range, so that two products always fit: 2 * 255 * 63 = 32,130. `weight_bits: auto` takes them where the CPU at hand
saturates. The exported model says how many bits it has; with 8, such a CPU computes the products in float.
"""
