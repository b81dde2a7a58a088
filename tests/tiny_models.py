"""Language models of a few thousand weights, one for each TransformerLens class, and their text."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

N_LAYERS = 3
WIDTH = 32
N_HEADS = 4
VOCABULARY = 50
LONGEST = 32

SIZES = {
    "num_hidden_layers": N_LAYERS,
    "hidden_size": WIDTH,
    "num_attention_heads": N_HEADS,
    "intermediate_size": 64,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": LONGEST,
}
GPT2_SIZES = {
    "n_layer": N_LAYERS,
    "n_embd": WIDTH,
    "n_head": N_HEADS,
    "vocab_size": VOCABULARY,
    "n_positions": LONGEST,
}

BRIDGED = {
    "bridge of GPT-2": ("GPT2LMHeadModel", "GPT2Config", GPT2_SIZES),
    "bridge of Llama": ("LlamaForCausalLM", "LlamaConfig", SIZES | {"num_key_value_heads": 2}),
    "bridge of GPT-NeoX": ("GPTNeoXForCausalLM", "GPTNeoXConfig", SIZES),
    "bridge of BERT": ("BertForMaskedLM", "BertConfig", SIZES),
}
HOOKED = {
    "HookedTransformer": ("HookedTransformer", {}),
    "HookedTransformer, parallel": ("HookedTransformer", {"parallel_attn_mlp": True}),
    "HookedEncoder": ("HookedEncoder", {}),
}
EVERY_MODEL = [*BRIDGED, *HOOKED]


def tiny_model(kind: str) -> Any:
    """The model called `kind`, with the same random weights on every call."""
    torch.manual_seed(0)
    model = _bridged(*BRIDGED[kind]) if kind in BRIDGED else _hooked(*HOOKED[kind])
    # A TransformerBridge sets hooks of its own in its first forward, and keeps them.
    model(token_ids())
    return model


def hugging_face_model(model_class: str, config_class: str, sizes: dict[str, Any]) -> Any:
    config = getattr(transformers, config_class)(**sizes)
    return getattr(transformers, model_class)(config).eval()


def token_ids(n_contexts: int = 3, context_size: int = 8, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (n_contexts, context_size), generator=generator)


def tiny_tokenizer() -> Any:
    """Splits at spaces; the words are w3, w4, … with those numbers as ids."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    special = ["<unk>", "<bos>", "<eos>"]
    words = special + [f"w{number}" for number in range(len(special), VOCABULARY)]
    tokenizer = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def fast(tokenizer: Any, **special: str) -> Any:
    """What Hugging Face makes of a tokenizer, with special tokens such as `eos_token`."""
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def byte_pairs(
    vocabulary_size: int,
    texts: Sequence[str],
    *,
    use_regex: bool = False,
    trim_offsets: bool = False,
    add_prefix_space: bool = False,
    **special: str,
) -> Any:
    """A byte-level tokenizer; without the regular expression its tokens cross spaces."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=add_prefix_space, use_regex=use_regex
    )
    tokenizer.post_processor = processors.ByteLevel(
        add_prefix_space=add_prefix_space, trim_offsets=trim_offsets
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=list(special.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return fast(tokenizer, **special)


def tiny_llama(vocabulary_size: int, seed: int = 0) -> Any:
    """A TransformerBridge with a vocabulary of this size, for contexts of up to 64 tokens."""
    torch.manual_seed(seed)
    model_class, config_class, sizes = BRIDGED["bridge of Llama"]
    longer = {"vocab_size": vocabulary_size, "max_position_embeddings": 64}
    return _bridged(model_class, config_class, sizes | longer)


def save_tiny_llama(folder: Path) -> Any:
    """Puts a Hugging Face folder with model and tokenizer there, and returns the model."""
    torch.manual_seed(0)
    model = hugging_face_model(*BRIDGED["bridge of Llama"])
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model


def _bridged(model_class: str, config_class: str, sizes: dict[str, Any]) -> Any:
    model = hugging_face_model(model_class, config_class, sizes)
    with warnings.catch_warnings():
        # TransformerLens 3.9 imports what it has itself deprecated.
        warnings.simplefilter("ignore", DeprecationWarning)
        from transformer_lens.model_bridge.sources import build_bridge_from_module

        return build_bridge_from_module(model, model_class, hf_config=model.config).eval()


def _hooked(model_class: str, options: dict[str, Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        import transformer_lens

        try:
            hooked_class = getattr(transformer_lens, model_class)
        except ImportError as error:
            pytest.skip(str(error))
        config = transformer_lens.HookedTransformerConfig(
            n_layers=N_LAYERS,
            d_model=WIDTH,
            n_heads=N_HEADS,
            d_head=WIDTH // N_HEADS,
            d_mlp=64,
            d_vocab=VOCABULARY,
            n_ctx=LONGEST,
            act_fn="gelu",
            attention_dir="bidirectional" if model_class == "HookedEncoder" else "causal",
            device="cpu",
            seed=0,
            **options,
        )
        model = hooked_class(config).eval()
    if model_class == "HookedEncoder":
        # It leaves its weights as whatever the memory held.
        for weight in model.parameters():
            torch.nn.init.normal_(weight, std=0.2)
    return model
