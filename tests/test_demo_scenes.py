"""The demo's procedural scenes and their captions."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fisedit.demo.captions import PHRASINGS, alternatives, caption, hard_negatives, moved, swapped, with_object
from fisedit.demo.scenes import Scene, SceneBatch, SceneObject, render, sample_scenes
from fisedit.demo.vocabulary import ATTACHMENTS, COLORS, KINDS, POSITIONS, scene_words

TWO = Scene((SceneObject("house", "red", "left"), SceneObject("tree", "green", "right", "small")), "grass", "noon")


def one(kind: str = "house", color: str = "red", position: str = "middle", **more: str | None) -> Scene:
    return Scene((SceneObject(kind, color, position, **more),))


def draw(count: int, seed: int = 0, split: str = "all") -> SceneBatch:
    return sample_scenes(count, torch.Generator().manual_seed(seed), split)


def test_pictures_are_a_function_of_the_seed() -> None:
    first, again, other = render(draw(6, 1), 96), render(draw(6, 1), 96), render(draw(6, 2), 96)
    assert first.shape == (6, 3, 96, 96) and first.dtype == torch.float32
    assert first.min() >= 0 and first.max() <= 1 and first.std() > 0.1
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_scene_looks_the_same_in_any_batch_and_as_words() -> None:
    batch = draw(5, 3)
    assert SceneBatch.from_scenes(batch.scenes()).scenes() == batch.scenes()
    together = render(batch, 64)
    for b, scene in enumerate(batch.scenes()):
        torch.testing.assert_close(render([scene], 64)[0], together[b], rtol=0, atol=1e-5)


def test_edges_are_antialiased() -> None:
    """A picture drawn small is close to one drawn large and averaged down."""
    batch = draw(8, 4)
    small, large = render(batch, 64), torch.nn.functional.avg_pool2d(render(batch, 256), 4)
    assert (small - large).abs().mean() < 0.02


def area(scene: Scene, without: Scene) -> Tensor:
    """The pixels that two scenes draw differently: bool `[256, 256]`."""
    a, b = render([scene, without])
    return (a - b).abs().amax(0) > 0.06


@pytest.mark.parametrize("kind", KINDS)
def test_the_named_color_is_the_most_common_one_on_the_object(kind: str) -> None:
    empty = Scene(())
    palette = torch.tensor(list(COLORS.values()))
    scenes = [one(kind, color) for color in COLORS]
    pictures, background = render(scenes), render([empty])[0]
    for c, picture in enumerate(pictures):
        pixels = picture[:, (picture - background).abs().amax(0) > 0.06].T  # [n, 3]
        close = (pixels[:, None] - palette).norm(dim=-1) < 0.22  # [n, 8]
        assert close.sum(0).argmax() == c, f"{kind} in {list(COLORS)[c]}"


def test_any_two_kinds_differ_in_a_large_part_of_their_pixels() -> None:
    empty = Scene(())
    pictures = dict(zip(KINDS, render([one(kind) for kind in KINDS]), strict=True))
    areas = {kind: area(one(kind), empty) for kind in KINDS}
    for a, b in itertools.combinations(KINDS, 2):
        differs = ((pictures[a] - pictures[b]).abs().amax(0) > 0.1).sum()
        covered = areas[a] | areas[b]
        assert differs > 0.25 * covered.sum(), (a, b)


@pytest.mark.parametrize("attachment", [name for name in ATTACHMENTS if name])
@pytest.mark.parametrize("kind", ["house", "car", "cat", "rocket"])
def test_attachments_are_large_enough_to_see_in_the_latents(kind: str, attachment: str) -> None:
    changed = area(one(kind, size="small", attachment=attachment), one(kind, size="small"))
    assert changed.any(1).sum() >= 16 and changed.any(0).sum() >= 18
    assert changed.sum() >= 250  # about 16 latent pixels


def test_position_and_size_place_the_object() -> None:
    empty = Scene(())
    columns = torch.arange(256).float()
    centers, heights = [], []
    for position, size in itertools.product(POSITIONS, ("small", "large")):
        covered = area(one("robot", position=position, size=size), empty)
        centers.append(float((covered.sum(0) * columns).sum() / covered.sum()) / 256)
        heights.append(int(covered.any(1).sum()))
    torch.testing.assert_close(torch.tensor(centers[::2]), torch.tensor(list(POSITIONS.values())), rtol=0, atol=0.03)
    assert min(heights[1::2]) > 1.3 * max(heights[::2])


def test_every_object_and_color_occurs_together() -> None:
    seen = {(item.kind, item.color) for scene in draw(3000).scenes() for item in scene.objects}
    assert len(seen) == len(KINDS) * len(COLORS)


def test_training_never_draws_what_is_held_out() -> None:
    def keys(batch: SceneBatch) -> set:
        return {
            (tuple((o.kind, o.color, o.position) for o in scene.objects), scene.ground, scene.sky)
            for scene in batch.scenes()
            if len(scene.objects) == 1
        }

    training, kept = keys(draw(12_000, 5, "train")), keys(draw(600, 6, "held_out"))
    assert len(kept) > 100 and len(training) > 3000
    assert not training & kept


@pytest.mark.parametrize("phrasing", range(PHRASINGS))
def test_an_edit_changes_exactly_its_words(phrasing: int) -> None:
    before = words(caption(TWO, phrasing))
    for change, replaced in (({"color": "blue"}, ("red", "blue")), ({"kind": "boat"}, ("house", "boat"))):
        after = words(caption(with_object(TWO, 0, **change), phrasing))
        assert [(a, b) for a, b in zip(before, after, strict=True) if a != b] == [replaced]
    added = words(caption(with_object(TWO, 0, attachment="flag"), phrasing))
    at = before.index("house") + 1
    assert added == [*before[:at], "with", "a", "flag", *before[at:]]


def words(text: str) -> list[str]:
    return text.replace(",", " ,").split()


def test_phrasings_differ_and_use_known_words_only() -> None:
    texts = [caption(TWO, phrasing) for phrasing in range(PHRASINGS)]
    assert len(set(texts)) == PHRASINGS
    assert texts[0] == "a red house on the left and a green tree on the right, on grass, at noon"
    for text in texts:
        assert set(text.replace(",", " ,").split()) <= set(scene_words())
    assert all("small" in text for text in texts[PHRASINGS // 2 :])
    assert not any("small" in text for text in texts[: PHRASINGS // 2])
    with pytest.raises(ValueError, match="phrasing"):
        caption(TWO, PHRASINGS)


def test_moving_and_swapping() -> None:
    assert caption(moved(TWO, 0, "right")) == "a green tree on the left and a red house on the right, on grass, at noon"
    assert caption(moved(TWO, 0, "middle")).startswith("a red house in the middle and a green tree on the right")
    assert caption(swapped(TWO, 0, 1, "color")).startswith("a green house on the left and a red tree on the right")


@pytest.mark.parametrize(
    ("attribute", "count"),
    [("kind", 12), ("color", 8), ("position", 3), ("attachment", 5), ("size", 2), ("ground", 5), ("sky", 4)],
)
def test_alternatives_are_all_different_and_the_truth_is_first(attribute: str, count: int) -> None:
    options = [caption(scene, 6) for scene in alternatives(TWO, attribute, 0)]
    assert options[0] == caption(TWO, 6)
    assert len(set(options)) == len(options) == count


def test_hard_negatives_are_never_true() -> None:
    rng = random.Random(0)
    for i, scene in enumerate(draw(150, 7).scenes()):
        phrasing = i % PHRASINGS
        wrong = hard_negatives(scene, 6, rng, sized=phrasing >= PHRASINGS // 2)
        assert len(wrong) == 6
        assert caption(scene, phrasing) not in {caption(each, phrasing) for each in wrong}


def test_scenes_that_cannot_be_drawn_are_refused() -> None:
    with pytest.raises(ValueError, match="same position"):
        render([replace(TWO, objects=(TWO.objects[0], TWO.objects[0]))])
    with pytest.raises(ValueError, match=r"x not in tuple|not in tuple"):
        render([one(color="beige")])
