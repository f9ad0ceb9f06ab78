"""Make texts worth learning from: repair what is broken, remove what misleads, and keep every reject with its reason.

In go the raw splits, the same task's texts from other domains and the corpus, and what reviewers corrected where
`clean.corrections` names a file; out come the units `data/` (the splits, and labels.json), `shifted/` and `corpus/`,
and beside them rejects.parquet (every removed text with its reason and what it collided with), corrections.parquet
(every text that a reviewer changed: label before and after, reviewer, note, and the file with its SHA-256), rules.csv
(a count and an example per rule and split) and metrics.json.

Repairs: broken Unicode (ftfy; typographic quotes and full-width characters are not broken and stay, because the model
will meet them in use), HTML tags and entities, control characters, spacing. Then the corrections: other labels, and
texts to be dropped. Removals, in this order: empty, too short,
too long, copies with different labels (all of them: nobody knows which is right), exact copies within a split, texts
of test in validation or train and of validation in train, and near duplicates (MinHash, Broder 1997, over character
shingles; candidates from locality-sensitive hashing are confirmed by exact Jaccard similarity). Where two splits
collide test is kept before validation before train, so that no score is flattered (Lee et al., 2107.06499). Corpus
texts that equal, contain or nearly equal a text of test or validation are removed as well, for pretraining remembers
(Brown et al., 2005.14165, appendix C). Texts of other domains are repaired in the same way, and only copies, texts of
the task itself and those too short or too long are removed. Everything is deterministic: the first of several copies
stays.
"""
