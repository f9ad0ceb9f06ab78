"""The model learns the task.

In: a checkpoint, the tokenized splits and the corpus. Out: the checkpoint with its task head, and the curves.

A fresh head on the checkpoint, all weights trained with AdamW; early stopping on validation, the best epoch kept.
Optional: smaller learning rates towards the input (ULMFiT, 1801.06146), label smoothing (1512.00567), and adversarial
steps on the word embeddings (Miyato et al., 1605.07725), which help most where examples are few.

Few parameters, `finetune.efficient`: LoRA (2106.09685), AdaLoRA (2303.10512) and (IA)^3 (2205.05638) through peft,
merged into the weights at the end; bottleneck adapters (1902.00751) and prefixes in every layer (2101.00190,
2110.07602), which no merge can remove: they stay in the checkpoint, and every later stage takes them, but for the
slicing of hidden states, which refuses adapters. The pooler and the head are always trained.

Self-training, `finetune.self_training` (1911.04252, 2010.02194): the best model so far labels texts of the corpus that
it is sure of, and one from the pretrained checkpoint learns from these too; the best by validation is kept.

Chance, `finetune.repeats` (2002.06305): several seeds, of which the best by validation is kept, and cross-validation
over the training and validation texts. The spread over seeds shows how much of the kept model's validation score is
that choice; a fold's score owes nothing to it, as its best epoch is chosen on other texts.
"""
