"""Texts become tokens.

In: cleaned splits and corpus, and the checkpoint with its tokenizer. Out: the tokenizer, the three splits as token
ids, the corpus packed into blocks of equal length, and how long the texts are.

The tokenizer is the checkpoint's own, or WordPiece (Schuster & Nakajima 2012), byte-level BPE (Sennrich et al.,
1508.07909) or Unigram (Kudo, 1804.10959) trained on the corpus and the training texts. Packing joins texts end to end
with a separator and cuts blocks, so that pretraining pads nothing (RoBERTa, 1907.11692, "full sentences").
"""
