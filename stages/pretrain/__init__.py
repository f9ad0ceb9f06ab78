"""The model learns the language of the corpus.

In: a checkpoint, or a configuration to start from; the tokenizer; packed blocks. Out: a checkpoint, and its held-out
loss, perplexity and bits per byte before and after.

What the model learns from is one object, `objectives.objective.Objective`, that the stage asks. Six kinds:
masked tokens (BERT, 1810.04805), by words where wanted and at a rate that may change on the way (2202.08005,
2305.15096); masked tokens and next-sentence prediction (BERT); every token from those before it (GPT); span corruption
(T5, 1910.10683); denoising (BART, 1910.13461); replaced-token detection (ELECTRA, 2003.10555). Only positions with a
label pass through the vocabulary head, in every family, which saves most of its cost.

The held-out loss is in nats a guessed token, and perplexity is told of it; bits a byte only where the tokens guessed
are the text's own: not for span corruption and denoising, whose targets hold sentinels and copied tokens. For replaced
tokens the loss is the discriminator's, in nats a token, beside the shares of replaced tokens found and of originals
kept. Masked tokens are measured at the first mask rate, whatever the rate of the step.

The discriminator is what replaced-token detection hands on; its generator is written beside it where wanted. Parts of
the checkpoint that the language model has no use for, such as BERT's pooler, are handed on as they are.
"""
