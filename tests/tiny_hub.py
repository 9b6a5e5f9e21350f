"""A language model of some kilobytes with a tokenizer trained on the spot, saved as transformers saves one."""

import torch


def tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.BPE())
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    words.train_from_iterator(["the cat sat on the mat and the dog sat on the log"] * 3, trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>", "<pad>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def llama(folder, seed, **saving):
    """Save a random Llama of about 25,000 parameters with its tokenizer into `folder`; return model and tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    reader = tokenizer()
    config = LlamaConfig(vocab_size=len(reader), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                         bos_token_id=0, eos_token_id=1, pad_token_id=2, max_position_embeddings=64)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder, **saving)
    reader.save_pretrained(folder)
    return model, reader
