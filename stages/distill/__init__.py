"""A shallower student learns what the teacher knows.

In: the fine-tuned teacher, the tokenized splits, the corpus. Out: a student checkpoint.

The student starts as chosen layers of the teacher (DistilBERT, 1910.01108; layer choice as in 2004.03844) and learns
from its soft labels (1503.02531), the true labels and its hidden states (1909.10351), on the task's texts and on
unlabelled texts of the corpus. The teacher is asked once; its answers are kept on disk.
"""
