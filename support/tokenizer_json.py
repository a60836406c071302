"""Hugging Face's tokenizer.json: what its layouts mean, as arguments of the classes in tokenizer.py.

    given = read_tokenizer_json(path)      byte-level BPE, or sentencepiece's kind of BPE with byte_fallback

Each layout is taken whole or refused with a ValueError that says what is not supported.
"""
import itertools
import json
import math
import re
import unicodedata

from support.cli import read_json

# How a text is cut into words before any merging, as published with GPT-2 (and GPT-NeoX).
GPT2_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def checked_id(value):
    if type(value) is not int or not 0 <= value < 2 ** 31:      # True is an int too, but no id
        raise ValueError(f"{value!r:.40} is no token id")
    return value


# tokenizer.json writes each byte as one visible character: itself where Latin-1 has one, else from U+0100 on.
VISIBLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
BYTE_OF = {chr(byte): byte for byte in VISIBLE}
BYTE_OF |= {chr(256 + n): byte for n, byte in enumerate(sorted(set(range(256)) - set(VISIBLE)))}


def read_tokenizer_json(path):
    """BPE as the `tokenizers` library writes it: {name: argument} of BytePair; with "starts", SpacedBytePair.

    What the file asks for beyond that is refused.
    """
    root = read_json(path)
    model = root["model"]
    asked = [key for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if model.get(key)]
    if asked:
        raise ValueError(f"{asked[0]} is not supported")
    if model.get("type", "BPE") != "BPE":
        raise ValueError("it is no BPE; if the model has a tokenizer.model, add that file too")
    special_ids, raw, normalized = added_tokens(root)
    added = special_ids | raw | normalized
    ids = model["vocab"] | added
    if len(set(map(checked_id, ids.values()))) < len(ids) or ids != added | model["vocab"]:
        raise ValueError("model.vocab and added_tokens give one id to two tokens, or two ids to one")
    tokens = {token: id for token, id in ids.items() if token not in special_ids}
    read = read_spaced if model.get("byte_fallback") else read_byte_level
    bos_id = template_bos(root.get("post_processor") or {}, special_ids)
    eos_id = next((special_ids[name] for name in EOS_NAMES if name in special_ids), None)
    return read(root, tokens, raw, normalized) | dict(
        special_ids=special_ids, bos_id=bos_id, eos_id=eos_id, adds_bos=bos_id is not None)


EOS_NAMES = "<|endoftext|>", "<|end_of_text|>", "</s>"


def added_tokens(root):
    """({text: id} of special tokens, of those in text before normalization, of those after it)."""
    special_ids, raw, normalized = {}, {}, {}
    for token in root.get("added_tokens") or []:
        text, special = token["content"], token.get("special")
        asked = [key for key in ("single_word", "lstrip", "rstrip") if token.get(key)]
        if not special and (asked or not text):
            raise ValueError(f"added token {text!r:.40}: {asked[0] if asked else 'no text'} is not supported")
        (special_ids if special else normalized if token.get("normalized") else raw)[text] = token["id"]
    return special_ids, raw, normalized


def steps_of(part, inside):
    """The steps of a normalizer or pre_tokenizer: none, one or a sequence."""
    part = part or {}
    return part[inside] if part.get("type") == "Sequence" else [part] if part else []


def read_byte_level(root, tokens, raw, normalized):
    """What BytePair takes of a file whose tokens are written in visible bytes."""
    model, nfc = root["model"], root.get("normalizer") is not None
    if nfc and root["normalizer"]["type"] != "NFC":
        raise ValueError("a normalizer other than NFC is not supported")
    patterns = word_patterns(steps_of(root.get("pre_tokenizer"), "pretokenizers"))
    pieces = {id: bytes(BYTE_OF[char] for char in token) for token, id in tokens.items()
              if token not in raw and token not in normalized}
    ranked = {pieces[id]: (id,) for id in merge_order(model, pieces)}
    if nfc:
        normalized = {unicodedata.normalize("NFC", text): id for text, id in normalized.items()}
    return dict(
        patterns=patterns, ranked=ranked, pieces=pieces, raw=raw, normalized=normalized, nfc=nfc,
        drops_bytes=not (model.get("unk_token") or model.get("ignore_merges")))


def word_patterns(steps):
    """The regexes that cut out words, one after the other; GPT-2's is the one inside ByteLevel."""
    *steps, last = steps or [{}]
    if last.get("type") != "ByteLevel":
        raise ValueError("it is no byte-level BPE; if the model has a tokenizer.model, add that file too")
    patterns = []
    for step in steps:
        match step:
            case {"type": "Digits"}:
                patterns.append(r"\p{N}" if step.get("individual_digits") else r"\p{N}+")
            case {"type": "Split", "behavior": "Isolated", "pattern": {"Regex": str(pattern)}, **split} if (
                    not split.get("invert")):
                patterns.append(pattern)
            case _:
                raise ValueError(f"pre_tokenizer {json.dumps(step):.100} is not supported, only Digits and "
                                 "isolated Splits by a regex before ByteLevel")
    if last.get("use_regex", True):
        patterns.append(GPT2_WORDS)
    elif patterns:                              # tiktoken drops what a pattern leaves over
        patterns[-1] = f"{patterns[-1]}|(?:(?!{patterns[-1]})(?s:.))+"
    if last.get("add_prefix_space", True) or not patterns:
        raise ValueError("ByteLevel with add_prefix_space, or without any regex, is not supported")
    return patterns


def read_spaced(root, tokens, raw, normalized):
    """What SpacedBytePair takes of a file whose tokens are sentencepiece's.

    Characters merge there, not bytes. To tiktoken the bytes of one character merge before all others; what
    this leaves of a character without a token is spelled in bytes: <0xE2>.
    """
    model, starts, splits = root["model"], *spaces(root)
    if model.get("ignore_merges"):
        raise ValueError("ignore_merges together with byte_fallback is not supported")
    byte_ids = [tokens[f"<0x{byte:02X}>"] for byte in range(256)]
    ranked = {bytes([byte]): (id,) for byte, id in enumerate(byte_ids)}
    # A token with a space of its own, not ▁, is never met in a text.
    pieces = {id: token.replace("▁", " ").encode() for token, id in tokens.items()
              if id not in byte_ids and " " not in token}
    for id in merge_order(model, pieces):
        piece = pieces[id]
        if len(piece.decode()) == 1:
            for end in range(2, len(piece)):
                ranked[piece[:end]] = tuple(byte_ids[byte] for byte in piece[:end])
        ranked[piece] = (id,)
    # Where no token goes on after a space, no merge crosses from a word to the next.
    crossing = any(re.search(rb"[^ ] ", piece) for piece in ranked)
    words = " [^ ]*|[^ ]+" if splits else "(?s:.)+" if crossing else " +[^ ]*|[^ ]+"
    pieces |= {id: bytes([byte]) for byte, id in enumerate(byte_ids)}
    if starts == "prepend":                     # its word-start is put before such a token as well
        normalized = {" " + text.replace("▁", " "): id for text, id in normalized.items()}
    else:
        raw, normalized = raw | normalized, {}
    return dict(patterns=[words], ranked=ranked, pieces=pieces, raw=raw, normalized=normalized, starts=starts)


def spaces(root):
    """(what gets a word-start, whether each ▁ begins a word) of a file of sentencepiece's kind."""
    before = steps_of(root.get("normalizer"), "normalizers")
    cutting = steps_of(root.get("pre_tokenizer"), "pretokenizers")
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    match before, cutting:
        case [[], [{"type": "Metaspace", "replacement": "▁", **step}]]:
            old = "always" if step.get("add_prefix_space", True) else "never"
            starts, splits = step.get("prepend_scheme", old), step.get("split", True)
            if starts in ("always", "first", "never"):
                return starts, splits
        case [[{"type": "Prepend", "prepend": "▁"}, last], []] if last == replace:
            return "prepend", False
        case [[last], []] if last == replace:
            return "never", False
    raise ValueError("its normalizer and pre_tokenizer are not supported, only Metaspace, or Prepend and "
                     "Replace; if the model has a tokenizer.model, add that file too")


def merge_order(model, pieces):
    """The ids that text can become, single bytes first, then in the order of their merges: tiktoken's ranks.

    The file says which *pair* may merge when; tiktoken merges any two neighbours that make up a token. On all
    text both do the same if a token's own bytes merge into it, and its rank is that of the last of these
    merges, because the same bytes inside a text go the same way. What its own bytes do not lead to is never
    made; with ignore_merges (Llama 3) a word that is such a token is taken as it stands, as tiktoken does.
    """
    vocab, priority = model["vocab"], {}
    for n, pair in enumerate(model["merges"]):
        left, right = pair.split(" ") if isinstance(pair, str) else pair
        if not {left, right, left + right} <= vocab.keys():
            raise ValueError(f"model.merges[{n}] {pair!r:.60} is not two tokens that make up a third")
        priority[left, right] = n

    made, whole = {}, []            # {id: priority of its last merge}, ids that only a whole word can be
    for token, id in vocab.items():
        parts, last = list(token), -1
        while len(parts) > 1:
            pairs = itertools.pairwise(parts)
            last, at = min((priority.get(pair, math.inf), i) for i, pair in enumerate(pairs))
            if last == math.inf:
                break
            parts[at:at + 2] = [parts[at] + parts[at + 1]]
        if id in pieces and len(parts) == 1:
            made[id] = last
        elif id in pieces and model.get("ignore_merges"):
            whole.append(id)
            if len(parts) == 2:     # tiktoken would make it inside longer words too
                raise ValueError(f"model.merges lacks {parts}, the pair of the token {token!r:.60}")
    return sorted(made, key=made.get) + whole


def template_bos(processor, special_ids):
    """The id that `post_processor` puts before every text (Llama 3), or None."""
    for step in processor["processors"] if processor.get("type") == "Sequence" else [processor]:
        match step:
            case {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": name}}, *_]}:
                return special_ids[name]
    return None


# -----------------------------------------------------------------------------------------------------------
# Out

def from_sentencepiece(model, word_start, strips, bos):
    """A sentencepiece model as a tokenizer.json with the same ids; None where it changes characters (NFKC).

    word_start: whether it puts ▁ before a text; strips: whether it drops spaces; bos: [(text, id)] of the
    token before every text, or []. Which pair merges when follows from the score of what the two make. Ids
    differ only after a piece that was defined by hand: `tokenizers` begins a word there.
    """
    ids, unknown = range(model.vocab_size()), model.unk_id()
    if "\ufb01\u2460" not in model.normalize("\ufb01\u2460") or any(map(model.is_unused, ids)):
        return None
    pieces, fallback = model.id_to_piece(list(ids)), any(map(model.is_byte, ids))
    special = [id for id in ids if model.is_control(id) or id == unknown]
    score = {pieces[id]: model.get_score(id) for id in ids if id not in special and not model.is_byte(id)}
    if all(value == int(value) for value in score.values()):              # 0, -1, -2, …; else logarithms
        pairs = ((piece[:i], piece[i:]) for piece in score for i in range(1, len(piece)))
        merges = {pair: score["".join(pair)] for pair in pairs if score.keys() >= set(pair)}
        merges = [" ".join(pair) for pair in sorted(merges, key=merges.get, reverse=True)]
        rules = {"type": "BPE", "unk_token": pieces[unknown], "fuse_unk": True, "byte_fallback": fallback,
                 "vocab": {piece: id for id, piece in enumerate(pieces)}, "merges": merges}
        by_hand = score.keys() - {pair.replace(" ", "") for pair in merges} - set("".join(score))
    else:
        rules = {"type": "Unigram", "unk_id": unknown, "byte_fallback": fallback,
                 "vocab": [[piece, score.get(piece, 0.0)] for piece in pieces]}
        by_hand = set()
    added = special + [id for id in ids if pieces[id] in by_hand]
    drops = [replacing({"Regex": r"\A +|[ ▁]+\z"}, ""), replacing({"Regex": "  +"}, " ")] * strips
    start = [{"type": "Prepend", "prepend": "▁"}] * word_start
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] * word_start
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": id, "content": pieces[id], "special": id in special, "normalized": False,
                          "single_word": False, "lstrip": False, "rstrip": False} for id in added],
        "normalizer": {"type": "Sequence", "normalizers": [*drops, *start, replacing({"String": " "}, "▁")]},
        "pre_tokenizer": None,
        "post_processor": putting_before(bos),
        "decoder": {"type": "Sequence", "decoders": [
            replacing({"String": "▁"}, " "), {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": rules}


def putting_before(bos):
    """The post_processor that puts `bos`, [(text, id)] or [], before a text."""
    before = [{"SpecialToken": {"id": name, "type_id": 0}} for name, _ in bos]
    one, two = ([*before, {"Sequence": {"id": name, "type_id": 0}}] for name in "AB")
    return {"type": "TemplateProcessing", "single": one, "pair": one + two,
            "special_tokens": {name: {"id": name, "ids": [id], "tokens": [name]} for name, id in bos}}


def replacing(pattern, content):
    return {"type": "Replace", "pattern": pattern, "content": content}
