"""RLHF, the baseline of paper 2: a reward model from preference pairs, and PPO against it.

    torchrun -m experiments.rlhf                  the embedded world: base, SFT, reward model, PPO
    torchrun -m experiments.rlhf --recipe=reward --model=SFT --data=PAIRS --out_dir=out/reward
    torchrun -m experiments.rlhf --model=SFT --reward=out/reward/final --prompts=FILE --out_dir=out/rlhf

The reward model is the same transformer under a head of one number, read at the last token of x⊕y; its folder
is what transformers calls sequence classification. PPO trains two networks: the policy, from the SFT model,
and the value network, from the reward model. Ranks, data, sampling, checkpoints and the loop are train.py's;
here is what differs.

Sources: [BT] the Bradley–Terry loss, as in Ouyang et al. 2022 (arXiv 2203.02155), eq. 1; [PPO] Schulman et
al. 2017 (1707.06347), eq. 7 and 9; [GAE] Schulman et al. 2015 (1506.02438), eq. 16; [N+] the details listed
by Huang et al. 2024 (2403.17031). Left out: adapters, an entropy bonus, an adaptive κ, minibatches (a smaller
--batch_size makes as many updates, and on fresher samples).

Letters: S sequences, T tokens of a response, M tokens of all responses, one after the other.
"""
import dataclasses
import math
import os
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import data
import forest
import losses
import model
import recipes
import train
from experiments import toy
from support.cli import InputError, setting
from support.metrics import METRICS, Log
from support.ranks import launch

# ------------------------------------------------------------------------------------------------------------
# Formulas: pure functions of tensors

def reward_loss(chosen, rejected):
    """-log σ(r(x, y⁺) - r(x, y⁻)) [BT]: two tensors (N,) of rewards -> (N,).

    r⁺ = 1.5, r⁻ = ½: log(1 + e⁻¹) = 0.3133. Equal rewards: ln 2.
    """
    return -F.logsigmoid(chosen - rejected)


def token_rewards(logprobs, reference, score, kl_coef):
    """The reward of each token [N+]: -κ (log π_old(y_t) - log π_ref(y_t)), plus r(x, y) at the last.

    logprobs, reference: (T,) in nats; score: a number. Gives (T,), with the sum
    r - κ (log π_old(y|x) - log π_ref(y|x)). κ = ½, log-ratios 2 and -1, r = 3: (-1, ½ + 3).
    """
    rewards = -kl_coef * (logprobs - reference)
    rewards[-1] += score
    return rewards


def gae(rewards, values, gamma, lam):
    """A_t = Σ_l (γλ)^l δ_{t+l} with δ_t = r_t + γ V_{t+1} - V_t [GAE, eq. 16]: (T,) -> (T,).

    values: V_t, of what stands before token t; after the last token it is 0. The return is A_t + V_t.
    γ = 1, λ = ½, r = (0, 1), V = (½, ¼): δ = (-¼, ¾), A = (-¼ + ½·¾, ¾) = (⅛, ¾).
    """
    following = torch.cat((values[1:], values.new_zeros(1)))
    advantages, ahead = [], 0.0
    for delta in reversed((rewards + gamma * following - values).tolist()):
        ahead = delta + gamma * lam * ahead
        advantages.append(ahead)
    return torch.tensor(advantages[::-1], dtype=values.dtype)


def moments(values, total=list):
    """(mean, variance) of values (M,) of all ranks; total([numbers]) adds numbers up over the ranks."""
    count, first = total([len(values), float(values.sum())])
    mean = first / count
    second, = total([float((values - mean).square().sum())])
    return mean, second / count


def whiten(advantages, total=list):
    """(A - mean) / deviation over the batch's response tokens [N+]: (M,) -> (M,). Equal ones all become 0.

    (1, 3) -> (-1, 1).
    """
    mean, variance = moments(advantages, total)
    return (advantages - mean) / math.sqrt(variance + 1e-12)


def policy_loss(logprobs, old, advantages, clip):
    """-min(ρ A, clip(ρ, 1 ± ε) A) with ρ = π(y_t) / π_old(y_t) [PPO, eq. 7].

    logprobs, old: log-probabilities (M,); advantages: A (M,). Gives (M,).
    ρ = 3/2, ε = 0.2: A = 1 gives -1.2, without a gradient: this token has moved far enough. A = -1 gives 3/2.
    """
    ratio = (logprobs - old).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


def value_loss(values, old, returns, clip):
    """½ max((V - R)², (clip(V, V_old ± ε) - R)²) [N+]: (M,) each -> (M,).

    V_old = 0, R = 1, ε = 0.2: V = ½ gives ½ max(¼, 0.64) = 0.32, without a gradient; V = -½ gives
    ½ · 2.25 = 1.125.
    """
    clipped = torch.clamp(values, old - clip, old + clip)
    return 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square())


# ------------------------------------------------------------------------------------------------------------
# One number instead of logits

def read_head(net, hidden):
    """The head's number at hidden states (n, D): (n,), in float32 at least, for small differences count."""
    return net.head(hidden if hidden.dtype == torch.float64 else hidden.float())[:, 0]


def scores(net, packed):
    """r(x, y), unshifted, of each sequence of a Forest, read at its last token: (S,)."""
    last = torch.stack([path[-1] for path in packed.paths])
    return read_head(net, net.hidden(packed)[last.to(net.embed.weight.device)])


def values_by_token(net, packed, starts):
    """V_t (M,) of each response token, read at the token before it, as losses.logprobs_by_token reads π."""
    before = torch.cat([path[start - 1:-1] for path, start in zip(packed.paths, starts)])
    return read_head(net, net.hidden(packed)[before.to(net.embed.weight.device)])


def reward_shift(config, where):
    """What the folder `where` asks to take from its scores; 0 for a reward model of somebody else."""
    shift = config.source.get("reward_shift", 0.0)
    if not isinstance(shift, (int, float)) or not math.isfinite(shift):
        raise InputError(f"{where}/config.json: reward_shift must be a number, not {shift!r:.60}.")
    return shift


def padding_id(tokenizer, chat, config):
    """An id that never ends a response, or None: transformers takes the last other id for the end."""
    may_end = tokenizer.sampling_mask(config.vocab_size)
    may_end[chat.end] = True
    free = [id for id in range(config.vocab_size) if not may_end[id]]
    return max(free, key=lambda id: (id != tokenizer.unk_id, id), default=None)    # <unk> comes last


# ------------------------------------------------------------------------------------------------------------
# Settings

class Recipe(recipes.Recipe):
    @property
    def has_reference(self):
        return self.loss == "ppo"

    def __post_init__(self):
        """These two are no combinations of the axes, so there is nothing to refuse."""


# Paper 2 gives κ = 0.05 for its RLHF baseline; learning rates and batches are ours.
OURS = dict(optimizer="adam", batch_size=64, warmup_steps=10, grad_clip=1.0)
RECIPES = {
    #                loss      responses  pairs      labels
    "reward": Recipe("reward", "dataset", "dataset", "hard", OURS | dict(lr=1e-5)),
    "rlhf":   Recipe("ppo",    "policy",  None,      None,   OURS | dict(lr=2e-6)),
}


@dataclass
class Settings(recipes.Settings):
    """Train a reward model (--recipe=reward) or a policy against one (rlhf); without --model on toy data."""
    recipe: str = "rlhf"
    k: int = 1
    micro_batch_size: int = 8
    temperature: float = setting(1.0, "another one would not sample from the ratio's π_old", above=0)
    top_p: float = setting(1.0, "see temperature", above=0, most=1)
    reward: str | None = setting(None, "rlhf: folder of the reward model", group="Reward model and PPO")
    shift_samples: int = setting(256, "reward: SFT responses whose mean reward becomes 0", least=1)
    kl_coef: float = setting(0.05, "κ, the price of a nat between policy and reference (paper 2)", least=0)
    ppo_epochs: int = setting(4, "updates on each rollout", least=1)
    clip_range: float = setting(0.2, "ε of the ratio", above=0)
    value_clip_range: float = setting(0.2, "ε of the value", above=0)
    value_coef: float = setting(0.1, "weight of the value loss", least=0)
    gamma: float = setting(1.0, "discount per token", least=0, most=1)
    gae_lambda: float = setting(0.95, "of the advantage; 0 trusts the values, 1 the returns", least=0, most=1)
    eos_penalty: float = setting(1.0, "taken from the reward of a response that does not end", least=0)

    recipes = RECIPES

    def __post_init__(self):
        super().__post_init__()
        self.reward = self.reward and os.path.normpath(self.reward)
        if self.lora_rank:
            raise InputError(f"--lora_rank={self.lora_rank}: only train.py trains adapters.")
        if self.dry_run:
            raise InputError("--dry_run knows the memory of train.py's recipes only, not of these two.")

    def folders(self):
        return list(dict.fromkeys([*super().folders(), *filter(None, [self.reward])]))

    def users(self):
        rlhf = self.recipe == "rlhf"
        ppo = "reward kl_coef ppo_epochs clip_range value_clip_range value_coef gamma gae_lambda eos_penalty"
        return [*super().users(), ("beta judge_task reference_cache", False, "train.py"),
                (ppo, rlhf, "--recipe=rlhf"), ("shift_samples", not rlhf, "--recipe=reward")]


def check_folder(option, folder, is_reward_model):
    """Refuse a reward model where an SFT model is needed, and the other way round."""
    if model.read_config(folder).reward_head != is_reward_model:
        what = ("is no reward model; --recipe=reward makes one" if is_reward_model else
                "is a reward model; name the SFT model to start from")
        raise InputError(f"--{option}={folder} {what}.")


# ------------------------------------------------------------------------------------------------------------
# The reward model

class RewardTrainer(train.Trainer):
    """Preference pairs -> a reward model that starts from the SFT model's body and a head of zeros."""

    def __init__(self, settings):
        check_folder("model", settings.model, False)
        super().__init__(settings)
        self.loss = self.preference_loss

    def load(self, folder, dtype, trained=False):
        return super().load(folder, dtype, trained, reward_head=trained)       # the SFT model is not trained

    def preference_loss(self, pairs):
        """(N,) losses of pairs, y⁺ and y⁻ after the same x."""
        packed, _ = train.pack_pairs(pairs, "x")
        chosen, rejected = scores(self.policy, packed).view(-1, 2).unbind(1)
        values, margin = reward_loss(chosen, rejected), chosen - rejected
        self.log.add_all({"loss": values, "margin": margin, "accuracy": losses.correct(margin)})
        self.log.tokens += sum(2 * len(pair.x) + len(pair.chosen) + len(pair.rejected) for pair in pairs)
        return values

    def answer_prompts(self, step):
        """A reward model answers nothing."""
        return {}

    def save_final(self, name="final"):
        """final/ or best/, with the shift and a padding id in its config.json."""
        config = self.policy.config
        extra = {"reward_shift": self.shift(),
                 "pad_token_id": padding_id(self.tokenizer, self.data.limits["chat"], config)}
        self.policy.config = dataclasses.replace(config, source=config.source | extra)
        super().save_final(name)

    @torch.no_grad()
    def shift(self):
        """The mean score of the SFT model's own responses to the first prompts, which is to count as 0."""
        sft, rank = self.load_frozen(self.settings.model), self.ranks.rank
        number = min(self.settings.shift_samples, len(self.data))
        prompts = self.data.positions(0, number)[rank::self.ranks.size]
        with train.gathered(self.policy, sft):
            samples = self.sample_prompts(sft, self.steps, prompts, rank)    # as in a step after the last
            rows = [query.x + one.ids for query, group in zip(prompts, samples) for one in group]
            size = self.settings.micro_batch_size
            found = [scores(self.policy, forest.pack(rows[i:i + size])) for i in range(0, len(rows), size)]
        total, count = self.ranks.sum([sum(float(part.double().sum()) for part in found), len(rows)])
        self.say(f"mean reward of {count:.0f} responses of {self.settings.model}: {total / count:.4f}, "
                 "from now on 0")
        return total / count


# ------------------------------------------------------------------------------------------------------------
# PPO

@dataclass
class Response:
    """One response y to x and what is known of it before the update; tensors (T,) in float64 on the CPU."""
    x: list
    ids: list
    finished: bool
    text: str = ""
    score: float = 0.0                       # the reward model's, shifted
    old: torch.Tensor | None = None          # log π_old of its tokens
    reference: torch.Tensor | None = None    # log π_ref
    values: torch.Tensor | None = None       # V_old
    advantages: torch.Tensor | None = None   # whitened
    returns: torch.Tensor | None = None

    @property
    def kl(self):
        """log π_old(y|x) - log π_ref(y|x), in nats."""
        return float((self.old - self.reference).sum())


@dataclass
class Group:
    """The K responses to one prompt, which share it in the forest: one example of the loop."""
    responses: list

    @property
    def count(self):
        """Tokens of its responses, over which the loss is a mean."""
        return sum(len(one.ids) for one in self.responses)


def all_of(groups):
    return [one for group in groups for one in group.responses]


def tokens_of(responses, name):
    """The tensors (T,) of that name of all responses, one after the other: (M,)."""
    return torch.cat([torch.zeros(0, dtype=torch.float64), *(getattr(one, name) for one in responses)])


def pack_responses(responses):
    """(forest of x⊕y of each response, where each y starts)."""
    return forest.pack([one.x + one.ids for one in responses]), [len(one.x) for one in responses]


class PPOTrainer(train.Trainer):
    """A policy, its frozen reference and reward model; and a value network that starts from that model."""
    value = None                             # the value network, which comes last

    def __init__(self, settings):
        s = settings
        if not s.reward:
            raise InputError("--reward: name the folder of the reward model, as --recipe=reward writes it.")
        check_folder("reward", s.reward, True)
        check_folder("model", s.model, False)
        super().__init__(s)
        self.reward = self.load_frozen(s.reward)
        self.shift = reward_shift(self.reward.config, s.reward)
        self.value = self.load(s.reward, self.masters, trained=True)
        self.value.compute_dtype = self.dtype
        self.optimizer = self.make_optimizer()           # of both networks

    def load(self, folder, dtype, trained=False):
        return super().load(folder, dtype, trained, reward_head=folder == self.settings.reward)

    def networks(self):
        return {"policy": self.policy} | ({"value": self.value} if self.value is not None else {})

    def new_log(self):
        ours = "reward policy_loss value_loss clip_share explained_variance reward_seconds"
        return Log(self.ranks, [*METRICS, *ours.split()])

    def update(self, step):
        """ppo_epochs optimizer steps on one rollout. Where the first fails, the step is skipped; where a
        later one fails, the rest is left out."""
        self.begin_update(step)
        groups, norms = self.rollout(step, self.batch(step)), []
        with self.log.timed("update_seconds"):
            for epoch in range(self.settings.ppo_epochs):
                norm, why_not = self.learn(groups, self.ppo_loss)
                norms.append(norm)
                if epoch == 0:
                    self.count_skip(step, why_not)
                elif why_not:
                    self.say(f"\nstep {step + 1}, update {epoch + 1}: {why_not}; the rest is left out")
                if why_not:
                    break
        return self.metrics(step, sum(norms) / len(norms))

    def rollout(self, step, prompts):
        """K responses to each of this rank's prompts, with all that the updates take as constant: Groups."""
        s, first = self.settings, step * self.settings.batch_size + self.ranks.rank
        with train.gathered(self.policy, self.reference, self.reward, self.value):
            with self.log.timed("sample_seconds"):
                samples = self.sample_prompts(self.policy, step, prompts, first)
            with self.log.timed("reward_seconds"):
                groups = self.read(prompts, samples)
        self.estimate(all_of(groups))
        self.describe(all_of(groups))
        self.log.add("prompt_cut", [query.cut for query in prompts])
        self.out.write_lines("rollouts", step + 1, [
            {"prompt": query.row.prompt, "response": one.text, "reward": round(one.score, 6),
             "kl": round(one.kl, 6), "finished": [one.finished, True]}
            for query, group in zip(prompts, groups) for one in group.responses])
        if s.sample_every and step % s.sample_every == 0 and prompts:
            self.say(f"\nstep {step + 1}: {data.context_text(prompts[0].row.prompt)!r}")
            for one in groups[0].responses:
                self.say(f"  reward {one.score:7.3f}  {one.text!r}")
        return groups

    @torch.no_grad()
    def read(self, prompts, samples):
        """The samples as Groups of Responses, with their log-probabilities, values and scores. The
        micro-batches are those of the updates: the first ratio is then exactly 1."""
        size = self.settings.micro_batch_size
        groups = [Group([Response(query.x, one.ids, one.finished, one.text) for one in group])
                  for query, group in zip(prompts, samples)]
        for i in range(0, len(groups), size):
            responses = all_of(groups[i:i + size])
            packed, starts = pack_responses(responses)
            lengths = [len(one.ids) for one in responses]
            found = {"old": losses.logprobs_by_token(self.policy, packed, starts),
                     "reference": losses.logprobs_by_token(self.reference, packed, starts),
                     "values": values_by_token(self.value, packed, starts)}
            for name, values in found.items():
                for one, part in zip(responses, values.cpu().double().split(lengths)):
                    setattr(one, name, part)
            for one, score in zip(responses, scores(self.reward, packed).tolist()):
                one.score = score - self.shift
        return groups

    def estimate(self, responses):
        """Give the responses their returns and their advantages, whitened over all ranks."""
        s = self.settings
        for one in responses:
            score = one.score - (0.0 if one.finished else s.eos_penalty)
            rewards = token_rewards(one.old, one.reference, score, s.kl_coef)
            one.advantages = gae(rewards, one.values, s.gamma, s.gae_lambda)
            one.returns = one.advantages + one.values
        white = whiten(tokens_of(responses, "advantages"), self.ranks.sum)
        for one, part in zip(responses, white.split([len(one.ids) for one in responses])):
            one.advantages = part
        returns, values = tokens_of(responses, "returns"), tokens_of(responses, "values")
        _, missed = moments(returns - values, self.ranks.sum)
        _, variance = moments(returns, self.ranks.sum)
        self.log.value("explained_variance", 1 - missed / max(variance, 1e-12))

    def describe(self, responses):
        """Metrics of responses, means over them; `reward` is the shifted score, without κ and the penalty."""
        self.log.add_all({"reward": [one.score for one in responses], "kl": [one.kl for one in responses],
                          "response_length": [len(one.ids) for one in responses],
                          "finished": [one.finished for one in responses]})

    def ppo_loss(self, groups):
        """(M,) losses of the groups' tokens: the policy's, and value_coef times the value network's."""
        s, responses = self.settings, all_of(groups)
        packed, starts = pack_responses(responses)
        logprobs = losses.logprobs_by_token(self.policy, packed, starts)
        values = values_by_token(self.value, packed, starts)
        old, advantages = (tokens_of(responses, name).to(logprobs) for name in ("old", "advantages"))
        old_values, returns = (tokens_of(responses, name).to(values) for name in ("values", "returns"))
        of_policy = policy_loss(logprobs, old, advantages, s.clip_range)
        of_value = value_loss(values, old_values, returns, s.value_clip_range)
        both = of_policy + s.value_coef * of_value
        clipped = ((logprobs - old).exp() - 1).abs() > s.clip_range
        self.log.add_all({"loss": both, "policy_loss": of_policy, "value_loss": of_value,
                          "clip_share": clipped})
        self.log.tokens += sum(len(one.x) + len(one.ids) for one in responses)
        return both

    def blank_example(self):
        zero = torch.zeros(1, dtype=torch.float64)
        return Group([Response([0], [0], True, "", 0.0, zero, zero, zero, zero, zero)])

    @torch.no_grad()
    def evaluate(self):
        """eval_reward, eval_kl, … of fresh responses to held-out prompts, always from the same uniforms."""
        self.log, rank = self.new_log(), self.ranks.rank
        prompts = self.data.held_out[rank::self.ranks.size]
        with train.gathered(self.policy, self.reference, self.reward, self.value):
            far = 10 ** 6                                # a step whose stream no step of a run has
            groups = self.read(prompts, self.sample_prompts(self.policy, far, prompts, rank))
        self.describe(all_of(groups))
        return {f"eval_{name}": value for name, value in self.log.means().items()}


TRAINERS = {"reward": RewardTrainer, "rlhf": PPOTrainer}


def world(settings):
    """The embedded world's path to a reward model and PPO."""
    trainers = {name: (recipes.Settings, train.Trainer) for name in recipes.RECIPES}
    return toy.main(settings, trainers | {name: (Settings, trainer) for name, trainer in TRAINERS.items()})


def main(settings):
    """Train what was named, or run the toy world's path to it where no model was."""
    return train.main(settings, TRAINERS[settings.recipe], world)


if __name__ == "__main__":
    launch(main, Settings)
