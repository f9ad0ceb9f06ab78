"""The exported ONNX model and the runtimes that execute it.

The file is the artifact; which runtime is fastest is found by measuring on the machine at hand. A serving process
needs neither PyTorch nor transformers: nothing here imports them, unless PyTorch is the runtime asked for.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy
from tokenizers import Tokenizer

from stages.core.artifacts import MANIFEST, STATE, read_json, verify
from stages.core.batches import length_batches, pad, token_batches
from stages.core.encoding import encode, read_tokenizer
from stages.core.errors import UserError
from stages.core.hardware import describe_cpu, saturates_here, thread_limit, usable_processors
from stages.core.metrics import softmax

Array = numpy.ndarray
Batch = tuple[Array, Array]
Goal = Literal["latency", "throughput"]

ONNX_FILE = "model.onnx"
HEADROOM_FILE = "headroom.json"
REFERENCE_RUNTIME = "onnxruntime-cpu"
"""Always installed; what the others are compared with."""
EAGER, COMPILED = "torch-eager", "torch-compiled"
"""PyTorch, on the same file."""
EXACT_PRECISION = "f32"
"""Float arithmetic that loses nothing of a float32 model; any other may change answers."""

_PROVIDERS = {"onnxruntime-cuda": "CUDAExecutionProvider", "onnxruntime-tensorrt": "TensorrtExecutionProvider"}
_TENSORRT_LARGEST_BATCH = 128
_BFLOAT16_FEATURES = {"avx512_bf16", "amx_bf16", "bf16"}
_OPENVINO_PRECISIONS = {"BF16": "bf16", "FP16": "f16"}


@dataclass(frozen=True)
class ExportedModel:
    """An exported text classifier: the ONNX file with its tokenizer and labels."""

    folder: Path
    """Holds model.onnx, the tokenizer and headroom.json."""
    labels: tuple[str, ...]
    maximum_length: int
    """Tokens per text, special tokens included; longer texts are cut."""
    inputs: tuple[str, str]
    """ONNX input names: token ids, attention mask."""
    quantized: bool
    weight_bits: int | None
    """Of the weights of int8 products, 7 or 8; None without such products, or where the export did not tell."""
    parameters: int
    tokenizer: Tokenizer
    pad_id: int
    """Token id that fills short texts."""

    @classmethod
    def load(cls, folder: Path) -> ExportedModel:
        """Load a model from its unit folder, or from the output folder of a stage with `model/` inside.

        Raises:
            UserError: if the folder holds no exported model, or a file of it is missing or altered.
        """
        folder = _model_folder(folder)
        verify(folder)
        description = read_json(folder / HEADROOM_FILE)
        if description.get("task") != "text-classification" or len(description.get("inputs", [])) != 2:
            raise UserError(
                f"{folder / HEADROOM_FILE}: task {description.get('task')!r} with inputs {description.get('inputs')}; "
                "this version runs text-classification with token ids and attention mask"
            )
        return cls(
            folder=folder,
            labels=tuple(description["labels"]),
            maximum_length=description["maximum_length"],
            inputs=(description["inputs"][0], description["inputs"][1]),
            quantized=description["quantized"],
            weight_bits=description.get("weight_bits"),
            parameters=description["parameters"],
            tokenizer=read_tokenizer(folder, description["maximum_length"]),
            pad_id=description["pad_id"],
        )

    @property
    def onnx_path(self) -> Path:
        """The ONNX file."""
        return self.folder / ONNX_FILE

    @property
    def model_bytes(self) -> int:
        """Size on disk of the ONNX file, weights kept beside it included."""
        return sum(path.stat().st_size for path in self.folder.glob(f"{ONNX_FILE}*"))

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Turn texts into token ids, special tokens included, cut at the maximum length. An empty text is a text."""
        return encode(self.tokenizer, texts)


class Runtime(Protocol):
    """What executes an exported model."""

    name: str
    precision: str
    """Of the arithmetic where the model is float: f32, bf16, f16."""

    def logits(self, input_ids: Array, attention_mask: Array) -> Array:
        """Compute logits, float32 [batch, labels], of int64 [batch, length] inputs."""

    def logits_many(self, batches: Sequence[Batch]) -> list[Array]:
        """Compute the logits of several batches, side by side where the runtime can."""


class OnnxRuntime:
    """ONNX Runtime on a CPU or, with onnxruntime-gpu, on CUDA or TensorRT.

    With `streams` above 1 as many threads call one session, which computes in the caller: on short texts two batches
    side by side take less time than two threads on each batch, as no thread waits for another.
    """

    def __init__(self, name: str, model: ExportedModel, threads: int | None, streams: int = 1):
        import onnxruntime

        onnxruntime.disable_telemetry_events()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.log_severity_level = 3
        if saturates(model):
            # Products stay float, right and slow. (`session.x64quantprecision` would widen them to 16 bits, but
            # version 1.31 cannot load graphs with it whose layers share a zero point.)
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        self.name = name
        self._pool = ThreadPoolExecutor(streams) if streams > 1 else None
        self.precision = "f16" if name == "onnxruntime-tensorrt" else "f32"
        self._inputs = model.inputs
        self._session = onnxruntime.InferenceSession(str(model.onnx_path), options, providers=_providers(name, model))
        wanted, got = _PROVIDERS.get(name, "CPUExecutionProvider"), self._session.get_providers()[0]
        if got != wanted:
            # ONNX Runtime goes on with the next provider when CUDA or TensorRT cannot start, and only logs it.
            raise UserError(f"{name}: {wanted} could not start, ONNX Runtime chose {got}; check the driver and CUDA")

    def logits(self, input_ids: Array, attention_mask: Array) -> Array:
        """Compute logits, float32 [batch, labels], of int64 [batch, length] inputs."""
        feed = dict(zip(self._inputs, (input_ids, attention_mask), strict=True))
        result: Array = self._session.run(None, feed)[0]
        return result

    def logits_many(self, batches: Sequence[Batch]) -> list[Array]:
        """Compute the logits of several batches, `streams` side by side."""
        if self._pool is None:
            return [self.logits(*batch) for batch in batches]
        return list(self._pool.map(lambda batch: self.logits(*batch), batches))


class OpenVino:
    """OpenVINO on a CPU.

    Without a `precision` it takes the one it thinks best for float arithmetic: bfloat16 where the CPU multiplies it.
    """

    name = "openvino-cpu"

    def __init__(
        self,
        model: ExportedModel,
        threads: int | None,
        goal: Goal,
        streams: int | None = None,
        precision: str | None = None,
    ):
        import openvino

        settings: dict[str, Any] = {"PERFORMANCE_HINT": goal.upper()}
        if streams:
            settings["NUM_STREAMS"] = streams
        if threads:
            settings["INFERENCE_NUM_THREADS"] = threads
        if precision:
            settings["INFERENCE_PRECISION_HINT"] = precision
        self._compiled = openvino_core().compile_model(read_for_openvino(model.onnx_path), "CPU", settings)
        self._request = self._compiled.create_infer_request()
        self._queue = openvino.AsyncInferQueue(self._compiled) if goal == "throughput" else None
        self._inputs = model.inputs
        self.precision = _type_name(self._compiled.get_property("INFERENCE_PRECISION_HINT"))

    def logits(self, input_ids: Array, attention_mask: Array) -> Array:
        """Compute logits, float32 [batch, labels], of int64 [batch, length] inputs."""
        outputs = self._request.infer(self._feed(input_ids, attention_mask), share_inputs=True)
        return numpy.array(outputs[0])

    def logits_many(self, batches: Sequence[Batch]) -> list[Array]:
        """Compute the logits of several batches, as many side by side as OpenVINO keeps streams."""
        if self._queue is None:
            return [self.logits(*batch) for batch in batches]
        results: list[Array] = [numpy.empty(0)] * len(batches)

        def keep(request: Any, index: int) -> None:
            results[index] = request.get_output_tensor(0).data.copy()

        self._queue.set_callback(keep)
        for index, batch in enumerate(batches):
            self._queue.start_async(self._feed(*batch), index, share_inputs=True)
        self._queue.wait_all()
        return results

    def _feed(self, input_ids: Array, attention_mask: Array) -> dict[str, Array]:
        return dict(zip(self._inputs, (input_ids, attention_mask), strict=True))


@functools.cache
def openvino_core() -> Any:
    """OpenVINO's one core of this process.

    Each core moves the calling thread's stack for signals to memory of its own, and when it goes it puts back what it
    found. With two, closed in the order they were opened, that is freed memory: the next Ctrl-C would be a crash.
    """
    import openvino

    return openvino.Core()


def read_for_openvino(path: Path) -> Any:
    """Read an ONNX file, with int8 weights that are stored in fewer bits made int8 now.

    OpenVINO would compute them anew for every inference, and take the products that follow for float ones: it looks for
    integer weights before it folds constants.
    """
    import openvino

    graph = openvino_core().read_model(path)
    for node in graph.get_ordered_ops():
        if node.get_type_name() == "Convert" and node.get_element_type() == openvino.Type.i8:
            _replace_by_its_value(node)
    return graph


def _replace_by_its_value(node: Any) -> None:
    """Put a constant in the place of a node that depends on constants alone."""
    import openvino

    output = node.output(0)
    value = openvino.Tensor(openvino.Type.i8, output.shape)
    if not openvino.Model([output], []).evaluate([value], []):
        raise RuntimeError(f"OpenVINO cannot evaluate {node.get_friendly_name()}")
    constant = openvino.op.Constant(value)
    readers = [reader for reader in output.get_target_inputs() if reader.get_node().get_type_name() != "Result"]
    for reader in readers:
        reader.replace_source_output(constant.output(0))


def available_runtimes() -> list[str]:
    """Names of the runtimes that the installed packages offer."""
    pytorch = [EAGER, COMPILED] if importlib.util.find_spec("torch") else []
    return [REFERENCE_RUNTIME, OpenVino.name, *gpu_runtimes(), *pytorch]


def gpu_runtimes() -> list[str]:
    """Names of those that compute on a GPU."""
    import onnxruntime

    providers = onnxruntime.get_available_providers()
    return [name for name, provider in _PROVIDERS.items() if provider in providers]


def precisions(name: str) -> list[str | None]:
    """Precisions of float arithmetic that a runtime can be told to use here, the exact one first, the fastest last.

    [None] where there is no choice. OpenVINO takes a hint that the CPU cannot follow for another one and says nothing,
    so it is asked what the CPU has.
    """
    if name in (EAGER, COMPILED):
        fast = _BFLOAT16_FEATURES & set(describe_cpu()["features"])
        return [EXACT_PRECISION, "bf16"] if fast else [EXACT_PRECISION]
    if name != OpenVino.name:
        return [None]
    able = openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return [EXACT_PRECISION, *(hint for capability, hint in _OPENVINO_PRECISIONS.items() if capability in able)]


def saturates(model: ExportedModel) -> bool:
    """Tell whether integer arithmetic would give wrong results for this model on this CPU; 7-bit weights never do."""
    return model.quantized and model.weight_bits != 7 and saturates_here()


def safe_runtimes(model: ExportedModel) -> list[str]:
    """Those of `available_runtimes` that compute the model right on this CPU.

    ONNX Runtime computes int8 products in float where they would saturate, and PyTorch always; OpenVINO has no such
    setting.
    """
    return [name for name in available_runtimes() if name != OpenVino.name or not saturates(model)]


def open_runtime(
    name: str,
    model: ExportedModel,
    threads: int | None = None,
    goal: Goal = "latency",
    streams: int | None = None,
    precision: str | None = None,
) -> Runtime:
    """Load a model into a runtime.

    Args:
        name: one of `available_runtimes`.
        model: to load.
        threads: to compute with; None leaves it to the runtime, unless a CPU quota sets a limit.
        goal: what to tune for, where the runtime can: one text soon, or many.
        streams: inferences side by side; None takes one for latency, one a processor for throughput on ONNX Runtime,
            and leaves it to OpenVINO.
        precision: of float arithmetic, one of `precisions`; None leaves it to the runtime.

    Raises:
        UserError: if there is no such runtime or precision here, or it cannot start or read the model.
    """
    available = available_runtimes()
    if name not in available:
        hint = "; `make gpu` installs the CUDA and TensorRT providers" if name in _PROVIDERS else ""
        raise UserError(f"{name}: no such runtime here; one of {', '.join(available)}{hint}")
    if precision is not None and precision not in precisions(name):
        choices = ", ".join(choice or "its own" for choice in precisions(name))
        raise UserError(f"{name}: cannot compute in {precision} here; {choices}")
    threads = threads or thread_limit()
    if name == REFERENCE_RUNTIME and goal == "throughput" and streams is None:
        streams, threads = thread_limit() or len(usable_processors()), 1
    try:
        return _open(name, model, threads, goal, streams, precision)
    except _load_errors() as error:
        raise UserError(f"{model.onnx_path}: {name} cannot load it: {' '.join(str(error).split())[:300]}") from None


def _open(
    name: str, model: ExportedModel, threads: int | None, goal: Goal, streams: int | None, precision: str | None
) -> Runtime:
    if name == OpenVino.name:
        return OpenVino(model, threads, goal, streams, precision)
    if name in (EAGER, COMPILED):
        from stages.core.torch_runtime import TorchRuntime

        return TorchRuntime(name, model, threads, goal, precision)
    return OnnxRuntime(name, model, threads, streams or 1)


@dataclass(frozen=True)
class Prepared:
    """Texts as batches of similar length, ready for a runtime."""

    texts: int
    order: list[list[int]]
    """Which text stands in which row of which batch."""
    batches: list[Batch]


def prepare(
    model: ExportedModel, texts: Sequence[str], batch_size: int | None = None, batch_tokens: int | None = None
) -> Prepared:
    """Encode texts and batch them, by `batch_size` texts or by `batch_tokens` tokens."""
    return arrange(model, model.encode(texts), batch_size, batch_tokens)


def arrange(
    model: ExportedModel, rows: Sequence[Sequence[int]], batch_size: int | None = None, batch_tokens: int | None = None
) -> Prepared:
    """Batch texts that are token ids already; see `prepare`."""
    lengths = [len(row) for row in rows]
    order = token_batches(lengths, batch_tokens) if batch_tokens else length_batches(lengths, batch_size or 1)
    return Prepared(len(rows), order, [pad([rows[index] for index in batch], model.pad_id) for batch in order])


def raw_logits(model: ExportedModel, runtime: Runtime, prepared: Prepared) -> Array:
    """Compute the logits of prepared texts, float32 [texts, labels], in the order of the texts."""
    logits = numpy.empty((prepared.texts, len(model.labels)), dtype=numpy.float32)
    for batch, result in zip(prepared.order, runtime.logits_many(prepared.batches), strict=True):
        logits[batch] = result
    return logits


def answer(model: ExportedModel, runtime: Runtime, prepared: Prepared) -> tuple[Array, Array]:
    """Classify prepared texts; see `predict`."""
    logits = raw_logits(model, runtime, prepared)
    if not prepared.texts:
        return numpy.empty(0, dtype=numpy.int64), logits
    return logits.argmax(axis=1), softmax(logits)


def predict(
    model: ExportedModel,
    runtime: Runtime,
    texts: Sequence[str],
    batch_size: int | None = None,
    batch_tokens: int | None = None,
) -> tuple[Array, Array]:
    """Classify texts, in batches of similar length.

    Args:
        model: with the tokenizer.
        runtime: with the model loaded.
        texts: to classify.
        batch_size: texts in a batch; None is one.
        batch_tokens: tokens in a batch, padding included; where given, it decides instead.

    Returns:
        label indices, int64 [texts], and probabilities, float32 [texts, labels], in the order of the texts.
    """
    return answer(model, runtime, prepare(model, texts, batch_size, batch_tokens))


def _load_errors() -> tuple[type[Exception], ...]:
    """What the libraries raise for a model or device they cannot use; ONNX Runtime's share no base class."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    names = ("EPFail", "Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NotImplemented")
    return (RuntimeError, *(getattr(state, name) for name in (*names, "NoSuchFile", "RuntimeException")))


def _model_folder(folder: Path) -> Path:
    for candidate in (folder, folder / "model"):
        if (candidate / HEADROOM_FILE).exists() and _mentions_onnx(candidate):
            return candidate
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; point at an exported model such as artifacts/export/quantize")
    raise UserError(
        f"{folder}: holds no exported model ({ONNX_FILE} and {HEADROOM_FILE}); "
        "point at a folder of the export stage such as artifacts/export/quantize"
    )


def _mentions_onnx(folder: Path) -> bool:
    """A folder whose ONNX file was lost is still an exported model, and its manifest then says what is missing."""
    if (folder / ONNX_FILE).exists():
        return True
    return (folder / MANIFEST).exists() and ONNX_FILE in read_json(folder / MANIFEST)["files"]


def _providers(name: str, model: ExportedModel) -> list[Any]:
    if name not in _PROVIDERS:
        return ["CPUExecutionProvider"]
    import onnxruntime

    onnxruntime.preload_dlls()  # finds CUDA and cuDNN where pip put them
    providers: list[Any] = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    if name == "onnxruntime-tensorrt":
        providers.insert(0, ("TensorrtExecutionProvider", _tensorrt_options(model)))
    return providers


def _tensorrt_options(model: ExportedModel) -> dict[str, Any]:
    """Build one engine for every batch and length that may come, in half precision, and keep it on disk."""

    def shapes(batch: int, length: int) -> str:
        return ",".join(f"{name}:{batch}x{length}" for name in model.inputs)

    cache = STATE / "tensorrt"
    cache.mkdir(parents=True, exist_ok=True)
    return {
        "trt_fp16_enable": True,
        "trt_int8_enable": model.quantized,
        "trt_engine_cache_enable": True,
        "trt_engine_cache_path": str(cache),
        "trt_profile_min_shapes": shapes(1, 1),
        "trt_profile_opt_shapes": shapes(32, min(32, model.maximum_length)),
        "trt_profile_max_shapes": shapes(_TENSORRT_LARGEST_BATCH, model.maximum_length),
    }


def _type_name(value: Any) -> str:
    """OpenVINO's element type, such as <Type: 'bfloat16'>, in short."""
    name = value.get_type_name() if hasattr(value, "get_type_name") else str(value)
    return {"dynamic": "f32", "undefined": "f32"}.get(name, name)
