"""The checkpoint becomes ONNX.

In: any checkpoint and the tokenized splits. Out: a folder that is all a service needs: `model.onnx`, the tokenizer,
and `headroom.json` with task, labels, input names, length limit and lineage.

Batch and length are dynamic. Quantized layers become QuantizeLinear / DequantizeLinear pairs around int8 weights,
which the runtimes fuse into integer matrix products. The graph passes ONNX's checker, and ONNX Runtime must give the
logits of PyTorch on real texts of many lengths; otherwise the stage fails and publishes nothing.

Further gates: the file may take no more bytes than its tensors with their own bits and the graph explain, and the
runtimes must compute the int8 products in integers. What ONNX Runtime and OpenVINO fuse is counted in the metrics.
ONNX Runtime has no fused attention for this graph, OpenVINO has; a fused operator of ONNX Runtime's own (tried:
com.microsoft MultiHeadAttention, and Attention of operator set 23) was not faster on short texts.
"""
