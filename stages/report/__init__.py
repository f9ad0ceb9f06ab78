"""One page that says what the pipeline came to, and shows why it can be believed.

In: the outputs of acquire, clean, tokenize, the training stages, both quantize stages, cascade, evaluate of every
variant, deploy_check, review and history.
Out: `report.html`, one file that opens offline; `plots/*.svg` and `plots/*.png`; the performance ladder as `ladder.csv`
and `ladder.json`; everything for programs as `results.json`, held to `results.schema.json` beside it; the deployed
model's card, `model_card.md` (Mitchell et al., "Model Cards for Model Reporting", 1810.03993); and the headline numbers
as `metrics.json`.

Nothing is measured here. Every figure comes from a file of another stage, so that the page can be made again at any
time and says the same. Charts follow Cleveland & McGill, "Graphical Perception" (1984): positions on a common scale
rather than areas, and intervals beside every difference. Calibration is drawn as a reliability diagram (Niculescu-Mizil
& Caruana, "Predicting Good Probabilities with Supervised Learning", 2005).
"""
