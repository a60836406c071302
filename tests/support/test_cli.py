"""The command lines: how settings are typed, checked and described; what a user reads when one is wrong."""
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from support import cli
from support.cli import InputError, setting


@dataclass
class Settings:
    """Do something with a model."""
    model: str | None = setting(None, "folder of the model", group="Model")
    lr: float | None = setting(None, "papers: 5e-7; 2e-6", above=0)
    steps: int = setting(10, "updates; 100 % of them", least=1, group="Loop")
    top_p: float = setting(0.9, "of sampling", above=0, most=1)
    dtype: str = setting("auto", "of the computation", choices=("auto", "float32"))
    betas: list[float] = setting([0.9, 0.999], "of adam", least=0, below=1)
    files: list[str] | None = setting(None, "training files")
    dry_run: bool = setting(False, "only say what it would do")
    plain: int = 3
    names: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.given = cli.given_values(self)
        cli.check(self)
        self.lr = self.lr or 1e-3

    @classmethod
    def help_notes(cls):
        return "Recipes:\n  dpo  beta=0.1"


@dataclass
class Derived(Settings):
    """Do it in another way."""
    steps: int = 20                                        # a plain field keeps the parent's text and range
    top_p: float = setting(1.0, "of what it samples")      # and so does what `setting` leaves out
    reward: str | None = setting(None, "folder of the reward model", group="Model")


def parse(*arguments, cls=Settings):
    return cli.parse(cls, [*arguments])


def refused(*arguments, cls=Settings):
    with pytest.raises(InputError) as caught:
        parse(*arguments, cls=cls)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------------
# Values

@pytest.mark.parametrize("arguments, given", [
    ("--steps=5", dict(steps=5)), ("--steps 5", dict(steps=5)), ("--steps=1e3", dict(steps=1000)),
    ("--steps=9007199254740993", dict(steps=2 ** 53 + 1)),             # a float would lose the last digit
    ("--lr 5e-7 --top_p=1", dict(lr=5e-7, top_p=1.0)), ("--lr=none", dict(lr=None)),
    ("--model=", dict(model="")),
    ("--dry_run", dict(dry_run=True)), ("--dry_run --steps 2", dict(dry_run=True, steps=2)),
    ("--dry_run=No", dict(dry_run=False)), ("--dry_run true", dict(dry_run=True)),
    ("--model=-x=y", dict(model="-x=y")), ("--files=a:0.1,b", dict(files=["a:0.1", "b"])),
    ("--betas=0.5,0.9", dict(betas=[0.5, 0.9])), ("--plain=4 --names=a,b", dict(plain=4, names=["a", "b"]))])
def test_how_values_are_typed(arguments, given):
    assert parse(*arguments.split()).given == given


def test_lists_may_have_spaces():
    assert parse("--files= a.jsonl, b.jsonl:0.1 ,,").files == ["a.jsonl", "b.jsonl:0.1"]
    assert parse("--betas", " 0.9, 0.99").betas == [0.9, 0.99]
    assert parse().betas == [0.9, 0.999] and parse().betas is not parse().betas


def test_given_is_what_was_typed():
    """Typed values count though equal to the default; from Python those that differ; none filled in."""
    settings = parse("--steps=10", "--top_p=0.5")
    assert settings.given == dict(steps=10, top_p=0.5) and settings.lr == 1e-3
    assert Settings(steps=10, top_p=0.5).given == dict(top_p=0.5)
    assert parse().given == {}


@pytest.mark.parametrize("arguments, says", [
    *((f"--steps={value}", f"--steps={value}: not a value of type int.")
      for value in ("many", "1.5", "1e400", "none", "inf", "", "3e")),
    ("--dry_run=perhaps", "--dry_run=perhaps: not a value of type bool."),
    ("--betas=0.9,x", "--betas=0.9,x: not a value of type float,float,…."),
    ("--lr", "--lr needs a value: --lr=…."), ("--model --steps=3", "--model needs a value: --model=…."),
    ("--steps=2 --steps 2", "--steps is given twice."), ("--dry_run --dry_run", "--dry_run is given twice."),
    ("steps=1", "cannot read the argument 'steps=1': write --key=value."),
    ("--steps 1 2", "cannot read the argument '2': write --key=value."),
    ("-s=1", "cannot read the argument '-s=1': write --key=value."),
    ("--", "cannot read the argument '--': write --key=value."),
    ("--step=3", "there is no setting --step; did you mean --steps?")])      # no abbreviations
def test_what_cannot_be_read_gets_one_sentence(arguments, says):
    assert refused(*arguments.split()) == says


@pytest.mark.parametrize("typed, meant", [
    ("--learning_rate=1", "lr"), ("--max_steps=5", "steps"), ("--stpes=5", "steps"), ("--top-p=1", "top_p"),
    ("--Model", "model"), ("--model_path=x", "model"), ("--kl=1", None), ("--x=1", None), ("--p", None)])
def test_did_you_mean(typed, meant):
    """A near name is suggested, with _ where - was typed, and none where only single letters agree."""
    hint = f"did you mean --{meant}?" if meant else "--help lists them."
    assert refused(typed) == f"there is no setting {typed.split('=')[0]}; {hint}"


# ------------------------------------------------------------------------------------------------------------
# Ranges

@pytest.mark.parametrize("arguments, says", [
    ("--steps=0", "--steps=0: must be at least 1."), ("--steps -1", "--steps=-1: must be at least 1."),
    ("--lr -1", "--lr=-1.0: must be larger than 0."), ("--lr=0", "--lr=0.0: must be larger than 0."),
    ("--lr -1e-3", "--lr=-0.001: must be larger than 0."), ("--lr=nan", "--lr=nan: must be a finite number."),
    ("--lr=inf", "--lr=inf: must be a finite number."),
    ("--top_p=1.5", "--top_p=1.5: must be larger than 0 and at most 1."),
    ("--dtype=float16", "--dtype=float16: must be one of auto, float32."),
    ("--betas=0.9,1", "--betas=0.9,1.0: must be at least 0 and less than 1."),
    ("--betas=nan", "--betas=nan: must be a finite number.")])
def test_what_is_out_of_range_gets_one_sentence(arguments, says):
    assert refused(*arguments.split()) == says
    assert refused(*arguments.split(), cls=Derived).startswith(says.split(":")[0])


def test_settings_made_in_python_are_checked():
    with pytest.raises(InputError, match="--steps=0: must be at least 1"):
        Settings(steps=0)
    with pytest.raises(InputError, match="--top_p=2: must be larger than 0 and at most 1"):
        Derived(top_p=2)
    assert Derived().given == {} and Derived(steps=10).given == dict(steps=10)


# ------------------------------------------------------------------------------------------------------------
# Help, and the body of a script

def test_help_is_grouped_and_shows_type_range_default_and_text(capsys):
    for flag in ("-h", "--help"):
        with pytest.raises(SystemExit) as left:
            parse("--steps=0", flag)
        assert not left.value.code
    printed = capsys.readouterr().out
    for line in ("--model=none  (str)", "--lr=none  (float, larger than 0)\n        papers: 5e-7; 2e-6",
                 "--steps=10  (int, at least 1)\n        updates; 100 % of them", "--dry_run=false  (bool)",
                 "--dtype=auto  (str, one of auto, float32)", "--plain=3  (int)", "--names=  (str,str,…)",
                 "--betas=0.9,0.999  (float,float,…, at least 0 and less than 1)"):
        assert f"\n  {line}\n" in printed
    assert printed.startswith("Do something with a model.\n\nModel:\n  --model")
    assert "\n\nLoop:\n  --steps" in printed
    assert printed.endswith("\n\nRecipes:\n  dpo  beta=0.1\n")


def test_a_subclass_says_only_what_differs():
    printed = cli.help_text(Derived)
    assert "  --steps=20  (int, at least 1)\n        updates" in printed
    assert "  --top_p=1.0  (float, larger than 0 and at most 1)\n        of what it samples" in printed
    assert printed.index("--reward") < printed.index("Loop:")


SCRIPT = """
import sys
sys.path.insert(0, sys.argv.pop(1))
from dataclasses import dataclass
from support import cli
@dataclass
class Settings:
    times: int = 1
def main(settings):
    print("é" * settings.times)
    if not settings.times:
        raise cli.InputError("ü is zero.")
    for _ in range(100000):
        print("line" * settings.times)
cli.run(main, Settings)
"""


def test_the_body_of_a_script():
    """Bad input: one line on stderr, status 1. A reader that leaves is no error; ? is for other letters."""
    def start(*arguments):
        return subprocess.Popen([sys.executable, "-c", SCRIPT, Path(cli.__file__).parents[1], *arguments],
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                env={**os.environ, "PYTHONIOENCODING": "ascii"})
    wrong = {"--times=x": b"--times=x: not a value of type int.", "--times=0": b"? is zero."}
    for argument, says in wrong.items():
        script = start(argument)
        assert (script.communicate()[1], script.returncode) == (b"error: " + says + b"\n", 1)
    script = start("--times=2")
    assert script.stdout.readline() == b"??\n"
    script.stdout.close()
    assert (script.wait(), script.stderr.read()) == (0, b"")


# ------------------------------------------------------------------------------------------------------------
# JSON and progress

@pytest.mark.parametrize("content, says", [
    (b"{", "not valid JSON (Expecting property name"), (b"", "not valid JSON (Expecting value: line 1"),
    (b'{"a": "\xff"}', "not valid JSON ('utf-8' codec"), (b"[" * 100_000, "not valid JSON (maximum"),
    (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON (Exceeds"), (b"[1]", "does not hold a JSON object.")])
def test_json_that_is_none_names_the_file(content, says, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        cli.read_json(path)
    assert str(caught.value).startswith(str(path)) and says in str(caught.value)


def test_json_that_is_missing(tmp_path):
    assert cli.read_json(tmp_path / "none.json", absent={}) == {}
    for path, says in ((tmp_path / "none.json", "is missing."), (tmp_path, "cannot be read: Is a dir")):
        with pytest.raises(InputError, match=f"{path} {says}"):
            cli.read_json(path)


def test_the_step_line(capsys):
    """Outside of a terminal the first and the last line are printed, and others only now and then."""
    line = cli.StepLine(20, "dpo")
    line.resume_at(5)
    for step in range(6, 21):
        line.update(step, f"loss {step}")
    first, last = capsys.readouterr().out.splitlines()
    assert first == "dpo 6/20 [0:00:00 < 0:00:00] loss 6"
    assert last == "dpo 20/20 [0:00:00 < 0:00:00] loss 20"
    assert list(map(cli.duration, (59.9, 61, 3599, 7260))) == ["0:00:59", "0:01:01", "0:59:59", "2:01:00"]
