"""The checkpoint becomes ONNX.

In: any checkpoint and the tokenized splits. Out: a folder that is all a service needs: `model.onnx`, the tokenizer,
and `headroom.json` with task, labels, input names, length limit and lineage.

Batch and length are dynamic. Quantized layers become QuantizeLinear / DequantizeLinear pairs around int8 weights,
which the runtimes fuse into integer matrix products. The graph passes ONNX's checker, and ONNX Runtime must give the
logits of PyTorch on real texts of many lengths; otherwise the stage fails and publishes nothing.
"""
