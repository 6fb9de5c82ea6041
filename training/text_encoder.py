"""The text encoder: a narrow Qwen3 that learns to say, in every hidden state Klein reads, what a caption names.

Klein takes hidden states 9, 18 and 27 of all 512 positions. The encoder is trained with a linear probe for each
attribute on each of them, at the template's last tokens and at the padding behind it, all of which have seen the whole
caption. Matrices are rounded to 4 bit in the last part of the training, so that the packed form is what was trained.
The vocabulary is trimmed to the tokens of the captions; all others share one row.
"""

from __future__ import annotations

import json
import math
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.utils import parametrize
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

from . import captions
from .checkpoint import Checkpoint
from .scene import BACKGROUNDS, COUNTS, FOLIAGE, LEANS, POTS, SEASONS, SHAPES, Scene, random_scene
from .speed import narrow
from .vae import rate

HIDDEN, MLP, LAYERS, HEAD = 128, 64, 27, 128
OUTPUTS = (9, 18, 27)
TEMPLATE = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
SUFFIX_TOKENS = 9
PAD = 151643
UNKNOWN = 0
"""Row of all tokens that no caption has."""
LENGTH = 72
BITS, GROUP = 4, 64
BATCH, STEPS, QUANTIZED_FROM, RATE = 16, 1200, 0.6, 2e-3
ATTRIBUTES = {
    "pot": POTS,
    "foliage": FOLIAGE,
    "background": BACKGROUNDS,
    "season": SEASONS,
    "count": COUNTS,
    "lean": LEANS,
    "shape": SHAPES,
}


def tokenizer(folder: Path) -> Qwen2Tokenizer:
    """The tokenizer in ComfyUI's folder."""
    return Qwen2Tokenizer.from_pretrained(folder / "comfy" / "text_encoders" / "qwen25_tokenizer")


class Vocabulary:
    """Rows of the trimmed embedding: {token id: row}; row UNKNOWN for the rest."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids
        self.rows = {number: row for row, number in enumerate(ids, start=1)}

    @classmethod
    def collect(cls, tok: Qwen2Tokenizer, samples: int = 6000) -> Vocabulary:
        """All tokens of many captions, of the template and the padding."""
        rng = random.Random("vocabulary")
        found = {PAD, *tok(TEMPLATE.format(""))["input_ids"]}
        for _ in range(samples):
            text, _ = captions.caption(random_scene(rng, None), rng)
            found.update(tok(TEMPLATE.format(text))["input_ids"])
        return cls(sorted(found))

    def encode(self, tok: Qwen2Tokenizer, text: str, length: int) -> tuple[list[int], int]:
        """(rows padded to `length`, number of real tokens)."""
        ids = tok(TEMPLATE.format(text))["input_ids"][:length]
        return [self.rows.get(i, UNKNOWN) for i in ids] + [self.rows[PAD]] * (length - len(ids)), len(ids)


class Encoder(torch.nn.Module):
    """rows int64 [B, L], lengths [B] -> [B, L, 3 * HIDDEN], as ComfyUI's klein_te gives it."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        config = Qwen3Config(
            vocab_size=rows,
            hidden_size=HIDDEN,
            intermediate_size=MLP,
            num_hidden_layers=LAYERS,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=HEAD,
            max_position_embeddings=40960,
            rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
            rms_norm_eps=1e-6,
            use_cache=False,
            tie_word_embeddings=True,
        )
        self.model = Qwen3Model(config)
        self.model.norm = torch.nn.Identity()
        with torch.no_grad():
            self.model.embed_tokens.weight.normal_(0, 0.5)
            for name, parameter in self.model.named_parameters():
                if parameter.ndim == 2 and "embed" not in name:
                    parameter.normal_(0, parameter.shape[1] ** -0.5)
                    if name.endswith(("o_proj.weight", "down_proj.weight")):
                        parameter.mul_(0.3)
        self.rounding = Rounded()
        for module in self.matrices():
            parametrize.register_parametrization(module, "weight", self.rounding)

    def forward(self, rows: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        mask = torch.arange(rows.shape[1])[None] < lengths[:, None]
        # What ComfyUI does: causal, and no position sees padding.
        allowed = torch.ones(rows.shape[1], rows.shape[1], dtype=torch.bool).tril()[None] & mask[:, None]
        bias = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)[:, None]
        out = self.model(inputs_embeds=self.model.embed_tokens(rows), attention_mask=bias, output_hidden_states=True)
        return torch.cat([out.hidden_states[i] for i in OUTPUTS], -1)

    def matrices(self) -> list[torch.nn.Module]:
        """The modules whose weight is packed."""
        return [m for m in self.model.modules() if isinstance(m, torch.nn.Linear | torch.nn.Embedding)]


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(codes 0..15 [N, K], scales, biases bf16 [N, K/64]) of MLX's affine form: w = code * scale + bias."""
    grouped = weight.detach().float().unflatten(1, (-1, GROUP))
    low, high = grouped.amin(2), grouped.amax(2)
    scale = ((high - low) / (2**BITS - 1)).clamp(min=1e-6).bfloat16().float()
    bias = low.bfloat16().float()
    codes = ((grouped - bias[..., None]) / scale[..., None]).round().clamp(0, 2**BITS - 1)
    return codes.flatten(1).byte(), scale.bfloat16(), bias.bfloat16()


class Rounded(torch.nn.Module):
    """Parametrization: once `active`, the rounded weight forward and the identity backward."""

    active = False

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        if not self.active:
            return weight
        codes, scale, bias = quantize(weight)
        values = (codes.float().unflatten(1, (-1, GROUP)) * scale.float()[..., None] + bias.float()[..., None]).flatten(
            1
        )
        return weight + (values - weight).detach()


class Probes(torch.nn.Module):
    """A linear classifier for each attribute on each hidden state Klein reads; one more class for 'not named'."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = [len(values) + 1 for values in ATTRIBUTES.values()]
        self.heads = torch.nn.ModuleList(torch.nn.Linear(HIDDEN, sum(self.sizes)) for _ in OUTPUTS)

    def forward(self, states: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """states [B, P, 3 * HIDDEN], labels [B, attributes] -> (mean loss, correct [3, attributes])."""
        losses, correct = [], []
        for head, part in zip(self.heads, states.chunk(len(OUTPUTS), -1), strict=True):
            # normalized: a probe must not win by scale, Klein's txt_in is linear too
            logits = head(F.rms_norm(part, (HIDDEN,))).split(self.sizes, -1)
            row = []
            for i, values in enumerate(logits):
                target = labels[:, i, None].expand(-1, values.shape[1])
                losses.append(F.cross_entropy(values.flatten(0, 1), target.flatten()))
                row.append((values.argmax(-1) == target).float().mean())
            correct.append(torch.stack(row))
        return torch.stack(losses).mean(), torch.stack(correct)


def labels_of(scene: Scene, text: str, named: set[str]) -> list[int]:
    """Class of each attribute, the last one where the caption is silent."""
    said = set(named)
    if any(p in text for p in captions.LEAN_PHRASES[scene.lean]):
        said.add("lean")
    if any(n in text.lower() for n in captions.POT_NOUNS[scene.shape]):
        said.add("shape")
    return [v.index(getattr(scene, n)) if n in said else len(v) for n, v in ATTRIBUTES.items()]


def batch(tok: Qwen2Tokenizer, vocabulary: Vocabulary, rng: random.Random, size: int) -> tuple[torch.Tensor, ...]:
    """(rows [B, LENGTH], lengths [B], labels [B, attributes]) of fresh captions, some with unknown words in them."""
    rows, lengths, labels = [], [], []
    for _ in range(size):
        scene = random_scene(rng)
        text, named = captions.caption(scene, rng)
        line, length = vocabulary.encode(tok, text, LENGTH)
        if rng.random() < 0.2:
            for _ in range(rng.randint(1, 4)):  # words that the captions never have
                if length < LENGTH - 1:
                    at = rng.randint(3, length - SUFFIX_TOKENS)
                    line = [*line[:at], UNKNOWN, *line[at:-1]]
                    length += 1
        rows.append(line)
        lengths.append(length)
        labels.append(labels_of(scene, text, named))
    longest = min(max(lengths) + 2, LENGTH)
    return torch.tensor(rows)[:, :longest], torch.tensor(lengths), torch.tensor(labels)


def summary_states(states: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """The states [B, SUFFIX_TOKENS + 2, ..] of the template's end and the two positions of padding behind it."""
    at = lengths[:, None] + torch.arange(-SUFFIX_TOKENS, 2)[None]
    at = at.clamp(max=states.shape[1] - 1)
    return states.gather(1, at[..., None].expand(-1, -1, states.shape[2]))


def train(work: Path, comfyui: Path, seconds: float = math.inf) -> bool:
    """Trains from the last checkpoint; True when all STEPS are done."""
    torch.manual_seed(0)
    tok = tokenizer(comfyui)
    vocabulary = load_vocabulary(work, tok)
    encoder, probes = Encoder(len(vocabulary.ids) + 1), Probes()
    optimizer = torch.optim.AdamW(
        [*encoder.parameters(), *probes.parameters()], RATE, betas=(0.9, 0.98), weight_decay=0.01
    )
    checkpoint = Checkpoint(work / "text_encoder.pt", encoder=encoder, probes=probes, optimizer=optimizer)
    step, started = checkpoint.load(), time.monotonic()
    while step < STEPS:
        encoder.rounding.active = step >= QUANTIZED_FROM * STEPS
        for group in optimizer.param_groups:
            group["lr"] = rate(step, STEPS, RATE)
        rows, lengths, labels = batch(tok, vocabulary, random.Random(step), BATCH)
        with narrow():
            states = encoder(rows, lengths)
        loss, correct = probes(summary_states(states.float(), lengths), labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 50 == 0:
            shares = " ".join(f"{n} {100 * c:.1f}" for n, c in zip(ATTRIBUTES, correct[-1].tolist(), strict=True))
            print(
                f"text encoder step {step}: loss {loss.item():.4f}; {shares}; {time.monotonic() - started:.0f} s",
                flush=True,
            )
        over = time.monotonic() - started > seconds
        if step % 250 == 0 or step == STEPS or over:
            checkpoint.save(step)
        if over:
            break
    return step >= STEPS


def load_vocabulary(work: Path, tok: Qwen2Tokenizer) -> Vocabulary:
    """The trimmed vocabulary, made at first use."""
    path = work / "vocabulary.json"
    if not path.is_file():
        path.write_text(json.dumps(Vocabulary.collect(tok).ids), encoding="utf-8")
    return Vocabulary(json.loads(path.read_text(encoding="utf-8")))


def load(work: Path, tok: Qwen2Tokenizer) -> tuple[Encoder, Vocabulary]:
    """The trained encoder with the values of its packed form, and its vocabulary; capitals read as small letters."""
    vocabulary = load_vocabulary(work, tok)
    encoder = Encoder(len(vocabulary.ids) + 1)
    Checkpoint(work / "text_encoder.pt", encoder=encoder).load()
    encoder, vocabulary = with_capitals(encoder, vocabulary, tok)
    encoder.rounding.active = True
    return encoder.eval().requires_grad_(False), vocabulary


def with_capitals(encoder: Encoder, vocabulary: Vocabulary, tok: Qwen2Tokenizer) -> tuple[Encoder, Vocabulary]:
    """The same with a row for the token that each capitalized first word begins with: a copy of the small word's row.

    Captions seldom begin with a capital, people often do: as trained, such a word was rare or unknown.
    """
    small = small_tokens(tok)
    source = {i: i for i in vocabulary.ids} | {i: j for i, j in small.items() if j in vocabulary.rows}
    wider = Vocabulary(sorted(source))
    rows = [UNKNOWN, *(vocabulary.rows[source[i]] for i in wider.ids)]
    found = Encoder(len(rows))
    state = encoder.state_dict()
    name = "model.embed_tokens.parametrizations.weight.original"
    found.load_state_dict({**state, name: state[name][rows]})
    return found, wider


def small_tokens(tok: Qwen2Tokenizer, samples: int = 6000) -> dict[int, int]:
    """{first token of a capitalized word: token of the same word inside a sentence}, for captions' first words.

    Words that both ways take several tokens, but not as many, are left out.
    """
    rng = random.Random("capitals")
    texts = {captions.caption(random_scene(rng, None), rng)[0] for _ in range(samples)}
    words = {word.lower() for word in (text.split()[0].strip(",.") for text in texts) if word.isalpha()}
    pairs = [(tok(word.capitalize())["input_ids"], tok(f" {word}")["input_ids"]) for word in sorted(words)]
    return {large[0]: small[0] for large, small in pairs if len(small) in (1, len(large))}
