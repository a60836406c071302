"""A real chat model, SmolLM2-135M-Instruct, on real dialogues, HH-RLHF's; other people's code is the oracle.

    SMOLLM2=DIR python -m pytest -m slow tests/core/test_smollm2.py          forty minutes of one CPU core
"""
import gzip
import hashlib
import itertools
import os
import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors import safe_open

import data
import losses
import model
import sample
import tiny
import train
from forest import pack
from support import disk

pytestmark = pytest.mark.slow
RECIPES = ("sft", "judge", "dpo", "sr-dpo", "sr-ipo", "osp")


@pytest.fixture(scope="module")
def folder():
    """The model's folder."""
    path = Path(os.environ.get("SMOLLM2") or tiny.shared("models/smollm2-135m-instruct"))
    if not (path / "config.json").exists():
        pytest.skip(f"{path} holds no model; SMOLLM2 names the folder of SmolLM2-135M-Instruct")
    return path


@pytest.fixture(scope="module")
def hh():
    """A file of HH-RLHF pairs."""
    return tiny.shared("hh-rlhf/helpful-base.test.lines-0001-1354.jsonl.gz")


@pytest.fixture(scope="module")
def pairs(hh, tmp_path_factory):
    """A file of 40 of them: 36 short ones, and 4 that 256 tokens cannot hold."""
    with gzip.open(hh, "rt", encoding="utf-8") as file:
        lines = sorted(itertools.islice(file, 200), key=len)
    path = tmp_path_factory.mktemp("pairs") / "hh.jsonl"
    path.write_text("".join(lines[4:40] + lines[-4:]), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def chat(folder):
    """(tokenizer, Chat) of the folder."""
    tokenizer = data.load_tokenizer(folder)
    return tokenizer, data.chat_of(tokenizer, None)


def dialogues(hh):
    return [row.prompt for row in data.read_rows(hh, "prompts")[0]]


@pytest.fixture(scope="module")
def tokens(chat, hh):
    """(3, 200) ids of dialogues."""
    ids = (chat[1].ids(one) for one in dialogues(hh))
    return torch.tensor([one[:200] for one in itertools.islice((one for one in ids if len(one) >= 200), 3)])


@torch.no_grad()
def ours(folder, tokens):
    net = model.load(folder)
    return net.head(net(tokens))


def transformer(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@torch.no_grad()
def theirs(net, tokens):
    return net(tokens).logits


def assert_equal_logits(one, two):
    """To 1e-4 of their scale, here the standard deviation."""
    assert (one - two).abs().max() < 1e-4 * two.std()


def test_logits_are_transformers(folder, tokens):
    assert_equal_logits(ours(folder, tokens), theirs(transformer(folder), tokens))


def test_greedy_answers_are_those_of_generate(folder, chat, hh):
    """20 dialogues, 48 tokens each; ours in batches of eight dialogues of unequal lengths, theirs alone."""
    (tokenizer, chat), net, other = chat, model.load(folder), transformer(folder)
    prompts = [chat.ids(one) for one in dialogues(hh)[:20]]
    stop_ids, allowed = sample.stopping(tokenizer, chat, net.config)
    found = sample.sample_prompts(net, prompts, 1, 48, 0, 0, stop_ids, allowed, temperature=0)
    for ids, (one,) in zip(prompts, found, strict=True):
        expected = other.generate(torch.tensor([ids]), max_new_tokens=48, do_sample=False,
                                  attention_mask=torch.ones(1, len(ids), dtype=torch.long))
        assert one.ids == expected[0, len(ids):].tolist()


def test_ids_of_1000_dialogues_are_apply_chat_template_s(folder, chat, hh):
    """HH's leading space is removed on both sides. (AutoTokenizer would cut digits in another way.)"""
    fast = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    for messages in dialogues(hh)[:1000]:
        plain = [one | {"content": one["content"].removeprefix(" ")} for one in messages]
        assert chat[1].ids(messages) == fast.apply_chat_template(plain, add_generation_prompt=True,
                                                                 return_dict=False)


# -----------------------------------------------------------------------------------------------------------
# Training

def settings(folder, pairs, out, recipe, **changes):
    """Ten steps that move the weights visibly; one checkpoint in the middle."""
    short = dict(k=2, max_tokens=24) if recipe == "osp" else {}
    common = dict(model=str(folder), data=[pairs], out_dir=str(out), steps=10, batch_size=4, max_length=256,
                  lr=2e-5, save_every=5, keep=2)
    return train.Settings(recipe=recipe, **common | short | changes)


TIMED = ("metrics.jsonl", "report.html", ".lock")                  # they tell seconds


def written(out):
    """{file, or tensor of a checkpoint: digest of its bytes} that a run leaves, and metrics without times."""
    files = [path for path in out.rglob("*") if path.is_file()]
    found = {str(path): disk.digest(path) for path in files
             if "checkpoint" not in path.parts and path.name not in TIMED}
    for path in files:          # a checkpoint's file may hold the same tensors in another order
        if "checkpoint" in path.parts and path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                found |= {f"{path.parent}: {name}": bytes_of(file.get_tensor(name)) for name in file.keys()}
    return found, tiny.metrics(out)


def bytes_of(tensor):
    """The digest of a tensor's values."""
    return hashlib.sha256(tensor.flatten().view(torch.uint8).numpy()).hexdigest()


@pytest.mark.parametrize("rank", [0, 16], ids=["whole", "lora"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_ten_steps(recipe, rank, folder, pairs, tokens, tmp_path):
    """Taken back to step 5 and resumed they leave the same bits; final/ and adapter/ are what others read.

    Adapters are merged in float32, so final/ keeps them in that type: bfloat16 would round them.
    """
    out = tmp_path / "out"
    changes = dict(lora_rank=rank, save_dtype="float32") if rank else {}
    given = settings(folder, pairs, out, recipe, **changes)
    train.Trainer(given).run()
    whole, rows = written(out)
    steps = [row for row in rows if "loss" in row]                     # evaluations have lines of their own
    assert len(steps) == 10 and steps[0]["loss"] != steps[-1]["loss"] and not steps[-1]["skipped"]
    for name in ("checkpoint/step-10", "final", "adapter"):
        shutil.rmtree(out / name, ignore_errors=name == "adapter")
    train.Trainer(given).run()
    again, same = written(out)
    assert rows == same and [name for name in whole if whole[name] != again.get(name)] == []

    final = ours(out / "final", tokens)
    assert_equal_logits(final, theirs(transformer(out / "final"), tokens))
    base = transformer(folder)
    assert (theirs(base, tokens) - final).abs().max() > 1e-2 * final.std()              # it has learned
    if rank:
        adapted = peft.PeftModel.from_pretrained(base, out / "adapter")
        assert_equal_logits(final, theirs(adapted, tokens))
    shutil.rmtree(out)                                         # some gigabytes


def test_lm_eval_serves_final_with_its_template(folder, pairs, tmp_path):
    """lm-evaluation-harness reads final/: its template gives our ids, and its log-likelihoods are ours."""
    huggingface = pytest.importorskip("lm_eval.models.huggingface", reason="lm-eval is in no extra")
    from lm_eval.api.instance import Instance
    out = tmp_path / "out"
    train.Trainer(settings(folder, pairs, out, "sft", lora_rank=2, steps=1)).run()
    rows = data.read_rows(pairs, "pairs")[0][-8:]
    served = huggingface.HFLM(pretrained=str(out / "final"), device="cpu", dtype="float32")
    net, tokenizer = sample.load_model(out / "final", "float32", "cpu")
    pairs = [data.encode_pair(tokenizer, row, data.chat_of(tokenizer, None), 2048, 1) for row in rows]
    asked = []
    for row, pair in zip(rows, pairs):
        plain = [one | {"content": one["content"].removeprefix(" ")} for one in row.prompt]
        text = served.apply_chat_template(plain)
        assert served.tok_encode(text) == pair.x
        asked.append(Instance("loglikelihood", {}, (text, row.chosen.removeprefix(" ")), 0))
    found = [value for value, _ in served.loglikelihood(asked, disable_tqdm=True)]
    with torch.no_grad():
        packed = pack([pair.x + pair.chosen[:-1] for pair in pairs])             # without the end of the turn
        expected = losses.logprobs(net, packed, [len(pair.x) for pair in pairs])
    assert found == pytest.approx(expected.tolist(), rel=1e-4)
