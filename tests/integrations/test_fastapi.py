"""The example server: pictures as PNG, bases per user and bounded, refusals with their reason."""

import base64
import importlib.util
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image
from tiny_pipeline import LATENT, build_tiny_pipeline

from fisedit import EditPipeline

pytestmark = pytest.mark.supports("Integrations", "FastAPI")

BEFORE, AFTER = "a red house on the left, on grass", "a blue house on the left, on grass"
ALICE, BOB = {"X-User": "alice"}, {"X-User": "bob"}


def load_example(name):
    path = Path(__file__).resolve().parents[2] / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def editor(tmp_path_factory):
    return EditPipeline(build_tiny_pipeline(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def client(editor):
    return TestClient(load_example("fastapi_server").create_app(editor, max_bases=2))


def generate(client, user=ALICE, **changes):
    answer = client.post("/bases", json={"prompt": BEFORE, "seed": 3, "steps": 3, **changes}, headers=user)
    assert answer.status_code == 201, answer.text
    return answer


def png(answer):
    assert answer.headers["content-type"] == "image/png"
    return np.asarray(Image.open(io.BytesIO(answer.content)))


def encoded(mask):
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def test_a_picture_and_its_edit(client, editor):
    made = generate(client)
    base = editor.generate(BEFORE, seed=3, num_inference_steps=3, guidance_scale=5.0)
    assert np.array_equal(png(made), np.asarray(base.image))
    mask = np.zeros((LATENT, LATENT), np.uint8)
    mask[4:8, 4:10] = 255
    answer = client.post(
        f"{made.headers['location']}/edits", json={"prompt": AFTER, "mask": encoded(mask)}, headers=ALICE
    )
    assert answer.status_code == 200, answer.text
    expected = editor.edit(base, AFTER, mask=torch.from_numpy(mask > 0))
    assert np.array_equal(png(answer), np.asarray(expected.image))
    assert float(answer.headers["x-active-share"]) == pytest.approx((mask > 0).mean(), abs=1e-4)


def test_the_region_is_found_without_a_mask(client):
    made = generate(client)
    answer = client.post(f"{made.headers['location']}/edits", json={"prompt": AFTER}, headers=ALICE)
    assert answer.status_code == 200 and not np.array_equal(png(answer), png(made))


def test_a_base_belongs_to_its_user(client):
    place = generate(client).headers["location"]
    for answer in (
        client.post(f"{place}/edits", json={"prompt": AFTER}, headers=BOB),
        client.delete(place, headers=BOB),
        client.post("/bases/none/edits", json={"prompt": AFTER}, headers=ALICE),
    ):
        assert answer.status_code == 404 and "There is no base" in answer.json()["detail"]
    assert client.post(f"{place}/edits", json={"prompt": AFTER}).status_code == 422  # nobody asks
    assert client.post(f"{place}/edits", json={"prompt": BEFORE}, headers=ALICE).status_code == 200


def test_the_base_used_longest_ago_is_freed(client, editor, monkeypatch):
    recordings = []
    original = editor.generate
    monkeypatch.setattr(editor, "generate", lambda *a, **k: [g := original(*a, **k), recordings.append(g.recording)][0])
    first, second = (generate(client, seed=seed).headers["location"] for seed in (1, 2))
    assert client.post(f"{first}/edits", json={"prompt": AFTER}, headers=ALICE).status_code == 200
    generate(client, user=BOB)
    assert client.post(f"{second}/edits", json={"prompt": AFTER}, headers=ALICE).status_code == 404
    assert client.post(f"{first}/edits", json={"prompt": AFTER}, headers=ALICE).status_code == 200
    assert [recording.released for recording in recordings] == [False, True, False]
    assert client.delete(first, headers=ALICE).status_code == 204
    assert recordings[0].released and recordings[0].nbytes == 0
    assert client.delete(first, headers=ALICE).status_code == 404


def test_a_base_of_a_changed_model_is_a_conflict(tmp_path):
    editor = EditPipeline(build_tiny_pipeline(tmp_path))
    client = TestClient(load_example("fastapi_server").create_app(editor))
    place = generate(client).headers["location"]
    with torch.no_grad():
        editor.pipe.unet.conv_in.weight.mul_(1.5)
    answer = client.post(f"{place}/edits", json={"prompt": AFTER}, headers=ALICE)
    assert answer.status_code == 409 and answer.json()["error"] == "ForeignRecordingError"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"mask": base64.b64encode(b"no picture").decode()}, "The mask is no picture"),
        ({"mask": encoded(np.zeros((4, 4), np.uint8))[:-40] + "A" * 40}, "The mask is"),
        ({"mask": "%%%"}, "base64"),
        ({"prompt": " ".join(["house"] * 90)}, "has 92 tokens"),
        ({"prompt": 7}, "valid string"),
    ],
)
def test_what_is_wrong_with_an_edit_is_said(client, changes, says):
    place = generate(client).headers["location"]
    answer = client.post(f"{place}/edits", json={"prompt": AFTER, **changes}, headers=ALICE)
    assert answer.status_code == 422 and says in str(answer.json()["detail"])


@pytest.mark.parametrize(
    "changes",
    [{"steps": 1}, {"steps": 10**9}, {"seed": -1}, {"seed": 2**64}, {"guidance": "NaN"}, {"prompt": None}]
    + [{"prompt": " ".join(["house"] * 90)}],
    ids=str,
)
def test_what_cannot_be_generated_is_refused(client, changes):
    answer = client.post("/bases", json={"prompt": BEFORE, "steps": 2, **changes}, headers=ALICE)
    assert answer.status_code == 422 and answer.json()["detail"]


def test_the_demo_app_serves_the_model_that_ships(monkeypatch, editor):
    monkeypatch.setattr("fisedit.demo.load_pipeline", lambda: editor.pipe)
    client = TestClient(load_example("fastapi_server").demo_app())
    assert png(generate(client, steps=2)).shape == (2 * LATENT, 2 * LATENT, 3)
