"""Runs a model as nn_pruning does, in a venv of transformers 4.57.6 and nn_pruning 0.1.2: see `oracle` in peers.py.

usage: python oracle_peer.py FOLDER THREADS
FOLDER holds a checkpoint as nn_pruning stores it. On stdin: batch and length, then ids and mask, all int64. On stdout,
for each: the start and end logits, float32. It must not import packedbert.
"""

import struct
import sys

import torch
import transformers
from nn_pruning.inference_model_patcher import optimize_model

transformers.utils.logging.set_verbosity_error()


def main() -> None:
    """Answer requests until stdin ends."""
    folder, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # optimize_model prints
    model = transformers.BertForQuestionAnswering.from_pretrained(folder, torch_dtype=torch.float32)
    model = optimize_model(model, "dense").eval()
    with torch.inference_mode():
        while header := requests.read(16):
            batch, length = struct.unpack("<2q", header)
            size = batch * length * 8
            ids, mask = (
                torch.frombuffer(bytearray(requests.read(size)), dtype=torch.int64).view(batch, length)
                for _ in range(2)
            )
            output = model(input_ids=ids, attention_mask=mask)
            replies.write(torch.stack([output.start_logits, output.end_logits]).numpy().tobytes())
            replies.flush()


if __name__ == "__main__":
    main()
