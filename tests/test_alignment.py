"""Token alignments on prompts whose answer is known, and their properties on random ones."""

import logging
import string
from functools import cache

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from fisedit.alignment import TokenAlignment, align_embeddings, align_prompts
from fisedit.errors import InvalidAlignmentError, PromptTooLongError

LENGTH = 32
# Words that are one token; every other word is one token a letter.
WHOLE = ["a", "red", "house", "river", "in", "the", "with"]


def small_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer of single letters and a handful of merged words."""
    letters = string.ascii_lowercase + string.digits + ",.-"
    merges, tokens = [], [*letters, *(f"{letter}</w>" for letter in letters)]
    for word in WHOLE:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        # Merge from the right, so that no merge applies within another word before its last letters are joined.
        while len(pieces) > 1:
            pair = (pieces[-2], pieces[-1])
            pieces[-2:] = ["".join(pair)]
            if pair not in merges:
                merges.append(pair)
                tokens.append("".join(pair))
    vocab = {token: number for number, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=LENGTH)


TOKENIZER = small_tokenizer()


def ids(prompt: str) -> list[int]:
    return TOKENIZER(prompt, padding="max_length", max_length=LENGTH).input_ids


def tokens(prompt: str) -> list[str]:
    return TOKENIZER.convert_ids_to_tokens(TOKENIZER(prompt).input_ids)


def kept(alignment: TokenAlignment, count: int) -> list[int | None]:
    """The source of each of the first `count` tokens, None for new ones."""
    pairs = zip(alignment.index[:count].tolist(), alignment.weight[:count].tolist(), strict=True)
    return [index if weight == 1 else None for index, weight in pairs]


def test_the_small_tokenizer_is_what_the_tests_think():
    assert tokens("a red flag") == ["<|startoftext|>", "a</w>", "red</w>", "f", "l", "a", "g</w>", "<|endoftext|>"]


@pytest.mark.parametrize(
    ("recorded", "edited", "expected"),
    [
        ("a river", "a river", [0, 1, 2, 3]),
        ("a red house", "a house", [0, 1, 3, 4]),
        ("a house", "a red house", [0, 1, None, 2, 3]),
        ("a red house", "a flag house", [0, 1, None, None, None, None, 3, 4]),  # one token becomes four
        ("a flag house", "a red house", [0, 1, None, 6, 7]),  # four become one
        ("a flag", "a flat", [0, 1, None, None, None, None, 6]),  # a changed word is new as a whole
        ("a house", "a house with a flag", [0, 1, 2, None, None, None, None, None, None, 3]),
        ("a red house, a house", "a red house, a red river", [0, 1, 2, 3, 4, 5, None, None, 7]),
        ("", "a", [0, None, 1]),
        ("a red river", "the house", [0, None, None, 4]),
        ("A  Red HOUSE", "a red house", [0, 1, 2, 3, 4]),  # as the tokenizer reads it
    ],
)
def test_prompts_with_a_known_answer(recorded, edited, expected):
    assert kept(align_prompts(TOKENIZER, recorded, edited), len(expected)) == expected


def test_new_tokens_name_what_they_replace():
    alignment = align_prompts(TOKENIZER, "the red house in a river", "the flag house in a the river")
    assert alignment.index[:12].tolist() == [0, 1, 2, 0, 0, 0, 3, 4, 5, 0, 6, 7]
    assert alignment.weight[:12].tolist() == [1, 1, 0, 0, 0, 0, 1, 1, 1, 0, 1, 1]
    assert alignment.index.dtype == torch.int64 and alignment.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("recorded", "edited"),
    [("a", "a red house"), ("a red house", "a"), ("a " * (LENGTH - 2), "a"), ("a", "a " * (LENGTH - 2))],
)
def test_end_and_padding_continue_end_and_padding(recorded, edited):
    alignment = align_prompts(TOKENIZER, recorded, edited)
    end_a, end_b = len(tokens(recorded)) - 1, len(tokens(edited)) - 1
    assert alignment.index[end_b] == end_a
    assert (alignment.weight[end_b:] == 1).all()
    assert all(alignment.index[position] >= max(end_a, position) for position in range(end_b + 1, LENGTH))
    assert alignment.index.amax() < LENGTH


def longest_common(a: list[str], b: list[str]) -> int:
    """The length of the longest common subsequence, by recursion."""

    @cache
    def of(i: int, j: int) -> int:
        if i == len(a) or j == len(b):
            return 0
        return max(of(i + 1, j), of(i, j + 1), (a[i] == b[j]) * (1 + of(i + 1, j + 1)))

    return of(0, 0)


prompts = st.lists(st.sampled_from([*WHOLE, "flag", "as", "so"]), max_size=7)


@given(prompts, prompts)
def test_kept_words_are_equal_in_order_and_as_many_as_can_be(a, b):
    recorded, edited = " ".join(a), " ".join(b)
    alignment = align_prompts(TOKENIZER, recorded, edited)
    count = len(tokens(edited))
    sources = [(index, position) for position, index in enumerate(kept(alignment, count)) if index is not None]
    assert all(ids(recorded)[index] == ids(edited)[position] for index, position in sources)
    assert [index for index, _ in sources] == sorted({index for index, _ in sources})
    words = sum(tokens(edited)[position].endswith("</w>") for _, position in sources)
    assert words == longest_common(a, b)


@given(prompts)
def test_equal_prompts_are_the_identity(words):
    alignment = align_prompts(TOKENIZER, " ".join(words), " ".join(words))
    assert torch.equal(alignment.index, torch.arange(LENGTH)) and (alignment.weight == 1).all()


@given(prompts, st.data())
def test_inserting_and_deleting_words_keeps_the_others(words, data):
    position = data.draw(st.integers(0, len(words)))
    shorter, longer = " ".join(words), " ".join([*words[:position], "zebra", *words[position:]])
    start = len(tokens(" ".join(words[:position]))) - 1
    count = len(tokens(shorter))
    inserted = kept(align_prompts(TOKENIZER, shorter, longer), count + 5)
    assert inserted == [*range(start), *[None] * 5, *range(start, count)]
    deleted = kept(align_prompts(TOKENIZER, longer, shorter), count)
    assert deleted == [*range(start), *range(start + 5, count + 5)]


def test_a_learned_word_of_its_own_is_a_word():
    tokenizer = small_tokenizer()
    tokenizer.add_tokens(["<toy>"])
    assert kept(align_prompts(tokenizer, "a <toy> house", "a <toy> river"), 5) == [0, 1, 2, None, 4]


@pytest.mark.parametrize("position", [0, 1])
def test_prompts_that_do_not_fit_are_refused(position, caplog, monkeypatch):
    tokenizer = small_tokenizer()  # a tokenizer warns only once
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    caplog.set_level(logging.WARNING, "transformers")
    fits, too_long = "a " * (LENGTH - 2), "a " * (LENGTH - 1)
    given_prompts = [fits, fits]
    align_prompts(tokenizer, *given_prompts)
    given_prompts[position] = too_long
    with pytest.raises(PromptTooLongError, match=f"{LENGTH + 1} tokens.* takes {LENGTH}"):
        align_prompts(tokenizer, *given_prompts)
    assert not caplog.records  # our error is the only word on it


def test_explain_reads_as_a_table():
    recorded, edited = "a red house", "a red river in"
    text = align_prompts(TOKENIZER, recorded, edited).explain(tokens(recorded), tokens(edited))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[2:] == ["2 red</w> keeps 2 red</w>", "3 river</w> new, for 3 house</w>", "4 in</w> new"] + [
        "5 <|endoftext|> keeps 4 <|endoftext|>"
    ]


def test_repr_counts():
    alignment = TokenAlignment(torch.tensor([0, 2, 1, 0]), torch.tensor([1.0, 1.0, 0.0, 0.0]))
    assert repr(alignment) == "TokenAlignment(4 tokens: 2 kept, 1 of them moved, 2 new)"


def unit_rows(seed: int, count: int, width: int = 64) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def test_equal_embeddings_are_the_identity_even_with_equal_rows():
    rows = unit_rows(0, 12)
    rows[7:] = rows[6]
    rows[3] = rows[1]
    alignment = align_embeddings(rows, rows.clone())
    assert torch.equal(alignment.index, torch.arange(12)) and (alignment.weight == 1).all()


@given(st.integers(0, 100), st.integers(1, 9), st.integers(1, 3))
def test_embeddings_of_an_inserted_word_move(seed, start, count):
    rows, new = unit_rows(seed, 12), unit_rows(seed + 1000, count)
    edited = torch.cat([rows[:start], new, rows[start:] + 0.05 * unit_rows(seed + 2000, 12 - start)])[:12]
    alignment = align_embeddings(rows, edited)
    assert kept(alignment, 12) == ([*range(start), *[None] * count, *range(start, 12)])[:12]


@given(st.integers(0, 100), st.integers(0, 11))
def test_embeddings_of_a_replaced_word_name_it(seed, position):
    rows = unit_rows(seed, 12)
    edited = rows.clone()
    edited[position] = unit_rows(seed + 1000, 1)[0]
    alignment = align_embeddings(rows, edited)
    assert torch.equal(alignment.index, torch.arange(12))
    assert (alignment.weight == 0).nonzero().flatten().tolist() == [position]


def best_sum(similarity: torch.Tensor) -> float:
    """The largest sum of an order-preserving pairing, by recursion."""

    @cache
    def of(i: int, j: int) -> float:
        if i == similarity.shape[0] or j == similarity.shape[1]:
            return 0.0
        return max(of(i + 1, j), of(i, j + 1), similarity[i, j].item() + of(i + 1, j + 1))

    return of(0, 0)


@given(st.integers(0, 1000), st.sampled_from([0.05, 0.3, 0.6]))
def test_embeddings_are_aligned_as_well_as_can_be(seed, threshold):
    a, b = unit_rows(seed, 7, width=3), unit_rows(seed + 5000, 7, width=3)
    similarity = torch.nn.functional.cosine_similarity(a[:, None].double(), b[None].double(), dim=-1)
    assume((similarity - threshold).abs().min() > 1e-4)
    alignment = align_embeddings(a, b, threshold=threshold)
    sources = [(index, position) for position, index in enumerate(kept(alignment, 7)) if index is not None]
    assert [index for index, _ in sources] == sorted({index for index, _ in sources})
    assert all(similarity[pair] >= threshold for pair in sources)
    ours = sum(similarity[pair].item() for pair in sources)
    assert ours == pytest.approx(best_sum(torch.where(similarity >= threshold, similarity, 0)), abs=1e-4)


def test_a_common_beginning_ends_at_a_different_word_however_similar():
    rows = unit_rows(0, 12)
    edited = torch.cat([rows[:4], rows[4:] + 0.05 * unit_rows(1, 8)])
    alignment = align_embeddings(rows, edited)
    assert (alignment.weight == 0).nonzero().flatten().tolist() == [4]
    # An encoder that is not causal changes the first row too; then similarity alone decides.
    assert (align_embeddings(rows[4:], edited[4:]).weight == 1).all()


def test_embeddings_agree_with_prompts_on_a_text_encoder():
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(TOKENIZER),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=TOKENIZER.bos_token_id,
        eos_token_id=TOKENIZER.eos_token_id,
    )
    encoder = CLIPTextModel(config).eval()
    recorded, edited = "a red house in the river", "a red river in the river"
    with torch.no_grad():
        rows_a, rows_b = (encoder(torch.tensor([ids(prompt)])).last_hidden_state[0] for prompt in (recorded, edited))
    assert torch.equal(rows_a[:3], rows_b[:3]) and not torch.equal(rows_a[4:], rows_b[4:])
    by_rows, by_words = align_embeddings(rows_a, rows_b), align_prompts(TOKENIZER, recorded, edited)
    assert torch.equal(by_rows.index, by_words.index) and torch.equal(by_rows.weight, by_words.weight)


INDEX, WEIGHT = torch.tensor([0, 1, 2]), torch.tensor([1.0, 0.0, 1.0])


@pytest.mark.parametrize(
    ("index", "weight", "message"),
    [
        ([0, 1, 2], WEIGHT, "index of list"),
        (INDEX.float(), WEIGHT, "index of torch.float32"),
        (INDEX.int(), WEIGHT, "index of torch.int32"),
        (INDEX[None], WEIGHT, r"index of torch.int64 \[1, 3\]"),
        (INDEX, None, "weight of NoneType"),
        (INDEX, WEIGHT.bool(), "weight of torch.bool"),
        (INDEX, WEIGHT[:2], "3 indices and 2 weights"),
        (INDEX[:0], WEIGHT[:0], "0 indices"),
        (INDEX + 1, WEIGHT, r"indices in 1..3; expected 0..2"),
        (INDEX - 1, WEIGHT, r"indices in -1..1; expected 0..2"),
        (INDEX, WEIGHT * 2, r"weights \[2.0"),
        (INDEX, -WEIGHT, "values in 0..1"),
        (INDEX, WEIGHT / 0, "values in 0..1"),
    ],
)
def test_what_is_no_alignment_is_refused(index, weight, message):
    with pytest.raises(InvalidAlignmentError, match=message):
        TokenAlignment(index, weight)


def test_an_alignment_of_another_length_is_refused():
    alignment = TokenAlignment(INDEX, WEIGHT)
    alignment.check_length(3)
    with pytest.raises(InvalidAlignmentError, match="has 3 tokens; expected 77"):
        alignment.check_length(77)
