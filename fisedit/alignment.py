"""Which token of the recorded prompt each token of the edited prompt continues, for cross-attention control.

Prompt-to-Prompt (Hertz et al. 2022, arXiv:2208.01626, section 3.2) keeps the attention maps of the tokens that two
prompts share. Both alignments here keep the order of the tokens: `align_prompts` compares words, `align_embeddings`
only the text encoder's output.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fisedit.errors import InvalidAlignmentError, PromptTooLongError

END_OF_WORD = "</w>"  # how CLIP's tokens say that a word ends with them
SCALE = 1_000_000  # similarities as whole numbers, so that equal sums are equal
SAME_ROW = 1 - 1e-4  # similarity of rows that differ by rounding alone, half precision included


@dataclass(frozen=True, eq=False, repr=False)
class TokenAlignment:
    """The attention map that each token of the edited prompt takes.

    Attributes:
        index: int64 `[L]`, the position in the recorded prompt that the token stands for; of new tokens, the position
            that they replace, or 0.
        weight: float32 `[L]`, 1 to take the recorded map of that position, 0 to use the new map.

    Raises:
        InvalidAlignmentError: tensors of other shapes or dtypes, an index outside 0..L-1, a weight outside 0..1.
    """

    index: Tensor
    weight: Tensor

    def __post_init__(self) -> None:
        for name, value, dtype in (("index", self.index, torch.int64), ("weight", self.weight, torch.float32)):
            if not isinstance(value, Tensor) or value.ndim != 1 or value.dtype != dtype:
                kind = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise InvalidAlignmentError(given=f"{name} of {kind}", expected=f"a tensor of {dtype} [L]")
        length = len(self.index)
        if len(self.weight) != length or length == 0:
            lengths = f"{length} indices and {len(self.weight)} weights"
            raise InvalidAlignmentError(given=lengths, expected="one of each for each token of the prompt")
        if not 0 <= int(self.index.amin()) <= int(self.index.amax()) < length:
            outside = f"indices in {int(self.index.amin())}..{int(self.index.amax())}"
            raise InvalidAlignmentError(given=outside, expected=f"0..{length - 1}, positions in the recorded prompt")
        if not bool(((self.weight >= 0) & (self.weight <= 1)).all()):  # NaN is neither
            raise InvalidAlignmentError(given=f"weights {self.weight.tolist()}", expected="values in 0..1")

    def check_length(self, length: int) -> None:
        """Raise unless the alignment is of text embeddings of ``length`` tokens.

        Raises:
            InvalidAlignmentError: it is of fewer or more.
        """
        if len(self.index) != length:
            given = f"{len(self.index)} tokens"
            raise InvalidAlignmentError(given=given, expected=f"{length}, as many as the text embeddings have")

    def __repr__(self) -> str:
        kept = int((self.weight > 0).sum())
        moved = int(((self.weight > 0) & (self.index != torch.arange(len(self.index)))).sum())
        new = len(self.index) - kept
        return f"TokenAlignment({len(self.index)} tokens: {kept} kept, {moved} of them moved, {new} new)"

    def explain(self, recorded: Sequence[str], edited: Sequence[str]) -> str:
        """The alignment as text, one line a token of the edited prompt.

        Args:
            recorded: the tokens of the recorded prompt, from its start; padding may be left out.
            edited: the same of the edited prompt.
        """
        width = max(map(len, edited), default=0)
        lines = []
        for position, token in enumerate(edited):
            source = int(self.index[position])
            name = recorded[source] if source < len(recorded) else "padding"
            relation = f"keeps {source} {name}" if self.weight[position] > 0 else "new"
            if self.weight[position] == 0 and source > 0:
                relation += f", for {source} {name}"
            lines.append(f"{position:3} {token:{width}}  {relation}")
        return "\n".join(lines)


def align_prompts(tokenizer: Any, recorded: str, edited: str) -> TokenAlignment:
    """Aligns two prompts word by word.

    Equal words that stand in the same order keep their maps; a changed word changes all its tokens. The end token
    continues the end token, and padding continues padding.

    Args:
        tokenizer: a CLIP tokenizer of transformers: one start and one end token, padding at the right.
        recorded: the prompt of the recording.
        edited: the prompt of the edit.

    Returns:
        An alignment of `tokenizer.model_max_length` tokens, on the CPU.

    Raises:
        PromptTooLongError: a prompt has more tokens than the tokenizer takes.
    """
    length = tokenizer.model_max_length
    words_a, words_b = (_words(tokenizer, prompt) for prompt in (recorded, edited))
    equal = np.array([[a == b for b in words_b] for a in words_a], np.int64).reshape(len(words_a), len(words_b))
    starts_a, starts_b = (np.cumsum([1, *map(len, words)]).tolist() for words in (words_a, words_b))
    pairs = [(0, 0)]
    for i, j in _monotone_pairs(equal):
        pairs += [(starts_a[i] + k, starts_b[j] + k) for k in range(len(words_b[j]))]
    end_a, end_b = starts_a[-1], starts_b[-1]
    pairs.append((end_a, end_b))
    # Padding keeps its position, for its embedding depends on it, but never points at the words of a longer prompt.
    pairs += [(min(max(position, end_a + 1), length - 1), position) for position in range(end_b + 1, length)]
    return _alignment(pairs, length)


def align_embeddings(recorded: Tensor, edited: Tensor, *, threshold: float = 0.9) -> TokenAlignment:
    """Aligns two prompts by their text embeddings alone, where no tokenizer is at hand.

    Among all alignments that keep the order, the one with the largest sum of cosine similarities over its pairs, where
    a pair needs at least `threshold`. A causal text encoder such as CLIP's gives equal rows for a common beginning, so
    the first rows that differ are different words, however similar; after them, equal words have similar rows. How
    similar depends on the encoder: `align_prompts` is surer.

    Args:
        recorded: float `[L, D]`, the text encoder's output for the prompt of the recording.
        edited: float `[L, D]`, the same of the edit.
        threshold: the least cosine similarity at which a token counts as the same, in (0, 1].

    Returns:
        An alignment of L tokens, on the CPU; the identity if both embeddings are equal.
    """
    rows_a, rows_b = (F.normalize(rows.detach().double().cpu(), dim=-1) for rows in (recorded, edited))
    similarity = rows_a @ rows_b.T  # [L, L]
    score = torch.where(similarity >= threshold - 1 / SCALE, similarity * SCALE, 0).round().long()
    parted = int((similarity.diagonal() > SAME_ROW).cumprod(0).sum())
    if 0 < parted < len(score):
        score[parted, parted] = 0
    return _alignment(_monotone_pairs(score.numpy()), len(edited))


def _words(tokenizer: Any, prompt: str) -> list[tuple[int, ...]]:
    """The token ids of each word of a prompt, start and end left out."""
    ids = tokenizer(prompt, truncation=False, verbose=False).input_ids
    if len(ids) > tokenizer.model_max_length:
        raise PromptTooLongError(prompt=prompt, tokens=len(ids), limit=tokenizer.model_max_length)
    added = tokenizer.get_added_vocab()
    words: list[tuple[int, ...]] = [()]
    for number, token in zip(ids[1:-1], tokenizer.convert_ids_to_tokens(ids[1:-1]), strict=True):
        words[-1] += (number,)
        if token.endswith(END_OF_WORD) or token in added:
            words.append(())
    return words if words[-1] else words[:-1]


def _monotone_pairs(score: np.ndarray) -> list[tuple[int, int]]:
    """The order-preserving pairs (i, j) with the largest sum of `score[i, j]`, int64 `[N, M]`.

    Pairs of score 0 are left out. Of equally good alignments the one that pairs earliest, so a common beginning stays.
    """
    rows, columns = score.shape
    best = np.zeros((rows + 1, columns + 1), np.int64)  # of what is left from (i, j) on
    for i in reversed(range(rows)):
        paired = score[i] + best[i + 1, 1:]
        # best[i, j] = max over j' >= j of what pairing or skipping row i yields there.
        options = np.maximum(paired, best[i + 1, :-1])
        best[i, :-1] = np.maximum.accumulate(options[::-1])[::-1]
    pairs, i, j = [], 0, 0
    while i < rows and j < columns:
        if score[i, j] > 0 and score[i, j] + best[i + 1, j + 1] == best[i, j]:
            pairs.append((i, j))
            i, j = i + 1, j + 1
        elif best[i + 1, j] == best[i, j]:
            i += 1
        else:
            j += 1
    return pairs


def _alignment(pairs: list[tuple[int, int]], length: int) -> TokenAlignment:
    """The alignment that keeps `pairs` (recorded, edited); between two pairs, new tokens replace old ones in order."""
    index, weight = torch.zeros(length, dtype=torch.int64), torch.zeros(length)
    before_a, before_b = -1, -1
    for a, b in [*pairs, (length, length)]:
        for position in range(before_b + 1, b):
            replaced = before_a + position - before_b
            index[position] = replaced if replaced < a else 0
        if b < length:
            index[b], weight[b] = a, 1
        before_a, before_b = a, b
    return TokenAlignment(index, weight)
