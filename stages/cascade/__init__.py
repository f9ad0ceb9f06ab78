"""The small model answers where it is sure; the rest goes on to a larger one.

In: the small exported model, the larger one, the tokenized data (validation split). Out: a unit that is all a service
needs: `cascade.json` with the threshold, and whole copies of both models; `trade_off.csv`, a row per threshold.

Most texts are easy, and a small model that is sure of its answer is nearly always right: a larger one is worth its
price only for the others (FrugalGPT, Chen et al., 2305.05176; when the largest probability is enough to tell them
apart, Jitkrittum et al., 2307.02764).

The threshold. Whatever is tried on a few hundred texts looks better there than it is, so nothing is tried twice: the
walk starts where the larger model answers everything, which loses nothing, lowers the threshold step by step and stops
at the first one whose paired bootstrap interval of the loss reaches below what is tolerated (fixed-sequence testing;
Angelopoulos et al., "Learn then Test", 2110.01052). Of the thresholds passed on the way, the cheapest is taken, and
that is the larger model alone where both together would cost more.

What a cascade costs is estimated here, by the weights that a token is multiplied with; `evaluate` measures it. No
training text is looked at, since both models know those by heart. The validation texts did choose the epochs and the
layers left in float of both models, so the loss found on them is a little kind; the test split has the last word.
"""
