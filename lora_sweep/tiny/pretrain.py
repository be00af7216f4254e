"""Pretrain the embedded base: `python -m lora_sweep.tiny.pretrain [--out DIR] [--steps N] [--threads N]`.

A byte-level BPE of 1,024 tokens and a Llama of width 128 with 4 layers, both from scratch on `world.corpus()`. The
weights in this package are what the defaults make; another thread count or CPU may round sums otherwise.
"""

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lora_sweep.data.tasks import biographies as world

WEIGHTS = Path(__file__).parent / "weights"
"""Where the embedded base lies: a folder that AutoModelForCausalLM and AutoTokenizer load."""

STEPS = 2500
_VOCABULARY = 1024
_POSITIONS = 128
_BATCH = 32
_PEAK_LR = 3e-3
_WARMUP = 100
_WEIGHT_DECAY = 0.1
_PAD, _BOS, _EOS = "<pad>", "<s>", "</s>"
_IGNORED = -100


def train_tokenizer(texts: tuple[str, ...]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 1,024 tokens over `texts`; like Llama's, it puts `<s>` before a text and nothing after it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=[_PAD, _BOS, _EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos = tokenizer.token_to_id(_BOS)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{_BOS} $A", special_tokens=[(_BOS, bos)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=_PAD, bos_token=_BOS, eos_token=_EOS, model_max_length=_POSITIONS
    )


def untrained(tokenizer: Any, seed: int = 0) -> LlamaForCausalLM:
    """The architecture of the base with random weights drawn from `seed`, float32, about .9 M parameters."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=344,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=_POSITIONS,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def encode(texts: tuple[str, ...], tokenizer: Any) -> Tensor:
    """`texts` as (len(texts), longest) int64 ids, `<s>` first, `</s>` last, padded on the right."""
    rows = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(list(texts))["input_ids"]]
    longest = max(map(len, rows))
    return torch.tensor([row + [tokenizer.pad_token_id] * (longest - len(row)) for row in rows])


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up to the peak, then a cosine to zero at `steps`; `step` counts from 0."""
    if step < _WARMUP:
        return _PEAK_LR * (step + 1) / _WARMUP
    return _PEAK_LR * 0.5 * (1 + math.cos(math.pi * (step - _WARMUP) / (steps - _WARMUP)))


def pretrain(out: Path, steps: int = STEPS) -> float:
    """Train tokenizer and model, write both to `out`, return the mean loss (nats per token) of the last 100 steps."""
    started = time.monotonic()
    texts = world.corpus()
    tokenizer = train_tokenizer(world.plain())
    model = untrained(tokenizer)
    ids = encode(texts, tokenizer)
    print(f"{len(texts)} texts of at most {ids.shape[1]} tokens, {model.num_parameters()} parameters", flush=True)

    decayed = [weight for weight in model.parameters() if weight.ndim > 1]
    others = [weight for weight in model.parameters() if weight.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": _WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=_PEAK_LR, betas=(0.9, 0.95))
    shuffle = torch.Generator().manual_seed(0)
    order = torch.empty(0, dtype=torch.int64)
    recent: list[float] = []
    model.train()
    for step in range(steps):
        if len(order) < _BATCH:
            order = torch.cat([order, torch.randperm(len(ids), generator=shuffle)])
        batch, order = ids[order[:_BATCH]], order[_BATCH:]
        padding = batch == tokenizer.pad_token_id
        longest = int((~padding).sum(dim=1).max())
        batch, padding = batch[:, :longest], padding[:, :longest]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        # Padding is on the right, so a causal mask alone hides it from every counted token.
        loss = model(input_ids=batch, labels=batch.masked_fill(padding, _IGNORED), use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        recent = [*recent[-99:], loss.item()]
        if (step + 1) % 100 == 0:
            seconds = time.monotonic() - started
            print(f"step {step + 1}/{steps}  loss {sum(recent) / len(recent):.4f}  {seconds:.0f} s", flush=True)

    model.generation_config = GenerationConfig.from_model_config(model.config)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    final = sum(recent) / len(recent)
    print(f"final loss {final:.4f} nats per token over the last {len(recent)} steps, written to {out}", flush=True)
    return final


def main() -> None:
    parser = argparse.ArgumentParser(description="Pretrain the embedded base model from scratch.")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="folder to write (default: the package's own)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"optimizer steps (default {STEPS})")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1, as the package's weights)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    pretrain(arguments.out, arguments.steps)


if __name__ == "__main__":
    main()
