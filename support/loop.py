"""The loop over a trainer's steps: evaluation, checkpoints, the page, signals, the way out.

A trainer (train.py) knows how to make a step; this knows when to save, to measure, to show and to stop.
"""
import dataclasses
import json
import signal
import sys
import time

from support import cli, report
from support.cli import InputError
from support.disk import last_metrics
from support.health import Health, opening
from support.metrics import is_best, rounded, summary


class Loop:
    """The steps of a trainer, from where out_dir was left to final/: evaluation, checkpoints, the way out."""

    def __init__(self, trainer, stop):
        self.trainer, self.settings, self.stop = trainer, trainer.settings, stop
        self.ranks, self.out = trainer.ranks, trainer.out
        self.began = self.saved_at = time.monotonic()
        self.health = Health(trainer.steps, trainer.data.max_tokens, self.settings.judge_anyway)

    def run(self):
        """Train to the end; returns the last metrics."""
        t, metrics = self.trainer, None
        state = self.out.begin(resolved(t), t.steps, t.allocate_state)
        if state is None:
            metrics = last_metrics(self.out.path / "metrics.jsonl")
            t.say(f"{self.out.path} is finished: {json.dumps(metrics)}")
            return metrics
        t.state, self.first = state, state["step"]
        t.say(opening(self.settings, t.policy.parameters(), len(t.data), t.steps, t.dtype, self.ranks))
        line = cli.StepLine(t.steps, self.settings.recipe)
        line.resume_at(state["step"])
        if state["step"] == 0:
            measured = t.answer_prompts(0)
            self.write(measured and {"step": 0} | measured)
        for step in range(state["step"], t.steps):
            metrics = t.update(step)
            t.state["step"] = step + 1
            self.write(metrics)
            metrics |= self.evaluate(step + 1)
            line.update(step + 1, summary(metrics))
            for sentence in self.health.after(metrics, time.monotonic()):
                t.say(f"\n{sentence}")
            self.save_or_stop(step + 1)
            if self.settings.report_every and (step + 1) % self.settings.report_every == 0:
                self.write_page(step + 1)
        if t.state["skipped"] == t.steps:
            raise InputError(f"each of the {t.steps} updates was skipped: nothing was learned, and final/ is "
                             f"not written.")
        t.save_final()
        self.write_page(t.steps)
        if t.state["skipped"]:
            t.say(f"{t.state['skipped']} of {t.steps} updates were skipped")
        t.say(f"{self.settings.recipe}: written to {self.out.path / 'final'}")
        return metrics or last_metrics(self.out.path / "metrics.jsonl")    # killed before: no step was left

    def write(self, record):
        """Add a line to metrics.jsonl, if there is something in it."""
        self.ranks.on_first(lambda: self.out.append("metrics.jsonl", [rounded(record)] if record else []))

    def evaluate(self, step):
        """Held-out metrics where they are due, also as a line of their own after the step's."""
        t, every = self.trainer, self.settings.eval_every
        if not (step == t.steps or every and step % every == 0):
            return {}
        best = self.settings.keep_best
        measured = (t.evaluate() if t.data.held_out else {}) | t.answer_prompts(step)
        self.write(measured and {"step": step} | measured)
        if best in measured and self.ranks.on_first(lambda: is_best(self.out.path / "metrics.jsonl", best)):
            t.save_final("best")
            t.say(f"\nstep {step}: {best} {measured[best]:.4g}, the best so far, is in "
                  f"{self.out.path / 'best'}")
        return measured

    def write_page(self, step):
        """out_dir/report.html from what is written so far; where that fails the run goes on."""
        if self.ranks.rank == 0:
            pace = (time.monotonic() - self.began) / max(step - self.first, 1)
            left = cli.duration(pace * (self.trainer.steps - step))
            try:
                report.write([self.out.path], f"about {left} to go")
            except (OSError, ValueError, KeyError, TypeError) as error:
                self.trainer.say(f"\nreport.html was not written: {error}")

    def save_or_stop(self, step):
        """Save where it is due: by steps, by time, at the end, on a signal; then leave, if asked to."""
        s, last = self.settings, step == self.trainer.steps
        late = s.save_minutes and time.monotonic() - self.saved_at > 60 * s.save_minutes
        # Ranks hear of a signal at different times, and clocks differ: they save and stop together.
        number, late = (self.ranks.largest(int(value)) for value in (self.stop.number, late))
        why_stop = self.health.why_stop
        if last or number or why_stop or late or s.save_every and step % s.save_every == 0:
            self.out.save(self.trainer.state_tensors(), self.trainer.state)
            self.saved_at = time.monotonic()
        if number and not last:
            self.trainer.say(f"\n{signal.Signals(number).name}: stopped after step {step} of "
                             f"{self.trainer.steps} and saved; the same command goes on from there.")
            sys.exit(128 + number)
        if why_stop and not last:
            raise InputError(f"step {step}: {why_stop}")


def resolved(trainer):
    """The settings with every default filled in, as config.json records them."""
    t, s, d = trainer, trainer.settings, trainer.data
    return dataclasses.asdict(s) | dict(
        steps=t.steps, warmup_steps=t.warmup, dtype=str(t.dtype).removeprefix("torch."),
        chat=d.limits["chat"].name, started=t.out.started, max_length=d.max_length, max_tokens=d.max_tokens,
        max_prompt_length=d.limits["max_prompt_length"],
        reference=s.reference or s.model, judge=s.judge or s.model)
