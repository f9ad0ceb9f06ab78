"""What an exported model loses when texts change a little, or come from elsewhere.

In: the exported ONNX model or cascade, the fine-tuned model's ONNX export as the reference, the tokenized data (test
split), the same task's texts from other domains, the corpus, the lexicon. Out: `metrics.json`, `perturbations.csv` (a
row per perturbation), `examples.parquet` (texts that a perturbation made the model get wrong), `shift.csv` (a row per
domain). Predictions come from ONNX Runtime on the CPU. Nothing here is timed.

Perturbations. Typos and words left out (Belinkov & Bisk, 1711.02173), case, punctuation, letters that only look the
same (Boucher et al., 2106.09898), truncation, synonyms (Ren et al. 2019, "Generating natural language adversarial
examples"), negation and a neutral sentence at the end (Ribeiro et al., 2005.04118). Every text is perturbed several
times by chance, which depends on the seed and the text alone, so that all models read the same. Told of each are the
accuracy, what it lost against the clean texts, the accuracy if the answers to all copies must be right (worst case)
and how often the answer stayed. A perturbation that may change the right answer, as negation does for sentiment, loses
nothing; only how many answers it changed is told.

Against the reference. What counts is how much more a compressed model loses than the reference on the same texts, a
difference of differences. Its intervals hold for all perturbations together: each is made at the level of one in as
many (Bonferroni). All intervals of means are percentile bootstraps over texts, whose copies stay together (Efron &
Tibshirani 1993); one of no width says that no text differed. Accuracies on other domains have Wilson's interval.

Out of distribution. Can the model's own doubt tell foreign texts from the task's? AUROC of the largest probability
(Hendrycks & Gimpel, 1610.02136) and of the energy, -logsumexp of the logits (Liu et al., 2010.03759); 0.5 is chance.
Foreign are texts of the corpus and of the other domains. The corpus is unlabelled, yet a student may have seen some of
it with the teacher's answers. A cascade has no energy: those of two models are on different scales.
"""
