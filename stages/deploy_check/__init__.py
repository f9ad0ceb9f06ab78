"""Would the final model hold its service targets on this machine?

In: the exported ONNX model, the float checkpoint it was quantized from (for PyTorch on a GPU), the tokenized data.
Out: `metrics.json` with the verdict, what each device measured, and every target that was missed; `details.json` with
the inventory and what every runtime measured.

Every runtime of a device is checked in a fresh process: it loads, its memory fits, its probabilities agree with the
CPU reference on real texts (ONNX Runtime for the ONNX file, PyTorch float32 for the checkpoint), and latency at batch
1 and throughput are measured. The one that misses the fewest targets, then the fastest, is soaked: for a while it
gets requests of mixed size and length, empty, odd and over-long texts among them, while errors are counted and latency
and memory are watched for drift.

On a GPU these are ONNX Runtime with CUDA and TensorRT where installed, and PyTorch in fp16 and bf16, eager, compiled
(Ansel et al. 2024, "PyTorch 2") and replayed as CUDA graphs, which take the launch of each kernel off the CPU.

A device that is not there is `absent`, never passed. The command fails only when a device that params call required
is absent or misses a target; the details are then in `artifacts/.state/deploy_check-verdict.json`, because a failed
stage publishes nothing.
"""
