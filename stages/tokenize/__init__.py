"""Texts become tokens.

In: cleaned splits and corpus, and the checkpoint with its tokenizer. Out: the tokenizer, the three splits as token
ids, the corpus packed into blocks of equal length, and how long the texts are.

The tokenizer is the checkpoint's own, or WordPiece (Schuster & Nakajima 2012), byte-level BPE (Sennrich et al.,
1508.07909) or Unigram (Kudo, 1804.10959) trained on the corpus and the training texts. Packing either keeps
documents whole and puts several into a block, each where it leaves least room (best fit, Ding et al., 2404.10830), with
the number of its document beside each token so that attention stays inside documents (Krell et al., 2107.02027); or
joins texts end to end with a separator and cuts blocks (RoBERTa, 1907.11692, "full sentences").
"""
