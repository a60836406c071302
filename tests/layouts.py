"""Published layouts, made here with tiny random weights and tried from end to end.

    python tests/layouts.py             the tables of docs/models.md: each row was tried just now
    build(LAYOUTS[name], folder)        the folder
    try_out(name, folder)               its row; AssertionError where something is not as it must be

What stands in the folders: tests/published.py. The oracles are transformers, tokenizers and sentencepiece.
tests/support/test_layouts.py tries them all.
"""
import contextlib
import copy
import io
import itertools
import json
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

import sentencepiece
import tokenizers
import torch
from safetensors.torch import load_file, save_file

import data
import model
import sample
import tiny
import train
from published import GONE, LAYOUTS, REFUSED, fields
from support.cli import InputError
from support.rows import Unusable

# -----------------------------------------------------------------------------------------------------------
# Making a folder

def write_json(path, value):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False), encoding="utf-8")


def with_ids(values, ids):
    """The values of fields that name token ids by their texts, as ids."""
    def id_of(value):
        return [id_of(one) for one in value] if isinstance(value, list) else ids.get(value, value)
    return {name: id_of(value) if name.endswith("_token_id") else value for name, value in values.items()}


def write_weights(config, folder, layout):
    """Random weights in the published dtype, saved by transformers, then named as they were published."""
    from transformers import AutoConfig, AutoModelForCausalLM
    dtype = getattr(torch, config["torch_dtype"])
    net = AutoModelForCausalLM.from_config(AutoConfig.for_model(**copy.deepcopy(config)))
    net = tiny.randomise(net.float()).to(dtype)
    net.save_pretrained(folder, max_shard_size="40KB" if layout.shards else "1GB")
    if layout.resaved:
        return
    is_neox = config["model_type"] == "gpt_neox"
    layer, head = ("gpt_neox.layers.0.", "embed_out") if is_neox else ("model.layers.0.", "lm_head")
    for file in folder.glob("*.safetensors"):
        tensors = {name.replace("lm_head", head): tensor for name, tensor in load_file(file).items()}
        if any(name.startswith(layer) for name in tensors):
            tensors |= {layer + name: torch.ones(2, dtype=torch.uint8 if name.endswith(".bias") else dtype)
                        for name in layout.buffers}
        save_file(tensors, file, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.exists():
        index.write_text(index.read_text().replace("lm_head", head))


def build(layout, folder):
    """Write the folder -> folder."""
    folder.mkdir(parents=True)
    files = layout.tokenizer()
    for name, content in files.items():
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    root = json.loads(files.get("tokenizer.json") or tiny.spaced_tokenizer(files["tokenizer.model"]).to_str())
    ids = root["model"]["vocab"] | {token["content"]: token["id"] for token in root["added_tokens"]}
    config = with_ids(layout.config | {"vocab_size": max(ids.values()) + 1 + layout.spare_rows}, ids)
    write_weights(config, folder, layout)
    names = fields(layout.names, {
        "added_tokens_decoder": {str(token.pop("id")): token for token in root["added_tokens"]},
        "chat_template": layout.template or GONE})
    write_json(folder / "tokenizer_config.json", names)
    write_json(folder / "generation_config.json", with_ids(layout.generation, ids))
    if layout.resaved:
        from transformers import AutoTokenizer
        AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
        (folder / "tokenizer.model").unlink(missing_ok=True)
    else:
        write_json(folder / "config.json", config)
    return folder


# -----------------------------------------------------------------------------------------------------------
# Trying it out

TEXTS = ["", " ", "Hello  world!", "The quiet river waits.\n\n\tAnd  sings. ", "12345 ½ ² Ⅻ ٣ 1st",
         "1234 ½ ² 5 × ",
         "\n\nHuman: It's 日本語 ()!?...\n\nAssistant: 12 \r\n", "naïve é e\u0301",
         "日本語 한국어 ไทย", "👨\u200d👩\u200d👧 ❤️", "/\x04-\x14\x00", "it's I'LL they've",
         "camelCase  café   HTTPServer", "  two before", "after  ", "</s><s>[INST]<|im_end|><|endoftext|>",
         "<think>x</think> ### End", "▁ a▁b",
         "\u3000\u00a0\u2028x", "a" * 70, "{'key': [1, 2.5]}\r\n", "a=(b)+c", "<0x0A>▁<PRE>"]
ASKED = {"role": "user", "content": "What does  the river do?\n"}
TALK = [ASKED, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nIt waits. "},
        {"role": "user", "content": "And \u00bd of 12\u00b2 \U0001f600 clouds?"}]
TALKS = [[ASKED], TALK, [{"role": "system", "content": "Be brief."}, *TALK], [*TALK, ASKED]]
ODD = "x </s><|im_end|><|eot_id|>[INST] y"


def same(one, two, what):
    assert one == two, f"{what}: {one!r:.300} is not {two!r:.300}"


def fast_tokenizer(folder):
    """transformers' reader of tokenizer.json as it stands; AutoTokenizer makes another one of some files."""
    from transformers import PreTrainedTokenizerFast
    names = json.loads((folder / "tokenizer_config.json").read_text())
    tokens = {name: names[name]["content"] if isinstance(names[name], dict) else names[name]
              for name in ("bos_token", "eos_token")}
    jinja = folder / "chat_template.jinja"
    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **tokens, chat_template=(
        jinja.read_text() if jinja.exists() else names["chat_template"]))


def try_config(folder, layout):
    """config.json is read; what stderr names is what the layout says."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        model.read_config(folder)
    wanted = f"note: {folder / 'config.json'}: {layout.notes!r} not known here, taken as without effect.\n"
    same(said.getvalue(), wanted if layout.notes else "", "stderr")


def try_ids(folder, tokenizer):
    """Ids of TEXTS are the library's."""
    path = folder / "tokenizer.model"
    if path.exists():
        reference = sentencepiece.SentencePieceProcessor(model_file=str(path)).encode
    else:
        its = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        its.encode_special_tokens = True                       # special strings are plain text
        reference = lambda text: its.encode(text, add_special_tokens=False).ids
    for text in TEXTS:
        same(tokenizer.encode(text), reference(text), f"ids of {text!r}")


def try_chats(folder, tokenizer):
    """Ids of TALKS are apply_chat_template's, refusals too; special strings inside of a turn stay text."""
    template, fast = tokenizer.chat_template, fast_tokenizer(folder)
    for talk, ask in itertools.product(TALKS, (True, False)):
        try:
            theirs = fast.apply_chat_template(talk, add_generation_prompt=ask, return_dict=False)
        except Exception as error:                             # jinja2's
            theirs = f"the chat template refuses it: {error}".rstrip(".")
        try:
            ours = template.ids(tokenizer, talk, ask)
        except Unusable as reason:
            ours = str(reason)
        same(ours, theirs, f"chat {talk}")
    plain, odd = (template.ids(tokenizer, [one | {"content": one["content"] + text} for one in TALK])
                  for text in ("y", ODD))
    special = set(tokenizer.special_ids.values())
    same([id for id in odd if id in special], [id for id in plain if id in special], "marks")
    same(tokenizer.decode(odd).count(ODD), len(TALK), "turns with special strings")


@torch.no_grad()
def logits_of(net, ids):
    return net.head(net(ids)) if isinstance(net, model.Transformer) else net(ids).logits


def close(one, two, what):
    assert (one - two).abs().max() < 1e-4 * two.abs().max(), what


def reference_of(folder):
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def try_network(folder, tokenizer, chat):
    """Logits, and four greedy tokens of an answer, are transformers' -> (our network, what it read)."""
    ours, reference = model.load(folder), reference_of(folder)
    prompt = data.in_turns("The quiet river waits. What does the tree do? " * 3, chat)
    x = data.prompt_ids(tokenizer, prompt, chat)
    ids = torch.tensor([data.prefix_ids(tokenizer, prompt, chat, x) + x])
    close(logits_of(ours, ids), logits_of(reference, ids), "logits")
    stop_ids, allowed = sample.stopping(tokenizer, chat, ours.config)
    theirs = reference.generate(ids, max_new_tokens=4, do_sample=False, repetition_penalty=1.0,
                                pad_token_id=0, eos_token_id=sorted(stop_ids),
                                suppress_tokens=(~allowed).nonzero()[0].tolist())
    [[one]] = sample.generate(ours, ids.tolist(), torch.zeros(1, 1, 4), stop_ids, allowed, temperature=0)
    same(one.ids, theirs[0, ids.shape[1]:].tolist(), "greedy tokens")
    return ours, ids


def try_training(folder, out, recipe, tokenizer, before, ids):
    """One step. Then final/ computes something else than the folder, and the same in transformers as here."""
    from transformers import AutoTokenizer
    pairs = tiny.write_jsonl(folder.with_suffix(".jsonl"), tiny.pairs(4, seed=1))
    with contextlib.redirect_stdout(io.StringIO()):
        train.Trainer(train.Settings(
            recipe=recipe, model=str(folder), data=[pairs], out_dir=str(out), steps=1, batch_size=2, lr=1e-2,
            warmup_steps=0, max_length=128, dtype="float32", device="cpu",
            **(dict(k=2, max_tokens=4) if recipe == "osp" else {}))).run()
    after = logits_of(model.load(out / "final"), ids)
    close(logits_of(reference_of(out / "final"), ids), after, "logits of final/")
    assert (after - logits_of(before, ids)).abs().max() > 1e-3, "the step changed nothing"
    saved, again = AutoTokenizer.from_pretrained(out / "final"), data.load_tokenizer(out / "final")
    for text in TEXTS:
        ids = tokenizer.encode(text)
        same(again.encode(text), ids, f"ids in final/ of {text!r}")
        if not any(token.special and str(token) in text for token in saved.added_tokens_decoder.values()):
            same(saved.encode(text), tokenizer.prefix(False) + ids, f"AutoTokenizer's in final/ of {text!r}")


def try_out(name, folder):
    """Build the layout in `folder`, try it from end to end -> its row of the table."""
    layout, recipe = LAYOUTS[name], ("sft", "dpo", "osp")[list(LAYOUTS).index(name) % 3]
    build(layout, folder)
    try_config(folder, layout)
    tokenizer = data.load_tokenizer(folder)
    try_ids(folder, tokenizer)
    chat = data.chat_of(tokenizer, None)
    if layout.template:
        try_chats(folder, tokenizer)
    before, ids = try_network(folder, tokenizer, chat)
    try_training(folder, folder.with_suffix(".out"), recipe, tokenizer, before, ids)
    end = next(text for text, id in tokenizer.special_ids.items() if id == chat.end).replace("|", "\\|")
    files = [file.name for file in tokenizer.files if file.name in ("tokenizer.model", "tokenizer.json")]
    return (f"| {name} | {layout.config['model_type']} | {layout.shows}{layout.notes and ' (noted)'} | "
            f"{', '.join(files)} | {'✓' if layout.template else '–'} | `{end}` | {recipe} |")


def refusal(name, folder):
    """The row of a layout that is refused."""
    config, words = REFUSED[name]
    folder.mkdir(parents=True)
    write_json(folder / "config.json", config | {"vocab_size": 420})
    try:
        model.load(folder)
    except InputError as error:
        assert words in str(error), error
        return f"| {name} | {str(error).removeprefix(str(folder / 'config.json') + ': ')} |"
    raise AssertionError(f"{name} was read")


def main():
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        print("| layout | family | what is special | tokenizer | template | answers end with | step |")
        print("|---" * 7 + "|")
        for n, name in enumerate(LAYOUTS):
            print(try_out(name, Path(place) / str(n)), flush=True)
        print("\n| layout | Osprey says |\n|---|---|")
        for n, name in enumerate(REFUSED):
            print(refusal(name, Path(place) / f"refused-{n}"))


if __name__ == "__main__":
    main()
