"""One page that says what the pipeline came to, and shows why it can be believed.

In: the outputs of every stage that made, measured, explained or reviewed a model, and the history of champions.
Out: `report.html`, one file that opens offline; `plots/*.svg` and `plots/*.png`; the performance ladder as `ladder.csv`
and `ladder.json`, the steps to its best model as `waterfall.csv`; everything for programs as `results.json`, held to
`results.schema.json` beside it; the deployed model's card, `model_card.md` (Mitchell et al., "Model Cards for Model
Reporting", 1810.03993); and the headline numbers as `metrics.json`.

The page is a verdict, then sections. `sections/` has a module and a template for each, `page.SECTIONS` is their order:
a new one is a line there. A section that finds something the reader must see before trusting the model raises an alarm,
and the verdict names it.

Nothing is measured here. Every figure comes from a file of another stage, so that the page can be made again at any
time and says the same. Charts follow Cleveland & McGill, "Graphical Perception" (1984): positions on a common scale
rather than areas, and intervals beside every difference. Calibration is drawn as a reliability diagram (Niculescu-Mizil
& Caruana, "Predicting Good Probabilities with Supervised Learning", 2005).
"""
