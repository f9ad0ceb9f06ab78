"""The model learns the language of the corpus.

In: a checkpoint, or a configuration to start from; the tokenizer; packed blocks. Out: a checkpoint, and its held-out
loss, perplexity and bits per byte before and after.

Masked-language-model training (BERT, 1810.04805): of the tokens chosen, 80 % become the mask, 10 % another token, 10 %
stay. Only the chosen positions pass through the vocabulary head, which saves most of its cost. Parts of the
checkpoint that the language model has no use for, such as BERT's pooler, are handed on as they are.
"""
