"""The command line on a tiny pipeline: what it writes, prints, and how it fails."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image
from rich.console import Console
from tiny_pipeline import LATENT, build_tiny_pipeline
from typer.testing import CliRunner

from fisedit.cli import app
from fisedit.comparison import Comparison, comparison_table
from fisedit.demo.showcase import EDITS

BEFORE = "a red house on the left, on grass, at noon"
AFTER = "a blue house on the left, on grass, at noon"
FIRST, SECOND = "a blue house on the left, on sand, at noon", "a blue cat on the left, on sand, at noon"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("model")
    build_tiny_pipeline(made).save_pretrained(made)
    return made


@pytest.fixture
def run(folder, tmp_path, monkeypatch):
    """Runs the command line in an empty folder, on the tiny model unless told otherwise."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, model=folder):
        options = ["--model", str(model), "--device", "cpu"] if model else []
        return CliRunner().invoke(app, [*map(str, arguments), *options])

    return run


def error_line(result):
    """What a failed command says, its line breaks undone."""
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    return " ".join(result.output.replace("│", " ").split())


def pixels(path):
    return np.asarray(Image.open(path))


def test_generate_writes_the_image_of_its_seed(run, folder, tmp_path):
    for name, seed in (("one.png", 1), ("same.png", 1), ("other.png", 2)):
        result = run("generate", BEFORE, "--output", f"out/{name}", "--seed", seed, "--steps", 2)
        assert result.exit_code == 0, result.output
        assert name in result.output
    assert np.array_equal(pixels("out/one.png"), pixels("out/same.png"))
    assert not np.array_equal(pixels("out/one.png"), pixels("out/other.png"))
    theirs = build_tiny_pipeline(tmp_path)(
        BEFORE, generator=torch.Generator().manual_seed(1), num_inference_steps=2, guidance_scale=5.0
    )
    assert np.abs(np.asarray(theirs.images[0]).astype(int) - pixels("out/one.png")).max() <= 1


def test_generate_takes_a_size(run):
    result = run("generate", BEFORE, "--size", "24x40", "--steps", 1)
    assert result.exit_code == 0, result.output
    assert Image.open("image.png").size == (40, 24)


def test_edit_writes_images_masks_sheet_and_report(run):
    result = run("edit", BEFORE, AFTER, "--steps", 4, "--output", "out", "--detect-steps", 2, "--compare")
    assert result.exit_code == 0, result.output
    report = json.loads(Path("out/report.json").read_text())
    (figures,) = report["edits"]
    inside = pixels("out/mask_1.png") > 0
    assert 0 < inside.mean() < 1
    assert inside.mean() == pytest.approx(figures["active_share"])
    assert pixels("out/base.png").shape == pixels("out/edit_1.png").shape == (2 * LATENT, 2 * LATENT, 3)
    assert not np.array_equal(pixels("out/base.png")[inside], pixels("out/edit_1.png")[inside])
    assert figures["background_identical"] is True
    assert figures["detect_steps"] == 2
    assert 0 < figures["macs_sparse"] < figures["macs_dense"]
    assert figures["step_ratio"] == pytest.approx(figures["dense_step"] / figures["sparse_step"])
    assert figures["edit_ratio"] == pytest.approx(figures["rerun_seconds"] / figures["edit_seconds"])
    assert {"device", "torch", "date"} <= set(report["environment"])
    assert Image.open("out/contact_sheet.png").width > 4 * 256
    for label in ("active share", "dense U-Net step", "sparse U-Net step", "bit-identical"):
        assert label in result.output


def test_rounds_start_from_the_edit_before(run):
    reports = {}
    for name, options in (("chained", ["--rounds"]), ("apart", [])):
        result = run("edit", BEFORE, FIRST, SECOND, "--steps", 3, "--output", name, *options)
        assert result.exit_code == 0, result.output
        reports[name] = json.loads(Path(f"{name}/report.json").read_text())
    assert np.array_equal(pixels("chained/edit_1.png"), pixels("apart/edit_1.png"))
    assert not np.array_equal(pixels("chained/edit_2.png"), pixels("apart/edit_2.png"))
    assert [e["before"] for e in reports["chained"]["edits"]] == [BEFORE, FIRST]
    assert [e["before"] for e in reports["apart"]["edits"]] == [BEFORE, BEFORE]
    # The base of a later round is an edit: what its calls took is no dense step.
    steps = {name: [e["recorded_step"] for e in report["edits"]] for name, report in reports.items()}
    assert steps["chained"][0] > 0 and steps["chained"][1] is None and steps["apart"][1] > 0
    assert all(e["background_identical"] for report in reports.values() for e in report["edits"])
    assert Image.open("apart/contact_sheet.png").height > 2 * 256


def figures(**given):
    empty = {"before": BEFORE, "after": AFTER, "active_share": 0.1, "detect_steps": 2, "recorded_step": None,
             "sparse_step": None, "macs_dense": None, "macs_sparse": None, "edit_seconds": 1.0,
             "background_identical": True}  # fmt: skip
    return Comparison(**{**empty, **given})


def printed(table):
    console = Console(width=140, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


def test_a_table_has_the_footnotes_of_its_rows_and_no_others():
    whole = "seconds for one image"
    text = printed(comparison_table([figures()], ["edit"]))
    assert "whole edit¹" in text and f"¹ {whole}" in text and "²" not in text and "U-Net" not in text
    text = printed(
        comparison_table([figures(), figures(recorded_step=0.2, dense_step=0.1, rerun_seconds=3)], ["a", "b"])
    )
    for line in ("recorded U-Net step¹", "¹ median call while", "dense U-Net step²", "² median plain", f"³ {whole}"):
        assert line in text
    assert "whole dense rerun³" in text and "whole edit³" in text
    assert "seconds" not in printed(comparison_table([], []))


def draw_mask():
    """Writes mask.png into the current folder."""
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (16, 16, 40, 32))
    mask.save("mask.png")
    return mask


def test_a_mask_from_a_file_is_taken_as_it_is(run):
    mask = draw_mask()
    result = run("edit", BEFORE, AFTER, "--steps", 2, "--mask", "mask.png")
    assert result.exit_code == 0, result.output
    assert np.array_equal(pixels("edit/mask_1.png"), np.asarray(mask.resize((32, 32), Image.Resampling.NEAREST)))
    assert json.loads(Path("edit/report.json").read_text())["edits"][0]["detect_steps"] == 0


def test_an_empty_mask_is_said_in_one_line(run):
    Image.new("L", (32, 32), 0).save("mask.png")
    result = run("edit", BEFORE, AFTER, "--steps", 2, "--mask", "mask.png", "--kv", "active", "--cost", "rows")
    assert result.exit_code == 0, result.output
    assert "Warning: The mask is empty" in error_line(result)
    assert np.array_equal(pixels("edit/base.png"), pixels("edit/edit_1.png"))


def test_a_base_is_kept_and_edited_by_another_command(run):
    result = run("generate", BEFORE, "--steps", 3, "--seed", 4, "--guidance", 4, "--save", "kept")
    assert result.exit_code == 0, result.output
    result = run("edit", "--base", "kept", FIRST, SECOND, "--output", "later")
    assert result.exit_code == 0, result.output
    result = run("edit", BEFORE, FIRST, SECOND, "--steps", 3, "--seed", 4, "--guidance", 4, "--output", "at-once")
    assert result.exit_code == 0, result.output
    assert np.array_equal(pixels("image.png"), pixels("later/base.png"))
    for name in ("base.png", "edit_1.png", "edit_2.png", "mask_1.png", "mask_2.png"):
        assert np.array_equal(pixels(f"later/{name}"), pixels(f"at-once/{name}"))
    report = json.loads(Path("later/report.json").read_text())
    assert report["settings"]["base"] == "kept" and [e["before"] for e in report["edits"]] == [BEFORE, BEFORE]
    for arguments, code, says in (
        (["generate", BEFORE, "--save", "kept"], 1, "it holds a saved base"),
        (["edit", "--base", "kept", FIRST, "--steps", 3], 2, "--steps: goes with a new picture"),
        (["edit", "--base", "kept", FIRST, "--dtype", "bfloat16"], 1, "dtype: saved with 'float32', here 'bfloat16'"),
        (["edit", "--base", "none", FIRST], 1, "there is no such folder"),
    ):
        result = run(*arguments)
        assert result.exit_code == code and says in error_line(result), result.output


def test_feature_maps_in_a_folder_give_the_same_pictures(run):
    everywhere_else = ["--gpu-cache", 0, "--host-cache", "0B", "--disk-cache", "new/cache"]
    for name, options in (("memory", []), ("disk", [*everywhere_else, "--trace", "trace.json"])):
        result = run("edit", BEFORE, FIRST, SECOND, "--steps", 3, "--rounds", "--output", name, *options)
        assert result.exit_code == 0, result.output
    for image in ("base.png", "edit_1.png", "edit_2.png", "mask_1.png", "mask_2.png"):
        assert np.array_equal(pixels(f"memory/{image}"), pixels(f"disk/{image}"))
    assert Path("new/cache").is_dir()
    events = json.loads(Path("trace.json").read_text())["traceEvents"]
    assert {"write maps", "write keys", "write queries"} <= {event["name"] for event in events}


@pytest.mark.parametrize("options", [["--storage", "int8"], ["--kv", "int8"]], ids=lambda options: options[0])
def test_8_bits_are_near_what_is_exact(run, options):
    draw_mask()
    for name, given in (("exact", []), ("small", options)):
        result = run("edit", BEFORE, AFTER, "--steps", 3, "--mask", "mask.png", "--output", name, *given)
        assert result.exit_code == 0, result.output
    exact, small = pixels("exact/edit_1.png").astype(int), pixels("small/edit_1.png").astype(int)
    assert np.array_equal(pixels("exact/base.png"), pixels("small/base.png"))
    assert np.abs(exact - small).max() <= 8
    if "--storage" in options:  # the keys alone change no pixel of this model
        assert not np.array_equal(exact, small)


def test_a_base_is_saved_from_the_tier_it_lies_on(run):
    draw_mask()
    given = ["--steps", 2, "--save", "kept", "--host-cache", 0, "--disk-cache", "cache", "--gpu-cache", 0]
    result = run("generate", BEFORE, *given)
    assert result.exit_code == 0, result.output
    result = run("edit", "--base", "kept", AFTER, "--mask", "mask.png")
    assert result.exit_code == 0, result.output
    assert np.array_equal(pixels("image.png"), pixels("edit/base.png"))


def test_demo_writes_a_sheet_and_a_report_of_three_edits(run):
    result = run("demo", "--quick", "--output", "out")
    assert result.exit_code == 0, result.output
    report = json.loads(Path("out/report.json").read_text())
    assert len(report["edits"]) == len(EDITS) >= 3
    assert [e["after"] for e in report["edits"]] == [e.after for e in EDITS]
    assert all(e["background_identical"] for e in report["edits"])
    assert report["setup_seconds"] > 0 and report["settings"]["num_inference_steps"] == 5
    assert Image.open("out/contact_sheet.png").height > 3 * 256
    for edit in EDITS:
        assert edit.name in result.output


def test_edit_writes_a_trace_of_its_calls(run):
    result = run("edit", BEFORE, AFTER, "--steps", 3, "--detect-steps", 1, "--output", "out", "--trace", "out/t.json")
    assert result.exit_code == 0, result.output
    assert "wrote out/t.json: open it in https://ui.perfetto.dev" in result.output
    names = [event["name"] for event in json.loads(Path("out/t.json").read_text())["traceEvents"] if event["ph"] == "X"]
    assert [name.split()[0] for name in names] == ["record"] * 3 + ["detect"] + ["sparse"] * 2


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (["--trace", "gone/t.json"], 1, "The trace cannot be written to 'gone/t.json'"),
        (["--host-cache", "much"], 1, "host-cache='much' is not known"),
        (["--disk-cache", "file.txt"], 2, "--disk-cache: 'file.txt' cannot be made"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_cannot_be_is_told_before_a_model_is_loaded(run, options, code, says):
    Path("file.txt").write_text("no folder")
    result = run("edit", BEFORE, AFTER, *options, model="nowhere")
    assert result.exit_code == code and says in error_line(result), result.output


@pytest.mark.parametrize(
    ("graph", "shows"),
    [("edit", "sparse_conv"), ("detect", "controlled_attention"), ("record", "cache_store")],
)
def test_inspect_prints_the_graph_and_its_passes(run, graph, shows):
    result = run("inspect", "--graph", graph)
    assert result.exit_code == 0, result.output
    assert shows in result.output
    assert "passes:" in result.output and "infer_domains" in result.output and "dense islands:" in result.output


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["edit", BEFORE, " ".join(["house"] * 90), "--steps", 2], 1, "has 92 tokens"),
        (["generate", " ".join(["house"] * 90), "--steps", 2], 1, "has 92 tokens"),
        (["edit", BEFORE, AFTER, "--mask", "missing.png", "--steps", 2], 1, "missing.png"),
        (["edit", BEFORE, AFTER, "--detect-steps", 2, "--steps", 2], 1, "the schedule has 2 steps"),
        (["edit", BEFORE, AFTER, "--dilation", -1], 1, "dilation=-1"),
        (["edit", BEFORE, AFTER, "--gpu-cache", "8 gigs"], 1, "gpu-cache='8 gigs' is not known; it takes a size"),
        (["generate", BEFORE, "--save", "kept", "--host-cache", "-1"], 1, "host-cache='-1' is not known"),
        (["edit", BEFORE, AFTER, "--dtype", "float16", "--steps", 3], 1, "float16 on cpu"),
        (["generate", BEFORE, "--dtype", "float16"], 1, "float16 on cpu"),
        (["demo", "--dtype", "float16"], 1, "float16 on cpu"),
        (["edit", BEFORE, AFTER, "--steps", 1], 1, "too short to find a mask"),
        (["edit", BEFORE, AFTER, "--mask", "file.txt"], 1, "'file.txt'"),
        (["generate", BEFORE, "--size", "0x0"], 1, "height=0 is not known; it takes multiples of 8"),
        (["generate", BEFORE, "--size", "16x20"], 1, "width=20 is not known; it takes multiples of 8"),
        (["edit", BEFORE, AFTER, "--size", "20x16"], 1, "height=20"),
        (["inspect", "--size", "20x16"], 1, "height=20"),
        (["generate", BEFORE, "--steps", 1001], 1, "steps=1001 is not known; it takes 1 to 1000"),
        (["edit", BEFORE, AFTER, "--steps", 1001], 1, "steps=1001"),
        (["edit", BEFORE], 2, "Missing argument"),
        (["edit", BEFORE, AFTER, "--cost", "cheap"], 2, "'cheap' is not one of"),
        (["edit", BEFORE, AFTER, "--storage", "int4"], 2, "'int4' is not one of"),
        (["edit", BEFORE, AFTER, "--kv", "int4"], 2, "'int4' is not one of"),
        (["edit", BEFORE, AFTER, "--disk-cache", "file.txt"], 2, "--disk-cache: 'file.txt' cannot be made"),
        (
            ["generate", BEFORE, "--save", "kept", "--disk-cache", "file.txt/cache"],
            2,
            "'file.txt/cache' cannot be made",
        ),
        (["generate", BEFORE, "--gpu-cache", "1GiB"], 2, "--gpu-cache: goes with --save"),
        (["generate", BEFORE, "--storage", "exact"], 2, "--storage: goes with --save"),
        (["generate", BEFORE, "--size", "big"], 2, "'big' is no size"),
        (["generate", BEFORE, "--size", "-8x8"], 2, "'-8x8' is no size"),
        (["generate", BEFORE, "--steps", 0], 2, "greater than or equal to 1"),
        (["edit", BEFORE, AFTER, "--steps", 0], 2, "greater than or equal to 1"),
        (["generate", BEFORE, "--seed", -1], 2, "greater than or equal to 0"),
        (["edit", BEFORE, AFTER, "--seed", 2**64], 2, "less than or equal to 18446744073709551615"),
        (["generate", BEFORE, "--guidance", "nan"], 2, "nan is no scale"),
        (["edit", BEFORE, AFTER, "--guidance", "inf"], 2, "inf is no scale"),
        (["generate", BEFORE, "--output", "picture.xyz"], 2, "'picture.xyz' is no image file"),
        (["generate", BEFORE, "--output", "picture"], 2, "give one such as .png"),
        (["generate", BEFORE, "--output", "file.txt/picture.png"], 2, "'file.txt' cannot be made"),
        (["edit", BEFORE, AFTER, "--output", "file.txt"], 2, "'file.txt' cannot be made"),
        (["demo", "--output", "file.txt/demo"], 2, "'file.txt/demo' cannot be made"),
        (["inspect", "--graph", "all"], 2, "'all' is not one of"),
    ],
    ids=lambda value: None if not isinstance(value, str) else value.replace(" ", "-")[:30],
)
def test_mistakes_are_told_in_one_message(run, arguments, code, says):
    Path("file.txt").write_text("no picture, no folder")
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert says in error_line(result)


def test_a_folder_without_a_model_is_named(run, tmp_path):
    result = run("generate", BEFORE, model=tmp_path / "nowhere")
    assert result.exit_code == 1
    said = "".join(error_line(result).split())  # a long path is broken anywhere
    assert "nowhere'holdsnodiffuserspipeline" in said


@pytest.mark.parametrize("device", ["cuda:99", "banana", "meta", "cpu:x"])
def test_a_device_that_is_not_there_is_named(run, folder, device):
    result = run("generate", BEFORE, "--model", folder, "--device", device, model=None)
    assert result.exit_code == 1
    assert f"The device '{device}' is not available; available here: cpu" in error_line(result)


@pytest.mark.parametrize(
    ("file", "text", "says"),
    [
        ("model_index.json", "{", "JSON"),
        ("unet/config.json", "{", "JSON"),
        ("unet/diffusion_pytorch_model.safetensors", "", "Unable to load weights"),
        ("model_index.json", '{"_class_name": "DDPMPipelin"}', "DDPMPipelin"),
    ],
)
def test_a_damaged_model_is_named(run, folder, tmp_path, file, text, says):
    shutil.copytree(folder, "damaged")
    Path("damaged", file).write_text(text)
    result = run("generate", BEFORE, model=Path("damaged"))
    assert result.exit_code == 1
    assert "The pipeline in the folder 'damaged' cannot be loaded" in error_line(result)
    assert says in error_line(result)


def test_a_pipeline_that_takes_no_prompt_is_named(run):
    blocks = {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "block_out_channels": [32]}
    DDPMPipeline(UNet2DModel(sample_size=8, layers_per_block=1, **blocks), DDPMScheduler()).save_pretrained("other")
    result = run("generate", BEFORE, model=Path("other"))
    assert result.exit_code == 1
    assert "cannot drive DDPMPipeline: it lacks `tokenizer`" in error_line(result)


@pytest.mark.parametrize("command", [[], ["generate"], ["edit"], ["demo"], ["inspect"]])
def test_help_names_every_option_with_a_text(command):
    result = CliRunner().invoke(app, [*command, "--help"])
    assert result.exit_code == 0
    assert ("--model" in result.output) == bool(command)
