"""The tokenizers of model folders: text to ids and back, equal to the libraries the files were written for."""
import base64
import codecs
import contextlib
import json
import math
import re
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import sentencepiece
import tiktoken

from support.cli import InputError, read_json

# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers. Three kinds of file are read, and two libraries do the work:
#   tokenizer.model, sentencepiece     Llama 2, TinyLlama, Mistral, stories260K    sentencepiece
#   tokenizer.model, tiktoken lines    Llama 3                                     tiktoken
#   tokenizer.json, byte-level BPE     GPT-NeoX / Pythia, Llama 3                  tiktoken
# Ids equal those of the libraries the files were written for. Text never turns into a special id: `</s>` in a data file
# is four ordinary characters, and only our own code puts special ids in, by name, from `special_ids`.

# What a saved model folder takes over from the folder it was trained from.
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                   "added_tokens.json", "vocab.json", "merges.txt", "generation_config.json", "chat_template*")

# How a text is cut into words before any merging, as published with GPT-2 (GPT-NeoX uses it too) and with Llama 3.
GPT2_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+")

# The 256 special tokens of Llama 3 are not in its tokenizer.model: their ids follow the last rank, in this order.
LLAMA3_SPECIAL = ["begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1",
                  "finetune_right_pad_id", "reserved_special_token_2", "start_header_id", "end_header_id", "eom_id",
                  "eot_id", "python_tag", *(f"reserved_special_token_{n}" for n in range(3, 248))]

# tiktoken's regex gives up, as a Rust panic that no `except Exception` sees, in a run of about a million spaces. Longer
# texts are cut here (so does Llama's own code), and only there can ids differ from the reference.
LONGEST = 400_000  # characters
PROBE = "".join(map(chr, range(0x250))) + "xxx  \n\n 1234 日本語"       # what a sound pattern cuts into words without a loss

# sentencepiece shows every byte that is not UTF-8 as one U+FFFD; Python and tiktoken show a broken character as one.
codecs.register_error("every byte", lambda error: ("\ufffd" * (error.end - error.start), error.end))


def read_bytes(path):
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}).") from None


def is_id(value):
    return type(value) is int and 0 <= value < 2 ** 31      # True is an int too, but no id


def load_tokenizer(folder):
    """The Tokenizer of a model folder: its tokenizer.model, or else its tokenizer.json. No code of the folder is run.

    Raises InputError, naming the file and the key or line, when there is none or it is broken or of another kind.
    """
    path = Path(folder) / "tokenizer.model"
    if not path.exists():
        path = path.with_name("tokenizer.json")
        if not path.exists():
            raise InputError(f"{folder}: holds no tokenizer (tokenizer.model or tokenizer.json).")
        return read_tokenizer_json(path)
    content = read_bytes(path)
    # A sentencepiece file is a protobuf, full of control characters from its first bytes on; the other kind is text.
    is_text = re.fullmatch(rb"[\t\n\r -~]+", content[:256])
    return read_tiktoken(path, content) if is_text else SentencePiece(path, content)


class Tokenizer:
    """What all kinds share: the way from ids to text, and which ids begin and end a text.

    encode(text) -> list[int]          a text that stands alone; no BOS, no EOS, never a special id
    encode_after(text) -> list[int]    a text that continues another one: without a word-start of its own
    bos_id (or None), eos_id           eos_id is the one used in training
    adds_bos                           whether the family puts BOS in front of every sequence
    stop_ids                           set of the ids at which sampling stops; eos_id is one
    special_ids                        {name: id} of the tokens that only our own code may insert
    vocab_size                         highest id + 1; a model may have more rows (Pythia: 50,277 ids, 50,304 rows)
    files                              Paths of the tokenizer's files, to be copied beside saved weights
    chat_template                      whether the folder has one

    Lone surrogates, which are no text, are read as U+FFFD.
    """
    errors = "replace"    # how bytes that are not UTF-8 are shown
    strips = 0            # spaces to take off the start of a text: sentencepiece's own word-start
    unk_id = None

    def __init__(self, path, pieces, special_ids, bos_id, eos_id, adds_bos):
        """pieces: {id: the bytes it reads as}; special_ids: {name: id}; the other three as the file at `path` has them.

        tokenizer_config.json, and then config.json, overrule what the tokenizer's own file says.
        """
        self.folder, self.pieces, self.special_ids = path.parent, pieces, special_ids
        self.read_added_tokens()
        config_path = self.folder / "tokenizer_config.json"
        config = read_json(config_path, absent={})
        self.bos_id = self.choose("bos", config, bos_id)
        self.eos_id = self.choose("eos", config, eos_id)
        if self.eos_id is None:
            raise InputError(f"{path}: names no end-of-text token; name it as eos_token in {config_path}.")
        add_bos_token = config.get("add_bos_token")
        if add_bos_token not in (None, True, False) or add_bos_token and self.bos_id is None:
            raise InputError(f"{config_path}: add_bos_token must be true, with a bos_token, or false.")
        self.adds_bos = adds_bos if add_bos_token is None else bool(add_bos_token)
        self.stop_ids = {self.eos_id, *self.listed_ids("generation_config.json", "eos_token_id"),
                         *self.listed_ids("config.json", "eos_token_id")}
        for id in {self.bos_id, self.eos_id} - {None}:
            self.pieces[id] = b""
        self.vocab_size = max(self.pieces) + 1
        self.files = sorted(file for name in TOKENIZER_FILES for file in self.folder.glob(name) if file.is_file())
        self.chat_template = (bool(config.get("chat_template"))
                              or any(file.name.startswith("chat_template") for file in self.files))

    def read_added_tokens(self):
        """Tokens that fine-tuning added (`<|im_start|>`): only tokenizer_config.json names them."""
        path = self.folder / "tokenizer_config.json"
        ordinary = set(self.pieces) - set(self.special_ids.values()) | {self.unk_id}
        try:
            for id, token in (read_json(path, absent={}).get("added_tokens_decoder") or {}).items():
                id, text = int(id), token["content"].encode()
                if not is_id(id):
                    raise ValueError(id)
                if id not in ordinary:
                    self.special_ids[token["content"]] = id
                    self.pieces[id] = b"" if token.get("special", True) else text
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path}: added_tokens_decoder is no table of tokens ({error!r:.80}).") from None

    def listed_ids(self, name, key):
        """The token ids that a JSON file of the folder has under `key`: one, several or none."""
        value = read_json(self.folder / name, absent={}).get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(map(is_id, ids)):
            raise InputError(f"{self.folder / name}: {key} must be a token id or a list of them, not {value!r:.60}.")
        return ids

    def choose(self, role, config, own):
        """The id in a role ("bos", "eos"): what tokenizer_config.json names, else config.json, else the file's own."""
        text = config.get(f"{role}_token")
        text = text.get("content") if isinstance(text, dict) else text
        if text is not None:
            names = {piece.decode(errors="ignore"): id for id, piece in self.pieces.items()} | self.special_ids
            if not isinstance(text, str) or not text or text not in names:
                raise InputError(f"{self.folder / 'tokenizer_config.json'}: {role}_token {text!r:.60} is not a token.")
            return names[text]
        for id in self.listed_ids("config.json", f"{role}_token_id")[:1]:
            if id not in self.pieces:
                raise InputError(f"{self.folder / 'config.json'}: {role}_token_id {id} is not an id of the tokenizer.")
            return id
        return own

    def prefix(self, empty):
        """The ids in front of a sequence. Without BOS an empty prompt still needs one to predict from."""
        if self.adds_bos:
            return [self.bos_id]
        return [self.eos_id if self.bos_id is None else self.bos_id] if empty else []

    def sampling_mask(self, vocab_rows):
        """(vocab_rows,) bool: which rows of the model's vocabulary may be sampled.

        All that shows in the text, the ids that stop, and BOS (stories260K ends its stories with it). Not: rows without
        a piece, and unknown, padding and other control tokens, which the judge, who reads text, would not see.
        """
        visible = {id for id, piece in self.pieces.items() if piece}
        ends = (self.stop_ids | {self.bos_id}) & self.pieces.keys()
        mask = np.zeros(vocab_rows, dtype=bool)
        mask[[id for id in visible | ends if id < vocab_rows and id != self.unk_id]] = True
        return mask

    def decode(self, ids, continues=False):
        """The text of ids. Special ids (BOS, EOS, …) and ids without a piece read as nothing, broken UTF-8 as U+FFFD.

        continues=True: the text as it stands behind a prompt, so that prompt + decode(response_ids, continues=True) is
        the whole text. Otherwise the space of sentencepiece's word-start is taken off again.
        """
        stream = self.stream(continues)
        return "".join([stream.push(id) for id in ids]) + stream.flush()

    def same_ids(self, other):
        """Whether both tokenizers give the same ids: they have the same pieces and special tokens."""
        return (self.pieces, self.special_ids) == (other.pieces, other.special_ids)

    def save(self, folder):
        """Copy the tokenizer's files into a saved model's folder."""
        for file in self.files:
            shutil.copy(file, folder)

    def stream(self, continues=False):
        """A Stream, which decodes one id at a time."""
        return Stream(self, continues)


class Stream:
    """Text as its ids arrive: push(id) gives the characters that are complete, flush() what is left at the end."""

    def __init__(self, tokenizer, continues):
        self.pieces = tokenizer.pieces
        self.strips = 0 if continues else tokenizer.strips
        self.utf8 = codecs.getincrementaldecoder("utf-8")(tokenizer.errors)

    def push(self, id):
        piece = self.pieces.get(int(id), b"")
        if self.strips and piece.startswith(b" "):
            self.strips -= 1
            piece = piece[1:]
        if piece:
            self.strips = 0             # the text has begun: later spaces belong to it
        return self.utf8.decode(piece)

    def flush(self):
        return self.utf8.decode(b"", final=True)


def without_surrogates(text):
    """The text with lone surrogates as U+FFFD, and the two halves of a pair as the character they stand for."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class SentencePiece(Tokenizer):
    """A sentencepiece tokenizer.model: sentencepiece itself encodes."""
    errors = "every byte"

    def __init__(self, path, content):
        try:
            self.alone = model = sentencepiece.SentencePieceProcessor(model_proto=content)
            # sentencepiece puts a word-start (▁) in front of every text. In a protobuf what comes later overrules what
            # stood before, so these bytes switch that off: normalizer_spec.add_dummy_prefix = false.
            self.behind = sentencepiece.SentencePieceProcessor(model_proto=content + b"\x1a\x02\x18\x00")
            pieces, special_ids = {}, {}
            for id, text in enumerate(model.id_to_piece(list(range(model.vocab_size())))):
                if model.is_control(id):
                    special_ids[text], pieces[id] = id, b""
                elif model.is_byte(id):
                    pieces[id] = bytes([int(text[1:-1], 16)])          # <0x0A>
                elif model.is_unknown(id):
                    pieces[id] = model.decode([id]).encode()
                elif not model.is_unused(id):
                    pieces[id] = text.replace("▁", " ").encode()
        except (RuntimeError, ValueError) as error:
            reason = broken_piece(content) or str(error).split(": ")[-1].splitlines()[0].rstrip(".")
            raise InputError(f"{path}: neither a sentencepiece model nor tiktoken lines, or cut short: "
                             f"{reason:.200}.") from None
        self.unk_id = model.unk_id()
        if not model.encode(" "):               # stories260K keeps one space of many, and none at the ends
            self.strips = math.inf
        elif model.encode("a") != self.behind.encode("a"):
            self.strips = 1
        bos_id, eos_id = (id if id >= 0 else None for id in (model.bos_id(), model.eos_id()))
        super().__init__(path, pieces, special_ids, bos_id, eos_id, adds_bos=bos_id is not None)

    def encode(self, text):
        return self.alone.encode(without_surrogates(text))

    def save(self, folder):
        """The same; a bare tokenizer.model gets the tokenizer_config.json without which AutoTokenizer misreads it."""
        super().save(folder)
        if not any(file.name in ("tokenizer_config.json", "tokenizer.json") for file in self.files):
            tokens = {f"{name}_token": self.alone.id_to_piece(id) for name, id in
                      (("bos", self.bos_id), ("eos", self.eos_id), ("unk", self.unk_id)) if id is not None and id >= 0}
            config = {"tokenizer_class": "LlamaTokenizer", **tokens, "add_bos_token": self.adds_bos, "legacy": False}
            (Path(folder) / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def encode_after(self, text):
        text = without_surrogates(text)
        # A model that drops leading spaces would glue " Sure" to the word before it. It needs the word-start put back.
        drops_space = text and self.alone.encode(text[0] + "a") == self.alone.encode("a")
        return (self.alone if drops_space else self.behind).encode(text)


def broken_piece(content):
    """What is wrong with a tokenizer.model that sentencepiece refuses: its piece or byte; "" where the bytes do not tell.

    The file is a protobuf message: fields of a tag (their number · 8 + the kind of their value) and a value. A value of
    kind 2 has its length in front; each field 1 is a piece, a message with the text in field 1 and the type in field 3.
    """
    def number(at, stop):
        """A number, seven bits a byte and the last byte below 128, and where it ends."""
        end = next((end for end in range(at, min(at + 10, stop)) if content[end] < 128), None)
        if end is None:
            raise ValueError(at)
        return sum((byte & 127) << 7 * i for i, byte in enumerate(content[at:end + 1])), end + 1

    def fields(at, stop):
        while at < stop:
            start, (tag, at) = at, number(at, stop)
            value, end = number(at, stop) if tag % 8 in (0, 2) else (None, at + {1: 8, 5: 4}.get(tag % 8, stop))
            if tag % 8 == 2:
                at, end = end, end + value
            if end > stop or tag < 8:
                raise ValueError(start)
            yield tag // 8, (at, end) if tag % 8 == 2 else value
            at = end

    seen, count = set(), -1
    try:
        for field_number, value in fields(0, len(content)):
            if not isinstance(value, tuple):
                continue
            inner = dict(fields(*value)) if field_number in (1, 2, 3, 5) else {}
            if field_number == 1:
                count += 1
                text = content[slice(*inner[1])] if isinstance(inner.get(1), tuple) else b""
                if (text in seen or not text or b"\0" in text or text != text.decode(errors="ignore").encode()
                        or inner.get(3) == 6 and not re.fullmatch(rb"<0x[0-9A-F]{2}>", text)):
                    return f"piece {count} is {text!r:.60}, which is there twice or cannot be one"
                seen.add(text)
    except ValueError as error:
        return f"byte {error}" + (f", behind piece {count}" if count >= 0 else "")
    return ""


class BytePair(Tokenizer):
    """Byte-level BPE: a regex cuts out words, tiktoken merges their bytes, the pair with the lowest rank first."""

    def __init__(self, path, pieces, order, words, special_ids, bos_id, eos_id, adds_bos, added=(), nfc=False):
        """pieces: {id: bytes}; order: the ids that text can become, by rank, with all bytes of text; words: the regex.

        added: [(text, id, normalized)] of the added tokens that are looked for in text before anything else, the
        longest first; those that are `normalized` after NFC normalization, the others before it.
        """
        ranks = {pieces[id]: rank for rank, id in enumerate(order)}
        try:
            self.encoding = tiktoken.Encoding(path.name, pat_str=words, mergeable_ranks=ranks, special_tokens={})
        except ValueError as error:
            raise InputError(f"{path}: pre_tokenizer has an unusable pattern, {words!r:.60} ({error}).") from None
        self.path, self.words, self.order, self.nfc = path, words, order, nfc
        if b"".join([pieces[id] for id in self.merge(PROBE)]) != PROBE.encode():
            raise InputError(f"{path}: pre_tokenizer has a pattern that loses text, {words!r:.60}.")
        self.added = {text: id for text, id, _ in added}
        self.split_raw = splitter(text for text, _, normalized in added if not normalized)
        self.split_normalized = splitter(text for text, _, normalized in added if normalized)
        pieces = pieces | {id: text.encode() for text, id in self.added.items()}
        pieces |= dict.fromkeys(special_ids.values(), b"")
        super().__init__(path, pieces, special_ids, bos_id, eos_id, adds_bos)

    def encode(self, text):
        ids = []
        for i, part in enumerate(self.split_raw(without_surrogates(text))):
            if i % 2:
                ids.append(self.added[part])
                continue
            for j, plain in enumerate(self.split_normalized(unicodedata.normalize("NFC", part) if self.nfc else part)):
                if j % 2:
                    ids.append(self.added[plain])
                    continue
                for start in range(0, len(plain), LONGEST):
                    ids += self.merge(plain[start:start + LONGEST])
        return ids

    def merge(self, text):
        """The ids of a text without added tokens."""
        try:
            return [self.order[rank] for rank in self.encoding.encode_ordinary(text)]
        except BaseException as error:     # tiktoken panics where a pattern matches no text at all or tries a million ways
            if type(error).__name__ != "PanicException":
                raise
            raise InputError(f"{self.path}: pre_tokenizer has a pattern that does not cut {text[:20]!r} into words, "
                             f"{self.words!r:.60}.") from None

    encode_after = encode       # a space is a byte like any other here: nothing is put in front of a text


def splitter(tokens):
    """A function that cuts a text into [plain, token, plain, …, plain], with the leftmost, longest tokens."""
    longest_first = [re.escape(token) for token in sorted(tokens, key=len, reverse=True)]
    return re.compile(f"({'|'.join(longest_first)})").split if longest_first else lambda text: [text]


def read_tiktoken(path, content):
    """The tokenizer in Llama 3's tokenizer.model: a line per token, with its bytes in base64, a space, and its rank."""
    ranks = {}
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            encoded, rank = line.split()
            piece, rank = base64.b64decode(encoded, validate=True), int(rank)
        except ValueError:
            raise InputError(f"{path}, line {number}: is not a token in base64, a space and its rank.") from None
        if not piece or piece in ranks:
            raise InputError(f"{path}, line {number}: the token {piece!r:.60} is empty or there twice.")
        ranks[piece] = rank
    for place, (piece, rank) in enumerate(sorted(ranks.items(), key=lambda item: item[1])):
        if rank != place:
            raise InputError(f"{path}: its {len(ranks)} lines do not have the ranks 0 to {len(ranks) - 1}, each once; "
                             f"where {place} is next, {piece!r:.60} has the rank {rank!r:.20}.")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise InputError(f"{path}: has no line for the byte 0x{missing[0]:02x} ({len(missing)} of 256 are missing).")
    special_ids = {f"<|{name}|>": len(ranks) + n for n, name in enumerate(LLAMA3_SPECIAL)}
    pieces = {rank: piece for piece, rank in ranks.items()}
    return BytePair(path, pieces, range(len(pieces)), LLAMA3_WORDS, special_ids, special_ids["<|begin_of_text|>"],
                    special_ids["<|end_of_text|>"], adds_bos=True)


# tokenizer.json writes each byte as one visible character: itself where Latin-1 has one, the others from U+0100 on.
VISIBLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
BYTE_OF = {chr(byte): byte for byte in VISIBLE}
BYTE_OF |= {chr(256 + n): byte for n, byte in enumerate(sorted(set(range(256)) - set(VISIBLE)))}
NEVER_IN_UTF8 = {0xC0, 0xC1, *range(0xF5, 0x100)}      # GPT-NeoX has no tokens for these 13 bytes, and needs none


def read_tokenizer_json(path):
    """The tokenizer in a Hugging Face tokenizer.json of byte-level BPE. Anything else it asks for is an InputError."""
    root = read_json(path)
    model = root.get("model")
    if not isinstance(model, dict):
        raise InputError(f"{path}: model is missing, or is no object.")
    for key, kind in (("vocab", dict), ("merges", list)):
        if model.get("type", "BPE") == "BPE" and not isinstance(model.get(key), kind):
            raise InputError(f"{path}: model.{key} is missing, or is no {'list' if kind is list else 'object'}.")
    return BytePair(path, **parse_tokenizer_json(path, root))


@contextlib.contextmanager
def reading(path, key):
    """Whatever a value of another layout leads to in here becomes an InputError that names its key."""
    try:
        yield
    except InputError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: {key} is not laid out as in a tokenizer.json ({error!r:.80}).") from None


def parse_tokenizer_json(path, root):
    """The arguments of BytePair, or an InputError."""
    model = root["model"]
    with reading(path, "pre_tokenizer"):
        words = word_pattern(path, root)
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise InputError(f"{path}: model.{key} {model[key]!r:.60} is not supported.")
    nfc = root.get("normalizer") is not None
    with reading(path, "normalizer"):
        if nfc and root["normalizer"]["type"] != "NFC":
            raise InputError(f"{path}: normalizer {root['normalizer']['type']!r:.60} is not supported, only NFC or none.")
    for token, id in model["vocab"].items():
        if not is_id(id):
            raise InputError(f"{path}: model.vocab has {id!r:.20} for {token!r:.60}, which is not an id.")
    texts = {id: token for token, id in model["vocab"].items()}
    if len(texts) < len(model["vocab"]):
        raise InputError(f"{path}: model.vocab gives one id to two tokens.")

    special_ids, added = {}, []
    listed = root.get("added_tokens") or []
    if not isinstance(listed, list):
        raise InputError(f"{path}: added_tokens is no list.")
    for n, token in enumerate(listed):
        with reading(path, f"added_tokens[{n}]"):
            text, id, normalized = token["content"], token["id"], token.get("normalized", False)
            text.encode()
        if not is_id(id) or texts.setdefault(id, text) != text or model["vocab"].get(text, id) != id:
            raise InputError(f"{path}: added_tokens[{n}] {text!r:.40} cannot have the id {id!r:.20}.")
        if token.get("special"):
            special_ids[text] = id
        elif token.get("single_word") or token.get("lstrip") or token.get("rstrip"):
            raise InputError(f"{path}: added_tokens[{n}] {text!r:.40}: single_word, lstrip, rstrip are not supported.")
        elif text:
            added.append((unicodedata.normalize("NFC", text) if nfc and normalized else text, id, normalized))

    pieces = {}
    for token, id in model["vocab"].items():
        if all(char in BYTE_OF for char in token):
            pieces[id] = bytes(BYTE_OF[char] for char in token)
        elif token not in special_ids and all(token != text for text, _, _ in added):
            raise InputError(f"{path}: model.vocab has {token!r:.60}, which is not in the alphabet of byte-level BPE.")
    with reading(path, "post_processor"):
        bos_id = template_bos(root, special_ids)
    eos_ids = [special_ids[name] for name in ("<|endoftext|>", "<|end_of_text|>") if name in special_ids]
    return dict(pieces=pieces, order=merge_order(path, model, pieces.keys() - special_ids.values()), words=words,
                special_ids=special_ids, bos_id=bos_id, eos_id=(eos_ids or [None])[0], adds_bos=bos_id is not None,
                added=added, nfc=nfc)


def word_pattern(path, root):
    """The regex that cuts out words, from `pre_tokenizer`: GPT-2's, or the one of a Split in front of ByteLevel."""
    kind = root["model"].get("type", "BPE")
    step = root.get("pre_tokenizer") or {"type": None}
    steps = step["pretokenizers"] if step["type"] == "Sequence" else [step]
    last = steps[-1]
    if kind != "BPE" or root["model"].get("byte_fallback") or last["type"] != "ByteLevel":
        raise InputError(f"{path}: is not byte-level BPE (model {kind!r:.60}, pre_tokenizer {last['type']!r:.60}); if the "
                         "model comes with a tokenizer.model (sentencepiece), add that to the folder.")
    use_regex = last.get("use_regex", True)
    if last.get("add_prefix_space") is False and len(steps) == 1 and use_regex:
        return GPT2_WORDS
    if last.get("add_prefix_space") is False and len(steps) == 2 and not use_regex:
        split = steps[0]
        pattern = split["type"] == "Split" and split["behavior"] == "Isolated" and split["pattern"].get("Regex")
        if pattern and not split.get("invert"):
            return f"{pattern}|(?:(?!{pattern})(?s:.))+"     # what the pattern leaves over: tiktoken would drop it
    raise InputError(f"{path}: pre_tokenizer {json.dumps(step):.200} is not supported, only ByteLevel without "
                     "add_prefix_space, alone or behind one isolated Split by a regex.")


def merge_order(path, model, plain_ids):
    """The ids that text can become, single bytes first, then in the order of their merges: the place is the rank.

    The file says which *pair* may merge when; tiktoken merges any two neighbours that make up a token. Both agree on
    all text if a token's own bytes merge into it, and its rank is that of the last of these merges, because the same
    bytes inside a text go the same way. A token that its own bytes do not lead to is never made by merging.
    """
    vocab, ignore_merges = model["vocab"], model.get("ignore_merges", False)
    missing = [byte for char, byte in BYTE_OF.items() if char not in vocab and byte not in NEVER_IN_UTF8]
    if missing:
        raise InputError(f"{path}: model.vocab has no token for the byte 0x{missing[0]:02x} ({len(missing)} missing).")
    priority = {}
    for n, pair in enumerate(model["merges"]):
        with reading(path, f"model.merges[{n}]"):
            pair = tuple(pair.split(" ") if isinstance(pair, str) else pair)
            known = len(pair) == 2 and all(part in vocab for part in (*pair, "".join(pair)))
        if not known:
            raise InputError(f"{path}: model.merges[{n}] {pair!r:.60} is not two tokens that make up a third.")
        priority[pair] = n

    never = len(model["merges"])
    made, whole = {}, []            # {token: priority of its last merge}, tokens that only a whole word can be
    for token in vocab:
        if not token or vocab[token] not in plain_ids:
            continue
        parts, last = list(token), -1
        while len(parts) > 1:
            last, at = min([(priority.get(pair, never), i) for i, pair in enumerate(zip(parts, parts[1:]))])
            if last == never:
                break
            parts[at:at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 1:
            made[token] = last
        elif ignore_merges:         # a word that is a token as it stands is taken, without merging
            whole.append(token)
            if len(parts) == 2:     # but tiktoken would make this token inside longer words too
                raise InputError(f"{path}: model.merges lacks {parts}, the pair of the token {token!r:.60}.")
    return [vocab[token] for token in sorted(made, key=made.get) + whole]


def template_bos(root, special_ids):
    """The id that `post_processor` puts in front of every text (Llama 3), or None."""
    step = root.get("post_processor") or {"type": None}
    for step in step["processors"] if step["type"] == "Sequence" else [step]:
        for part in step["single"][:1] if step["type"] == "TemplateProcessing" else []:
            if "SpecialToken" in part:
                return special_ids[part["SpecialToken"]["id"]]
    return None
