"""packedbert: structurally pruned BERTs as fast as the weights that are left allow.

>>> import packedbert
>>> model = packedbert.patch_model(model)          # a BERT that is in memory, or
>>> model = packedbert.load("id-or-folder")        # a pruned checkpoint, or
>>> model = AutoModelForQuestionAnswering.from_pretrained(
...     "id-or-folder", quantization_config=packedbert.PackedBertConfig())
"""

__version__ = "0.1.0"

from . import ops
from .calibration import calibrate
from .checkpoint import CheckpointError
from .config import PackedBertConfig
from .dispatch import BackendStatus, PackedBertWarning, backends
from .examples import squad_training_examples
from .hf import load, save_pruned
from .patch import patch_model, unpatch_model
from .prune import prune_model
from .qa import QuestionAnswerer
from .recover import Recipe, recover_model
from .report import PatchReport
from .report_page import write_report
from .squad import load_squad, squad_metrics
from .summary import summarize_model

__all__ = [
    "BackendStatus",
    "CheckpointError",
    "PackedBertConfig",
    "PackedBertWarning",
    "PatchReport",
    "QuestionAnswerer",
    "Recipe",
    "backends",
    "calibrate",
    "load",
    "load_squad",
    "ops",
    "patch_model",
    "prune_model",
    "recover_model",
    "save_pruned",
    "squad_metrics",
    "squad_training_examples",
    "summarize_model",
    "unpatch_model",
    "write_report",
]
