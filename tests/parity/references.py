"""Networks of PyTorch with random weights, and a tokenizer of transformers."""

import json


def perturb(module, seed: int):
    """Random weights of unit scale, such that no two tensors are alike and no norm is the identity."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
            parameter.copy_(noise / fan_in**0.5 if parameter.ndim > 1 else parameter + 0.2 * noise)
    return module.eval()


def clip_tokenizer(captions: list[str], max_length: int):
    """A CLIP tokenizer whose merges are learnt from the captions."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=320, end_of_word_suffix="</w>", show_progress=False)
    words = [word for caption in captions for word in caption.lower().split()]
    learner.train_from_iterator(words, trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in merges]
    vocab = {name: i for i, name in enumerate(dict.fromkeys([*names, "<|startoftext|>", "<|endoftext|>"]))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_length)
