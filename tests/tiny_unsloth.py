"""Folders with tiny models, as a download would leave them, for tests in the style of Unsloth's notebooks."""

import torch

from supertrainer.models.base import FastModel

WORDS = ["What is two and two?", "It is four.", "Name a colour, please.", "Red is one.", "Be brief.", "Once upon a time",
         "a b c d e f g h i j k l m n o p q r s t u v w x y z 0 1 2 3 4 5 6 7 8 9"] * 8


def save(folder, name, **options):
    """Make the built-in `name`, save it and its tokenizer into `folder`, and return the path as text."""
    model, tokenizer = FastModel.from_pretrained(name, texts=WORDS, **options)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def llama(folder):
    return save(folder, "tiny_llama", config={"hidden_size": 32, "num_hidden_layers": 2})


def bert(folder):
    return save(folder, "tiny_bert", config={"hidden_size": 32, "num_hidden_layers": 2})


def disturb(model, seed=0):
    """Give an adapter weights that change answers."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.copy_(0.3 * torch.randn(value.shape, generator=draw))
    return model


def snapshot(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def change(before, model):
    """The names of the parameters that differ from `before`."""
    return {name for name, value in model.named_parameters() if not torch.equal(before[name], value)}
