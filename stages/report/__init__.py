"""One page that says what the pipeline came to, and shows why it can be believed.

In: the outputs of acquire, clean, tokenize, the training stages, both quantize stages, cascade, evaluate of every
variant, and deploy_check.
Out: `report.html`, one file that opens offline; `plots/*.svg` and `plots/*.png`; the performance ladder as `ladder.csv`
and `ladder.json`; and the headline numbers as `metrics.json`.

Nothing is measured here. Every figure comes from a file of another stage, so that the page can be made again at any
time and says the same. Charts follow Cleveland & McGill, "Graphical Perception" (1984): positions on a common scale
rather than areas, and intervals beside every difference. Calibration is drawn as a reliability diagram (Niculescu-Mizil
& Caruana, "Predicting Good Probabilities with Supervised Learning", 2005).
"""
