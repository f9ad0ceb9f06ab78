"""The model becomes int8.

In: a checkpoint and the tokenized splits. Out: the same model with int8 weights, and its quality before and after.

Weights get one scale an output channel; activations one scale and zero point a layer, fixed by calibration on the
user's texts (min-max, percentile, or least squared error, as surveyed in 2004.09602), or taken from each input.
Padding never counts. Where quality suffers, the layers that hurt most go back to float until the loss is tolerated.
The output layer always stays in float: it is tiny, and every error there is an error of the answer.
"""
