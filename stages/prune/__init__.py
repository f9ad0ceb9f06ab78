"""The student gets narrower.

In: the student, the teacher, the tokenized splits, the corpus, the table of times. Out: a checkpoint whose layers have
fewer attention heads and feed-forward neurons, removed for good: every matrix product gets smaller, on any hardware.

What matters least goes first. The saliency of a head or neuron is what its gate tells about the loss on the user's
data: to first order |gate x gradient| (Michel et al., 1905.10650), to second order the diagonal of the empirical
Fisher information (Kwon et al., 2204.09656). All layers compete, so each ends with a width of its own, and may lose
a block altogether.

How much goes is a share of the parts, or better a speed: `speedup` is measured. A table of times says what each width
saves on this machine, a knapsack search finds the widths that keep most importance in the time there is (Kwon et al.;
ZipLM, 2302.04089), parts are swapped by how they interact, and the exported candidate is timed against the exported
input until the speed is as asked. What stays of each layer is then fitted to the output of the whole one by least
squares. All of that trains nothing. Before it, whole layers may go (2004.03844), and the hidden states of those that
stay be cut to their principal components (SliceGPT, 2401.15024, extended to norms after the residual). Then a short
distillation from the teacher brings back most of what the cut cost. Speedup 1, or sparsity zero, hands the student
through.

Last, where params ask: zeros in the layers that are left (magnitude, Wanda 2306.11695, SparseGPT 2301.00774), which
dense kernels gain nothing from; and a vocabulary without the tokens that the texts never need. The checkpoint's
tokenizer then differs from that of the tokenized data, and later stages encode the texts again.
"""
