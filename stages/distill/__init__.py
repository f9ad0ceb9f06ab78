"""A smaller student learns what the teachers know.

In: the fine-tuned teacher, the tokenized splits, the corpus, the pretrained language model. Out: a student checkpoint.

The student is made of chosen layers of the teacher (DistilBERT, 1910.01108; choice of layers as in 2004.03844), a
narrower model that starts from the teacher's embeddings alone, or any checkpoint with the same tokenizer. It learns
from soft labels (1503.02531), the mean of several teachers where params name more, from the true labels, and, as the
weights say, from hidden states and attention maps (TinyBERT, 1909.10351) and from query, key and value relations
(MiniLMv2, 2012.15828). Its texts are the task's, unlabelled ones of the corpus, and variants of the task's whose
tokens the pretrained language model guessed anew. Each teacher is asked once about each text; answers are kept on
disk.
"""
