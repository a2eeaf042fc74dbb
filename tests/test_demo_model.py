"""The demo model that ships: its files, its parts, and the judge that tells what a picture shows."""

from __future__ import annotations

import math
import socket
from functools import cache

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn
from torch.nn import functional as F

from fisedit.demo import image_encoder_path, load_clip, load_pipeline, model_path
from fisedit.demo.captions import PHRASINGS, alternatives, caption
from fisedit.demo.clip import DemoClip
from fisedit.demo.data import CAPTION_LENGTH, CaptionedScenes, full_length
from fisedit.demo.scenes import Scene, render, sample_scenes
from fisedit.demo.schedule import Clock
from fisedit.demo.tokenizer import WordEncoder
from fisedit.demo.train_clip import contrastive_loss
from fisedit.demo.train_unet import DenoisingLoss
from fisedit.demo.train_vae import edge_loss, reconstruction_psnr
from fisedit.demo.vocabulary import scene_words

SCENES = 32


@cache
def pipeline() -> StableDiffusionPipeline:
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@cache
def judge() -> DemoClip:
    return load_clip()


@cache
def held_out(count: int) -> tuple[list[Scene], Tensor]:
    """Scenes that no stage was trained on, and their pictures `[count, 3, 256, 256]`."""
    batch = sample_scenes(count, torch.Generator().manual_seed(11), "held_out")
    return batch.scenes(), render(batch)


def test_files_are_small_and_half_precision() -> None:
    files = [path for folder in (model_path(), image_encoder_path()) for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 48e6
    assert max(path.stat().st_size for path in files) <= 16 * 2**20
    assert {path.suffix for path in files} <= {".json", ".txt", ".safetensors"}
    assert load_pipeline(torch_dtype=torch.float16).unet.conv_in.weight.dtype == torch.float16


def test_loads_and_generates_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    image = pipe(
        "a red house on the left, on grass, at noon",
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
    assert image.shape == (1, 3, 256, 256)
    assert image.isfinite().all() and image.std() > 0.02


def test_is_shaped_like_stable_diffusion_2() -> None:
    pipe = pipeline()
    config = pipe.unet.config
    assert type(pipe).__name__ == "StableDiffusionPipeline" and pipe.safety_checker is None
    assert config.use_linear_projection and config.in_channels == config.out_channels == 4 and config.sample_size == 64
    assert [kind.startswith("CrossAttn") for kind in config.down_block_types] == [True, True, True, False]
    assert pipe.tokenizer.model_max_length == 77
    assert config.cross_attention_dim == pipe.text_encoder.config.hidden_size
    latents = pipe.vae.encode(held_out(2)[1] * 2 - 1).latent_dist.mean * pipe.vae.config.scaling_factor
    assert latents.shape == (2, 4, 64, 64) and 0.6 < latents.std() < 1.6


def test_noise_schedule_ends_without_a_trace_of_the_image() -> None:
    scheduler = pipeline().scheduler
    assert scheduler.alphas_cumprod[-1] == 0
    scheduler.set_timesteps(30)
    assert scheduler.timesteps[0] == 999 and scheduler.config.prediction_type == "v_prediction"


def test_every_scene_word_is_one_token_and_other_words_still_are_spelled_out() -> None:
    tokenizer = pipeline().tokenizer
    for word in scene_words():
        assert len(tokenizer(word).input_ids) == 3, word
    assert tokenizer.decode(tokenizer("a frozen river").input_ids, skip_special_tokens=True).strip() == "a frozen river"


def test_word_encoder_agrees_with_the_tokenizer() -> None:
    tokenizer = pipeline().tokenizer
    encode = WordEncoder(tokenizer)
    scenes = sample_scenes(200, torch.Generator().manual_seed(1), "all").scenes()
    texts = [caption(scene, i % PHRASINGS) for i, scene in enumerate(scenes)]
    expected = tokenizer(texts, padding="max_length", max_length=77, return_tensors="pt").input_ids
    assert torch.equal(encode(texts), expected)
    assert torch.equal(full_length(encode(texts, CAPTION_LENGTH), 77), expected)
    with pytest.raises(ValueError, match="at most 4"):
        encode(["a red house on the left"], 4)
    with pytest.raises(KeyError):
        encode(["a beige house"])


def test_stream_repeats_with_its_seed_and_puts_the_true_caption_first() -> None:
    tokenizer = pipeline().tokenizer
    (batch, ids), (_, again) = (next(CaptionedScenes(tokenizer, 6, 5, 3, all_kinds=True).stream(0)) for _ in range(2))
    assert ids.shape == (6, 1 + 3 + 11, CAPTION_LENGTH) and torch.equal(ids, again)
    for scene, row in zip(batch.scenes(), tokenizer.batch_decode(ids[:, 0], skip_special_tokens=True), strict=True):
        said = {caption(scene, phrasing).replace(",", " ,") for phrasing in range(PHRASINGS)}
        assert " ".join(row.replace(",", " ,").split()) in said


def test_autoencoder_reconstructs_scenes_it_has_never_seen() -> None:
    assert reconstruction_psnr(pipeline().vae, held_out(SCENES)[1][:3]) > 34


@pytest.mark.parametrize(
    ("attribute", "share"), [("color", 0.9), ("position", 0.95), ("ground", 0.95), ("sky", 0.95), ("attachment", 0.85)]
)
def test_judge_confirms_rendered_scenes(attribute: str, share: float) -> None:
    scenes, pictures = held_out(SCENES)
    answers = judge().confirms(pictures, scenes, attribute)
    assert sum(answers) / len(answers) >= share


def test_judge_tells_kinds_apart() -> None:
    """Chance is one in twelve."""
    scenes, pictures = held_out(SCENES)
    answers = judge().confirms(pictures, scenes, "kind")
    assert sum(answers) / len(answers) >= 0.75


@pytest.mark.parametrize("attribute", ["color", "position"])
def test_judge_sees_what_is_wrong(attribute: str) -> None:
    """A picture in which that attribute alone was changed must not confirm the caption from before the change."""
    scenes = held_out(SCENES)[0]
    changed = render([alternatives(scene, attribute, 0)[1] for scene in scenes])
    single = [i for i, scene in enumerate(scenes) if len(scene.objects) == 1]
    answers = judge().confirms(changed[single], [scenes[i] for i in single], attribute)
    assert sum(answers) <= 0.1 * len(answers) and len(answers) >= 8


def test_contrastive_loss_is_the_written_out_one() -> None:
    torch.manual_seed(0)
    images, texts = F.normalize(torch.randn(3, 5), dim=-1), F.normalize(torch.randn(3, 4, 5), dim=-1)
    loss, accuracy = contrastive_loss(images, texts, torch.tensor(7.0))
    expected, right = 0.0, 0
    for i in range(3):
        own = [7 * float(images[i] @ texts[i, k]) for k in range(4)]
        others = [7 * float(images[i] @ texts[j, 0]) for j in range(3) if j != i]
        back = [7 * float(images[j] @ texts[i, 0]) for j in range(3)]
        expected += 0.5 * (math.log(sum(map(math.exp, own + others))) - own[0]) / 3
        expected += 0.5 * (math.log(sum(map(math.exp, back))) - back[i]) / 3
        expected += (math.log(sum(map(math.exp, own))) - own[0]) / 3
        right += own[0] == max(own)
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert float(accuracy) == pytest.approx(right / 3)


def test_denoising_loss_vanishes_for_the_true_velocity() -> None:
    """With zero latents v is the noisy input times sqrt(alpha / (1 - alpha)), so that a denoiser can know it."""
    pipe = pipeline()
    alphas = pipe.scheduler.alphas_cumprod
    seen: list[Tensor] = []

    class Oracle(nn.Module):
        def forward(self, noisy: Tensor, timesteps: Tensor, features: Tensor, return_dict: bool) -> tuple[Tensor]:
            seen.extend([timesteps, features])
            alpha = alphas[timesteps].view(-1, 1, 1, 1)
            return (noisy * (alpha / (1 - alpha)).sqrt(),)

    ids = pipe.tokenizer(["a red car"] * 40, padding="max_length", max_length=77, return_tensors="pt").input_ids
    objective = DenoisingLoss(Oracle(), pipe.text_encoder, pipe.tokenizer)
    assert float(objective(torch.zeros(40, 4, 8, 8), ids, dropout=1.0)) < 1e-9
    timesteps, features = seen
    assert torch.equal(timesteps // 25, torch.arange(40))  # evenly spread
    with torch.no_grad():
        empty = pipe.encode_prompt("", "cpu", 1, False)[0]
    torch.testing.assert_close(features[:1], empty, rtol=0, atol=1e-5)


def test_edge_loss_sees_edges_and_nothing_else() -> None:
    picture = torch.rand(1, 3, 16, 16)
    assert float(edge_loss(picture + 0.3, picture)) == pytest.approx(0, abs=1e-6)
    step = torch.zeros(1, 3, 16, 16)
    step[..., 8:] = 1
    assert float(edge_loss(step, torch.zeros_like(step), scales=1)) == pytest.approx(1 / 15)


def test_clock_warms_up_and_anneals(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("fisedit.demo.schedule.time.monotonic", lambda: now[0])
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=9.0)
    clock = Clock(1.0, 0.5, warmup_steps=10)
    rates = []
    for second in range(60):
        now[0] = 100.0 + second
        assert clock.running()
        clock.step(optimizer)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] == pytest.approx(0.05) and max(rates) == rates[9] and rates[-1] < 0.02 * 0.5 * 1.1
    assert rates[10:] == sorted(rates[10:], reverse=True)
    now[0] = 160.0
    assert not clock.running()
