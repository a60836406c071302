"""Every published layout of tests/layouts.py, tried from end to end; docs/models.md says what was tried."""
import json
import re
from pathlib import Path

import pytest
import torch

import layouts
import model
import tiny
from support import families
from support.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[2]
MODELS_MD = (ROOT / "docs/models.md").read_text(encoding="utf-8")
LEARNED = [name for name, layout in layouts.LAYOUTS.items()
           if "tokenizer.model" not in layout.tokenizer() and not layout.resaved]


@pytest.mark.parametrize("name", layouts.LAYOUTS)
def test_a_published_layout(name, tmp_path):
    """Config, tokenizer, template, sample, one training step, final/ back in transformers."""
    assert layouts.try_out(name, tmp_path / "model") in MODELS_MD


@pytest.mark.parametrize("name", layouts.REFUSED)
def test_a_layout_that_computes_otherwise_is_refused_by_name(name, tmp_path):
    assert layouts.refusal(name, tmp_path / "model") in MODELS_MD


def test_the_page_has_no_row_that_nobody_tries():
    rows = re.findall(r"^\| ([^|]+) \| ", MODELS_MD, re.MULTILINE)
    assert set(rows) - {"layout"} == set(layouts.LAYOUTS) | set(layouts.REFUSED)
    assert f"{len(layouts.LAYOUTS)} published layouts" in MODELS_MD
    assert f"{len(layouts.TEXTS)} awkward texts" in MODELS_MD


@pytest.mark.parametrize("name", LEARNED)
def test_each_step_of_a_pipeline_is_noticed(name, tmp_path):
    """The control: a tokenizer.json that lacks one step of its pipeline gives other ids for TEXTS."""
    path = tmp_path / "tokenizer.json"
    path.write_text(layouts.LAYOUTS[name].tokenizer()["tokenizer.json"])
    root = json.loads(path.read_text())
    layouts.write_json(tmp_path / "tokenizer_config.json", {"eos_token": root["added_tokens"][-1]["content"]})
    tokenizer = load_tokenizer(tmp_path)
    layouts.try_ids(tmp_path, tokenizer)
    changed = [root | {"normalizer": None}] if root["normalizer"] else []
    steps = root["pre_tokenizer"].get("pretokenizers", [])
    for n in range(len(steps) - 1):
        rest = steps[:n] + steps[n + 1:]
        changed.append(root | {"pre_tokenizer": dict(root["pre_tokenizer"], pretokenizers=rest)})
    for one in changed:
        path.write_text(json.dumps(one))
        with pytest.raises(AssertionError, match="ids of"):
            layouts.try_ids(tmp_path, tokenizer)


def test_a_family_of_ones_own(tmp_path, monkeypatch):
    """The row of FAMILIES in CONTRIBUTING.md: its logits are transformers', there and back."""
    section = (ROOT / "CONTRIBUTING.md").read_text().split("## Add a model family")[1].split("+++")[1]
    added = "".join(line[1:] for line in section.splitlines(keepends=True) if line.startswith("+    "))
    [(name, family)] = eval(f"{{{added}}}", vars(families)).items()
    monkeypatch.setitem(families.FAMILIES, name, family)
    from transformers import AutoConfig, AutoModelForCausalLM
    config = AutoConfig.for_model(name, **tiny.SIZES, vocab_size=64, num_key_value_heads=2, head_dim=12)
    tiny.randomise(AutoModelForCausalLM.from_config(config)).save_pretrained(tmp_path / "theirs")
    model.save(model.load(tmp_path / "theirs"), tmp_path / "ours")
    ids = torch.arange(48)[None]
    expected = layouts.logits_of(layouts.reference_of(tmp_path / "theirs"), ids)
    layouts.close(layouts.logits_of(layouts.reference_of(tmp_path / "ours"), ids), expected, "logits of ours")
    layouts.close(layouts.logits_of(model.load(tmp_path / "ours"), ids), expected, "our logits")
    assert expected.std() > 1 and model.read_config(tmp_path / "ours").attention_bias
