"""Runs what packedbert is compared with, in a venv of transformers 4.57.6 and nn_pruning 0.1.2; see test_oracle.py.

usage: python oracle_worker.py JOB.json, with one of
    {"job": "versions", "out": "....json"}
    {"job": "qa", "model": folder, "items": [arguments of the pipeline], "out": "....json"}
    {"job": "optimize", "model": folder, "inputs": "....safetensors", "out": "....safetensors", "report": "....json"}
It must not import packedbert: the two meet in files only.
"""

import json
import sys

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import BertForQuestionAnswering

transformers.utils.logging.set_verbosity_error()


def load(folder):
    return BertForQuestionAnswering.from_pretrained(folder, torch_dtype=torch.float32).eval()


def versions(job):
    from importlib.metadata import version

    return {name: version(name) for name in ("transformers", "nn_pruning")}


def qa(job):
    """The removed question-answering pipeline, question by question."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(job["model"])
    pipeline = transformers.pipeline("question-answering", model=load(job["model"]), tokenizer=tokenizer)
    return [pipeline(**item) for item in job["items"]]


@torch.no_grad()
def optimize(job):
    """Logits before ("masked") and after ("optimized") nn_pruning's optimize_model, and what it left."""
    from nn_pruning.inference_model_patcher import optimize_model

    inputs = load_file(job["inputs"])
    model = load(job["model"])
    optimized = optimize_model(model, "dense").eval()
    tensors = {}
    for name, which in (("masked", model), ("optimized", optimized)):
        output = which(**inputs)
        tensors[f"{name}.start"], tensors[f"{name}.end"] = output.start_logits, output.end_logits
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, job["out"])
    layers = optimized.bert.encoder.layer
    return {
        "heads": [layer.attention.self.num_attention_heads for layer in layers],
        "ffn": [getattr(layer.intermediate.dense, "linear", layer.intermediate.dense).out_features for layer in layers],
    }


def main():
    with open(sys.argv[1]) as file:
        job = json.load(file)
    result = {"versions": versions, "qa": qa, "optimize": optimize}[job["job"]](job)
    with open(job.get("report", job["out"]), "w") as file:
        json.dump(result, file)


if __name__ == "__main__":
    main()
