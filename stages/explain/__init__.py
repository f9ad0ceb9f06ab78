"""Why the models answer as they do, whether the reasons given hold, and where compression moved them.

In: the fine-tuned model (the teacher), the final compressed checkpoint, the tokenized data. Out: `explanations.json`, a
record a text; `attributions.csv`, a row a word; `faithfulness.csv` and `curves.csv`, each method against random;
`attention.safetensors`, the attention maps of a few texts [heads, tokens, tokens].

Texts: flips between the two models first, up to half of the sample, the rest drawn at random, so flips are more
frequent here than in the test split. What a missing word is, is the same everywhere: its tokens become the mask token.
Everything explains the log-odds of an answer, in nats.

- Integrated gradients (Sundararajan et al., 1703.01365) from all words masked; steps double until the attributions add
  up to the difference that they divide. Rounding has no gradient, and with a straight-through one (1308.3432) the sum
  missed by over 1 % on a quarter of the texts, however many the steps. So a quantized model is differentiated as its
  own weights without the rounding of activations (`smooth`); how far that is from its answers is in the metrics.
- Shapley values by permutation sampling (Lundberg & Lee, 1705.07874) and LIME (Ribeiro et al., 1602.04938), of a few
  texts, on the models as they answer.
- Attention rollout (Abnar & Zuidema, 2005.00928).
- The decision path: what the head would answer after each layer, the first layers alone (logit lens, nostalgebraist
  2020; see also 2303.08112). Nearest training texts by the cosine of first-token vectors.
- Faithfulness, measured on the models as they answer: areas under deletion and insertion curves (RISE, 1806.07421),
  comprehensiveness and sufficiency (ERASER, 1911.03429), each paired with random orders of the same text. The interval
  of the mean difference is Student's.
- What moved: Spearman's rank correlation of both models' integrated gradients for one answer, the teacher's. Words,
  not tokens: a trimmed vocabulary cuts them into other pieces.
"""
