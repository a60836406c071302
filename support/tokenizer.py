"""The tokenizers of model folders: text to ids and back, equal to the libraries the files were written for.

    tokenizer.model, sentencepiece     Llama 2, TinyLlama, Mistral, stories260K    class SentencePiece
    tokenizer.model, tiktoken lines    Llama 3                                     class BytePair
    tokenizer.json, byte-level BPE     Pythia, Llama 3, Qwen, SmolLM               class BytePair
    tokenizer.json, of sentencepiece   Llama 2, Mistral saved by transformers 5    class SpacedBytePair

sentencepiece and tiktoken do the work. Text never turns into a special id: `</s>` in a data file is four
ordinary characters. Only our own code puts special ids in, by name, from `special_ids`.
"""
import base64
import codecs
import contextlib
import math
import re
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import regex
import sentencepiece
import tiktoken

from support.cli import InputError, note, read_json, write_json
from support.template import read_template
from support.tokenizer_json import checked_id, from_sentencepiece, putting_before, read_tokenizer_json, spaces

# What a saved model folder takes over from the folder it was trained from.
FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
         "added_tokens.json", "vocab.json", "merges.txt", "generation_config.json", "chat_template*")

# sentencepiece shows every byte that is not UTF-8 as one U+FFFD; the others show a broken character as one.
codecs.register_error("every byte", lambda error: ("\ufffd" * (error.end - error.start), error.end))


def load_tokenizer(folder):
    """The Tokenizer of a model folder, from its tokenizer.model, or else its tokenizer.json.

    Raises InputError, naming the file, where there is none or it is broken or of another kind.
    """
    path = Path(folder) / "tokenizer.model"
    if path.exists():
        with reading(path):
            content = path.read_bytes()
            # A sentencepiece file is full of control characters from its start; the other kind is text.
            is_text = re.fullmatch(rb"[\t\n\r -~]+", content[:256])
            return read_tiktoken(path, content) if is_text else SentencePiece(path, content)
    path = path.with_name("tokenizer.json")
    if path.exists():
        with reading(path):
            given = read_tokenizer_json(path)
            return (SpacedBytePair if "starts" in given else BytePair)(path, **given)
    raise InputError(f"{folder}: holds no tokenizer (tokenizer.model or tokenizer.json).")


@contextlib.contextmanager
def reading(place):
    """Whatever a file of another layout leads to in here becomes one InputError that names the place."""
    try:
        yield
    except InputError:
        raise
    except (AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        kind = "" if type(error) in (RuntimeError, ValueError) else f"{type(error).__name__}: "
        # sentencepiece quotes the file's own bytes, control characters among them
        reason = "".join(char if char.isprintable() else " " for char in str(error))
        reason = " ".join(reason.split()).rstrip(".")
        raise InputError(f"{place} cannot be used: {kind}{reason:.200}.") from error


class Tokenizer:
    """The way from ids to text, and which ids begin and end a text. Each kind adds encode and encode_after.

    encode(text) -> list[int]          a text that stands alone; no BOS, no EOS, never a special id
    encode_after(text) -> list[int]    a text that continues another one: without a word-start of its own
    bos_id (or None), eos_id           eos_id is the one used in training
    adds_bos                           whether the family puts BOS before every sequence
    special_tokens                     {"bos_token": text, "eos_token": text}, both among special_ids
    stop_ids                           set of the ids at which sampling stops; eos_id is one
    special_ids                        {name: id} of the tokens that only our own code may insert
    vocab_size                         highest id + 1; a model may have more rows (Pythia: 50,304 for 50,277)
    files                              Paths of the tokenizer's files, to be copied beside saved weights
    chat_template                      the folder's ChatTemplate, or None

    Lone surrogates, which are no text, are read as U+FFFD.
    """
    errors = "replace"    # how bytes that are not UTF-8 are shown
    strips = 0            # spaces to take off the start of a text: sentencepiece's own word-start
    later_starts = False  # whether text after a special id gets a word-start too
    unk_id = None

    def __init__(self, path, pieces, special_ids, bos_id, eos_id, adds_bos):
        """pieces: {id: the bytes it reads as}; the others as the tokenizer's own file, `path`, has them.

        tokenizer_config.json, and then config.json, overrule that file.
        """
        self.path, self.folder = path, path.parent
        self.pieces, self.special_ids = pieces, special_ids
        config_path = self.folder / "tokenizer_config.json"
        config = read_json(config_path, absent={})
        with reading(config_path):
            self.read_added_tokens(config.get("added_tokens_decoder") or {})
            self.bos_id = self.choose("bos", config, bos_id)
            self.eos_id = self.choose("eos", config, eos_id)
            add_bos = config.get("add_bos_token")
            if add_bos not in (None, True, False) or add_bos and self.bos_id is None:
                raise ValueError("add_bos_token must be true, with a bos_token, or false")
        if self.eos_id is None:
            raise InputError(f"{path}: names no end-of-text token; name it as eos_token in {config_path}.")
        self.adds_bos = adds_bos if add_bos is None else bool(add_bos)
        self.overruled = self.adds_bos != adds_bos
        self.stop_ids = {self.eos_id, *self.listed_ids("generation_config.json", "eos_token_id"),
                         *self.listed_ids("config.json", "eos_token_id")}
        names = {id: text for text, id in self.special_ids.items()}
        self.special_tokens = {}
        for role, id in (("bos_token", self.bos_id), ("eos_token", self.eos_id)):
            if id is not None:
                text = self.special_tokens[role] = names.get(id) or self.pieces[id].decode(errors="replace")
                self.special_ids[text], self.pieces[id] = id, b""
        self.vocab_size = max(self.pieces) + 1
        self.files = sorted(file for name in FILES for file in self.folder.glob(name) if file.is_file())
        self.chat_template = read_template(self.folder)

    def read_added_tokens(self, tokens):
        """Tokens that fine-tuning added (`<|im_start|>`): only tokenizer_config.json names them."""
        ordinary = set(self.pieces) - set(self.special_ids.values()) | {self.unk_id}
        for id, token in tokens.items():
            id, piece = checked_id(int(id)), token["content"].encode()
            if id not in ordinary:
                self.special_ids[token["content"]] = id
                self.pieces[id] = b"" if token.get("special", True) else piece

    def choose(self, role, config, own):
        """The id of "bos" or "eos", from tokenizer_config.json, config.json or the tokenizer's own file."""
        text = config.get(f"{role}_token")
        text = text.get("content") if isinstance(text, dict) else text
        if text is None:
            id = [*self.listed_ids("config.json", f"{role}_token_id"), own][0]
            if id not in self.pieces and id is not None:
                raise InputError(f"{self.folder / 'config.json'}: {role}_token_id {id} is no token's id.")
            return id
        ids = {piece.decode(errors="ignore"): id for id, piece in self.pieces.items() if piece}
        ids |= self.special_ids
        if text not in ids:
            raise ValueError(f"{role}_token {text!r:.60} is not a token")
        return ids[text]

    def listed_ids(self, name, key):
        """The token ids that a JSON file of the folder has under `key`: one, several or none."""
        value = read_json(self.folder / name, absent={}).get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        with reading(f"{self.folder / name}: {key}"):
            return [checked_id(id) for id in ids]

    def prefix(self, empty):
        """The ids before a sequence. Without BOS an empty prompt still needs one to predict from."""
        if self.adds_bos:
            return [self.bos_id]
        return [self.eos_id if self.bos_id is None else self.bos_id] if empty else []

    def sampling_mask(self, vocab_rows):
        """(vocab_rows,) bool: which rows of the model's vocabulary may be sampled.

        All that shows in the text, the ids that stop, and BOS (stories260K ends its stories with it). Not
        rows without a piece, nor unknown, padding and other control tokens, which the judge would not see.
        """
        visible = {id for id, piece in self.pieces.items() if piece}
        ends = (self.stop_ids | {self.bos_id}) & self.pieces.keys()
        mask = np.zeros(vocab_rows, dtype=bool)
        mask[[id for id in visible | ends if id < vocab_rows and id != self.unk_id]] = True
        return mask

    def decode(self, ids, continues=False):
        """The text of ids. Special ids and ids without a piece read as nothing, broken UTF-8 as U+FFFD.

        continues=True: the text as it stands after a prompt, which may be put before it as it is.
        Otherwise the space of sentencepiece's word-start is taken off again.
        """
        stream = self.stream(continues)
        return "".join([stream.push(id) for id in ids]) + stream.flush()

    def stream(self, continues=False):
        """A Stream, which decodes one id at a time."""
        return Stream(self, continues)

    def same_ids(self, other):
        """Whether both tokenizers give the same ids: they have the same pieces and special tokens."""
        return (self.pieces, self.special_ids) == (other.pieces, other.special_ids)

    def save(self, folder, template=None, end=None):
        """Write the tokenizer's files into a saved model's folder, as transformers is to load them.

        template: a chat template that it gets in place of its own, whose answers end with the id `end`.
        A link out of the folder is not followed: what it names may be no file of the model's.
        """
        folder, own = Path(folder), self.folder.resolve()
        for file in self.files:
            beside = file.resolve().parent in (own, own.parent.parent / "blobs")     # as in the hub's cache
            if file != self.path and not beside:
                note(f"{file} is a link out of the folder, and not saved with the model.")
            elif template is None or not file.name.startswith("chat_template"):
                shutil.copyfile(file, folder / file.name)              # it has the umask's mode, as all files
        self.write_tokenizer_json(folder / "tokenizer.json")
        path = folder / "tokenizer_config.json"
        config = dict(self.special_tokens, model_input_names=["input_ids", "attention_mask"])
        if not self.adds_bos:
            config.pop("bos_token", None)
        config |= {key: value for key, value in read_json(path, absent={}).items() if value is not None}
        if (folder / "tokenizer.json").exists():
            # By another class's name transformers 5 would make up its own rules: SmolLM2's without Digits.
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
        if template is not None:
            config["chat_template"] = template
        write_json(path, config)
        if end is not None and end not in self.stop_ids:
            path = folder / "generation_config.json"
            write_json(path, read_json(path, absent={}) | {"eos_token_id": sorted({*self.stop_ids, end})})

    def write_tokenizer_json(self, path):
        """Nothing, where the folder had one: only a bare tokenizer.model needs one made for it."""

    def bos_tokens(self):
        """[(text, id)] of BOS where it is put before every sequence, else []."""
        return [(self.special_tokens["bos_token"], self.bos_id)] * self.adds_bos


class Stream:
    """Text as its ids arrive: push(id) gives the characters that are complete, flush() what is left."""

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
    """The text with lone surrogates as U+FFFD, and the two halves of a pair as their character."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class SentencePiece(Tokenizer):
    """A sentencepiece tokenizer.model: sentencepiece itself encodes."""
    errors = "every byte"

    def __init__(self, path, content):
        self.alone = model = sentencepiece.SentencePieceProcessor(model_proto=content)
        # sentencepiece puts a word-start (▁) before every text. In a protobuf what comes later overrules
        # what stood before, so these bytes switch that off: normalizer_spec.add_dummy_prefix = false.
        self.after = sentencepiece.SentencePieceProcessor(model_proto=content + b"\x1a\x02\x18\x00")
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
        self.unk_id = model.unk_id()
        self.starts = model.encode("a") != self.after.encode("a")
        # stories260K keeps one space of many, and none at the ends
        self.strips = int(self.starts) if model.encode(" ") else math.inf
        self.later_starts = True
        with contextlib.suppress(LookupError, TypeError, ValueError):       # a file beside it may know better
            self.later_starts = WORD_STARTS[spaces(read_json(path.with_name("tokenizer.json")))[0]][1]
        bos_id, eos_id = (id if id >= 0 else None for id in (model.bos_id(), model.eos_id()))
        super().__init__(path, pieces, special_ids, bos_id, eos_id, adds_bos=bos_id is not None)

    def encode(self, text):
        return self.alone.encode(without_surrogates(text))

    def encode_after(self, text):
        text = without_surrogates(text)
        # A model that drops leading spaces would glue " Sure" to the word before: it needs the word-start.
        drops_space = text and self.alone.encode(text[0] + "a") == self.alone.encode("a")
        return (self.alone if drops_space else self.after).encode(text)

    def write_tokenizer_json(self, path):
        """With it transformers needs no protobuf, and makes the same ids."""
        if not path.exists():
            content = from_sentencepiece(self.alone, self.starts, self.strips == math.inf, self.bos_tokens())
            if content:
                write_json(path, content)


# How a text is cut into words before any merging, as published with Llama 3.
LLAMA3_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+")

# tiktoken's regex gives up in a run of about a million spaces. Longer texts are cut here (so does Llama's own
# code), and only there can ids differ from the reference.
LONGEST = 400_000  # characters

NEVER_IN_UTF8 = {0xC0, 0xC1, *range(0xF5, 0x100)}      # GPT-NeoX has no tokens for these, and needs none


class BytePair(Tokenizer):
    """Byte-level BPE: regexes cut out words, tiktoken merges their bytes, the lowest rank first."""

    def __init__(self, path, patterns, ranked, pieces, special_ids, raw=None, normalized=None, nfc=False,
                 drops_bytes=False, **ends):
        """patterns: the regexes, each for the pieces that the one before has left; the last is tiktoken's.
        ranked: {bytes: the ids that they become}, by rank. pieces: {id: bytes}.

        raw, normalized: {text: id} of the added tokens that are looked for in text before anything else, the
        longest first; those in `raw` before NFC normalization, the others after it.
        drops_bytes: bytes without a token are left out, after words are cut and before bytes are merged.
        """
        self.path, self.ids, self.nfc = path, list(ranked.values()), nfc
        self.raw, self.normalized = raw or {}, normalized or {}
        self.split_raw, self.split_normalized = splitter(self.raw), splitter(self.normalized)
        self.missing = bytes(byte for byte in range(256)
                             if bytes([byte]) not in ranked and byte not in NEVER_IN_UTF8)
        if self.missing and not drops_bytes:
            raise ValueError(f"it has no token for the byte 0x{self.missing[0]:02x} "
                             f"({len(self.missing)} are missing)")
        ranks = {piece: rank for rank, piece in enumerate(ranked)}
        self.encoding = tiktoken.Encoding(path.name, pat_str=patterns[-1], mergeable_ranks=ranks,
                                          special_tokens={})
        self.cuts = list(map(compiled, patterns[:-1]))
        self.words = compiled(patterns[-1]) if self.missing else None
        pieces = pieces | {id: text.encode() for text, id in (self.raw | self.normalized).items()}
        super().__init__(path, pieces | dict.fromkeys(special_ids.values(), b""), special_ids, **ends)

    def write_tokenizer_json(self, path):
        """Where tokenizer_config.json overruled its BOS, it learns that: transformers 5 asks it alone."""
        if self.overruled and path.exists():
            write_json(path, read_json(path) | {"post_processor": putting_before(self.bos_tokens())})

    def encode(self, text):
        return self.encode_parts(self.split_raw(without_surrogates(text)))

    encode_after = encode       # a space is a byte like any other here: nothing is put before a text

    def encode_parts(self, parts):
        """The ids of a text that is cut at the added tokens of `raw`."""
        ids = []
        for part in parts:
            if part in self.raw:
                ids.append(self.raw[part])
                continue
            for plain in self.split_normalized(unicodedata.normalize("NFC", part) if self.nfc else part):
                if plain in self.normalized:
                    ids.append(self.normalized[plain])
                else:
                    for start in range(0, len(plain), LONGEST):
                        ids += self.merge(plain[start:start + LONGEST])
        return ids

    def merge(self, text):
        """The ids of a text without added tokens."""
        content = text.encode()
        encode = self.encoding.encode_ordinary
        if content.translate(None, self.missing) != content:
            encode = self.without_missing_bytes
        try:
            pieces = [text]
            for cut in self.cuts:
                pieces = [part for piece in pieces for part in isolate(cut, piece) if part]
            return [id for piece in pieces for rank in encode(piece) for id in self.ids[rank]]
        except BaseException as error:      # a Rust panic, which is no Exception
            if type(error).__name__ not in ("PanicException", "TimeoutError"):
                raise
            raise InputError(f"{self.path}: its pattern does not cut {text[:20]!r} into words.") from None

    def without_missing_bytes(self, text):
        """The ranks of a text some bytes of which have no token: `/\\x04-` reads as the one word `/-`."""
        words = (word.encode().translate(None, self.missing) for word in isolate(self.words, text))
        return [rank for word in words if word for rank in self.encoding._encode_single_piece(word)]


def compiled(pattern):
    try:
        return regex.compile(pattern)
    except regex.error as error:
        raise ValueError(f"its pattern {pattern!r:.60} is not understood: {error}") from None


def isolate(pattern, text):
    """Yield the text in pieces: what the pattern matches, and what lies between."""
    at = 0
    for match in pattern.finditer(text, timeout=60):        # seconds; some patterns never end
        yield text[at:match.start()]
        yield match[0]
        at = match.end()
    yield text[at:]


# What a file of sentencepiece's kind puts a word-start before: the text; what follows an added token in it;
# and whether it does so even where a space is there already.
WORD_STARTS = {"prepend": (True, True, True), "always": (True, True, False), "first": (True, False, False),
               "never": (False, False, False)}


class SpacedBytePair(BytePair):
    """A tokenizer.json of sentencepiece's kind: `▁` for a space, bytes for characters without a token."""
    errors = "every byte"

    def __init__(self, *given, starts, **named):
        """starts: a name of WORD_STARTS; the others as BytePair takes them."""
        super().__init__(*given, **named)
        self.starts, self.later_starts, self.doubles = WORD_STARTS[starts]
        self.strips = int(self.starts)

    def encode(self, text):
        return self.encode_spaced(text, self.starts)

    def encode_after(self, text):
        return self.encode_spaced(text, False)

    def encode_spaced(self, text, starts):
        parts = self.split_raw(without_surrogates(text))
        for n in range(0, len(parts), 2):                   # added tokens stand between
            plain = parts[n].replace("▁", " ")
            if plain and starts and (self.doubles or plain[0] != " "):
                plain = " " + plain
            parts[n], starts = plain, self.later_starts
        return self.encode_parts(parts)


def splitter(tokens):
    """A function that cuts a text into [plain, token, plain, …], with the leftmost, longest tokens."""
    longest_first = [re.escape(token) for token in sorted(tokens, key=len, reverse=True)]
    return re.compile(f"({'|'.join(longest_first)})").split if longest_first else lambda text: [text]


# The 256 special tokens of Llama 3 are not in its tokenizer.model: their ids follow the last rank.
LLAMA3_SPECIAL = [
    "begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1",
    "finetune_right_pad_id", "reserved_special_token_2", "start_header_id", "end_header_id", "eom_id",
    "eot_id", "python_tag", *(f"reserved_special_token_{n}" for n in range(3, 248))]


def read_tiktoken(path, content):
    """Llama 3's tokenizer.model: a line per token, with its bytes in base64, a space and its rank, the id."""
    ranks = {}
    for number, line in enumerate(content.splitlines(), 1):
        with reading(f"{path}, line {number}"):
            if line.strip():
                encoded, rank = line.split()
                ranks[base64.b64decode(encoded, validate=True)] = int(rank)
    pieces = {rank: piece for piece, rank in ranks.items()}
    ranked = {pieces[id]: (id,) for id in sorted(pieces)}
    if b"" in ranks or sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"its {len(ranks)} tokens do not have the ranks 0 to {len(ranks) - 1}, each once")
    special_ids = {f"<|{name}|>": len(ranks) + n for n, name in enumerate(LLAMA3_SPECIAL)}
    return BytePair(path, [LLAMA3_WORDS], ranked, pieces, special_ids, adds_bos=True,
                    bos_id=special_ids["<|begin_of_text|>"], eos_id=special_ids["<|end_of_text|>"])
