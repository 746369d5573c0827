"""The model card."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import yaml
from export_tools import Family, write_run, write_test
from huggingface_hub import ModelCard

from calibri_lightning.tools.export.markdown import escape
from calibri_lightning.tools.export.run import Options, export

SD3 = Family("sd3")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return SD3.save(tmp_path_factory.mktemp("models") / "base")


def head(card: str) -> dict[str, object]:
    return yaml.safe_load(card.split("---\n")[1])


def snippets(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


def test_the_card_says_method_numbers_cost_prompts_and_licence(tmp_path: Path, base: Path) -> None:
    run = write_run(tmp_path / "run", base)
    write_test(run)
    export(Options(run, tmp_path / "out"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert head(card)["library_name"] == "diffusers"
    assert "license" not in head(card), "nobody knows that of a tiny model"
    assert "Check the licence of base before you share this" in card, "nothing is claimed"
    # Means 0.25 and 0.4625, differences 0.2, 0.2, 0.25 and 0.2: 0.2125, all won.
    row = next(line for line in card.splitlines() if line.startswith("| calibrated @ 3 steps - base"))
    assert re.search(r"\+0\.21\d* \[\+0\.2\d*, \+0\.2\d*\]", row)
    assert "100% / 0% / 0%" in row
    assert "48 pictures with validation, 144 forwards" in card
    assert "antithetic pairs" in card
    assert "`num_pairs: 2`" in card
    assert "Guidance: none, neither in the base nor in the run" in card
    assert "Found on: `train.txt`" in card
    assert "Tested on: `shapes:test`" in card


def test_the_card_of_a_stacked_run_tells_what_it_stands_on(tmp_path: Path, base: Path) -> None:
    """Else the gains over the base, and their cost, would seem to be the last run's alone."""
    first = write_run(tmp_path / "lora" / "version_0", base, parts=("adapter",))
    write_test(first)
    second = write_run(tmp_path / "run", base, parts=("adapter", "scales"))
    write_test(second)
    config = yaml.safe_load((second / "config.yaml").read_text())
    for number, source in enumerate([f"{first}/adapter", "somebody/a-lora"]):
        config["model"]["init_from"] = source
        (second / "config.yaml").write_text(yaml.safe_dump(config))
        export(Options(second, tmp_path / f"out{number}"))
    known, unknown = ((tmp_path / f"out{number}" / "README.md").read_text() for number in (0, 1))
    assert "- Started from: tiny, antithetic pairs" in known
    assert "On top of that, what it started from: 48 pictures with validation, 144 forwards" in known
    assert str(tmp_path) not in known
    assert "- Started from: somebody/a-lora, of which nothing more is known here" in unknown
    assert "that is not known in full" in unknown


@pytest.mark.parametrize("members", ["single", "cfg"])
def test_the_snippets_of_a_card_run(tmp_path: Path, base: Path, members, monkeypatch) -> None:
    parts = ("merged", "scales", "adapter")
    run = write_run(tmp_path / "run", base, parts=parts, members=members, weight_mode="raw")
    export(Options(run, tmp_path / "out"))
    found = snippets((tmp_path / "out" / "README.md").read_text())
    assert len(found) == (2 if members == "single" else 1)
    for snippet in found:
        ast.parse(snippet)
        code = snippet.replace("path/to/this/folder", str(tmp_path / "out")).replace("path/to/base", str(base))
        code = code.replace("num_inference_steps=3", "num_inference_steps=2, height=16, width=16")
        scope: dict[str, object] = {}
        exec(code, scope)  # noqa: S102 - what users copy
        assert scope["image"].size == (16, 16)


def licence_section(card: str) -> str:
    return card.split("## Licence")[1]


def test_the_licence_is_what_the_models_own_card_says(tmp_path: Path, base: Path) -> None:
    own = SD3.save(tmp_path / "own")
    given = "license: other\nlicense_name: some-terms\nlicense_link: LICENSE.md"
    (own / "README.md").write_text(f"---\n{given}\n---\n# A model\n")
    (own / "LICENSE.md").write_text("terms")
    run = write_run(tmp_path / "run", own)
    export(Options(run, tmp_path / "folder"))
    card = ModelCard.load(tmp_path / "folder" / "README.md")
    assert (card.data.license, card.data.license_name, card.data.license_link) == ("other", "some-terms", "LICENSE.md")
    assert (tmp_path / "folder" / "LICENSE.md").read_text() == "terms"
    assert "own: some-terms, by the model's own card. Its terms are beside this card: `LICENSE.md`" in card.text
    export(Options(run, tmp_path / "scales", form="calibration"))
    card = ModelCard.load(tmp_path / "scales" / "README.md")
    assert card.data.license_link is None, "the file is not there"
    assert card.data.license_name == "some-terms"


def test_no_licence_is_claimed_of_a_model_whose_card_is_not_at_hand(tmp_path: Path, base: Path, monkeypatch) -> None:
    name = "stabilityai/stable-diffusion-3.5-medium"
    run = write_run(tmp_path / "run", base, members="cfg", weight_mode="raw", pretrained=name)
    export(Options(run, tmp_path / "out"))
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license is None
    assert card.data.base_model == name
    assert f"Check the licence of {name.replace('_', chr(92) + '_')} before you share this" in licence_section(
        card.text
    )
    cached = tmp_path / "README.md"
    cached.write_text("---\nlicense: other\nlicense_link: LICENSE.md\n---\n")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: str(cached))
    export(Options(run, tmp_path / "again"))
    card = ModelCard.load(tmp_path / "again" / "README.md")
    assert card.data.license_link == f"https://huggingface.co/{name}/blob/main/LICENSE.md"
    cached.write_text("---\nlicense: other\nlicense_link: 'https://x) <script>'\n---\n")
    export(Options(run, tmp_path / "bad"))
    assert "<script>" not in licence_section((tmp_path / "bad" / "README.md").read_text())


def test_the_embedded_model_is_under_the_licence_of_the_package(tmp_path: Path, base: Path) -> None:
    export(Options(write_run(tmp_path / "run", base, members="cfg", pretrained="shapes"), tmp_path / "out"))
    assert ModelCard.load(tmp_path / "out" / "README.md").data.license == "apache-2.0"


def test_a_distilled_model_is_called_with_the_guidance_that_it_was_told(tmp_path: Path) -> None:
    flux = Family("flux1-dev")
    base = flux.save(tmp_path / "base")
    for told, call in ((None, "num_inference_steps=3).images"), (2.5, "num_inference_steps=3, guidance_scale=2.5)")):
        run = write_run(tmp_path / f"run{told}", base, flux.backbone, embedded_guidance=told)
        export(Options(run, tmp_path / f"out{told}"))
        assert call in (tmp_path / f"out{told}" / "README.md").read_text()


def test_foreign_text_is_harmless(tmp_path: Path, base: Path) -> None:
    prompts = ["<script>alert(1)</script>", "![x](http://evil.example/p.png) | `code`", "long " * 2000, "1. - a list"]
    (tmp_path / "test.txt").write_text("\n".join(prompts) + "\n")
    name = "---\nlicense: mit\n---\n# <img src=x> [click](http://evil.example) \u202eright to left"
    run = write_run(tmp_path / "run", base, test=str(tmp_path / "test.txt"), name=name)
    export(Options(run, tmp_path / "out"))
    card = (tmp_path / "out" / "README.md").read_text()
    for harm in ("<script>", "<img", "![x]", "[click]", "\u202e", "- 1. - a"):
        assert harm not in card
    assert max(map(len, card.splitlines())) < 1000
    assert "license" not in head(card)
    title = r"# --- license: mit --- \# &lt;img src=x&gt; \[click\](http://evil.example) �right to left"
    assert title.replace("# ---", r"# \---", 1) in card


def test_a_file_of_prompts_that_was_spoilt_since_is_not_shown(tmp_path: Path, base: Path) -> None:
    spoilt = tmp_path / "test.txt"
    spoilt.write_bytes(b"\xff\xfe\x00")
    export(Options(write_run(tmp_path / "run", base, test=str(spoilt)), tmp_path / "out"))
    assert "The first test prompts" not in (tmp_path / "out" / "README.md").read_text()


def test_escaping() -> None:
    assert escape("a | b\n*c*") == r"a \| b \*c\*"
    assert escape("- a") == r"\- a"
    assert escape("12. a") == r"12\. a"
    assert escape("&amp; <b>") == "&amp;amp; &lt;b&gt;"
    assert escape("x" * 10, 4) == "xxx…"
