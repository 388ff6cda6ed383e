"""Models with an output layer on a packed BERT: in inference one native call, from ids to logits."""

import functools
from typing import Any

from torch import Tensor
from transformers import BertForQuestionAnswering
from transformers.modeling_outputs import QuestionAnsweringModelOutput

from . import shortcut
from .modules import PackedBertModel, PackedEncoder, are_defaults, make_output
from .shortcut import Shortcut


class PackedBertForQuestionAnswering(BertForQuestionAnswering):
    """A BertForQuestionAnswering whose `bert` is packed: the class that a patched instance is given.

    With 32 tokens and cold caches, transformers' own way from hidden states to logits takes as long as some layers.
    """

    _shortcut: Shortcut | None = None

    def find_shortcut(self) -> Shortcut | None:
        """What `shortcut.run` runs this model by; None where it can't."""
        bert: Any = self.bert
        if type(bert) is not PackedBertModel or type(bert.encoder) is not PackedEncoder:
            return None
        return Shortcut.of(bert, self, "qa_outputs")

    @functools.wraps(BertForQuestionAnswering.forward)
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """As BertForQuestionAnswering.forward; see there, and PackedBertModel.forward for what differs."""
        if input_ids is not None and not args and are_defaults(kwargs):
            logits = shortcut.run(self, input_ids, token_type_ids, attention_mask)
            if logits is not None:
                start, end = logits
                return make_output(QuestionAnsweringModelOutput, start_logits=start, end_logits=end)
        return super().forward(input_ids, attention_mask, token_type_ids, *args, **kwargs)


# save_pretrained writes the class name into config.json, where it names the stock architecture.
PackedBertForQuestionAnswering.__name__ = BertForQuestionAnswering.__name__
