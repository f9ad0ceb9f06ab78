"""The student gets narrower.

In: the student, the teacher, the tokenized splits, the corpus. Out: a checkpoint whose layers have fewer attention
heads and feed-forward neurons, removed for good: every matrix product gets smaller, on any hardware.

What matters least goes first. The saliency of a head or neuron is what its gate tells about the loss on the user's
data: to first order |gate x gradient| (Michel et al., 1905.10650), to second order the diagonal of the empirical
Fisher information (Kwon et al., 2204.09656). All layers compete, so each ends with a width of its own. Then a short
distillation from the teacher brings back most of what the cut cost. A sparsity of zero hands the student through.

Last, where params ask: zeros in the layers that are left (magnitude, Wanda 2306.11695, SparseGPT 2301.00774), which
dense kernels gain nothing from; and a vocabulary without the tokens that the texts never need. The checkpoint's
tokenizer then differs from that of the tokenized data, and later stages encode the texts again.
"""
