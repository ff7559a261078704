"""Small models and filters for the tests, made on the spot."""

import pathlib
import shutil

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from vllm_qfilters.filters.format import Filters, ModelIdentity, save

NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE, VOCAB = 3, 4, 2, 32, 512
ROPE = {"rope_theta": 10000.0, "rope_type": "default"}


def make_tiny_llama(folder: pathlib.Path, seed: int = 0) -> pathlib.Path:
    """A Llama with random weights, large enough that attention differs from token to token; float32."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=NUM_HEADS * HEAD_SIZE,
        intermediate_size=256,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_KV_HEADS,
        head_dim=HEAD_SIZE,
        vocab_size=VOCAB,
        max_position_embeddings=65536,
        initializer_range=0.12,
        rope_parameters=ROPE,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(folder)
    return folder


def tiny_identity(name: str = "tiny") -> ModelIdentity:
    return ModelIdentity(name, "LlamaForCausalLM", NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE, ROPE)


def make_tiny_filters(path: pathlib.Path, seed: int = 0) -> Filters:
    """Random filters with statistics of random queries, saved at ``path``; higher projection = keep."""
    generator = torch.Generator().manual_seed(seed)
    filters = torch.randn(NUM_LAYERS, NUM_KV_HEADS, HEAD_SIZE, generator=generator)
    mean = torch.randn(NUM_LAYERS, NUM_HEADS, HEAD_SIZE, generator=generator)
    spread = torch.randn(NUM_LAYERS, NUM_HEADS, HEAD_SIZE, HEAD_SIZE, generator=generator) * 0.3
    second = spread @ spread.mT + mean.unsqueeze(-1) * mean.unsqueeze(-2)
    # Made up as well, so that a page's score depends on them.
    shape = (NUM_LAYERS, NUM_KV_HEADS)
    score_mean, score_std = 5 * torch.randn(shape, generator=generator), 0.3 + 3 * torch.rand(shape, generator=generator)
    made = Filters(
        filters, query_mean_before_rope=mean, query_second_before_rope=second, score_mean=score_mean, score_std=score_std
    )
    save(path, made, tiny_identity())
    return made


def random_prompt(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (length,), generator=generator).tolist()


def with_tokenizer(model: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """A copy of ``model`` with a tokenizer of as many words as it has token ids, and a chat template."""
    shutil.copytree(model, folder)
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, VOCAB))])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    fast.save_pretrained(folder)
    return folder
