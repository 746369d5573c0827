from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from calibri_lightning.shapes.captions import VOCABULARY, scenes
from calibri_lightning.shapes.pipeline import TINY, PipelineConfig, bpe_merges, build_pipeline, build_tokenizer

PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")


def fingerprint(pipe: Any) -> str:
    digest = hashlib.sha256()
    for part in PARTS:
        for name, value in getattr(pipe, part).state_dict().items():
            digest.update(name.encode() + value.contiguous().numpy().tobytes())
    for tokenizer in (pipe.tokenizer, pipe.tokenizer_2):
        digest.update(str(sorted(tokenizer.get_vocab().items())).encode())
        digest.update(str(tokenizer(CAPTIONS, padding="max_length").input_ids).encode())
    return digest.hexdigest()


CAPTIONS = ["a red circle above a blue square", "four orange triangles", ""]


@pytest.fixture(scope="module")
def pipe() -> Any:
    return build_pipeline(TINY, seed=3)


def test_equal_seeds_build_equal_pipelines(pipe: Any, untouched_rng: None) -> None:
    torch.rand(7, generator=torch.Generator().manual_seed(1))
    assert fingerprint(build_pipeline(TINY, seed=3)) == fingerprint(pipe)
    assert fingerprint(build_pipeline(TINY, seed=4)) != fingerprint(pipe)


def test_the_global_state_does_not_matter(pipe: Any) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(99)
        assert fingerprint(build_pipeline(TINY, seed=3)) == fingerprint(pipe)


def test_equal_in_a_process_with_another_hash_seed(pipe: Any) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from test_shapes_pipeline import TINY, build_pipeline, fingerprint\n"
        "print(fingerprint(build_pipeline(TINY, seed=3)))"
    )
    hash_seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    run = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parent)],
        env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split()[-1] == fingerprint(pipe)


def test_a_pipeline_is_ready_for_inference(pipe: Any) -> None:
    for part in PARTS:
        module = getattr(pipe, part)
        assert not any(child.training for child in module.modules())
        assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}


def test_the_blocks_are_those_of_sd35_medium_in_miniature(pipe: Any) -> None:
    blocks = pipe.transformer.transformer_blocks
    assert [block.use_dual_attention for block in blocks] == [
        i in TINY.dual_attention_layers for i in range(len(blocks))
    ]
    assert [block.context_pre_only for block in blocks] == [i == len(blocks) - 1 for i in range(len(blocks))]


@pytest.mark.parametrize("text", ["", "a red circle", "Something else: 4 ☃!"])
def test_the_silent_encoder_gives_exact_zeros(pipe: Any, text: str) -> None:
    embeds = pipe._get_t5_prompt_embeds([text], max_sequence_length=16)
    assert embeds.shape == (1, 16, 2 * TINY.text_width)
    assert torch.equal(embeds, torch.zeros_like(embeds))


def test_the_silent_encoder_adds_what_an_absent_one_adds(pipe: Any) -> None:
    without = type(pipe)(**{**pipe.components, "text_encoder_3": None})
    with torch.no_grad():
        present, absent = (
            p.encode_prompt(CAPTIONS, None, None, do_classifier_free_guidance=False) for p in (pipe, without)
        )
    assert torch.equal(present[0], absent[0])
    assert torch.equal(present[2], absent[2])


def draw(pipe: Any, guidance: float = 3.0) -> torch.Tensor:
    generator = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    sizes = {"height": TINY.image_size, "width": TINY.image_size}
    pictures = pipe(
        CAPTIONS[:2], num_inference_steps=2, guidance_scale=guidance, generator=generator, output_type="pt", **sizes
    )
    return pictures.images


def test_stock_from_pretrained_round_trips_bit_for_bit(pipe: Any, tmp_path: Path) -> None:
    from diffusers import StableDiffusion3Pipeline

    pipe.save_pretrained(tmp_path)
    loaded = StableDiffusion3Pipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(pipe) is StableDiffusion3Pipeline
    assert fingerprint(loaded) == fingerprint(pipe)
    pictures = draw(pipe)
    assert pictures.shape == (2, 3, TINY.image_size, TINY.image_size)
    assert torch.equal(draw(loaded), pictures)


def test_captions_reach_the_picture(pipe: Any) -> None:
    with torch.no_grad():
        embeds, _, pooled, _ = pipe.encode_prompt(CAPTIONS, None, None, do_classifier_free_guidance=False)
    assert not torch.equal(embeds[0], embeds[1])
    # Legacy pooling would take a letter's position and give captions of one beginning one vector.
    assert torch.unique(pooled, dim=0).shape[0] == len(CAPTIONS)


def test_each_word_of_the_grammar_is_one_token() -> None:
    tokenizer = build_tokenizer(PipelineConfig().max_tokens)
    ids = {word: tokenizer(word).input_ids[1:-1] for word in VOCABULARY}
    assert all(len(tokens) == 1 for tokens in ids.values()), ids
    assert len({tokens[0] for tokens in ids.values()}) == len(VOCABULARY)


def test_every_caption_fits_and_reads_back() -> None:
    tokenizer = build_tokenizer(PipelineConfig().max_tokens)
    for scene in scenes():
        ids = tokenizer(scene.caption).input_ids
        assert len(ids) == len(scene.caption.split()) + 2 <= PipelineConfig().max_tokens
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == scene.caption


def test_other_text_tokenises_letter_by_letter() -> None:
    tokenizer = build_tokenizer(64)
    ids = tokenizer("zebra ☃ é").input_ids
    assert tokenizer.unk_token_id not in ids[1:-1]
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == "zebra ☃ é"


@pytest.mark.parametrize("words", [VOCABULARY, ("a", "aaaa", "aaaaa"), ("banana", "bandana", "anna"), ("x",), ()])
def test_merges_make_each_word_one_token(words: tuple[str, ...]) -> None:
    merges = bpe_merges(words)
    assert len(set(merges)) == len(merges)
    for word in words:
        # An independent reading of the merges: the lowest rank first, as CLIP's own tokenizer does.
        part = [*word[:-1], word[-1] + "</w>"]
        while len(part) > 1:
            ranked = [
                (merges.index(pair), i) for i, pair in enumerate(zip(part, part[1:], strict=False)) if pair in merges
            ]
            rank, position = min(ranked)
            part[position : position + 2] = ["".join(merges[rank])]
        assert part == [word + "</w>"]


def test_merges_do_not_depend_on_the_order_of_words() -> None:
    assert bpe_merges(VOCABULARY) == bpe_merges(VOCABULARY[::-1]) == bpe_merges(sorted(VOCABULARY))
