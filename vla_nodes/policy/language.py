"""The instruction encoder: WordPiece tokens -> small bidirectional Mamba-2 -> token states and one sentence embedding.

Distilled from all-MiniLM-L6-v2 (training/language/distill.py); nothing of the teacher is needed at run time. The
tokeniser is the teacher's own WordPiece file, `tokenizer.json`, which lives beside the checkpoint.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vla_nodes.policy.mamba.mixers import Mamba2, RMSNorm

MAX_TOKENIZER_BYTES = 8 << 20
HYPHEN = re.compile(r"(?<=\w)-(?=\w)")


@dataclass(frozen=True)
class LanguageConfig:
    """Sizes of the encoder and the bounds on what it reads."""

    vocabulary: int = 30522  # WordPiece tokens of tokenizer.json
    embedding: int = 128  # width of a token's embedding
    d_model: int = 256  # width of the blocks
    n_layer: int = 2  # bidirectional Mamba-2 blocks
    d_state: int = 32  # state of a head, per channel
    headdim: int = 32  # channels of a head
    expand: int = 1  # inner width over d_model
    sentence: int = 384  # width of the sentence embedding, the teacher's
    max_tokens: int = 48  # a longer instruction is refused
    max_characters: int = 256  # likewise

    @classmethod
    def from_dict(cls, values: dict) -> LanguageConfig:
        """Raises ValueError naming an entry that is unknown or not a positive integer."""
        known = {f.name for f in fields(cls)}
        for name, value in values.items():
            if name not in known:
                raise ValueError(f"language config: unknown entry {name!r}, known are {', '.join(sorted(known))}")
            if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= 1 << 20:
                raise ValueError(f"language config: {name} = {value!r} must be a positive integer")
        return cls(**values)

    to_dict = asdict


class EncodedText(NamedTuple):
    """tokens (B, T, d_model) contextual states, mask (B, T) bool true on real tokens, sentence (B, 384) unit length."""

    tokens: Tensor
    mask: Tensor
    sentence: Tensor


def reverse_valid(x: Tensor, lengths: Tensor) -> Tensor:
    """Reverses the first lengths[b] tokens of every row of x (B, T, D) and leaves the padding behind them in place."""
    t = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
    order = torch.where(t < lengths.unsqueeze(1), lengths.unsqueeze(1) - 1 - t, t)
    return x.gather(1, order.unsqueeze(-1).expand_as(x))


class BidirectionalBlock(nn.Module):
    """x + forward(norm(x)) + reversed(backward(reversed(norm(x)))): every token sees the whole sentence.

    Padding stands at the end in both directions and both mixers are causal, so it cannot reach a real token.
    """

    def __init__(self, config: LanguageConfig):
        super().__init__()
        sizes = (config.d_model, config.d_state, 4, config.expand, config.headdim)
        self.norm = RMSNorm(config.d_model)
        self.forward_mixer = Mamba2(*sizes, chunk_size=config.max_tokens)
        self.backward_mixer = Mamba2(*sizes, chunk_size=config.max_tokens)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        u = self.norm(x)
        ahead, _ = self.forward_mixer(u)
        back, _ = self.backward_mixer(reverse_valid(u, lengths))
        return x + ahead + reverse_valid(back, lengths)


class InstructionEncoder(nn.Module):
    """Text -> EncodedText. Build with `from_config` or `from_folder`, call `encode`; `check` says what it refuses.

    A frozen embedding keeps words that training never saw comparable with those it saw.
    """

    def __init__(self, config: LanguageConfig, tokenizer: Any = None):
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.embedding = nn.Embedding(config.vocabulary, config.embedding)
        self.expand = nn.Linear(config.embedding, config.d_model)
        self.layers = nn.ModuleList(BidirectionalBlock(config) for _ in range(config.n_layer))
        self.norm_f = RMSNorm(config.d_model)
        self.weigh = nn.Linear(config.d_model, 1)  # how much a token counts in the sentence
        self.project = nn.Linear(config.d_model, config.sentence)

    @classmethod
    def from_config(cls, config: LanguageConfig | dict, tokenizer: str | Path) -> InstructionEncoder:
        """An encoder with fresh weights and the tokeniser of the given file (for load_state_dict or training)."""
        config = LanguageConfig.from_dict(config) if isinstance(config, dict) else config
        return cls(config, load_tokenizer(tokenizer, config))

    @classmethod
    def from_folder(cls, folder: str | Path) -> InstructionEncoder:
        """Loads what training/language/distill.py wrote: config.json, model.safetensors and tokenizer.json."""
        from safetensors.torch import load_file

        folder = Path(folder)
        encoder = cls.from_config(json.loads((folder / "config.json").read_text()), folder / "tokenizer.json")
        encoder.load_state_dict(load_file(folder / "model.safetensors"))
        return encoder.eval()

    def freeze_embedding(self, frozen: bool = True) -> None:
        """Keeps the word vectors as they are while the rest trains."""
        self.embedding.weight.requires_grad_(not frozen)

    def check(self, text: str) -> str:
        """ "" when `text` can be encoded, else one line saying why not."""
        if not text.strip():
            return "the instruction is empty"
        if len(text) > self.config.max_characters:
            return f"the instruction has {len(text)} characters, at most {self.config.max_characters} are read"
        encoding = self._tokenizer().encode(_words(text))
        if len(encoding.ids) > self.config.max_tokens:
            return f"the instruction has {len(encoding.ids)} tokens, at most {self.config.max_tokens} are read"
        if all(special or token == "[UNK]" for special, token in
               zip(encoding.special_tokens_mask, encoding.tokens, strict=True)):  # fmt: skip
            return "the instruction holds no word the tokeniser knows"
        return ""

    def tokenize(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """ids (B, T) and mask (B, T), T the longest of the batch; ValueError names the first text `check` refuses."""
        if not texts:
            raise ValueError("no instruction to encode")
        for text in texts:
            if reason := self.check(text):
                raise ValueError(f"{reason}: {text[:60]!r}")
        rows = [encoding.ids for encoding in self._tokenizer().encode_batch([_words(text) for text in texts])]
        return pad_rows(rows, self.embedding.weight.device)

    @torch.no_grad()
    def encode(self, texts: list[str]) -> EncodedText:
        """Texts -> token states, mask, unit-length sentence embeddings. Deterministic, no gradient."""
        return self(*self.tokenize(texts))

    def forward(self, ids: Tensor, mask: Tensor) -> EncodedText:
        """ids (B, T) int64, mask (B, T) bool with the real tokens first -> EncodedText (tokens are zero on padding)."""
        lengths = mask.sum(1)
        x = self.expand(self.embedding(ids))
        for layer in self.layers:
            x = layer(x, lengths)
        tokens = self.norm_f(x) * mask.unsqueeze(-1)
        share = self.weigh(tokens).squeeze(-1).masked_fill(~mask, float("-inf")).softmax(-1)
        sentence = self.project((share.unsqueeze(-1) * tokens).sum(1))
        return EncodedText(tokens, mask, nn.functional.normalize(sentence, dim=-1))

    def _tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise RuntimeError("this encoder has no tokeniser: build it with from_config(config, tokenizer_file)")
        return self.tokenizer


def _words(text: str) -> str:
    """What is read of a text: "left-hand side" says no more than "left hand side", and no pause."""
    return HYPHEN.sub(" ", text)


def pad_rows(rows: list[list[int]], device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Token id lists -> ids (B, T) padded with 0 at the end, mask (B, T)."""
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for r, row in enumerate(rows):
        ids[r, : len(row)] = torch.tensor(row)
        mask[r, : len(row)] = True
    return ids.to(device), mask.to(device)


def load_tokenizer(path: str | Path, config: LanguageConfig) -> Any:
    """Reads a bounded tokenizer.json. Raises FileNotFoundError, or ValueError with the reason."""
    from tokenizers import Tokenizer

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no tokeniser file {path}: it lies beside the checkpoint as tokenizer.json")
    if path.stat().st_size > MAX_TOKENIZER_BYTES:
        raise ValueError(f"{path} is larger than {MAX_TOKENIZER_BYTES >> 20} MiB: not a tokeniser of this model")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception on malformed files
        raise ValueError(f"{path} is not a tokeniser file: {error}") from error
    if tokenizer.get_vocab_size() > config.vocabulary:
        raise ValueError(f"{path} has {tokenizer.get_vocab_size()} tokens, the encoder has {config.vocabulary}")
    tokenizer.no_padding()
    tokenizer.no_truncation()  # too long is refused with a reason, never cut silently
    return tokenizer
