"""Distils all-MiniLM-L6-v2 into the instruction encoder.

The student learns the teacher's sentence embeddings (cosine) and their similarities to each other (relational knowledge
distillation, Park et al., arXiv 1904.05068) on generated sentences. Writes config.json, model.safetensors,
tokenizer.json and report.json; the agreement it prints is measured on sentences, and on words, that training never saw.
"""

from __future__ import annotations

import json
import math
import random
import shutil
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from vla_nodes import cli
from vla_nodes.policy.language import InstructionEncoder, LanguageConfig, pad_rows
from vla_nodes.progress import progress, say
from vla_nodes.training.language.corpus import general, has_held_out, instruction, unique
from vla_nodes.training.language.minilm import MiniLM, teacher_folder


def embed_all(teacher: MiniLM, rows: list[list[int]], batch: int = 256) -> Tensor:
    """Teacher embeddings (N, 384) of token rows, batched by length so that little is spent on padding."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    out = torch.empty(len(rows), 384)
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        out[chosen] = teacher(*pad_rows([rows[i] for i in chosen]))
    return out


def word_vectors(teacher: MiniLM, size: int, special: tuple[int, int]) -> Tensor:
    """(vocabulary, size): principal components of each token's word embedding and its embedding as a sentence alone.

    The second half is what model2vec-style static embeddings use; the first keeps pieces of words apart.
    """
    words = teacher.word_embeddings
    alone = embed_all(teacher, [[special[0], i, special[1]] for i in range(len(words))], 1024)
    parts = []
    for part in (words, alone):
        part = part - part.mean(0)
        parts.append(part / part.square().sum(1).mean().sqrt())
    joined = torch.cat(parts, 1)
    values, axes = torch.linalg.eigh(joined.T @ joined / len(joined))
    vectors = joined @ axes[:, -size:].flip(1)
    print(f"word vectors: {size} components keep {float(values[-size:].sum() / values.sum()):.1%} of the variance")
    return vectors / vectors.square().mean().sqrt()


def ranks(x: Tensor) -> Tensor:
    """Ranks along the last axis (similarities are distinct floats, so ties do not matter)."""
    return x.argsort(-1).argsort(-1).double()


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's rank correlation along the last axis."""
    a, b = ranks(a), ranks(b)
    return F.cosine_similarity(a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True), dim=-1)


def agreement(student: Tensor, teacher: Tensor) -> dict[str, float]:
    """How alike two sets of embeddings (N, 384) rank their own similarities; and how near the vectors are."""
    n = len(student)
    upper = torch.triu_indices(n, n, 1)
    s, t = student @ student.T, teacher @ teacher.T
    off = ~torch.eye(n, dtype=torch.bool)
    nearest = (s.masked_fill(~off, -2).argmax(1) == t.masked_fill(~off, -2).argmax(1)).float().mean()
    return {
        "spearman_pairs": float(spearman(s[upper[0], upper[1]], t[upper[0], upper[1]])),
        "spearman_per_sentence": float(spearman(s[off].view(n, n - 1), t[off].view(n, n - 1)).mean()),
        "same_nearest": float(nearest),
        "cosine_to_teacher": float((student * teacher).sum(1).mean()),
    }


def losses(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """1 - cosine to the teacher, and the mean squared error of the batch's similarity matrix."""
    return 1 - (student * teacher).sum(1).mean(), F.mse_loss(student @ student.T, teacher @ teacher.T)


def distill(args: cli.Options) -> None:
    """The command."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    started = time.monotonic()

    teacher = MiniLM(teacher_folder())
    config = LanguageConfig()
    student = InstructionEncoder.from_config(config, teacher.tokenizer_file)
    tokenizer = student.tokenizer
    words = sorted(w for w in tokenizer.get_vocab() if w.isascii() and w.isalpha() and len(w) > 2)
    seen: set[str] = set()
    held = {
        "held-out sentences": unique(lambda: instruction(rng), 400, lambda t: not has_held_out(t), seen),
        "held-out words": unique(lambda: instruction(rng), 400, has_held_out, seen),
        "general text": unique(lambda: general(rng, words), 400, lambda t: True, seen),
    }
    texts = unique(lambda: instruction(rng), args.instructions, lambda t: not has_held_out(t), seen)
    texts += unique(lambda: general(rng, words), args.general, lambda t: not has_held_out(t), seen)
    rows = [e.ids[: config.max_tokens] for e in tokenizer.encode_batch(texts)]
    targets = embed_all(teacher, rows)
    print(f"teacher embedded {len(rows)} sentences after {time.monotonic() - started:.0f} s", flush=True)

    special = tokenizer.encode("").ids
    with torch.no_grad():
        student.embedding.weight.copy_(word_vectors(teacher, config.embedding, (special[0], special[-1])))
    student.freeze_embedding(not args.train_embedding)
    parameters = [p for p in student.parameters() if p.requires_grad]
    trained = sum(p.numel() for p in parameters)
    print(f"student: {sum(p.numel() for p in student.parameters()):,} parameters, {trained:,} trained", flush=True)
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=0.01)
    held_rows = {name: [e.ids for e in tokenizer.encode_batch(t)] for name, t in held.items()}
    held_targets = {name: embed_all(teacher, r) for name, r in held_rows.items()}

    def evaluate() -> dict[str, dict[str, float]]:
        student.eval()
        with torch.no_grad():
            result = {
                name: agreement(student(*pad_rows(r)).sentence, held_targets[name]) for name, r in held_rows.items()
            }
        student.train()
        return result

    begin, step, shown, report = time.monotonic(), 0, -1, {}
    done = 0.0
    bar = progress(total=args.minutes, label="distilling", bar="{l_bar}{bar}| {n:.1f}/{total:g} min",
                   line="distilling: {n:.1f} of {total:g} min")  # fmt: skip
    while done < 1.0:
        lr = args.learning_rate * min(1.0, (step + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        for group in optimizer.param_groups:
            group["lr"] = lr
        # sentences of like length train together (little padding), instructions and general text mixed
        pool = sorted(torch.randint(len(rows), (4 * args.batch,)).tolist(), key=lambda i: len(rows[i]))
        for k in torch.randperm(4).tolist():
            chosen = pool[k * args.batch : (k + 1) * args.batch]
            cosine, relation = losses(student(*pad_rows([rows[i] for i in chosen])).sentence, targets[chosen])
            optimizer.zero_grad(set_to_none=True)
            (cosine + args.relational * relation).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            step += 1
        done = (time.monotonic() - begin) / (60 * args.minutes)
        bar.update(min(1.0, done) * args.minutes - bar.n)
        if int(done * 8) > shown or done >= 1.0:
            shown = int(done * 8)
            report = evaluate()
            say(f"step {step} at {done:.0%}: cosine loss {cosine.item():.4f}, relational {relation.item():.5f}")
            for name, figures in report.items():
                say(f"  {name}: " + ", ".join(f"{k} {v:.3f}" for k, v in figures.items()))
            save(student, teacher, args.out, report, {"steps": step, "minutes": args.minutes, "seed": args.seed})
    bar.close()


def save(student: InstructionEncoder, teacher: MiniLM, out: Path, report: dict, provenance: dict) -> None:
    """Writes the folder that InstructionEncoder.from_folder reads; word vectors as float16 (they are frozen data)."""
    out.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.detach().clone().contiguous() for name, t in student.state_dict().items()}
    tensors["embedding.weight"] = tensors["embedding.weight"].half()
    save_file(tensors, out / "model.safetensors")
    shutil.copyfile(teacher.tokenizer_file, out / "tokenizer.json")
    (out / "config.json").write_text(json.dumps(student.config.to_dict(), indent=2) + "\n")
    (out / "report.json").write_text(json.dumps({"agreement": report, **provenance}, indent=2) + "\n")


command = cli.Command(
    "distill",
    """
    Distils all-MiniLM-L6-v2, a sentence model, into the instruction encoder.

    The student learns the teacher's sentence embeddings and their similarities to each other on generated sentences.
    The agreement it prints is measured on sentences, and on words, that training never saw.
    """,
    distill,
    cli.out("folder for config.json, model.safetensors, tokenizer.json and report.json", required=True),
    cli.number("--minutes", "time to train the student [min]", 12.0, least=0.01),
    cli.count("--instructions", "sentences that ask for something", 24000),
    cli.count("--general", "other sentences", 16000),
    cli.count("--batch", "sentences in a step", 128),
    cli.number("--learning-rate", "of AdamW, at its highest", 2e-3),
    cli.number("--relational", "weight of the similarity loss", 10.0),
    cli.flag("--train-embedding", "also train the word vectors"),
    cli.count("--threads", "CPU threads", 1),
    cli.seed("seed of the sentences and of the student"),
    examples="""
    python -m vla_nodes distill --out work/language
    """,
    errors=(OSError, ImportError),
)


def main(argv: list[str] | None = None) -> int:
    return cli.main(command, argv)


if __name__ == "__main__":
    raise SystemExit(main())
