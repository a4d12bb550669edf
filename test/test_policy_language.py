"""The instruction encoder: what it reads, what it refuses, and that padding and word order do what they should."""

import json
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from vla_nodes.policy.language import InstructionEncoder, LanguageConfig, reverse_valid
from vla_nodes.training.language import corpus
from vla_nodes.training.language.corpus import has_held_out, instruction, unique
from vla_nodes.training.language.distill import agreement, losses, spearman
from vla_nodes.training.language.minilm import MiniLM

torch.set_num_threads(1)
WORDS = "pick up the red blue block cube put it in bowl open drawer please and then place on left".split()
CONFIG = {"vocabulary": 32, "embedding": 8, "d_model": 32, "n_layer": 2, "d_state": 8, "headdim": 16, "sentence": 12}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder as training/language/distill.py writes it, with a small vocabulary and random weights."""
    path = tmp_path_factory.mktemp("language")
    vocabulary = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS, "##s"])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.enable_padding(length=128)  # as the teacher's file: the encoder must not inherit these
    tokenizer.enable_truncation(6)
    tokenizer.save(str(path / "tokenizer.json"))
    torch.manual_seed(0)
    encoder = InstructionEncoder.from_config(CONFIG, path / "tokenizer.json")
    (path / "config.json").write_text(json.dumps(encoder.config.to_dict()))
    tensors = {n: t.contiguous() for n, t in encoder.state_dict().items()}
    tensors["embedding.weight"] = tensors["embedding.weight"].half()
    save_file(tensors, path / "model.safetensors")
    return path


@pytest.fixture(scope="module")
def encoder(folder):
    return InstructionEncoder.from_folder(folder)


sentences = st.lists(st.sampled_from(WORDS), min_size=1, max_size=20).map(" ".join)


@settings(max_examples=12, deadline=None)
@given(texts=st.lists(sentences, min_size=1, max_size=5))
def test_padding_and_batch_mates_change_nothing(encoder, texts):
    together = encoder.encode(texts)
    for i, text in enumerate(texts):
        alone = encoder.encode([text])
        n = alone.tokens.shape[1]
        assert torch.allclose(together.tokens[i, :n], alone.tokens[0], atol=1e-5)
        assert torch.allclose(together.sentence[i], alone.sentence[0], atol=1e-5)
        assert together.mask[i].sum() == n and not together.tokens[i, n:].any()


def test_what_stands_in_the_padding_cannot_be_seen(encoder):
    ids, mask = encoder.tokenize(["pick up the red block", "open the drawer"])
    other = ids.clone()
    other[~mask] = 7
    assert torch.equal(encoder(ids, mask).tokens, encoder(other, mask).tokens)


def test_a_hyphen_within_a_word_is_no_pause(encoder):
    said, plain = encoder.encode(["the left-hand side"]), encoder.encode(["the left hand side"])
    assert torch.equal(said.tokens, plain.tokens)
    assert not torch.equal(encoder.tokenize(["open - the drawer"])[0], encoder.tokenize(["open the drawer"])[0])


def test_every_token_sees_both_sides_and_order_matters(encoder):
    a, b = encoder.encode(["pick up the red block"]).tokens[0], encoder.encode(["pick up the red bowl"]).tokens[0]
    assert (a[0] - b[0]).abs().max() > 1e-4  # the first token knows of the last
    a, b = encoder.encode(["put red on blue"]).sentence, encoder.encode(["put blue on red"]).sentence
    assert float((a * b).sum()) < 1 - 1e-4


def test_shapes_and_unit_length(encoder):
    tokens, mask, sentence = encoder.encode(["Please PICK up the blocks", "open it"])
    assert tokens.shape == (2, 8, 32) and mask.tolist()[1] == [True] * 4 + [False] * 4  # CLS, words, ##s, SEP
    assert sentence.shape == (2, 12) and torch.allclose(sentence.norm(dim=1), torch.ones(2), atol=1e-5)


@pytest.mark.parametrize(
    ("text", "reason"),
    [("", "empty"), ("  \n", "empty"), ("red " * 65, "260 characters"), ("red " * 47, "49 tokens"),
     ("qwxz!", "no word"), ("\u4f60\u597d", "no word")],
)  # fmt: skip
def test_refusals_name_the_reason_and_nothing_is_cut_silently(encoder, text, reason):
    assert reason in encoder.check(text)
    with pytest.raises(ValueError, match=reason):
        encoder.encode(["open the drawer", text])


@settings(max_examples=25, deadline=None)
@given(text=st.text(max_size=300))
def test_any_text_is_encoded_finitely_or_refused(encoder, text):
    if reason := encoder.check(text):
        assert "\n" not in reason
    else:
        assert encoder.encode([text]).sentence.isfinite().all()


def test_files_that_do_not_fit_are_refused(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="beside the checkpoint"):
        InstructionEncoder.from_config(CONFIG, tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="not a tokeniser file"):
        InstructionEncoder.from_config(CONFIG, tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match="the encoder has 5"):
        InstructionEncoder.from_config({**CONFIG, "vocabulary": 5}, folder / "tokenizer.json")
    with pytest.raises(ValueError, match="d_modle"):
        LanguageConfig.from_dict({"d_modle": 3})
    with pytest.raises(ValueError, match="n_layer = '1e9'"):
        LanguageConfig.from_dict({"n_layer": "1e9"})
    with pytest.raises(RuntimeError, match="no tokeniser"):
        InstructionEncoder(LanguageConfig.from_dict(CONFIG)).encode(["open"])


def test_a_frozen_embedding_gets_no_gradient(folder):
    encoder = InstructionEncoder.from_config(CONFIG, folder / "tokenizer.json")
    encoder.freeze_embedding()
    encoder(*encoder.tokenize(["pick up the cube"])).sentence.sum().backward()
    assert encoder.embedding.weight.grad is None and encoder.expand.weight.grad.abs().max() > 0


def test_reverse_valid_is_its_own_inverse_and_keeps_padding():
    x = torch.arange(10.0).view(2, 5, 1)
    lengths = torch.tensor([3, 5])
    reversed_once = reverse_valid(x, lengths)
    assert reversed_once[..., 0].tolist() == [[2, 1, 0, 3, 4], [9, 8, 7, 6, 5]]
    assert torch.equal(reverse_valid(reversed_once, lengths), x)


def test_training_sentences_hold_none_of_the_held_out_words():
    rng, seen = random.Random(0), set()
    train = unique(lambda: instruction(rng), 500, lambda t: not has_held_out(t), seen)
    held = unique(lambda: instruction(rng), 50, has_held_out, seen)
    assert len({*train, *held}) == 550
    kept = set(corpus.WORDS["held_out"])
    assert not any(set(t.lower().replace(".", " ").replace(",", " ").split()) & kept for t in train)
    with pytest.raises(RuntimeError, match="fewer than 2"):
        unique(lambda: "stop", 2, lambda t: True, set())


def test_agreement_knows_likeness_from_chance():
    torch.manual_seed(0)
    a, b = (torch.nn.functional.normalize(torch.randn(80, 20), dim=1) for _ in range(2))
    turned = a @ torch.linalg.qr(torch.randn(20, 20))[0]  # a rotation keeps every similarity, but not the vectors
    same = agreement(turned, a)
    assert same["spearman_pairs"] > 0.999 and same["same_nearest"] == 1.0 and same["cosine_to_teacher"] < 0.5
    assert abs(agreement(b, a)["spearman_pairs"]) < 0.1
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert spearman(x, x**3) == pytest.approx(1) and spearman(x, -x) == pytest.approx(-1)
    assert spearman(x, torch.tensor([1.0, 3.0, 2.0, 4.0])) == pytest.approx(0.8)  # 1 - 6*2/(4*15)
    assert [float(v) for v in losses(a, a)] == pytest.approx([0, 0], abs=1e-5)
    assert all(float(v) > 0.05 for v in losses(b, a))


def test_a_student_learns_a_teacher(encoder, folder):
    """The distillation's own losses, descended for a few steps on a toy teacher, raise the agreement."""
    torch.manual_seed(1)
    student = InstructionEncoder.from_config(CONFIG, folder / "tokenizer.json")
    rng = random.Random(2)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(2, 6))) for _ in range(64)]
    target = encoder.encode(texts).sentence
    ids, mask = student.tokenize(texts)
    before = agreement(student(ids, mask).sentence.detach(), target)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    for _ in range(45):
        cosine, relation = losses(student(ids, mask).sentence, target)
        optimizer.zero_grad()
        (cosine + 10 * relation).backward()
        optimizer.step()
    after = agreement(student(ids, mask).sentence.detach(), target)
    assert after["cosine_to_teacher"] > 0.9 > before["cosine_to_teacher"]
    assert after["spearman_pairs"] > before["spearman_pairs"] + 0.1


def test_teacher_forward_equals_transformers_bert(folder, tmp_path):
    transformers = pytest.importorskip("transformers", reason="parity needs transformers (CI installs it)")
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=40, hidden_size=384, num_hidden_layers=2, num_attention_heads=12,
                                     intermediate_size=64)  # fmt: skip
    bert = transformers.BertModel(config, add_pooling_layer=False).eval()
    for p in bert.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    save_file({n: t.contiguous() for n, t in bert.state_dict().items()}, tmp_path / "model.safetensors")
    ids = torch.randint(0, 40, (3, 9))
    mask = torch.arange(9) < torch.tensor([[9], [4], [6]])
    with torch.no_grad():
        states = bert(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    pooled = (states * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
    expected = torch.nn.functional.normalize(pooled, dim=1)
    assert torch.allclose(MiniLM(tmp_path)(ids, mask), expected, atol=1e-5)
