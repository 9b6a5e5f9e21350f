"""Conversations as text and as tokens: one renderer, named templates, exact loss masks, and their proof."""

from .choosing import get_chat_template, with_mapping
from .frames import end_of_turn
from .library import CHATML_TEMPLATE, NamedTemplate, named_template, suggest_template, template_names
from .masks import EncodedChat, encode_chat, encode_chats, encode_spans, loss_tokens
from .messages import ROLES, TrainOn, check_train_on, loss_weights, plain_messages, text_of, texts_of, tool_functions
from .proof import check_masks, check_terminator, check_vocabulary
from .rendering import has_markers, render, rendered_already
from .responses import PartIds, mask_by_parts, part_ids, response_spans
from .turns import Turn, assistant_spans, locate_turns

__all__ = ["CHATML_TEMPLATE", "EncodedChat", "NamedTemplate", "PartIds", "ROLES", "TrainOn", "Turn", "assistant_spans",
           "check_masks", "check_terminator", "check_train_on", "check_vocabulary", "encode_chat", "encode_chats",
           "encode_spans", "end_of_turn", "get_chat_template", "has_markers", "locate_turns", "loss_tokens",
           "loss_weights", "mask_by_parts", "named_template", "part_ids", "plain_messages", "render",
           "rendered_already", "response_spans", "suggest_template", "template_names", "text_of", "texts_of",
           "tool_functions", "with_mapping"]
