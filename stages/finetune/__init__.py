"""The model learns the task.

In: a checkpoint, the tokenized splits, the corpus, and a lexicon where words are to be edited. Out: the checkpoint with
its task head, and the curves.

A fresh head on the checkpoint, all weights trained; early stopping on validation, the best epoch kept. What makes it
generalize, each one value of `finetune` in `params.yaml`:

- Weight decay: AdamW's is decoupled, weights shrink by a share of themselves and not by their gradient (1711.05101);
  with SGD and Adam it is L2 regularization. Biases and norms are left out.
- Dropout: the checkpoint's own, or one value for every layer (Srivastava et al., JMLR 2014).
- Label smoothing: a share of every label is spread over all classes (1512.00567).
- R-Drop: two passes with different dropout must agree, by the divergence between their answers (2106.14448). Both run
  as one batch of twice the size.
- Layer decay: every layer learns slower than the one above it, the embeddings slowest (ULMFiT, 1801.06146).
- Fresh top layers: the last layers and the pooler start anew, since what they learnt is closest to the old task
  (2006.05987).
- Class weights: rare classes count more, balanced or by the effective number of their texts (1901.05555).
- Focal loss: a text counts less the surer the model is of it (1708.02002).
- Adversarial training: fgm adds the gradient on a table of word embeddings moved along its gradient (1605.07725);
  freelb takes the mean of several gradients while the embeddings of each text move uphill within a ball (1909.11764).
- Augmentation: copies of the training texts that keep their label, with words edited (synonyms, insertions, swaps,
  deletions: EDA, 1901.11196) or guessed anew by the pretrained language model (TinyBERT, 1909.10351).
- Mixup: word embeddings of two texts, and their losses, mixed in a share drawn for each batch (1905.08941).

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
