"""What each part of the model costs on this machine, for pruning to a target.

In: the student, the tokenized splits. Out: a table of times, on the runtime that is fastest here, of a layer's
attention by number of heads and of its feed-forward by number of neurons (ZipLM, 2302.04089), with the user's own
lengths of text.

Each time is the difference between two whole models: one whose layers have the part in that width, and one whose layers
have nothing. So it holds what a part really adds: fusion, memory traffic and threads included. The models timed are
built straight in ONNX with random weights, in the form that will be deployed, in int8 or in float. Layers have equal
shapes, so one kind of layer stands for all. Where `prune.speedup` is null nobody asks, and the table is empty.
"""
