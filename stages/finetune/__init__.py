"""The model learns the task.

In: a checkpoint and the tokenized splits. Out: the checkpoint with its task head, and the curves.

A fresh head on the checkpoint, all weights trained with AdamW; early stopping on validation, the best epoch kept.
Optional: smaller learning rates towards the input (ULMFiT, 1801.06146), label smoothing (1512.00567), and adversarial
steps on the word embeddings (Miyato et al., 1605.07725), which help most where examples are few.
"""
